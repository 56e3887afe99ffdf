"""Writes a bundle of the published X-LoRA's shape, Zephyr-7B's, with random weights and as many layers as wanted.

Mistral, 4096 wide, 9 experts of rank 16 on all seven linears, saved in float32 as PEFT saves what it has trained, base
in bfloat16. `scale` divides all widths, for a run that only shows that everything works. The draft layer, where drafts
go deeper than one token, is random as well.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from transformers import MistralConfig

from service.checkpoint import XLoraConfig, write_bundle
from service.checkpoint.formats.writer import write_adapter
from tests.support.bundles import make_draft_layer, make_tokenizer

RANK, EXPERTS, HEADS, KV_HEADS = 16, 9, 32, 8
VOCABULARY = 32000


def make(path: Path, layers: int, scale: int = 1, draft_depth: int = 1) -> int:
    """Writes the bundle, a shard per layer. Returns the bytes of its weights."""
    hidden, inner = 4096 // scale, 14336 // scale
    kv = hidden // HEADS * KV_HEADS
    linears = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    vocabulary = max(VOCABULARY // scale, 512)
    base = path / "base"
    base.mkdir(parents=True)
    weight_map: dict[str, str] = {}

    def save(number: int, tensors: dict[str, torch.Tensor]) -> None:
        file = f"model-{number:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, base / file)
        weight_map.update(dict.fromkeys(tensors, file))

    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors = {f"{prefix}{name}.weight": _random(*shape) for name, shape in linears.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        save(
            layer + 1, tensors | {f"{prefix}{name}.weight": torch.ones(hidden, dtype=torch.bfloat16) for name in norms}
        )
    ends = {"model.embed_tokens.weight": _random(vocabulary, hidden), "lm_head.weight": _random(vocabulary, hidden)}
    save(layers + 1, ends | {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)})
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    base_config = MistralConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=32768, sliding_window=None,
        architectures=["MistralForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    base_config.save_pretrained(base)
    make_tokenizer(320).save_pretrained(base)
    sites = [f"model.layers.{layer}.{name}" for layer in range(layers) for name in linears]
    names = [f"expert_{number}" for number in range(EXPERTS)]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "task_type": "CAUSAL_LM"}
    config |= {"target_modules": [name.rpartition(".")[2] for name in linears], "base_model_name_or_path": "../../base"}
    for name in names:
        tensors = {}
        for site in sites:
            out, depth = linears[site.split(".", 3)[3]]
            for side, shape in (("A", (RANK, depth)), ("B", (out, RANK))):
                tensors[f"base_model.model.{site}.lora_{side}.weight"] = torch.randn(shape) / (4 * shape[-1] ** 0.5)
        write_adapter(path / "experts" / name, config, tensors)
    xlora = XLoraConfig.from_dict({"hidden_size": hidden, "xlora_depth": 1, "layerwise_scalings": True}, path)
    classifier = [(torch.randn(len(sites) * EXPERTS, hidden) / 64, torch.zeros(len(sites) * EXPERTS))]
    experts = [(name, "", f"experts/{name}") for name in names]
    layer = None
    if draft_depth > 1:
        layer = make_draft_layer(SimpleNamespace(config=base_config), draft_depth, torch.Generator().manual_seed(0))
    write_bundle(
        path,
        name="published-shape",
        experts=experts,
        sites=sites,
        xlora=xlora,
        classifier=classifier,
        draft_layer=layer,
    )
    return sum(file.stat().st_size for file in path.rglob("*.safetensors"))


def _random(*shape: int) -> torch.Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"  # a GPU draws them in no time
    return (torch.randn(shape, device=device) / shape[-1] ** 0.5).to("cpu", torch.bfloat16)
