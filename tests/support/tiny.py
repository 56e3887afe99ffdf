"""A tiny bundle in memory, its variants, and the model driven row by row without an engine.

Base and experts are read once; a variant changes only the configuration and the classifier, in our Checkpoint and in
the oracle alike, so that hundreds of configurations cost milliseconds each.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from service.checkpoint import Checkpoint, ClassifierWeights, load_checkpoint
from service.model.batch import AttentionGroup, Batch
from service.model.kv_cache import KVCache
from service.model.loading.passes import BASE_PASSES, Loading, run
from service.model.xlora_model import XLoraModel
from tests.support.bundles import make_bundle, make_classifier
from tests.support.oracle import PeftOracle

CPU = torch.device("cpu")
_RAW_GATE = 0.3
BLOCK_SIZE = 4  # small, so that every test crosses block borders


def load_base(checkpoint: Checkpoint, dtype: torch.dtype, max_model_len: int | None = None) -> Any:
    """The base as the model gets it, on a CPU."""
    return run(Loading(checkpoint, CPU, dtype, max_model_len=max_model_len), BASE_PASSES).causal_lm


@dataclass(frozen=True)
class Variant:
    """One configuration: the checkpoint to build our model from, and the same numbers for the oracle."""

    tiny: Tiny
    checkpoint: Checkpoint

    def model(self, dtype: torch.dtype = torch.float32) -> XLoraModel:
        """Our model, freshly built."""
        base = copy.deepcopy(self.tiny.base(dtype))
        return XLoraModel(self.checkpoint, base, device=CPU, dtype=dtype)

    def oracle(self) -> PeftOracle:
        """The one oracle of the bundle, set to this configuration: use it before asking another variant for it."""
        self.tiny.oracle.reconfigure(self.checkpoint.xlora, self.checkpoint.classifier.layers)
        return self.tiny.oracle


class Tiny:
    """A bundle on disk, read once: one that is there, or a new one of `bundle` (arguments of make_bundle)."""

    def __init__(self, path: Path, **bundle: Any) -> None:
        logging.disable_progress_bar()
        self.path = path if (path / "bundle.json").exists() else make_bundle(path, **bundle)
        self.checkpoint = load_checkpoint(self.path)
        self._bases: dict[torch.dtype, Any] = {}

    @cached_property
    def oracle(self) -> PeftOracle:
        """PEFT's XLoraModel of this bundle."""
        return PeftOracle(self.path)

    def base(self, dtype: torch.dtype) -> Any:
        """The base as transformers loads it, with our attention: copy it before building a model on it."""
        if dtype not in self._bases:
            self._bases[dtype] = load_base(self.checkpoint, dtype)
        return self._bases[dtype]

    def variant(self, *, seed: int = 1, **xlora: Any) -> Variant:
        """This bundle with other XLoraConfig fields and a random classifier of the shape they ask for."""
        config = replace(self.checkpoint.xlora, **xlora)
        pairs = make_classifier(
            config,
            sites=len(self.oracle.sites),
            experts=len(self.checkpoint.experts),
            generator=torch.Generator().manual_seed(seed),
        )
        if (
            not config.enable_softmax
        ):  # raw gates of order 1, as trained ones are: at 10 the model amplifies rounding errors
            pairs[-1] = tuple(None if part is None else part * _RAW_GATE for part in pairs[-1])  # type: ignore[assignment]
        return Variant(self, replace(self.checkpoint, xlora=config, classifier=ClassifierWeights(tuple(pairs))))

    def as_stored(self) -> Variant:
        """The bundle as it is on disk."""
        return Variant(self, self.checkpoint)


