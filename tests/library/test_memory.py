"""Ten thousand prompts streamed through: memory does not grow with them."""

from __future__ import annotations

import gc

import psutil
import pytest

from service import XLora

MIB = 1 << 20


@pytest.mark.slow
@pytest.mark.parametrize("in_order", [True, False])
def test_memory_stays_flat(fake: XLora, in_order: bool) -> None:
    process, used = psutil.Process(), []
    prompts = ("a" * (number % 40 + 1) for number in range(10_000))
    answers = fake.generate(prompts, max_tokens=8, scalings="full", in_order=in_order)
    for number, answer in enumerate(answers, start=1):
        assert len(answer.token_ids) == 8
        if number % 2000 == 0:
            gc.collect()
            used.append(process.memory_info().rss / MIB)
    assert max(used[1:]) - used[0] < 8, used
