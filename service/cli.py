"""The command line: flags, the command they name, and how errors look.

Each command is a module of service.commands with a `run(arguments) -> int`, imported when it is chosen: `check` needs
no web server and `serve` no plots. Exit codes: 0 well, 1 an error (a line on stderr, and perhaps a hint), 2 wrong
usage, 3 the engine was lost while serving, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import get_args

from service import __version__
from service.contract.errors import XLoraError
from service.settings import REMOVED, Settings, flag_of

_ENGINE_FLAGS = (
    *("model", "base", "expert", "ordering", "gate_relu", "eos_from_tokenizer", "device", "dtype"),
    *("quantization", "max_model_len"),
    *("max_num_seqs", "max_num_batched_tokens", "kv_memory", "block_size", "threads", "tensor_parallel", "lookahead"),
    *("draft_depth", "speculative_tokens", "prefix_cache", "cuda_graphs", "native_kernels", "native_cache"),
    *("allow_outside", "log_level"),
    *REMOVED,
)
_SERVE_FLAGS = (
    *("host", "port", "max_body_bytes", "max_queued_requests", "max_queued_tokens"),
    *("json_max_characters", "json_max_items", "json_max_digits"),
    *("request_timeout", "drain_seconds", "engine_timeout", "stall_seconds", "cors_origins"),
    *("api_key_file", "admin_key_file"),
    *("ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "log_format", "otlp_endpoint"),
    *("served_model_name", "default_max_tokens", "generation_config"),
)
# Where no proxy of Ray's stands before the server.
_OWN_SOCKET_FLAGS = ("max_header_bytes", "keep_alive", "write_timeout", "drain_delay", "wanted_replicas")
PLAN_FLAGS = ("quantization", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_memory", "block_size")
_SOURCE_FLAGS = ("base", "expert", "ordering", "gate_relu", "allow_outside")
_SEVERAL = ("served_model_name",)  # flags that take several values at once
_DTYPES = ("float32", "bfloat16", "float16")
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    open_standard_streams()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as engine/worker.py: some commands load torch themselves
    arguments = build_parser().parse_args(argv)
    try:
        run: Callable[[argparse.Namespace], int] = importlib.import_module(arguments.module).run
        return run(arguments)
    except XLoraError as error:
        print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        sys.stderr.close()
        return 1


def open_standard_streams() -> None:
    """Gives a process that was started without some of them (`1>&-`) the null device.

    The next file or socket that it opens would otherwise be its standard output, or its engine's.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
            os.set_inheritable(opened, True)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (kept to the end)


