"""The form of an answer that calls a function, from the functions that it may call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from service.api.schemas.tools import Function
from service.api.structured_output.grammar_spec import GrammarSpecs
from service.api.structured_output.keywords import TOOLS, refuse
from service.api.structured_output.schema import Document
from service.contract.request import GrammarSpec


async def tool_form(forms: GrammarSpecs, functions: Mapping[int, Function]) -> GrammarSpec:
    """The form of a call of one of the functions, given by their places in `tools`. Raises InvalidRequestError for
    parameters that cannot be enforced, naming them.
    """
    return await forms.of_call({function.name: parameters(place, function) for place, function in functions.items()})


def parameters(place: int, function: Function) -> Document:
    """The schema of a function's arguments: an object, without properties where nothing is said."""
    path = f"{TOOLS}[{place}].function.parameters"
    stated = function.parameters
    if stated is None:
        return Document(path, {"type": "object", "properties": {}})
    kind = stated.get("type")
    if kind is not None and kind != "object" and not (isinstance(kind, list) and "object" in kind):
        refuse(f"{path}.type", f'is {kind!r:.60}; arguments are an object: "object"')
    whole: dict[str, Any] = {**stated, "type": "object"}
    if whole.get("nullable") is True:
        del whole["nullable"]
    return Document(path, whole)
