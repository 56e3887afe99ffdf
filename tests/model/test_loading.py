"""What the model decides at load: the order of sites, which bases cannot be served, what is held in memory."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from service.checkpoint import Expert, LoraWeights
from service.contract.errors import CheckpointError
from service.model.adapted import AdaptedModule
from service.model.loading.passes import load_model
from service.model.loading.rope import fix_longrope, refuse_length_dependent_rope
from service.model.targets import resolve_sites
from service.model.xlora_model import XLoraModel
from tests.support.driver import words
from tests.support.tiny import CPU, Tiny, assert_same, load_base, run_once


def test_sites_without_a_stored_order(tiny: Tiny) -> None:
    """Traversal order over the union of the targets: the order in which PEFT numbers its layers, and so the
    classifier's rows.
    """
    absent = replace(tiny.checkpoint, sites=None)
    assert resolve_sites(absent, tiny.base(torch.float32)) == tiny.oracle.sites
    union = {site for expert in tiny.checkpoint.experts for site in expert.weights}
    assert set(tiny.oracle.sites) == union
    assert len(tiny.oracle.sites) == len(union)


def test_the_stored_order_wins(tiny: Tiny) -> None:
    """A checkpoint trained under another numbering says so in its manifest."""
    stored = tuple(reversed(tiny.oracle.sites))
    assert resolve_sites(replace(tiny.checkpoint, sites=stored), tiny.base(torch.float32)) == list(stored)


@pytest.mark.parametrize("site", ["model.embed_tokens", "model.norm", "model.layers.7.self_attn.q_proj"])
def test_targets_that_are_no_linear(tiny: Tiny, site: str) -> None:
    """Swapping an embedding for a linear, or a site that does not exist, must not pass in silence."""
    lora = LoraWeights(torch.zeros(1, 32), torch.zeros(32, 1), 1.0)
    experts = (*tiny.checkpoint.experts, Expert("bad", "", {site: lora}))
    with pytest.raises(CheckpointError, match=site.replace(".", r"\.")):
        resolve_sites(replace(tiny.checkpoint, experts=experts), tiny.base(torch.float32))


@pytest.mark.parametrize("kind", ["default", "linear", "yarn", "llama3"])
def test_rope_that_does_not_depend_on_the_batch(kind: str) -> None:
    """These fix their angles at load."""
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    refuse_length_dependent_rope(AutoConfig.for_model("llama", rope_parameters=rope), "here")


def test_dynamic_rope_is_refused(tmp_path: Path) -> None:
    """With dynamic RoPE a stranger's long prompt would change everybody's tokens."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    tiny = Tiny(tmp_path / "dynamic", base_config={"rope_parameters": rope})
    with pytest.raises(CheckpointError, match="dynamic"):
        load_base(tiny.checkpoint, torch.float32)


def test_dynamic_rope_of_one_layer_type_is_refused() -> None:
    """Gemma 3 and others keep RoPE parameters per layer type, one level deeper."""
    rope = {
        "full_attention": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    config: Any = AutoConfig.for_model("gemma3_text", rope_parameters=rope)
    with pytest.raises(CheckpointError, match="dynamic"):
        refuse_length_dependent_rope(config, "here")


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 24,
    "short_factor": [1.0, 1.1, 1.2, 1.4],
    "long_factor": [2.0, 3.0, 5.0, 8.0],
}


