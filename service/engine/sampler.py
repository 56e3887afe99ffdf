"""From logits to tokens: processors, then Gumbel-max with noise that is a pure function of what is being sampled.

The noise of (seed, choice, output position, vocabulary id) is a hash, not the next number of a generator. So a fixed
seed gives the same text whatever else is in the batch, on every device, after a preemption, and a *draft* sampled from
the scaling pass's logits meets the same noise as the real token, which is what makes them agree (DESIGN section 3).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from service.engine.sequence import Sequence
from service.model.transfer import bits_to_device, to_device

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(slots=True)  # a frozen one takes twice as long to make, and there are two for every token
class SampleRow:
    """A row of logits: the next token of `sequence` after `pending`, drafts that are not accepted yet."""

    sequence: Sequence
    pending: SequenceOf[int] = ()
    drafted: bool = False  # its token becomes a draft, whose logprobs nobody sees

    @property
    def output_position(self) -> int:
        """How many tokens of output come before the one to be sampled."""
        return self.sequence.output_len + len(self.pending)

    @property
    def logprobs(self) -> int | None:
        """How many alternatives its request wants to see; None where it wants no logprobs."""
        return None if self.drafted else self.sequence.sampling.logprobs


def sample(logits: Tensor, rows: SequenceOf[SampleRow]) -> Tensor:
    """Samples one token per row of logits [n, V] (any dtype); where the temperature is (next to) 0, the argmax.

    Returns int64 [n] on the device of the logits: whoever reads it waits for the device.
    """
    logits = logits.float()
    if all(row.sequence.takes_argmax and row.sequence.grammar is None for row in rows):
        return logits.argmax(-1)
    if any(row.sequence.sampling.needs_history for row in rows):
        logits = _process_history(logits.clone(), rows)
    if any(row.sequence.grammar is not None for row in rows):
        logits = _forbid(logits, rows)
    if any(_is_held(row) for row in rows):
        logits = _hold_ends(logits, rows)
    random = [i for i, row in enumerate(rows) if not row.sequence.sampling.is_greedy]
    if not random:
        return logits.argmax(-1)
    chosen = logits.argmax(-1)
    index = to_device(random, logits.device)
    drawn = [rows[i] for i in random]
    filtered = _filter(logits[index], drawn)
    chosen[index] = (filtered + gumbel_noise(drawn, logits.shape[-1], logits.device)).argmax(-1)
    return chosen


def _process_history(logits: Tensor, rows: SequenceOf[SampleRow]) -> Tensor:
    """Applies logit_bias and the penalties to logits [n, V], in place."""
    for line, row in zip(logits, rows, strict=True):
        params = row.sequence.sampling
        if params.logit_bias:
            ids = to_device(list(params.logit_bias), logits.device)
            line[ids] += to_device(list(params.logit_bias.values()), logits.device, logits.dtype)
        if params.repetition_penalty != 1.0:
            seen = to_device(sorted({*row.sequence.tokens, *row.pending}), logits.device)
            scores = line[seen]
            line[seen] = torch.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
        if params.presence_penalty or params.frequency_penalty:
            counts = row.sequence.output_counts.copy()
            counts.update(row.pending)
            if counts:
                ids = to_device(list(counts), logits.device)
                amounts = to_device(list(counts.values()), logits.device, logits.dtype)
                line[ids] -= params.presence_penalty + params.frequency_penalty * amounts
    return logits


def _forbid(logits: Tensor, rows: SequenceOf[SampleRow]) -> Tensor:
    """logits [n, V] with what the rows' grammars do not allow at -inf; the given ones stay as they are."""
    grammars = [(i, row.sequence.grammar, row.pending) for i, row in enumerate(rows)]
    masks = [(i, grammar.allowed(pending)) for i, grammar, pending in grammars if grammar is not None]
    index = to_device([i for i, _ in masks], logits.device)
    allowed = bits_to_device([mask for _, mask in masks], logits.shape[-1], logits.device)
    return logits.index_copy(0, index, logits.index_select(0, index).masked_fill_(~allowed, float("-inf")))


