"""Keys and values of the last layer, as the decoder gives them to its attention: of any family of the interface.

Knows transformers' attention interface, and that the engine's KV cache holds what it is given.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from service.contract.errors import StartupError
from service.tools.two_pass import TwoPassModel

_RECORDED = "xlora_recorded"
_EAGER = "eager"

Attention = Callable[..., tuple[Tensor, Any]]


class LastLayerRecorder:
    """Runs scaling passes of a plain model with its own attention, and keeps what the last layer's is given."""

    def __init__(self, plain: TwoPassModel) -> None:
        self._plain = plain
        self._implementation: str = plain.causal_lm.config._attn_implementation
        self._last: tuple[Tensor, Tensor] | None = None  # [1, kv_heads, T, head_dim]

    def scaling_pass(self, tokens: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The last hidden state [T, H], and the last layer's keys and values, both [T, kv_heads, head_dim]."""
        causal_lm = self._plain.causal_lm
        AttentionInterface.register(_RECORDED, self._attend)
        if self._implementation in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(_RECORDED, ALL_MASK_ATTENTION_FUNCTIONS[self._implementation])
        self._last = None
        causal_lm.set_attn_implementation(_RECORDED)
        try:
            hidden = self._plain.scaling_pass(tokens)
        finally:
            causal_lm.set_attn_implementation(self._implementation)
        if (found := self._found()) is None:
            raise StartupError("the base's attention cannot be seen, so no draft layer can learn from it")
        keys, values = (tensor[0].transpose(0, 1) for tensor in found)
        return hidden, keys, values

    def _found(self) -> tuple[Tensor, Tensor] | None:
        return self._last

    def _attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *given: Any, **named: Any) -> Any:
        self._last = key, value
        return self._own(module)(module, query, key, value, *given, **named)

    def _own(self, module: nn.Module) -> Attention:
        """What the module would have called."""
        if self._implementation == _EAGER:
            own: Attention = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
            return own
        found: Attention = ALL_ATTENTION_FUNCTIONS[self._implementation]
        return found
