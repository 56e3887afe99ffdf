"""Settings: the operator's configuration, from flags and XLORA_* variables. The only reader of the environment.

A flag wins over its variable. A variable that names no setting is an error, because a typing mistake that is silently
ignored costs an operator an afternoon. This file knows no engine: the engine's own limits are checked where it loads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.contract.errors import SettingsError
from service.contract.spelling import likely

ENV_PREFIX = "XLORA_"
REMOVED = {  # settings of earlier versions, and what to do instead
    "compile": "native kernels compute whole decoder layers without it; leave it out",
    "compile_cache": f"use --native-cache or {ENV_PREFIX}NATIVE_CACHE",
}

_BYTE_UNITS = {"": 1, "b": 1} | {
    unit.lower(): factor
    for power, (binary, decimal) in enumerate([("KiB", "KB"), ("MiB", "MB"), ("GiB", "GB"), ("TiB", "TB")], start=1)
    for unit, factor in ((binary, 1024**power), (decimal, 1000**power))
}
# scheme://host:port, and the slash that an address bar adds: browsers send neither that nor the scheme's own port.
_ORIGIN = re.compile(r"(([a-z][a-z0-9+.-]*)://(?:\[[0-9a-f:.]+\]|[a-z0-9._-]+))(?::([0-9]{1,5}))?/?")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_LAST_PORT = 65535
_BYTE_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(value: object) -> object:
    """A size such as 512MiB, 2GiB, 1.5GB or a number of bytes, in bytes. Raises ValueError with the units allowed."""
    if not isinstance(value, str):
        return value
    match = _BYTE_SIZE.fullmatch(value)
    unit = match[2].lower() if match else None
    if match is None or unit not in _BYTE_UNITS:
        raise ValueError(
            f"{value!r} is not a size; write bytes or a number with KiB, MiB, GiB, KB, MB or GB, as in 512MiB"
        )
    return int(float(match[1]) * _BYTE_UNITS[unit])


def split_list(value: object) -> object:
    """A variable's text as a list: `a,b` is two. Flags that may be given several times come as lists."""
    return [part for part in value.split(",") if part] if isinstance(value, str) else value


def parse_origins(value: object) -> object:
    """Texts such as `https://a.example, http://localhost:3000` as the origins that browsers send; `*` is all of them.

    Raises ValueError for one that no browser sends: it would match nothing, and nobody would be told.
    """
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        return value
    return [_origin(one.strip().lower()) for text in texts for one in text.split(",") if one.strip()]


def _origin(text: str) -> str:
    match = _ORIGIN.fullmatch(text)
    if text in ("*", "null"):
        return text
    if match is None or int(match[3] or 0) > _LAST_PORT:
        raise ValueError(
            f"{text!r} is not an origin: a scheme and a host, perhaps a port, and no more, as https://a.example:8443; "
            "* is every origin, and no part of one"
        )
    port = int(match[3] or 0)
    return f"{match[1]}:{port}" if port not in (0, _DEFAULT_PORTS.get(match[2])) else match[1]


def check_names(names: list[str]) -> list[str]:
    """Names of the served model. Raises ValueError where two would be confused: NAME/base and NAME/EXPERT are names
    too.
    """
    for name in names:
        if not name or names.count(name) > 1 or any(name.startswith(f"{other}/") for other in names):
            raise ValueError(f"{name!r}: names are not empty, all different, and none begins with another and a slash")
    return names


ByteSize = Annotated[int, BeforeValidator(parse_bytes)]
TextList = Annotated[list[str], NoDecode, BeforeValidator(split_list)]
Origins = Annotated[list[str], NoDecode, BeforeValidator(parse_origins)]
PositiveInt = Annotated[int, Field(ge=1)]
AutoInt = Annotated[PositiveInt | None, BeforeValidator(lambda value: None if value == "auto" else value)]


