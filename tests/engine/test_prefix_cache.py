"""What one request has computed another need not: the same tokens and rows, fewer rows run, nothing it must not see."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from service.contract.request import Request, SamplingParams
from service.engine.scheduler import Scheduler
from service.engine.sequence import Sequence
from tests.engine.gate.test_gate_rows import assert_observed_once
from tests.engine.test_engine import same
from tests.support.driver import Choice, Engines, greedy, run, sampled, words

PROMPT = words(1, 45)
ALL: dict[str, Any] = {"return_scalings": "full", "scalings_start": 0}


def cached(choice: Choice) -> int:
    """Prompt positions the choice did not compute."""
    assert choice.usage is not None
    return choice.usage.cached_tokens


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("length", [1, 4, 16, 17, 45])
def test_a_hit_changes_nothing(engines: Engines, lookahead: bool, block_size: int, length: int) -> None:
    """Off by one at a block's end; rows or statistics of positions that were not computed; a last position without
    logits.
    """
    engine = engines.build(lookahead=lookahead, block_size=block_size)
    for made in (greedy("a", PROMPT[:length], 9, **ALL), sampled("a", PROMPT[:length], 9, temperature=0.8, logprobs=2)):
        made = replace(made, **ALL, cache_salt=made.id + str(made.sampling))
        first, second = run(engine, [made]), run(engine, [made])
        same(second["a"], first["a"])
        assert [token.logprob for token in second["a"].token_outputs] == pytest.approx(
            [token.logprob for token in first["a"].token_outputs], abs=1e-4
        )
        assert cached(first["a"]) == 0
        assert cached(second["a"]) == (length - 1) // block_size * block_size
        assert_observed_once(second, [made], 3)
        usages = first["a"].usage, second["a"].usage
        assert usages[0] is not None
        assert usages[1] is not None
        assert usages[1].real_rows == usages[0].real_rows - cached(second["a"])


def test_multi_turn(engines: Engines) -> None:
    """The answer's blocks are found too: the next turn computes its own words only."""
    engine, fresh = engines.build(), engines.build(prefix_cache=False)
    text = list(PROMPT)
    for turn in range(4):
        made = sampled(f"turn {turn}", text, 13, seed=turn)
        made = replace(made, **ALL)
        ours = run(engine, [made])[made.id]
        same(ours, run(fresh, [made])[made.id])
        # What was said last turn is known, but for its last token, which nothing followed.
        known = 0 if turn == 0 else len(text) - 7 - 1
        assert cached(ours) == known // 4 * 4
        text += ours.tokens + words(50 + turn, 7)


def test_part_of_a_prompt(engines: Engines) -> None:
    """A shared system prompt: blocks up to the first difference, whoever computed them, also while they run."""
    engine = engines.build()
    run(engine, [greedy("first", PROMPT, 4)])
    others = [greedy(str(i), PROMPT[:30] + words(70 + i, 10), 6, **ALL) for i in range(3)]
    result = run(engine, others, joins={2: [greedy("late", PROMPT[:30] + words(70, 10) + [5, 6], 6, **ALL)]})
    fresh = engines.build(prefix_cache=False)
    for i in range(3):
        same(result[str(i)], run(fresh, [others[i]])[str(i)])
        assert cached(result[str(i)]) == 28
    assert cached(result["late"]) == 40


def test_another_salt_finds_nothing(engines: Engines) -> None:
    """A tenant must not learn from the time of the first token what another has asked."""
    engine = engines.build()
    made = greedy("a", PROMPT, 4)
    run(engine, [replace(made, cache_salt="mine")])
    for salt, expected in (("", 0), ("theirs", 0), ("mine", 44)):
        assert cached(run(engine, [replace(made, cache_salt=salt)])["a"]) == expected


