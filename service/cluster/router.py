"""Which replica gets a request: Ray's consistent hashing over the session that front.py has named, with an eye on load.

Every proxy has a router of its own; they agree because the choice follows from the session and the set of replicas.
"""

from __future__ import annotations

from typing import Any

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.request_router import PendingRequest, RunningReplica


class PrefixRouter(ConsistentHashRouter):  # type: ignore[misc]  # mypy does not follow imports of ray
    """The replica of the session, unless it is `max_lead` requests busier than the least busy one."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Ray calls this with request_router_kwargs."""
        self._max_lead: int = kwargs.pop("max_lead")
        super().initialize_state(**kwargs)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The candidates in order of preference. A request without a session has a random place on the ring."""
        ranks: list[list[RunningReplica]] = await super().choose_replicas(candidate_replicas, pending_request)
        if pending_request is None or not ranks:
            return ranks
        least = min(candidate_replicas, key=self._ongoing)
        if self._ongoing(ranks[0][0]) - self._ongoing(least) >= self._max_lead:
            ranks.insert(0, [least])
        return ranks

    def _ongoing(self, replica: RunningReplica) -> int:
        """Requests at a replica as far as this router knows; one it has heard nothing of lately counts as idle."""
        return self.replica_queue_len_cache.get(replica.replica_id) or 0
