"""A bundle of the published X-LoRA's shape behind the real server with default flags: is it ready, in which memory?

    python -m benchmarks.real_size [--layers 6] [--work DIR] [-- FLAGS OF SERVE]

Zephyr-7B's shape (Mistral, 4096 wide, 9 experts of rank 16 on all seven linears, saved in float32, base in bfloat16)
with random weights and `--layers` of its 32 layers. `peak_bytes` is the sum of VmHWM over the server's processes, pages
of mapped files included; `files_bytes` all weight files. The answer is one streamed request, its first token apart.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import MistralConfig

from benchmarks.common import ROOT, emit, print_row
from service.checkpoint import XLoraConfig, write_bundle
from service.checkpoint.formats.writer import write_adapter
from tests.support.bundles import make_tokenizer

HIDDEN, INNER, KV, VOCABULARY, RANK, EXPERTS = 4096, 14336, 1024, 32000, 16, 9
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
_READY_SECONDS = 900.0


def make(path: Path, layers: int) -> int:
    """Writes the bundle, a shard per layer. Returns the bytes of its weights."""
    base = path / "base"
    base.mkdir(parents=True)
    weight_map: dict[str, str] = {}

    def save(number: int, tensors: dict[str, torch.Tensor]) -> None:
        file = f"model-{number:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, base / file)
        weight_map.update(dict.fromkeys(tensors, file))

    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors = {f"{prefix}{name}.weight": _random(*shape) for name, shape in LINEARS.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        save(
            layer + 1, tensors | {f"{prefix}{name}.weight": torch.ones(HIDDEN, dtype=torch.bfloat16) for name in norms}
        )
    ends = {"model.embed_tokens.weight": _random(VOCABULARY, HIDDEN), "lm_head.weight": _random(VOCABULARY, HIDDEN)}
    save(layers + 1, ends | {"model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)})
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    MistralConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=32768, sliding_window=None,
        architectures=["MistralForCausalLM"], dtype="bfloat16",
    ).save_pretrained(base)  # fmt: skip
    make_tokenizer(320).save_pretrained(base)
    sites = [f"model.layers.{layer}.{name}" for layer in range(layers) for name in LINEARS]
    names = [f"expert_{number}" for number in range(EXPERTS)]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "task_type": "CAUSAL_LM"}
    config |= {"target_modules": [name.rpartition(".")[2] for name in LINEARS], "base_model_name_or_path": "../../base"}
    for name in names:
        tensors = {}
        for site in sites:
            out, depth = LINEARS[site.split(".", 3)[3]]
            for side, shape in (("A", (RANK, depth)), ("B", (out, RANK))):
                tensors[f"base_model.model.{site}.lora_{side}.weight"] = torch.randn(shape) / (4 * shape[-1] ** 0.5)
        write_adapter(path / "experts" / name, config, tensors)
    xlora = XLoraConfig.from_dict({"hidden_size": HIDDEN, "xlora_depth": 1, "layerwise_scalings": True}, path)
    classifier = [(torch.randn(len(sites) * EXPERTS, HIDDEN) / 64, torch.zeros(len(sites) * EXPERTS))]
    experts = [(name, "", f"experts/{name}") for name in names]
    write_bundle(path, name="published-shape", experts=experts, sites=sites, xlora=xlora, classifier=classifier)
    return sum(file.stat().st_size for file in path.rglob("*.safetensors"))


def _random(*shape: int) -> torch.Tensor:
    return (torch.randn(shape) / shape[-1] ** 0.5).to(torch.bfloat16)


def peak_bytes(process: int) -> int:
    """VmHWM of a process and all its descendants."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    own = next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return own + sum(peak_bytes(int(child)) for child in children)


def serve(path: Path, flags: list[str]) -> dict[str, Any]:
    """The server from its start to a streamed answer and SIGTERM."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "service", "serve", "--model", str(path), "--port", str(port), *flags]
    url, started = f"http://127.0.0.1:{port}", time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=None) as server:
        try:
            while not _is_ready(url):
                if server.poll() is not None or time.perf_counter() - started > _READY_SECONDS:
                    raise SystemExit(f"the server did not become ready (exit code {server.returncode})")
                time.sleep(0.25)
            row: dict[str, Any] = {"ready_seconds": time.perf_counter() - started, "peak_bytes": peak_bytes(server.pid)}
            row |= stream(url) | {"peak_bytes_after": peak_bytes(server.pid)}
        finally:
            server.terminate()
            code = server.wait(60)
    return row | {"exit_code": code}


def stream(url: str) -> dict[str, float]:
    """Tokens per second of one answer after its first token."""
    body = {"prompt": "What is an expert?", "max_tokens": 24, "temperature": 0, "stream": True, "ignore_eos": True}
    request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"})
    started, times = time.perf_counter(), []
    with urllib.request.urlopen(request, timeout=_READY_SECONDS) as answer:
        for line in answer:
            if b'"token_ids"' in line:
                times.append(time.perf_counter())
    first, last = times[0], times[-1]
    return {"first_token_seconds": first - started, "tokens_per_second": (len(times) - 1) / (last - first)}


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5):
            return True
    except OSError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--work", type=Path, default=None, help="where the bundle is made; default: a temporary folder")
    parser.add_argument("flags", nargs="*", help="flags of serve, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        path = Path(work) / "bundle"
        files = make(path, args.layers)
        row = {"layers": args.layers, "files_bytes": files} | serve(path, args.flags)
    row["peak_over_files"] = row["peak_bytes"] / files
    print_row(row)
    emit({"benchmark": "real_size", "flags": args.flags, "rows": [row]})


if __name__ == "__main__":
    main()
