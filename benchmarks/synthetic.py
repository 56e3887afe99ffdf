"""An X-LoRA model of any size with random weights, made on the device: no file is read or written.

Also the two sides that a comparison with the plain base needs: tokens that do not depend on the weights, so that drafts
agree as often as asked for, and the same engine without gate, experts and scaling stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from service.checkpoint import Checkpoint, ClassifierWeights, Expert, LoraWeights, XLoraConfig
from service.model.attention.paged import ATTENTION
from service.model.batch import AttentionGroup, Batch, DraftStart
from service.model.draft_layer import Choose
from service.model.kv_cache import KVCache
from service.model.steps.cuda_graph import CapturedSteps, GraphCapture
from service.model.steps.step import ForwardOutput
from service.model.xlora_model import XLoraModel

_FIRST_TOKEN = 16  # the ones before it may be special
_STRETCH = 32  # positions


@dataclass(frozen=True)
class Shape:
    """Of the base (Llama's architecture) and of its experts, which adapt all linears of its layers."""

    hidden: int = 4096
    intermediate: int = 14336
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 128256
    context: int = 8192
    experts: int = 8
    rank: int = 16


LLAMA_8B = Shape()
TINY = Shape(32, 64, 2, 4, 2, 8, 320, 512, 3, 2)


def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[XLoraModel, Checkpoint]:
    """The model on `device`, and a checkpoint that names its parts."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.context,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
    )
    with torch.device(device):
        causal_lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    causal_lm.set_attn_implementation(ATTENTION)
    causal_lm = causal_lm.to(device).eval().requires_grad_(False)
    sites = {name: module for name, module in causal_lm.model.named_modules() if isinstance(module, nn.Linear)}
    experts = []
    for number in range(shape.experts):
        weights = {
            f"model.{name}": LoraWeights(
                _normal(shape.rank, linear.in_features, linear.in_features**-0.5, device, dtype),
                _normal(linear.out_features, shape.rank, 0.1 * shape.rank**-0.5, device, dtype),
                1.0,
            )
            for name, linear in sites.items()
        }
        experts.append(Expert(f"e{number}", "", weights))
    last = _normal(len(sites) * shape.experts, shape.hidden, shape.hidden**-0.5, device, torch.float32)
    checkpoint = Checkpoint(
        name="synthetic",
        path=Path("synthetic"),
        base_path=Path("synthetic"),
        experts=tuple(experts),
        sites=None,
        xlora=XLoraConfig(hidden_size=shape.hidden, layerwise_scalings=True),
        classifier=ClassifierWeights(((last, torch.zeros(last.shape[0])),)),
        gate_profile=None,
        draft_head=None,
        weights_sha256="",
    )
    model = XLoraModel(checkpoint, causal_lm, device=device, dtype=dtype)
    named = tuple(Expert(expert.name, "", {}) for expert in experts)  # their weights are in the stacks now
    return model, replace(checkpoint, experts=named)


def _normal(rows: int, columns: int, deviation: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns, device=device, dtype=dtype) * deviation


def weight_bytes(model: XLoraModel, *, with_experts: bool) -> int:
    """Bytes a decode step reads of the weights: all but the embedding, of which it reads a row per token."""
    modules = model.causal_lm.modules()
    embeddings = {id(module.weight) for module in modules if isinstance(module, nn.Embedding)}
    read = [weight for weight in model.causal_lm.parameters() if id(weight) not in embeddings]
    if with_experts:
        read += [buffer for name, buffer in model.causal_lm.named_buffers() if "lora_" in name]
        read += [*model.classifier.parameters()]
    return sum(weight.numel() * weight.element_size() for weight in read)


def captured_steps(eager: Any, cache: KVCache, rows: int, context: int) -> CapturedSteps:
    """CUDA graphs; on a CPU the same buffers and buckets around plain calls."""
    device = cache.gate_rows.device
    capture = GraphCapture(device) if device.type == "cuda" else lambda step: step
    return CapturedSteps(eager, cache, capture, max_rows=rows, max_model_len=context)


class ForcedTokens:
    """A step whose logits depend on the position alone: a draft at depth i is right at a share `rates[i - 1]` of the
    positions, the last rate at all further depths.

    Which positions those are is drawn once for all depths, so that where a draft from near is wrong, one from far is as
    well; and in such a way that the share holds of every stretch of positions, not only of many.
    Everything is computed as ever; only what would be sampled is written over, at the cost of a few small kernels.
    """

    def __init__(self, inner: Any, vocabulary: int, context: int, device: torch.device, rates: Sequence[float]) -> None:
        self._inner, self._tokens, self._rates = inner, vocabulary - _FIRST_TOKEN - 2, rates
        self._draws = _draws(context + _STRETCH).to(device)  # a draft is right where the rate is above

    @torch.inference_mode()
    def forward(self, batch: Batch, kv_cache: KVCache) -> ForwardOutput:
        """The inner step's, with other logits."""
        output = self._inner.forward(batch, kv_cache)
        positions = batch.positions.index_select(0, batch.logit_rows) + 1
        tokens = torch.where(
            batch.logit_rows < batch.num_scaling_rows, self._drafted(positions, 1), token_at(positions, self._tokens)
        )
        output.logits.zero_().scatter_(1, tokens[:, None], 1.0)
        return output

    def draft(self, start: DraftStart, choose: Choose, kv_cache: KVCache) -> Tensor:
        """The inner step's work, with other drafts."""
        positions = start.group.positions[:, 0]
        drafts: Tensor = self._inner.draft(start, lambda _, depth: self._drafted(positions + depth, depth), kv_cache)
        return drafts

    def _drafted(self, positions: Tensor, depth: int) -> Tensor:
        """The tokens that are drafted for positions, at one depth."""
        rate = self._rates[min(depth, len(self._rates)) - 1]
        is_wrong = self._draws.index_select(0, positions) >= rate
        return token_at(positions, self._tokens) + is_wrong * min(depth, 2)  # what is wrong from near and far differs


def _draws(count: int) -> Tensor:
    """Numbers in [0, 1) in random order, evenly spread over each stretch."""
    generator = torch.Generator().manual_seed(0)
    stretches = [torch.randperm(_STRETCH, generator=generator) for _ in range(-(-count // _STRETCH))]
    return (torch.cat(stretches) + 0.5) / _STRETCH


def token_at(positions: Tensor, tokens: int) -> Tensor:
    """The token that a forced text has at a position, one of so many; the two tokens after it are none there."""
    return _FIRST_TOKEN + positions * 7919 % tokens


class RealRowsOnly:
    """A step that drops the scaling rows of its batches before `inner` runs them, so that nothing can be drafted.

    Logits of the dropped rows are those of others: for ForcedTokens, which writes them over.
    """

    def __init__(self, inner: Any, vocabulary: int) -> None:
        self._inner, self._vocabulary = inner, vocabulary

    def forward(self, batch: Batch, kv_cache: KVCache) -> ForwardOutput:
        """The inner step's, and zeros for scalings."""
        dropped = batch.num_scaling_rows
        if dropped == 0:
            return self._inner.forward(batch, kv_cache)
        scalings = kv_cache.gate_rows.new_zeros(dropped, *kv_cache.gate_rows.shape[1:])
        groups = [rest for group in batch.groups if (rest := _without_first(group, dropped)) is not None]
        if not groups:
            logits = scalings.new_zeros(len(batch.logit_rows), self._vocabulary)
            return ForwardOutput(logits, scalings, scalings, scalings)
        logit_rows = (batch.logit_rows - dropped).clamp_min(0)
        output = self._inner.forward(Batch(batch.fields[:, dropped:], 0, logit_rows, groups), kv_cache)
        return ForwardOutput(output.logits, scalings, scalings, output.hidden)


def _without_first(group: AttentionGroup, dropped: int) -> AttentionGroup | None:
    """The group without the segments among the first `dropped` rows of the batch."""
    cut = min(group.segments, max(0, dropped - group.start) // group.queries)
    if cut == group.segments:
        return None
    start = group.start + cut * group.queries - dropped
    table, positions = group.block_table[cut:], group.positions[cut:]
    return AttentionGroup(start, group.segments - cut, group.queries, positions, table, group.keys, needs_mask=True)
