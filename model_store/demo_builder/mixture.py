"""The X-LoRA mathematics for training: a Llama whose linears add a gated stack of LoRA experts.

    y = W x + sum_e g[s, e] * (alpha / r) * B_e A_e x        at every site s, g per token

Written from DESIGN section 2 and independent of the server, so that server and demo check each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Gate:
    """The gate rows of the forward now running; None switches the experts off (scaling pass with value 0)."""

    rows: Tensor | None = None  # [B, T, S, E]


class MixedLinear(nn.Module):
    """A frozen or trained linear plus the stacked experts of one site."""

    def __init__(self, linear: nn.Linear, gate: Gate, site: int, experts: int, rank: int, alpha: int) -> None:
        super().__init__()
        self.linear, self.gate, self.site, self.rank, self.scale = linear, gate, site, rank, alpha / rank
        self.lora_a = nn.Parameter(torch.empty(experts, rank, linear.in_features))
        self.lora_b = nn.Parameter(torch.zeros(experts, linear.out_features, rank))
        for a in self.lora_a:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, in] -> [B, T, out]."""
        y: Tensor = self.linear(x)
        if self.gate.rows is None:
            return y
        g = self.gate.rows[:, :, self.site].repeat_interleave(self.rank, dim=-1)  # [B, T, E*R]
        mixed = F.linear(x, self.lora_a.flatten(0, 1)) * (g * self.scale)
        return y + F.linear(mixed, self.lora_b.permute(1, 0, 2).flatten(1))


class Classifier(nn.Module):
    """The gate's MLP of depth 2: hidden [B, T, H] -> scalings [B, T, S, E], fp32; as PEFT's XLoraClassifier."""

    def __init__(self, hidden: int, size: int, sites: int, experts: int) -> None:
        super().__init__()
        self.sites, self.experts = sites, experts
        self.inner = nn.ModuleList([nn.Linear(hidden, size)])
        self.last = nn.Linear(size, sites * experts)
        nn.init.normal_(self.last.weight, std=0.01)
        nn.init.zeros_(self.last.bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """[B, T, H] -> [B, T, S, E], before the softmax."""
        z = hidden.float()
        for layer in self.inner:
            z = F.relu(layer(z))
        out: Tensor = self.last(z)
        return out.view(*out.shape[:-1], self.sites, self.experts)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, H] -> [B, T, S, E], rows summing to 1."""
        return self.logits(hidden).softmax(-1)


@dataclass(frozen=True)
class Shape:
    """Every size of the demo's networks."""

    hidden: int = 192
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    feed_forward: int = 512
    vocab: int = 1024
    max_positions: int = 8192
    rank: int = 8
    alpha: int = 16
    gate_size: int = 64
    experts: int = 4

    def llama(self, bos: int, eos: int, pad: int) -> LlamaConfig:
        """The base model's configuration."""
        return LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.feed_forward,
            vocab_size=self.vocab,
            max_position_embeddings=self.max_positions,
            tie_word_embeddings=True,
            bos_token_id=bos,
            eos_token_id=eos,
            pad_token_id=pad,
            rms_norm_eps=1e-5,
        )


@dataclass
class XLora:
    """Base, experts and classifier with the two passes."""

    base: LlamaForCausalLM
    shape: Shape
    gate: Gate = field(default_factory=Gate)
    sites: list[str] = field(default_factory=list)
    classifier: Classifier = field(init=False)

    def __post_init__(self) -> None:
        """Swap every target for a `MixedLinear`, in module-traversal order."""
        found = [
            n for n, m in self.base.named_modules() if isinstance(m, nn.Linear) and n.rsplit(".", 1)[-1] in TARGETS
        ]
        self.sites = found
        for index, name in enumerate(found):
            parent, leaf = self.base.get_submodule(name.rsplit(".", 1)[0]), name.rsplit(".", 1)[-1]
            linear = getattr(parent, leaf)
            setattr(
                parent,
                leaf,
                MixedLinear(linear, self.gate, index, self.shape.experts, self.shape.rank, self.shape.alpha),
            )
        self.classifier = Classifier(self.shape.hidden, self.shape.gate_size, len(found), self.shape.experts)

    def site(self, name: str) -> MixedLinear:
        """The mixed linear at a module path."""
        module = self.base.get_submodule(name)
        assert isinstance(module, MixedLinear)
        return module

    def expert_parameters(self) -> list[nn.Parameter]:
        """A and B of every site."""
        return [p for n in self.sites for p in (self.site(n).lora_a, self.site(n).lora_b)]

    def hidden(self, ids: Tensor, rows: Tensor | None, **kwargs: Any) -> Tensor:
        """Last hidden state (after the final norm) [B, T, H] with the given gate rows."""
        self.gate.rows = rows
        out = self.base.model(input_ids=ids, use_cache="past_key_values" in kwargs, **kwargs)
        self.gate.rows = None
        state: Tensor = out.last_hidden_state
        return state

    def logits(self, ids: Tensor, rows: Tensor | None, **kwargs: Any) -> Tensor:
        """Logits [B, T, V] with the given gate rows."""
        out: Tensor = self.base.lm_head(self.hidden(ids, rows, **kwargs))
        return out

    def scalings(self, ids: Tensor, **kwargs: Any) -> Tensor:
        """The scaling pass: base with gate 0, then the classifier; [B, T, S, E]."""
        with torch.no_grad():
            hidden = self.hidden(ids, None, **kwargs)
        out: Tensor = self.classifier(hidden)
        return out

    def fixed_rows(self, weights: Tensor) -> Tensor:
        """[..., E] -> [..., S, E]: the same weights at every site."""
        return weights[..., None, :].expand(*weights.shape[:-1], len(self.sites), weights.shape[-1])
