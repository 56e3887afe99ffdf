"""`xlora-serve distill`: a head that drafts better on texts it has not seen, and changes no token."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from service.checkpoint import Checkpoint, load_checkpoint
from service.cli import main
from service.engine.distill import Distilled, distill, suitable_size
from service.engine.options import EngineOptions
from service.model.two_pass import TwoPassModel
from tests.bundles import make_bundle
from tests.engine.driver import Engines, greedy, run, sampled, words
from tests.model.tiny import CPU, Tiny, Variant

FIXTURES = Path(__file__).parents[1] / "checkpoint" / "fixtures"


DEMO = Path(__file__).parents[2] / "model_store" / "demo"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    xlora = {"xlora_depth": 2, "layerwise_scalings": True}
    return make_bundle(tmp_path_factory.mktemp("distill") / "tiny", xlora=xlora, strength=0.3)


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    """As it would be without its own draft head."""
    return replace(load_checkpoint(DEMO), draft_head=None)


@pytest.fixture(scope="module")
def prompts(demo: Checkpoint) -> list[list[int]]:
    """Two questions each, the first one answered."""
    tokenizer = Tokenizer.from_file(str(demo.tokenizer_path))
    examples = json.loads((DEMO / "examples.json").read_text())
    pairs = itertools.product(examples[::2], examples[:16])
    return [tokenizer.encode(f"{a['prompt']}{a['answer']}\n{b['prompt']}").ids for a, b in pairs]


@pytest.fixture(scope="module")
def made(demo: Checkpoint, prompts: list[list[int]]) -> Distilled:
    options = EngineOptions(str(DEMO), device="cpu", dtype="float32", max_model_len=512)
    return distill(demo, options, prompts[::4], max_tokens=32)


def test_agreement_rises(made: Distilled, prompts: list[list[int]]) -> None:
    assert made.before > 0.7
    assert made.after > made.before + 0.05
    assert made.positions + made.held_out > sum(map(len, prompts[::4]))
    assert made.positions > 5 * made.held_out
    assert made.weights.up.shape == (64, 192)


def test_it_is_what_requests_see(demo: Checkpoint, made: Distilled, prompts: list[list[int]]) -> None:
    """More drafts are kept on prompts that it has not learned from; tokens and scalings stay."""
    requests = [
        replace((greedy if i % 2 else sampled)(f"r{i}", prompt, 32), return_scalings="full")
        for i, prompt in enumerate(prompts[2::40])
    ]
    engines = [
        Engines(Variant(Tiny(DEMO), replace(demo, draft_head=head))).build(adaptive=False)
        for head in (None, made.weights)
    ]
    assert [engine.info.draft_head for engine in engines] == [None, 64]
    runs = [run(engine, requests) for engine in engines]
    for key, choice in runs[0].choices.items():
        assert runs[1][key].tokens == choice.tokens
        np.testing.assert_allclose(runs[1][key].full, choice.full, atol=1e-4)
    kept = [[sum(kind) for kind in zip(*(one.drafts for one in run.choices.values()), strict=True)] for run in runs]
    rates = [hits / (hits + misses) for hits, misses in kept]
    assert rates[1] > rates[0] + 0.03


def test_the_agreement_before_is_that_of_the_two_passes(
    demo: Checkpoint, made: Distilled, prompts: list[list[int]]
) -> None:
    """Recomputed over some of the prompts: within what other texts and the written rest explain."""
    plain = TwoPassModel(demo, device=CPU, dtype=torch.float32)
    right = total = 0
    for prompt in prompts[::16]:
        real = plain.forward(prompt)[0].argmax(-1)
        base = AutoModelForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32)
        right += int((base(torch.tensor([prompt])).logits[0].argmax(-1) == real).sum())
        total += len(prompt)
    assert made.before == pytest.approx(right / total, abs=0.06)


def test_the_head_of_the_plain_computation_is_the_models(path: Path) -> None:
    plain = TwoPassModel(load_checkpoint(path), device=CPU, dtype=torch.float32)
    tokens = words(4, 9)
    hidden = plain.scaling_pass(tokens)
    base = AutoModelForCausalLM.from_pretrained(path / "base", dtype=torch.float32)
    torch.testing.assert_close(plain.head(hidden), base(torch.tensor([tokens])).logits[0], atol=1e-5, rtol=0)
    state = hidden.clone().requires_grad_()
    plain.head(state).sum().backward()  # type: ignore[no-untyped-call]
    assert state.grad is not None
    assert state.grad.abs().sum() > 0


def test_a_width_that_suits() -> None:
    assert [suitable_size(hidden) for hidden in (32, 192, 768, 4096)] == [32, 64, 96, 512]


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(path, tmp_path / "bundle"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"the quick brown fox {i} jumps\n over {i * 7} dogs"}) for i in range(60)]
    file.write_text("\n".join([*lines, ""]))
    return file


def test_the_command_writes_it_and_replaces_it(bundle: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["distill", str(bundle), "--prompts", str(texts), "--max-tokens", "16", "--device", "cpu"]
    before = json.loads((bundle / "bundle.json").read_text())
    for size in (16, 8):
        assert main([*command, "--size", str(size)]) == 0
        said = capsys.readouterr().out
        assert re.search(
            rf"{size} wide, from [\d,]+ positions: agreement on [\d,]+ positions .* 0\.\d+ -> 0\.\d+", said
        )
        checkpoint = load_checkpoint(bundle)
        assert checkpoint.draft_head is not None
        assert checkpoint.draft_head.size == size
        assert all(file.verified for file in checkpoint.weight_files)
    after = json.loads((bundle / "bundle.json").read_text())
    added = after["sha256"].keys() - before["sha256"].keys()
    assert added == {"draft_head/draft_head.safetensors"}
    assert {key: after[key] for key in before if key != "sha256"} == {
        key: before[key] for key in before if key != "sha256"
    }
    assert (bundle / "draft_head/draft_head.safetensors").stat().st_mode & 0o044 == 0o044


def test_nothing_is_written_where_it_does_not_help(
    bundle: Path, texts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.engine.distill._LEARNING_RATE", 0.0)
    content = (bundle / "bundle.json").read_bytes()
    assert main(["distill", str(bundle), "--prompts", str(texts), "--max-tokens", "4", "--device", "cpu"]) == 1
    assert "nothing written" in capsys.readouterr().out
    assert (bundle / "bundle.json").read_bytes() == content
    assert not (bundle / "draft_head").exists()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("few.txt", "one\ntwo\n\n", "2 prompts are too few to learn from"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "line 2: expected an object with a text"),
        ("p.jsonl", '{"prompt": ""}\n', "line 1: expected an object with a text"),
        ("p.jsonl", "[1, 2\n", "line 1: expected an object with a text"),
        ("p.txt", b"\xff\xfe\x00", "can't decode"),
        ("absent.txt", None, "No such file"),
    ],
)
def test_prompts_that_cannot_be_used(
    bundle: Path,
    tmp_path: Path,
    name: str,
    content: str | bytes | None,
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["distill", str(bundle), "--prompts", str(file), "--device", "cpu"]) == 1
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") <= 2


def test_prompts_that_are_too_long(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "p.txt"
    file.write_text("word " * 5000 + "\n" + "short\n" * 30)
    assert main(["distill", str(bundle), "--prompts", str(file), "--device", "cpu"]) == 1
    assert "prompt 1 has 25000 tokens" in capsys.readouterr().err


def test_only_a_bundle_can_have_one(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = FIXTURES / "peft-0.19.1" / "depth2"
    command = ["distill", str(source), "--prompts", str(texts), "--device", "cpu", "--base", str(FIXTURES / "base")]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "only a bundle can have a draft head" in said
    assert "xlora-serve convert" in said
