"""Makes drafts for a bundle: X-LoRA writes texts, both passes read them, and the drafts learn what the real one says.

    texts       the prompts and what the engine makes of them, greedily and sampled in turn (writing.py)
    lessons     what both passes make of every position (lessons.py)
    training    of the draft head, then of the draft layer (training.py)

The engine and the plain computation (two_pass.py) are in memory one after the other, never together. All that is found
goes to a work folder on disk and is read from there (work_folder.py).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from service.checkpoint import Checkpoint, DraftHeadWeights, DraftLayerWeights
from service.contract.errors import StartupError
from service.contract.options import EngineOptions
from service.engine import out_of_memory
from service.engine.out_of_memory import OutOfMemory
from service.engine.sizing import resolve_device, resolve_dtype
from service.model.draft_head import DraftHead
from service.model.draft_layer import DraftLayer
from service.tools.distill.lessons import CHOOSING, JUDGING, LEARNING, LEAST_TEXTS, Lesson, read_lessons
from service.tools.distill.plan import OnProgress, Plan, suitable_head_size, suitable_layer_size
from service.tools.distill.training import first_head, first_layer, train_head, train_layer
from service.tools.distill.unrolled import agreement
from service.tools.distill.work_folder import Text, WorkFolder, prompts_identity, weights_identity
from service.tools.distill.worth import forwards_per_token, useful_depth
from service.tools.distill.writing import write_texts
from service.tools.two_pass import TwoPassModel

_QUERY_FACTOR = 2  # Q by the hidden size: heads look at several places at once


@dataclass(frozen=True, slots=True)
class Distilled:
    """What was trained, and what it is worth on texts that nothing has been learned from."""

    head: DraftHeadWeights | None  # None: the checkpoint drafts as well with its own, or without
    layer: DraftLayerWeights | None  # None: as above
    learned: int  # positions
    judged: int  # positions of other texts, from the last one of the prompt on: where drafts are made
    before: list[float]  # agreement at each depth, of the checkpoint as it is
    after: list[float]  # agreement with what was trained, as far as it is better
    trained: list[float]  # agreement at every depth that was trained

    @property
    def helps(self) -> bool:
        """Whether there is anything to write."""
        return self.head is not None or self.layer is not None


def distill(
    checkpoint: Checkpoint,
    options: EngineOptions,
    prompts: Sequence[Sequence[int]],
    plan: Plan,
    work: Path,
    on_progress: OnProgress = lambda *_: None,
) -> Distilled:
    """Trains drafts for `checkpoint` on what X-LoRA makes of `prompts`, or goes on with what is in `work`.

    Raises StartupError where there are too few prompts to learn from and judge by, `work` is another run's, or
    memory or disk run out.
    """
    if len(prompts) < LEAST_TEXTS:
        raise StartupError(
            f"{len(prompts)} prompts are too few to learn from: at least {LEAST_TEXTS}, better a thousand",
            hint="take prompts as your users send them",
        )
    disable_progress_bar()  # type: ignore[no-untyped-call]  # on_progress says what is going on
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, checkpoint, device)
    folder = WorkFolder(work, _purpose(checkpoint, prompts, plan, dtype))
    with _memory_errors():
        write_texts(checkpoint, options, prompts, plan.max_tokens, folder, on_progress)
        gc.collect()  # adapted linears know each other: the engine's weights would stay beside the next model's
        if device.type == "cuda":
            torch.cuda.empty_cache()
        texts = [text for _, text in sorted(folder.texts().items())]
        on_progress("loading the model as transformers has it", 0, 0)
        return _Distillation(TwoPassModel(checkpoint, device=device, dtype=dtype), plan, folder, on_progress).run(texts)


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Turns a lack of memory into a StartupError."""
    try:
        with out_of_memory.recognised():
            yield
    except OutOfMemory as error:
        raise StartupError(
            f"memory ran out: {error}", hint="leave out the longest prompts, or lower --max-tokens or --layer-size"
        ) from error


def _purpose(
    checkpoint: Checkpoint, prompts: Sequence[Sequence[int]], plan: Plan, dtype: torch.dtype
) -> dict[str, str]:
    return {
        "weights": weights_identity(checkpoint),
        "prompts": prompts_identity([list(prompt) for prompt in prompts]),
        "options": f"{plan}, {str(dtype).removeprefix('torch.')}",
    }


