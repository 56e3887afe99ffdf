"""`xlora-serve distill`: drafts that come true more often on texts they have not seen, and change no token."""

from __future__ import annotations

import errno
import itertools
import json
import re
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from service.checkpoint import Checkpoint, load_checkpoint
from service.checkpoint.formats import writer
from service.checkpoint.formats.writer import add_drafts
from service.cli import main
from service.contract.errors import StartupError
from service.contract.options import EngineOptions
from service.tools.distill import Distilled, Plan, distill, training
from service.tools.distill.plan import suitable_head_size, suitable_layer_size
from service.tools.distill.work_folder import Text, WorkFolder
from service.tools.distill.writing import write_texts
from service.tools.two_pass import TwoPassModel
from tests.model.loading.test_families import FAMILIES, build
from tests.support.bundles import make_bundle, make_draft_head, make_draft_layer
from tests.support.drafting import ScalingPass
from tests.support.driver import Engines, greedy, run, sampled, words
from tests.support.tiny import CPU, Tiny, Variant

FIXTURES = Path(__file__).parents[1] / "checkpoint" / "fixtures"


DEMO = Path(__file__).parents[2] / "model_store" / "demo"
FILE = "draft_head/draft_head.safetensors"
LAYER_FILE = "draft_head/draft_layer.safetensors"
# Enough for the demo to learn something in.
SMALL = Plan(max_tokens=32, depth=3, layer_size=64, steps=80)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    xlora = {"xlora_depth": 2, "layerwise_scalings": True}
    return make_bundle(tmp_path_factory.mktemp("distill") / "tiny", xlora=xlora, strength=0.3)


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    """As it would be without its own drafts."""
    return replace(load_checkpoint(DEMO), draft_head=None, draft_layer=None)


@pytest.fixture(scope="module")
def prompts(demo: Checkpoint) -> list[list[int]]:
    """Two questions each, the first one answered."""
    tokenizer = Tokenizer.from_file(str(demo.tokenizer_path))
    examples = json.loads((DEMO / "examples.json").read_text())
    pairs = itertools.product(examples[::2], examples[:16])
    return [tokenizer.encode(f"{a['prompt']}{a['answer']}\n{b['prompt']}").ids for a, b in pairs]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work") / "demo"


@pytest.fixture(scope="module")
def made(demo: Checkpoint, prompts: list[list[int]], work: Path) -> Distilled:
    options = EngineOptions(str(DEMO), device="cpu", dtype="float32", max_model_len=512)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_LAYER_POSITIONS", 160)
        return distill(demo, options, prompts[::8], SMALL, work)


def test_agreement_rises(made: Distilled, prompts: list[list[int]]) -> None:
    assert len(made.before) == 1
    assert made.before[0] > 0.7
    assert made.after[0] > made.before[0] + 0.05
    assert made.after == made.trained
    assert len(made.after) == 3
    assert min(made.after[1:]) > 0.4  # of a new layer: 0.0
    assert made.learned > 0.6 * sum(map(len, prompts[::8]))
    assert 100 < made.judged < made.learned / 5
    assert made.head is not None
    assert made.head.up.shape == (192, 192)
    assert made.layer is not None
    assert made.layer.agreement.tolist() == pytest.approx(made.after)
    assert made.layer.up.shape == (64, 192)


def test_it_is_what_requests_see(demo: Checkpoint, made: Distilled, prompts: list[list[int]]) -> None:
    """More drafts are kept on prompts that it has not learned from; tokens and scalings stay."""
    requests = [
        replace((greedy if i % 2 else sampled)(f"r{i}", prompt, 32), return_scalings="full")
        for i, prompt in enumerate(prompts[2::40])
    ]
    engines = [
        Engines(Variant(Tiny(DEMO), replace(demo, draft_head=head))).build(adaptive=False) for head in (None, made.head)
    ]
    assert [engine.info.draft_head for engine in engines] == [None, 192]
    runs = [run(engine, requests) for engine in engines]
    for key, choice in runs[0].choices.items():
        assert runs[1][key].tokens == choice.tokens
        np.testing.assert_allclose(runs[1][key].full, choice.full, atol=1e-4)
    kept = [[sum(kind) for kind in zip(*(one.drafts for one in run.choices.values()), strict=True)] for run in runs]
    rates = [hits / (hits + misses) for hits, misses in kept]
    assert rates[1] > rates[0] + 0.03