class Settings(BaseSettings):
    """The operator's settings. Every field is a flag (--max-model-len) and a variable (XLORA_MAX_MODEL_LEN).

    Secrets are variables only: a command line can be read by every user of the machine.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    model: str = Field("model_store/demo", description="directory or hub id of the model to serve", min_length=1)
    base: str | None = Field(
        None, min_length=1, description="directory or hub id of the base model; default: the checkpoint's"
    )
    expert: TextList = Field(
        [], description="directory or hub id of an expert, in place of the checkpoint's; may be repeated"
    )
    ordering: str | None = Field(
        None, min_length=1, description="JSON file with the order of experts and sites, in mistral.rs's format"
    )
    gate_relu: bool | None = Field(
        None,
        description="whether the classifier has ReLU between its layers; only for a save of the original library whose "
        "files do not tell",
    )
    eos_from_tokenizer: bool = Field(
        False,
        description="also end texts at the tokenizer's eos token, where config.json or "
        "generation_config.json names others or none",
    )
    host: str = Field("127.0.0.1", description="address to listen on", min_length=1)
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="precision of the arithmetic; auto: float32 on a CPU, the checkpoint's own on a GPU"
    )
    quantization: Literal["int8", "int4"] | None = Field(
        None,
        description="keep the base model's linear weights in 8 or 4 bit (on a GPU with bitsandbytes); "
        "default: as --dtype",
    )
    max_model_len: AutoInt = Field(
        None,
        description="most tokens of prompt and output together; default, or auto: the base model's context, "
        "or what fits",
    )
    served_model_name: Annotated[TextList, AfterValidator(check_names)] = Field(
        [], description="names that requests may send as `model`; answers have the first; default: the bundle's name"
    )
    default_max_tokens: PositiveInt | None = Field(
        None, description="max_tokens of requests that do not set it; default: what the context leaves"
    )
    generation_config: Literal["auto"] | None = Field(
        None,
        description="take sampling fields that a request leaves out from the base model's generation_config.json; "
        "default: the API's own defaults",
    )
    max_num_seqs: int = Field(64, ge=1, description="most sequences that run at once")
    max_num_batched_tokens: PositiveInt | None = Field(
        None,
        description="most rows in one step, where a token takes one row in each of its two passes; default: "
        "256 on a CPU, "
        "1024 on a GPU, and at least 4 times --max-num-seqs",
    )
    kv_memory: ByteSize | None = Field(
        None,
        gt=0,
        description="memory for the KV cache, as 512MiB; default: 512MiB on a CPU, 85 % of the free memory of a GPU",
    )
    block_size: int = Field(16, ge=1, description="positions in one block of the KV cache")
    threads: PositiveInt | None = Field(None, description="CPU threads of the engine; default: all cores but one")
    tensor_parallel: int = Field(
        1,
        ge=1,
        description="number of processes among which the model is divided, each with a GPU of its own where "
        "there are GPUs",
    )
    lookahead: bool = Field(
        True, description="draft the next token in the scaling pass (it saves time and changes no token)"
    )
    draft_depth: PositiveInt | None = Field(
        None,
        description="most tokens drafted per step by the scaling pass and the bundle's draft layer "
        "(they save time and change no token); default: as many as the layer drafts",
    )
    cuda_graphs: bool = Field(True, description="capture small steps in CUDA graphs (GPU only)")
    native_kernels: bool = Field(
        True,
        description="use the C++ kernels for CPUs (they are built in the background the first time, which needs g++)",
    )
    native_cache: str = Field(
        "~/.cache/xlora-serve", description="directory that keeps the kernels built", min_length=1
    )
    speculative_tokens: int = Field(
        8,
        ge=0,
        description="most tokens drafted per step where a text repeats itself (it saves time and changes no "
        "token); 0: none",
    )
    prefix_cache: bool = Field(
        True, description="keep the KV cache of earlier prompts and answers for requests that begin alike"
    )
    max_body_bytes: ByteSize = Field(4 << 20, ge=1024, description="largest request body, as 4MiB")
    max_header_bytes: ByteSize = Field(32 << 10, ge=1024, description="largest request line and headers, as 32KiB")
    max_queued_requests: PositiveInt | None = Field(
        None,
        description="most choices that may wait beside the --max-num-seqs that run; more are refused with 429; "
        "default: half of --max-num-seqs",
    )
    max_queued_tokens: int = Field(
        131_072,
        ge=1,
        description="most prompt tokens of requests that wait for their first token; more are refused with 429",
    )
    request_timeout: float = Field(
        600.0,
        ge=1,
        le=86_400,
        description="most time for one request, in seconds; a request's own `timeout` may be shorter",
    )
    json_max_characters: int = Field(
        1024,
        ge=0,
        le=1_000_000,
        description="most characters of a string in structured output whose schema sets no limit; 0: no limit",
    )
    json_max_items: int = Field(
        32,
        ge=0,
        le=1_000_000,
        description="most items of an array, and most additional properties of an object, in structured output whose "
        "schema sets no limit; 0: no limit",
    )
    json_max_digits: int = Field(
        20, ge=0, le=1000, description="most digits of a number in structured output; 0: no limit"
    )
    write_timeout: float = Field(
        30.0,
        ge=1,
        le=86_400,
        description="seconds after which a client that reads nothing of its answer is disconnected",
    )
    keep_alive: float = Field(
        75.0,
        ge=1,
        le=3600,
        description="seconds that an idle connection stays open; a proxy in front must close its own sooner",
    )
    drain_seconds: float = Field(
        8.0, ge=0, le=3600, description="seconds that running requests may go on after SIGTERM"
    )
    drain_delay: float = Field(
        0.0,
        ge=0,
        le=3600,
        description="seconds after SIGTERM in which new requests are still served while /readyz is already "
        "503, so that a "
        "load balancer notices; --drain-seconds begin then",
    )
    engine_timeout: float = Field(
        120.0,
        ge=1,
        le=86_400,
        description="seconds without a heartbeat after which the engine counts as hung and the server ends",
    )
    stall_seconds: float = Field(
        10.0,
        ge=0.1,
        le=86_400,
        description="seconds without a step, while there is work, after which /readyz is 503 until the next "
        "one; taken as "
        "at least the time of three full steps",
    )
    wanted_replicas: int = Field(
        1, ge=1, description="number of replicas that should run; a metric of that value lets alerts find missing ones"
    )
    api_key_file: str | None = Field(None, description="file of API keys, one a line; requests then need one")
    api_keys: SecretStr | None = Field(None, description="API keys, separated by commas")
    admin_key_file: str | None = Field(
        None,
        description="file of admin keys, one a line: /metrics, /health, /info, /gate and /scalings/log then "
        "need one; all "
        "other routes take them too",
    )
    admin_keys: SecretStr | None = Field(None, description="admin keys, separated by commas")
    cors_origins: Origins = Field(
        [],
        description="origins whose web pages may call the server, separated by commas, as https://a.example; *: all; "
        "default: none",
    )
    ssl_certfile: str | None = Field(None, description="certificate chain (PEM) to serve HTTPS with")
    ssl_keyfile: str | None = Field(
        None, description="private key of the certificate (PEM), where the chain's file does not have it"
    )
    ssl_ca_certs: str | None = Field(
        None,
        description="certificates of authorities (PEM); clients must then present a certificate signed by one of them",
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="form of the log, which has a line for each request"
    )
    otlp_endpoint: str | None = Field(
        None, description="URL to which OpenTelemetry traces are sent over HTTP (needs the extra `otel`)"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe lines that are logged"
    )
    allow_outside: bool = Field(False, description="let the checkpoint name files outside its directory")

    @property
    def max_waiting(self) -> int:
        """Choices that may wait for a slot. Half the slots unless said otherwise: then who is admitted waits for at
        most half the time that a choice takes.
        """
        return max(1, self.max_num_seqs // 2) if self.max_queued_requests is None else self.max_queued_requests


def load_settings(flags: dict[str, object] | None = None) -> Settings:
    """The settings from flags over the environment over defaults. Raises SettingsError naming the flag or variable."""
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    _refuse_removed(given)
    _refuse_unknown_variables()
    try:
        return Settings(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        raise _explain(error, given) from None


def flag_of(name: str) -> str:
    """The flag of a setting that takes a value."""
    return f"--{name.replace('_', '-')}"


def _variable_of(name: str) -> str:
    return f"{ENV_PREFIX}{name.upper()}"


def _refuse_removed(flags: Mapping[str, object]) -> None:
    variables = {name.upper() for name in os.environ}
    for name, instead in REMOVED.items():
        flag, variable = flag_of(name), _variable_of(name)
        for source, is_given in ((flag, name in flags), (variable, variable in variables)):
            if is_given:
                raise SettingsError(f"{source} was removed: {instead}")


def _refuse_unknown_variables() -> None:
    known = {_variable_of(name) for name in Settings.model_fields}
    for name in os.environ:
        if name.upper().startswith(ENV_PREFIX) and name.upper() not in known:
            close = likely(name.upper(), known)
            hint = f"did you mean {close}?" if close else f"known: {', '.join(sorted(known))}"
            raise SettingsError(f"unknown environment variable {name}", hint=hint)


def _explain(error: ValidationError, flags: dict[str, object]) -> SettingsError:
    first = error.errors()[0]
    name = str(first["loc"][0])
    source = flag_of(name) if name in flags else _variable_of(name)
    reason = first["msg"].removeprefix("Value error, ").replace("Input should", "should").partition(", unable to")[0]
    described = f" {first['input']!r}" if repr(first["input"]) not in reason else ""
    field = Settings.model_fields.get(name)
    return SettingsError(f"{source}{described}: {reason}", hint=field.description if field else None)
