"""One rank of a tensor-parallel group without an engine: runs texts through its part of each bundle, saves what came.

python -m tests.support.tensor_parallel_rank RANK SIZE PORT OUT BUNDLE...
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from service.checkpoint import load_checkpoint
from service.model.loading.parallel_plan import Ranks
from service.model.loading.passes import load_model
from service.model.xlora_model import XLoraModel
from tests.support.driver import words
from tests.support.tiny import CPU, OneRequest

LENGTH, CHUNKS = 24, (10, 1, 1, 12)


def matrix_bytes(model: XLoraModel) -> int:
    """Of the base's weight matrices, those that are one counted once."""
    matrices = [parameter for parameter in model.causal_lm.parameters() if parameter.dim() == 2]
    return sum({matrix.data_ptr(): matrix.nbytes for matrix in matrices}.values())


def main(ranks: Ranks, port: int, out: Path, bundles: list[Path]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, ranks.size, is_master=False)
    dist.init_process_group("gloo", store=store, rank=ranks.rank, world_size=ranks.size)
    for bundle in bundles:
        model = load_model(load_checkpoint(bundle), device=CPU, dtype=torch.float32, ranks=ranks)
        request = OneRequest(model, LENGTH)
        logits, scalings = request.run(words(5, LENGTH), CHUNKS)
        found = {"logits": logits, "scalings": scalings.contiguous(), "gate_rows": request.cache.gate_rows}
        found["kv_heads"] = torch.tensor(request.cache.keys[0].shape[2])
        found["matrix_bytes"] = torch.tensor(matrix_bytes(model))
        save_file(found, out / f"{bundle.name}.{ranks.rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Ranks(int(sys.argv[1]), int(sys.argv[2])), int(sys.argv[3]), Path(sys.argv[4]), [*map(Path, sys.argv[5:])])
