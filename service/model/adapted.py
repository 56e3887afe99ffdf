"""AdaptedModule: a module of the base plus the gated experts of its site (DESIGN's real pass, two matrix products).

    y = base(x), and for rows from the gate's first row on: + B_cat((A_cat x) * g)

One formula for every kind of adapted module, with three variations: an embedding looks A_cat up by ids, the language
model's head gets only the rows that need logits, and embeddings and quantised linears run their own forward as base(x).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from service.model.experts import ExpertStack
from service.model.gate import Gate
from service.model.targets import as_linear, is_plain_linear


class AdaptedModule(nn.Module):
    """A module of the base with the experts of one site. Inference only."""

    base: nn.Module | None  # computes base(x); None: base(x) = W x + b, with `weight` and `bias`
    weight: Tensor  # of a linear [out, in], of an embedding [V, H]; None if quantised. transformers reads it, too
    bias: Tensor | None
    lora_a: Tensor  # [R, in]; of an embedding [V, R]
    lora_b_t: Tensor  # [R, out]

    def __init__(self, base: nn.Module, stack: ExpertStack, gate: Gate, site: int, *, is_head: bool = False) -> None:
        """`is_head`: whether `base` is the causal LM's output embedding."""
        super().__init__()
        self.gate, self.site, self.is_head = gate, site, is_head
        self.looks_up = isinstance(base, nn.Embedding)
        self.base = None if is_plain_linear(base) else base
        base = as_linear(base) if is_plain_linear(base) else base
        self.register_parameter("weight", getattr(base, "weight", None))
        self.register_parameter("bias", getattr(base, "bias", None))
        scale = getattr(base, "embed_scale", 1.0)  # Gemma 3; PEFT scales the experts' part as well
        self.register_buffer("lora_a", stack.a.T.contiguous() if self.looks_up else stack.a, persistent=False)
        self.register_buffer("lora_b_t", stack.b_t * scale if self.looks_up else stack.b_t, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., T, in] or ids [1, T] -> [..., T, out]; leading dimensions are 1 (one flat batch of rows)."""
        y: Tensor = F.linear(x, self.weight, self.bias) if self.base is None else self.base(x)
        gate = self.gate
        if gate.active:
            first_row, weights = (0, self.weights_of_rows()) if self.is_head else (gate.first_row, gate.at(self.site))
            if self.looks_up:
                ranks = F.embedding(x.view(-1)[first_row:], self.lora_a)
            else:
                ranks = F.linear(x.view(-1, x.shape[-1])[first_row:], self.lora_a)
            y.view(-1, y.shape[-1])[first_row:].addmm_(ranks.mul_(weights), self.lora_b_t)
        return y

    def weights_of_rows(self) -> Tensor:
        """The head's gate, [L, R] for the rows `gate.logit_rows`; 0 in rows before the gate's first row."""
        gate = self.gate
        assert gate.logit_rows is not None
        number = gate.logit_rows - gate.first_row  # index into the rows that have a gate
        return gate.at(self.site)[number.clamp(min=0)].masked_fill_((number < 0)[:, None], 0.0)
