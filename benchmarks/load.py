"""Load time and peak memory of a large random bundle, against transformers + PEFT on the same files.

    python -m benchmarks.load [--megabytes 1000] [--device cpu] [--work DIR]

Each side loads in a process of its own. `peak_anonymous_bytes` is how much the memory that nothing but swap can free
grew while loading, sampled every 2 ms: mapped pages of the weight files do not count, the kernel drops them when it
needs room. The bundle has several shards. `ratio` is PEFT's peak over ours in float32, which is not the dtype on disk.
Our time has reading, hashing and checking every weight file in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import ROOT, emit, print_row
from service.checkpoint import XLoraConfig, write_bundle
from service.checkpoint.formats.writer import write_adapter
from tests.support.bundles import make_tokenizer

HIDDEN, EXPERTS, TARGETS = 1024, ("math", "code", "bio", "tales"), ("q_proj", "v_proj")
SHARD = "200MB"
SIDE = """
import json, sys, threading, time
from pathlib import Path
import torch
{imports}
path, device, dtype = Path(sys.argv[1]), sys.argv[2], getattr(torch, sys.argv[3])
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))
samples, over = [anonymous()], threading.Event()
def sample():
    while not over.wait(0.002):
        samples.append(anonymous())
threading.Thread(target=sample, daemon=True).start()
started = time.perf_counter()
{load}
seconds = time.perf_counter() - started
over.set()
samples.append(anonymous())
print(json.dumps({{"seconds": seconds, "peak_anonymous_bytes": max(samples) - samples[0]}}))
"""
OURS = SIDE.format(
    imports="from service.checkpoint import load_checkpoint\nfrom service.model.loading.passes import load_model",
    load="model = load_model(load_checkpoint(path), device=torch.device(device), dtype=dtype)",
)
PEFT = SIDE.format(
    imports="from peft import PeftModel\nfrom transformers import AutoModelForCausalLM",
    load="""
base = AutoModelForCausalLM.from_pretrained(path / "base", dtype=dtype).to(device)
folders = sorted((path / "experts").iterdir())
model = PeftModel.from_pretrained(base, folders[0], adapter_name="0")
for number, folder in enumerate(folders[1:], 1):
    model.load_adapter(folder, adapter_name=str(number))
""",
)


def make(path: Path, megabytes: int) -> int:
    """A random bf16 Llama of about `megabytes` with four experts; returns the bytes of its weights."""
    layer_bytes = 2 * (4 * HIDDEN**2 + 3 * HIDDEN * 4 * HIDDEN)
    tokenizer = make_tokenizer(320)
    config = LlamaConfig(
        vocab_size=320, hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_attention_heads=16,
        num_key_value_heads=16, num_hidden_layers=max(1, megabytes * 10**6 // layer_bytes), dtype="bfloat16",
    )  # fmt: skip
    base = LlamaForCausalLM(config).to(torch.bfloat16)
    base.save_pretrained(path / "base", max_shard_size=SHARD)
    tokenizer.save_pretrained(path / "base")
    sites = [name for name, _ in base.named_modules() if name.endswith(TARGETS)]
    for name in EXPERTS:
        adapter = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": list(TARGETS)}
        adapter |= {"base_model_name_or_path": "../../base", "task_type": "CAUSAL_LM"}
        tensors = {f"base_model.model.{s}.lora_{side}.weight": _half(side) for s in sites for side in "AB"}
        write_adapter(path / "experts" / name, adapter, tensors)
    xlora = XLoraConfig(hidden_size=HIDDEN)
    gate = [(torch.randn(len(EXPERTS), HIDDEN) / 32, torch.zeros(len(EXPERTS)))]
    experts = [(name, "", f"experts/{name}") for name in EXPERTS]
    write_bundle(path, name="large", experts=experts, sites=sites, xlora=xlora, classifier=gate)
    return sum(file.stat().st_size for file in path.rglob("*.safetensors"))


def _half(side: str) -> torch.Tensor:
    return torch.randn((8, HIDDEN) if side == "A" else (HIDDEN, 8), dtype=torch.bfloat16) / 32


def run(program: str, path: Path, device: str, dtype: str) -> dict[str, float]:
    """One side in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", program, str(path), device, dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=None, help="where the bundle is made; default: a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        path = Path(work) / "large"
        size = make(path, args.megabytes)
        rows = []
        run(PEFT, path, args.device, "bfloat16")  # so that the files are in the page cache for everybody
        for dtype in ("bfloat16", "float32"):
            for side, program in (("peft", PEFT), ("ours", OURS)):
                row = {"side": side, "dtype": dtype, "weight_bytes": size}
                rows.append(row | run(program, path, args.device, dtype))
                print_row(rows[-1])
    ratio = rows[2]["peak_anonymous_bytes"] / rows[3]["peak_anonymous_bytes"]
    emit({"benchmark": "load", "ratio": ratio, "shard_bytes": 200 * 10**6, "device": args.device, "rows": rows})


if __name__ == "__main__":
    main()
