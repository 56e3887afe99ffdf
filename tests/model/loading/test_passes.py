"""From a checkpoint to a model: what is done once, and that nothing is left out."""

from __future__ import annotations

import inspect

import pytest
import torch

from service.checkpoint import load_checkpoint
from service.contract.options import EngineOptions
from service.engine.loader import load_engine
from service.model.loading import passes, skeleton
from service.model.loading.passes import MODEL_PASSES, OUTLINE_PASSES, Loading, load_model, outline_model
from service.model.loading.skeleton import inspect_base
from tests.support.tiny import CPU, Tiny, run_once


def test_the_skeleton_is_built_once_per_load(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so the family is judged once: the probe runs on it."""
    built, build, judge = [], skeleton.build_skeleton, skeleton.refuse_unservable
    monkeypatch.setattr(skeleton, "build_skeleton", lambda *how: built.append("skeleton") or build(*how))
    monkeypatch.setattr(skeleton, "refuse_unservable", lambda *how: built.append("judged") or judge(*how))
    load_engine(EngineOptions(str(tiny.path), "cpu", threads=1, native_kernels=False))
    assert built == ["skeleton", "judged"]


def test_a_checkpoint_that_nobody_inspected_is_judged_when_it_is_loaded(tiny: Tiny) -> None:
    """The same model comes of both."""
    inspected = load_checkpoint(tiny.path, inspect_base=inspect_base)
    assert inspected.skeleton is not None
    assert tiny.checkpoint.skeleton is None
    ours, theirs = (
        run_once(load_model(checkpoint, device=CPU, dtype=torch.float32), [5, 6, 7])
        for checkpoint in (inspected, tiny.checkpoint)
    )
    assert torch.equal(ours[0], theirs[0])


def test_every_pass_runs() -> None:
    """A pass that is in no list would be forgotten in silence."""
    own = {"loading": Loading.__name__, "return": "None"}
    functions = {one for _, one in inspect.getmembers(passes, inspect.isfunction) if one.__annotations__ == own}
    assert functions == {*MODEL_PASSES, *OUTLINE_PASSES}
    assert len(MODEL_PASSES) == len(set(MODEL_PASSES))


def test_an_outline_leaves_the_skeleton_as_it_was(tiny: Tiny) -> None:
    """It is adapted itself; whoever loads afterwards resolves sites in the base's own modules."""
    checkpoint = load_checkpoint(tiny.path, inspect_base=inspect_base)
    before = [type(module) for module in checkpoint.skeleton.modules()]
    outline_model(checkpoint, dtype=torch.bfloat16, is_for_cpu=True)
    assert [type(module) for module in checkpoint.skeleton.modules()] == before
