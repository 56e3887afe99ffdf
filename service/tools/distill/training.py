"""Training of a draft head and of a draft layer: cross-entropy against what the real pass finds likeliest.

Of the states of a training, the one that is worth most on the texts to choose by is kept. A training's own state is
saved as often as it is judged, and goes on from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from service.checkpoint import DraftHeadWeights, DraftLayerWeights
from service.model.draft_head import DraftHead
from service.model.draft_layer import DraftLayer
from service.tools.distill.lessons import Lesson
from service.tools.distill.optimizer import Muon
from service.tools.distill.plan import OnProgress
from service.tools.distill.unrolled import Anchors, Drafts, Unrolled
from service.tools.distill.work_folder import WorkFolder
from service.tools.two_pass import TwoPassModel

EVALUATE_EVERY = 200
_HEAD_POSITIONS = 512  # per step
_LAYER_POSITIONS = 640
_PROMPT_SHARE = 0.25  # of a prompt's positions, which are learned from beside all of the answer's
_LEARNING_RATE = 1e-2
_WEIGHT_DECAY = 0.01  # of matrices
_WARM_UP_STEPS = 50


class Training:
    """One module's training, and its state on disk."""

    def __init__(
        self, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], steps: int, work: WorkFolder, name: str
    ) -> None:
        self._module, self._optimizers, self._steps = module, optimizers, steps
        self._rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        self._work, self._name = work, name
        self._step, self._best = 0, math.inf
        self._kept: dict[str, Tensor] = {}

    def run(
        self,
        loss_of: Callable[[torch.Generator], Tensor],
        judge: Callable[[], float],
        seed: int,
        on_progress: OnProgress,
    ) -> dict[str, Tensor]:
        """The parameters of the best state, in bfloat16. `judge` says how many forwards a token takes."""
        if self._work.has(self._file):
            self._load(self._work.read(self._file))
        else:
            self._keep(judge())
        while self._step < self._steps:
            generator = torch.Generator().manual_seed(seed * self._steps + self._step)
            self._update(loss_of(generator))
            self._step += 1
            if self._step % EVALUATE_EVERY == 0 or self._step == self._steps:
                self._keep(judge())
                self._work.write(self._file, self._state())
            on_progress(f"training the {self._name}: {self._best:.3f} forwards per token", self._step, self._steps)
        return self._kept

    @property
    def _file(self) -> str:
        return f"{self._name}.safetensors"

    def _update(self, loss: Tensor) -> None:
        fraction = self._step / self._steps
        factor = min(1.0, (self._step + 1) / _WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * fraction))
        for optimizer, rate in zip(self._optimizers, self._rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._module.parameters(), 1.0)
        for optimizer in self._optimizers:
            optimizer.step()

    def _keep(self, forwards: float) -> None:
        """Keeps the module as it is now, if it is the best so far."""
        if forwards < self._best:
            parameters = self._module.named_parameters()
            self._best = forwards
            self._kept = {name: tensor.detach().to("cpu", torch.bfloat16, copy=True) for name, tensor in parameters}

    def _state(self) -> dict[str, Tensor]:
        state = {"step": torch.tensor(self._step), "best": torch.tensor(self._best, dtype=torch.float64)}
        state |= {f"now.{name}": tensor for name, tensor in self._module.named_parameters()}
        state |= {f"kept.{name}": tensor for name, tensor in self._kept.items()}
        for number, optimizer in enumerate(self._optimizers):
            for index, entries in optimizer.state_dict()["state"].items():
                state |= {f"optimizer.{number}.{index}.{key}": tensor for key, tensor in entries.items()}
        return state

    def _load(self, state: dict[str, Tensor]) -> None:
        self._step, self._best = int(state["step"]), float(state["best"])
        self._kept = {name.removeprefix("kept."): t.clone() for name, t in state.items() if name.startswith("kept.")}
        for name, parameter in self._module.named_parameters():
            parameter.data.copy_(state[f"now.{name}"])
        for number, optimizer in enumerate(self._optimizers):
            entries: dict[int, dict[str, Tensor]] = {}
            for name, tensor in state.items():
                if name.startswith(prefix := f"optimizer.{number}."):
                    index, key = name.removeprefix(prefix).split(".", 1)
                    entries.setdefault(int(index), {})[key] = tensor.clone()
            optimizer.load_state_dict({**optimizer.state_dict(), "state": entries})


def train_head(
    plain: TwoPassModel,
    lessons: Sequence[Lesson],
    weights: DraftHeadWeights,
    judge: Callable[[DraftHead], float],
    steps: int,
    seed: int,
    work: WorkFolder,
    on_progress: OnProgress,
) -> DraftHeadWeights:
    """A draft head that begins as `weights`."""
    head = DraftHead(weights, device=plain.causal_lm.device, dtype=torch.float32).requires_grad_(True)
    unrolled, pool = Unrolled(plain, None), _pool(lessons, seed)

    def loss_of(generator: torch.Generator) -> Tensor:
        anchors = _some_positions(lessons, pool, generator)
        drafts = next(unrolled.drafts(anchors))
        return _cross_entropy(plain.head(head.drafting(drafts.state)), drafts).mean()

    training = Training(head, _optimizers(head), steps, work, "head")
    return DraftHeadWeights(**training.run(loss_of, lambda: judge(head), seed, on_progress))


