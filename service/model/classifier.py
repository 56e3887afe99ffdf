"""The X-LoRA classifier and what turns its logits into scalings. fp32 whatever the base's dtype is.

Source of the formulas: X-LoRA paper (arXiv 2402.07148) section 2, PEFT `XLoraClassifier.forward` and
`XLoraLayer.get_maybe_topk_scalings`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from service.checkpoint import ClassifierWeights, XLoraConfig


def keep_top_k(scalings: Tensor, top_k: int | None, *, renormalise: bool) -> Tensor:
    """Keeps the `top_k` largest of the last dimension [..., E], zeroes the rest; optionally softmax over the non-zero.

    An all-zero row stays zero, never NaN.
    """
    if top_k is not None and top_k < scalings.shape[-1]:
        keep = torch.zeros_like(scalings).scatter_(-1, scalings.topk(top_k, dim=-1).indices, 1.0)
        scalings = scalings * keep
    if renormalise:
        zero = scalings == 0
        scalings = scalings.masked_fill(zero, float("-inf")).softmax(-1).masked_fill(zero, 0.0)
    return scalings


class Classifier(nn.Module):
    """MLP from the scaling pass's last hidden state to logits [n, S, E] (S = 1 without layerwise scalings), and from
    those to scalings.
    """

    def __init__(
        self, weights: ClassifierWeights, config: XLoraConfig, num_experts: int, num_sites: int, device: torch.device
    ) -> None:
        super().__init__()
        self.config = config
        self.num_experts = num_experts
        self.stored_sites = num_sites if config.layerwise_scalings else 1
        layers = [_linear(weight, bias, device) for weight, bias in weights.layers]
        self.layers = nn.ModuleList(layers)
        self.is_plain = config.top_k_lora is None and not config.enable_softmax_topk  # a softmax at most
        self.softmax_temperature = config.softmax_temperature if config.enable_softmax else None
        self.tensors: list[Tensor] = []  # weight and bias of each layer, empty where it has none
        for layer, (_, bias) in zip(layers, weights.layers, strict=True):
            self.tensors += [layer.weight, torch.empty(0) if bias is None else layer.bias]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, H] of any dtype -> z [n, S, E] fp32."""
        x, last = hidden.float(), len(self.layers) - 1
        for number, layer in enumerate(self.layers):  # a slice of a ModuleList would be a new one, in every step
            x = layer(x)
            if number < last and self.config.enable_relu_and_dropout:
                x = x.relu_()
        return x.view(-1, self.stored_sites, self.num_experts)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [n, H] -> scalings [n, S, E] fp32 after softmax and top-k: what weights the experts."""
        return self.scalings(self.logits(hidden))

    def scalings(
        self,
        logits: Tensor,
        *,
        excluded: Sequence[int] = (),
        temperature: float | None = None,
        top_k: int | None = None,
    ) -> Tensor:
        """z [n, S, E] -> g [n, S, E]: temperature softmax, top-k, top-k softmax as the config asks.

        `excluded` experts (never all) are at -inf before the softmax, at 0 where there is none; `temperature` and
        `top_k` replace the config's.
        """
        softmax = self.config.enable_softmax
        top_k = self.config.top_k_lora if top_k is None else top_k
        if excluded:
            index = torch.tensor(excluded, device=logits.device)
            logits = logits.index_fill(-1, index, float("-inf") if softmax else 0.0)
        logits = self.before_top_k(logits, temperature)
        if top_k is None and not self.config.enable_softmax_topk:
            return logits
        return keep_top_k(logits, top_k, renormalise=self.config.enable_softmax_topk)

    def before_top_k(self, logits: Tensor, temperature: float | None = None) -> Tensor:
        """z [n, S, E] after the temperature softmax, where the config has one: what PEFT's scalings log holds."""
        if not self.config.enable_softmax:
            return logits
        temperature = self.config.softmax_temperature if temperature is None else temperature
        return (logits if temperature == 1.0 else logits / temperature).softmax(-1)

    def dummy_row(self) -> Tensor:
        """The gate row [S, E] of the scaling pass, as the checkpoint has it."""
        return self.dummy_row_of(self.config.scaling_pass_value, self.config.top_k_lora)

    def dummy_row_of(self, value: float | None, top_k: int | None) -> Tensor:
        """`value` (None: 1/E) for every expert, after top-k; ties as CPU topk breaks them."""
        value = 1.0 / self.num_experts if value is None else value
        row = torch.full((self.stored_sites, self.num_experts), value)
        return keep_top_k(row, top_k, renormalise=self.config.enable_softmax_topk)


def _linear(weight: Tensor, bias: Tensor | None, device: torch.device) -> nn.Linear:
    """An fp32 layer around tensors that exist: nothing is initialised first."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.to(device, torch.float32), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(device, torch.float32), requires_grad=False)
    return layer
