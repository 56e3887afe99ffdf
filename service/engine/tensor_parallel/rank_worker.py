"""The process of a tensor-parallel rank other than rank 0: loads its shard, then runs the batches that rank 0 sends.

    python -m service.engine.tensor_parallel.rank_worker FD RANK

FD is one end of a socket pair whose other end rank 0 holds (group.py). The process knows no requests and samples
nothing. It stores its shard of keys and values, but all gate rows: every rank computes whatever is not sharded, with
equal bits, because a sum over ranks has equal bits on all of them. When rank 0 ends, the socket closes, and a thread
ends this process at once.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import threading
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from service.contract.errors import XLoraError
from service.contract.options import EngineOptions
from service.engine.loader import load_checkpoint_and_model
from service.engine.sizing import Sizes, allocate_cache, divide_memory, free_device_bytes
from service.engine.tensor_parallel.group import join_collectives
from service.engine.tensor_parallel.rank_messages import pack, unpack, unpack_batch
from service.model.freed_memory import keep_freed_memory
from service.model.kv_cache import KVCache
from service.model.loading.parallel_plan import Ranks
from service.model.xlora_model import XLoraModel

logger = logging.getLogger(__name__)


class RankWorker:
    """One rank: its shard of the model and of the KV cache, on one connection to rank 0."""

    def __init__(self, rank: int, connection: Connection) -> None:
        self._rank = rank
        self._connection = connection
        self._ranks: Ranks | None = None
        self._sizes: Sizes | None = None
        self._model: XLoraModel | None = None
        self._cache: KVCache | None = None

    def run(self) -> None:
        """Serves messages of rank 0 until the connection ends (EOFError) or something fails."""
        self._send({"hello": self._rank})
        while True:
            frame = self._connection.recv_bytes()
            message = unpack(frame)
            if message is None:
                self._step(frame)
            elif "join" in message:
                self._join(**message["join"])
            elif "load" in message:
                self._load(EngineOptions(**message["load"]))
            else:
                self._allocate(message["allocate"])

    def _join(self, size: int, port: int) -> None:
        self._ranks = Ranks(self._rank, size)
        join_collectives(self._ranks, port)

    def _load(self, options: EngineOptions) -> None:
        self._model, self._cache = None, None  # frees the memory of an earlier load first
        self._model, _ = load_checkpoint_and_model(options, ranks=self._ranks)
        keep_freed_memory()
        device = self._model.device
        self._sizes = divide_memory(self._model, options, device, free_device_bytes(device))
        self._send({"blocks": self._sizes.num_blocks})

    def _allocate(self, blocks: int) -> None:
        assert self._model is not None
        assert self._sizes is not None
        self._cache = allocate_cache(self._model, replace(self._sizes, num_blocks=blocks))

    def _step(self, frame: bytes) -> None:
        assert self._model is not None
        assert self._cache is not None
        self._model.forward(unpack_batch(frame, self._cache.gate_rows.shape[1:], self._model.device), self._cache)

    def _send(self, message: dict[str, Any]) -> None:
        self._connection.send_bytes(pack(message))


def main(argv: list[str]) -> int:
    """Entry point of the process."""
    for name in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # sent to the whole process group; the API process drains
        signal.signal(name, signal.SIG_IGN)
    rank = int(argv[2])
    logging.basicConfig(level=logging.WARNING, format=f"%(levelname)s rank {rank}: %(message)s")
    connection = Connection(int(argv[1]))
    threading.Thread(target=_end_with, args=[connection.fileno()], daemon=True).start()
    try:
        RankWorker(rank, connection).run()
    except (EOFError, ConnectionError):
        return 0
    except XLoraError as error:
        connection.send_bytes(pack({"failed": str(error)}))
    except Exception as error:
        logger.exception("rank %d failed", rank)
        connection.send_bytes(pack({"failed": f"{type(error).__name__}: {error}"}))
    return 1


def _end_with(connection: int) -> None:
    """Ends this process, which may be waiting in a collective, once the other end of the socket is closed."""
    hang_up = select.poll()
    hang_up.register(connection, 0)  # no events but hang-up
    hang_up.poll()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
