"""xlora-serve cluster: replicas of the whole server behind one port, on Ray Serve. Needs the extra `ray`."""

from __future__ import annotations

import argparse
from typing import NoReturn

from service.api import logs
from service.cli import given_settings
from service.contract.errors import SettingsError
from service.settings import load_settings

try:
    from service.cluster.launch import run_until_signal
except ModuleNotFoundError as error:
    if error.name is None or error.name.split(".")[0] != "ray":
        raise
    raise SettingsError("cluster needs Ray Serve", hint="pip install 'xlora-service[ray]'") from None


def run(arguments: argparse.Namespace) -> NoReturn:
    """Serves until a signal."""
    settings = load_settings(given_settings(arguments))
    logs.configure(settings.log_level, settings.log_format)
    run_until_signal(settings, arguments.replicas, arguments.max_replicas, arguments.address)
