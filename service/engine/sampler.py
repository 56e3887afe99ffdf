"""Samples tokens from logits: logits processors, then Gumbel-max with the noise of noise.py.

A step costs a few operators and one copy to the device, for any number of rows: on the host, parameters of rows are
gathered into columns, and those of single ids (biases, penalties) into indices of the flattened logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from service.contract.request import SamplingParams
from service.engine.noise import gumbel_noise, mixed_keys
from service.engine.sequence import Sequence
from service.model.transfer import pack_to_device, unpack_bits

# A top_k up to this is found without sorting, always among this many: a row's sums must not depend on other rows.
_MAX_UNSORTED = 1024

Column = npt.NDArray[Any]  # [n], from the host
Given = Mapping[str, Tensor]  # the columns on the device


@dataclass(slots=True)  # a frozen one takes twice as long to make, and there are two for every token
class SampleRow:
    """A row of logits that gives the token of `sequence` after `pending`, drafts that are not accepted yet."""

    sequence: Sequence
    pending: SequenceOf[int] = ()
    drafted: bool = False  # the token becomes a draft, so its logprobs are not returned

    @property
    def output_position(self) -> int:
        """Output tokens before the one to be sampled."""
        return self.sequence.output_len + len(self.pending)

    @property
    def logprobs(self) -> int | None:
        """The number of alternatives that its request returns; None without logprobs."""
        return None if self.drafted else self.sequence.sampling.logprobs


def sample(logits: Tensor, rows: SequenceOf[SampleRow]) -> Tensor:
    """Samples one token per row of logits [n, V] (any dtype); the argmax where the temperature is (almost) 0.

    Returns int64 [n] on the device of the logits, without waiting for it.
    """
    if take_argmax(rows):
        return logits.argmax(-1)
    return Processors(rows, logits.shape[1], logits.device).choose(logits)


class Processors:
    """The sampling parameters of some rows, copied to the device at once, and the processors that apply them."""

    def __init__(
        self, rows: SequenceOf[SampleRow], vocabulary: int, device: torch.device, *, with_grammars: bool = True
    ) -> None:
        params = [row.sequence.sampling for row in rows]
        self.random = [i for i, each in enumerate(params) if not each.is_greedy]
        self._all_random = len(self.random) == len(rows)
        self._given = _upload(
            {
                **_history(rows, params, vocabulary),
                **(_masks(rows) if with_grammars else {}),
                **_ends(rows, params, vocabulary),
                **_draws([rows[i] for i in self.random], [params[i] for i in self.random], vocabulary),
                "random": np.array([] if self._all_random else self.random, np.int64),
            },
            device,
        )

    def choose(self, logits: Tensor, keys: Tensor | None = None) -> Tensor:
        """A token per row of logits [n, V], int64 [n]. `keys`, int64 [random rows], replace the rows' noise keys."""
        given = self._given if keys is None else {**self._given, "keys": keys}
        logits = _hold_ends(_forbid(_process_history(logits.float(), given), given), given)
        if self._all_random:
            return _draw(logits, given)
        chosen = logits.argmax(-1)
        if self.random:
            chosen.index_copy_(0, given["random"], _draw(logits.index_select(0, given["random"]), given))
        return chosen


def take_argmax(rows: SequenceOf[SampleRow]) -> bool:
    """Whether every row's token is the argmax of its unprocessed logits."""
    return all(row.sequence.takes_argmax and row.sequence.grammar is None for row in rows)


def _upload(columns: Mapping[str, Column], device: torch.device) -> dict[str, Tensor]:
    """The columns on the device, without empty ones."""
    wanted = {name: column for name, column in columns.items() if column.size}
    return dict(zip(wanted, pack_to_device(list(wanted.values()), device), strict=True))


