"""Rank 0's side of a tensor-parallel group: starts the other ranks, sends them every step, notices when one ends.

Rank 0 is the engine's process, and the only one that knows requests, schedules and samples. The others (rank_worker.py)
run the same forwards on their shards. Steps are sent through a socket pair per rank, so an idle rank waits for a
message and not in a collective operation, which would time out. The collectives themselves use the loopback interface.

    other ranks                rank 0
    start, import torch
    hello              ->
                       <-      join: where the collectives meet
                       <-      load: the engine's options
    blocks they have room for ->
                       <-      allocate: the smallest of these numbers
                       <-      forward, forward, ...

When one rank ends, for any reason, the others are killed, and `on_lost` is called with the reason. It is called from
another thread, because the main thread may wait in a collective that never returns.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from service.contract.errors import EngineLostError, SettingsError
from service.contract.options import EngineOptions
from service.engine.tensor_parallel.rank_messages import pack, pack_batch, unpack
from service.model.batch import Batch, DraftStart
from service.model.draft_layer import Choose
from service.model.kv_cache import KVCache
from service.model.loading.parallel_plan import Ranks
from service.model.steps.step import ForwardOutput
from service.model.xlora_model import XLoraModel

logger = logging.getLogger(__name__)

_START_SECONDS = 300.0  # for the ranks to connect to each other, once all have started
_REASON_SECONDS = 5.0  # between the failure of a collective and the end of the rank that caused it
_END_SECONDS = 5.0
_CAUSE_SECONDS = 0.5  # a rank's reported failure may follow from another's crash, whose end is then noticed first


def check_options(options: EngineOptions) -> None:
    """Raises SettingsError for options that do not go together with --tensor-parallel on this machine."""
    size, gpus = options.tensor_parallel, torch.cuda.device_count()
    if options.quantization:
        raise SettingsError(f"--quantization does not go together with --tensor-parallel {size}", hint="leave one out")
    if options.device == "cpu" and gpus:
        raise SettingsError(
            "--tensor-parallel uses the GPUs where there are any, and --device is cpu",
            hint="hide them: CUDA_VISIBLE_DEVICES= (an empty variable)",
        )
    if options.device.startswith("cuda:"):
        raise SettingsError(
            f"--tensor-parallel {size} takes one GPU for each rank, and --device {options.device} is a single one",
            hint="--device cuda; CUDA_VISIBLE_DEVICES chooses which",
        )
    if (gpus or options.device == "cuda") and size > gpus:
        raise SettingsError(f"--tensor-parallel {size} needs as many GPUs, and this machine has {gpus}")


class Group:
    """The other ranks' processes. `on_lost` is called at most once, from a thread."""

    def __init__(self, size: int, on_lost: Callable[[str], None] = lambda _: None) -> None:
        self.ranks = Ranks(0, size)
        self._on_lost = on_lost
        self._reason: str | None = None
        self._decided = threading.Event()  # `_reason` is set
        self._lock = threading.Lock()
        self._closing = False
        self._joined = False
        self._others = [_Rank(rank, self._end_group) for rank in range(1, size)]

    def join(self) -> None:
        """Waits for the others to start, and sets up the collectives. Raises EngineLostError."""
        for rank in self._others:
            self.receive(rank)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            self.tell({"join": {"size": self.ranks.size, "port": port}})
            try:
                join_collectives(self.ranks, port, listener.detach())
            except (RuntimeError, OSError) as error:
                raise self.failure(error) from error
        self._joined = True

    def load(self, options: EngineOptions) -> None:
        """Tells the others to load their shards; this rank must do so at the same time."""
        self.tell({"load": asdict(options)})

    def agree_on_blocks(self, own: int) -> int:
        """The smallest number of KV blocks of all ranks, which every rank then allocates. Raises EngineLostError."""
        blocks: int = min([own, *(self.receive(rank)["blocks"] for rank in self._others)])
        self.tell({"allocate": blocks})
        return blocks

    def tell(self, message: dict[str, Any]) -> None:
        """Sends a control message to every rank."""
        self.send(pack(message))

    def send(self, frame: bytes) -> None:
        """Sends a frame to every rank. Raises EngineLostError."""
        try:
            for rank in self._others:
                rank.connection.send_bytes(frame)
        except OSError as error:
            raise self.failure(error) from error

    def receive(self, rank: _Rank) -> dict[str, Any]:
        """The next control message of a rank. Raises EngineLostError when any rank has ended."""
        while True:
            with contextlib.suppress(queue.Empty):
                return rank.messages.get(timeout=0.1)
            if self._decided.is_set():
                raise EngineLostError(self._reason or "")

    def failure(self, error: Exception) -> EngineLostError:
        """The error for a collective operation that failed here with `error`; naming a rank that has ended, if any."""
        self._decided.wait(_REASON_SECONDS)
        return EngineLostError(self._reason or f"rank 0 of {self.ranks.size} failed: {error}")

    def close(self) -> None:
        """Ends the other ranks and the collectives."""
        self._closing = True
        for rank in self._others:
            rank.end()
        if self._joined:
            dist.destroy_process_group()

    def _end_group(self, rank: int, what: str) -> None:
        """Ends the group, because a rank has ended. Called from that rank's thread."""
        with self._lock:
            if self._closing or self._reason is not None:
                return
            self._reason = f"rank {rank} of {self.ranks.size} {what}"
        self._decided.set()
        for other in self._others:
            other.process.kill()
        self._on_lost(self._reason)


