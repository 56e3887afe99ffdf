"""The scheduler and the engine's bookkeeping without a model: a fake runner whose "KV memory" holds token ids.

The fake computes nothing; it checks. Every row must find, in the slots its stream's block table names, exactly the
tokens of the positions before it, as a real model must find their keys. The next token is a hash of all tokens before
it, so a wrong history shows as another token.
"""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.contract.output import StepStats, TokenOutput
from service.contract.request import Request, SamplingParams
from service.contract.steering import Steering
from service.engine.block_manager import BlockManager
from service.engine.engine import Engine
from service.engine.launched_step import SequenceResult
from service.engine.plan import ScheduledSequence
from service.engine.scheduler import Scheduler
from service.engine.sequence import Sequence, Stream
from service.engine.speculation.costs import StepCost
from service.engine.speculation.drafters import ANY_TOKEN

VOCABULARY = 50


def next_token(request: Request, index: int, tokens: list[int]) -> int:
    """What the model would sample: a function of the whole history, or with the id "loop..." of its last tokens only,
    so that the text repeats itself. Deviates from the loop now and then.
    """
    if request.id.startswith("loop") and zlib.crc32(repr(tokens).encode()) % 8:
        return (tokens[-1] + 1) % 5
    return zlib.crc32(repr((request.id, index, tokens)).encode()) % VOCABULARY


