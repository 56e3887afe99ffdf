"""Builds the demo bundle from nothing: synthetic text, tokenizer, base, four experts, gate, report, drafts.

    python model_store/build_demo.py [--out model_store/demo] [--seed 0] [--quick] [--work DIR [--resume-from STAGE]]

`--quick` runs a few steps of everything (one minute) to test the machinery; its model knows nothing. `--work` keeps
the result of each stage, and `--resume-from gate` starts there; `--resume-from draft` needs none, it takes the bundle
as it is and teaches only its drafts; with the same `--work` it goes on with a killed run. Exit status 1 if a bar of the report does not hold.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from demo_builder.bundle import read_bundle, write_bundle, write_json, write_manifest
from demo_builder.documents import DOMAIN_NAMES
from demo_builder.drafting import add_section, agreements, teach
from demo_builder.evaluation import gate_profile, measure
from demo_builder.mixture import Shape, XLora
from demo_builder.oracle import difference_from_peft
from demo_builder.report import bars, examples, render
from demo_builder.tokenizer import train_tokenizer
from demo_builder.training import GATE_SUPERVISION, Plan, train_base, train_experts, train_gate
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from service.tools.distill import Plan as DistillPlan

STAGES = ("base", "experts", "gate", "report", "draft")
PLANS = {
    "base": Plan(steps=1700, rows=12, length=128, learning_rate=4e-3, weight_decay=0.05, warmup=100, muon=True),
    "experts": Plan(steps=450, rows=12, length=128, learning_rate=4e-3),
    "gate": Plan(steps=250, rows=12, length=128, learning_rate=4e-3),
}
DRAFTS = DistillPlan(max_tokens=128, depth=6, layer_steps=6000)
QUICK_DRAFTS = DistillPlan(max_tokens=8, depth=3, head_steps=4, layer_steps=4)
QUICK = {"base": (8, 4), "experts": (4, 4), "gate": (4, 4)}  # steps, rows


@dataclass
class Build:
    """One run: what it makes and how long each stage took."""

    out: Path
    work: Path
    seed: int
    quick: bool
    shape: Shape = field(default_factory=Shape)
    seconds: dict[str, float] = field(default_factory=dict)

    def plan(self, stage: str) -> Plan:
        """The plan of a stage, tiny in a quick build."""
        plan = PLANS[stage]
        return replace(plan, steps=QUICK[stage][0], rows=QUICK[stage][1], warmup=2) if self.quick else plan

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, trained anew (a second)."""
        documents = 300 if self.quick else 4000
        return train_tokenizer(self.seed, self.shape.vocab, documents, self.shape.max_positions)

    def train(self, resume_from: str) -> tuple[XLora, PreTrainedTokenizerFast]:
        """Runs the stages from `resume_from` on, earlier ones come from `work`."""
        tokenizer = self.tokenizer()
        torch.manual_seed(self.seed)
        base = LlamaForCausalLM(
            self.shape.llama(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        )
        done = STAGES[: STAGES.index(resume_from)]
        if "base" in done:
            base.load_state_dict(self.load("base"))
        else:
            self.time("base", lambda: train_base(base, tokenizer, self.plan("base"), self.seed + 1))
            self.save("base", base.state_dict())
        torch.manual_seed(self.seed + 2)
        model = XLora(base, self.shape)
        if "experts" in done:
            model.base.load_state_dict(self.load("experts"))
        else:
            self.time("experts", lambda: train_experts(model, tokenizer, self.plan("experts"), self.seed + 3))
            self.save("experts", model.base.state_dict())
        if "gate" in done:
            model.classifier.load_state_dict(self.load("gate"))
        else:
            self.time("gate", lambda: train_gate(model, tokenizer, self.plan("gate"), self.seed + 4))
            self.save("gate", model.classifier.state_dict())
        return model, tokenizer

    def time(self, stage: str, work: Any) -> None:
        """Runs `work` and keeps the stage's seconds."""
        started = time.monotonic()
        work()
        self.seconds[stage] = time.monotonic() - started

    def save(self, stage: str, state: dict[str, Any]) -> None:
        """Keeps a stage's result in `work`."""
        torch.save({"state": state, "seconds": self.seconds[stage]}, self.work / f"{stage}.pt")

    def load(self, stage: str) -> dict[str, Any]:
        """A stage's result from an earlier run."""
        kept = torch.load(self.work / f"{stage}.pt", weights_only=True)
        self.seconds[stage] = kept["seconds"]
        state: dict[str, Any] = kept["state"]
        return state

    def report(self) -> bool:
        """Reads the bundle back, measures it, completes its files; True if every bar holds."""
        started = time.monotonic()
        model, tokenizer = read_bundle(self.out, self.shape)
        results = measure(
            model, tokenizer, self.seed + 5, per_domain=3 if self.quick else 150, limit=8 if self.quick else 96
        )
        write_manifest(self.out, model.sites, gate_profile(list(results.xlora.values()), DOMAIN_NAMES))
        shown = examples(results)
        write_json(self.out / "examples.json", shown)
        prompts = [tokenizer.encode(t.prompt + t.answer) for turns in results.sets.values() for t in turns[:2]]
        difference = difference_from_peft(self.out, model, prompts)
        self.seconds["report"] = time.monotonic() - started
        (self.out / "REPORT.md").write_text(render(results, shown, self.facts(difference)), encoding="utf-8")
        write_manifest(self.out, model.sites, gate_profile(list(results.xlora.values()), DOMAIN_NAMES))
        for bar in bars(results):
            print(f"[report] {'holds' if bar.holds else 'FAILS'}: {bar.text}: {bar.measured}", flush=True)
        return all(bar.holds for bar in bars(results))

    def draft(self) -> None:
        """Gives the bundle its draft head and draft layer, and the report a section about them."""
        started = time.monotonic()
        model, tokenizer = read_bundle(self.out, self.shape)
        count, plan = (24, QUICK_DRAFTS) if self.quick else (3000, DRAFTS)
        made = teach(self.out, tokenizer, self.seed + 6, count, plan, self.work / "drafts")
        self.seconds["draft"] = time.monotonic() - started
        rows = agreements(self.out, model, tokenizer, self.seed + 5, *((3, 8) if self.quick else (40, 96)))
        add_section(self.out / "REPORT.md", made, rows, self.seconds["draft"])

    def facts(self, difference: float) -> dict[str, Any]:
        """What the report says of how the bundle was made."""
        s = self.shape
        size = sum(f.stat().st_size for f in self.out.rglob("*") if f.is_file())
        stages = [
            [n, f"{p.steps}", f"{p.rows * p.length}", f"{p.learning_rate}", f"{self.seconds[n]:.0f}"]
            for n, p in ((n, self.plan(n)) for n in PLANS)
        ]
        return {
            "supervision": GATE_SUPERVISION,
            "seed": self.seed,
            "stages": [*stages, ["report", "", "", "", f"{self.seconds['report']:.0f}"]],
            "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
            f"transformers {transformers.__version__}, peft {peft.__version__}",
            "wall": f"{sum(self.seconds.values()) / 60:.0f} min on two cores",
            "size": f"{size / 1e6:.1f} MB",
            "oracle": f"{difference:.1e}",
            "made": (
                f"Llama, hidden {s.hidden}, {s.layers} layers, {s.heads} heads, {s.kv_heads} KV heads, "
                f"feed-forward {s.feed_forward}, byte-level BPE of {s.vocab}, tied embeddings. "
                f"Experts of rank {s.rank}, alpha {s.alpha}, on all seven linears. Classifier: depth 2, "
                f"size {s.gate_size}, layerwise, softmax.\n\n"
                "1. *Base* on street voices: random wordings, mostly made-up facts, questions for one or "
                "two domains, copying drills.\n"
                "2. *Experts* on house voices with the base frozen, under an oracle gate (the domain of the next "
                "token, disturbed as a real gate would be); loss on answers only.\n"
                "3. *Gate* with base and experts frozen: scaling pass with gate 0, classifier in fp32, real pass with "
                "its scalings at every site and token; loss on answers."
            ),
        }


def main() -> int:
    """Command line; 1 if a bar does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parent
    parser.add_argument(
        "--out", type=Path, default=None, help="where the bundle goes (default model_store/demo; --quick needs its own)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a smoke run of a minute")
    parser.add_argument("--work", type=Path, help="keeps the result of each stage")
    parser.add_argument("--resume-from", choices=STAGES, default="base", help="take earlier stages from --work")
    args = parser.parse_args()
    if args.quick and args.out is None:
        parser.error("--quick makes a useless model: give it a directory with --out")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        build = Build(args.out or here / "demo", work, args.seed, args.quick)
        good = True
        if args.resume_from != "draft":
            model, tokenizer = build.train(args.resume_from)
            shutil.rmtree(build.out, ignore_errors=True)
            write_bundle(build.out, model, tokenizer)
            good = build.report()
        build.draft()
    print(f"[done] {build.out}: {sum(build.seconds.values()) / 60:.1f} min", flush=True)
    return 0 if good or args.quick else 1


if __name__ == "__main__":
    sys.exit(main())
