"""Writes a live PEFT XLoraModel as a bundle, without PEFT's own save (which drops tensors since 0.20).

Knows the attributes of PEFT's classes and imports none of them, because a server must not need PEFT. Weights, scales
and orders are read from the modules, not from configurations, so that the bundle computes what the model computes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from service.checkpoint.config import IGNORED_FIELDS, XLoraConfig
from service.checkpoint.defects import Defects, defect
from service.checkpoint.formats.writer import expert_folder, staged, write_adapter, write_bundle
from service.checkpoint.weights.lora import check_adapter_config, ranks_and_scales

SOURCE = Path("model")  # the file name in errors


def export(
    model: nn.Module,
    tokenizer: Any,
    path: Path | str,
    *,
    expert_names: Sequence[str] | None = None,
    name: str | None = None,
    base: str | None = None,
) -> Path:
    """Write the X-LoRA model that PEFT's `get_peft_model` returned as a bundle at `path`; returns `path`.

    `expert_names` are the experts' names in the order of XLoraConfig.adapters (default: PEFT's own, "0", "1", ...);
    `tokenizer` is a fast one of transformers. The base is written too, in its own precision, unless `base` says where
    it is (a hub id, or a path, which only an operator's --allow-outside makes readable). The model stays as it was.
    Raises CheckpointError for what a bundle cannot hold exactly: DoRA, merged adapters, biases, quantised modules.
    """
    path = Path(path)
    xlora = _find_xlora(model)
    causal_lm = xlora.lora_model.model
    layers = _lora_layers(causal_lm)
    adapters = _class_order(layers)
    names = list(expert_names) if expert_names is not None else adapters
    if len(names) != len(adapters) or len(set(names)) < len(names) or not all(names):
        raise defect(SOURCE, f"expert_names: expected {len(adapters)} different names, found {names!r:.80}")
    with staged(path) as folder:
        if base is None:
            _write_base(causal_lm, folder / "base")
            tokenizer.save_pretrained(folder / "base")
        entries = []
        for number, (title, adapter) in enumerate(zip(names, adapters, strict=True)):
            where = f"experts/{expert_folder(title, number)}"
            config = xlora.lora_model.peft_config[adapter].to_dict()
            _write_live_expert(folder / where, adapter, config, layers, base)
            entries.append((title, "", where))
        write_bundle(
            folder,
            name=name or path.name,
            experts=entries,
            sites=list(layers),
            xlora=_config(xlora),
            classifier=_classifier(xlora.internal_xlora_classifier),
            base=base or "base",
        )
    return path


def _find_xlora(model: nn.Module) -> Any:
    """PEFT's XLoraModel, which may be wrapped in a PeftModel."""
    for candidate in (model, getattr(model, "base_model", None)):
        if hasattr(candidate, "internal_xlora_classifier") and hasattr(candidate, "lora_model"):
            return candidate
    raise defect(SOURCE, f"expected an X-LoRA model of PEFT, found {type(model).__name__}")


def _lora_layers(causal_lm: nn.Module) -> dict[str, Any]:
    """{site: PEFT's layer} in PEFT's numbering: row s of the classifier is layer s."""
    numbered = {}
    for site, module in causal_lm.named_modules():
        layer: Any = getattr(module.forward, "__self__", None)
        if hasattr(layer, "layer_number") and hasattr(module, "active_adapters"):
            numbered[site] = (layer.layer_number, module)
        elif hasattr(module, "lora_A"):
            raise defect(SOURCE, f"{site}: X-LoRA does not act on a {type(module).__name__}, so it cannot be written")
    return {site: module for site, (_, module) in sorted(numbered.items(), key=lambda item: item[1][0])}


def _class_order(layers: Mapping[str, Any]) -> list[str]:
    """The adapters in class order: column j of the scalings weights `active_adapters[j]`, in every layer."""
    orders = {tuple(module.active_adapters) for module in layers.values()}
    if len(orders) != 1:
        raise defect(SOURCE, f"expected the same active adapters in every layer, found {sorted(orders)!r:.120}")
    return list(orders.pop())


def _config(xlora: Any) -> XLoraConfig:
    """The configuration that the classifier uses now, since PEFT's setters change it."""
    given = dataclasses.asdict(xlora.xlora_config)
    known = {field.name for field in dataclasses.fields(XLoraConfig)}
    unknown = [key for key, value in given.items() if key not in known and key not in IGNORED_FIELDS and value]
    if unknown:
        raise defect(SOURCE, f"XLoraConfig has fields that this version does not know: {', '.join(unknown)}")
    values = {key: value for key, value in given.items() if key in known}
    values["scaling_pass_value"] = xlora.internal_xlora_classifier.override_scaling_pass_value
    return XLoraConfig.from_dict(values, SOURCE)


def _classifier(classifier: Any) -> list[tuple[Tensor, Tensor | None]]:
    return [(layer.weight, layer.bias) for layer in classifier.layers if isinstance(layer, nn.Linear)]


def _write_base(causal_lm: Any, folder: Path) -> None:
    """Writes the base under its own tensor names, without PEFT's layers around the adapted modules."""
    weights = {}
    for key, tensor in causal_lm.state_dict().items():
        if ".lora_" not in key:
            weights[key.replace(".base_layer.", ".")] = tensor
    causal_lm.save_pretrained(folder, state_dict=weights, safe_serialization=True)


def _write_live_expert(
    folder: Path, adapter: str, config: dict[str, Any], layers: Mapping[str, Any], base: str | None
) -> None:
    """Writes one adapter from the modules' own tensors and scales."""
    if base is None:
        config["init_lora_weights"] = True  # the written base contains any change that another value has made to it
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    config |= {"base_model_name_or_path": base or "../../base", "inference_mode": True}
    config["peft_type"] = "LORA"
    check_adapter_config(config, SOURCE, Defects())
    tensors: dict[str, Tensor] = {}
    settings = ranks_and_scales(config, list(layers), SOURCE)
    for site, module in layers.items():
        prefix = f"base_model.model.{site}"
        if adapter in module.lora_A:
            _check_layer(site, module, adapter)
            tensors[f"{prefix}.lora_A.weight"] = a = module.lora_A[adapter].weight
            tensors[f"{prefix}.lora_B.weight"] = module.lora_B[adapter].weight
        elif adapter in module.lora_embedding_A:
            _check_layer(site, module, adapter)
            tensors[f"{prefix}.lora_embedding_A"] = a = module.lora_embedding_A[adapter]
            tensors[f"{prefix}.lora_embedding_B"] = module.lora_embedding_B[adapter]
        else:
            continue
        if settings[site] != (a.shape[0], module.scaling[adapter]):
            _fit_scale(config, site, module.scaling[adapter], a.shape[0])
    write_adapter(folder, config, tensors)


def _check_layer(site: str, module: Any, adapter: str) -> None:
    """Refuses settings under which the layer computes anything else than its A, B and scale."""
    if module.merged:
        raise defect(SOURCE, f"{site}: expected adapters that are not merged", "call unmerge_adapter() first")
    if module.use_dora.get(adapter):
        raise defect(SOURCE, f"{site}: adapter {adapter!r} uses DoRA, which is not supported")
    sides = [side[adapter] for side in (module.lora_A, module.lora_B) if adapter in side]
    if any(side.bias is not None for side in sides):
        raise defect(SOURCE, f"{site}: adapter {adapter!r} has biases, which are not supported")


def _fit_scale(config: dict[str, Any], site: str, scale: float, rank: int) -> None:
    """Makes the patterns of `config` give this rank and scale at `site`, where they were changed after training."""
    key = site.replace(".", r"\.")
    config["rank_pattern"] = {key: rank, **(config.get("rank_pattern") or {})}
    config["alpha_pattern"] = {key: scale * (rank**0.5 if config["use_rslora"] else rank), **config["alpha_pattern"]}
