"""XLora over a fake engine: any number of prompts from any thread or loop, and every way to an end."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from service import XLora
from service.client.engine_client import EngineClient
from service.contract.errors import (
    EngineLostError,
    InvalidRequestError,
    RequestError,
    SettingsError,
    StartupError,
    UnavailableError,
)
from service.contract.output import StepStats
from service.library import session
from tests.library.conftest import FAKE, SLOW
from tests.support.fake_engine import EXPERTS, FAULTY, POISON, SITES, gate_row, write_bundle
from tests.support.server_process import ROOT
from tests.support.waiting import PATIENCE_SECONDS, wait_for

Open = Callable[..., XLora]


def worker_of(process: psutil.Process) -> psutil.Process:
    [worker] = [one for one in process.children() if "service.engine.worker" in " ".join(one.cmdline())]
    return worker


def watch(model: XLora) -> list[StepStats]:
    """The load that the engine reports from now on."""
    seen: list[StepStats] = []
    model._session.client.on_step = seen.append
    return seen


def test_importing_service_costs_nothing() -> None:
    """No library is loaded, and no variable is set that a notebook's own torch would find."""
    program = """
import os, sys
before = dict(os.environ), set(sys.modules)
import service
print(sorted({name.split(".")[0] for name in set(sys.modules) - before[1]}), dict(os.environ) == before[0])
service.XLora
print("torch" in sys.modules, dict(os.environ) == before[0])
"""
    # Not in the environment of the tests, which have imported it.
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["['__future__', 'service'] True", "False True"]


def test_arrays_have_the_shapes_and_numbers_of_the_rows(fake: XLora) -> None:
    mean = fake.generate("hi", max_tokens=4, scalings="mean")
    full = fake.generate([104, 105], max_tokens=4, scalings="full", scalings_start=0)
    assert (mean.text, mean.finish_reason, len(mean.token_ids)) == ("The an", "length", 4)
    assert (mean.gate.experts, mean.gate.sites, mean.gate.start) == (tuple(EXPERTS), tuple(SITES), 1)
    rows = np.stack([gate_row(position) for position in range(5)])
    np.testing.assert_allclose(mean.scalings, rows[1:].mean(axis=1), rtol=1e-6)
    np.testing.assert_array_equal(full.scalings, rows)
    assert not full.scalings.flags.writeable
    half = fake.generate("hi", max_tokens=2, scalings="full", scalings_dtype="float16")
    assert half.scalings.dtype == np.float16
    assert fake.generate("hi", max_tokens=1).scalings is None


