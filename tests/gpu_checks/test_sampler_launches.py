"""What sampling costs the host: as many launches for 128 rows as for one, and one copy to the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from service.engine.sampler import sample
from tests.engine.test_sampler import SETTINGS, row
from tests.support.driver import words
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_cuda_device import Counts

VOCABULARY = 2000
_MOST = 36  # most operators over the logits
_MOST_FILTERED = 60  # the same of rows with top_k, top_p or min_p


def counted(cuda: FakeCuda, count: int, params: dict[str, Any]) -> Counts:
    rows = [row(words(i, 9, VOCABULARY), words(i, 8, 12), seed=i, **params) for i in range(count)]
    with cuda.counted() as counts:
        sample(torch.empty(count, VOCABULARY, dtype=torch.bfloat16, device="cuda"), rows)
    return counts


@pytest.mark.parametrize("name", ["greedy", *SETTINGS])
def test_launches_do_not_grow_with_rows(name: str) -> None:
    params = {"temperature": 0.0} if name == "greedy" else SETTINGS[name]
    with FakeCuda() as cuda:
        counted(cuda, 1, params)  # what is kept for later steps is made
        one, many = counted(cuda, 1, params), counted(cuda, 128, params)
    most = _MOST_FILTERED if {"top_k", "top_p", "min_p"} & params.keys() else _MOST
    assert many.launches.total() == one.launches.total() <= most, many.launches
    assert many.copies_in.total() == one.copies_in.total() == (0 if name == "greedy" else 1)
    assert not many.waits


def test_a_filtered_row_sorts_alone() -> None:
    """Rows that want no filter do not pay for one that does; top_k needs no sort at all."""
    sorted_rows: list[int] = []
    found: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for name, sizes in (("sort", sorted_rows), ("topk", found)):
                if func.overloadpacket.__name__ == name:
                    sizes.append(len(args[0]))
            return func(*args, **(kwargs or {}))

    rows = [row(seed=i) for i in range(20)] + [row(temperature=0.0), row(top_k=20), row(top_p=0.9), row(min_p=0.1)]
    with Sizes():
        sample(torch.randn(len(rows), VOCABULARY), rows)
    assert (sorted_rows, found) == ([2], [1])