class Leader:
    """The step of rank 0: sends each batch to the other ranks, and runs its own shard."""

    def __init__(self, model: XLoraModel, group: Group) -> None:
        self._model, self._group = model, group

    def forward(self, batch: Batch, kv_cache: KVCache) -> ForwardOutput:
        """Runs a batch on every rank. Raises EngineLostError for any failure: the ranks would be out of step."""
        self._group.send(pack_batch(batch))
        try:
            return self._model.forward(batch, kv_cache)
        except Exception as error:
            raise self._group.failure(error) from error

    def draft(self, start: DraftStart, choose: Choose, kv_cache: KVCache) -> Tensor:
        """Not supported: a divided model has no draft layer, because its heads would have to be divided as well."""
        raise NotImplementedError("a divided model has no draft layer")


class _Rank:
    """One of the other ranks: its process, its socket, and the thread that reads from it."""

    def __init__(self, rank: int, on_end: Callable[[int, str], None]) -> None:
        self.rank = rank
        self.messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._on_end = on_end
        ours, theirs = socket.socketpair()
        with theirs:
            module = "service.engine.tensor_parallel.rank_worker"
            command = [sys.executable, "-m", module, str(theirs.fileno()), str(rank)]
            environment = os.environ | {"LOCAL_RANK": str(rank)}  # transformers takes that GPU
            self.process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment
            )
        self.connection = Connection(ours.detach())
        self._thread = threading.Thread(target=self._listen, name=f"rank {rank}", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Kills the process; it has no state to save."""
        self.process.kill()
        self.process.wait()
        self._thread.join(_END_SECONDS)
        self.connection.close()

    def _listen(self) -> None:
        failed: str | None = None
        with contextlib.suppress(EOFError, OSError):
            while True:
                message = unpack(self.connection.recv_bytes()) or {}
                if "failed" in message:
                    failed = f"failed: {message['failed']}"
                else:
                    self.messages.put(message)
        if failed is not None:
            time.sleep(_CAUSE_SECONDS)
        self._on_end(self.rank, failed or _describe_end(self.process))


def join_collectives(ranks: Ranks, port: int, listener: int | None = None) -> None:
    """Joins this process to the group's collectives, whose store is at `port` of the loopback interface; rank 0 passes
    the `listener` socket of that port. With GPUs, each rank uses the GPU of its number.
    """
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, is_master=listener is not None, wait_for_workers=False, master_listen_fd=listener
    )
    if torch.cuda.is_available():
        device = torch.device("cuda", ranks.rank)
        torch.cuda.set_device(device)
        where = {"backend": "nccl", "device_id": device}
    else:
        # By default gloo binds to the host name's interface, which may be public, or not reachable at all.
        os.environ["GLOO_SOCKET_IFNAME"] = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
        where = {"backend": "gloo"}
    timeout = timedelta(seconds=_START_SECONDS)
    dist.init_process_group(store=store, rank=ranks.rank, world_size=ranks.size, timeout=timeout, **where)  # type: ignore[arg-type]


def _describe_end(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        return "has closed its connection"
    if code >= 0:
        return f"ended with exit code {code}"
    memory = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-code).name}{memory}"
