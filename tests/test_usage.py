"""Wrong words on the command line: the usage of the command at hand, what is wrong, and the right word."""

from __future__ import annotations

import pytest

from service import cli

CASES = {
    "serve --max-seqs 3": ("serve", "unknown flag --max-seqs", "did you mean --max-num-seqs?"),
    "serve --max_num_seqs 3": ("serve", "unknown flag --max_num_seqs", "did you mean --max-num-seqs?"),
    "serve --tensor-parallel-size 2": ("serve", "unknown flag --tensor-parallel-size", "mean --tensor-parallel?"),
    "serve --max-model-length 9": ("serve", "unknown flag --max-model-length", "did you mean --max-model-len?"),
    "serve --min-num-seqs 9": ("serve", "unknown flag --min-num-seqs", "xlora-serve serve --help lists the flags"),
    "serve --prefix-cache": ("serve", "unknown flag --prefix-cache", "--no-prefix-cache switches it off"),
    "serve --enable-lookahead": ("serve", "unknown flag --enable-lookahead", "--no-lookahead switches it off"),
    "serve --api-key secret": ("serve", "unknown flag --api-key", "--api-key-file"),
    "serve --gpu-memory-utilization 1": ("serve", "unknown flag --gpu-memory-utilization", "--kv-memory"),
    "serve --max-tokens 9": ("serve", "unknown flag --max-tokens", "--default-max-tokens"),
    "serve owner/model": ("serve", "unknown argument 'owner/model'", "--model owner/model"),
    "serve -p 80": ("serve", "unknown argument '-p'", "xlora-serve serve --help"),
    "serve --dtype int4": ("serve", "argument --dtype: invalid choice: 'int4'", "xlora-serve serve --help"),
    "generate --promt hi": ("generate", "unknown flag --promt", "did you mean --prompt?"),
    "generate": ("generate", "--prompt --prompts is required", "xlora-serve generate --help"),
    "check x --port 80": ("check", "unknown flag --port", "--port is a flag of serve, cluster,"),
    "convert a b --reference-bse": ("convert", "unknown flag --reference-bse", "did you mean --reference-base?"),
    "srve": ("[-h]", "unknown command 'srve'", "did you mean xlora-serve serve?"),
    "fly": ("[-h]", "unknown command 'fly'", "the commands are serve, cluster, generate"),
    "": ("[-h]", "required: COMMAND", "the commands are serve, cluster, generate"),
    "--model x serve": ("[-h]", "unknown flag --model", "--model is a flag of serve"),
    "--verson": ("[-h]", "unknown flag --verson", "did you mean --version?"),
}


@pytest.mark.parametrize(("line", "wanted"), CASES.items(), ids=str)
def test_a_wrong_word(line: str, wanted: tuple[str, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    command, problem, hint = wanted
    with pytest.raises(SystemExit) as exit:
        cli.main(line.split())
    assert exit.value.code == 2
    *usage, error, hinted = capsys.readouterr().err.splitlines()
    assert usage[0].startswith(f"usage: xlora-serve {command} ")
    assert error.startswith("error: ")
    assert problem in error
    assert hinted.startswith("hint: ")
    assert hint in hinted


@pytest.mark.parametrize("words", [["--prompt", "-- is no flag"], ["--prompt=--speed"], ["--prompt=-1"]])
def test_a_value_is_no_flag(words: list[str]) -> None:
    assert vars(cli.build_parser().parse_args(["generate", *words, "--stop=--x"]))["stop"] == ["--x"]


def test_no_flag_of_others_is_one_of_ours_that_its_hint_does_not_know() -> None:
    """Every flag that the hints name exists."""
    commands = cli.build_parser().commands()  # type: ignore[attr-defined]
    known = {flag for parser in commands.values() for flag in parser._option_string_actions}
    for hint in commands["serve"].flags_of_others.values():
        assert {word.strip(";,()?") for word in hint.split() if word.strip("(").startswith("--")} <= known