def test_the_figures_are_those_of_the_two_passes(demo: Checkpoint, made: Distilled, work: Path) -> None:
    """Recomputed on the very texts: every 20th and the next one, from the last token of the prompt on."""
    base = AutoModelForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32)
    plain = TwoPassModel(demo, device=CPU, dtype=torch.float32)
    assert made.head is not None
    assert made.layer is not None
    up, bias, down = (part.float() for part in (made.head.up, made.head.bias, made.head.down))
    alone: list[bool] = []
    right: list[list[bool]] = [[], [], []]
    texts = [json.loads(line) for line in (work / "texts.jsonl").read_text().splitlines()]
    for text in (text for text in texts if text["text"] % 20 in (0, 1)):
        real = plain.forward(text["tokens"])[0].argmax(-1)
        scaling_pass = ScalingPass(base, text["tokens"])
        for anchor in range(text["prompt"] - 1, len(text["tokens"]) - 1):
            hidden, *deeper = scaling_pass.states(made.layer, anchor)
            alone.append(bool(base.lm_head(hidden).argmax() == real[anchor]))
            states = [hidden + F.silu(hidden @ up.T + bias) @ down.T, *deeper]
            for ahead, state in enumerate(states[: len(text["tokens"]) - 1 - anchor]):
                right[ahead].append(bool(base.lm_head(state).argmax() == real[anchor + ahead]))
                if not right[ahead][-1]:
                    break
    assert len(alone) == made.judged
    assert made.before[0] == pytest.approx(sum(alone) / made.judged, abs=0.005)
    assert made.after == pytest.approx([sum(depth) / len(depth) for depth in right], abs=0.005)


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


def test_widths_that_suit() -> None:
    assert [suitable_head_size(hidden) for hidden in (32, 192, 768, 4096)] == [32, 192, 256, 512]
    assert [suitable_layer_size(hidden) for hidden in (32, 192, 768, 4096)] == [64, 384, 1536, 4096]


# -- the work folder -------------------------------------------------------------------------------------------------


TINY = Plan(max_tokens=4, depth=3, steps=8)


