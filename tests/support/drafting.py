"""The draft layer recomputed with transformers' own attention and rotation, one text at a time: no code of ours."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaRMSNorm, eager_attention_forward, rotate_half

from service.checkpoint import DraftLayerWeights


class ScalingPass:
    """The base's pass over a text without experts: last hidden state, and the last layer's keys and values."""

    def __init__(self, base: Any, tokens: list[int]) -> None:
        self.base, self.tokens = base, torch.tensor(tokens)
        cache = DynamicCache()
        with torch.no_grad():
            output = base(self.tokens[None], past_key_values=cache, use_cache=True, output_hidden_states=True)
        self.hidden = output.hidden_states[-1][0]
        self.keys, self.values = cache.layers[-1].keys, cache.layers[-1].values  # [1, kv_heads, T, head_dim]

    def states(self, weights: DraftLayerWeights, anchor: int) -> list[Tensor]:
        """s_1, s_2, ... [H] behind a position, on the text's own tokens."""
        tensors = {name: tensor.float() for name, tensor in weights.tensors().items()}
        states = [self.hidden[anchor]]
        for ahead in range(1, min(len(weights.agreement), len(self.tokens) - anchor)):
            states.append(self._next(tensors, states[-1], anchor, ahead))
        return states

    def _next(self, tensors: dict[str, Tensor], state: Tensor, anchor: int, ahead: int) -> Tensor:
        embedded = self.base.get_input_embeddings().weight[self.tokens[anchor + ahead]]
        y = tensors["mix"] @ torch.cat([state, embedded]) + tensors["depths"][ahead - 1]
        kv_heads, head_dim = self.keys.shape[1], self.keys.shape[3]
        query = (tensors["query"] @ LlamaRMSNorm(len(y), 1e-6)(y)).view(1, -1, 1, head_dim)
        query = self._turned(query, anchor + ahead)
        module = SimpleNamespace(num_key_value_groups=query.shape[1] // kv_heads, training=False)
        keys, values = (part[:, :, : anchor + 1] for part in (self.keys, self.values))
        found, _ = eager_attention_forward(module, query, keys, values, None, head_dim**-0.5)
        z = y + tensors["output"] @ found.flatten()
        return z + tensors["down"] @ F.silu(tensors["up"] @ z + tensors["bias"])

    def _turned(self, query: Tensor, position: int) -> Tensor:
        rotary = next((m for name, m in self.base.named_modules() if name.endswith("rotary_emb")), None)
        if rotary is None:
            return query
        kinds = getattr(self.base.config, "layer_types", None)
        own = [kinds[-1]] if kinds and "layer_type" in inspect.signature(rotary.forward).parameters else []
        cos, sin = rotary(query, torch.tensor([[position]]), *own)
        turning, rest = query[..., : cos.shape[-1]], query[..., cos.shape[-1] :]
        return torch.cat([turning * cos + rotate_half(turning) * sin, rest], -1)
