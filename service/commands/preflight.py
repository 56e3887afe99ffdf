"""Mistakes of the operator that show without loading anything, found before a command's own imports take seconds.

Looks at flags, files of keys and certificates, the port, and whether there is a checkpoint whose JSON can be read. All
else is checked where it is used: a checkpoint that passes here may still be refused.
"""

from __future__ import annotations

import argparse
import json
import re
import ssl
from pathlib import Path

from service.api.middleware.keys import Keys
from service.cli import given_settings
from service.commands.listener import bind
from service.contract.errors import CheckpointError, SettingsError, StartupError
from service.settings import Settings, load_settings

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_PLACE = {"check": "directory", "distill": "directory", "convert": "source"}  # the argument that names a checkpoint
_MANIFESTS = ("bundle.json", "xlora_config.json", "adapter_config.json")  # one of them makes a folder a checkpoint
_PARTS = ("classifier/xlora_config.json", "base/config.json", "experts/*/adapter_config.json")
_KINDS = "a bundle has bundle.json, a PEFT save adapter_config.json, a save of the original library xlora_config.json"


def check(arguments: argparse.Namespace) -> None:
    """Raises StartupError for the first mistake."""
    settings = load_settings(given_settings(arguments))
    if arguments.command in ("serve", "cluster"):
        check_keys(settings)
        check_tls(settings)
    check_parts(settings)
    if arguments.command in ("serve", "cluster", "generate", "scalings"):
        check_model(settings.model)
    elif arguments.command in _PLACE:
        check_folder(Path(getattr(arguments, _PLACE[arguments.command])))
    if arguments.command == "serve":
        bind(settings.host, settings.port).close()


def check_keys(settings: Settings) -> None:
    """Raises SettingsError for keys that cannot be read."""
    Keys(settings.api_key_file, settings.api_keys, "api-key")
    Keys(settings.admin_key_file, settings.admin_keys, "admin-key")


def check_tls(settings: Settings) -> None:
    """Raises SettingsError, naming the flag, for TLS files that do not work."""
    if settings.ssl_certfile is None:
        if settings.ssl_keyfile or settings.ssl_ca_certs:
            raise SettingsError("--ssl-keyfile and --ssl-ca-certs need --ssl-certfile")
        return
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        _check_readable(f"--{name.replace('_', '-')}", getattr(settings, name))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile)
    except (OSError, ValueError) as error:
        key = settings.ssl_keyfile or settings.ssl_certfile
        raise SettingsError(
            f"--ssl-certfile {settings.ssl_certfile}: no certificate chain with the private key of {key}: {error}",
            hint="both are PEM files; --ssl-keyfile names the key's, where the chain's file does not have it",
        ) from None
    if settings.ssl_ca_certs is not None:
        try:
            context.load_verify_locations(settings.ssl_ca_certs)
        except (OSError, ValueError) as error:
            raise SettingsError(f"--ssl-ca-certs {settings.ssl_ca_certs}: no PEM certificates: {error}") from None


def _check_readable(flag: str, file: str | None) -> None:
    if file is None:
        return
    try:
        with open(file, "rb"):
            pass
    except OSError as error:
        raise SettingsError(f"{flag} {file} cannot be read: {error.strerror}") from None


def check_model(model: str) -> None:
    """Raises StartupError for a folder that is not there or no checkpoint, and for JSON that cannot be parsed.

    What has the form of a hub id is left to whoever downloads it.
    """
    folder = Path(model)
    if model == Settings.model_fields["model"].default and not folder.exists():
        raise StartupError(
            f"no {model} in {Path.cwd()}: that is the demo, which is served where no other model is named",
            hint="name a model with --model or XLORA_MODEL, a directory or a hub id; the demo is in the repository of "
            "this service: run the command in its directory, or give the path",
        )
    check_folder(folder)
    if folder.is_dir():
        if not any((folder / name).exists() for name in _MANIFESTS):
            raise CheckpointError(f"{folder}: expected an X-LoRA checkpoint, found none of its files", hint=_KINDS)
        for pattern in (*_MANIFESTS, *_PARTS):
            for file in sorted(folder.glob(pattern)):
                _check_json(file)


def check_parts(settings: Settings) -> None:
    """Raises SettingsError, naming the flag, for a base, an expert or an ordering that is not there."""
    places = {} if settings.base is None else {"--base": settings.base}
    for text in settings.expert:
        name, equals, place = text.partition("=")
        flag = f"--expert {name}"
        if not (name and equals and place) or flag in places:
            problem = "is given twice" if flag in places else "should be NAME=PATH"
            raise SettingsError(f"--expert {text!r} {problem}", hint="for example --expert math=/models/math")
        places[flag] = place
    for flag, place in places.items():
        if not _is_place(Path(place)):
            raise SettingsError(f"{flag}: expected a directory or a hub id, found {place!r}")
    _check_readable("--ordering", settings.ordering)


def _is_place(folder: Path) -> bool:
    """Whether something may be there: a folder, or what has the form of a hub id."""
    return folder.is_dir() or (not folder.exists() and _HUB_ID.fullmatch(str(folder)) is not None)


def check_folder(folder: Path) -> None:
    """Raises CheckpointError for a path that is neither a folder nor a hub id."""
    if _is_place(folder):
        return
    found = "a file" if folder.exists() else "nothing"
    raise CheckpointError(
        f"{folder}: expected the directory of a checkpoint, found {found}",
        hint="give a directory, or a hub id as owner/name[@revision]",
    )


def _check_json(file: Path) -> None:
    try:
        json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: not readable: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{file}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        ) from None
    except (ValueError, RecursionError):
        return  # its encoding, or its depth: the reader of checkpoints has words for it