def _is_held(row: SampleRow) -> bool:
    """Whether the text may not end with this token: min_tokens are still to come."""
    return row.output_position < row.sequence.sampling.min_tokens and bool(row.sequence.ends)


def _hold_ends(logits: Tensor, rows: SequenceOf[SampleRow]) -> Tensor:
    """logits [n, V] with what would end a held row's text at -inf, unless its grammar allows nothing else."""
    held = logits.clone()
    for number, row in enumerate(rows):
        if _is_held(row):
            line = held[number].index_fill(0, to_device(sorted(row.sequence.ends), logits.device), float("-inf"))
            held[number] = torch.where(line.amax() == float("-inf"), held[number], line)
    return held


def _filter(logits: Tensor, rows: SequenceOf[SampleRow]) -> Tensor:
    """Temperature, then top_k, top_p, min_p: logits [n, V] with what must not be sampled at -inf."""
    params = [row.sequence.sampling for row in rows]
    logits = logits / _column([p.temperature for p in params], logits)
    if all(p.top_k == 0 and p.top_p >= 1.0 and p.min_p == 0.0 for p in params):
        return logits
    ordered = logits.sort(-1, descending=True).values
    vocabulary = logits.shape[-1]
    rank = torch.arange(vocabulary, device=logits.device)
    within = rank < _column([p.top_k or vocabulary for p in params], logits)
    probabilities = ordered.masked_fill(~within, float("-inf")).softmax(-1)
    # A token stays if the mass before it is below top_p: the first one always does.
    within &= probabilities.cumsum(-1) - probabilities < _column([p.top_p for p in params], logits)
    within &= probabilities >= _column([p.min_p for p in params], logits) * probabilities[:, :1]
    within[:, 0] = True
    cutoff = ordered.gather(-1, within.sum(-1, keepdim=True) - 1)
    return logits.masked_fill(logits < cutoff, float("-inf"))


def _column(values: list[float], like: Tensor) -> Tensor:
    return to_device(values, like.device, like.dtype)[:, None]


def gumbel_noise(rows: SequenceOf[SampleRow], vocabulary: int, device: torch.device) -> Tensor:
    """Standard Gumbel noise, fp32 [n, vocabulary], keyed by (seed, choice, output position, vocabulary id)."""
    keys = to_device([_signed(_row_key(row)) for row in rows], device)[:, None]
    bits = _splitmix64_finalise_(keys + _counters(vocabulary, device))
    uniform = _shift_right(bits, 11).double().add_(0.5).mul_(2.0**-53)  # in (0, 1), never either end
    return uniform.log_().neg_().log_().neg_().float()


@lru_cache(maxsize=2)
def _counters(vocabulary: int, device: torch.device) -> Tensor:
    """What splitmix64 adds for each vocabulary id, int64 [vocabulary]."""
    return torch.arange(1, vocabulary + 1, device=device) * _signed(_GOLDEN)


def _row_key(row: SampleRow) -> int:
    """One 64-bit key per (seed, choice, output position): each field is mixed before the next is added."""
    key = _mix(row.sequence.sampling.seed)
    key = _mix(key + row.sequence.index)
    return _mix(key + row.output_position)


def _mix(value: int) -> int:
    """splitmix64 (Steele, Lea, Flood 2014) of one Python integer."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _splitmix64_finalise_(bits: Tensor) -> Tensor:
    """The same finaliser on an int64 tensor, in place; multiplication wraps as unsigned would."""
    bits.bitwise_xor_(_shift_right(bits, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    bits.bitwise_xor_(_shift_right(bits, 27)).mul_(_signed(0x94D049BB133111EB))
    return bits.bitwise_xor_(_shift_right(bits, 31))


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical shift: int64's own is arithmetic."""
    return (bits >> count).bitwise_and_((1 << (64 - count)) - 1)


def _signed(value: int) -> int:
    """The int64 with the same bits as an unsigned 64-bit integer."""
    return value - (1 << 64) if value >> 63 else value