@pytest.fixture(scope="module")
def longrope(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Phi-3 with a head of 8: four frequencies; first trained on 24 tokens."""
    config = {"rope_parameters": LONGROPE, "max_position_embeddings": 96, "original_max_position_embeddings": 24}
    targets = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    path = tmp_path_factory.mktemp("longrope") / "bundle"
    return Tiny(path, architecture="phi3", experts=["math", "code"], targets=targets, base_config=config)


@pytest.mark.parametrize(("max_model_len", "length"), [(24, 24), (24, 7), (96, 25), (96, 60), (None, 60)])
def test_longrope_has_one_set_of_frequencies(longrope: Tiny, max_model_len: int | None, length: int) -> None:
    """The short ones where no text can be longer than 24, the long ones otherwise: a whole text has PEFT's numbers,
    in chunks and amid rows of other lengths.
    """
    base = load_base(longrope.checkpoint, torch.float32, max_model_len)
    model = XLoraModel(longrope.checkpoint, base, device=CPU, dtype=torch.float32)
    tokens = words(3, length)
    expected = longrope.oracle.logits(tokens), longrope.oracle.scalings(tokens)
    assert_same(run_once(model, tokens, [5, length - 5]), expected)


def test_longrope_factors_matter(longrope: Tiny) -> None:
    """The negative control of the test above: the other factors give other logits."""
    base = load_base(longrope.checkpoint, torch.float32, 96)
    model = XLoraModel(longrope.checkpoint, base, device=CPU, dtype=torch.float32)
    tokens = words(3, 20)
    logits, _ = run_once(model, tokens)
    assert (logits - longrope.oracle.logits(tokens)).abs().max() > 0.01


def test_longrope_of_one_layer_type_is_settled() -> None:
    """Gemma 3 keeps frequencies per layer type; the other type's stay what they are."""
    rope = {"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    config: Any = AutoConfig.for_model(
        "gemma3_text", rope_parameters=rope, head_dim=8, num_hidden_layers=2, hidden_size=32, vocab_size=64,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=32, max_position_embeddings=96,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    causal_lm = AutoModelForCausalLM.from_config(config)
    rotary: Any = causal_lm.model.rotary_emb
    short, sliding = rotary.full_attention_inv_freq.clone(), rotary.sliding_attention_inv_freq.clone()
    fix_longrope(causal_lm, 96)
    torch.testing.assert_close(rotary.full_attention_inv_freq * torch.tensor([2.0, 3.0, 5.0, 8.0]),
                               short * torch.tensor([1.0, 1.1, 1.2, 1.4]))  # fmt: skip
    assert torch.equal(rotary.sliding_attention_inv_freq, sliding)
    causal_lm(input_ids=torch.zeros(1, 4, dtype=torch.int64))  # neither changes back in a forward
    assert not torch.equal(rotary.full_attention_inv_freq, short)


def test_every_site_is_swapped_and_weights_are_held_once(tiny: Tiny) -> None:
    """A site left as it was would run without experts; a copied base would double the memory."""
    base = copy.deepcopy(tiny.base(torch.float32))
    before = {site: base.get_submodule(site).weight.clone() for site in tiny.oracle.sites}
    model = type(tiny.as_stored().model())(tiny.checkpoint, base, device=CPU, dtype=torch.float32)
    swapped = {
        name.replace(".decoder", ""): m for name, m in model.causal_lm.named_modules() if isinstance(m, AdaptedModule)
    }
    assert set(swapped) == set(tiny.oracle.sites)
    assert all(torch.equal(module.weight, before[site]) for site, module in swapped.items())
    storages = {m.weight.untyped_storage().data_ptr(): m.weight.untyped_storage().nbytes() for m in swapped.values()}
    assert sum(storages.values()) == sum(weight.nbytes for weight in before.values())
    stacked = sum(m.lora_a.numel() + m.lora_b_t.numel() for m in swapped.values())
    assert stacked == sum(
        w.a.shape.numel() + w.b.shape.numel() for e in tiny.checkpoint.experts for w in e.weights.values()
    )


def test_load_model_reports_progress_and_needs_no_grad(tiny: Tiny) -> None:
    """Loading is shown, and the loaded model equals the one the other tests build."""
    lines: list[str] = []
    model = load_model(tiny.checkpoint, device=CPU, dtype=torch.float32, on_progress=lines.append)
    assert any("alpha, beta, gamma" in line for line in lines)
    assert not any(parameter.requires_grad for parameter in model.causal_lm.parameters())
    ours, theirs = run_once(model, [5, 6, 7]), run_once(tiny.as_stored().model(), [5, 6, 7])
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


def test_global_weight_can_change_at_run_time(tiny: Tiny) -> None:
    """It stays outside B: PEFT's set_global_scaling_weight works on a loaded model."""
    variant = tiny.variant(layerwise_scalings=True, xlora_depth=2)
    model, oracle = variant.model(), variant.oracle()
    for weight in (0.0, 2.5, 1.0):
        model.gate.global_scaling_weight = weight
        oracle.xlora.set_global_scaling_weight(weight)
        torch.testing.assert_close(run_once(model, [9, 8, 7, 6])[0], oracle.logits([9, 8, 7, 6]), atol=1e-4, rtol=0)


def test_bf16_model_is_close(tiny: Tiny) -> None:
    """A cast in the wrong place costs far more than bf16's own rounding; scalings stay fp32."""
    tokens = list(range(30, 54))
    exact, rounded = (
        run_once(tiny.as_stored().model(), tokens),
        run_once(tiny.as_stored().model(torch.bfloat16), tokens),
    )
    assert rounded[0].dtype == torch.bfloat16
    assert rounded[1].dtype == torch.float32
    assert (rounded[1] - exact[1]).abs().mean() < 0.02
    error = (rounded[0].float() - exact[0]).norm() / exact[0].norm()
    assert error < 0.1