class _Distillation:
    """Everything after the texts."""

    def __init__(self, plain: TwoPassModel, plan: Plan, work: WorkFolder, on_progress: OnProgress) -> None:
        self._plain, self._plan, self._work, self._on_progress = plain, plan, work, on_progress
        self._hidden_size = plain.checkpoint.xlora.hidden_size

    def run(self, texts: Sequence[Text]) -> Distilled:
        """Reads, trains and judges."""
        parts = read_lessons(self._plain, texts, self._work, self._on_progress)
        judging, checkpoint = parts[JUDGING], self._plain.checkpoint
        own_head = self._head(checkpoint.draft_head)
        before = self._agreement(own_head, self._layer(checkpoint.draft_layer, parts), judging)
        head: DraftHeadWeights | None = self._train_head(parts)
        if self._agreement(self._head(head), None, judging)[0] <= before[0]:
            head = None
        best_head = own_head if head is None else self._head(head)
        layer = None if self._plan.depth == 1 else self._train_layer(parts, best_head)
        trained = self._agreement(best_head, self._layer(layer, parts), judging)
        if layer is not None:
            depth = useful_depth(self._agreement(best_head, self._layer(layer, parts), parts[CHOOSING]))
            layer = None if depth == 1 else _cut(layer, trained[:depth])
        kept = checkpoint.draft_layer
        after = self._agreement(best_head, self._layer(kept, parts), judging)
        if layer is not None and forwards_per_token(trained[: layer.depth]) < forwards_per_token(after):
            after = trained[: layer.depth]
        else:  # the bundle's own, whose first share is the head's
            layer = None if head is None or kept is None else replace(kept, agreement=torch.tensor(after))
        learned = sum(len(lesson.tokens) for lesson in parts[LEARNING])
        judged = sum(len(lesson.answer) for lesson in judging)
        return Distilled(head, layer, learned, judged, before, after, trained)

    def _train_head(self, parts: list[list[Lesson]]) -> DraftHeadWeights:
        size = self._plan.head_size or suitable_head_size(self._hidden_size)
        return train_head(
            self._plain,
            parts[LEARNING],
            first_head(self._hidden_size, size, self._plan.seed),
            lambda head: forwards_per_token(self._agreement(head, None, parts[CHOOSING])),
            self._plan.head_steps,
            self._plan.seed,
            self._work,
            self._on_progress,
        )

    def _train_layer(self, parts: list[list[Lesson]], head: DraftHead | None) -> DraftLayerWeights:
        keys = parts[LEARNING][0].keys
        size = self._plan.layer_size or suitable_layer_size(self._hidden_size)
        query = keys[0].numel() * max(1, round(_QUERY_FACTOR * self._hidden_size / keys[0].numel()))
        return train_layer(
            self._plain,
            parts[LEARNING],
            self._start(query, size),
            lambda layer: forwards_per_token(self._agreement(head, layer, parts[CHOOSING])),
            self._plan.steps,
            self._plan.seed,
            self._work,
            self._on_progress,
        )

    def _start(self, query: int, size: int) -> DraftLayerWeights:
        """The checkpoint's own draft layer where its widths are the plan's, or a new one."""
        own, depth = self._plain.checkpoint.draft_layer, self._plan.depth
        if own is None or (len(own.query), len(own.up)) != (query, size):
            return first_layer(self._hidden_size, query, size, depth, self._plan.seed)
        rows = torch.arange(depth - 1).clamp(max=own.depth - 2)  # what is deeper begins as the deepest
        return replace(own, depths=own.depths[rows], agreement=torch.zeros(depth))

    def _head(self, weights: DraftHeadWeights | None) -> DraftHead | None:
        if weights is None:
            return None
        return DraftHead(weights, device=self._plain.causal_lm.device, dtype=torch.float32)

    def _layer(self, weights: DraftLayerWeights | None, parts: list[list[Lesson]]) -> DraftLayer | None:
        if weights is None:
            return None
        head_dim = parts[LEARNING][0].keys.shape[-1]
        return DraftLayer(weights, head_dim, device=self._plain.causal_lm.device, dtype=torch.float32)

    def _agreement(self, head: DraftHead | None, layer: DraftLayer | None, lessons: Sequence[Lesson]) -> list[float]:
        return agreement(self._plain, head, layer, lessons)


def _cut(layer: DraftLayerWeights, shares: list[float]) -> DraftLayerWeights:
    """The layer up to the depths that have a share in `shares`."""
    return replace(layer, depths=layer.depths[: len(shares) - 1].clone(), agreement=torch.tensor(shares))
