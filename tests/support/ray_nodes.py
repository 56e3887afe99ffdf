"""Three Ray nodes on loopback addresses, for the length of this process: `python -m tests.support.ray_nodes`.

The head runs no replica, each worker has room for one. Prints the cluster's address as JSON. For each line on stdin
it kills the processes of the oldest worker (as a machine dies) and adds a new one; ends with stdin.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from itertools import count
from typing import Any

import psutil
from ray.cluster_utils import Cluster

_STORE_BYTES = 80 << 20
_TRIES = 4


def _add(cluster: Cluster, number: int, **arguments: Any) -> Any:
    """A node. Ray gives it 30 seconds to start, and a busy machine may need more."""
    given = {"node_ip_address": f"127.0.0.{number}", "object_store_memory": _STORE_BYTES, **arguments}
    for _ in range(_TRIES - 1):
        try:
            return cluster.add_node(**given)
        except Exception as error:
            print(f"trying again: {error}", file=sys.stderr)
    return cluster.add_node(**given)


def _kill(cluster: Cluster, node: Any) -> None:
    """Everything that runs on a node, at once. Ray by itself would leave the actors, and their streams, a while."""
    own = [psutil.Process(process.pid) for _, process in node.live_processes()]
    for process in [*own, *(child for one in own for child in one.children(recursive=True))]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    cluster.remove_node(node, allow_graceful=False)


def main() -> None:
    cluster = Cluster()
    numbers = count(2)
    _add(cluster, next(numbers), num_cpus=0, include_dashboard=False)
    workers = [_add(cluster, next(numbers), num_cpus=1) for _ in range(2)]
    print(json.dumps({"address": cluster.address}), flush=True)
    for _ in sys.stdin:
        _kill(cluster, workers.pop(0))
        workers.append(_add(cluster, next(numbers), num_cpus=1))
    cluster.shutdown()


if __name__ == "__main__":
    main()
