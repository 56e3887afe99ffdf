"""A zoo of adapters as PEFT itself saves them, each in a bundle beside the numbers that PEFT computed with it.

    python -m tests.support.adapters DIRECTORY      writes every case with the PEFT that is importable
    python -m tests.support.peft_versions VERSION   the same with other versions, and checks what they have written

Knows PEFT, transformers and how a bundle is put together; what the service makes of it is the tests'.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from service.checkpoint import XLoraConfig, write_bundle
from tests.support.bundles import make_base, make_classifier, make_tokenizer

EXPERTS = ("math", "code")
TOKENS = [(5 + 37 * number) % 300 for number in range(24)]
TIED: dict[str, Any] = {"tie_word_embeddings": True}
VISION = {
    **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 14},
}
TEXT = {
    **{"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
    **{"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA_WITH_IMAGES = {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4}


@dataclass(frozen=True)
class Case:
    """One kind of adapter: LoraConfig's arguments, and the base it is for."""

    architecture: str
    targets: Any
    base: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    save: dict[str, Any] = field(default_factory=dict)  # arguments of save_pretrained
    refusal: str | None = None  # why it is not served
    since: tuple[int, int] = (0, 0)  # the first PEFT that computes with it what today's does


CASES: dict[str, Case] = {
    "llama": Case("llama", ["q_proj", "down_proj"]),
    "llama, all linear": Case("llama", "all-linear"),
    "llama, by pattern": Case("llama", r".*\.1\..*(q|v)_proj"),
    "llama, one layer, ranks, rsLoRA": Case(
        "llama",
        ["q_proj", "v_proj"],
        lora={"layers_to_transform": [1], "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"q_proj": 5},
              "use_rslora": True},
    ),
    "llama, embedding": Case("llama", ["embed_tokens", "v_proj"]),
    "llama, embedding, not saved": Case("llama", ["embed_tokens"], save={"save_embedding_layers": False}),
    "llama, head": Case("llama", ["lm_head", "q_proj"]),
    "llama, tied, embedding": Case("llama", ["embed_tokens"], TIED),
    "llama, tied, head": Case("llama", ["lm_head", "q_proj"], TIED),
    "llama, tied, both": Case("llama", ["embed_tokens", "lm_head"], TIED),
    "llama, tied, embeddings saved": Case("llama", ["q_proj"], TIED, save={"save_embedding_layers": True}),
    "llama, embeddings saved": Case("llama", ["q_proj"], save={"save_embedding_layers": True}),
    "gpt2": Case("gpt2", ["c_attn", "c_proj"], TIED, {"fan_in_fan_out": True}),
    "gpt2, mixed": Case("gpt2", ["c_attn", "lm_head"]),
    "gpt2, tied, mixed": Case("gpt2", ["c_attn", "wte", "lm_head"], TIED),
    "gpt2, tied, embeddings saved": Case("gpt2", ["c_fc"], TIED, save={"save_embedding_layers": True}),
    "gpt_neox": Case("gpt_neox", ["query_key_value", "dense"]),
    "gpt_neox, head": Case("gpt_neox", ["query_key_value", "embed_out", "lm_head"]),
    "gpt_neox, tied head": Case("gpt_neox", ["dense", "embed_in", "embed_out", "lm_head"], TIED),
    "gemma3_text": Case("gemma3_text", ["q_proj", "o_proj"], WINDOWS | TIED),
    # before, the embedding's own scale was not applied to the adapter's part
    "gemma3_text, embedding": Case("gemma3_text", ["embed_tokens", "q_proj"], WINDOWS | TIED, since=(0, 18)),
    "gemma3_text, head": Case("gemma3_text", ["lm_head"], WINDOWS | TIED),
    "gemma3, text": Case("gemma3", r".*language_model.*\.(q_proj|up_proj)", GEMMA_WITH_IMAGES),
    "gemma3, images as well": Case("gemma3", ["q_proj", "v_proj"], GEMMA_WITH_IMAGES),
    "gemma3, tied head": Case("gemma3", ["lm_head", "q_proj"], GEMMA_WITH_IMAGES),
    "trained embedding": Case(
        "llama", ["q_proj"], lora={"modules_to_save": ["lm_head"]}, refusal="modules_to_save: expected null"
    ),
    "DoRA": Case("llama", ["q_proj"], lora={"use_dora": True}, refusal="use_dora: expected false"),
    "biases": Case("gpt2", ["c_attn"], lora={"bias": "lora_only"}, refusal="bias: expected 'none'"),
    "biases of B": Case("llama", ["q_proj"], lora={"lora_bias": True}, refusal="lora_bias: expected false"),
    "PiSSA": Case("llama", ["q_proj"], lora={"init_lora_weights": "pissa"}, refusal="init_lora_weights: expected"),
    "trained tokens": Case(
        "llama", ["q_proj"], lora={"trainable_token_indices": [3]}, refusal="trainable_token_indices: expected null"
    ),
    "parameters": Case(
        "llama", ["q_proj"], lora={"target_parameters": ["k_proj.weight"]}, refusal="target_parameters: expected null"
    ),
    "replicated layers": Case(
        "llama", ["q_proj"], lora={"layer_replication": [[0, 2], [1, 2]]}, refusal="layer_replication: expected null"
    ),
}  # fmt: skip


