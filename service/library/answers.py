"""Results of calls in process: frozen dataclasses with NumPy arrays, which are read-only. Those with arrays compare by
identity, since arrays have no truth of their own.

T positions, S sites, E experts. Scalings are what really weighted the experts, after softmax and top-k and as steered.
Row i is of position start + i, and the row of position p produced the token at position p + 1.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from service.api.gate_views.rows import Rows, join
from service.api.gate_views.view import over_sites, summarise
from service.api.generation.choice import Delta
from service.api.generation.run import Run
from service.api.generation.scaling_pass import Looked, Text
from service.api.generation.tokenizer import ModelTokenizer
from service.api.schemas.answers import CompareAnswer, CompareOutput
from service.contract.engine_info import EngineInfo

FloatArray = npt.NDArray[np.float32] | npt.NDArray[np.float16]


@dataclass(frozen=True, slots=True)
class Token:
    """One token and the text it adds; "" while a character is unfinished."""

    id: int
    text: str
    logprob: float | None = None  # natural log, of the raw distribution; None where not asked for
    top_logprobs: tuple[Token, ...] = ()  # best first


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """Rows of the gate over consecutive positions."""

    experts: tuple[str, ...]  # E names
    sites: tuple[str, ...]  # S names
    start: int  # position of the first row
    mean: FloatArray  # [T, E], mean over the sites
    full: FloatArray | None  # [T, S, E], where asked for
    entropy: FloatArray  # [T], nats, mean over the sites; NaN for an all-zero row

    @property
    def scalings(self) -> FloatArray:
        """[T, S, E] where "full" was asked for, else [T, E]."""
        return self.mean if self.full is None else self.full


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """One choice: a text that follows the prompt."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    tokens: tuple[Token, ...]
    finish_reason: str  # stop, length or timeout
    gate: Gate | None = None  # where asked for
    tool_calls: tuple[Mapping[str, Any], ...] = ()  # where a tool_choice wants one; `text` is then the arguments


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """The continuation of one prompt. With n > 1 the properties are of the first output."""

    index: int  # of the prompt among those of the call
    id: str
    model: str
    seed: int
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[Output, ...]  # n
    usage: Mapping[str, Any]  # as in POST /generate
    steering: Mapping[str, Any]  # `experts` and `gate`, as in the request

    @property
    def text(self) -> str:
        """The text, without the prompt."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The generated tokens."""
        return self.outputs[0].token_ids

    @property
    def tokens(self) -> tuple[Token, ...]:
        """The generated tokens with their texts, and logprobs where asked for."""
        return self.outputs[0].tokens

    @property
    def finish_reason(self) -> str:
        """stop, length or timeout."""
        return self.outputs[0].finish_reason

    @property
    def tool_calls(self) -> tuple[Mapping[str, Any], ...]:
        """The calls of functions, as OpenAI has them."""
        return self.outputs[0].tool_calls

    @property
    def gate(self) -> Gate | None:
        """The rows of the gate, with the names of experts and sites; None where not asked for."""
        return self.outputs[0].gate

    @property
    def scalings(self) -> FloatArray | None:
        """[T, E], or [T, S, E] for "full"; a row per generated token unless scalings_start says otherwise."""
        return None if self.gate is None else self.gate.scalings


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Means over the positions, and over the sites of each of G groups."""

    granularity: str  # site, layer or module_type
    names: tuple[str, ...]  # G
    mean: FloatArray  # [G, E]
    entropy: FloatArray  # [G], nats
    top1: FloatArray  # [G, E], share of the positions that each expert leads


@dataclass(frozen=True, slots=True, eq=False)
class TextScalings:
    """The gate over one text, without generating. The last row is of the token that would come next."""

    index: int  # of the text among those of the call
    id: str
    model: str
    token_ids: tuple[int, ...]  # of the selected positions
    token_texts: tuple[str, ...]
    gate: Gate
    groups: Groups | None  # with a granularity other than token
    logprobs: Mapping[str, npt.NDArray[np.float64]]  # [T] by xlora, base and expert_NAME, where perplexity is
    # asked for; natural logs, NaN at the text's first token
    perplexity: Mapping[str, float]  # by the same names

    @property
    def scalings(self) -> FloatArray:
        """[T, S, E] where "full" was asked for, else [T, E]."""
        return self.gate.scalings


@dataclass(frozen=True, slots=True, eq=False)
class Compared:
    """The output of one setting, written under it or given with it."""

    label: str | None
    steering: Mapping[str, Any]
    text: str
    token_ids: tuple[int, ...]
    tokens: tuple[Token, ...]  # with logprobs under its own gate
    finish_reason: str | None  # None where it was given
    gate: Gate | None


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """One prompt under N settings. Row i of the matrices is what setting i makes of the outputs."""

    index: int  # of the prompt among those of the call
    id: str
    model: str
    seed: int
    outputs: tuple[Compared, ...]  # N
    log_likelihood: npt.NDArray[np.float64]  # [N, N], sums of natural logs; NaN where there is none
    log_likelihood_per_token: npt.NDArray[np.float64]  # [N, N]
    usage: Mapping[str, Any]


def answer_of(index: int, run: Run, deltas: Mapping[int, Sequence[Delta]], dtype: str | None) -> Answer:
    """The answer of a run that has ended; `dtype` is of full scalings."""
    requests = run.generation.requests
    return Answer(
        index=index,
        id=run.id,
        model=run.info.model,
        seed=run.seed,
        prompt_token_ids=tuple(requests[0].prompt_token_ids),
        outputs=tuple(_output(run, number, found, dtype) for number, found in sorted(deltas.items())),
        usage=run.generation.usage(),
        steering=run.steering,
    )


def text_scalings_of(
    index: int, id: str, looked: Looked, tokenizer: ModelTokenizer, info: EngineInfo, dtype: str | None
) -> TextScalings:
    """The rows of a scaling pass over one text, as arrays. It takes time: not for the event loop."""
    [text] = looked.texts(tokenizer)
    view = looked.view
    names, sites = tuple(view.expert_names), tuple(view.site_names)
    labels, judged = looked.columns.labels, text.likelihoods
    logs: dict[str, npt.NDArray[np.float64]] = {}
    perplexity: dict[str, float] = {}
    for number, label in enumerate(labels if judged is not None else ()):
        assert judged is not None
        logs[label] = _numbers(judged.columns[number])
        perplexity[label] = _number(judged.perplexity(number))
    return TextScalings(
        index=index,
        id=id,
        model=info.model,
        token_ids=tuple(text.ids),
        token_texts=tuple(text.token_texts),
        gate=_gate(names, sites, view.columns(text.rows), dtype),
        groups=None if view.granularity == "token" else _groups(looked, text),
        logprobs=logs,
        perplexity=perplexity,
    )


def comparison_of(index: int, document: CompareAnswer, info: EngineInfo) -> Comparison:
    """The answer of POST /compare with arrays."""
    matrices = document["log_likelihood"]
    return Comparison(
        index=index,
        id=document["id"],
        model=document["model"],
        seed=document["seed"],
        outputs=tuple(_compared(output) for output in document["outputs"]),
        log_likelihood=np.stack([_numbers(row) for row in matrices["sum"]]),
        log_likelihood_per_token=np.stack([_numbers(row) for row in matrices["per_token"]]),
        usage=document["usage"],
    )


def _output(run: Run, number: int, deltas: Sequence[Delta], dtype: str | None) -> Output:
    found = [(delta.token, delta.token_text) for delta in deltas if delta.token is not None]
    name = run.tokenizer.vocabulary.name
    text, call = "".join(delta.text for delta in deltas), run.generation.choices[number].call
    tokens = [
        Token(token.id, own, token.logprob, tuple(Token(id, name(id), logprob) for id, logprob in token.top_logprobs))
        for token, own in found
    ]
    return Output(
        index=number,
        text=text,
        token_ids=tuple(token.id for token, _ in found),
        tokens=tuple(tokens),
        finish_reason=deltas[-1].finish_reason or "",
        gate=_gate_of_choice(run, number, deltas, dtype),
        tool_calls=() if call is None else tuple(call.whole(text)),
    )


def _gate_of_choice(run: Run, number: int, deltas: Sequence[Delta], dtype: str | None) -> Gate | None:
    request = run.generation.choices[number].request
    if request.return_scalings == "none":
        return None
    experts, sites = tuple(expert["name"] for expert in run.info.experts), tuple(run.info.sites)
    rows = join([delta.rows for delta in deltas if delta.rows is not None])
    if rows is None:  # the end came before any row
        start = len(request.prompt_token_ids) - 1 if request.scalings_start is None else request.scalings_start
        none = np.zeros((0, len(sites), len(experts)), np.float32)
        rows = Rows(start, none[:, 0], none[:, 0, 0], none if request.return_scalings == "full" else None)
    return _gate(experts, sites, rows, dtype)


def _gate(experts: tuple[str, ...], sites: tuple[str, ...], rows: Rows, dtype: str | None) -> Gate:
    full = None if rows.full is None else _read_only(rows.full.astype(dtype or np.float32, copy=False))
    return Gate(experts, sites, rows.start, _read_only(rows.mean), full, _read_only(rows.entropy))


def _groups(looked: Looked, text: Text) -> Groups:
    groups, experts = looked.view.groups(), looked.view.experts
    found = [summarise(over_sites(text.rows, sites)) for sites in groups.values()]
    return Groups(
        granularity=looked.view.granularity,
        names=tuple(groups),
        mean=_read_only(np.stack([summary.mean[experts] for summary in found]).astype(np.float32)),
        entropy=_read_only(np.array([summary.entropy for summary in found], np.float32)),
        top1=_read_only(np.stack([summary.top1[experts] for summary in found]).astype(np.float32)),
    )


def _compared(output: CompareOutput) -> Compared:
    gate = None
    if "scalings" in output:
        rows = output["scalings"]
        full = None if "full" not in rows else _from_npy(rows["full"])
        arrays = (np.asarray(rows[name], np.float32) for name in ("mean", "entropy"))
        mean, entropy = map(_read_only, arrays)
        gate = Gate(tuple(rows["experts"]), tuple(rows["sites"]), rows["start"], mean, full, entropy)
    return Compared(
        label=output["label"],
        steering={name: output[name] for name in ("experts", "gate") if name in output},
        text=output["text"],
        token_ids=tuple(output["token_ids"]),
        tokens=tuple(Token(one["id"], one["text"], one["logprob"]) for one in output["tokens"]),
        finish_reason=output["finish_reason"],
        gate=gate,
    )


def _from_npy(text: str) -> FloatArray:
    array: FloatArray = np.load(io.BytesIO(base64.b64decode(text)))
    return _read_only(array)


def _numbers(values: Sequence[float | None]) -> npt.NDArray[np.float64]:
    numbers = np.array([_number(value) for value in values], np.float64)
    numbers.flags.writeable = False
    return numbers


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _read_only(array: FloatArray) -> FloatArray:
    seen = array.view()
    seen.flags.writeable = False
    return seen
