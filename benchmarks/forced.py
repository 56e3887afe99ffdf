"""An engine made to do as a comparison needs: the plain base instead of X-LoRA, drafts that always agree or miss.

Everything is computed as ever except what is named here; the engine itself knows nothing of this file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from service.contract.steering import Steering
from service.engine.engine import Engine
from service.engine.model_runner import ModelRunner, RunResult
from service.engine.scheduler import Plan
from service.model.batch import Batch
from service.model.kv_cache import KVCache
from service.model.xlora_model import XLoraModel
from service.native.step import NativeStep

BASE_REQUEST: dict[str, Any] = {"steering": Steering(weights=())}
"""Fields of a request without a scaling stream; its real rows still visit the experts unless `use_plain_base`."""
_FIRST_TOKEN = 16  # the ones before it may be special


class PlainBase(XLoraModel):
    """The same decoder on the same weights without gate, experts, classifier and draft head."""

    def __init__(self, model: XLoraModel) -> None:
        self.__dict__.update(model.__dict__)
        self.classifier = _NoGate(model.classifier.stored_sites, model.classifier.num_experts)  # type: ignore[assignment]
        self.scaling_pass_has_experts = False
        self.draft_head = None

    def first_gated_row(self, batch: Batch) -> int:
        """Experts act on no row."""
        return batch.rows.shape[1]

    def store_scalings(self, hidden: Tensor, batch: Batch, kv_cache: KVCache) -> Tensor:
        """Nothing is stored: nobody reads it."""
        return self.classifier.logits(hidden[: batch.num_scaling_rows])


class _NoGate(nn.Module):
    """A classifier that finds no expert worth anything, at no cost."""

    is_plain = False  # of a kind that native steps leave to it

    def __init__(self, stored_sites: int, num_experts: int) -> None:
        super().__init__()
        self.stored_sites, self.num_experts = stored_sites, num_experts

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, H] -> zeros [n, S, E]"""
        return torch.zeros(hidden.shape[0], self.stored_sites, self.num_experts, device=hidden.device)

    def scalings(self, logits: Tensor) -> Tensor:
        """[n, S, E] as they are."""
        return logits


def use_plain_base(engine: Engine) -> None:
    """Makes `engine` run the plain base."""
    runner = engine._runner
    runner.model = plain = PlainBase(runner.model)
    runner.step = NativeStep(plain, runner.step._decoder) if isinstance(runner.step, NativeStep) else plain


class ScriptedRunner(ModelRunner):
    """Writes over what was sampled: tokens follow from their position, and drafts all agree with them, or all miss."""

    def __init__(self, runner: ModelRunner, *, drafts_agree: bool) -> None:
        self.__dict__.update(runner.__dict__)
        self._miss = 0 if drafts_agree else 1
        self._tokens = self.model.config.get_text_config().vocab_size - _FIRST_TOKEN - 1

    def run(self, plan: Plan) -> RunResult:
        """The step as ever, with other tokens and predictions."""
        result = super().run(plan)
        for share, tokens, predictions in zip(plan.scheduled, result.tokens, result.predictions, strict=True):
            for position, token in enumerate(tokens, share.real_end - share.samples + 1):
                token.id = self._token(position)
            predictions[:] = [self._token(share.predict_start + i) + self._miss for i in range(len(predictions))]
        return result

    def _token(self, position: int) -> int:
        return _FIRST_TOKEN + position * 7919 % self._tokens


def script(engine: Engine, *, drafts_agree: bool) -> None:
    """Makes `engine` write by script, with drafts that always agree or always miss."""
    engine._runner = ScriptedRunner(engine._runner, drafts_agree=drafts_agree)
