"""Lessons: what both passes make of every position of every text, on disk and mapped into memory from there.

    hidden     the scaling pass's last hidden state
    keys       the scaling pass's keys of the last layer, turned by their positions as the KV cache has them
    values     its values
    likeliest  the real pass's likeliest next tokens, best first
    shares     their probabilities, of all of them together

A shard holds whole texts. Texts are divided in three parts by their number: eight of ten pairs, one greedy and one
sampled, are learned from, one chooses among states of the training, and one judges the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.tools.distill.plan import OnProgress
from service.tools.distill.recorder import LastLayerRecorder
from service.tools.distill.work_folder import Text, WorkFolder
from service.tools.two_pass import TwoPassModel

HELD_OUT = 10  # of so many pairs of texts, one is to choose by and one to judge by
LEAST_TEXTS = 2 * HELD_OUT
JUDGING, CHOOSING, LEARNING = range(3)
_LIKELIEST = 64  # tokens of the real pass that a lesson keeps
_SHARD_POSITIONS = 16384


@dataclass(frozen=True, slots=True)
class Lesson:
    """One text of T tokens, K of the likeliest tokens at each."""

    prompt: int  # tokens of it
    tokens: Tensor  # int64 [T]
    hidden: Tensor  # [T, H]
    keys: Tensor  # [T, kv_heads, head_dim]
    values: Tensor  # [T, kv_heads, head_dim]
    likeliest: Tensor  # int32 [T, K]
    shares: Tensor  # fp32 [T, K]

    @property
    def answer(self) -> Tensor:
        """Positions where drafts are made: the last one of the prompt, and all after it but the last."""
        return torch.arange(self.prompt - 1, len(self.tokens) - 1)


def read_lessons(
    plain: TwoPassModel, texts: Sequence[Text], work: WorkFolder, on_progress: OnProgress
) -> list[list[Lesson]]:
    """Computes what the work folder does not have yet. Returns the three parts."""
    parts: list[list[Lesson]] = [[], [], []]
    recorder = LastLayerRecorder(plain)
    number = 0
    for index, some in enumerate(_shards(texts)):
        name = f"lessons-{index:05}.safetensors"
        if not work.has(name):
            _write_shard(plain, recorder, some, number, len(texts), name, work, on_progress)
        for lesson in _lessons(work.read(name), some):
            parts[part_of(number)].append(lesson)
            number += 1
        on_progress("reading texts", number, len(texts))
    return parts


def part_of(number: int) -> int:
    """The part that a text belongs to."""
    return min(number // 2 % HELD_OUT, LEARNING)


def _shards(texts: Sequence[Text]) -> Iterator[list[Text]]:
    """The texts, in groups of about a shard's positions."""
    group: list[Text] = []
    positions = 0
    for text in texts:
        if group and positions + len(text.tokens) > _SHARD_POSITIONS:
            yield group
            group, positions = [], 0
        group.append(text)
        positions += len(text.tokens)
    if group:
        yield group


def _write_shard(
    plain: TwoPassModel,
    recorder: LastLayerRecorder,
    texts: list[Text],
    first: int,
    total: int,
    name: str,
    work: WorkFolder,
    on_progress: OnProgress,
) -> None:
    rows: dict[str, list[Tensor]] = {}
    for number, text in enumerate(texts, start=first):
        on_progress("reading texts", number, total)
        hidden, keys, values = recorder.scaling_pass(text.tokens)
        logits = plain.real_pass(text.tokens, plain.scalings(hidden))
        best = logits.topk(min(_LIKELIEST, logits.shape[-1]))
        found = {
            "hidden": hidden,
            "keys": keys,
            "values": values,
            "likeliest": best.indices.int(),
            "shares": best.values.float().softmax(-1),
        }
        for key, tensor in found.items():
            rows.setdefault(key, []).append(tensor.cpu())
    work.write(name, {key: torch.cat(tensors) for key, tensors in rows.items()})


def _lessons(shard: dict[str, Tensor], texts: list[Text]) -> Iterator[Lesson]:
    first = 0
    for text in texts:
        rows = {key: tensor[first : first + len(text.tokens)] for key, tensor in shard.items()}
        yield Lesson(prompt=text.prompt, tokens=torch.tensor(text.tokens), **rows)
        first += len(text.tokens)
