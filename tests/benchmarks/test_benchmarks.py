"""The benchmarks run at tiny sizes, and what they force and measure is what they say. No timing is judged."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import common, observability, suite, vs_mistralrs
from benchmarks.agreement import Costs, forwards_per_token, watch, without_overruling
from benchmarks.common import DEMO, Bar, make_engine, run_engine
from benchmarks.forced import BASE_REQUEST, script, use_plain_base
from benchmarks.lookahead import Agreement
from benchmarks.synthetic import token_at
from service.checkpoint.formats.writer import add_drafts
from service.engine.speculation.costs import StepCost
from tests.support import inspector, proxy
from tests.support.bundles import make_bundle, make_draft_head
from tests.support.oracle import PeftOracle

ROOT = Path(__file__).parents[2]
PROMPT = list(range(20, 52))
TINY = {
    "vs_peft": ["--lengths", "4", "--repeats", "1"],
    "lookahead": ["--questions", "1", "--repeats", "1"],
    "vs_base": ["--questions", "1", "--repeats", "1", "--large-hidden", "256", "--large-layers", "1",
                "--large-tokens", "3", "--large-threads", "1"],
    "speculation": ["--repeats", "1"],
    "prefix_cache": ["--prefix-tokens", "200", "--repeats", "1"],
    "context": ["--contexts", "32", "64", "--tokens", "4", "--repeats", "1"],
    "throughput": ["--concurrency", "1", "16", "--tokens", "4", "--repeats", "1"],
    "observability": ["--clients", "2", "--tokens", "4", "--rounds", "2"],
    "fairness": ["--rounds", "1", "--prompt-tokens", "1000", "--choices", "4"],
    "batch_invariance": ["--requests", "2", "--tokens", "8"],
    "page_frames": ["--tokens-per-second", "2000"],
    "proxy": ["--requests", "2"],
    "stalls": ["--kinds", "long name", "emoji", "--bytes", "100000"],
    "steering": ["--requests", "4", "--tokens", "4", "--repeats", "1"],
    "one_request": ["--repeats", "1"],
    "ways": [],
    "host": ["--sequences", "1", "3", "--device-ms", "1", "--tokens", "4"],
    "in_process": ["--prompts", "6", "--tokens", "4", "--repeats", "1"],
    "linear": ["--outputs", "512", "--inputs", "256", "--repeats", "2"],
    "real_size": ["--rates", "0.9", "0.8", "0.7", "--layers", "1", "--scale", "32", "--tokens", "3", "--repeats", "1"],
    "tensor_parallel": ["--hidden", "64", "--layers", "1", "--streams", "1", "--tokens", "2", "--repeats", "1"],
}  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bench") / "tiny", xlora={"layerwise_scalings": True})


@pytest.fixture(scope="module")
def deep_bundle(tmp_path_factory) -> Path:
    """It has a draft layer for four tokens."""
    return make_bundle(tmp_path_factory.mktemp("bench") / "deep", xlora={"layerwise_scalings": True}, draft_depth=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_runs(name, monkeypatch, capfd):
    """Every benchmark, through the suite as `make bench` runs it: its own line, then the table and the suite's line."""
    if name == "proxy" and not proxy.installed():
        pytest.skip(proxy.MISSING)
    if name == "page_frames" and inspector.browser_path() is None:
        pytest.skip(inspector.MISSING)
    monkeypatch.setattr(sys, "argv", ["suite", name, "--", *TINY[name]])
    with pytest.raises(SystemExit) as end:
        suite.main()
    lines = capfd.readouterr().out.splitlines()
    assert end.value.code == 0
    document = json.loads(lines[-1])["documents"][name]
    assert document["benchmark"] == name
    for bar in document["bars"]:
        assert any(line.startswith(f"{name}: {bar['what']}") for line in lines)
        assert bar["measured"] is True or bar["sign"] != "==", f"{bar['what']}: {bar['measured']}"


def test_a_benchmark_that_fails_fails_the_suite(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["suite", "no_such_benchmark"])
    with pytest.raises(SystemExit) as end:
        suite.main()
    assert end.value.code == 1
    assert "failed to run: no_such_benchmark" in capfd.readouterr().out


