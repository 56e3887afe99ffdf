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
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from service.checkpoint import Checkpoint, load_checkpoint
from service.checkpoint.formats.writer import add_drafts
from service.cli import main
from service.contract.errors import StartupError
from service.contract.options import EngineOptions
from service.tools.distill import Distilled, _written, distill, suitable_size
from service.tools.two_pass import TwoPassModel
from tests.model.loading.test_families import FAMILIES, build
from tests.support.bundles import make_bundle, make_draft_head
from tests.support.driver import Engines, greedy, run, sampled, words
from tests.support.tiny import CPU, Tiny, Variant

FIXTURES = Path(__file__).parents[1] / "checkpoint" / "fixtures"


DEMO = Path(__file__).parents[2] / "model_store" / "demo"
FILE = "draft_head/draft_head.safetensors"


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
    """Of a third of the steps: it agrees almost as often as one of all."""
    options = EngineOptions(str(DEMO), device="cpu", dtype="float32", max_model_len=512)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("service.tools.distill._STEPS", 500)
        return distill(demo, options, prompts[::4], max_tokens=32)


def test_agreement_rises(made: Distilled, prompts: list[list[int]]) -> None:
    assert made.before > 0.7
    assert made.after > made.before + 0.05
    assert made.positions > 0.6 * sum(map(len, prompts[::4]))
    assert 100 < made.judged < made.positions / 5
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


def test_the_figures_are_those_of_the_two_passes(demo: Checkpoint, made: Distilled, prompts: list[list[int]]) -> None:
    """Recomputed on the very texts: every 20th and the next one, from the last token of the prompt on."""
    options = EngineOptions(str(DEMO), device="cpu", dtype="float32", max_model_len=512)
    texts = _written(demo, options, prompts[::4], 32, lambda _: None)
    base = AutoModelForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32)
    plain = TwoPassModel(demo, device=CPU, dtype=torch.float32)
    right: dict[bool, list[bool]] = {False: [], True: []}
    up, bias, down = (part.float() for part in (made.weights.up, made.weights.bias, made.weights.down))
    for text in (text for number, text in enumerate(texts) if number % 20 in (0, 1)):
        real = plain.forward(text.tokens)[0].argmax(-1)
        with torch.no_grad():
            hidden = base.model(torch.tensor([text.tokens])).last_hidden_state[0]
            drafting = hidden + F.silu(hidden @ up.T + bias) @ down.T
            for with_head, state in ((False, hidden), (True, drafting)):
                agree = base.lm_head(state).argmax(-1) == real
                right[with_head] += agree[text.prompt - 1 : -1].tolist()
    assert len(right[False]) == made.judged
    assert made.before == pytest.approx(sum(right[False]) / made.judged, abs=0.005)
    assert made.after == pytest.approx(sum(right[True]) / made.judged, abs=0.005)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt2", "gemma2", "granite"])
def test_the_head_of_other_families(tmp_path: Path, family: str) -> None:
    """What they ask of their decoders besides hidden states, and what they do to logits."""
    path = build(tmp_path / family, family, **FAMILIES[family])
    plain = TwoPassModel(load_checkpoint(path), device=CPU, dtype=torch.float32)
    tokens = words(4, 9)
    hidden = plain.scaling_pass(tokens)
    expected = plain.causal_lm(input_ids=torch.tensor([tokens])).logits[0]  # the gate is still the dummy row's
    torch.testing.assert_close(plain.head(hidden), expected, atol=1e-4, rtol=0)


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


def test_the_command_writes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And lets it be when the next one is no better."""
    bundle, texts = shutil.copytree(DEMO, tmp_path / "bundle"), tmp_path / "prompts"
    before = json.loads((bundle / "bundle.json").read_text())
    del before["draft_head"], before["sha256"][FILE]
    (bundle / "bundle.json").write_text(json.dumps(before))
    examples = json.loads((DEMO / "examples.json").read_text())
    texts.write_text("".join(json.dumps({"prompt": example["prompt"]}) + "\n" for example in examples))
    monkeypatch.setattr("service.tools.distill._STEPS", 200)
    command = ["distill", str(bundle), "--prompts", str(texts), "--max-tokens", "40", "--size", "16", "--device", "cpu"]
    assert main(command) == 0
    found = r"16 wide, learned from [\d,]+ positions; on [\d,]+ others, .* 0\.\d+ -> 0\.\d+"
    assert re.search(found, capsys.readouterr().out)
    checkpoint = load_checkpoint(bundle)
    assert checkpoint.draft_head is not None
    assert checkpoint.draft_head.size == 16
    assert all(file.verified for file in checkpoint.weight_files)
    content = (bundle / "bundle.json").read_bytes()
    monkeypatch.setattr("service.tools.distill._LEARNING_RATE", 0.0)
    assert main(command) == 1
    assert "nothing written" in capsys.readouterr().out
    assert (bundle / "bundle.json").read_bytes() == content


def test_writing_changes_nothing_else(bundle: Path) -> None:
    before = json.loads((bundle / "bundle.json").read_text())
    for size in (16, 8):
        add_drafts(bundle, make_draft_head(32, size, torch.Generator().manual_seed(size)), None)
        draft_head = load_checkpoint(bundle).draft_head
        assert draft_head is not None
        assert draft_head.size == size
    after = json.loads((bundle / "bundle.json").read_text())
    assert after.pop("draft_head") == "draft_head"
    del after["sha256"][FILE]
    assert after == before
    assert [path.name for path in (bundle / "draft_head").iterdir()] == ["draft_head.safetensors"]
    for path in (bundle / "bundle.json", bundle / FILE):
        assert path.stat().st_mode & 0o777 == 0o644
    (bundle / "bundle.json").write_text(json.dumps({**before, "sha256": None}))
    add_drafts(bundle, make_draft_head(32, 4, torch.Generator()), None)
    assert json.loads((bundle / "bundle.json").read_text())["sha256"].keys() == {FILE}


def test_nothing_is_written_where_it_does_not_help(
    bundle: Path, texts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.tools.distill._LEARNING_RATE", 0.0)
    monkeypatch.setattr("service.tools.distill._STEPS", 100)
    assert main(["distill", str(bundle), "--prompts", str(texts), "--max-tokens", "4", "--device", "cpu"]) == 1
    assert "nothing written" in capsys.readouterr().out
    assert not (bundle / "draft_head").exists()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("few.txt", "one\ntwo\n\n", "2 prompts are too few to learn from"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "line 2: expected an object with a text"),
        ("p.jsonl", '{"prompt": ""}\n', "line 1: expected an object with a text"),
        ("p.jsonl", '{"prompt": "a"}\n[1, 2\n', "line 2: expected an object with a text"),
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


@pytest.mark.parametrize(("prompt", "reason"), [([5, 10**6], "token id 1000000"), ([], "the prompt is empty")])
def test_prompts_that_the_model_cannot_read(path: Path, prompt: list[int], reason: str) -> None:
    """An added token beyond the vocabulary; a text that a normalizer leaves nothing of."""
    options = EngineOptions(str(path), device="cpu", native_kernels=False)
    with pytest.raises(StartupError, match=f"prompt 2: .*{reason}"):
        _written(load_checkpoint(path), options, [[5, 6], prompt], 4, lambda _: None)


def test_only_a_bundle_can_have_one(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = FIXTURES / "peft-0.19.1" / "depth2"
    command = ["distill", str(source), "--prompts", str(texts), "--device", "cpu", "--base", str(FIXTURES / "base")]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "only a bundle can have a draft head" in said
    assert "xlora-serve convert" in said
