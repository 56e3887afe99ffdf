"""A short parity check of a loaded model: greedy tokens through the engine against the plain two-pass computation.

Knows both sides and how to compare them; the plain side is two_pass.py. The two are in memory one after the
other, never together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from service.checkpoint import Checkpoint
from service.contract.options import EngineOptions
from service.contract.request import Request, SamplingParams
from service.engine.loader import build_engine
from service.model.loading.passes import load_model
from service.tools.two_pass import TwoPassModel

PROMPT_TOKENS, NEW_TOKENS, CHUNK_ROWS = 24, 16, 10
TOLERANCE = 1e-3  # in float32; half precisions round differently in different orders, so there it is not judged
NEAR_TIE = 1e-2  # nats between two tokens: either may win


@dataclass(frozen=True, slots=True)
class Parity:
    """Largest absolute differences between the engine and the plain computation."""

    tokens: int  # compared
    scalings: float  # after softmax and top-k
    logprobs: float  # of the generated tokens, nats
    other_tokens: int  # that the plain computation would clearly not have chosen

    @property
    def is_exact(self) -> bool:
        """Within what float32 arithmetic in another order explains."""
        return max(self.scalings, self.logprobs) <= TOLERANCE and not self.other_tokens


def verify(
    checkpoint: Checkpoint,
    options: EngineOptions,
    device: torch.device,
    dtype: torch.dtype,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Parity:
    """Generates with lookahead and chunked prefill, then computes the same text plainly."""
    disable_progress_bar()  # type: ignore[no-untyped-call]  # on_progress says what is going on
    prompt, tokens, logprobs, scalings = _generate(checkpoint, options, device, dtype, on_progress)
    on_progress("computing the same text without caches, twice")
    plain = TwoPassModel(checkpoint, device=device, dtype=dtype)
    logits, expected = plain.forward(prompt + tokens[:-1])
    rows = logits[len(prompt) - 1 :].float().log_softmax(-1).cpu()
    own = rows.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return Parity(
        tokens=len(tokens),
        scalings=float((scalings - expected.cpu()).abs().max()),
        logprobs=float((own - logprobs).abs().max()),
        other_tokens=int((rows.amax(-1) - own > NEAR_TIE).sum()),
    )


def _generate(
    checkpoint: Checkpoint,
    options: EngineOptions,
    device: torch.device,
    dtype: torch.dtype,
    on_progress: Callable[[str], None],
) -> tuple[list[int], list[int], Tensor, Tensor]:
    """Prompt, generated tokens, their logprobs and the scalings [T, S, E] of the whole text but its last token."""
    model = load_model(
        checkpoint,
        device=device,
        dtype=dtype,
        max_model_len=options.max_model_len,
        on_progress=on_progress,
    )
    engine = build_engine(model, checkpoint, options, wait_for_native=True)
    on_progress("generating")
    vocabulary = engine.info.vocab_size
    prompt = [(7919 * number + 13) % vocabulary for number in range(PROMPT_TOKENS)]
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, logprobs=0)
    engine.add(Request("verify", prompt, sampling, return_scalings="full", scalings_start=0))
    tokens: list[int] = []
    logprobs: list[float] = []
    rows: list[Tensor] = []
    while engine.has_work():
        for output in engine.step().outputs:
            tokens += [token.id for token in output.tokens]
            logprobs += [token.logprob or 0.0 for token in output.tokens]
            if output.gate is not None and output.gate.full is not None:
                rows.append(torch.frombuffer(bytearray(output.gate.full), dtype=torch.float32))
    scalings = torch.cat(rows).view(-1, len(engine.info.sites), len(engine.info.experts))
    return prompt, tokens, torch.tensor(logprobs), scalings


def verify_options(model: str) -> EngineOptions:
    """A small engine: one request, prefill in chunks, lookahead on."""
    length = PROMPT_TOKENS + NEW_TOKENS
    return EngineOptions(model, max_model_len=length, max_num_seqs=1, max_num_batched_tokens=CHUNK_ROWS, block_size=4)
