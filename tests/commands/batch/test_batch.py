"""Files of prompts: every line once in the output, whatever happens on the way."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service import cli
from service.client.engine_client import EngineClient
from service.commands import local
from tests.support.fake_engine import EXPERTS, POISON, gate_row, write_bundle
from tests.support.server_process import ROOT
from tests.support.waiting import PATIENCE_SECONDS, wait_for

FAKE, SLOW = "tests.support.fake_engine:load_engine", "tests.support.fake_engine:load_slow_engine"


class Files:
    """A bundle, a file of prompts and one of answers."""

    def __init__(self, folder: Path) -> None:
        self.bundle = write_bundle(folder / "bundle")
        self.prompts = folder / "prompts.jsonl"
        self.output = folder / "answers.jsonl"

    def write(self, *lines: object) -> None:
        self.prompts.write_text("".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in lines))

    def run(self, *flags: str, command: str = "generate", output: Path | None = None) -> int:
        names = ["--prompts", str(self.prompts), "--output", str(output or self.output), "--model", str(self.bundle)]
        return cli.main([command, *names, *flags])

    def answers(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_text().splitlines()]

    def texts(self) -> dict[object, str]:
        return {one["id"]: one["outputs"][0]["text"] for one in self.answers() if "outputs" in one}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.setattr(local, "EngineClient", lambda: EngineClient(FAKE))
    return Files(tmp_path)


def test_lines_are_answered_with_their_ids(files: Files, capfd: pytest.CaptureFixture[str]) -> None:
    files.write(
        {"id": "a", "prompt": "hi"},
        {"prompt": [40, 41], "max_tokens": 4, "return_scalings": "mean"},
        "",
        {"id": 9, "messages": [{"role": "user", "content": "hi"}]},
    )
    assert files.run("--max-tokens", "2") == 0
    assert files.texts() == {"a": "The", 2: "The an", 9: "The"}
    second = next(one for one in files.answers() if one["id"] == 2)
    mean = second["outputs"][0]["scalings"]["mean"]
    np.testing.assert_allclose(mean, [gate_row(place).mean(axis=0) for place in range(1, 5)], rtol=1e-6)
    before = files.output.read_bytes()
    assert files.run("--max-tokens", "2") == 0
    assert files.output.read_bytes() == before
    assert "all 3 prompts are answered already" in capfd.readouterr().err


def test_errors_stand_in_their_lines_and_are_tried_again(files: Files, capfd: pytest.CaptureFixture[str]) -> None:
    files.write({"id": "good", "prompt": "hi"}, {"id": "bad", "prompt": "hi", "temperature": 9}, {"id": 3, "prompt": 5})
    assert files.run("--max-tokens", "2") == 1
    errors = {one["id"]: one["error"] for one in files.answers() if "error" in one}
    assert {id: error["param"] for id, error in errors.items()} == {"bad": "temperature", 3: "prompt"}
    assert "2 of 3 prompts have failed" in capfd.readouterr().err
    files.write({"id": "good", "prompt": "hi"}, {"id": "bad", "prompt": "hi"}, {"id": 3, "prompt": "5"})
    assert files.run("--max-tokens", "2") == 0
    assert sorted(map(str, (one["id"] for one in files.answers()))) == ["3", "bad", "good"]
    assert len(files.texts()) == 3


def test_odd_names_in_a_line_are_its_error_alone(files: Files) -> None:
    """A lone surrogate, which JSON can say and orjson cannot read; the second run reads it back."""
    files.write(
        {"id": 1, "prompt": "hi", "\ud800": 1},
        {"id": 2, "prompt": "hi"},
        {"id": 3, "prompt": "hi", "experts": {"only": ["\ud800"]}},
        {"id": 4, "prompt": "hi", "seed": "\ud800"},
    )
    for _ in range(2):
        assert files.run("--max-tokens", "2") == 1
        assert files.texts() == {2: "The"}
        assert {one["id"] for one in files.answers() if "error" in one} == {1, 3, 4}


def test_a_pipe_is_told_to_be_no_file(files: Files, capfd: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(files.prompts)
    assert files.run() == 1
    assert "is not a regular file" in capfd.readouterr().err
    files.prompts.unlink()
    files.write({"prompt": "hi"})
    assert files.run(output=Path("/dev/full")) == 1
    assert "is not a regular file" in capfd.readouterr().err


@pytest.mark.parametrize("end", ['{"id": 2, "outp', '{"id": 2, "error": {}}\n', '{"id": 1, "outputs": []}\n'])
def test_what_is_no_answer_is_dropped(files: Files, end: str) -> None:
    """The beginning of a line, an error, and an answer that is there already; also before an answer."""
    files.write({"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    first, third = (json.dumps({"id": id, "outputs": [{"text": "kept"}]}) + "\n" for id in (1, 3))
    for there in (first + end, first + end + third if end.endswith("\n") else first):
        files.output.write_text(there)
        assert files.run("--max-tokens", "2") == 0
        assert files.texts() == {1: "kept", 2: "The", 3: "kept" if third in there else "The"}
        assert len(files.answers()) == 3


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (['{"prompt": "a"}', "{nonsense"], "line 2: it is no JSON"),
        (['{"prompt": NaN}'], "line 1: it is no JSON: NaN"),
        (['{"prompt": "a"}', "[1]"], "line 2: it is no JSON object"),
        (['{"id": "2"}', '{"prompt": "a"}'], "line 2: its id 2 is that of line 1 already"),
        (['{"id": [1]}'], "line 1: its id is [1]"),
        (['{"custom_id": "a"}', '{"id": "b"}'], "line 2: 'custom_id' is in some lines"),
        ([""], "has no prompts"),
        (['{"id": "\\ud800"}'], "has a lone surrogate"),
        ([f'{{"id": {1 << 70}}}'], "line 1: its id has more than 64 bits"),
    ],
)
def test_a_wrong_file_of_prompts_is_one_line(
    files: Files, lines: Sequence[str], told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    files.write(*lines)
    assert files.run() == 1
    assert told in capfd.readouterr().err.splitlines()[0]
    assert not files.output.exists()


def test_another_files_output_is_left_alone(files: Files, capfd: pytest.CaptureFixture[str]) -> None:
    files.write({"id": "a", "prompt": "hi"})
    for content, told in (
        ('{"id": "b", "outputs": []}\n', "line 1 has the id 'b'"),
        ("a diary\n", "line 1 is no JSON"),
        ('{"text": 1}\n', "line 1 has no 'id'"),
        ('{"id": "a", "prompt": "hi"}\n', "line 1 has neither an answer"),
        ('{"id": "a", "tokens": [], "usage": {}}\n', "line 1 has neither an answer"),  # of the command scalings
    ):
        files.output.write_text(content)
        assert files.run() == 1
        assert told in capfd.readouterr().err
        assert files.output.read_text() == content
    files.output.write_text("")
    with files.output.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert files.run() == 1
    assert "another process is writing" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["generate", "--prompts", "a"], "--prompts needs --output"),
        (["generate", "--prompt", "a", "--output", "b"], "--output does not go with --prompt"),
        (["generate", "--prompt", "a", "--scalings", "full"], "--scalings full needs --prompts"),
        (["generate", "--prompts", "a", "--output", "a"], "--output and --prompts name the same file"),
        (["scalings", "--prompts", "a", "--output", "b", "--png", "c"], "--png does not go with --prompts"),
        (["scalings", "--prompt", "a", "--scalings", "mean"], "--scalings does not go with --prompt"),
    ],
)
def test_flags_that_nothing_would_look_at(flags: list[str], told: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(flags) == 1
    assert told in capfd.readouterr().err


def test_openai_batch_files(files: Files, capfd: pytest.CaptureFixture[str]) -> None:
    def line(id: str, url: str, **body: Any) -> dict[str, Any]:
        return {"custom_id": id, "method": "POST", "url": url, "body": {"max_tokens": 2, **body}}

    files.write(
        line("chat", "/v1/chat/completions", messages=[{"role": "user", "content": "hi"}]),
        line("text", "/v1/completions", prompt=["a", "b"], xlora={"return_scalings": "mean"}),
        line("none", "/v1/embeddings", input="a"),
        line("bad", "/v1/completions", prompt="a", model="other"),
        line("stream", "/v1/completions", prompt="a", stream=True),
    )
    assert files.run() == 1
    found = {one["custom_id"]: one for one in files.answers()}
    assert all(one["error"] is None and one["id"].startswith("batch_req-") for one in found.values())
    status = {id: one["response"]["status_code"] for id, one in found.items()}
    assert status == {"chat": 200, "text": 200, "none": 404, "bad": 404, "stream": 400}
    assert found["chat"]["response"]["body"]["choices"][0]["message"]["content"] == "The"
    assert [one["text"] for one in found["text"]["response"]["body"]["choices"]] == ["The", "The"]
    assert found["bad"]["response"]["body"]["error"]["code"] == "model_not_found"
    assert files.run() == 1
    assert len(files.answers()) == 5
    assert files.run("--temperature", "0") == 1
    assert "sampling flags" in capfd.readouterr().err


def test_scalings_as_lines_and_as_arrays(files: Files, tmp_path: Path) -> None:
    files.write({"id": "a", "prompt": "hi!"}, {"id": "b/c", "prompt": "you", "return_scalings": "full"})
    assert files.run(command="scalings") == 0
    lines = {one["id"]: one["scalings"] for one in files.answers()}
    npz = tmp_path / "scalings.npz"
    assert files.run(command="scalings", output=npz) == 0
    rows = np.stack([gate_row(place) for place in range(3)])
    with np.load(npz) as arrays:
        assert arrays["experts"].tolist() == EXPERTS
        np.testing.assert_allclose(arrays["scalings/a"], rows.mean(axis=1), rtol=1e-6)
        np.testing.assert_array_equal(arrays["scalings/b/c"], rows)
        np.testing.assert_allclose(lines["a"]["mean"], arrays["scalings/a"], rtol=1e-6)
        assert arrays["token_ids/a"].shape == (3,)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "bundle", "prompts.jsonl", npz.name]


def test_a_npz_grows_and_keeps_what_it_has(files: Files, tmp_path: Path) -> None:
    npz = tmp_path / "scalings.npz"
    files.write({"id": "a", "prompt": "hi!"}, {"id": "b", "prompt": "hi!", "perplexity": True})
    assert files.run(command="scalings", output=npz) == 1
    files.write(*({"id": id, "prompt": "hi!"} for id in "abc"))
    assert files.run("--scalings", "full", command="scalings", output=npz) == 0
    with np.load(npz) as arrays:
        assert [arrays[f"scalings/{id}"].ndim for id in "abc"] == [2, 3, 3]
    assert files.run(command="scalings", output=npz) == 0
    assert not npz.with_name("scalings.npz.part.jsonl").exists()


def test_a_lost_engine_ends_the_run_and_no_line_is_blamed(files: Files) -> None:
    files.write({"id": "poison", "prompt": [POISON]}, {"id": "a", "prompt": "hi"})
    assert files.run("--max-tokens", "2") == 3
    assert "error" not in files.output.read_text()


@pytest.mark.parametrize(
    ("end", "code"), [(signal.SIGKILL, -9), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_killed_in_the_middle_it_goes_on_without_a_loss_or_a_repetition(
    tmp_path: Path, end: signal.Signals, code: int
) -> None:
    """Several times, each after some more lines; the last run is let alone."""
    files = Files(tmp_path)
    files.write(*({"id": f"id-{number}", "prompt": "a" * (number % 20 + 1)} for number in range(400)))
    program = f"""
import sys
from service import cli
from service.client.engine_client import EngineClient
from service.commands import local
local.EngineClient = lambda: EngineClient({SLOW!r})
sys.exit(cli.main(sys.argv[1:]))
"""
    flags = ["--prompts", str(files.prompts), "--output", str(files.output), "--model", str(files.bundle)]
    command = [sys.executable, "-c", program, "generate", *flags, "--max-tokens", "20"]

    def lines() -> int:
        return files.output.read_bytes().count(b"\n") if files.output.exists() else 0

    for _ in range(2):
        before = lines()
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as process:
            try:
                assert wait_for(lambda before=before: lines() > before + 20)
                process.send_signal(end)
                process.communicate(timeout=PATIENCE_SECONDS)
            finally:
                process.kill()
        assert process.returncode == code
        assert 0 < lines() < 400
    subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL, check=True, timeout=PATIENCE_SECONDS * 4)
    assert sorted(one["id"] for one in files.answers()) == sorted(f"id-{number}" for number in range(400))
    assert len({one["outputs"][0]["text"] for one in files.answers()}) == 1
