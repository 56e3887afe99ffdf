"""The tables of configuration.md and api.md, written from the settings, the request bodies and the routes.

python docs/reference.py           writes them again between their marks; a test fails where they are stale

Knows how a setting and a field of a body are described; knows nothing of what they do.
"""

import json
import re
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from prometheus_client import CollectorRegistry
from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from service.api.app import create_app
from service.api.schemas.answers import GenerateAnswer, Output, Scalings, ScalingsAnswer, Usage
from service.api.schemas.bodies import (
    CompareBody,
    CompareSetting,
    DetokenizeBody,
    GateBody,
    GenerateBody,
    LogBody,
    ScalingsBody,
    Select,
    TokenizeBody,
)
from service.api.schemas.fields import (
    Experts,
    Gate,
    JsonSchema,
    OneTextFields,
    ResponseFormat,
    SamplingFields,
    XLoraFields,
)
from service.api.schemas.openai import ChatBody, CompletionBody, StreamOptions
from service.client.engine_client import EngineClient
from service.contract.request import SamplingParams
from service.observability.metrics import Metrics
from service.settings import ENV_PREFIX, Settings, flag_of

DOCS = Path(__file__).parent
SUBJECTS = {
    "The model": (
        *("model", "base", "expert", "ordering", "gate_relu", "eos_from_tokenizer", "allow_outside"),
        *("served_model_name", "max_model_len", "generation_config", "default_max_tokens"),
    ),
    "The engine": (
        *("device", "dtype", "quantization", "tensor_parallel", "threads", "kv_memory", "block_size"),
        *("max_num_seqs", "max_num_batched_tokens", "prefix_cache", "lookahead", "draft_depth", "speculative_tokens"),
        *("cuda_graphs", "native_kernels", "native_cache"),
    ),
    "Requests": (
        *("max_queued_requests", "max_queued_tokens", "request_timeout", "max_body_bytes"),
        *("json_max_characters", "json_max_items", "json_max_digits"),
    ),
    "Connections": (
        *("host", "port", "max_header_bytes", "keep_alive", "write_timeout", "cors_origins"),
        *("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"),
    ),
    "Keys": ("api_key_file", "api_keys", "admin_key_file", "admin_keys"),
    "Health, stopping, logs": (
        *("drain_seconds", "drain_delay", "engine_timeout", "stall_seconds", "wanted_replicas"),
        *("log_format", "log_level", "otlp_endpoint"),
    ),
}
OTHERS = "Others"  # settings that no subject above names
BODIES = {
    "generate": GenerateBody,
    "xlora": XLoraFields,
    "experts": Experts,
    "gate": Gate,
    "response_format": ResponseFormat,
    "json_schema": JsonSchema,
    "completions": CompletionBody,
    "chat": ChatBody,
    "stream_options": StreamOptions,
    "scalings": ScalingsBody,
    "select": Select,
    "compare": CompareBody,
    "settings": CompareSetting,
    "patch_gate": GateBody,
    "scalings_log": LogBody,
    "tokenize": TokenizeBody,
    "detokenize": DetokenizeBody,
}
ANSWERS = {
    "answer": GenerateAnswer,
    "output": Output,
    "scalings_rows": Scalings,
    "usage": Usage,
    "scalings_answer": ScalingsAnswer,
}
# Whose fields are in the table of POST /generate already.
SHARED = {"completions": SamplingFields, "chat": SamplingFields, "compare": OneTextFields}
# Defaults that neither a field's description nor the engine's parameters say.
DEFAULTS = {
    ("generate", "min_p"): "0 (off)",
    ("generate", "seed"): "drawn below 2^53, and returned",
    ("generate", "timeout"): "`--request-timeout`, which is also the most",
    ("generate", "scalings_start"): "the position that produced the first generated token",
    ("gate", "temperature"): "the checkpoint's",
    ("gate", "top_k"): "the checkpoint's",
    ("completions", "max_tokens"): "as in `POST /generate`",
    ("completions", "best_of"): "`n`",
    ("chat", "add_generation_prompt"): "`true`, or `false` with `continue_final_message`",
    ("scalings", "granularity"): "token",
    ("select", "stop"): "the end of the text",
    **{("select", name): "all" for name in ("sites", "layers", "module_types", "experts")},
    **{("patch_gate", name): "unchanged" for name in GateBody.model_fields},
}
_WHEN_ABSENT = re.compile(r"\bWhen absent, ([^;.]+)")
_ABSENT = re.compile(r"(?:^|(?<=[;.] ))([^;.]{1,60}?) when absent(?:[;.]|$)")
_DEFAULT = re.compile(r"; default(?:, or auto)?: ([^;]+)$")
_SIZES = {"max_body_bytes": "4 MiB", "max_header_bytes": "32 KiB"}


