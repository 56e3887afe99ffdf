"""The command line: flags, the command they name, and how errors look.

Each command is a module of service.commands with a `run(arguments) -> int`, imported when it is chosen: `check` needs
no web server and `serve` no plots. Before that commands/preflight.py has looked at what costs no such import. Exit
codes: 0 well, 1 an error (a line on stderr, and perhaps a hint), 2 wrong usage, 3 the engine was lost while serving,
130 interrupted.
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
from service.usage import Parser

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
# Forty flags in brackets would hide the line that an error ends with.
_USAGES = {
    "serve": "[SETTINGS]",
    "cluster": "[--replicas N] [--max-replicas N] [--address HOST:PORT] [SETTINGS]",
    "generate": "(--prompt TEXT | --prompts FILE --output FILE) [--scalings [{mean,full}]] [SAMPLING] [SETTINGS]",
    "scalings": "(--prompt TEXT [--png FILE] | --prompts FILE --output FILE) [SETTINGS]",
    "check": "DIR [--verify] [--plan [--gpu-memory SIZE]] [SETTINGS]",
    "convert": "SRC DST [--reference-base] [--dtype DTYPE] [--rescue] [SETTINGS]",
}
_CHOICES = ("dtype", "log_level", "log_format")
_INTERRUPTED = 130
_SAMPLING: tuple[tuple[str, type, str, str], ...] = (
    ("max_tokens", int, "N", "most tokens to generate; default: what the context leaves"),
    ("top_k", int, "N", "sample among the N most likely tokens; 0: among all"),
    ("seed", int, "N", "the same seed gives the same text"),
    ("temperature", float, "X", "0 is greedy (default 1)"),
    ("top_p", float, "X", "sample among the most likely tokens that together have probability X"),
    ("min_p", float, "X", "sample among tokens with at least X of the likeliest one's probability"),
    ("repetition_penalty", float, "X", "divides the likelihood of tokens in prompt and output; 1: off"),
    ("presence_penalty", float, "X", "lowers the logits of tokens that are in the output"),
    ("frequency_penalty", float, "X", "lowers the logits of tokens by how often they are in the output"),
)
_METAVARS = {
    **{"model": "MODEL", "base": "MODEL", "expert": "NAME=PATH", "gate_relu": "{true,false}", "otlp_endpoint": "URL"},
    **{"host": "ADDRESS", "device": "DEVICE", "cors_origins": "ORIGINS", "served_model_name": "NAME"},
    **{"native_cache": "DIR", "quantization": "{int8,int4}", "generation_config": "auto"},
    **dict.fromkeys(("ordering", "api_key_file", "admin_key_file"), "FILE"),
    **dict.fromkeys(("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"), "FILE"),
    **dict.fromkeys(("kv_memory", "max_body_bytes", "max_header_bytes"), "SIZE"),
    **dict.fromkeys(("request_timeout", "drain_seconds", "drain_delay", "engine_timeout"), "SECONDS"),
    **dict.fromkeys(("stall_seconds", "keep_alive", "write_timeout"), "SECONDS"),
}
# Flags of vLLM, TGI and mistral.rs, where no flag of ours has a similar name, or one has that means something else.
_FLAGS_OF_OTHERS = {
    "--gpu-memory-utilization": "--kv-memory says how much memory the KV cache has",
    "--enforce-eager": "--no-cuda-graphs does that",
    "--max-tokens": "--default-max-tokens is for requests that do not say; each request has its own max_tokens",
    "--api-key": "keys are read from a file (--api-key-file) or from XLORA_API_KEYS, never from the command line",
    "--lora-modules": "the checkpoint names its experts; --expert NAME=PATH says where one is",
    "--enable-prefix-caching": "it is on without a flag; --no-prefix-cache switches it off",
    "--enable-chunked-prefill": "prompts are always computed in chunks; --max-num-batched-tokens bounds them",
    "--enable-lora": "the experts of the checkpoint are always there; leave it out",
    "--allowed-origins": "did you mean --cors-origins?",
    "--tokenizer": "the tokenizer is that of the base model; leave it out",
    "--trust-remote-code": "code of checkpoints is never run; leave it out",
    "--xlora-model-id": "--model names the X-LoRA checkpoint, --base the base model",
    "--max-concurrent-requests": "did you mean --max-num-seqs or --max-queued-requests?",
    "--num-shard": "did you mean --tensor-parallel?",
    "--workers": "one server has one engine; `xlora-serve cluster --replicas N` runs several",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    open_standard_streams()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as engine/worker.py: some commands load torch themselves
    arguments = build_parser().parse_args(argv)
    try:
        importlib.import_module("service.commands.preflight").check(arguments)
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
    parser = Parser(prog="xlora-serve", description="Serve, use and check X-LoRA models.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = _command(commands, "serve", "service.commands.serve", "serve a model over HTTP")
    _add_settings(serve, (*_ENGINE_FLAGS, *_SERVE_FLAGS, *_OWN_SOCKET_FLAGS))
    cluster = _command(commands, "cluster", "service.commands.cluster", "serve replicas of a model on Ray Serve")
    cluster.add_argument("--replicas", type=_positive, default=1, metavar="N", help="number of replicas (default 1)")
    cluster.add_argument(
        "--max-replicas", type=_positive, metavar="N", help="let the load raise the number of replicas up to this one"
    )
    cluster.add_argument(
        "--address", metavar="HOST:PORT", help="a running Ray cluster; default: start one on this machine"
    )
    _add_settings(cluster, (*_ENGINE_FLAGS, *_SERVE_FLAGS))
    _add_generate(_command(commands, "generate", "service.commands.generate", "generate text in the terminal"))
    _add_scalings(
        _command(commands, "scalings", "service.commands.scalings", "show how the gate weights the experts over a text")
    )
    check = _command(commands, "check", "service.commands.check", "check a checkpoint on disk and describe it")
    check.add_argument("directory", metavar="DIR", help="the checkpoint's directory or hub id")
    check.add_argument("--verify", action="store_true", help="also load the model and compare its numbers with PEFT's")
    check.add_argument("--plan", action="store_true", help="also print the memory it needs; loads no weights")
    check.add_argument(
        "--gpu-memory",
        metavar="SIZE",
        help="with --plan: free memory of the GPU to plan for, as 80GiB; the GPU need not be in this machine",
    )
    _add_settings(check, (*_SOURCE_FLAGS, "eos_from_tokenizer", "device", "dtype", *PLAN_FLAGS))
    _add_distill(
        _command(commands, "distill", "service.commands.distill", "give a bundle a draft head and a draft layer")
    )
    _add_convert(_command(commands, "convert", "service.commands.convert", "write any X-LoRA checkpoint as a bundle"))
    for one in (parser, *commands.choices.values()):
        one.siblings = commands.choices
    return parser


def _add_generate(parser: Parser) -> None:
    _add_prompt(parser, "the file of answers, JSON Lines")
    _add_sampling(parser)
    parser.add_argument(
        "--scalings",
        nargs="?",
        const="mean",
        choices=("mean", "full"),
        help="colour each token by its leading expert; without colours, as in a pipe, list the weights after the text. "
        "With --prompts: return_scalings of the lines that do not set it",
    )
    _add_settings(parser, _ENGINE_FLAGS)


def _add_scalings(parser: Parser) -> None:
    _add_prompt(parser, "the file of scalings, .npz or JSON Lines")
    parser.add_argument(
        "--scalings",
        choices=("mean", "full"),
        help="with --prompts: the mean over the sites (the default) or every site, for the lines that do not set "
        "return_scalings",
    )
    parser.add_argument("--png", metavar="FILE", help="also save a heat map (needs the extra `plot`)")
    _add_settings(parser, _ENGINE_FLAGS)


def _add_distill(parser: Parser) -> None:
    parser.add_argument("directory", metavar="DIR", help="the bundle, which is changed")
    parser.add_argument(
        "--prompts",
        required=True,
        metavar="FILE",
        help='texts as users send them: a line each, or JSON Lines with {"prompt": "..."}',
    )
    parser.add_argument(
        "--max-tokens", type=_positive, default=128, metavar="N", help="most tokens to write after each (default 128)"
    )
    parser.add_argument(
        "--depth",
        type=_positive,
        default=4,
        metavar="M",
        help="tokens to draft at once (default 4); 1: with the draft head alone",
    )
    parser.add_argument("--size", type=_positive, metavar="N", help="width of the head; default: by the base's")
    parser.add_argument(
        "--layer-size", type=_positive, metavar="N", help="width of the layer's MLP; default: by the base's"
    )
    parser.add_argument(
        "--steps",
        type=_positive,
        default=3000,
        metavar="N",
        help="steps of the layer's training (default 3000); the head's takes half as many",
    )
    parser.add_argument(
        "--work",
        metavar="DIR",
        help="where texts, lessons and the training's state are kept; the same one again goes on with a killed run",
    )
    _add_settings(parser, ("base", "device", "dtype", "threads", "allow_outside"))


def _add_convert(parser: Parser) -> None:
    parser.add_argument(
        "source", metavar="SRC", help="directory or hub id of a bundle, a PEFT save, or a save of the original library"
    )
    parser.add_argument("target", metavar="DST", help="directory of the new bundle; must be empty or not exist")
    parser.add_argument(
        "--reference-base", action="store_true", help="do not copy the base model: let the bundle name where it is"
    )
    parser.add_argument("--dtype", choices=_DTYPES, help="precision in which the experts and a copied base are stored")
    parser.add_argument(
        "--rescue",
        action="store_true",
        help="put back the classifier tensors that PEFT 0.20 and newer moved to the experts' folders",
    )
    _add_settings(parser, _SOURCE_FLAGS)


def given_settings(arguments: argparse.Namespace) -> dict[str, object]:
    """The flags that mirror a setting, of today or of earlier versions, None where not given."""
    return {name: getattr(arguments, name, None) for name in (*Settings.model_fields, *REMOVED)}


def _command(commands: argparse._SubParsersAction[Parser], name: str, module: str, summary: str) -> Parser:
    description = summary[0].upper() + summary[1:] + "."
    usage = f"%(prog)s {_USAGES[name]}" if name in _USAGES else None
    parser = commands.add_parser(
        name, help=summary, description=description, usage=usage, flags_of_others=_FLAGS_OF_OTHERS
    )
    parser.set_defaults(module=module)
    return parser


def _add_settings(parser: Parser, names: Sequence[str]) -> None:
    group = parser.add_argument_group(
        "settings", "each has an environment variable: --max-model-len is also XLORA_MAX_MODEL_LEN"
    )
    for name in names:
        _add_setting(group, name)


def _add_setting(group: argparse._ArgumentGroup, name: str) -> None:
    flag = flag_of(name)
    if name in REMOVED:  # taken, for settings.py to say what has become of it
        group.add_argument(flag, dest=name, nargs="?", const=True, help=argparse.SUPPRESS)
        return
    field = Settings.model_fields[name]
    text = (field.description or "").replace("%", "%%")
    metavar = _METAVARS.get(name, "N")
    if field.annotation is bool:
        action = "store_false" if field.default else "store_true"
        flag = f"--no-{name.replace('_', '-')}" if field.default else flag
        text = f"do not {text}" if field.default else text
        group.add_argument(flag, dest=name, action=action, default=None, help=text)
    elif field.annotation == list[str]:
        several = "+" if name in _SEVERAL else None
        action = "extend" if several else "append"
        group.add_argument(flag, dest=name, action=action, nargs=several, metavar=metavar, help=text)
    elif name in _CHOICES:
        shown = f"{text} (default {field.default})"
        group.add_argument(flag, dest=name, choices=get_args(field.annotation), help=shown)
    else:
        group.add_argument(flag, dest=name, metavar=metavar, help=text + _default(field.default))


def _default(value: object) -> str:
    """The end of a flag's help, for a setting whose text does not say it."""
    if value is None:
        return ""
    return f" (default {value:g})" if isinstance(value, float) else f" (default {value})"


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _add_prompt(parser: Parser, output: str) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="the prompt; - reads it from standard input")
    source.add_argument(
        "--prompts",
        metavar="FILE",
        help='a file of prompts, JSON Lines: {"prompt": ...} or {"messages": ...}, with an id and other fields of the '
        "request; needs --output",
    )
    parser.add_argument(
        "--output", metavar="FILE", help=f"with --prompts: {output}; a second run computes only what is missing in it"
    )


def _add_sampling(parser: Parser) -> None:
    group = parser.add_argument_group("sampling", "names, ranges and defaults are those of POST /generate")
    for name, kind, metavar, text in _SAMPLING:
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    group.add_argument("--ignore-eos", action="store_true", default=None, help="go on after the end-of-text token")
