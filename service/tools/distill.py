"""Makes a draft head: X-LoRA writes texts, both passes read them, and the head learns to guess what the real one says.

    texts       the prompts and what the engine makes of them, greedily and sampled in turn
    lessons     per position: the scaling pass's last hidden state, and the real pass's likeliest next tokens
    training    cross-entropy against those, on eight texts of ten; of its states, the one that agrees most often on the
                ninth is kept, and judged by the tenth

The engine and the plain computation (two_pass.py) are in memory one after the other, never together.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils.logging import disable_progress_bar

from service.checkpoint import Checkpoint, DraftHeadWeights
from service.contract.checks import checked_request
from service.contract.errors import InvalidRequestError, StartupError
from service.contract.options import EngineOptions
from service.contract.request import Request, SamplingParams
from service.engine.loader import build_engine, load_model_of
from service.engine.sizing import resolve_device, resolve_dtype
from service.model.draft_head import DraftHead
from service.tools.two_pass import TwoPassModel

_LIKELIEST = 64  # tokens of the real pass that a lesson keeps, with their shares
_HELD_OUT = 10  # of so many pairs of texts, one greedy and one sampled, one is to choose by and one to judge by
_STEPS = 1500
_EVALUATE_EVERY = 100
_POSITIONS_PER_STEP = 512
_LEARNING_RATE = 3e-3
_FIRST_DEVIATION = 0.02  # of U's entries; D begins at zero, so that the head begins with no opinion
_LEAST_TEXTS = 2 * _HELD_OUT


@dataclass(frozen=True, slots=True)
class Distilled:
    """A draft head and what it is worth on texts that it has not learned from."""

    weights: DraftHeadWeights
    positions: int  # learned from
    judged: int  # positions of other texts, from the last one of the prompt on: where drafts are made
    before: float  # share of those at which the checkpoint as it is drafts what the real pass says
    after: float  # the same with this draft head


@dataclass(frozen=True, slots=True)
class _Text:
    """A prompt and what was written after it."""

    tokens: list[int]
    prompt: int  # how many of them


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
    gc.collect()  # adapted linears know each other, and the weights of the engine would stay beside the next model's
    if device.type == "cuda":
        torch.cuda.empty_cache()
    plain = TwoPassModel(checkpoint, device=device, dtype=dtype)
    parts: list[list[_Text]] = [[], [], []]  # to judge by, to choose by, to learn from
    for number, text in enumerate(texts):
        parts[min(number // 2 % _HELD_OUT, 2)].append(text)
    judged = _read(plain, parts[0], "judge by", on_progress, answers_only=True)
    chosen = _read(plain, parts[1], "choose by", on_progress)
    lessons = _read(plain, parts[2], "learn from", on_progress)
    weights = _train(plain, lessons, chosen, size, seed, on_progress)
    return Distilled(
        weights,
        len(lessons.hidden),
        len(judged.hidden),
        _agreement(plain, judged, _head(plain, checkpoint.draft_head)),
        _agreement(plain, judged, _head(plain, weights)),
    )


def _written(
    checkpoint: Checkpoint,
    options: EngineOptions,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    on_progress: Callable[[str], None],
) -> list[_Text]:
    """Every prompt with its continuation. Raises StartupError where one cannot be written."""
    model = load_model_of(checkpoint, options, on_progress)
    engine = build_engine(model, checkpoint, options, wait_for_native=True)  # in the middle of a text it would vary
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
        try:
            engine.add(checked_request(Request(str(number), list(prompt), sampling), engine.info))
        except InvalidRequestError as error:
            raise StartupError(f"prompt {number + 1}: {error.message}", hint=error.hint) from error
    left = len(texts)
    while engine.has_work():
        for output in engine.step().outputs:
            if output.error is not None:
                raise StartupError(f"prompt {int(output.request_id) + 1}: {output.error}")
            texts[output.request_id] += [token.id for token in output.tokens]
            left -= output.finish_reason is not None
        on_progress(f"writing {left} of {len(texts)} texts")
    return [_Text(tokens, len(prompt)) for tokens, prompt in zip(texts.values(), prompts, strict=True)]


def _read(
    plain: TwoPassModel,
    texts: list[_Text],
    purpose: str,
    on_progress: Callable[[str], None],
    *,
    answers_only: bool = False,
) -> _Lessons:
    """What both passes make of every position, or of those where drafts are made: the last one of the prompt, and all
    after it but the last.
    """
    hidden, tokens, shares = [], [], []
    for number, text in enumerate(texts):
        on_progress(f"reading text {number + 1} of {len(texts)} to {purpose}")
        own = plain.scaling_pass(text.tokens)
        logits = plain.real_pass(text.tokens, plain.scalings(own)).float()
        if answers_only:
            own, logits = (part[text.prompt - 1 : -1] for part in (own, logits))
        likeliest = logits.topk(min(_LIKELIEST, logits.shape[-1]))
        hidden.append(own.float().cpu())
        tokens.append(likeliest.indices.cpu())
        shares.append(likeliest.values.softmax(-1).cpu())
    return _Lessons(*map(torch.cat, (hidden, tokens, shares)))


def _train(
    plain: TwoPassModel,
    lessons: _Lessons,
    chosen: _Lessons,
    size: int | None,
    seed: int,
    on_progress: Callable[[str], None],
) -> DraftHeadWeights:
    device, width = plain.causal_lm.device, lessons.hidden.shape[1]
    generator = torch.Generator().manual_seed(seed)
    head = _head(plain, _beginning(width, size or suitable_size(width), generator))
    head.requires_grad_(True)
    optimizer = torch.optim.AdamW(head.parameters(), lr=_LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=_STEPS)
    before = best = _agreement(plain, chosen, head)
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
            agreement = _agreement(plain, chosen, head)
            if agreement > best:
                best, kept = agreement, _weights(head)
            on_progress(f"training, step {step} of {_STEPS}: agreement {before:.3f} -> {best:.3f}")
    return kept


def suitable_size(hidden_size: int) -> int:
    """R for a model of that width: an eighth, but 64 at least, or the whole of a smaller model."""
    return min(hidden_size, max(64, hidden_size // 8))


def _beginning(width: int, size: int, generator: torch.Generator) -> DraftHeadWeights:
    up = torch.randn(size, width, generator=generator) * _FIRST_DEVIATION
    return DraftHeadWeights(up, torch.zeros(size), torch.zeros(width, size))


def _head(plain: TwoPassModel, weights: DraftHeadWeights | None) -> DraftHead:
    """As the training and its judges compute it; None is one that changes nothing."""
    if weights is None:
        width = plain.checkpoint.xlora.hidden_size
        weights = DraftHeadWeights(torch.zeros(1, width), torch.zeros(1), torch.zeros(width, 1))
    return DraftHead(weights, device=plain.causal_lm.device, dtype=torch.float32)


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
