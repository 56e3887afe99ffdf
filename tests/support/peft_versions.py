"""Adapters of other versions of PEFT: each version is installed into a folder of its own, writes the zoo, and what it
has written is checked as the suite checks the installed version's.

    python -m tests.support.peft_versions 0.12.0 0.15.2     needs a package index, and half a minute for each
    python -m tests.support.peft_versions                   every version below

Also holds that check: `check` and `serve` agree, a refusal has its true reason, and what is served has PEFT's numbers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.utils import logging

from service.checkpoint import Checkpoint, ClassifierWeights, load_checkpoint
from service.model.loading.passes import load_model
from service.model.loading.skeleton import inspect_base
from tests.support.adapters import CASES, EXPERTS, TOKENS, Case
from tests.support.agreement import check, serve
from tests.support.tiny import CPU, run_once
from tests.support.two_pass import TwoPassOracle

VERSIONS = (
    *("0.10.0", "0.11.1", "0.12.0", "0.13.2", "0.14.0", "0.15.2"),
    *("0.16.0", "0.17.1", "0.18.1", "0.19.1", "0.20.0", "0.21.2"),
)
ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-4
GIVEN_UP = ", HybridCache,"  # what some versions import of transformers, for nothing that is done here


def assert_served_as_peft(bundle: Path, case: Case, version: tuple[int, int] | None = None) -> None:
    """Either one refusal, or the scalings, logits and greedy tokens of the mixture that the installed PEFT has, and for
    another version the logits of one expert alone, which that has written down.
    """
    problems = check(bundle)
    if case.refusal is not None:
        assert len(problems) == len(EXPERTS), problems
        assert all(case.refusal in problem for problem in problems), problems
        assert serve(bundle) == problems[0]
        return
    assert (problems, serve(bundle)) == ([], None)
    checkpoint = load_checkpoint(bundle, inspect_base=inspect_base)
    logits, scalings = run_once(load_model(checkpoint, device=CPU, dtype=torch.float32), TOKENS, [10, 14])
    theirs, their_scalings = TwoPassOracle(bundle).forward(TOKENS)
    assert_close(scalings, their_scalings, "scalings")
    assert_close(logits, theirs, "logits")
    best = theirs.topk(2).values
    clear = best[:, 0] - best[:, 1] > TOLERANCE
    assert torch.equal(logits.argmax(-1)[clear], theirs.argmax(-1)[clear])
    expected = load_file(bundle / "expected.safetensors")
    change = (theirs - expected["base"]).abs().max()
    assert change > 0.05, "the experts change hardly anything: the case shows little"
    if version is not None and version >= case.since:
        alone = load_model(first_alone(checkpoint), device=CPU, dtype=torch.float32)
        assert_close(run_once(alone, TOKENS)[0], expected["alone"], "one expert alone")


def first_alone(checkpoint: Checkpoint) -> Checkpoint:
    """The first expert of a checkpoint without the others: a softmax over one is 1."""
    layers = [*checkpoint.classifier.layers]
    rows = len(checkpoint.sites or ())
    layers[-1] = layers[-1][0][:rows], torch.zeros(rows)
    return replace(checkpoint, experts=checkpoint.experts[:1], classifier=ClassifierWeights(tuple(layers)))


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0, msg=lambda text: f"{what}: {text}")


def check_version(version: str, folder: Path) -> list[str]:
    """Writes the zoo with one version and checks it; returns a line for every case that is not as it should be."""
    packages = folder / "packages"
    install = ["install", "--quiet", "--no-deps", "--target", str(packages), f"peft=={version}"]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    source = packages / "peft/peft_model.py"
    source.write_text(source.read_text("utf-8").replace(GIVEN_UP, ","), "utf-8")
    environment = {**os.environ, "PYTHONPATH": f"{packages}:{ROOT}"}
    write = [sys.executable, "-m", "tests.support.adapters", str(folder / "zoo")]
    subprocess.run(write, check=True, env=environment, cwd=ROOT)
    report: dict[str, Any] = json.loads((folder / "zoo/failures.json").read_text())
    assert report["version"] == version
    lines = [f"{version}, {name}: not written: {reason}" for name, reason in report["failures"].items()]
    major, minor, *_ = map(int, version.split("."))
    for name in CASES.keys() - report["failures"].keys():
        try:
            assert_served_as_peft(folder / "zoo" / name, CASES[name], (major, minor))
        except Exception as error:
            lines.append(f"{version}, {name}: {type(error).__name__}: {' '.join(str(error).split())[:600]}")
    return sorted(lines)


def main(versions: list[str]) -> None:
    """Prints what is not as it should be, and how many cases are."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for version in versions:
        with tempfile.TemporaryDirectory() as folder:
            lines = check_version(version, Path(folder))
        print(
            *lines, f"PEFT {version}: {len(CASES) - len(lines)} of {len(CASES)} cases are as they should be", sep="\n"
        )


if __name__ == "__main__":
    main(sys.argv[1:] or list(VERSIONS))