def train_layer(
    plain: TwoPassModel,
    lessons: Sequence[Lesson],
    weights: DraftLayerWeights,
    judge: Callable[[DraftLayer], float],
    steps: int,
    seed: int,
    work: WorkFolder,
    on_progress: OnProgress,
) -> DraftLayerWeights:
    """A draft layer that begins as `weights`, whose agreement it keeps: that is not known yet."""
    head_dim = lessons[0].keys.shape[-1]
    layer = DraftLayer(weights, head_dim, device=plain.causal_lm.device, dtype=torch.float32).requires_grad_(True)
    unrolled = Unrolled(plain, layer)

    def loss_of(generator: torch.Generator) -> Tensor:
        anchors = _some_texts(lessons, generator)
        _, *deeper = unrolled.drafts(anchors)
        losses = [(_cross_entropy(plain.head(drafts.state), drafts) * drafts.inside).mean() for drafts in deeper]
        return torch.stack(losses).mean()

    training = Training(layer, _optimizers(layer), steps, work, "layer")
    found = training.run(loss_of, lambda: judge(layer), seed, on_progress)
    return DraftLayerWeights(**found, agreement=weights.agreement)


def _optimizers(module: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for matrices, AdamW for biases."""
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in module.named_parameters():
        groups[name not in ("bias", "depths")].append(parameter)
    return [
        Muon(groups[True], _LEARNING_RATE, weight_decay=_WEIGHT_DECAY),
        torch.optim.AdamW(groups[False], lr=_LEARNING_RATE, weight_decay=0.0),
    ]


def _cross_entropy(logits: Tensor, drafts: Drafts) -> Tensor:
    """[n]: between the real pass's shares and the drafts' distribution."""
    return -(drafts.shares * F.log_softmax(logits, -1).gather(1, drafts.likeliest)).sum(-1)


def _kept(lesson: Lesson, generator: torch.Generator) -> Tensor:
    """Positions of a text to learn from: of its answer, and some of its prompt."""
    every = torch.arange(len(lesson.tokens) - 1)
    return every[(every >= lesson.prompt - 1) | (torch.rand(len(every), generator=generator) < _PROMPT_SHARE)]


def _pool(lessons: Sequence[Lesson], seed: int) -> Tensor:
    """int64 [N, 2]: texts and positions in them that the head learns from."""
    generator = torch.Generator().manual_seed(seed)
    kept = [_kept(lesson, generator) for lesson in lessons]
    texts = torch.arange(len(kept)).repeat_interleave(torch.tensor([len(positions) for positions in kept]))
    return torch.stack([texts, torch.cat(kept)], 1)


def _some_positions(lessons: Sequence[Lesson], pool: Tensor, generator: torch.Generator) -> list[Anchors]:
    """Positions of the pool, each as likely as the others."""
    texts, positions = pool[torch.randint(len(pool), (_HEAD_POSITIONS,), generator=generator)].unbind(1)
    return [Anchors(lessons[number], positions[texts == number]) for number in sorted(set(texts.tolist()))]


def _some_texts(lessons: Sequence[Lesson], generator: torch.Generator) -> list[Anchors]:
    """Positions of a few texts."""
    anchors: list[Anchors] = []
    left = _LAYER_POSITIONS
    while left > 0:
        lesson = lessons[int(torch.randint(len(lessons), (1,), generator=generator))]
        positions = _kept(lesson, generator)
        if len(positions) > left:
            positions = positions[torch.randperm(len(positions), generator=generator)[:left]]
        anchors.append(Anchors(lesson, positions))
        left -= len(positions)
    return anchors


def first_head(hidden_size: int, size: int, seed: int) -> DraftHeadWeights:
    """The state from which a draft head is trained: it changes nothing yet."""
    up = torch.randn(size, hidden_size, generator=torch.Generator().manual_seed(seed)) * hidden_size**-0.5
    return DraftHeadWeights(up, torch.zeros(size), torch.zeros(hidden_size, size))


def first_layer(hidden_size: int, query: int, size: int, depth: int, seed: int) -> DraftLayerWeights:
    """The state from which a draft layer is trained; `query` is Q."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(out: int, wide: int, deviation: float) -> Tensor:
        return torch.randn(out, wide, generator=generator) * deviation

    unit = hidden_size**-0.5
    mix = torch.cat([torch.eye(hidden_size) / 2, matrix(hidden_size, hidden_size, unit)], 1)
    return DraftLayerWeights(
        mix=mix,
        depths=torch.zeros(depth - 1, hidden_size),
        query=matrix(query, hidden_size, unit),
        output=matrix(hidden_size, query, 0.02),
        up=matrix(size, hidden_size, unit),
        bias=torch.zeros(size),
        down=matrix(hidden_size, size, 0.01),
        agreement=torch.zeros(depth),
    )
