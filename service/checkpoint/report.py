"""The report of `xlora-serve check DIR`: a summary of a good checkpoint, or every defect of a bad one.

Knows wording only; bundle.py reads and checks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from service.checkpoint.base import read_base
from service.checkpoint.defects import Defects, TooManyDefects, one_line
from service.checkpoint.formats.bundle import NO_OVERRIDES, Checkpoint, Expert, InspectBase, read_checkpoint
from service.checkpoint.sources import Overrides
from service.checkpoint.weights.files import BundleRoot
from service.contract.errors import CheckpointError

_LAYOUTS = {"bundle": "bundle", "PEFT": "PEFT save", "original": "checkpoint of the original library"}


def examine(
    path: Path | str,
    *,
    overrides: Overrides = NO_OVERRIDES,
    allow_outside: bool = False,
    inspect_base: InspectBase | None = None,
) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """The checkpoint at `path`, or every independent defect of it. `inspect_base` as load_checkpoint has it."""
    checkpoint, defects = None, Defects(keep_going=True)
    try:
        with defects.guard():
            checkpoint = read_checkpoint(
                path, overrides, defects, allow_outside=allow_outside, inspect_base=inspect_base
            )
    except TooManyDefects as error:
        defects.errors.append(error)
    unique = {str(error): error for error in defects.errors}
    return checkpoint, list(unique.values())


def find_problems(
    path: Path | str, *, overrides: Overrides = NO_OVERRIDES, allow_outside: bool = False
) -> list[CheckpointError]:
    """Every independent defect that the files alone show; empty when load_checkpoint accepts them."""
    return examine(path, overrides=overrides, allow_outside=allow_outside)[1]


def describe(checkpoint: Checkpoint) -> str:
    """A summary in several lines."""
    sites = checkpoint.sites or sorted({site for expert in checkpoint.experts for site in expert.weights})
    origin = "the checkpoint" if checkpoint.sites else "the experts; the model decides their order"
    lines = [
        f"X-LoRA {_LAYOUTS[checkpoint.layout]} {checkpoint.name!r} at {checkpoint.path}",
        *_base_lines(checkpoint),
        f"experts      E = {len(checkpoint.experts)}",
        *(_expert_line(expert) for expert in checkpoint.experts),
        f"sites        S = {len(sites)} ({_module_counts(sites)}), from {origin}",
        *_classifier_lines(checkpoint),
        f"gate profile {'present' if checkpoint.gate_profile else 'absent'}",
        f"draft head   {_draft_head(checkpoint)}",
        f"draft layer  {_draft_layer(checkpoint)}",
        *_weight_lines(checkpoint),
        *(f"warning      {warning}" for warning in checkpoint.warnings),
    ]
    return "\n".join(lines)


def _base_lines(checkpoint: Checkpoint) -> list[str]:
    base = read_base(BundleRoot(checkpoint.path, allow_outside=True), checkpoint.base_path, Defects())
    dtypes = Counter(info.dtype for file in base.files for info in file.tensors.values())
    text = f"{one_line(base.architecture)}, {base.parameters:,} parameters, {' + '.join(dtypes)}"
    return [f"base         {text}, hidden size {base.hidden_size}", f"             {checkpoint.base_path}"]


def _expert_line(expert: Expert) -> str:
    ranks = _range(weights.rank for weights in expert.weights.values())
    scales = _range(round(weights.scale, 6) for weights in expert.weights.values())
    alphas = _range([expert.config.get("lora_alpha", 8), *(expert.config.get("alpha_pattern") or {}).values()])
    kind = " rsLoRA" if expert.config.get("use_rslora") else ""
    parameters = sum(weights.a.shape.numel() + weights.b.shape.numel() for weights in expert.weights.values())
    text = f"rank {ranks}, alpha {alphas}{kind}, scale {scales}, {len(expert.weights)} sites"
    described = f" - {one_line(expert.description)}" if expert.description else ""
    return f"  {expert.name:<10} {text} ({_module_counts(expert.weights)}), {parameters:,} parameters{described}"


def _classifier_lines(checkpoint: Checkpoint) -> list[str]:
    layers = checkpoint.classifier.layers
    shapes = " -> ".join(str(list(weight.shape)) for weight, _ in layers)
    parameters = sum(weight.numel() + (bias.numel() if bias is not None else 0) for weight, bias in layers)
    fields = checkpoint.xlora.to_dict().items()
    head = f"classifier   {len(layers)} linear layers {shapes}, {parameters:,} parameters"
    return [head, *(f"  {name:<24} {'null' if value is None else value}" for name, value in fields)]


def _draft_head(checkpoint: Checkpoint) -> str:
    head = checkpoint.draft_head
    if head is None:
        return "absent; xlora-serve distill makes one"
    return f"{head.size} wide, {head.up.numel() + head.bias.numel() + head.down.numel():,} parameters"


def _draft_layer(checkpoint: Checkpoint) -> str:
    layer = checkpoint.draft_layer
    if layer is None:
        return "absent; xlora-serve distill makes one"
    rates = " ".join(f"{rate:.2f}".removeprefix("0") for rate in layer.agreement.tolist())
    parameters = sum(tensor.numel() for tensor in layer.tensors().values())
    return f"depth {layer.depth}, agreement {rates}, {len(layer.up)} wide, {parameters:,} parameters"


def _weight_lines(checkpoint: Checkpoint) -> list[str]:
    files = checkpoint.weight_files
    verified = sum(file.verified for file in files)
    total = sum(file.size_bytes for file in files)
    states = {len(files): "all match bundle.json", 0: "bundle.json has none to compare with"}
    hashes = states.get(verified, f"{verified} match bundle.json, {len(files) - verified} not compared")
    lines = [f"weights      {len(files)} files, {total:,} bytes; sha256: {hashes}"]
    return [*lines, f"             sha256 over all: {checkpoint.weights_sha256}"]


def _module_counts(sites: Iterable[str]) -> str:
    """`q_proj x 2, v_proj x 2`: sites by the last part of their name."""
    counts = Counter(site.rpartition(".")[2] for site in sites)
    return ", ".join(f"{name} x {count}" for name, count in counts.items())


def _range(values: Iterable[float]) -> str:
    distinct = sorted(set(values))
    return f"{distinct[0]:g}" if len(distinct) == 1 else f"{distinct[0]:g}-{distinct[-1]:g}"
