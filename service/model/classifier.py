"""The X-LoRA classifier: from hidden states to logits, and from logits to scalings. Always in fp32.

Source of the formulas: X-LoRA paper (arXiv 2402.07148) section 2, PEFT `XLoraClassifier.forward` and
`XLoraLayer.get_maybe_topk_scalings`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from service.checkpoint import ClassifierWeights, XLoraConfig
from service.model.batch import GateParameters


def keep_top_k(scalings: Tensor, top_k: int | None, *, renormalise: bool) -> Tensor:
    """Keeps the `top_k` largest of the last dimension [..., E], zeroes the rest; optionally softmax over the non-zero.

    An all-zero row stays zero, never NaN.
    """
    if top_k is not None and top_k < scalings.shape[-1]:
        scalings = scalings * _largest(scalings, top_k)
    return _renormalised(scalings) if renormalise else scalings


def _largest(scalings: Tensor, top_k: int) -> Tensor:
    """Bool [..., E]: the `top_k` largest; ties as torch.topk breaks them, as in PEFT."""
    keep = torch.zeros_like(scalings, dtype=torch.bool)
    return keep.scatter_(-1, scalings.topk(top_k, dim=-1).indices, True)


def _largest_per_row(scalings: Tensor, top_k: Tensor) -> Tensor:
    """Bool [n, S, E]: the top_k[n] largest; ties go to the lower expert."""
    order = scalings.argsort(stable=True, dim=-1, descending=True)
    rank = torch.arange(scalings.shape[-1], device=scalings.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, rank) < top_k[:, None, None]


def _renormalised(scalings: Tensor) -> Tensor:
    """Softmax over the entries that are not zero."""
    zero = scalings == 0
    return scalings.masked_fill(zero, float("-inf")).softmax(-1).masked_fill(zero, 0.0)


class Classifier(nn.Module):
    """The MLP from the scaling pass's last hidden state to logits [n, S, E] (S = 1 without layerwise scalings), and the
    steps from logits to scalings.
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
        self.is_plain = config.top_k_lora is None and not config.enable_softmax_topk  # a softmax, or nothing
        self.softmax_temperature = config.softmax_temperature if config.enable_softmax else None
        self._temperature = torch.tensor(config.softmax_temperature, dtype=torch.float32, device=device)
        self.tensors: list[Tensor] = []  # weight and bias of each layer, empty where it has none
        for layer, (_, bias) in zip(layers, weights.layers, strict=True):
            self.tensors += [layer.weight, torch.empty(0) if bias is None else layer.bias]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, H] of any dtype -> z [n, S, E] fp32."""
        x, last = hidden.float(), len(self.layers) - 1
        for number, layer in enumerate(self.layers):  # slicing a ModuleList would build a new one in every step
            x = layer(x)
            if number < last and self.config.enable_relu_and_dropout:
                x = x.relu_()
        return x.view(-1, self.stored_sites, self.num_experts)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [n, H] -> scalings [n, S, E] fp32 after softmax and top-k, the weights of the experts."""
        return self.scalings(self.logits(hidden))

    def scalings(self, logits: Tensor, parameters: GateParameters | None = None) -> Tensor:
        """z [n, S, E] -> g [n, S, E]: temperature softmax, top-k and top-k softmax with the checkpoint's settings,
        overridden per row by the first n rows of `parameters`.

        Excluded experts (never all) get -inf before the softmax, or 0 where the checkpoint has no softmax.
        """
        config = self.config
        if parameters is None:
            scalings = self.before_top_k(logits)
            return keep_top_k(scalings, config.top_k_lora, renormalise=config.enable_softmax_topk)
        temperature, top_k, excluded, _ = (tensor[: len(logits)] for tensor in parameters.tensors())
        scalings = logits.masked_fill(excluded[:, None], float("-inf") if config.enable_softmax else 0.0)
        if config.enable_softmax:
            temperature = torch.where(temperature > 0, temperature, self._temperature)
            scalings = (scalings / temperature[:, None, None]).softmax(-1)
        as_checkpoint = keep_top_k(scalings, config.top_k_lora, renormalise=False)
        own_k = (top_k > 0) & (top_k != (config.top_k_lora or 0))
        kept = torch.where(own_k[:, None, None], scalings * _largest_per_row(scalings, top_k), as_checkpoint)
        return _renormalised(kept) if config.enable_softmax_topk else kept

    def before_top_k(self, logits: Tensor) -> Tensor:
        """z [n, S, E] after the temperature softmax, if the config has one; PEFT's scalings log holds these."""
        if not self.config.enable_softmax:
            return logits
        if self.config.softmax_temperature != 1.0:
            logits = logits / self._temperature.to(logits.device)
        return logits.softmax(-1)

    def dummy_row(self) -> Tensor:
        """The gate row [S, E] of the scaling pass, as the checkpoint has it."""
        return self.dummy_row_of(self.config.scaling_pass_value, self.config.top_k_lora)

    def dummy_row_of(self, value: float | None, top_k: int | None) -> Tensor:
        """A gate row of `value` (None: 1/E) for every expert, after top-k; ties as topk breaks them on a CPU."""
        value = 1.0 / self.num_experts if value is None else value
        row = torch.full((self.stored_sites, self.num_experts), value)
        return keep_top_k(row, top_k, renormalise=self.config.enable_softmax_topk)


def _linear(weight: Tensor, bias: Tensor | None, device: torch.device) -> nn.Linear:
    """An fp32 layer around existing tensors, without an initialisation first."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.to(device, torch.float32), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(device, torch.float32), requires_grad=False)
    return layer
