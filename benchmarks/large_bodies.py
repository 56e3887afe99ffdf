"""Large request bodies of every kind, for every route that takes one. Knows no server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_NUMBER = "000000"

PROMPTS = {  # where a text may stand, by route: what is before and behind it
    "/generate": ('{"prompt":', "}"),
    "/scalings": ('{"prompt":', "}"),
    "/compare": ('{"settings":[{}],"prompt":', "}"),
    "/v1/completions": ('{"prompt":', "}"),
    "/v1/chat/completions": ('{"messages":[{"role":"user","content":', "}]}"),
    "/tokenize": ('{"text":', "}"),
}
SAMPLED = ("/generate", "/compare", "/v1/completions", "/v1/chat/completions")
BODIES = (*PROMPTS, "/detokenize", "/gate", "/scalings/log")
METHODS = {"/gate": "PATCH", "/scalings/log": "PUT"}


@dataclass(frozen=True)
class Kind:
    """One kind of body: a unit, repeated until the body is full, between two ends; # is a number of six digits."""

    name: str
    path: str
    before: str
    unit: str
    behind: str
    most: int | None = None  # bytes; a larger one would be refused

    def payload(self, size: int) -> bytes:
        """So many bytes, or a few less."""
        size = size if self.most is None else min(size, self.most)
        before, unit, behind = self.before.encode(), self.unit.encode(), self.behind.encode()
        number = (size - len(before) - len(behind)) // len(self.unit.replace("#", _NUMBER).encode())
        if "#" in self.unit:
            units = "".join([self.unit.replace("#", f"{place:06}") for place in range(number)]).encode()
        else:
            units = unit * number
        return before + (units[:-1] if unit.endswith(b",") else units) + behind


def kinds() -> Iterator[Kind]:
    """One of every kind for every route that takes it."""
    texts = {"text": "Once upon a time ", "emoji": "\U0001f600", "spaces": " ", "letters": "a", "escapes": "\\u00e9"}
    for path, (before, behind) in PROMPTS.items():
        for name, unit in texts.items():
            yield Kind(name, path, f'{before}"', unit, f'"{behind}')
        for name, unit in {"ids": "7,", "texts": '"",', "long texts": f'"{"word " * 3000}",', "lists": "[7],"}.items():
            yield Kind(name, path, f"{before}[", unit, f"]{behind}")
    for path in BODIES:
        for name, unit in {"values": "[],", "objects": '{"":0},', "floats": "1e5,", "digits": "9", "deep": "["}.items():
            yield Kind(name, path, "[", unit, "]")
        yield Kind("unknown names", path, "{", '"#":0,', "}")
        yield Kind("long name", path, '{"', "a", '":0}')
        yield Kind("white space", path, "", " ", "{}")
        yield Kind("cut short", path, '{"prompt":"', "a", "")
    yield from _fields()
    yield from _allowed()


def _fields() -> Iterator[Kind]:
    """Lists and objects in the fields of bodies that are right otherwise."""
    for path in SAMPLED:
        before, behind = PROMPTS[path]
        head = f'{before}"a"{behind[:-1]},'
        for field, unit in {"stop": '"",', "stop_token_ids": '"",'}.items():
            yield Kind(field, path, f'{head}"{field}":[', unit, "]}")
        yield Kind("logit_bias", path, f'{head}"logit_bias":{{', '"#":0,', "}}")
        schema = f'{head}"response_format":{{"type":"json_schema","json_schema":{{"name":"a","schema":{{"enum":['
        yield Kind("schema", path, schema, "0,", "]}}}}")
        yield Kind("pattern", path, f'{head}"response_format":{{"type":"regex","pattern":"', "(a|b)", '"}}')
    for path, field in (("/v1/completions", "metadata"), ("/v1/chat/completions", "user")):
        before, behind = PROMPTS[path]
        yield Kind(field, path, f'{before}"a"{behind[:-1]},"{field}":{{', '"#":"",', "}}")
    experts = '{"prompt":"a","experts":'
    yield Kind("weights of one", "/generate", f'{experts}{{"weights":{{"math":[', "{},", "]}}}")
    yield Kind("weights", "/generate", f'{experts}{{"weights":{{', '"a":1,', "}}}")
    yield Kind("only", "/generate", f'{experts}{{"only":[', '"a",', "]}}")
    yield Kind("sites", "/scalings", '{"prompt":"a","select":{"sites":[', "7,", "]}}")
    yield Kind("settings", "/compare", '{"prompt":"a","settings":[', "{},", "]}")
    yield Kind("texts of a setting", "/compare", '{"prompt":"a","settings":[{"token_ids":[', '"",', "]}]}")
    yield Kind("ids of a setting", "/compare", '{"prompt":"a","settings":[{"token_ids":[', "7,", "]}]}")
    yield Kind("messages", "/v1/chat/completions", '{"messages":[', '{"role":"user","content":""},', "]}")
    parts = '{"messages":[{"role":"user","content":['
    yield Kind("parts", "/v1/chat/completions", parts, '{"type":"text","text":""},', "]}]}")
    for name, unit in {"texts": '"",', "ids": "7,"}.items():
        yield Kind(name, "/detokenize", '{"token_ids":[', unit, "]}")


def _allowed() -> Iterator[Kind]:
    """The largest that are not refused for their size, or nearly so."""
    yield Kind("allowed text", "/tokenize", '{"text":"', "a", '"}', 130_000)
    yield Kind("allowed ids", "/detokenize", '{"token_ids":[', "7,", "]}", 260_000)
    message = '{"role":"user","content":[' + ",".join(['{"type":"text","text":""}'] * 100) + "]},"
    yield Kind(
        "allowed parts", "/v1/chat/completions", '{"messages":[', message, '],"max_tokens":1}', 255 * len(message)
    )
    prompt = f'"{"word " * 3000}",'
    yield Kind("allowed texts", "/v1/completions", '{"prompt":[', prompt, '],"max_tokens":1}', 250 * len(prompt))
