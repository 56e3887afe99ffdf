"""Makes a draft head: X-LoRA writes texts, both passes read them, and the head learns to guess what the real one says.

    texts       the prompts and what the engine makes of them, greedily and sampled in turn
    lessons     per position: the scaling pass's last hidden state, and the real pass's likeliest next tokens
    training    cross-entropy against those, on nine texts of ten; the state that
                agrees most often on the others is kept

The engine and the plain computation (model/two_pass.py) are in memory one after the other, never together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils.logging import disable_progress_bar

from service.checkpoint import Checkpoint, DraftHeadWeights
from service.engine.loader import build_engine, load_model_of, resolve_device, resolve_dtype
from service.engine.options import EngineOptions
from service.engine.request import Request, SamplingParams
from service.errors import StartupError
from service.model.draft_head import DraftHead
from service.model.two_pass import TwoPassModel

_LIKELIEST = 64  # tokens of the real pass that a lesson keeps, with their shares
_HELD_OUT = 10  # every so manieth text
_STEPS = 1500
_EVALUATE_EVERY = 100
_POSITIONS_PER_STEP = 512
_LEARNING_RATE = 3e-3
_FIRST_DEVIATION = 0.02  # of U's entries; D begins at zero, so that the head begins with no opinion
_LEAST_TEXTS = 20


@dataclass(frozen=True, slots=True)
class Distilled:
    """A draft head and what it is worth on texts that it has not learned from."""

    weights: DraftHeadWeights
    positions: int  # learned from
    held_out: int  # positions
    before: float  # share of held-out positions at which the scaling pass's best token is the real pass's
    after: float  # the same with the draft head


@dataclass(frozen=True, slots=True)
class _Lessons:
    """Positions of many texts."""

    hidden: Tensor  # [N, H] of the scaling pass
    tokens: Tensor  # int64 [N, K] the real pass's likeliest, best first
    shares: Tensor  # [N, K] their probabilities, of all K together


def distill(
    checkpoint: Checkpoint,
    options: EngineOptions,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    size: int | None = None,
    seed: int = 0,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Distilled:
    """Trains a draft head for `checkpoint` on what X-LoRA makes of `prompts`; `size` is R, None for a width that suits.

    Raises StartupError where there are too few prompts to learn from and judge by.
    """
    if len(prompts) < _LEAST_TEXTS:
        raise StartupError(
            f"{len(prompts)} prompts are too few to learn from: at least {_LEAST_TEXTS}, better a thousand",
            hint="take prompts as your users send them",
        )
    disable_progress_bar()  # type: ignore[no-untyped-call]  # on_progress says what is going on
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, checkpoint, device)
    texts = _written(checkpoint, options, prompts, max_tokens, on_progress)
    plain = TwoPassModel(checkpoint, device=device, dtype=dtype)
    held_out = texts[::_HELD_OUT]
    learned = [text for number, text in enumerate(texts) if number % _HELD_OUT]
    lessons = _read(plain, learned, "learn from", on_progress)
    judged = _read(plain, held_out, "judge by", on_progress)
    return _train(plain, lessons, judged, size, seed, on_progress)


def _written(
    checkpoint: Checkpoint,
    options: EngineOptions,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    on_progress: Callable[[str], None],
) -> list[list[int]]:
    """Every prompt with its continuation."""
    options = replace(options, native_kernels=False)  # they may come in the middle of a text, which would then vary
    engine = build_engine(load_model_of(checkpoint, options, on_progress), checkpoint, options)
    longest = engine.info.max_model_len - max_tokens
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt) > longest:
            raise StartupError(
                f"prompt {number} has {len(prompt)} tokens; with {max_tokens} more to be written it may have {longest}",
                hint="shorten it, or lower --max-tokens",
            )
    texts = {str(number): list(prompt) for number, prompt in enumerate(prompts)}
    for number, prompt in enumerate(prompts):
        sampling = SamplingParams(max_tokens=max_tokens, temperature=float(number % 2), seed=number)
        engine.add(Request(str(number), list(prompt), sampling))
    left = len(texts)
    while engine.has_work():
        for output in engine.step().outputs:
            texts[output.request_id] += [token.id for token in output.tokens]
            left -= output.finish_reason is not None
        on_progress(f"writing {left} of {len(texts)} texts")
    return list(texts.values())


def _read(plain: TwoPassModel, texts: list[list[int]], purpose: str, on_progress: Callable[[str], None]) -> _Lessons:
    """What both passes make of every position."""
    hidden, tokens, shares = [], [], []
    for number, text in enumerate(texts):
        on_progress(f"reading text {number + 1} of {len(texts)} to {purpose}")
        own = plain.scaling_pass(text)
        logits = plain.real_pass(text, plain.scalings(own)).float()
        likeliest = logits.topk(min(_LIKELIEST, logits.shape[-1]))
        hidden.append(own.float().cpu())
        tokens.append(likeliest.indices.cpu())
        shares.append(likeliest.values.softmax(-1).cpu())
    # Out of inference mode these are ordinary tensors again, from which gradients may start.
    return _Lessons(*(torch.cat(parts).clone() for parts in (hidden, tokens, shares)))


def _train(
    plain: TwoPassModel,
    lessons: _Lessons,
    judged: _Lessons,
    size: int | None,
    seed: int,
    on_progress: Callable[[str], None],
) -> Distilled:
    device, width = plain.causal_lm.device, lessons.hidden.shape[1]
    generator = torch.Generator().manual_seed(seed)
    head = DraftHead(_beginning(width, size or suitable_size(width), generator), device=device, dtype=torch.float32)
    head.requires_grad_(True)
    optimizer = torch.optim.AdamW(head.parameters(), lr=_LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=_STEPS)
    before = best = _agreement(plain, judged, head)
    kept = _weights(head)
    for step in range(1, _STEPS + 1):
        some = torch.randint(len(lessons.hidden), (_POSITIONS_PER_STEP,), generator=generator)
        hidden, tokens, shares = (part[some].to(device) for part in (lessons.hidden, lessons.tokens, lessons.shares))
        said = F.log_softmax(plain.head(head.drafting(hidden)), -1)
        loss = -(shares * said.gather(1, tokens)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % _EVALUATE_EVERY == 0:
            agreement = _agreement(plain, judged, head)
            if agreement > best:
                best, kept = agreement, _weights(head)
            on_progress(f"training, step {step} of {_STEPS}: agreement {before:.3f} -> {best:.3f}")
    return Distilled(kept, len(lessons.hidden), len(judged.hidden), before, best)


def suitable_size(hidden_size: int) -> int:
    """R for a model of that width: an eighth, but 64 at least, or the whole of a smaller model."""
    return min(hidden_size, max(64, hidden_size // 8))


def _beginning(width: int, size: int, generator: torch.Generator) -> DraftHeadWeights:
    up = torch.randn(size, width, generator=generator) * _FIRST_DEVIATION
    return DraftHeadWeights(up, torch.zeros(size), torch.zeros(width, size))


def _weights(head: DraftHead) -> DraftHeadWeights:
    """As a bundle keeps them: in bfloat16, for a draft need not be exact."""
    return DraftHeadWeights(*(tensor.detach().to("cpu", torch.bfloat16, copy=True) for tensor in head.parameters()))


@torch.no_grad()
def _agreement(plain: TwoPassModel, lessons: _Lessons, head: DraftHead) -> float:
    """Share of positions at which the draft is the real pass's best token."""
    right = 0
    for first in range(0, len(lessons.hidden), _POSITIONS_PER_STEP):
        some = slice(first, first + _POSITIONS_PER_STEP)
        drafts = plain.head(head.drafting(lessons.hidden[some].to(plain.causal_lm.device))).argmax(-1)
        right += int((drafts.cpu() == lessons.tokens[some, 0]).sum())
    return right / len(lessons.hidden)