def print_error(error: XLoraError) -> None:
    """One line, and a hint where there is one."""
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    """All commands and flags. A flag that is not given is None: settings then come from XLORA_* or the default."""
    parser = argparse.ArgumentParser(prog="xlora-serve", description="Serve, use and check X-LoRA bundles.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = _command(commands, "serve", "service.commands.serve", "serve a bundle over HTTP")
    _add_settings(serve, (*_ENGINE_FLAGS, *_SERVE_FLAGS, *_OWN_SOCKET_FLAGS))
    cluster = _command(commands, "cluster", "service.commands.cluster", "serve replicas of a bundle on Ray Serve")
    cluster.add_argument("--replicas", type=_positive, default=1, metavar="N", help="how many (default 1)")
    cluster.add_argument("--max-replicas", type=_positive, metavar="N", help="as many as the load needs, up to this")
    cluster.add_argument("--address", help="a running Ray cluster, as host:6379; default: one of this machine alone")
    _add_settings(cluster, (*_ENGINE_FLAGS, *_SERVE_FLAGS))
    generate = _command(commands, "generate", "service.commands.generate", "generate text in the terminal")
    _add_prompt(generate, "JSON Lines with the answers")
    _add_sampling(generate)
    generate.add_argument(
        "--scalings",
        nargs="?",
        const="mean",
        choices=("mean", "full"),
        help="colour each token by its leading expert; with --prompts, return_scalings of lines that do not say",
    )
    _add_settings(generate, _ENGINE_FLAGS)
    scalings = _command(commands, "scalings", "service.commands.scalings", "draw the gate's weights over a text")
    _add_prompt(scalings, ".npz, or JSON Lines")
    scalings.add_argument(
        "--scalings",
        choices=("mean", "full"),
        help="with --prompts: the mean over the sites (the default), or every site, for lines that do not say",
    )
    scalings.add_argument("--png", metavar="FILE", help="also save a heat map (needs the extra `plot`)")
    _add_settings(scalings, _ENGINE_FLAGS)
    check = _command(commands, "check", "service.commands.check", "check a checkpoint on disk")
    check.add_argument("directory", metavar="DIR", help="directory or hub id")
    check.add_argument("--verify", action="store_true", help="load it, and compare its numbers with those of PEFT")
    check.add_argument("--plan", action="store_true", help="print what it takes of the memory, without loading it")
    check.add_argument(
        "--gpu-memory", metavar="SIZE", help="with --plan: for a GPU with this much free, as 80GiB; none is needed"
    )
    _add_settings(check, (*_SOURCE_FLAGS, "eos_from_tokenizer", "device", "dtype", *PLAN_FLAGS))
    distill = _command(commands, "distill", "service.commands.distill", "give a bundle a draft head and a draft layer")
    distill.add_argument("directory", metavar="DIR", help="the bundle, which is changed")
    distill.add_argument(
        "--prompts",
        required=True,
        metavar="FILE",
        help='texts as users send them: a line each, or JSON Lines with {"prompt": "..."}',
    )
    distill.add_argument(
        "--max-tokens", type=_positive, default=128, metavar="N", help="most tokens to write after each (default 128)"
    )
    distill.add_argument(
        "--depth",
        type=_positive,
        default=4,
        metavar="M",
        help="tokens to draft at once (default 4); 1: with the draft head alone",
    )
    distill.add_argument("--size", type=_positive, metavar="N", help="width of the head; default: by the base's")
    distill.add_argument(
        "--layer-size", type=_positive, metavar="N", help="width of the layer's MLP; default: by the base's"
    )
    distill.add_argument(
        "--steps", type=_positive, default=3000, metavar="N", help="steps of the layer's training (default 3000)"
    )
    distill.add_argument(
        "--work",
        metavar="DIR",
        help="where texts, lessons and the training's state are kept; the same one again goes on with a killed run",
    )
    _add_settings(distill, ("base", "device", "dtype", "threads", "allow_outside"))
    convert = _command(commands, "convert", "service.commands.convert", "write any X-LoRA checkpoint as a bundle")
    convert.add_argument("source", metavar="SRC", help="a bundle, a PEFT or original X-LoRA save; directory or hub id")
    convert.add_argument("target", metavar="DST", help="the bundle's directory; must not exist or be empty")
    convert.add_argument("--reference-base", action="store_true", help="name the base where it is, do not copy it")
    convert.add_argument("--dtype", choices=_DTYPES, help="store the experts, and a copied base, in this precision")
    convert.add_argument(
        "--rescue",
        action="store_true",
        help="put back classifier tensors that PEFT >= 0.20 moved to the experts' folders",
    )
    _add_settings(convert, _SOURCE_FLAGS)
    return parser


def given_settings(arguments: argparse.Namespace) -> dict[str, object]:
    """The flags that mirror a setting, of today or of earlier versions, None where not given."""
    return {name: getattr(arguments, name, None) for name in (*Settings.model_fields, *REMOVED)}


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, module: str, summary: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.set_defaults(module=module)
    return parser


def _add_settings(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    group = parser.add_argument_group("settings", "each is also a variable: --max-model-len is XLORA_MAX_MODEL_LEN")
    for name in names:
        flag = flag_of(name)
        if name in REMOVED:  # taken, for settings.py to say what has become of it
            group.add_argument(flag, dest=name, nargs="?", const=True, help=argparse.SUPPRESS)
            continue
        field = Settings.model_fields[name]
        text = (field.description or "").replace("%", "%%")
        if field.annotation is bool:
            action = "store_false" if field.default else "store_true"
            flag = f"--no-{name.replace('_', '-')}" if field.default else flag
            text = f"do not {text}" if field.default else text
            group.add_argument(flag, dest=name, action=action, default=None, help=text)
        elif field.annotation == list[str]:
            several = "+" if name in _SEVERAL else None
            action = "extend" if several else "append"
            group.add_argument(flag, dest=name, action=action, nargs=several, metavar=name.upper(), help=text)
        else:
            choices = get_args(field.annotation) if name in ("dtype", "log_level", "log_format") else None
            default = "" if field.default is None else f" (default {field.default})"
            group.add_argument(flag, dest=name, choices=choices, metavar=name.upper(), help=text + default)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _add_prompt(parser: argparse.ArgumentParser, output: str) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="the text to begin with; - reads standard input")
    source.add_argument(
        "--prompts", metavar="FILE", help='JSON Lines: {"prompt": ...} or {"messages": ...} with other fields and an id'
    )
    parser.add_argument(
        "--output", metavar="FILE", help=f"with --prompts: {output}; what is there already is not done again"
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling", "names and meanings as in POST /generate")
    for name in ("max_tokens", "top_k", "seed"):
        group.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N")
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        group.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="X")
    group.add_argument("--stop", action="append", metavar="TEXT", help="may be given several times")
    group.add_argument("--ignore-eos", action="store_true", default=None)