def _history(rows: SequenceOf[SampleRow], params: SequenceOf[SamplingParams], vocabulary: int) -> dict[str, Column]:
    """Columns of logit_bias and the penalties: indices of the flat logits (row * vocabulary + id), and amounts.

    An index may occur twice among the repeated ones, with the same amount.
    """
    biased, repeated, counted = _FlatIndex(), _FlatIndex(), _FlatIndex()
    for first, row, each in zip(range(0, len(rows) * vocabulary, vocabulary), rows, params, strict=True):
        if not each.needs_history:
            continue
        sequence, pending = row.sequence, row.pending
        if each.logit_bias:
            count = len(each.logit_bias)
            values = np.fromiter(each.logit_bias.values(), np.float32, count)
            biased.add(first, np.fromiter(each.logit_bias, np.int64, count), values)
        if each.repetition_penalty != 1.0:
            own = np.array([*sequence.output_counts, *pending], np.int64)
            ids = np.concatenate([np.frombuffer(sequence.prompt_ids, np.int64), own])
            repeated.add(first, ids, np.full(len(ids), each.repetition_penalty, np.float32))
        if each.presence_penalty or each.frequency_penalty:
            counts = sequence.output_counts
            if pending:
                counts = counts.copy()
                counts.update(pending)
            amounts = np.fromiter(counts.values(), np.float32, len(counts)) * np.float32(each.frequency_penalty)
            amounts += np.float32(each.presence_penalty)
            counted.add(first, np.fromiter(counts, np.int64, len(counts)), amounts)
    return {**biased.columns("biased"), **repeated.columns("repeated"), **counted.columns("counted")}


class _FlatIndex:
    """Indices of the flat logits with an amount for each, collected row by row."""

    def __init__(self) -> None:
        self._indices: list[Column] = []
        self._amounts: list[Column] = []

    def add(self, first: int, ids: Column, amounts: Column) -> None:
        """Adds ids of the row whose logits begin at `first`."""
        self._indices.append(ids + first)
        self._amounts.append(amounts)

    def columns(self, name: str) -> dict[str, Column]:
        """All indices, and all amounts; nothing where there is none."""
        if not self._indices:
            return {}
        return {name: np.concatenate(self._indices), f"{name} by": np.concatenate(self._amounts)}


def _process_history(logits: Tensor, given: Given) -> Tensor:
    """logits [n, V] with logit_bias and penalties applied, out of place."""
    if not any(name in given for name in ("biased", "repeated", "counted")):
        return logits
    processed = logits.clone()
    flat = processed.view(-1)
    if "biased" in given:
        flat.index_add_(0, given["biased"], given["biased by"])
    if "repeated" in given:
        index, penalty = given["repeated"], given["repeated by"]
        scores = flat.index_select(0, index)
        flat.index_copy_(0, index, torch.where(scores > 0, scores / penalty, scores * penalty))
    if "counted" in given:
        flat.index_add_(0, given["counted"], given["counted by"], alpha=-1)
    return processed


def _masks(rows: SequenceOf[SampleRow]) -> dict[str, Column]:
    """Columns of the rows that have a grammar, and of the ids that it allows in each, a bit per id."""
    masks = {
        i: row.sequence.grammar.allowed(row.pending) for i, row in enumerate(rows) if row.sequence.grammar is not None
    }
    if not masks:
        return {}
    bits = np.frombuffer(bytearray(b"".join(masks.values())), np.uint8)
    return {"with grammar": np.array(list(masks), np.int64), "allowed": bits}


def _forbid(logits: Tensor, given: Given) -> Tensor:
    """logits [n, V] with -inf at ids that a row's grammar does not allow, out of place."""
    if "with grammar" not in given:
        return logits
    index = given["with grammar"]
    allowed = unpack_bits(given["allowed"].view(len(index), -1), logits.shape[1])
    return logits.index_copy(0, index, logits.index_select(0, index).masked_fill_(~allowed, float("-inf")))


