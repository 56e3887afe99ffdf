"""A Serve application on a Ray cluster, for the length of one command: started, kept, drained, ended."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import ray
from ray import serve

from service.cluster.front import middlewares
from service.cluster.replica import APPLICATION, DEPLOYMENT, ClusterArguments, application, cpus_of
from service.commands.listener import bind
from service.contract.errors import SettingsError, StartupError
from service.settings import ENV_PREFIX, Settings

_SECRETS = {"api_keys", "admin_keys"}
_PROXY_CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
_OBJECT_STORE_BYTES = 128 << 20  # nothing of ours is in it
_RELOAD_SECONDS = 10.0

logger = logging.getLogger("xlora")


def run_until_signal(settings: Settings, replicas: int, max_replicas: int | None, address: str | None) -> NoReturn:
    """Serves until a signal, then drains. Raises StartupError, SystemExit on SIGTERM, KeyboardInterrupt on Ctrl-C."""
    _check_secrets(settings, address)
    port = _free_port(settings) if address is None else settings.port
    given = settings.model_dump(mode="json", exclude_unset=True, exclude=_SECRETS)
    arguments = ClusterArguments(replicas=replicas, max_replicas=max_replicas, settings=given)
    with _cluster(address, (max_replicas or replicas) * cpus_of(settings)):
        _stop_on_signals()  # Ray's own handlers would abort the process
        serve.start(
            proxy_location="EveryNode",
            http_options=_http_options(settings, port),
            controller_options={"runtime_env": {"env_vars": proxy_variables(settings)}},
        )
        try:
            _deploy(arguments)
            logger.info("%d replicas on http://%s:%s", replicas, settings.host, port)
            if settings.api_key_file is not None or settings.admin_key_file is not None:
                signal.signal(signal.SIGHUP, lambda *_: _reload_keys())
            while True:
                signal.pause()
        finally:
            serve.delete(APPLICATION)
            if address is None:
                serve.shutdown()


def proxy_variables(settings: Settings) -> dict[str, str]:
    """The environment variables that make the proxies put front.py before the replicas."""
    return {
        _PROXY_CALLBACK: f"{middlewares.__module__}.{middlewares.__name__}",
        f"{ENV_PREFIX}MAX_BODY_BYTES": str(settings.max_body_bytes),
    }


def _free_port(settings: Settings) -> int:
    """The port to listen on. Raises StartupError when it is taken: Ray would only log that."""
    with bind(settings.host, settings.port) as probe:
        port: int = probe.getsockname()[1]
        return port


def _check_secrets(settings: Settings, address: str | None) -> None:
    given = sorted(name for name in _SECRETS if getattr(settings, name) is not None)
    if address is not None and given:
        raise SettingsError(
            f"{ENV_PREFIX}{given[0].upper()} does not travel to the machines of a cluster",
            hint="use --api-key-file and --admin-key-file, paths on every machine",
        )


def _http_options(settings: Settings, port: int) -> dict[str, Any]:
    files = {name: getattr(settings, name) for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs")}
    return {"host": settings.host, "port": port, **{name: path for name, path in files.items() if path is not None}}


@contextmanager
def _cluster(address: str | None, cpus: int) -> Iterator[None]:
    """The cluster at `address`, or one of this machine alone, which is offered as many CPUs as the replicas ask for."""
    try:
        if address is not None:
            ray.init(address, log_to_driver=False)
        else:
            ray.init(
                "local",
                num_cpus=max(cpus, os.cpu_count() or 1),
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                _node_ip_address="127.0.0.1",
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise StartupError(f"no Ray cluster at {address or 'this machine'}: {error}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _deploy(arguments: ClusterArguments) -> None:
    try:
        serve.run(application(arguments), name=APPLICATION)
    except RuntimeError as error:
        raise StartupError(f"the replicas did not start: {error}") from None


def _reload_keys() -> None:
    """Has every replica read its files of keys again; each says in its log what it found."""
    handle = serve.get_deployment_handle(DEPLOYMENT, APPLICATION)
    answers = handle.broadcast("reload_keys").results(timeout_s=_RELOAD_SECONDS, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            logger.error(
                "a replica could not reload its keys and keeps the old ones: %s", getattr(answer, "cause", answer)
            )  # of a RayTaskError
    logger.info("%d of %d replicas reloaded their keys", sum(answer is None for answer in answers), len(answers))


def _stop_on_signals() -> None:
    """From now on the first SIGTERM or Ctrl-C unwinds the command, whatever it is at; a second one just ends it."""

    def stop(number: int, _: Any) -> None:
        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, signal.SIG_DFL)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(0)

    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, stop)