@pytest.fixture(scope="module")
def whole(path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Distilled, Path]:
    """A run that nobody kills, and its work folder."""
    work = tmp_path_factory.mktemp("work") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        return tiny_run(path, work, lambda *_: None), work


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many shards, and a state after every other step."""
    monkeypatch.setattr("service.tools.distill.lessons._SHARD_POSITIONS", 100)
    monkeypatch.setattr(training, "EVALUATE_EVERY", 2)
    monkeypatch.setattr(training, "_LAYER_POSITIONS", 64)


def tiny_run(path: Path, work: Path, on_progress: Callable[[str, int, int], None], plan: Plan = TINY) -> Distilled:
    options = EngineOptions(str(path), device="cpu", native_kernels=False)
    checkpoint = load_checkpoint(path, examine_weights=False)
    return distill(checkpoint, options, [words(seed, 9) for seed in range(40)], plan, work, on_progress)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("phase", "at"), [("writing", 11), ("reading", 17), ("training the head", 3), ("training the layer", 5)]
)
def test_a_killed_run_goes_on(path: Path, tmp_path: Path, whole: tuple[Distilled, Path], phase: str, at: int) -> None:
    """What was written, read and trained before stays, and the result is that of a run that was not killed."""

    def kill(description: str, done: int, _: int) -> None:
        if description.startswith(phase) and done == at:
            raise KeyboardInterrupt

    (expected, complete), killed = whole, tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        tiny_run(path, killed, kill)
    before = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in killed.iterdir()}
    with (killed / "texts.jsonl").open("a") as file:
        file.write('{"text": 39, "prompt": 9, "tok')  # as a kill in the middle of a line leaves it
    seen: list[tuple[str, int]] = []
    made = tiny_run(path, killed, lambda description, done, _: seen.append((description.partition(":")[0], done)))
    assert (killed / "texts.jsonl").read_bytes().startswith(before["texts.jsonl"][1])
    for name in (name for name in before if name.startswith("lessons")):
        assert (killed / name).stat().st_mtime_ns == before[name][0]
    written = [done for description, done in seen if description == "writing texts"]
    assert written[:1] == ([11] if phase == "writing" else [])
    steps = [done for description, done in seen if description == phase]
    if phase.startswith("training"):
        assert steps[0] == at  # the state is that of the step before
    assert (made.before, made.trained) == (expected.before, expected.trained)
    for name in ("head.safetensors", "layer.safetensors"):
        assert (killed / name).read_bytes() == (complete / name).read_bytes()


@pytest.mark.usefixtures("quick")
def test_another_runs_folder_is_refused(path: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    options = EngineOptions(str(path), device="cpu", native_kernels=False)
    checkpoint = load_checkpoint(path, examine_weights=False)

    def stop(_: str, done: int, __: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(StartupError, match="leaves no room for a prompt"):
        tiny_run(path, work, stop, replace(TINY, max_tokens=100_000))
    with pytest.raises(KeyboardInterrupt):
        tiny_run(path, work, stop)  # nothing was kept for the other options
    with pytest.raises(StartupError, match="made for other options"):
        tiny_run(path, work, stop, replace(TINY, depth=2))
    with pytest.raises(StartupError, match="made for other prompts"):
        distill(checkpoint, options, [words(seed, 8) for seed in range(40)], TINY, work, stop)
    other = make_bundle(tmp_path / "other", xlora={"xlora_depth": 2, "layerwise_scalings": True}, seed=7)
    with pytest.raises(StartupError, match="made for other weights"):
        tiny_run(other, work, stop)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(StartupError, match="expected a new or an empty folder"):
        tiny_run(path, tmp_path / "full", stop)
    with pytest.raises(StartupError, match="File exists"):
        tiny_run(path, tmp_path / "full" / "notes.txt", stop)
    copy = Path(shutil.copytree(path, tmp_path / "copy"))
    add_drafts(copy, make_draft_head(32, 4, torch.Generator()), None)
    with pytest.raises(KeyboardInterrupt):  # texts and lessons know nothing of a bundle's own drafts
        tiny_run(copy, work, stop)


@pytest.mark.usefixtures("quick")
def test_the_head_alone(path: Path, tmp_path: Path) -> None:
    made = tiny_run(path, tmp_path / "work", lambda *_: None, replace(TINY, depth=1))
    assert made.layer is None
    assert len(made.trained) == 1
    assert not (tmp_path / "work" / "layer.safetensors").exists()


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
    del before["draft_head"], before["sha256"][FILE], before["sha256"][LAYER_FILE]
    (bundle / "bundle.json").write_text(json.dumps(before))
    examples = json.loads((DEMO / "examples.json").read_text())
    texts.write_text("".join(json.dumps({"prompt": example["prompt"]}) + "\n" for example in examples))
    monkeypatch.setattr(training, "_LAYER_POSITIONS", 160)
    command = ["distill", str(bundle), "--prompts", str(texts), "--max-tokens", "24", "--size", "16", "--device", "cpu"]
    command += ["--depth", "2", "--layer-size", "32", "--steps", "60"]
    assert main(command) == 0
    said, progress = capsys.readouterr()
    work = ["writing texts", "reading texts", "training the head", "training the layer"]
    assert re.findall(r"^([a-z ]+)(?:: \d.*)?, [\d,]+ of [\d,]+$", progress, re.MULTILINE) == work
    assert re.search(r"learned from [\d,]+ positions, judged on [\d,]+ others", said)
    assert re.search(r"agreement, before +0\.\d+ +\d\.\d+\n", said)
    assert re.search(r"agreement, after +0\.\d+ +0\.\d+ +0\.\d+\n", said)
    assert "a draft head, 16 wide, a draft layer of depth 2, 32 wide" in said
    checkpoint = load_checkpoint(bundle)
    assert checkpoint.draft_head is not None
    assert checkpoint.draft_head.size == 16
    assert checkpoint.draft_layer is not None
    assert checkpoint.draft_layer.depth == 2
    assert all(file.verified for file in checkpoint.weight_files)
    content = (bundle / "bundle.json").read_bytes()
    monkeypatch.setattr(training, "_LEARNING_RATE", 0.0)
    assert main([*command, "--steps", "2"]) == 0
    assert "nothing written" in capsys.readouterr().out
    assert (bundle / "bundle.json").read_bytes() == content


@pytest.mark.parametrize("failing", range(4))
def test_wherever_writing_ends_the_bundle_can_be_loaded(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """With its old drafts or its new ones; the same again completes it."""
    head = make_draft_head(32, 8, torch.Generator().manual_seed(1))
    base = SimpleNamespace(config=AutoConfig.from_pretrained(bundle / "base"))
    layer = make_draft_layer(base, 3, torch.Generator().manual_seed(1))
    add_drafts(bundle, make_draft_head(32, 8, torch.Generator().manual_seed(2)), layer)
    replace_file, calls = writer._replace, itertools.count()

    def replace_or_fail(path: Path, content: bytes) -> None:
        if next(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace_file(path, content)

    monkeypatch.setattr(writer, "_replace", replace_or_fail)
    with pytest.raises(OSError, match="No space left"):
        add_drafts(bundle, head, layer)
    load_checkpoint(bundle)
    add_drafts(bundle, head, layer)
    assert all(file.verified for file in load_checkpoint(bundle).weight_files)


def test_a_full_disk_is_one_error(tmp_path: Path) -> None:
    """What was kept before stays; the file that did not fit is gone."""
    work = WorkFolder(tmp_path / "work", {})
    work.add_text(0, Text([1, 2], 1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(StartupError, match=r"--work .*File too large"):
            work.add_text(1, Text(list(range(100)), 1))
        with pytest.raises(StartupError, match=r"--work .*File too large"):
            work.write("head.safetensors", {"weight": torch.zeros(100)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert work.texts() == {0: Text([1, 2], 1)}
    assert {file.name for file in work.path.iterdir()} == {"run.json", "texts.jsonl"}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("where", ["__init__", "real_pass", "head"])
def test_what_does_not_fit_in_memory_is_one_error(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """While the model is loaded, a text is read, or the drafts are trained."""

    def too_large(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TwoPassModel, where, too_large)
    with pytest.raises(StartupError, match="memory ran out: CUDA out of memory") as raised:
        tiny_run(path, tmp_path / "work", lambda *_: None)
    assert raised.value.hint is not None


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
    monkeypatch.setattr(training, "_LEARNING_RATE", 0.0)
    command = ["distill", str(bundle), "--prompts", str(texts), "--max-tokens", "4", "--device", "cpu", "--steps", "2"]
    assert main(command) == 0
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
def test_prompts_that_the_model_cannot_read(path: Path, tmp_path: Path, prompt: list[int], reason: str) -> None:
    """An added token beyond the vocabulary; a text that a normalizer leaves nothing of."""
    options = EngineOptions(str(path), device="cpu", native_kernels=False)
    with pytest.raises(StartupError, match=f"prompt 2: .*{reason}"):
        write_texts(load_checkpoint(path), options, [[5, 6], prompt], 4, WorkFolder(tmp_path / "work", {}), _quiet)


def test_only_a_bundle_can_have_one(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = FIXTURES / "peft-0.19.1" / "depth2"
    command = ["distill", str(source), "--prompts", str(texts), "--device", "cpu", "--base", str(FIXTURES / "base")]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "only a bundle can have a draft head" in said
    assert "xlora-serve convert" in said


def _quiet(*_: object) -> None:
    pass