def _ends(rows: SequenceOf[SampleRow], params: SequenceOf[SamplingParams], vocabulary: int) -> dict[str, Column]:
    """Column of the flat indices of end tokens, in rows that have not reached min_tokens."""
    held = [
        [i * vocabulary + id for id in row.sequence.end_token_ids]
        for i, (row, each) in enumerate(zip(rows, params, strict=True))
        if each.min_tokens and row.output_position < each.min_tokens
    ]
    return {"held": np.array(list(chain(*held)), np.int64)}


def _hold_ends(logits: Tensor, given: Given) -> Tensor:
    """logits [n, V] with -inf at the held end tokens, except in rows whose grammar allows nothing else."""
    if "held" not in given:
        return logits
    held = logits.flatten().index_fill(0, given["held"], float("-inf")).view(logits.shape)
    return torch.where(held.amax(-1, keepdim=True) == float("-inf"), logits, held)


def _draws(rows: SequenceOf[SampleRow], params: SequenceOf[SamplingParams], vocabulary: int) -> dict[str, Column]:
    """Columns of the rows that are sampled at random: noise keys, temperatures, and of filtered rows their index,
    top_k, top_p and min_p. Rows with a small top_k ("few") need no sorted vocabulary.
    """
    filtered = [i for i, each in enumerate(params) if each.top_k or each.top_p < 1.0 or each.min_p]
    few = [i for i in filtered if 0 < params[i].top_k <= _MAX_UNSORTED]
    columns: dict[str, Column] = {
        "keys": noise_keys(rows),
        "temperature": np.array([each.temperature for each in params], np.float32),
    }
    for name, numbers in (("few", few), ("sorted", [i for i in filtered if i not in set(few)])):
        own = [params[i] for i in numbers]
        columns[name] = np.array(numbers, np.int64)
        columns[f"{name} top_k"] = np.array([each.top_k or vocabulary for each in own], np.int64)
        columns[f"{name} top_p"] = np.array([each.top_p for each in own], np.float32)
        columns[f"{name} min_p"] = np.array([each.min_p for each in own], np.float32)
    return columns


def _draw(logits: Tensor, given: Given) -> Tensor:
    """Temperature, filters, noise, argmax: logits [m, V] of the rows that are sampled at random -> int64 [m]."""
    filtered = _filter(logits / given["temperature"][:, None], given)
    return filtered.add_(gumbel_noise(given["keys"], logits.shape[1])).argmax(-1)


def _filter(logits: Tensor, given: Given) -> Tensor:
    """logits [m, V] with -inf at ids that top_k, top_p and min_p rule out."""
    groups = [name for name in ("few", "sorted") if name in given]
    if not groups:
        return logits
    cutoff = torch.full_like(logits[:, :1], float("-inf"))
    for name in groups:
        index = given[name]
        own = logits.index_select(0, index)
        best = own.topk(min(_MAX_UNSORTED, own.shape[1])) if name == "few" else own.sort(-1, descending=True)
        limits = (given[f"{name} {limit}"][:, None] for limit in ("top_k", "top_p", "min_p"))
        cutoff.index_copy_(0, index, _cutoff(best.values, *limits))
    return logits.masked_fill(logits < cutoff, float("-inf"))


def _cutoff(ordered: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The smallest logit [m, 1] that passes the limits [m, 1], of the best logits `ordered` [m, K], best first."""
    within = torch.arange(ordered.shape[1], device=ordered.device) < top_k
    probabilities = ordered.masked_fill(~within, float("-inf")).softmax(-1)
    # A token passes if the mass before it is below top_p, so the first one always does.
    within &= probabilities.cumsum(-1) - probabilities < top_p
    within &= probabilities >= min_p * probabilities[:, :1]
    return ordered.gather(-1, (within.sum(-1, keepdim=True) - 1).clamp_(min=0))


def noise_keys(rows: SequenceOf[SampleRow]) -> npt.NDArray[np.int64]:
    """The key [n] of each row's noise."""
    return mixed_keys(
        [row.sequence.sampling.seed for row in rows],
        [row.sequence.index for row in rows],
        [row.output_position for row in rows],
    )
