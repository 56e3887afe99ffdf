"""Three Ray nodes on loopback addresses, for the length of this process: `python -m tests.cluster.nodes`.

The head runs no replica. Prints the cluster's address as JSON; kills a worker's processes (as a machine dies) for each
line on stdin, which is its number; ends with stdin.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from ray.cluster_utils import Cluster

_STORE_BYTES = 80 << 20


def main() -> None:
    common: dict[str, Any] = {"object_store_memory": _STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "node_ip_address": "127.0.0.2", **common})
    workers = [
        cluster.add_node(num_cpus=2, node_ip_address=address, object_store_memory=_STORE_BYTES)
        for address in ("127.0.0.3", "127.0.0.4")
    ]
    ids = [worker.node_id for worker in workers]
    print(json.dumps({"address": cluster.address, "workers": ids}), flush=True)
    for line in sys.stdin:
        cluster.remove_node(workers[int(line)], allow_graceful=False)
        print(json.dumps({"killed": ids[int(line)]}), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
