"""What 8 and 4 bit cost: perplexity, scalings and memory of a quantised base against fp32, on the bundle's own text.

    python -m benchmarks.quantisation [--model DIR] [--examples 40] [--dtype float32]

What a CPU does is measured. Perplexity is that of answers given their prompts, through the real pass; scalings drift
is the mean and the largest absolute difference to fp32 over all positions. `ratio` is int4's perplexity over fp32's.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from benchmarks.common import DEMO, emit, print_row
from service.checkpoint import load_checkpoint
from service.engine.memory_plan import weight_bytes
from service.model.loading.passes import load_model
from service.model.xlora_model import XLoraModel
from tests.support.tiny import CPU, run_once


def texts(model: Path, count: int) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) token ids of the bundle's examples."""
    tokenizer = Tokenizer.from_file(str(model / "base" / "tokenizer.json"))
    examples = json.loads((model / "examples.json").read_text())[:count]
    prompts = [tokenizer.encode(example["prompt"]).ids for example in examples]
    answers = [tokenizer.encode(example["answer"] + "\n", add_special_tokens=False).ids for example in examples]
    return list(zip(prompts, answers, strict=True))


def measure(model: XLoraModel, pairs: list[tuple[list[int], list[int]]]) -> tuple[float, Tensor]:
    """Perplexity of the answers given their prompts, and scalings [positions, S, E] of every text."""
    losses, rows = [], []
    for prompt, answer in pairs:
        logits, scalings = run_once(model, prompt + answer)
        predicted = logits[len(prompt) - 1 : -1].float().log_softmax(-1)
        losses.append(-predicted.gather(1, torch.tensor(answer)[:, None])[:, 0])
        rows.append(scalings)
    return math.exp(torch.cat(losses).mean()), torch.cat(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--examples", type=int, default=40)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    disable_progress_bar()
    torch.set_num_threads(1)
    checkpoint = load_checkpoint(arguments.model)
    pairs = texts(arguments.model, arguments.examples)
    results, reference = [], None
    for kind in (None, "int8", "int4"):
        dtype = torch.float32 if kind is None else getattr(torch, arguments.dtype)
        model = load_model(checkpoint, device=CPU, dtype=dtype, quantization=kind)
        perplexity, scalings = measure(model, pairs)
        reference = scalings if reference is None else reference
        drift = (scalings - reference).abs()
        row = {
            "base": kind or "float32",
            "perplexity": perplexity,
            "scalings_drift_mean": float(drift.mean()),
            "scalings_drift_max": float(drift.max()),
            "same_leading_expert": float((scalings.mean(1).argmax(-1) == reference.mean(1).argmax(-1)).float().mean()),
            "weight_bytes": weight_bytes(model).total,
        }
        results.append(row)
        print_row(row)
        del model
        gc.collect()
    ratio = results[2]["perplexity"] / results[0]["perplexity"]
    emit(
        {"benchmark": "quantisation", "ratio": ratio, "examples": len(pairs), "dtype": arguments.dtype, "rows": results}
    )


if __name__ == "__main__":
    main()
