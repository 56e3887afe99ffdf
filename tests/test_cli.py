"""The command line: flags, exit codes, errors of one line, and the serve command as a process."""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import get_args

import numpy as np
import psutil
import pytest
from pydantic import SecretStr
from rich.console import Console

from service import cli
from service.client.engine_client import EngineClient
from service.commands import generate, local, scalings, serve
from service.contract.errors import SettingsError
from service.settings import Settings, load_settings
from service.terminal import bar, expert_styles, legend, scalings_table
from tests.support.fake_engine import EXPERTS, POISON, REPLY, gate_row, write_bundle
from tests.support.server_process import ROOT, free_port
from tests.support.waiting import PATIENCE_SECONDS, wait_for

FAKE = "tests.support.fake_engine:load_engine"
SERVER = [sys.executable, "-m", "tests.support.fake_server", "serve"]


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(local, "EngineClient", lambda: EngineClient(FAKE))
    return write_bundle(tmp_path / "bundle")


def start_server(*flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen([*SERVER, *flags], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz") as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


def wait_until_ready(port: int) -> None:
    assert wait_for(lambda: is_ready(port))


def without(closed: str, *command: str) -> list[str]:
    """A command that is started without some of its standard streams."""
    return ["sh", "-c", f'exec "$@" {closed}', "sh", *command]


@pytest.mark.parametrize("closed", ["1>&-", "0<&- 1>&- 2>&-"])
def test_no_file_or_socket_becomes_a_standard_stream(bundle: Path, closed: str) -> None:
    """Nor the engine's: what it or a library prints would go to a client."""
    port = free_port()
    command = [*SERVER, "--model", str(bundle), "--port", str(port)]
    process = subprocess.Popen(without(closed, *command), cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        wait_until_ready(port)
        children = psutil.Process(process.pid).children()
        both = [process.pid, *(child.pid for child in children if "service.engine.worker" in child.cmdline())]
        assert len(both) == 2
        for pid in both:
            for number in (int(one[0]) for one in closed.split()):
                assert os.readlink(f"/proc/{pid}/fd/{number}") == os.devnull
    finally:
        process.terminate()
        assert process.wait(PATIENCE_SECONDS) == 0


@pytest.mark.parametrize(
    ("closed", "arguments", "code"),
    [("1>&-", ["--version"], 0), ("0<&- 1>&- 2>&-", ["check", "nowhere/at-all"], 1)],
)
def test_commands_without_standard_streams_end_as_ever(closed: str, arguments: list[str], code: int) -> None:
    command = without(closed, sys.executable, "-m", "service", *arguments)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def test_every_setting_is_a_flag_of_serve_and_none_is_given_by_default() -> None:
    arguments = cli.build_parser().parse_args(["serve"])
    secrets = {name for name, field in Settings.model_fields.items() if SecretStr in get_args(field.annotation)}
    assert secrets == {"api_keys", "admin_keys"}  # variables only: a command line can be read by everybody
    assert set(vars(arguments)) >= set(Settings.model_fields) - secrets
    assert set(cli.given_settings(arguments).values()) == {None}
    given = cli.given_settings(cli.build_parser().parse_args(["serve", "--no-lookahead", "--kv-memory", "1GiB"]))
    assert (given["lookahead"], given["kv_memory"]) == (False, "1GiB")


@pytest.mark.parametrize("argv", [[], ["fly"], ["serve", "--speed", "9"], ["generate"], ["serve", "--dtype", "int4"]])
def test_wrong_usage_is_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(argv)
    assert exit.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_a_setting_out_of_range_is_one_line_and_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--kv-memory", "lots"]) == 1
    error = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in error] == ["error", "hint"]
    assert "--kv-memory" in error[0]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--compile"], "--compile was removed: native kernels"),
        (["--compile-cache", "/tmp"], "--compile-cache was removed: use --native-cache"),
        (["--compile-cache=/tmp", "--port", "0"], "--compile-cache was removed: use --native-cache"),
    ],
)
def test_a_flag_that_was_removed_is_one_line_and_not_in_the_help(
    capsys: pytest.CaptureFixture[str], flags: list[str], told: str
) -> None:
    assert cli.main(["serve", *flags]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {told}")
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    shown = capsys.readouterr().out
    assert "--native-cache" in shown
    assert "--compile" not in shown


@pytest.mark.parametrize("command", [["cluster"], ["generate", "--prompt", "a"], ["scalings", "--prompt", "a"]])
def test_every_command_that_had_a_flag_says_that_it_was_removed(command: list[str]) -> None:
    arguments = cli.build_parser().parse_args([*command, "--compile"])
    with pytest.raises(SettingsError, match="--compile was removed"):
        load_settings(cli.given_settings(arguments))


def test_generate_prints_the_text(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--max-tokens", "60", "--stop", "END", "--temperature", "0"]
    assert cli.main(["generate", "--model", str(bundle), "--prompt", "hi", *flags]) == 0
    assert capfd.readouterr().out == REPLY[: REPLY.index("END")] + "\n"


def test_generate_with_scalings_ends_with_a_legend_where_there_are_colours(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert cli.main(["generate", "--model", str(bundle), "--prompt", "hi", "--max-tokens", "4", "--scalings"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines] == ["The an", "■ math  ■ code  ■ tales"]
    assert "\x1b[" in lines[0]


@pytest.mark.parametrize("no_color", [False, True])
def test_without_colours_generate_lists_the_weights_after_the_text(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], no_color: bool
) -> None:
    """In a pipe as under NO_COLOR: consecutive tokens with the same leader share a line, and their mean weights."""
    if no_color:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("NO_COLOR", "1")
    flags = ["--prompt", "hi", "--max-tokens", "14", "--scalings"]
    assert cli.main(["generate", "--model", str(bundle), *flags]) == 0
    text, blank, header, *spans = re.sub(r"\x1b\[[0-9;]*m", "", capfd.readouterr().out).splitlines()
    assert (text, blank) == ("The answer is 42", "")
    assert header.split() == ["tokens", *EXPERTS, "text"]
    rows = np.stack([gate_row(position).mean(axis=0) for position in range(1, 15)])  # from the prompt's last token on
    leaders = [int(row.argmax()) if row.any() else None for row in rows]
    groups = [list(group) for _, group in itertools.groupby(range(14), key=leaders.__getitem__)]
    assert len(groups) > 3
    assert None in leaders
    written = ""
    for line, group in zip(spans, groups, strict=True):
        count, *weights, token_texts = line.split(maxsplit=4)
        assert int(count) == len(group)
        assert [float(weight) for weight in weights] == pytest.approx(rows[group].mean(axis=0), abs=0.005001)
        written += ast.literal_eval(token_texts)
    assert written == text


def test_generate_refuses_what_the_api_refuses(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--model", str(bundle), "--prompt", "hi", "--temperature", "9"]) == 1
    assert "temperature" in capfd.readouterr().err


def test_scalings_draws_a_table_and_saves_a_map(
    bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    png = tmp_path / "gate.png"
    assert cli.main(["scalings", "--model", str(bundle), "--prompt", "hi!", "--png", str(png)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split() == ["token", "math", "code", "tales", "entropy"]
    assert [line.split()[0] for line in lines[1:]] == ["h", "i", "!"]
    assert png.read_bytes().startswith(b"\x89PNG")


def test_scalings_without_matplotlib_says_what_to_install(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["scalings", "--model", str(bundle), "--prompt", "hi", "--png", "a.png"]) == 1
    assert "[plot]" in capfd.readouterr().err


def test_a_missing_bundle_is_one_line(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--model", str(bundle / "nothing"), "--prompt", "hi"]) == 1
    assert capfd.readouterr().err.splitlines()[-1].startswith("hint:")


def test_serve_answers_and_ends_well_on_sigterm(bundle: Path) -> None:
    port = free_port()
    process = start_server("--model", str(bundle), "--port", str(port))
    try:
        wait_until_ready(port)
        body = json.dumps({"prompt": "hi", "max_tokens": 3}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/generate", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            assert json.load(response)["outputs"][0]["text"] == "The a"
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, log
    assert "Traceback" not in log
    assert "reading the fake bundle" in log


def test_a_killed_server_leaves_no_engine_and_the_same_command_serves_again(bundle: Path) -> None:
    port = free_port()
    for _ in range(2):
        process = start_server("--model", str(bundle), "--port", str(port))
        try:
            wait_until_ready(port)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as response:
                assert json.load(response)["data"][0]["id"] == "fake"
            children = psutil.Process(process.pid).children()
            assert children
        finally:
            process.kill()
            process.communicate()
        assert wait_for(lambda children=children: not any(map(_runs, children))), "the engine's process is still there"


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_an_engine_that_raises_ends_the_server_with_3(bundle: Path) -> None:
    port = free_port()
    process = start_server("--model", str(bundle), "--port", str(port))
    try:
        wait_until_ready(port)
        body = json.dumps({"prompt": [POISON], "max_tokens": 3}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/generate", body, {"Content-Type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request)
        assert json.load(caught.value)["error"]["code"] == "engine_dead"
        _, log = process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 3, log
    assert log.splitlines()[-2].startswith("error: the engine is lost: the engine failed: RuntimeError")


def test_ctrl_c_is_130_without_a_traceback(bundle: Path) -> None:
    port = free_port()
    process = start_server("--model", str(bundle), "--port", str(port))
    try:
        wait_until_ready(port)
        process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 130, log
    assert "Traceback" not in log


def test_a_second_sigterm_ends_a_drain(bundle: Path) -> None:
    """Of which there would be two hours. What becomes of requests then: e2e/test_lifecycle.py, with Ctrl-C."""
    port = free_port()
    hours = ("--drain-delay", "3600", "--drain-seconds", "3600")
    process = start_server("--model", str(bundle), "--port", str(port), *hours)
    try:
        wait_until_ready(port)
        process.send_signal(signal.SIGTERM)
        assert wait_for(lambda: not is_ready(port))
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, log


def test_a_model_that_cannot_be_loaded_ends_the_server_with_one_error(bundle: Path) -> None:
    (bundle / "tokenizer.json").unlink()
    process = start_server("--model", str(bundle), "--port", "0")
    _, log = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 1
    assert "listening on" in log  # what only the engine can find is found while the probes answer
    assert sum("tokenizer.json" in line for line in log.splitlines()) == 1
    assert "Traceback" not in log


def test_terminal_pieces() -> None:
    assert (bar(0.0).strip(), bar(1.0), len(bar(0.3))) == ("", "█" * 8, 8)
    styles = expert_styles(12)
    assert len(set(styles)) == 12
    assert legend(["a", "b"], styles[:2]).plain == "■ a  ■ b"
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    mean = np.array([[0.75, 0.25], [0.0, 0.0]], np.float32)
    console.print(scalings_table(["[bold]", "\n"], ["a", "b"], mean, np.array([0.56, np.nan], np.float32)))
    console.file.close()
    text = console.export_text()
    assert "[bold]" in text
    assert "0.75" in text
    assert "nan" not in text


def test_modules_of_commands_have_a_run() -> None:
    assert all(callable(module.run) for module in (generate, scalings, serve))


def test_check_prints_a_memory_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "model_store/demo", "--plan", "--gpu-memory", "1GiB", "--max-num-seqs", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "memory       cuda, bfloat16; the GPU has 1.00 GiB" in lines
    assert lines[-1].endswith("2 requests of 8,192 tokens at once (--max-num-seqs 2)")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--plan", "--gpu-memory", "80GBB"], "error: --gpu-memory: '80GBB' is not a size"),
        (["--plan", "--gpu-memory", "2MiB"], "error: the weights need"),
        (["--plan", "--gpu-memory", "1GiB", "--device", "cpu"], "error: --gpu-memory does not go with --device cpu"),
        (["--gpu-memory", "1GiB"], "error: --gpu-memory needs --plan"),
        (["--verify", "--block-size", "8"], "error: --block-size needs --plan"),
        (["--quantization", "int8"], "error: --quantization needs --plan or --verify"),
        (["--plan", "--kv-memory", "1MiB"], "error: one request of 1024 tokens needs"),
    ],
)
def test_a_plan_that_cannot_be_is_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "model_store/demo", *flags]) == 1
    assert capsys.readouterr().err.startswith(message)


def test_cluster_without_ray_says_what_to_install() -> None:
    program = """
import sys
sys.modules["ray"] = None  # as if it were not installed
from service import cli
sys.exit(cli.main(["cluster"]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()) == (
        1,
        ["error: cluster needs Ray Serve", "hint: pip install 'xlora-service[ray]'"],
    )