class OneRequest:
    """Drives XLoraModel.forward for one request, both streams in a KV pool full of other people's leftovers.

    Keys, values and gate rows start as NaN: reading a slot that was never written shows at once.
    """

    def __init__(self, model: XLoraModel, length: int, *, block_size: int = BLOCK_SIZE, seed: int = 0) -> None:
        self.model, self.block_size = model, block_size
        per_stream = -(-length // block_size)
        self.cache = KVCache.allocate(model.kv_layout(block_size), 2 * per_stream + 3, model.dummy_row)
        for pool in (*self.cache.keys, *self.cache.values):
            pool.fill_(torch.nan)
        self.cache.gate_rows[:-1] = float("nan")
        order = torch.randperm(self.cache.num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
        self.scaling_blocks, self.real_blocks = order[:per_stream], order[per_stream : 2 * per_stream]

    def slots(self, blocks: list[int], start: int, end: int) -> list[int]:
        """Slots of positions start .. end - 1."""
        return [blocks[p // self.block_size] * self.block_size + p % self.block_size for p in range(start, end)]

    def batch(self, tokens: list[int], scaling: tuple[int, int], real: tuple[int, int]) -> Batch:
        """Rows of positions scaling[0] .. scaling[1] - 1 of the scaling stream, then of `real` of the real one;
        all logits.
        """
        spans = [(self.scaling_blocks, *scaling), (self.real_blocks, *real)]
        rows = [(blocks, start, end) for blocks, start, end in spans if end > start]
        scaling_rows, real_rows = scaling[1] - scaling[0], real[1] - real[0]
        groups, first = [], 0
        for blocks, start, end in rows:
            table = blocks[: -(-end // self.block_size)]
            positions = torch.arange(start, end)[None]
            groups.append(AttentionGroup(first, 1, end - start, positions, torch.tensor([table]), end, end - start > 1))
            first += end - start
        rows_of = [
            [token for _, start, end in rows for token in tokens[start:end]],
            [position for _, start, end in rows for position in range(start, end)],
            [slot for row in rows for slot in self.slots(*row)],
            [self.cache.dummy_slot] * scaling_rows + self.slots(self.real_blocks, *real),
            self.slots(self.real_blocks, *scaling) + [self.cache.scratch_slot] * real_rows,
            [1] * scaling_rows + [0] * real_rows,
        ]
        logit_rows = torch.arange(scaling_rows, scaling_rows + real_rows)
        return Batch(torch.tensor(rows_of, dtype=torch.int64), scaling_rows, logit_rows, groups)

    def run(self, tokens: list[int], chunks: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Logits [T, V] and scalings [T, S, E]: forward i has the scaling rows of chunk i and the real rows of
        chunk i - 1.
        """
        spans = [(sum(chunks[:i]), sum(chunks[: i + 1])) for i in range(len(chunks))]
        assert spans[-1][1] == len(tokens)
        logits, scalings = [], []
        for scaling, real in zip([*spans, (0, 0)], [(0, 0), *spans], strict=True):
            output = self.model.forward(self.batch(tokens, scaling, real), self.cache)
            logits.append(output.logits)
            scalings.append(self.model.classifier.scalings(output.gate_logits))
        return torch.cat(logits), torch.cat(scalings).expand(-1, len(self.model.sites), -1)


def run_once(model: XLoraModel, tokens: list[int], chunks: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Logits [T, V] and scalings [T, S, E] of `tokens`, in one scaling pass and one real pass unless `chunks` says
    otherwise.
    """
    return OneRequest(model, len(tokens)).run(tokens, chunks or [len(tokens)])


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], tolerance: float = 1e-4) -> None:
    """Logits and scalings within `tolerance`, absolute."""
    torch.testing.assert_close(ours[1], theirs[1], atol=tolerance, rtol=0, msg=lambda text: f"scalings: {text}")
    torch.testing.assert_close(ours[0], theirs[0], atol=tolerance, rtol=0, msg=lambda text: f"logits: {text}")


def top_k_gap(scalings_before: Tensor, top_k: int) -> float:
    """The smallest distance between the last kept and the first dropped of [..., E]:
    a tie would make top-k a coin toss.
    """
    ordered = scalings_before.sort(-1, descending=True).values
    return float((ordered[..., top_k - 1] - ordered[..., top_k]).min())
