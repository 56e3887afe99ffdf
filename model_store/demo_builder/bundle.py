"""Writes and reads the bundle's files (README.md beside the demo is the contract). Knows nothing of training."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, XLoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo_builder.domains import DESCRIPTIONS
from demo_builder.mixture import TARGETS, Shape, XLora

WEIGHTS_DTYPE = torch.bfloat16
XLORA_FIELDS = (
    "hidden_size", "enable_softmax", "enable_softmax_topk", "layerwise_scalings", "xlora_depth", "xlora_size",
    "xlora_dropout_p", "use_trainable_adapters", "softmax_temperature", "top_k_lora", "scaling_pass_value",
    "global_scaling_weight",
)  # fmt: skip


def write_json(path: Path, value: Any) -> None:
    """Writes indented UTF-8 JSON, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_bundle(out: Path, model: XLora, tokenizer: PreTrainedTokenizerFast) -> None:
    """All files except `gate_profile`, examples and report, which need the rounded weights read back first."""
    _write_base(out / "base", model, tokenizer)
    for index, name in enumerate(DESCRIPTIONS):
        _write_expert(out / "experts" / name, model, index)
    _write_classifier(out / "classifier", model)
    write_manifest(out, model.sites, None)


def _write_base(path: Path, model: XLora, tokenizer: PreTrainedTokenizerFast) -> None:
    weights = {k.replace(".linear.", "."): v for k, v in model.base.state_dict().items() if ".lora_" not in k}
    plain = LlamaForCausalLM(model.base.config)
    plain.load_state_dict(weights)
    plain = plain.to(WEIGHTS_DTYPE)  # type: ignore[arg-type]
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    plain.generation_config = GenerationConfig(**ids, do_sample=False)  # type: ignore[no-untyped-call]
    plain.save_pretrained(path)
    tokenizer.save_pretrained(path)


def _write_expert(path: Path, model: XLora, index: int) -> None:
    """An ordinary PEFT LoRA adapter."""
    config = LoraConfig(
        base_model_name_or_path="../../base",
        task_type="CAUSAL_LM",
        inference_mode=True,
        r=model.shape.rank,
        lora_alpha=model.shape.alpha,
        lora_dropout=0.0,
        target_modules=list(TARGETS),
    )
    fields = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}  # type: ignore[no-untyped-call]
    write_json(path / "adapter_config.json", fields)
    tensors: dict[str, Tensor] = {}
    for name in model.sites:
        site = model.site(name)
        tensors[f"base_model.model.{name}.lora_A.weight"] = site.lora_a[index].detach().to(WEIGHTS_DTYPE).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = site.lora_b[index].detach().to(WEIGHTS_DTYPE).contiguous()
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})


def _write_classifier(path: Path, model: XLora) -> None:
    """In fp32, the dtype it runs in whatever the base's."""
    config = XLoraConfig(
        hidden_size=model.shape.hidden,
        adapters={},
        layerwise_scalings=True,
        xlora_depth=2,
        xlora_size=model.shape.gate_size,
        xlora_dropout_p=0.0,
        enable_softmax=True,
    )
    write_json(
        path / "xlora_config.json",
        {k: getattr(config, k) for k in XLORA_FIELDS} | {"use_bias": True, "enable_relu_and_dropout": True},
    )
    tensors = {k: v.detach().float().contiguous() for k, v in model.classifier.state_dict().items()}
    save_file(tensors, path / "xlora_classifier.safetensors", metadata={"format": "pt"})


def write_manifest(out: Path, sites: list[str], gate_profile: dict[str, Any] | None) -> None:
    """bundle.json; also gives every file mode 0644 (safetensors writes 0600)."""
    files = sorted(out.rglob("*.safetensors"))
    manifest: dict[str, Any] = {
        "format_version": 1,
        "name": "demo",
        "base": "base",
        "experts": [{"name": n, "path": f"experts/{n}", "description": d} for n, d in DESCRIPTIONS.items()],
        "classifier": "classifier",
        "sites": sites,
        "sha256": {f.relative_to(out).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files},
    }
    if gate_profile is not None:
        manifest["gate_profile"] = gate_profile
    write_json(out / "bundle.json", manifest)
    for file in out.rglob("*"):
        if file.is_file():
            file.chmod(0o644)


def read_bundle(out: Path, shape: Shape) -> tuple[XLora, PreTrainedTokenizerFast]:
    """The bundle as it lies on disk, weights widened to fp32."""
    model = XLora(LlamaForCausalLM.from_pretrained(out / "base", dtype=torch.float32), shape)
    for index, name in enumerate(DESCRIPTIONS):
        tensors = load_file(out / "experts" / name / "adapter_model.safetensors")
        for site_name in model.sites:
            site = model.site(site_name)
            site.lora_a.data[index] = tensors[f"base_model.model.{site_name}.lora_A.weight"].float()
            site.lora_b.data[index] = tensors[f"base_model.model.{site_name}.lora_B.weight"].float()
    model.classifier.load_state_dict(load_file(out / "classifier" / "xlora_classifier.safetensors"))
    model.base.requires_grad_(False)
    tokenizer: Any = AutoTokenizer.from_pretrained(out / "base")
    return model, tokenizer