@pytest.mark.parametrize(
    ("fields", "param", "hint"),
    [
        ({"temperatur": 1}, "temperatur", "did you mean `temperature`?"),
        ({"temperature": 9}, "temperature", None),
        ({"experts": {"only": ["maths"]}}, "experts.only", "did you mean `math`?"),
        ({"stream": True}, "stream", "leave it out"),
        ({"scalings": "mean", "return_scalings": "full"}, "scalings", "give one of them"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages", "give one of them"),
        ({"scalings": "some"}, "return_scalings", None),
    ],
)
def test_fields_are_checked_as_over_http(fake: XLora, fields: dict[str, Any], param: str, hint: str | None) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        fake.generate("hi", **fields)
    assert caught.value.param == param
    assert hint is None or hint in str(caught.value.hint)


def test_many_prompts_are_never_refused_and_pulled_as_there_is_room(open_fake: Open) -> None:
    """The server would refuse: 2 seats, and 1 may wait."""
    model = open_fake(max_num_seqs=2)
    pulled = 0

    def prompts() -> Iterator[str]:
        nonlocal pulled
        for pulled in range(1, 601):
            yield "a" * (pulled % 30 + 1)

    ahead, lengths = 0, []
    for answer in model.generate(prompts(), max_tokens=2):
        lengths.append(len(answer.prompt_token_ids))
        ahead = max(ahead, pulled - len(lengths))
    assert lengths == [number % 30 + 1 for number in range(1, 601)]
    assert 0 < ahead < 4 * 64  # four times the seats that the fake engine says it has


def test_answers_as_they_come_say_whose_they_are(fake: XLora) -> None:
    prompts = [{"prompt": "a", "max_tokens": 60}, *({"prompt": "b", "max_tokens": 1} for _ in range(5))]
    assert [answer.index for answer in fake.generate(prompts)] == list(range(6))
    found = list(fake.generate(prompts, in_order=False))
    assert found[-1].index == 0
    assert sorted(answer.index for answer in found) == list(range(6))


def test_errors_of_one_prompt_end_the_iteration_or_take_its_place(fake: XLora) -> None:
    prompts = ["a", {"prompt": "b", "top_p": 7}, [FAULTY], "c"]
    found = list(fake.generate(prompts, max_tokens=2, return_exceptions=True))
    assert [isinstance(one, RequestError) for one in found] == [False, True, True, False]
    assert found[1].param == "top_p"
    unordered = list(fake.generate(prompts, max_tokens=2, return_exceptions=True, in_order=False))
    assert sorted(one.prompt_index for one in unordered if isinstance(one, RequestError)) == [1, 2]
    table = list(XLora.rows(found, by="text"))
    assert [(row["prompt"], "error" in row) for row in table] == [(0, False), (1, True), (2, True), (3, False)]
    answers = fake.generate(prompts, max_tokens=2)
    assert next(answers).index == 0
    with pytest.raises(InvalidRequestError) as caught:
        next(answers)
    assert caught.value.__notes__ == ["this was prompt 1, counted from 0"]


@pytest.mark.parametrize("prompts", [5, None, b"a", 1.5])
def test_what_is_no_prompt_is_told_at_once(fake: XLora, prompts: Any) -> None:
    for call in (fake.generate, fake.scalings, lambda one: fake.compare(one, [{}])):
        with pytest.raises(InvalidRequestError, match="a prompt is a text, token ids or messages, and not"):
            call(prompts)
    with pytest.raises(InvalidRequestError, match=r"`messages\[0\].role` is missing"):
        fake.generate([{"content": "hi"}])
    with pytest.raises(InvalidRequestError, match="return_exceptions goes with many"):
        fake.generate("hi", return_exceptions=True)


@pytest.mark.parametrize("in_order", [True, False])
def test_a_slow_source_does_not_delay_answers(fake: XLora, in_order: bool) -> None:
    """It waits for the first prompt's answer to be read, long before the window is full."""
    handed_out = 0

    def prompts() -> Iterator[str]:
        for number in range(200):
            if number > 50:
                assert handed_out, "50 prompts were pulled, and no answer was handed out"
            threading.Event().wait(0.02)
            yield "a"

    for _ in fake.generate(prompts(), max_tokens=1, in_order=in_order):
        handed_out += 1
        if handed_out > 3:
            return


def test_answers_compare_by_identity(fake: XLora) -> None:
    answer = fake.generate("hi", max_tokens=2, scalings="full")
    again = pickle.loads(pickle.dumps(answer))
    assert answer in [again, answer]
    np.testing.assert_array_equal(again.scalings, answer.scalings)
    assert len({answer, again}) == 2


def test_threads_share_a_model(fake: XLora) -> None:
    def lengths(number: int) -> list[int]:
        return [len(one.token_ids) for one in fake.generate(["a"] * 40, max_tokens=number + 1)]

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lengths, range(8))) == [[number + 1] * 40 for number in range(8)]