def write_case(folder: Path, case: Case, seed: int = 0) -> None:
    """A bundle of two experts at `folder`, and expected.safetensors with logits [T, V] of the base and, by PEFT, under
    the first expert alone.

    Raises whatever PEFT does for what it cannot do.
    """
    generator = torch.Generator().manual_seed(seed)
    make_case_base(case, generator).save_pretrained(folder / "base")
    make_tokenizer(320).save_pretrained(folder / "base")
    sites: list[str] = []
    expected: dict[str, torch.Tensor] = {}
    for name in EXPERTS:
        base = AutoModelForCausalLM.from_pretrained(folder / "base", attn_implementation="eager").eval()
        if not expected:
            expected["base"] = compute_logits(base)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=case.targets, task_type="CAUSAL_LM", **case.lora)
        model = get_peft_model(base, config).eval()
        sites = [site for site, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)]
        randomise(model, generator)
        if "alone" not in expected:
            expected["alone"] = compute_logits(model)
        model.save_pretrained(folder / "experts" / name, **case.save)
    xlora = XLoraConfig(hidden_size=32, xlora_depth=2, xlora_size=24, layerwise_scalings=True, scaling_pass_value=0.1)
    classifier = make_classifier(xlora, sites=len(sites), experts=len(EXPERTS), generator=generator)
    entries = [(name, "", f"experts/{name}") for name in EXPERTS]
    write_bundle(folder, name="zoo", experts=entries, sites=sites, xlora=xlora, classifier=classifier)
    save_file(expected, folder / "expected.safetensors")


@torch.inference_mode()
def compute_logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0].clone()
    return logits


def make_case_base(case: Case, generator: torch.Generator) -> Any:
    """The base of a case, random."""
    if "vision_config" not in case.base:
        return make_base(
            case.architecture, hidden=32, layers=2, vocab=320, generator=generator, dtype=torch.float32,
            tokenizer=make_tokenizer(320), overrides=case.base, head=1.5,
        )  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(case.architecture, **case.base))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[-1]))
    return model


def randomise(model: Any, generator: torch.Generator) -> None:
    """Adapters that change what the base computes by about a third; nothing else that PEFT trains is changed."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.08)
            elif "lora_A" in name or "lora_embedding_A" in name:
                size = 1.0 if "embedding" in name else 1.5 / math.sqrt(parameter.shape[-1])
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


def main(folder: Path) -> None:
    """Every case that this PEFT can write; why it cannot write the others goes to failures.json."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    failures = {}
    for name, case in CASES.items():
        try:
            write_case(folder / name, case)
        except Exception as error:  # of PEFT, or of transformers, which is younger
            failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    (folder / "failures.json").write_text(json.dumps({"version": peft.__version__, "failures": failures}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