def configuration() -> dict[str, str]:
    """The tables of configuration.md, by the name of their mark."""
    named = {name for names in SUBJECTS.values() for name in names}
    others = tuple(name for name in Settings.model_fields if name not in named)
    subjects = SUBJECTS | ({OTHERS: others} if others else {})
    return {"settings": "\n".join(f"### {subject}\n\n{_settings(names)}" for subject, names in subjects.items())}


def _settings(names: tuple[str, ...]) -> str:
    rows = [_setting(name, Settings.model_fields[name]) for name in names]
    return _table(("flag", "variable", "default", "meaning"), rows)


def _setting(name: str, field: FieldInfo) -> tuple[str, str, str, str]:
    meaning = field.description or ""
    default = "none" if field.default in (None, []) else f"`{field.default}`"
    flag, variable = f"`{flag_of(name)}`", f"`{ENV_PREFIX}{name.upper()}`"
    if field.default is None and "; auto: " in meaning:
        default = "`auto`"
    if found := _DEFAULT.search(meaning):
        meaning, default = meaning[: found.start()], found[1]
    values = [str(one).lower() for one in _values(field.annotation)]
    if not all(value in meaning for value in values):
        meaning = f"{meaning} ({', '.join(f'`{value}`' for value in values)})"
    if field.annotation is bool:
        default = "on" if field.default else "off"
        flag = f"`--no-{name.replace('_', '-')}`" if field.default else flag
        variable = f"`{ENV_PREFIX}{name.upper()}={str(not field.default).lower()}`"
    if "Secret" in str(field.annotation):  # a command line can be read by every user of the machine
        flag = "no flag"
    return flag, variable, _SIZES.get(name, default.replace(".0`", "`")), _cell(meaning)


def _values(annotation: Any) -> tuple[Any, ...]:
    """All that a setting may be, where these are few words."""
    if annotation == bool | None:
        return True, False
    parts = get_args(annotation)
    return parts if get_origin(annotation) is Literal else next((got for one in parts if (got := _values(one))), ())


def api() -> dict[str, str]:
    """The tables of api.md, by the names of their marks."""
    bodies = {name: _body(name, body) for name, body in BODIES.items()}
    return {"routes": _routes()} | bodies | {name: _answer(answer) for name, answer in ANSWERS.items()}


def _routes() -> str:
    paths = create_app(EngineClient(), Settings(), Metrics(CollectorRegistry())).openapi()["paths"]
    rows = [
        (f"`{method.upper()} {path}`", operation["summary"])
        for path, operations in paths.items()
        for method, operation in operations.items()
    ]
    return _table(("route", "what it is for"), rows)


def _body(name: str, body: type[BaseModel]) -> str:
    schema = body.model_json_schema()
    definitions = schema.get("$defs", {})
    shared = SHARED[name].model_fields if name in SHARED else {}
    rows = []
    for key, field in sorted(body.model_fields.items(), key=_place):
        if key in shared and field.description == shared[key].description:
            continue
        shown = field.alias or key
        meaning, default = _meaning(key, field)
        default = DEFAULTS.get((name, key)) or DEFAULTS.get(("generate", key) if name == "xlora" else (), default)
        rows.append((f"`{shown}`", _type(schema["properties"][shown], definitions), default, meaning))
    return _table(("field", "type", "default", "meaning"), rows)


