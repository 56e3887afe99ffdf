"""Three Ray nodes on loopback addresses, for the length of this process: `python -m tests.cluster.nodes`.

The head runs no replica. Prints the cluster's address as JSON; kills a worker's processes (as a machine dies) for each
line on stdin, which is its number; ends with stdin.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from ray.cluster_utils import Cluster

_STORE_BYTES = 80 << 20
_TRIES = 4


def _patiently(add: Callable[[], Any]) -> Any:
    """Ray gives a node 30 seconds to start, and a busy machine more."""
    for _ in range(_TRIES - 1):
        try:
            return add()
        except Exception as error:
            print(f"trying again: {error}", file=sys.stderr)
    return add()


def main() -> None:
    cluster = Cluster()
    added = [
        _patiently(lambda arguments=arguments: cluster.add_node(object_store_memory=_STORE_BYTES, **arguments))
        for arguments in (
            {"node_ip_address": "127.0.0.2", "num_cpus": 0, "include_dashboard": False},
            {"node_ip_address": "127.0.0.3", "num_cpus": 2},
            {"node_ip_address": "127.0.0.4", "num_cpus": 2},
        )
    ]
    workers = added[1:]
    ids = [worker.node_id for worker in workers]
    print(json.dumps({"address": cluster.address, "workers": ids}), flush=True)
    for line in sys.stdin:
        cluster.remove_node(workers[int(line)], allow_graceful=False)
        print(json.dumps({"killed": ids[int(line)]}), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
