"""Three Ray nodes on loopback addresses, for the length of this process: `python -m tests.cluster.nodes`.

The head runs no replica, each worker has room for one. Prints the cluster's address as JSON. For each line on stdin
it kills the processes of the oldest worker (as a machine dies) and adds a new one; ends with stdin.
"""

from __future__ import annotations

import json
import sys
from itertools import count
from typing import Any

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


def main() -> None:
    cluster = Cluster()
    numbers = count(2)
    _add(cluster, next(numbers), num_cpus=0, include_dashboard=False)
    workers = [_add(cluster, next(numbers), num_cpus=1) for _ in range(2)]
    print(json.dumps({"address": cluster.address}), flush=True)
    for _ in sys.stdin:
        cluster.remove_node(workers.pop(0), allow_graceful=False)
        workers.append(_add(cluster, next(numbers), num_cpus=1))
    cluster.shutdown()


if __name__ == "__main__":
    main()