@dataclass
class FakeRunner:
    """Stands for ModelRunner and GateReporter; `right` of 4 predictions of the scaling pass are right."""

    block_size: int
    budget: int
    right: int = 2
    overlapped_rows: int = 0
    slots: dict[int, tuple[str, int]] = field(default_factory=dict)  # slot -> (stream, token)
    gate: dict[int, list[int]] = field(default_factory=dict)  # slot -> the history its gate row was computed on
    logs_scalings: bool = False
    steps: list[list[ScheduledSequence]] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)  # rows run on drafts, by step

    def launch(self, launched: Any, *, keep_gate_logits: bool = False) -> Any:
        """The runner's with what is scheduled, the reporter's with what the runner has launched."""
        return launched if isinstance(launched, SimpleNamespace) else self._launch(launched)

    def _launch(self, scheduled: list[ScheduledSequence]) -> SimpleNamespace:
        assert scheduled, "a step without rows"
        assert 0 < sum(share.rows for share in scheduled) <= self.budget
        assert len({id(share.sequence) for share in scheduled}) == len(scheduled)
        self.steps.append([replace(share) for share in scheduled])
        self.drafted.append(sum(self._write(share) for share in scheduled))
        results = [
            SequenceResult(share, self._tokens(share), predictions, deeper=self._deeper(share, predictions))
            for share in scheduled
            for predictions in [self._predictions(share)]
        ]
        scores = {id(share): self._scores(share) for share in scheduled}
        copies = SimpleNamespace(close=lambda: None)
        return SimpleNamespace(results=results, copies=copies, read_logprobs=dict, read_scores=lambda: scores)

    def collect(self, launched: SimpleNamespace) -> list[SequenceResult]:
        results: list[SequenceResult] = launched.results
        return results

    def keep_final(self, launched: SimpleNamespace, ended: list[Sequence]) -> list[None]:
        """Looks at every gate row that would be reported."""
        for result in launched.results:
            sequence = result.scheduled.sequence
            if sequence.dropped:
                continue
            for position in range(sequence.reported, sequence.final if sequence.generates else 0):
                self._check_gate(sequence, position, sequence.tokens)
            sequence.reported = max(sequence.reported, sequence.final)
        return []

    def report(self, readings: list[None], stats: StepStats) -> dict[int, None]:
        """Nobody asks for rows."""
        return {}

    def log(self, launched: SimpleNamespace, results: list[SequenceResult]) -> None:
        """There is no log."""

    def drop(self, sequence: Sequence) -> None:
        """Nothing is ever left."""

    def flush(self, stats: StepStats, *, everything: bool) -> None:
        """There are no statistics."""

    def _slot(self, stream: Stream, position: int) -> int:
        return stream.blocks[position // self.block_size] * self.block_size + position % self.block_size

    def _check_gate(self, sequence: Sequence, position: int, text: list[int]) -> None:
        position = max(0, min(position, sequence.gate_end - 1))
        found = self.gate.get(self._slot(sequence.real, position))
        assert found == text[: position + 1], "a gate row that was computed on other tokens"

    def _write(self, share: ScheduledSequence) -> int:
        """Writes the share's rows, then reads each stream back from the start. Returns the rows run on drafts."""
        sequence = share.sequence
        known, text = len(sequence.tokens), [*sequence.tokens, *sequence.drafts]
        assert len(sequence.drafts) == len(sequence.drafters)
        assert share.rows > 0
        assert share.scaling_count >= 0
        assert share.real_count >= 0
        assert (share.scaling_start, share.real_start) == (sequence.scaling.computed, sequence.real.computed)
        assert share.scaling_end <= min(len(text), sequence.gate_end)
        frozen = share.scaling_start >= sequence.gate_end
        assert share.real_end <= (len(text) if frozen else share.scaling_start), "a real row without scalings"
        ended = frozen and known >= sequence.gate_end
        rows = [("real", sequence.real, share.real_start, share.real_end)] if sequence.generates else []
        if not ended:
            rows.append(("scaling", sequence.scaling, share.scaling_start, share.scaling_end))
        if sequence.request.has_fixed_gate and share.real_start == 0:
            self.gate[self._slot(sequence.real, 0)] = text[:1]
        for position in range(share.real_start, share.real_end):
            self._check_gate(sequence, position, text)
        for name, stream, start, end in rows:
            self.slots.update({self._slot(stream, p): (name, text[p]) for p in range(start, end)})
            found = [self.slots.get(self._slot(stream, p)) for p in range(end)]
            assert found == [(name, token) for token in text[:end]], "the slots do not hold the stream's tokens"
        if sequence.generates:
            for position in range(share.scaling_start, share.scaling_end):
                self.gate[self._slot(sequence.real, position)] = text[: position + 1]
            last = sequence.prompt_len + sequence.sampling.max_tokens - 1
            assert len(text) <= last, "a position that nothing will follow"
        else:
            assert not share.real_count
            assert not sequence.real.blocks
        return sum(
            max(0, end - max(start, known))
            for start, end in ((share.scaling_start, share.scaling_end), (share.real_start, share.real_end))
        )

    def _tokens(self, share: ScheduledSequence) -> list[int]:
        sequence = share.sequence
        known, text = len(sequence.tokens), [*sequence.tokens, *sequence.drafts]
        assert share.samples == max(0, share.real_end - known + 1)
        return [next_token(sequence.request, sequence.index, text[: known + i]) for i in range(share.samples)]

    def _scores(self, share: ScheduledSequence) -> list[TokenOutput]:
        return [TokenOutput(share.sequence.tokens[position + 1]) for position in share.scores]

    def _predictions(self, share: ScheduledSequence) -> list[int]:
        sequence = share.sequence
        text = [*sequence.tokens, *sequence.drafts]
        positions = range(share.predict_start, share.predict_start + share.predict_count)
        if positions:
            assert share.scaling_start < positions[0] <= positions[-1] <= share.scaling_end
            assert positions[0] >= len(sequence.tokens)
        return [self._prediction(sequence, text[:position]) for position in positions]

    def _deeper(self, share: ScheduledSequence, predictions: list[int]) -> list[int]:
        """What the draft layer makes of the first prediction that differs, as the real one finds it."""
        sequence = share.sequence
        for position, (token, other) in enumerate(zip(predictions, share.expected, strict=True), share.predict_start):
            if other not in (token, ANY_TOKEN):
                text = [*[*sequence.tokens, *sequence.drafts][:position], token]
                while len(text) < position + max(1, share.draft_depth):
                    text.append(self._prediction(sequence, text))
                return text[position + 1 :]
        return []

    def _prediction(self, sequence: Sequence, text: list[int]) -> int:
        token = next_token(sequence.request, sequence.index, text)
        return token if zlib.crc32(repr(text).encode()) % 4 < self.right else (token + 1) % VOCABULARY


def build(
    *,
    blocks: int = 64,
    block_size: int = 4,
    budget: int = 32,
    slots: int = 8,
    lookahead: bool = True,
    depth: int = 1,
    speculative: int = 0,
    prefix_cache: bool = True,
    row_cost: float = 0.0,
    right: int = 2,
    length: int = 256,
    overlapped_rows: int = 0,
) -> tuple[Engine, FakeRunner, Scheduler]:
    """A real engine and scheduler around the fake runner."""
    runner: Any = FakeRunner(block_size, budget, right, overlapped_rows)
    scheduler = Scheduler(
        BlockManager(blocks, block_size),
        max_num_seqs=slots,
        max_num_batched_tokens=budget,
        lookahead=lookahead,
        draft_rates=[0.8] * depth,
        speculative_tokens=speculative,
        prefix_cache=prefix_cache,
        step_cost=StepCost.linear(row_cost, row_cost),
    )
    info: Any = SimpleNamespace(eos_token_ids=[], max_model_len=length, experts=[{}] * 2, sites=[])
    info.vocab_size = VOCABULARY
    grammars: Any = None  # nobody asks for a form of text
    return Engine(runner, runner, scheduler, info, grammars), runner, scheduler


def request(name: str, prompt: int, max_tokens: int = 8, **sampling: Any) -> Request:
    """A request with a prompt of `prompt` tokens that no other request has."""
    tokens = [zlib.crc32(f"{name} {i}".encode()) % VOCABULARY for i in range(prompt)]
    return Request(name, tokens, SamplingParams(max_tokens=max_tokens, ignore_eos=True, **sampling))


def expected(request: Request, index: int = 0) -> list[int]:
    """The tokens the request must get, whatever happens around it."""
    assert request.sampling is not None
    tokens = list(request.prompt_token_ids)
    for _ in range(request.sampling.max_tokens):
        tokens.append(next_token(request, index, tokens))
    return tokens[len(request.prompt_token_ids) :]


def finish(engine: Engine, limit: int = 3000) -> dict[tuple[str, int], list[int]]:
    """Steps until idle; returns the tokens of every choice."""
    tokens: dict[tuple[str, int], list[int]] = {}
    for _ in range(limit):
        if not engine.has_work():
            assert engine.blocks.used == 0
            return tokens
        for output in engine.step().outputs:
            tokens.setdefault((output.request_id, output.index), []).extend(token.id for token in output.tokens)
        engine.check_integrity()
    raise AssertionError("the engine does not come to an end")


@st.composite
def workloads(draw: st.DrawFn) -> dict[str, Any]:
    """Any pool that can hold the largest request, any budget, any mixture of requests and arrival times."""
    block_size = draw(st.sampled_from([1, 2, 4, 16]))
    shapes = draw(
        st.lists(
            st.tuples(
                st.integers(1, 30), st.integers(1, 24), st.integers(1, 3), st.booleans(), st.integers(0, 12),
                st.booleans(), st.one_of(st.none(), st.integers(1, 12)), st.sampled_from(["", "salt"]),
                st.sampled_from([None, Steering(only=(1,)), Steering(weights=())]),
            ),
            min_size=1,
            max_size=7,
        )
    )  # fmt: skip
    largest = max(2 * -(-(prompt + output) // block_size) for prompt, output, *_ in shapes)
    return {
        "shapes": shapes,
        "block_size": block_size,
        "blocks": largest + draw(st.integers(0, 2 * largest)),
        "budget": draw(st.integers(1, 40)),
        "slots": draw(st.integers(1, 8)),
        "lookahead": draw(st.booleans()),
        "right": draw(st.integers(0, 4)),
        "depth": draw(st.sampled_from([1, 1, 2, 5])),
        "overlapped_rows": draw(st.sampled_from([0, 4, 12, 40])),
        "speculative": draw(st.sampled_from([0, 1, 3, 8])),
        "prefix_cache": draw(st.booleans()),
        "row_cost": draw(st.sampled_from([0.0, 0.05, 0.5])),
        "aborts": draw(st.lists(st.tuples(st.integers(0, 25), st.integers(0, 6)), max_size=3)),
    }


@settings(max_examples=200, deadline=None, derandomize=True)
@given(workloads())
def test_any_workload(load: dict[str, Any]) -> None:
    """Everyone gets the tokens of a request alone, in a bounded number of steps, and every block comes back."""
    engine, _runner, scheduler = build(**{name: load[name] for name in load if name not in ("shapes", "aborts")})
    requests, arrivals = [], {}
    for number, (prompt, output, n, generates, arrival, loops, freeze, salt, steering) in enumerate(load["shapes"]):
        made = replace(request(f"{'loop' * loops}{number}", prompt, output, n=n), cache_salt=salt)
        made = replace(made, freeze_after=freeze, steering=steering) if generates else replace(made, sampling=None)
        if number % 3 == 2:  # the prompt of another, prolonged
            other = requests[number - 2].prompt_token_ids
            made = replace(made, prompt_token_ids=(other + made.prompt_token_ids)[: max(prompt, 1)])
        requests.append(made)
        arrivals.setdefault(arrival, []).append(requests[-1])
    tokens: dict[tuple[str, int], list[int]] = {}
    finished, aborted = set(), set()
    for step in range(5000):
        for made in arrivals.pop(step, ()):
            engine.add(made)
        for when, number in load["aborts"]:
            if when == step:
                for name in (str(number), f"loop{number}"):
                    engine.abort(name)
                    aborted.add(name)
        engine.check_integrity()
        if not engine.has_work():
            if not arrivals:
                break
            continue
        for output in engine.step().outputs:
            key = (output.request_id, output.index)
            assert key not in finished
            tokens.setdefault(key, []).extend(token.id for token in output.tokens)
            if output.finish_reason:
                finished.add(key)
        engine.check_integrity()
        assert len(scheduler.running) <= load["slots"]
    else:
        raise AssertionError("the engine does not come to an end")
    assert engine.blocks.used == 0
    for made in requests:
        for index in range(made.sampling.n if made.sampling else 1):
            if (made.id, index) in finished:
                assert tokens.get((made.id, index), []) == (expected(made, index) if made.sampling else [])
            else:
                assert made.id in aborted


@pytest.mark.parametrize("lookahead", [True, False])
@pytest.mark.parametrize("right", [0, 2, 4])
def test_forward_passes(lookahead: bool, right: int) -> None:
    """Two passes per token less one for every draft that was right; rows and outcomes add up."""
    engine, runner, _ = build(lookahead=lookahead, right=right)
    engine.add(request("a", 10, 20))
    usage = None
    while engine.has_work():
        for output in engine.step().outputs:
            usage = output.usage or usage
    assert usage is not None
    assert usage.forward_passes == len(runner.steps)
    drafts = 19 if lookahead else 0  # every token but the last may be drafted
    assert usage.drafts.hits + usage.drafts.misses == drafts
    assert usage.forward_passes == 2 * 20 - usage.drafts.hits
    assert usage.real_rows == 10 + 19
    assert usage.scaling_rows == 10 + 19 + usage.drafts.misses
    assert usage.drafts.hits == {0: 0, 4: drafts}.get(right, usage.drafts.hits)


def test_forward_passes_with_a_draft_layer() -> None:
    """Everything right: `depth` tokens a step once the streams are a step apart. Everything wrong: two passes a token,
    as without, and every draft has cost a row.
    """
    for depth in (1, 2, 4):
        for right, passes in ((4, 1 + -(-39 // depth) + 1), (0, 80)):
            engine, runner, _ = build(depth=depth, right=right)
            engine.add(request("a", 10, 40))
            assert finish(engine) == {("a", 0): expected(request("a", 10, 40))}
            assert len(runner.steps) == passes, (depth, right)


@pytest.mark.parametrize("wrong", range(7))
@pytest.mark.parametrize("by", ["real pass", "scaling pass"])
def test_a_draft_that_is_wrong_at_any_depth(wrong: int, by: str) -> None:
    """Of seven drafts, all before the wrong one are kept in both streams, all behind it are dropped from both. The
    scaling pass finds it a step before the real one, unless it thinks the same.
    """
    engine, runner, scheduler = build(depth=7, right=4, block_size=2)
    made = request("a", 5, 40)
    engine.add(made)
    engine.step()
    [sequence] = scheduler.running
    true = expected(made)
    assert sequence.drafts == true[:7]
    sequence.drafts[wrong] = other = (true[wrong] + 1) % VOCABULARY
    if by == "real pass":  # the scaling pass is as wrong
        honest = runner._prediction
        runner._prediction = lambda one, text: other if len(text) == 5 + wrong else honest(one, text)  # type: ignore[method-assign]
    before = len(runner.steps)
    assert finish(engine)[("a", 0)] == true
    dropped = [0] * wrong + [1] * (7 - wrong)
    if by == "real pass" and wrong:  # a step later, which had rows of seven more
        dropped = [each + 1 for each in dropped]
    assert sequence.usage.drafts.lookahead_dropped == dropped
    assert len(runner.steps) - before <= 40 // 7 + 5


def test_chunked_prefill_respects_the_budget() -> None:
    """A prompt longer than the budget takes several steps, its real rows follow its scaling rows, none is computed
    twice.
    """
    engine, runner, _ = build(budget=8, lookahead=False)
    engine.add(request("a", 30, 1))
    finish(engine)
    [shares] = zip(*runner.steps, strict=True)
    assert [p for s in shares for p in range(s.scaling_start, s.scaling_start + s.scaling_count)] == list(range(30))
    assert [p for s in shares for p in range(s.real_start, s.real_start + s.real_count)] == list(range(30))
    assert [share.rows for share in shares] == [8] * 6 + [6, 6]


def test_decode_goes_before_prefill() -> None:
    """A long prompt must not hold up those who are already generating."""
    engine, runner, _ = build(budget=6, lookahead=True, right=4)
    engine.add(request("decoding", 4, 30))
    for _ in range(4):
        engine.step()
    engine.add(request("prefilling", 60, 4))
    before = len(runner.steps)
    for _ in range(8):
        engine.step()
    for plan in runner.steps[before:]:
        first, *rest = plan
        assert first.sequence.request.id == "decoding"
        assert first.samples
        assert [share.sequence.request.id for share in rest] == ["prefilling"]
        assert sum(share.rows for share in plan) == 6


def test_drafts_of_one_leave_rows_for_the_others() -> None:
    """Everyone decodes in every step, however many drafts the first would like to try."""
    engine, runner, scheduler = build(budget=14, blocks=400, speculative=8, right=4)
    for i in range(4):
        engine.add(request(f"loop{i}", 8, 60))
    while not all(sequence.output_len for sequence in scheduler.running) or len(scheduler.running) < 4:
        engine.step()
    before = len(runner.steps)
    while len(scheduler.running) == 4:
        engine.step()
    steps = runner.steps[before:-1]
    assert all(len(plan) == 4 for plan in steps)
    assert max(share.rows for plan in steps for share in plan) > 4, "no one drafted: the test shows little"


@pytest.mark.parametrize("options", [{"depth": 8}, {"speculative": 16}], ids=["layer", "lookup"])
def test_drafts_leave_rows_for_a_prompt(options: dict[str, int]) -> None:
    """However many drafts pay, a prompt that arrives is run beside them, and does not wait for answers to end."""
    engine, runner, scheduler = build(budget=24, blocks=800, right=4, length=1024, **options)
    for i in range(2):
        engine.add(request(f"loop{i}", 8, 400))
    while max(runner.drafted[-1:], default=0) < 12:
        engine.step()
    engine.add(request("prompt", 40, 4))
    before = len(runner.steps)
    while not any(one.request.id == "prompt" and one.output_len for one in scheduler.running):
        engine.step()
    assert len(runner.steps) - before <= 12
    assert max(runner.drafted[before:]) > 2, "nobody drafts meanwhile"
    assert len(finish(engine)) == 3


def test_decoders_do_not_chop_a_prompt_that_fits() -> None:
    """A new prompt within the budget takes two steps, whoever decodes: equal parts of the budget would take many."""
    engine, runner, scheduler = build(budget=40, blocks=400)
    for i in range(3):
        engine.add(request(str(i), 8, 60))
    while not all(sequence.output_len for sequence in scheduler.running) or len(scheduler.running) < 3:
        engine.step()
    engine.add(request("long", 30, 2))
    before = len(runner.steps)
    engine.step()
    engine.step()
    counts = [[(s.scaling_count, s.real_count) for s in plan][-1] for plan in runner.steps[before:]]
    assert counts[0] == (30, 0)
    assert counts[1][1] == 30


def test_few_pass_a_large_one() -> None:
    """Small late requests may pass a large one that waits for blocks, but under load it must not wait for ever."""
    engine, _, scheduler = build(blocks=39, block_size=4, lookahead=False)
    engine.add(request("first", 20, 40))
    engine.step()
    engine.add(request("large", 60, 8))
    passed: list[str] = []
    for number in range(200):
        engine.add(request(f"small {number}", 1, 2))
        engine.step()
        names = [sequence.request.id for sequence in scheduler.running]
        if "large" in names:
            break
        passed += [name for name in names if name not in (*passed, "first")]
    assert len(passed) == 16, "it was its turn before the next"
    assert ("large", 0) in finish(engine)


def test_seats_are_bounded() -> None:
    """No more sequences at once than asked for; choices of one request count each."""
    engine, _, scheduler = build(slots=3, blocks=200)
    for number in range(4):
        engine.add(request(str(number), 5, 6, n=2))
    most = 0
    while engine.has_work():
        engine.step()
        most = max(most, len(scheduler.running))
    assert most == 3


def test_nothing_is_reserved_for_an_answer_to_come() -> None:
    """Four that might each fill the whole pool begin at once; those that end early never disturb anybody."""
    engine, _, scheduler = build(blocks=64, block_size=4, slots=4, budget=64)
    made = [request(str(number), 5, 123, stop_token_ids=(expected(request(str(number), 5))[7],)) for number in range(4)]
    for one in made:
        engine.add(one)
    engine.step()
    assert len(scheduler.running) == 4
    ended, preemptions = 0, 0
    while engine.has_work():
        output = engine.step()
        ended += sum(piece.finish_reason == "stop" for piece in output.outputs)
        preemptions += output.stats.preemptions
    assert (ended, preemptions) == (4, 0)


def test_the_latest_is_preempted() -> None:
    """The earliest keeps its blocks; the victim starts again with the tokens it has and gets the same ones."""
    engine, _runner, scheduler = build(blocks=20, block_size=2, lookahead=False)
    early, late = request("early", 8, 12), request("late", 8, 12)
    for made in (early, late):
        engine.add(made)
    preempted = []
    tokens: dict[str, list[int]] = {"early": [], "late": []}
    while engine.has_work():
        output = engine.step()
        for piece in output.outputs:
            tokens[piece.request_id] += [token.id for token in piece.tokens]
        if output.stats.preemptions:
            preempted += [sequence.request.id for sequence in scheduler.waiting]
            assert all(not s.scaling.blocks and not s.real.blocks and not s.drafts for s in scheduler.waiting)
        engine.check_integrity()
    assert preempted
    assert set(preempted) == {"late"}
    assert tokens == {"early": expected(early), "late": expected(late)}


def test_followers_wait_for_the_prompt_and_share_it() -> None:
    """n choices compute their prompt once: the full blocks of both streams are shared, the last position is each
    one's own.
    """
    engine, _runner, scheduler = build(block_size=4, budget=16, blocks=100)
    made = request("n", 14, 6, n=3)
    engine.add(made)
    while scheduler.running == [] or scheduler.running[0].real.computed < 14:
        assert len(scheduler.running) <= 1, "a follower does not compute the prompt on its own"
        engine.step()
    engine.step()
    leader, *followers = scheduler.running
    assert len(followers) == 2
    for follower in followers:
        assert follower.usage.cached_tokens == 12
        for own, first in ((follower.scaling, leader.scaling), (follower.real, leader.real)):
            assert own.blocks[:3] == first.blocks[:3]
            assert not set(own.blocks[3:]) & set(first.blocks[3:])
    assert finish(engine).keys() == {("n", 0), ("n", 1), ("n", 2)}


def test_others_pass_followers_that_wait() -> None:
    """A request behind n choices that wait for their leader starts at once."""
    engine, runner, _ = build(budget=40, blocks=200)
    engine.add(request("n", 30, 4, n=3))
    engine.add(request("behind", 3, 4))
    engine.step()
    assert [(s.sequence.request.id, s.sequence.index) for s in runner.steps[0]] == [("n", 0), ("behind", 0)]


@pytest.mark.parametrize("max_tokens", [1, 2, 3])
def test_no_draft_past_max_tokens(max_tokens: int) -> None:
    """The last token needs no scalings: a draft for it would cost a row, and a block that was never reserved."""
    engine, runner, _ = build(right=4, block_size=1, blocks=2 * (5 + max_tokens))
    engine.add(request("a", 5, max_tokens))
    finish(engine)
    assert sum(runner.drafted) == max_tokens - 1
    assert max(s.scaling_start + s.scaling_count for plan in runner.steps for s in plan) == 5 + max_tokens - 1


def test_scaling_pass_alone_holds_one_stream() -> None:
    """It needs no real rows and no real blocks: a text as long as the pool can be looked at."""
    engine, runner, _ = build(blocks=10, block_size=4, budget=16)
    engine.add(replace(request("look", 40), sampling=None))
    finish(engine)
    assert [share.scaling_count for plan in runner.steps for share in plan] == [16, 16, 8]
    assert not any(share.predict_count or share.samples for plan in runner.steps for share in plan)


def test_the_fake_sees_defects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a draft that is kept although it was wrong, or a block taken from another, does not go
    unseen.
    """
    cut = Sequence._drop_drafts

    def keep_what_was_computed(self: Sequence, place: int) -> None:
        computed = self.scaling.computed
        cut(self, place)
        self.scaling.computed = computed

    engine, _, _ = build(right=0)
    engine.add(request("a", 5))
    with monkeypatch.context() as patch:
        patch.setattr(Sequence, "_drop_drafts", keep_what_was_computed)
        with pytest.raises(AssertionError):
            finish(engine)
    engine, _runner, scheduler = build()
    engine.add(request("a", 5))
    engine.add(request("b", 5))
    for _ in range(3):
        engine.step()
    first, second = scheduler.running
    second.real.blocks[0] = first.real.blocks[0]
    with pytest.raises((AssertionError, RuntimeError)):
        finish(engine)


def test_sequence_keeps_its_tokens_when_rewound() -> None:
    """Preemption forgets what was computed, never what was said."""
    sequence = Sequence.of(request("a", 3), 0, 0.0)
    sequence.accept(7)
    sequence.scaling.computed, sequence.real.computed = 4, 3
    sequence.draft([9], sequence.lookahead)
    assert sequence.drafts == [9]
    sequence.rewind()
    assert (sequence.scaling.computed, sequence.real.computed, sequence.drafts) == (0, 0, [])
    assert sequence.tokens[-1] == 7
    assert sequence.output_len == 1
    assert sequence.output_counts == {7: 1}


def test_random_workloads_reach_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards test_any_workload: such loads do hit the cache, evict, preempt, keep and drop drafts of both kinds."""
    seen: Counter[str] = Counter()
    evict = BlockManager._evict

    def count_evictions(self: BlockManager) -> int:
        seen["evicted"] += 1
        return evict(self)

    monkeypatch.setattr(BlockManager, "_evict", count_evictions)
    for number in range(6):
        engine, runner, _ = build(
            blocks=40 + 30 * (number % 2), block_size=2, budget=24, speculative=8, row_cost=0.05, depth=1 + number % 3
        )
        for i in range(6):
            made = request(f"{'loop' * (i % 2)}{i}", 6 + i, 12, n=1 + i % 2)
            engine.add(replace(made, freeze_after=4 if i == number else None))
        while engine.has_work():
            step = engine.step()
            seen["preemptions"] += step.stats.preemptions
            for output in step.outputs:
                if output.finish_reason and output.usage:
                    seen["cached"] += output.usage.cached_tokens
                    seen["hits"] += output.usage.drafts.hits
                    seen["misses"] += output.usage.drafts.misses
                    seen["deep hits"] += sum(output.usage.drafts.lookahead_kept[1:])
                    seen["deep misses"] += sum(output.usage.drafts.lookahead_dropped[1:])
                    seen["accepted"] += output.usage.drafts.accepted
                    seen["rejected"] += output.usage.drafts.speculated - output.usage.drafts.accepted
        seen["several tokens"] += sum(share.samples > 2 for plan in runner.steps for share in plan)
    assert all(seen[what] > 0 for what in ("cached", "hits", "misses", "accepted", "rejected")), seen
    assert all(seen[what] > 0 for what in ("deep hits", "deep misses", "preemptions", "several tokens", "evicted")), (
        seen
    )
