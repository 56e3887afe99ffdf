"""One replica: the whole application with its engine process, as `serve` runs it, inside an actor of Ray Serve.

Knows how Ray starts, checks, measures and ends a replica; the application knows nothing of Ray. Plain settings cross
to the actor; keys do not, they come from files or variables of its machine.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig, RequestRouterConfig

from service.api import logs
from service.api.middleware.keys import reload
from service.api.state import Service
from service.commands.serve import assemble
from service.contract.errors import SettingsError
from service.settings import Settings, load_settings

APPLICATION = "xlora"
DEPLOYMENT = "Replica"

_POLL_SECONDS = 0.05
_DRAIN_POLL_SECONDS = 0.5  # Ray logs a line each time
_SCRAPE_SECONDS = 5.0
_PROBES = 8  # requests that wait for nothing: probes and scrapes
_HEALTH_PERIOD_SECONDS = 1.0
_CLOSE_SECONDS = 2.0  # between the last answer and the end of the engine's process

logger = logging.getLogger("xlora")


class ClusterArguments(BaseModel):
    """The `args` of a Serve config file; what `xlora-serve cluster` makes of its flags."""

    model_config = ConfigDict(extra="forbid")

    replicas: int = Field(1, ge=1)
    max_replicas: int | None = Field(None, ge=1)  # more than `replicas`: as many as the load needs, up to this
    settings: dict[str, Any] = {}


class Replica:
    """The replica, as Ray calls it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """Raises SettingsError."""
        self._settings = load_settings(settings)
        logs.configure(self._settings.log_level, self._settings.log_format)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application; Ray runs its lifespan."""
        app, self._spans = assemble(self._settings)
        self._service: Service = app.state.service
        self._service.scrape = self._scrape_all
        return app

    async def check_health(self) -> None:
        """Ray asks before it sends the first request, and again and again. Raises what is wrong."""
        while self._service.state == "loading":
            await asyncio.sleep(_POLL_SECONDS)
        if self._service.error is not None:
            raise self._service.error

    async def collect(self) -> tuple[str, list[Metric]]:
        """This replica's id and metrics."""
        return serve.get_replica_context().replica_id.unique_id, list(self._service.metrics.registry.collect())

    async def reload_keys(self) -> None:
        """Takes the keys as the files of this machine have them now. Raises SettingsError, and keeps those it had."""
        logger.info("reloaded keys (%s)", reload(self._service.keys) or "none")

    async def _scrape_all(self) -> bytes:
        """The metrics of every replica, whichever of them is asked. One that does not answer is left out."""
        handle = serve.get_deployment_handle(DEPLOYMENT, serve.get_replica_context().app_name)
        response = handle.broadcast("collect")
        answers = await response.results_async(timeout_s=_SCRAPE_SECONDS, return_exceptions=True)
        return merged(dict(answer for answer in answers if not isinstance(answer, BaseException)))

    async def __del__(self) -> None:
        for span in self._spans:
            await asyncio.to_thread(span.close)


class _Merged(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def merged(metrics: Mapping[str, Iterable[Metric]]) -> bytes:
    """The metrics of several replicas as one text: every series has its replica's id in the label `replica`."""
    families: dict[str, Metric] = {}
    for replica, collected in metrics.items():
        for metric in collected:
            family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
            family.samples += [
                sample._replace(labels={**sample.labels, "replica": replica}) for sample in metric.samples
            ]
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Merged(families.values()))
    return generate_latest(registry)


def application(given: ClusterArguments | dict[str, Any]) -> serve.Application:
    """The application that a Serve config file names, with its args as they are. Raises SettingsError."""
    arguments = ClusterArguments.model_validate(given)
    settings = load_settings(arguments.settings)
    gpus = settings.device.startswith("cuda") or (settings.device == "auto" and "GPU" in ray.cluster_resources())
    room = settings.max_num_seqs + settings.max_waiting
    options: dict[str, Any] = {
        **_scale(arguments, settings),
        "max_ongoing_requests": room + _PROBES,
        # Ray calls a request queued until a replica has taken it, so with less it would refuse bursts that have room.
        "max_queued_requests": room * (arguments.max_replicas or arguments.replicas),
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=1),
        "graceful_shutdown_timeout_s": settings.drain_seconds + _CLOSE_SECONDS,
        "graceful_shutdown_wait_loop_s": _DRAIN_POLL_SECONDS,
        "health_check_period_s": _HEALTH_PERIOD_SECONDS,
        "request_router_config": RequestRouterConfig(
            request_router_class="service.cluster.router.PrefixRouter",
            request_router_kwargs={"max_lead": max(1, settings.max_num_seqs // 4)},
        ),
        "ray_actor_options": {"num_cpus": cpus_of(settings), "num_gpus": settings.tensor_parallel if gpus else 0},
    }
    return serve.deployment(name=DEPLOYMENT, **options)(serve.ingress()(Replica)).bind(
        {**arguments.settings, "threads": settings.threads or 1, "wanted_replicas": arguments.replicas}
    )


def cpus_of(settings: Settings) -> int:
    """The CPUs of one replica: the threads of all its ranks."""
    return (settings.threads or 1) * settings.tensor_parallel


def _scale(arguments: ClusterArguments, settings: Settings) -> dict[str, Any]:
    """A fixed number of replicas, or bounds between which Ray keeps half of each one's slots taken."""
    most = arguments.max_replicas or arguments.replicas
    if most < arguments.replicas:
        raise SettingsError(f"--max-replicas {most} is less than --replicas {arguments.replicas}")
    if most == arguments.replicas:
        return {"num_replicas": most}
    config = AutoscalingConfig(
        min_replicas=arguments.replicas,
        max_replicas=most,
        target_ongoing_requests=max(1, settings.max_num_seqs // 2),
        upscale_delay_s=10,
        downscale_delay_s=120,
    )
    return {"autoscaling_config": config}
