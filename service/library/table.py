"""Answers as rows of a table: dictionaries by token or by text, for pandas and for whoever has none."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np

from service.contract.errors import RequestError, StartupError
from service.library.answers import Answer, Gate, Output, TextScalings

By = Literal["token", "text"]
Answers = Answer | TextScalings | Iterable[Answer | TextScalings | RequestError]


def rows(answers: Answers, by: By = "token") -> Iterator[dict[str, Any]]:
    """One dictionary per token (with the weights that produced it), or per text (with their means).

    Weights are in columns `weight_NAME`, where scalings were asked for. A prompt that has failed is one row with an
    `error`. Raises TypeError for what is no answer of `generate` or `scalings`.
    """
    if by not in ("token", "text"):
        raise ValueError(f'by is {by!r}; it may be "token" or "text"')
    if not isinstance(answers, Iterable):
        answers = [answers]
    for answer in answers:
        if isinstance(answer, RequestError):
            yield {"prompt": answer.prompt_index, "error": str(answer)}
            continue
        if not isinstance(answer, Answer | TextScalings):
            raise TypeError(f"rows are of answers of generate or scalings, and not of {type(answer).__name__}")
        for part in _parts(answer):
            yield from _by_token(answer, part) if by == "token" else [_by_text(answer, part)]


def data_frame(answers: Answers, by: By = "token") -> Any:
    """The rows as a pandas.DataFrame. Raises StartupError where pandas is not installed."""
    try:
        pandas = importlib.import_module("pandas")
    except ImportError:
        raise StartupError(
            "pandas is not installed", hint="pip install pandas, or use XLora.rows, which needs nothing"
        ) from None
    return pandas.DataFrame(list(rows(answers, by)))


def _parts(answer: Answer | TextScalings) -> list[Output | TextScalings]:
    return [answer] if isinstance(answer, TextScalings) else list(answer.outputs)


def _where(answer: Answer | TextScalings, part: Output | TextScalings) -> dict[str, Any]:
    where: dict[str, Any] = {"prompt": answer.index}
    if isinstance(part, Output):
        where["output"] = part.index
    return where


def _by_token(answer: Answer | TextScalings, part: Output | TextScalings) -> Iterator[dict[str, Any]]:
    gate = part.gate
    tokens: list[tuple[int, str, float | None]]
    if isinstance(part, TextScalings):
        first, shift = part.gate.start, 0
        tokens = [(id, text, None) for id, text in zip(part.token_ids, part.token_texts, strict=True)]
    else:
        assert isinstance(answer, Answer)
        first = len(answer.prompt_token_ids)
        shift = 1  # the weights of the position before produced a token
        tokens = [(token.id, token.text, token.logprob) for token in part.tokens]
    for number, (id, text, logprob) in enumerate(tokens):
        row = {**_where(answer, part), "position": first + number, "token_id": id, "token": text}
        if logprob is not None:
            row["logprob"] = logprob
        if gate is not None:
            place = first + number - shift - gate.start
            row |= _weights(gate, gate.mean[place], gate.entropy[place])
        yield row


def _by_text(answer: Answer | TextScalings, part: Output | TextScalings) -> dict[str, Any]:
    text = "".join(part.token_texts) if isinstance(part, TextScalings) else part.text
    row = {**_where(answer, part), "text": text, "tokens": len(part.token_ids)}
    if isinstance(part, Output):
        row["finish_reason"] = part.finish_reason
    else:
        row |= {f"perplexity_{name}": value for name, value in part.perplexity.items()}
    if part.gate is not None and len(part.gate.mean):
        known = part.gate.entropy[np.isfinite(part.gate.entropy)]
        entropy = known.mean(dtype=np.float64) if len(known) else np.nan
        row |= _weights(part.gate, part.gate.mean.mean(axis=0, dtype=np.float64), entropy)
    return row


def _weights(gate: Gate, mean: Any, entropy: Any) -> dict[str, float]:
    weights = {f"weight_{name}": float(weight) for name, weight in zip(gate.experts, mean, strict=True)}
    return {"entropy_nats": float(entropy), **weights}