def test_everything_works_beside_a_running_loop(fake: XLora) -> None:
    """As in a notebook, whose cells run in one; and the asynchronous way from the loop itself."""

    async def prompts() -> AsyncIterator[str]:
        for number in range(300):
            await asyncio.sleep(0)
            yield "a" * (number % 7 + 1)

    async def cell() -> None:
        assert fake.generate("hi", max_tokens=2).text == "The"
        found = [len(one.prompt_token_ids) async for one in fake.agenerate(prompts(), max_tokens=2)]
        assert found == [number % 7 + 1 for number in range(300)]
        mixed = [one.index async for one in fake.agenerate(["a", "b"] * 20, max_tokens=2, in_order=False)]
        assert sorted(mixed) == list(range(40))
        assert [one.text async for one in fake.agenerate("hi", max_tokens=2)] == ["The"]

    asyncio.run(cell())


def test_an_answer_does_not_wait_for_the_next_prompt_of_an_asynchronous_source(fake: XLora) -> None:
    async def test() -> None:
        answered = asyncio.Event()

        async def prompts() -> AsyncIterator[str]:
            yield "a"
            await answered.wait()
            yield "b"

        async with asyncio.timeout(PATIENCE_SECONDS):
            async for _ in fake.agenerate(prompts(), max_tokens=1):
                answered.set()

    asyncio.run(test())


@pytest.mark.parametrize("in_order", [True, False])
def test_an_abandoned_iterator_frees_what_it_had_begun(open_fake: Open, in_order: bool) -> None:
    model = open_fake(SLOW)
    load = watch(model)
    first = {"prompt": "a", "max_tokens": 1}
    answers = model.generate([first, *["a"] * 50], max_tokens=10_000, in_order=in_order)
    next(answers)
    assert wait_for(lambda: load and load[-1].requests_running > 1)
    del answers
    assert wait_for(lambda: load[-1].requests_running == 0)
    assert model.generate("hi", max_tokens=2).text == "The"


def test_an_abandoned_asynchronous_iterator_frees_what_it_had_begun(open_fake: Open) -> None:
    model = open_fake(SLOW)
    load = watch(model)

    async def test() -> None:
        answers = model.agenerate([{"prompt": "a", "max_tokens": 1}, *["a"] * 50], max_tokens=10_000)
        await anext(answers)
        await answers.aclose()  # type: ignore[attr-defined]
        while not load or load[-1].requests_running:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(test(), PATIENCE_SECONDS))


def test_an_engine_that_dies_says_so_to_all(open_fake: Open) -> None:
    model = open_fake(SLOW)
    with pytest.raises(EngineLostError, match="poisoned") as caught:
        list(model.generate(["a", [POISON], "b"], max_tokens=10_000))
    assert "make another" in str(caught.value.hint)
    with pytest.raises(EngineLostError):
        model.generate("a")


def test_a_killed_engine_says_so(open_fake: Open) -> None:
    model = open_fake(SLOW)
    threading.Timer(0.3, worker_of(psutil.Process()).kill).start()
    with pytest.raises(EngineLostError, match="SIGKILL"):
        model.generate("a", max_tokens=1_000_000)


def test_closing_ends_the_process_and_what_runs(open_fake: Open) -> None:
    model = open_fake(SLOW)
    worker = worker_of(psutil.Process())
    load = watch(model)

    def close() -> None:
        wait_for(lambda: load and load[-1].requests_running)
        model.close()

    threading.Thread(target=close).start()
    with pytest.raises(UnavailableError, match="closed"):
        model.generate("a", max_tokens=1_000_000)
    assert wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
    model.close()
    with pytest.raises(UnavailableError, match="closed"):
        model.generate("a")


def test_a_model_that_nobody_holds_ends_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "EngineClient", lambda **given: EngineClient(FAKE, **given))
    answers = XLora(str(write_bundle(tmp_path / "bundle")), progress=False).generate(["a"] * 3, max_tokens=2)
    worker = worker_of(psutil.Process())
    gc.collect()
    assert len(list(answers)) == 3  # who iterates holds it
    del answers
    gc.collect()
    assert wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)