def _place(item: tuple[str, FieldInfo]) -> tuple[bool, bool]:
    """Required fields come first, and our own behind those of sampling."""
    name, field = item
    return not field.is_required(), name in XLoraFields.model_fields


def _answer(answer: type) -> str:
    schema = TypeAdapter(answer).json_schema()
    definitions, always = schema.get("$defs", {}), schema.get("required", [])
    rows = []
    for name, field in schema["properties"].items():
        referred = definitions.get(field.get("$ref", "").rpartition("/")[2], {})
        meaning = field.get("description") or referred.get("description", "")
        kind = _type(field, definitions)
        null = ", or null" if {"type": "null"} in field.get("anyOf", ()) else ""
        rows.append((f"`{name}`", f"{kind}{null}", "always" if name in always else "may be absent", _cell(meaning)))
    return _table(("field", "type", "presence", "meaning"), rows)


def _meaning(name: str, field: FieldInfo) -> tuple[str, str]:
    """What a field means, and its default, which its description says or the engine's parameters have."""
    meaning = field.description or ""
    if field.is_required():
        return _cell(meaning), "required"
    if found := _WHEN_ABSENT.search(meaning):
        return _cell(meaning), found[1].strip()
    if found := _ABSENT.search(meaning):
        return _cell(meaning[: found.start()] + meaning[found.end() :]), found[1].strip()
    default = {one.name: one.default for one in fields(SamplingParams)}.get(name)
    if isinstance(default, bool) or (default is None and field.annotation == bool | None):
        return _cell(meaning), "`false`"
    plain = isinstance(default, int | float) and default is not MISSING and name != "seed"
    return _cell(meaning), f"{default:g}" if plain else "none"


def _type(schema: dict, definitions: dict) -> str:
    """A JSON Schema in a few words."""
    if "$ref" in schema:
        referred = definitions[schema["$ref"].rpartition("/")[2]]
        return "object" if referred.get("type") == "object" else _type(referred, definitions)
    if "anyOf" in schema or "oneOf" in schema:
        parts = [_type(one, definitions) for one in schema.get("anyOf") or schema["oneOf"] if not _says_nothing(one)]
        return ", or ".join(dict.fromkeys(parts))
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(one)}`" for one in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_plural(_type(schema.get('items', {}), definitions))}"
    return schema.get("type", "any") + _range(schema)


def _says_nothing(schema: dict) -> bool:
    """Whether it is null, or the empty value that bodies take for absent."""
    return schema.get("type") == "null" or 0 in (
        schema.get("maxLength"),
        schema.get("maxItems"),
        schema.get("maxProperties"),
    )


def _range(schema: dict) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if (above := schema.get("exclusiveMinimum")) is not None:
        return f" above {above}, to {high}" if high is not None else f" above {above}"
    if low is None or schema.get("type") not in ("integer", "number"):
        return ""
    if high is None or high >= 2**31 - 1:
        return f" from {low}"
    return f" {low} to {high}"


def _plural(word: str) -> str:
    head, _, rest = word.partition(" ")
    return f"{head}s {rest}".strip() if head in ("integer", "number", "string", "object", "boolean", "list") else word


def _cell(text: str) -> str:
    """As a cell of a table, which has no full stop and no bars."""
    return text.strip().rstrip(".;").replace("|", "\\|")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]) + "\n"


TABLES = {"configuration.md": configuration, "api.md": api}


def written(document: str) -> str:
    """The document with its tables as they should be. Raises KeyError for a mark without a table."""
    tables = TABLES[document]()
    mark = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    text = (DOCS / document).read_text()
    missing = tables.keys() - {found[2] for found in mark.finditer(text)}
    if missing:
        raise KeyError(f"{document} has no mark for {', '.join(sorted(missing))}")
    return mark.sub(lambda found: f"{found[1]}{tables[found[2]]}{found[3]}", text)


if __name__ == "__main__":
    for name in sys.argv[1:] or TABLES:
        (DOCS / name).write_text(written(name))
