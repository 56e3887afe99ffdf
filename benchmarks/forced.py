"""An engine made to do as a comparison needs: the plain base instead of X-LoRA, drafts that always agree or miss.

Everything is computed as ever except what is named here; the engine itself knows nothing of this file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.common import build_engines
from service.checkpoint import Checkpoint
from service.contract.options import EngineOptions
from service.contract.steering import Steering
from service.engine.engine import Engine
from service.engine.launched_step import LaunchedStep, SequenceResult
from service.engine.model_runner import ModelRunner
from service.model.batch import Batch
from service.model.kv_cache import KVCache
from service.model.steps.step import ForwardOutput
from service.model.xlora_model import XLoraModel
from service.native.step import NativeStep

BASE_REQUEST: dict[str, Any] = {"steering": Steering(weights=())}
"""Fields of a request without a scaling stream; its real rows still visit the experts unless `use_plain_base`."""
_FIRST_TOKEN = 16  # the ones before it may be special


def forced_engines(model: XLoraModel, checkpoint: Checkpoint, options: EngineOptions) -> dict[str, Engine]:
    """Engines over one model: the plain base, X-LoRA whose drafts agree, and X-LoRA whose drafts miss."""
    names = ("base", "agree", "miss")
    engines = dict(zip(names, build_engines(model, checkpoint, options, len(names)), strict=True))
    for name, engine in engines.items():
        script(engine, drafts_agree=name == "agree")
    use_plain_base(engines["base"])
    return engines


class PlainBase(XLoraModel):
    """The same decoder on the same weights without gate, experts, classifier and draft head."""

    def __init__(self, model: XLoraModel) -> None:
        self.__dict__.update(model.__dict__)
        self.scaling_pass_has_experts = False
        self.draft_head = None

    @torch.inference_mode()
    def forward(self, batch: Batch, kv_cache: KVCache) -> ForwardOutput:
        """Runs every row without experts."""
        self.gate.clear()
        logits, _ = self.run_decoder(batch, kv_cache)
        return ForwardOutput(logits, *_no_scalings(batch, kv_cache))

    def first_gated_row(self, batch: Batch) -> int:
        """Experts act on no row."""
        return batch.rows.shape[1]


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


class ScriptedRunner(ModelRunner):
    """Writes over what was sampled: tokens follow from their position, and drafts all agree with them, or all miss."""

    def __init__(self, runner: ModelRunner, *, drafts_agree: bool) -> None:
        self.__dict__.update(runner.__dict__)
        self._miss = 0 if drafts_agree else 1
        self._tokens = self.model.config.get_text_config().vocab_size - _FIRST_TOKEN - 1

    def collect(self, launched: LaunchedStep) -> list[SequenceResult]:
        """The step's results as ever, with other tokens and predictions."""
        results = super().collect(launched)
        for result in results:
            one = result.scheduled
            first = one.real_end - one.samples + 1
            result.tokens = [self._token(position) for position in range(first, first + one.samples)]
            predicted = range(one.predict_start, one.predict_start + one.predict_count)
            result.predictions = [self._token(position) + self._miss for position in predicted]
        return results

    def _token(self, position: int) -> int:
        return _FIRST_TOKEN + position * 7919 % self._tokens


def script(engine: Engine, *, drafts_agree: bool) -> None:
    """Makes `engine` write by script, with drafts that always agree or always miss."""
    engine.runner = ScriptedRunner(engine.runner, drafts_agree=drafts_agree)