def test_another_gate_shares_no_real_block(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real stream's keys and values depend on the gate; without an equal gate there is no hit."""
    engine = engines.build()
    made = greedy("a", PROMPT, 4)
    run(engine, [made])
    with monkeypatch.context() as patch:
        patch.setattr(Request, "gate_key", ("only", "alpha"))
        assert cached(run(engine, [made])["a"]) == 0
        assert cached(run(engine, [made])["a"]) == 44
    assert cached(run(engine, [made])["a"]) == 44


def test_switched_off(engines: Engines) -> None:
    """Nothing outlives a request; the choices of one still share their prompt."""
    engine = engines.build(prefix_cache=False)
    made = Request("a", PROMPT, SamplingParams(max_tokens=5, n=3, seed=1, ignore_eos=True))
    for _ in range(2):
        result = run(engine, [made])
        assert [cached(result[("a", i)]) for i in range(3)] == [0, 44, 44]


def test_a_scaling_pass_alone_takes_no_part(engines: Engines) -> None:
    """It has no real stream to share, and every row of its text is asked for."""
    engine = engines.build()
    look = Request("look", PROMPT, None, **ALL)
    expected = engines.tiny.as_stored().oracle().scalings(PROMPT)
    for _ in range(2):
        result = run(engine, [look])["look"]
        assert cached(result) == 0
        np.testing.assert_allclose(result.full, expected, atol=1e-5, rtol=0)
        run(engine, [greedy("a", PROMPT, 2)])
    assert cached(run(engine, [greedy("a", PROMPT, 2)])["a"]) == 44


def test_the_longest_unused_text_is_forgotten(engines: Engines) -> None:
    """A small pool keeps what was used last; the end of a text goes before its beginning."""
    engine = engines.build(blocks=32, max_model_len=32)
    texts = {name: words(90 + i, 13) for i, name in enumerate("abc")}  # 2 * 3 full blocks each
    for name in "abca":
        run(engine, [greedy(name, texts[name], 1)])
    run(engine, [greedy("filler", words(99, 31), 1)])  # 16 blocks; 14 contained nothing
    left = {name: len(find(engine._scheduler, texts[name])) for name in "abc"}
    assert left == {"a": 3, "b": 2, "c": 3}
    run(engine, [greedy("filler", words(98, 31), 1)])
    left = {name: len(find(engine._scheduler, texts[name])) for name in "abc"}
    assert left["b"] == 0
    assert left["a"] > left["c"]


def find(scheduler: Scheduler, tokens: list[int]) -> list[int]:
    """Blocks of the scaling stream that a request of these tokens would find."""
    sequence = Sequence.of(greedy("probe", tokens, 1), 0, 0.0)
    scheduler.add(sequence)
    scaling, real = scheduler._find_prefix(sequence)
    scheduler.remove(sequence)
    assert len(scaling) == len(real)
    return scaling


def test_preempted_sequences_find_their_own_blocks(engines: Engines) -> None:
    """What a preemption has set back is found again as far as it lasts, and everything comes out as it would alone."""
    requests = [
        Request(f"{i}", words(60 + i, 8 + i), SamplingParams(max_tokens=24, seed=i, ignore_eos=True), **ALL)
        for i in range(6)
    ]
    rows = {}
    for prefix_cache in (True, False):
        engine = engines.build(
            max_model_len=64, blocks=40, prefix_cache=prefix_cache, speculative_tokens=0, draft_depth=1
        )
        for made in requests:
            same(run(engine, [made])[made.id], run(engines.build(prefix_cache=False), [made])[made.id])
        result = run(engine, requests)
        assert result.preemptions > 0
        assert_observed_once(result, requests, 3)
        for made in requests:
            same(result[made.id], run(engines.build(prefix_cache=False), [made])[made.id])
        rows[prefix_cache] = sum(step.stats.real_rows for step in result.steps)
    assert rows[True] < rows[False]


def test_held_and_kept_blocks_are_told_apart(engines: Engines) -> None:
    """Blocks that are only kept are free: they count neither as used nor against admission."""
    engine = engines.build(blocks=32, max_model_len=64)
    for i in range(6):
        result = run(engine, [greedy(str(i), words(i, 50), 14)])
        assert result[str(i)].finish_reason == "length"
        assert result.steps[-1].stats.kv_blocks_used == 0
        assert engine.blocks.free == 32
        assert len(engine.blocks._free) < 32, "nothing was kept: the test shows little"


@pytest.mark.parametrize("cached_too_early", [False, True])
def test_drafts_are_never_cached(engines: Engines, cached_too_early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong draft's block is overwritten with the right token: under the draft's key it would be another's text.
    Negative control: caching the drafts as well instead of what was accepted is seen.
    """
    wrong: list[list[int]] = []
    cut, commit = Sequence._drop_drafts, Scheduler.commit

    def record(self: Sequence, place: int) -> None:
        wrong.extend([[*self.tokens, *self.drafts[: end + 1]] for end in range(place, len(self.drafts))])
        cut(self, place)

    def commit_drafts_too(self: Scheduler, sequence: Sequence) -> None:
        stream, text = sequence.scaling, [*sequence.tokens, *sequence.drafts]
        self._cache_blocks(stream, text, stream.computed)
        stream.cached, stream.keys = 0, []
        commit(self, sequence)

    monkeypatch.setattr(Sequence, "_drop_drafts", record)
    if cached_too_early:
        monkeypatch.setattr(Scheduler, "commit", commit_drafts_too)
    engine = engines.build(block_size=1, adaptive=False)
    prompt = [5, 6, 7, 8] * 4
    result = run(engine, [greedy("a", prompt, 40), sampled("b", prompt, 40)])
    said = [prompt + choice.tokens for choice in result.choices.values()]
    wrong = [text for text in wrong if all(text != one[: len(text)] for one in said)]  # some were right after all
    assert len(wrong) > 20, "hardly a draft was wrong: the test shows little"
    found = [longest_found(engine._scheduler, text) >= len(text) for text in wrong]
    assert any(found) == cached_too_early


def longest_found(scheduler: Scheduler, tokens: list[int]) -> int:
    """Blocks of either stream that are cached for a text, in the stream that has more."""
    sequence = Sequence.of(greedy("probe", tokens, 1), 0, 0.0)
    scheduler.add(sequence)
    scheduler.remove(sequence)
    lengths = []
    for stream in (sequence.scaling, sequence.real):
        scheduler._keys.extend(stream.keys, stream.root, tokens, len(tokens) // scheduler.blocks.block_size)
        lengths.append(len(scheduler.blocks.find(stream.keys)))
    return max(lengths)
