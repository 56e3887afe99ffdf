"""What experts may adapt: Linear, transformers' Conv1D (GPT-2) and Embedding. Everything else is refused by name.

Knows the module types and how each becomes an adapted module. A subclass that computes something of its own is another
type: adapting it as its parent would be silently wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from service.checkpoint import LoraWeights
from service.model.experts import ExpertStack
from service.model.gate import Gate
from service.model.linear import AdaptedModule, XLoraLinear


class XLoraEmbedding(AdaptedModule):
    """y = W[id], and for the rows the gate is open for: + B_cat (A_cat[:, id] * g) * the family's embedding scale."""

    def __init__(self, base: nn.Embedding, stack: ExpertStack, gate: Gate, site: int) -> None:
        super().__init__(gate, site)
        self.base = base
        self.weight = base.weight
        self.register_buffer("lora_a_t", stack.a.T.contiguous(), persistent=False)  # [V, R]
        self.register_buffer("lora_b_t", stack.b_t, persistent=False)  # [R, H]

    def forward(self, ids: Tensor) -> Tensor:
        """ids [1, T] -> [1, T, H]."""
        y: Tensor = self.base(ids)
        gate = self.gate
        if gate.active:
            ranks = F.embedding(ids.view(-1)[gate.first_row :], self.get_buffer("lora_a_t")) * gate.at(self.site)
            update = torch.mm(ranks, self.get_buffer("lora_b_t"))
            scale = getattr(self.base, "embed_scale", None)  # Gemma 3; PEFT scales the experts' part as well
            y.view(-1, y.shape[-1])[gate.first_row :].add_(update if scale is None else update * scale)
        return y


class XLoraQuantised(AdaptedModule):
    """The same as XLoraLinear over a module that computes W x + b itself, from weights of its own kind."""

    def __init__(self, base: nn.Module, stack: ExpertStack, gate: Gate, site: int) -> None:
        super().__init__(gate, site)
        self.base = base
        self.register_buffer("lora_a", stack.a, persistent=False)  # [R, in]
        self.register_buffer("lora_b_t", stack.b_t, persistent=False)  # [R, out]

    def forward(self, x: Tensor) -> Tensor:
        """x [1, T, in] -> [1, T, out]."""
        y: Tensor = self.base(x)
        gate = self.gate
        if gate.active:
            rows = x.view(-1, x.shape[-1])[gate.first_row :]
            ranks = F.linear(rows, self.get_buffer("lora_a")) * gate.at(self.site)
            y.view(-1, y.shape[-1])[gate.first_row :].addmm_(ranks, self.get_buffer("lora_b_t"))
        return y


class XLoraHead(AdaptedModule):
    """The same as XLoraLinear for the language model's head, which sees only the rows whose logits are wanted."""

    bias: nn.Parameter | None
    lora_a: Tensor  # [R, H]
    lora_b_t: Tensor  # [R, V]

    def __init__(self, base: nn.Linear, stack: ExpertStack, gate: Gate, site: int) -> None:
        super().__init__(gate, site)
        self.weight, self.bias = base.weight, base.bias
        self.register_buffer("lora_a", stack.a, persistent=False)
        self.register_buffer("lora_b_t", stack.b_t, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [1, L, H] of the rows `gate.logit_rows` -> [1, L, V]."""
        y = F.linear(x, self.weight, self.bias)
        if self.gate.active:
            ranks = F.linear(x.view(-1, x.shape[-1]), self.lora_a) * self.weights_of_rows()
            y.view(-1, y.shape[-1]).addmm_(ranks, self.lora_b_t)
        return y

    def weights_of_rows(self) -> Tensor:
        """[L, R] of the rows `gate.logit_rows`: 0 in those that the gate is not open for."""
        gate = self.gate
        assert gate.logit_rows is not None
        number = gate.logit_rows - gate.first_row  # of each row among those the gate is open for
        return gate.at(self.site)[number.clamp(min=0)].masked_fill_((number < 0)[:, None], 0.0)


def refusal(module: nn.Module | None, weights: LoraWeights) -> str | None:
    """Why `weights` cannot adapt `module`, or None when they can."""
    if module is None:
        return "no module"
    if isinstance(module, nn.Embedding):
        shape = (module.num_embeddings, module.embedding_dim)
    elif isinstance(module, Conv1D):
        shape = (module.nx, module.nf)
    elif is_plain_linear(module) or is_quantised(module):
        shape = (module.in_features, module.out_features)  # type: ignore[assignment]
    else:
        return type(module).__name__
    if weights.embedding != isinstance(module, nn.Embedding):
        return f"{type(module).__name__}, not what the adapter was made for"
    found = (weights.a.shape[1], weights.b.shape[0])
    return (
        None if found == shape else f"{type(module).__name__} of {shape[0]} x {shape[1]}, not {found[0]} x {found[1]}"
    )


def adapt(module: nn.Module, stack: ExpertStack, gate: Gate, site: int, *, is_head: bool) -> nn.Module:
    """The adapted module that takes the place of `module`; `is_head`: of the causal LM's output embedding."""
    if isinstance(module, nn.Embedding):
        return XLoraEmbedding(module, stack, gate, site)
    if is_quantised(module):
        return XLoraQuantised(module, stack, gate, site)
    if is_head:
        return XLoraHead(as_linear(module), stack, gate, site)
    return XLoraLinear(as_linear(module), stack, gate, site)


def is_plain_linear(module: nn.Module) -> bool:
    """A Linear whose forward is Linear's own, or a Conv1D."""
    return isinstance(module, Conv1D) or (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward)


def is_quantised(module: nn.Module) -> bool:
    """A linear that quantised.py has made."""
    return hasattr(module, "packed") and hasattr(module, "in_features")


def as_linear(module: nn.Module) -> nn.Linear:
    """`module` itself, or a Conv1D as the Linear that it is: its weight is [in, out]."""
    if isinstance(module, Conv1D):
        linear = nn.Linear(module.nx, module.nf, device="meta")
        linear.weight = nn.Parameter(module.weight.detach().T.contiguous(), requires_grad=False)
        linear.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
        return linear
    assert isinstance(module, nn.Linear)
    return module
