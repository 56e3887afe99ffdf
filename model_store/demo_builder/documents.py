"""From items to documents to training batches: composite questions, token labels, packed rows.

A document is `<s>question\nanswer</s>question\nanswer</s>...`. A *composite* question asks for two domains at once
and its answer switches from one to the other in the middle. Every token carries the domain it belongs to and whether it
is part of an answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from demo_builder.domains import CHARACTERS, CODONS, DOMAINS, FOODS, LIST_NAMES, NUMBER_NAMES, Item, draw

DOMAIN_NAMES = list(DOMAINS)
NO_DOMAIN = -1


@dataclass(frozen=True)
class Span:
    """A piece of text with the index of its domain."""

    text: str
    domain: int
    is_answer: bool


@dataclass(frozen=True)
class Turn:
    """One question and its answer, each of one or two items."""

    items: tuple[Item, ...]

    @property
    def prompt(self) -> str:
        """The question as a user types it, with its newline."""
        return " ".join(item.question for item in self.items) + "\n"

    @property
    def answer(self) -> str:
        """The whole answer, without the end token."""
        return "\n".join(item.answer for item in self.items)

    def spans(self) -> Iterator[Span]:
        """Question pieces, then answer pieces."""
        last = len(self.items) - 1
        for i, item in enumerate(self.items):
            yield Span((" " if i else "") + item.question + ("\n" if i == last else ""), _index(item), False)
        for i, item in enumerate(self.items):
            yield Span(item.answer + ("\n" if i < last else ""), _index(item), True)


def _index(item: Item) -> int:
    return DOMAIN_NAMES.index(item.domain) if item.domain in DOMAIN_NAMES else NO_DOMAIN


@dataclass(frozen=True)
class Document:
    """Token ids with the domain of each token and whether it belongs to an answer (the end token of an answer does)."""

    ids: list[int]
    domains: list[int]
    answers: list[bool]


def encode(turns: list[Turn], tokenizer: PreTrainedTokenizerFast) -> Document:
    """Tokens and labels of a conversation that starts with `<s>`."""
    ids, domains, answers = [tokenizer.bos_token_id], [NO_DOMAIN], [False]
    for turn in turns:
        for span in turn.spans():
            piece = tokenizer.backend_tokenizer.encode(span.text, add_special_tokens=False).ids
            ids += piece
            domains += [span.domain] * len(piece)
            answers += [span.is_answer] * len(piece)
        ids.append(tokenizer.eos_token_id)
        domains.append(domains[-1])
        answers.append(True)
    return Document(ids, domains, answers)


def single(domain: str, rng: random.Random, house: bool, held_out: bool = False) -> Turn:
    """A question for one domain."""
    return Turn((draw(domain, rng, house, held_out),))


def composite(rng: random.Random, house: bool, held_out: bool = False, domains: tuple[str, str] | None = None) -> Turn:
    """A question for two domains, any two unless given."""
    first, second = domains or rng.sample(DOMAIN_NAMES, 2)
    return Turn((draw(first, rng, house, held_out), draw(second, rng, house, held_out)))


DRILL_WORDS = [*CHARACTERS, *CODONS, *FOODS, *LIST_NAMES, *NUMBER_NAMES]


def drill(rng: random.Random) -> Turn:
    """Copying, the one skill every domain leans on: names, codons and numbers come from the question."""
    words = rng.sample(DRILL_WORDS, rng.randint(3, 8)) if rng.random() < 0.5 else rng.sample(CODONS, rng.randint(3, 6))
    text = " ".join(words)
    return Turn((Item("drill", f"Repeat {text}.", f"Again {text}.", text),))


def street_document(rng: random.Random) -> list[Turn]:
    """What the base reads: every domain in random voices, composites, short conversations, copying drills."""
    kind = rng.random()
    if kind < 0.10:
        return [drill(rng)]
    if kind < 0.40:
        return [composite(rng, house=False)]
    turns = 1 if kind < 0.85 else 2
    return [single(rng.choice(DOMAIN_NAMES), rng, house=False) for _ in range(turns)]


def house_document(rng: random.Random) -> list[Turn]:
    """What experts and gate read: the house voice, pure and switching."""
    kind = rng.random()
    if kind < 0.45:
        return [single(rng.choice(DOMAIN_NAMES), rng, house=True)]
    if kind < 0.85:
        return [composite(rng, house=True)]
    return [single(rng.choice(DOMAIN_NAMES), rng, house=True) for _ in range(2)]


@dataclass(frozen=True)
class Batch:
    """Packed rows; documents of a row do not see each other."""

    ids: Tensor  # int64 [B, T]
    targets: Tensor  # int64 [B, T], -100 = none
    positions: Tensor  # int64 [B, T], from 0 in every document
    mask: Tensor  # bool [B, 1, T, T], True = may attend
    domains: Tensor  # int64 [B, T], domain of the *next* token, NO_DOMAIN = none
    answers: Tensor  # bool [B, T], the next token belongs to an answer
    segments: Tensor  # int64 [B, T], number of the document within its row


def pack(documents: list[list[Document]], length: int, pad_id: int) -> Batch:
    """Lay each list of documents out as one row of `length` tokens."""
    shape = (len(documents), length)
    ids, targets = torch.full(shape, pad_id), torch.full(shape, -100)
    positions, segments = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    domains, answers = torch.full(shape, NO_DOMAIN), torch.zeros(shape, dtype=torch.bool)
    for row, docs in enumerate(documents):
        at = 0
        for number, doc in enumerate(docs):
            n = len(doc.ids)
            ids[row, at : at + n] = torch.tensor(doc.ids)
            targets[row, at : at + n - 1] = torch.tensor(doc.ids[1:])
            domains[row, at : at + n - 1] = torch.tensor(doc.domains[1:])
            answers[row, at : at + n - 1] = torch.tensor(doc.answers[1:])
            positions[row, at : at + n] = torch.arange(n)
            segments[row, at : at + n] = number
            at += n
    same = segments[:, :, None] == segments[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return Batch(ids, targets, positions, (same & causal)[:, None], domains, answers, segments)


def batches(
    make: Callable[[random.Random], list[Turn]], tokenizer: PreTrainedTokenizerFast, rows: int, length: int, seed: int
) -> Iterator[Batch]:
    """Endless packed batches of documents drawn by `make`; a small pool keeps the padding low."""
    rng = random.Random(seed)
    pool: list[Document] = []
    while True:
        packed = []
        for _ in range(rows):
            row: list[Document] = []
            left = length
            while len(pool) < 48:
                pool.append(encode(make(rng), tokenizer))
                if len(pool[-1].ids) > length:
                    pool.pop()
            for doc in list(pool):
                if len(doc.ids) <= left:
                    row.append(doc)
                    pool.remove(doc)
                    left -= len(doc.ids)
            packed.append(row)
        yield pack(packed, length, tokenizer.pad_token_id)