def test_make_bench_passes_names_and_flags():
    done = subprocess.run(
        ["make", "-n", "bench", "BENCH=context", "ARGS=--tokens 4"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "-m benchmarks.suite context -- --tokens 4" in done.stdout


def test_every_benchmark_of_make_bench_exists():
    [line] = [line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("BENCH ")]
    names = line.split("?=")[1].split()
    assert names
    assert all((ROOT / "benchmarks" / f"{name}.py").exists() for name in names)


@pytest.mark.parametrize(
    ("bar", "met"),
    [
        (Bar("", ">=", 2.0, 2.0), True),
        (Bar("", ">=", 2.0, 1.9), False),
        (Bar("", "<=", 2.0, 2.1), False),
        (Bar("", "==", True, False), False),
        (Bar("", "==", True, True), True),
    ],
)
def test_bar(bar, met):
    assert bar.met is met


def test_plain_base_writes_what_the_base_writes(bundle):
    """... in one forward per token, and not what X-LoRA writes."""
    base = AutoModelForCausalLM.from_pretrained(bundle / "base", dtype=torch.float32).eval()
    ids = torch.tensor([PROMPT])
    written = base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
                            eos_token_id=None, pad_token_id=0)[0, len(PROMPT) :].tolist()  # fmt: skip
    engine = make_engine(bundle)
    xlora = run_engine(engine, [PROMPT], 12).tokens["0"]
    use_plain_base(engine)
    run = run_engine(engine, [PROMPT], 12, BASE_REQUEST)
    assert run.tokens["0"] == written != xlora
    assert run.steps == 12
    assert not engine.runner.model.gate.active


@pytest.mark.parametrize(("agree", "steps"), [(1.0, 2 + 15), (0.0, 2 + 2 * 15)])
def test_script_forces_drafts(bundle, agree, steps):
    """Two forwards to the first token, then one per token where drafts agree and two where they miss."""
    engine = make_engine(bundle)
    engine._scheduler.drafts.cost = StepCost()  # drafts always
    script(engine, [agree])
    run = run_engine(engine, [PROMPT], 16)
    assert run.steps == steps
    assert run.draft_hit_rate == agree
    assert len(set(run.tokens["0"])) == 16


@pytest.mark.parametrize(
    "a", [(1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (0.95, 0.85, 0.75), (0.7, 0.6, 0.5), (0.99, 0.7, 0.95)]
)
def test_forced_rates_are_those_that_are_found_and_predict_the_forwards(deep_bundle, a):
    """The draft layer runs, but what it says is written over; tokens are those of the script, whatever the rates."""
    engine = make_engine(deep_bundle, draft_depth=3)
    engine._scheduler.drafts.cost = StepCost()
    script(engine, a)
    watched = watch(engine)
    run = run_engine(engine, [PROMPT], 640)
    assert run.tokens["0"] == token_at(torch.arange(32, 32 + 640), 320 - 18).tolist()
    judged = watched.judged()
    assert judged.rates == [pytest.approx(rate, abs=0.03) for rate in a[: len(judged.rates)]]
    assert run.steps / 640 == pytest.approx(forwards_per_token(a, 640), abs=0.02)
    assert (len(run.drafts.lookahead_kept) == 3) == (a[0] > 0)


def test_forwards_per_token_by_hand():
    """The figures of DESIGN 3.1; and where nothing is overruled, at depth 1: 2 + (N - 1)(2 - a) for N tokens."""
    assert without_overruling([0.95, 0.85, 0.75]) == pytest.approx(0.63, abs=0.005)
    assert without_overruling([0.97, 0.93, 0.88]) == pytest.approx(0.48, abs=0.005)
    assert forwards_per_token([1.0, 1.0], 10) * 10 == pytest.approx(2 + 9 / 2 + 1 / 4)  # with half a token too many
    for formula in (forwards_per_token, without_overruling):
        assert formula([0.9], 11) * 11 == pytest.approx(2 + 10 * 1.1)
        assert formula([]) == formula([], 7) == 2
        assert formula([1.0, 1.0]) == 0.5
        assert formula([0.0, 0.9]) == 2


def test_costs_over_the_base_by_hand():
    """Nothing but bytes: a tenth more for the experts, drafts that never or always come true, and their layer."""
    costs = Costs(scaling=1.0, real=1.1, step=StepCost(), layer=0.2)
    assert costs.over_base([1.0]) == pytest.approx(1 / 1.1)
    assert costs.over_base([0.0]) == pytest.approx(1 / 2.1)
    assert costs.over_base([1.0, 1.0]) == pytest.approx(2 / (1.1 + 0.2))
    assert Costs(1.0, 1.1, step=StepCost.linear(0.5), layer=0.0).over_base([1.0]) == pytest.approx(1.5 / (2 * 1.1))
    rows_cost_much = Costs(1.0, 1.1, step=StepCost.linear(0.5, layer=0.0), layer=0.2)
    assert rows_cost_much.depth([0.9, 0.2]) == 1
    assert rows_cost_much.over_base([0.9, 0.2]) == rows_cost_much.over_base([0.9]), "only what pays is drafted"


def test_agreement_predicts_the_forwards(bundle, tmp_path):
    """a, measured on whole texts by transformers and PEFT, is what the engine's steps come to: 2 + (N - 1)(2 - a), and
    what is found by watching it. With a draft head and without.
    """
    found = []
    for draft_head in (None, make_draft_head(32, 8, torch.Generator().manual_seed(1))):
        path = shutil.copytree(bundle, tmp_path / f"bundle-{draft_head is None}")
        if draft_head is not None:
            add_drafts(path, draft_head, None)
        engine = make_engine(path)
        engine._scheduler.drafts.cost = StepCost()
        watched = watch(engine)
        run = run_engine(engine, [PROMPT], 32)
        own, alone, guessed = Agreement(path).of(PROMPT, run.tokens["0"])
        a = float(own.float().mean())
        assert guessed
        assert 0 < a < 1
        assert run.steps == round(2 + 31 * (2 - a))
        assert watched.judged().rates == [pytest.approx(a)]
        found += [a, float(alone.float().mean())]
    assert found[0] == found[1] == found[3] != found[2]


def test_a_cost_is_found_amid_noise_that_a_round_shares():
    """Rounds differ by half, bursts of a round by one per cent; and no cost is not called one."""
    rng = random.Random(1)
    rounds = []
    for speed in (rng.uniform(1.0, 1.5) for _ in range(40)):
        rounds.append(
            {side: speed * rng.gauss(1.0, 0.01) * dear for side, dear in (("base", 1), ("5", 1.05), ("0", 1))}
        )
    found = {side: observability.cost(rounds, side, "base") for side in ("5", "0")}
    assert found["5"]["cost"] == pytest.approx(0.05, abs=0.01)
    for side, cost in (("5", 0.05), ("0", 0.0)):
        low, high = found[side]["interval"]
        assert low < cost < high < low + 0.02
    assert [bar.met for bar in observability.bars_of([{"side": "none", "interval": [-0.01, 0.021]}], 1)] == [False]


def test_deficit_finds_a_wrong_token(bundle):
    oracle = PeftOracle(bundle)
    tokens, _ = oracle.greedy(PROMPT, 6)
    assert vs_mistralrs.deficit(oracle, PROMPT, tokens) == 0
    tokens[3] = (tokens[3] + 1) % 300
    assert vs_mistralrs.deficit(oracle, PROMPT, tokens) > 0


def test_mistralrs_layout_has_every_weight(tmp_path):
    """The converted files name the same tensors; tokens that have text, the end's among them, are never written."""
    bundle = vs_mistralrs.mistral_bundle(tmp_path / "bundle")
    paths = vs_mistralrs.convert(bundle, tmp_path)
    ordering = json.loads(Path(paths["ordering"]).read_text())
    manifest = json.loads((bundle / "bundle.json").read_text())
    assert list(ordering["layers"]) == manifest["sites"]
    for name, expert in zip(ordering["order"], manifest["experts"], strict=True):
        ours = bundle / expert["path"] / "adapter_model.safetensors"
        assert (Path(paths["experts"]) / f"{name}.safetensors").read_bytes() == ours.read_bytes()
    config = json.loads((Path(paths["experts"]) / "xlora_config.json").read_text())
    assert config["adapters"] == ordering["order"]
    assert config["base_model_id"] == paths["base"]
    tokens = run_engine(make_engine(bundle), [PROMPT], 24).tokens["0"]
    assert min(tokens) > 300
    assert vs_mistralrs.token_ids("".join(f"<[{token}]>" for token in tokens)) == tokens


def test_no_native_kernels_is_an_error(bundle, tmp_path, monkeypatch):
    """A rate is that of the kernels unless the options say no: where they cannot be had, the benchmark fails."""
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(RuntimeError, match="there are no native kernels"):
        make_engine(bundle, native_cache=str(tmp_path))
    make_engine(bundle, native_cache=str(tmp_path), native_kernels=False)


def test_prompts_differ_by_seed_only():
    assert common.prompt_tokens(DEMO, 64) == common.prompt_tokens(DEMO, 64)
    assert common.prompt_tokens(DEMO, 64) != common.prompt_tokens(DEMO, 64, seed=1)
    assert len(common.prompt_tokens(DEMO, 700)) == 700
