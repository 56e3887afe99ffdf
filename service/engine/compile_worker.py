"""The process that compiles the decode step: loads the model once more, compiles, ends.

    python -m service.engine.compile_worker PATH < EngineOptions as one line of JSON

It runs at the lowest priority, and dies when its standard input closes: no parent, no use.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import torch

from service.engine.loader import load_checkpoint_and_model
from service.engine.options import EngineOptions
from service.model.compiled import compile_step


def main(path: str) -> None:
    """Compiles into `path`. Any exception ends the process; its last line says why."""
    os.nice(19)
    options = EngineOptions(**json.loads(sys.stdin.buffer.readline()))
    threading.Thread(target=_die_with_parent, daemon=True).start()
    model, _ = load_checkpoint_and_model(options)
    compile_step(model, model.kv_layout(options.block_size), Path(path), torch.get_num_threads())


def _die_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # unbuffered: a lock held by this thread would spoil the exit of the process
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
