"""Lessons and drafts over known texts: what the engine's draft layer would see and say, of families of many kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from service.checkpoint import load_checkpoint
from service.model.draft_layer import DraftLayer
from service.tools.distill.lessons import read_lessons
from service.tools.distill.unrolled import Anchors, Unrolled, agreement
from service.tools.distill.work_folder import Text, WorkFolder
from service.tools.distill.worth import forwards_per_token, useful_depth
from service.tools.two_pass import TwoPassModel
from tests.model.loading.test_families import FAMILIES
from tests.support.bundles import make_bundle
from tests.support.drafting import ScalingPass
from tests.support.driver import words
from tests.support.tiny import CPU

DEPTH = 4


@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3_text", "granite", "gpt_neox", "gpt2"])
def test_states_of_every_depth(tmp_path: Path, family: str) -> None:
    """Embedding scales, windows, soft caps, RoPE of a part of each head or of none: against transformers' own parts."""
    options: dict[str, Any] = {**FAMILIES[family], "experts": ["math", "bio"], "draft_depth": DEPTH}
    path = make_bundle(tmp_path / family, architecture=family, strength=0.3, head=2.0, **options)
    checkpoint = load_checkpoint(path)
    assert checkpoint.draft_layer is not None
    plain = TwoPassModel(checkpoint, device=CPU, dtype=torch.float32)
    texts = [Text(words(3, 19), 7), Text(words(4, 23), 9)]
    lessons = [one for part in read_lessons(plain, texts, WorkFolder(tmp_path / "work", {}), _quiet) for one in part]
    layer = DraftLayer(checkpoint.draft_layer, lessons[0].keys.shape[-1], device=CPU, dtype=torch.float32)
    anchors = [Anchors(lesson, torch.arange(len(lesson.tokens) - 1)) for lesson in lessons]
    with torch.no_grad():
        drafts = list(Unrolled(plain, layer).drafts(anchors))
    assert len(drafts) == DEPTH
    base = AutoModelForCausalLM.from_pretrained(path / "base", dtype=torch.float32)
    row = 0
    for lesson, text in zip(lessons, texts, strict=True):
        scaling_pass, real = ScalingPass(base, text.tokens), plain.forward(text.tokens)[0]
        for anchor in range(len(text.tokens) - 1):
            for ahead, state in enumerate(scaling_pass.states(checkpoint.draft_layer, anchor)):
                torch.testing.assert_close(drafts[ahead].state[row], state, atol=2e-4, rtol=1e-4)
                assert drafts[ahead].likeliest[row, 0] == real[anchor + ahead].argmax()
                assert drafts[ahead].inside[row] == (anchor + ahead < len(text.tokens) - 1)
            row += 1
        assert lesson.answer.tolist() == list(range(text.prompt - 1, len(text.tokens) - 1))


def test_agreement_counts_drafts_whose_predecessors_were_right(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "tiny", strength=0.3, draft_depth=3, xlora={"layerwise_scalings": True})
    checkpoint = load_checkpoint(path)
    assert checkpoint.draft_layer is not None
    plain = TwoPassModel(checkpoint, device=CPU, dtype=torch.float32)
    texts = [Text(words(seed, 30), 5) for seed in range(12)]
    lessons = [one for part in read_lessons(plain, texts, WorkFolder(tmp_path / "work", {}), _quiet) for one in part]
    layer = DraftLayer(checkpoint.draft_layer, lessons[0].keys.shape[-1], device=CPU, dtype=torch.float32)
    counts = [[0, 0] for _ in range(3)]
    base = AutoModelForCausalLM.from_pretrained(path / "base", dtype=torch.float32)
    for text in texts:
        scaling_pass, real = ScalingPass(base, text.tokens), plain.forward(text.tokens)[0].argmax(-1)
        for anchor in range(text.prompt - 1, len(text.tokens) - 1):
            for ahead, state in enumerate(scaling_pass.states(checkpoint.draft_layer, anchor)):
                if anchor + ahead >= len(text.tokens) - 1:
                    break
                is_right = base.lm_head(state).argmax() == real[anchor + ahead]
                counts[ahead][0] += int(is_right)
                counts[ahead][1] += 1
                if not is_right:
                    break
    found = agreement(plain, None, layer, lessons)
    assert found == pytest.approx([right / max(made, 1) for right, made in counts])
    assert 0 < found[0] < 1


def test_forwards_per_token() -> None:
    """DESIGN's own figures; depth 1 is 2 - a; without a miss only full forwards are left."""
    assert forwards_per_token([0.95, 0.85, 0.75]) == pytest.approx(0.63, abs=0.005)
    assert forwards_per_token([0.97, 0.93, 0.88]) == pytest.approx(0.48, abs=0.005)
    assert forwards_per_token([0.83]) == pytest.approx(2 - 0.83)
    assert forwards_per_token([1.0, 1.0, 1.0]) == pytest.approx(1 / 3)
    assert forwards_per_token([0.0, 0.9]) == 2


def test_useful_depth() -> None:
    assert useful_depth([0.9]) == 1
    assert useful_depth([0.9, 0.0, 0.9]) == 1
    assert useful_depth([0.95, 0.85, 0.75]) == 3
    assert useful_depth([0.95, 0.85, 0.0, 0.9]) == 2


def _quiet(*_: object) -> None:
    pass
