"""An engine made to do as a comparison needs: the plain base instead of X-LoRA, drafts that agree as often as asked.

Everything is computed as ever except what is named here; the engine itself knows nothing of this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import build_engines
from benchmarks.synthetic import ForcedTokens
from service.checkpoint import Checkpoint
from service.contract.options import EngineOptions
from service.contract.steering import Steering
from service.engine.engine import Engine
from service.model.batch import Batch
from service.model.kv_cache import KVCache
from service.model.steps.step import ForwardOutput
from service.model.xlora_model import XLoraModel
from service.native.step import NativeStep

BASE_REQUEST: dict[str, Any] = {"steering": Steering(weights=())}
"""Fields of a request without a scaling stream; its real rows still visit the experts unless `use_plain_base`."""


AGREE_AND_MISS: Mapping[str, Sequence[float]] = {"agree": (1.0,), "miss": (0.0,)}
"""Rates of lookahead drafts that always agree, and that always miss."""


def forced_engines(
    model: XLoraModel,
    checkpoint: Checkpoint,
    options: EngineOptions,
    rates: Mapping[str, Sequence[float]] = AGREE_AND_MISS,
) -> dict[str, Engine]:
    """Engines over one model: the plain base ("base"), and X-LoRA whose drafts agree at `rates`, as deep as they go."""
    depths = [1, *map(len, rates.values())]
    engines = dict(zip(("base", *rates), build_engines(model, checkpoint, options, depths), strict=True))
    use_plain_base(engines["base"])
    for name, engine in engines.items():
        script(engine, rates.get(name, (1.0,)))
    return engines


class PlainBase(XLoraModel):
    """The same decoder on the same weights without gate, experts, classifier and drafts."""

    def __init__(self, model: XLoraModel) -> None:
        self.__dict__.update(model.__dict__)
        self.scaling_pass_has_experts = False
        self.draft_head = None
        self.draft_chain = None

    @torch.inference_mode()
    def forward(self, batch: Batch, kv_cache: KVCache) -> ForwardOutput:
        """Runs every row without experts."""
        self.gate.clear()
        logits, hidden = self.run_decoder(batch, kv_cache)
        return ForwardOutput(logits, *_no_scalings(batch, kv_cache), hidden)

    def first_gated_row(self, batch: Batch) -> int:
        """Experts act on no row."""
        return batch.fields.shape[1]


class PlainNative(NativeStep):
    """The same in C++."""

    def _write_scalings(self, hidden: Tensor, batch: Batch, kv_cache: KVCache) -> tuple[Tensor, Tensor]:
        return _no_scalings(batch, kv_cache)


def _no_scalings(batch: Batch, kv_cache: KVCache) -> tuple[Tensor, Tensor]:
    """Gate logits and scalings of a classifier that did not run; nothing is stored, for nobody reads it."""
    zeros = kv_cache.gate_rows.new_zeros(batch.num_scaling_rows, *kv_cache.gate_rows.shape[1:])
    return zeros, zeros


def use_plain_base(engine: Engine) -> None:
    """Makes `engine` run the plain base."""
    runner = engine.runner
    runner.model = plain = PlainBase(runner.model)
    runner.step = PlainNative(plain, runner.step._decoder) if isinstance(runner.step, NativeStep) else plain


def script(engine: Engine, rates: Sequence[float]) -> None:
    """Makes `engine` write by script, with drafts that agree at these rates per depth, the last for all beyond."""
    model: XLoraModel = engine.runner.model
    vocabulary = model.config.get_text_config().vocab_size
    context = engine.info.max_model_len
    engine.runner.step = ForcedTokens(engine.runner.step, vocabulary, context, model.device, rates)