def test_ctrl_c_frees_and_the_model_goes_on(tmp_path: Path) -> None:
    """In a process of its own, which is interrupted in the middle of answers of a million tokens."""
    program = f"""
import sys, time
from service import XLora
from service.client.engine_client import EngineClient
from service.library import session
session.EngineClient = lambda **given: EngineClient({SLOW!r}, **given)
with XLora({str(write_bundle(tmp_path / "bundle"))!r}, progress=False) as model:
    load = []
    model._session.client.on_step = load.append
    try:
        print("begun", flush=True)
        for answer in model.generate(["a"] * 20, max_tokens=1_000_000, progress=True):
            pass
    except KeyboardInterrupt:
        while load[-1].requests_running:
            time.sleep(0.01)
        print(model.generate("hi", max_tokens=2).text, flush=True)
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            worker = worker_of(psutil.Process(process.pid))
            before = sum(worker.cpu_times()[:2])
            assert wait_for(lambda: sum(worker.cpu_times()[:2]) > before + 0.05)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=PATIENCE_SECONDS)
        finally:
            process.kill()
    assert (process.returncode, out) == (0, "The\n"), err
    assert wait_for(lambda: not worker.is_running())


def test_settings_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, message in (("port", "of the HTTP server"), ("devise", "no setting"), ("device", "tpu")):
        with pytest.raises(SettingsError, match=message):
            XLora(str(tmp_path), **{name: "tpu"})
    monkeypatch.setattr(session, "EngineClient", lambda **given: EngineClient(FAKE, **given))
    with pytest.raises(StartupError, match=r"tokenizer\.json is missing"):
        XLora(str(tmp_path / "nothing"), progress=False)


def test_a_table_has_a_row_per_token_or_text(fake: XLora, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = list(fake.generate(["hi", "you"], max_tokens=3, n=2, scalings="mean", scalings_start=0, logprobs=0))
    table = list(XLora.rows(answers))
    assert [(row["prompt"], row["output"], row["position"]) for row in table[:4]] == [
        *((0, 0, position) for position in (2, 3, 4)),
        (0, 1, 2),
    ]
    assert "".join(row["token"] for row in table[:3]) == answers[0].text
    np.testing.assert_allclose([table[0][f"weight_{name}"] for name in EXPERTS], gate_row(1).mean(axis=0), rtol=1e-6)
    assert table[0]["logprob"] == -0.5
    texts = list(XLora.rows(answers, by="text"))
    assert [row["text"] for row in texts] == [output.text for answer in answers for output in answer.outputs]
    seen = list(XLora.rows(fake.scalings("hi!", perplexity=True)))
    assert [row["token"] for row in seen] == ["h", "i", "!"]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(StartupError, match="pandas"):
        XLora.table(answers)


def test_the_tokenizer_reads_as_prompts_are_read(fake: XLora) -> None:
    tokenizer = fake.tokenizer
    answer = fake.generate([{"role": "user", "content": "hi"}], max_tokens=1)
    assert answer.prompt_token_ids == tuple(tokenizer.chat([{"role": "user", "content": "hi"}]))
    assert tokenizer.decode(answer.prompt_token_ids) == "<user>hi"
    assert tokenizer.decode(tokenizer.encode("naïve 🙂")) == "naïve 🙂"
    wrong: list[Callable[[], object]] = [
        lambda: tokenizer.encode(5),  # type: ignore[arg-type]
        lambda: tokenizer.decode("abc"),  # type: ignore[arg-type]
        lambda: tokenizer.texts([10**9]),
    ]
    for call in wrong:
        with pytest.raises(InvalidRequestError):
            call()
    assert fake.chat([{"role": "user", "content": "hi"}], max_tokens=1).prompt_token_ids == answer.prompt_token_ids


def test_a_fork_can_neither_use_nor_end_its_parents_model(fake: XLora) -> None:
    child = os.fork()
    if child == 0:
        try:
            fake.close()
            fake.generate("a")
        except UnavailableError:
            os._exit(7)
        finally:
            os._exit(8)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    gc.collect()
    assert fake.generate("hi", max_tokens=2).text == "The"
