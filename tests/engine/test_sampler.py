"""Sampling against transformers' logits processors, and the noise against the statistics it must have.

`sample` is a pure function: the token is the argmax of the processed logits plus the noise of its key. So the oracle is
transformers' processors plus our own noise, compared token by token; the noise itself is tested on its own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from service.contract.request import Request, SamplingParams
from service.engine import noise as hashed
from service.engine import sampler
from service.engine.logprobs import Logprobs
from service.engine.sampler import SampleRow, noise_keys
from service.engine.sequence import Sequence
from service.model.transfer import HostCopies
from tests.support.driver import words

V = 97
CPU = torch.device("cpu")


def row(
    prompt: list[int] | None = None,
    output: list[int] | None = None,
    *,
    index: int = 0,
    pending: tuple[int, ...] = (),
    **params: Any,
) -> SampleRow:
    """A row of logits to sample from, with its history."""
    sequence = Sequence.of(
        Request("r", prompt or [1, 2, 3], SamplingParams(**{"max_tokens": 128, **params})), index, 0.0
    )
    for token in output or []:
        sequence.accept(token)
    return SampleRow(sequence, pending)


def sample(logits: Tensor, rows: SequenceOf[SampleRow]) -> list[int]:
    """As whoever reads them sees them."""
    return sampler.sample(logits, rows).tolist()


def gumbel_noise(rows: SequenceOf[SampleRow], vocabulary: int, device: torch.device) -> Tensor:
    """The noise that these rows meet, fp32 [n, vocabulary]."""
    return hashed.gumbel_noise(torch.from_numpy(noise_keys(rows)).to(device), vocabulary)


def logits_for(count: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    """[count, V]"""
    return torch.randn(count, V, generator=torch.Generator().manual_seed(seed)) * spread


def processed(logits: Tensor, r: SampleRow) -> Tensor:
    """One row [V] after transformers' processors, in the order that SamplingParams documents."""
    params = r.sequence.sampling
    history = [*r.sequence.tokens, *r.pending]
    output = history[r.sequence.prompt_len :]
    before, after = LogitsProcessorList(), LogitsProcessorList()
    if params.logit_bias:
        before.append(SequenceBiasLogitsProcessor({(token,): bias for token, bias in params.logit_bias.items()}))
    if params.repetition_penalty != 1:
        before.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature > 0:
        after.append(TemperatureLogitsWarper(params.temperature))
        after += [TopKLogitsWarper(params.top_k)] if params.top_k else []
        after += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
        after += [MinPLogitsWarper(params.min_p)] if params.min_p else []
    ids = torch.tensor([history])
    scores = before(ids, logits[None].clone())
    for token, count in Counter(output).items():  # OpenAI's formula; transformers has no such processor
        scores[0, token] -= params.presence_penalty + params.frequency_penalty * count
    return after(ids, scores)[0]


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.4},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 5},
    "top_k 1": {"top_k": 1},
    "top_k above the vocabulary": {"top_k": 1000},
    "top_p": {"top_p": 0.6},
    "tiny top_p": {"top_p": 1e-6},
    "min_p": {"min_p": 0.2},
    "min_p 1": {"min_p": 1.0},
    "top_k top_p min_p": {"top_k": 20, "top_p": 0.8, "min_p": 0.05, "temperature": 1.7},
    "repetition": {"repetition_penalty": 1.8},
    "reward repetition": {"repetition_penalty": 0.6},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.8},
    "negative frequency": {"frequency_penalty": -0.8},
    "bias": {"logit_bias": {5: 4.0, 6: -100.0, 0: 1.0}},
    "all": {
        "logit_bias": {5: 4.0}, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.3,
        "temperature": 0.9, "top_k": 30, "top_p": 0.9, "min_p": 0.02,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("greedy", [False, True], ids=["sampled", "greedy"])
@pytest.mark.parametrize("with_pending", [False, True], ids=["token", "draft"])
def test_equals_transformers(name: str, greedy: bool, with_pending: bool) -> None:
    """A filter in the wrong order or off by one; penalties that miss the prompt, count wrongly, or forget the
    pending drafts.
    """
    params = {**SETTINGS[name], **({"temperature": 0.0} if greedy else {})}
    rows = [
        row(words(i, 6, V), words(100 + i, 8, 12), pending=(i % V, i % 7) if with_pending else (), seed=i, **params)
        for i in range(60)
    ]
    logits = logits_for(60)
    kept = logits.clone()
    theirs = torch.stack([processed(line, r) for line, r in zip(logits, rows, strict=True)])
    noise = torch.zeros_like(theirs) if greedy else gumbel_noise(rows, V, CPU)
    assert sample(logits, rows) == (theirs + noise).argmax(-1).tolist()
    assert torch.equal(logits, kept), "the raw logits were changed: logprobs are taken from them"


def test_rows_do_not_mix() -> None:
    """Every row's own parameters, whatever its neighbours ask for; the order of the batch does not matter."""
    rows = [
        row(words(i, 5, V), words(i, 4, 12), seed=i, **{**params, **({"temperature": 0.0} if i % 5 == 0 else {})})
        for i, params in enumerate(list(SETTINGS.values()) * 3)
    ]
    logits = logits_for(len(rows), seed=4)
    together = sample(logits, rows)
    assert together == [sample(logits[i : i + 1], [r])[0] for i, r in enumerate(rows)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    assert sample(logits[order], [rows[i] for i in order]) == [together[i] for i in order]


def test_a_draft_is_sampled_as_the_token_will_be() -> None:
    """Same processors over the same history, same noise: with equal logits, draft and token are equal."""
    for params in SETTINGS.values():
        for i in range(10):
            history = words(50 + i, 6, 12)
            token = row(output=history, seed=i, **params)
            logits = logits_for(1, seed=i)
            for known in (11, 8, 1):
                draft = row(output=history[:known], pending=tuple(history[known:]), seed=i, **params)
                assert draft.output_position == token.output_position
                assert sample(logits, [draft]) == sample(logits, [token])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(dtype: torch.dtype) -> None:
    """Sampling happens in fp32: in bf16 the noise would be too coarse."""
    logits = logits_for(20).to(dtype)
    rows = [row(seed=i, top_p=0.9) for i in range(20)]
    assert sample(logits, rows) == sample(logits.float(), rows)


def test_bias_forces_and_forbids() -> None:
    """+100 and -100 must win over any logit, as OpenAI documents them."""
    logits = logits_for(40)
    best = logits.argmax(-1).tolist()
    for temperature in (0.0, 1.0):
        forced = sample(logits, [row(logit_bias={7: 100.0}, temperature=temperature, seed=i) for i in range(40)])
        assert forced == [7] * 40
        forbidden = sample(
            logits, [row(logit_bias={best[i]: -100.0}, temperature=temperature, seed=i) for i in range(40)]
        )
        assert all(token != best[i] for i, token in enumerate(forbidden))


# -- logprobs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", SETTINGS.values(), ids=SETTINGS)
def test_logprobs_are_of_the_raw_distribution(params: dict[str, Any]) -> None:
    """Before bias, penalties, temperature and filters; best first; as many as asked for, also next to others that
    ask differently.
    """
    asked = [None, 0, 1, 5, 0, None, 20, V]
    rows = [row(output=[4, 4], logprobs=count, seed=i, **params) for i, count in enumerate(asked)]
    logits = logits_for(len(rows), seed=2)
    tokens = sample(logits, rows)
    raw = logits.double().log_softmax(-1)
    wanted = [line for line, one in enumerate(rows) if one.logprobs is not None]
    counts = [count for count in asked if count is not None]
    outputs = Logprobs(logits[wanted], torch.tensor(tokens)[wanted], counts, HostCopies(logits.device)).read()
    for line, output, count in zip(wanted, outputs, counts, strict=True):
        token = tokens[line]
        assert output.id == token
        assert output.logprob == pytest.approx(float(raw[line, token]), abs=1e-5)
        expected = raw[line].topk(count)
        assert [token for token, _ in output.top_logprobs] == expected.indices.tolist()
        assert [value for _, value in output.top_logprobs] == pytest.approx(expected.values.tolist(), abs=1e-5)


# -- noise ---------------------------------------------------------------------------------------------------------


def chi_square(counts: np.ndarray[Any, Any], probabilities: np.ndarray[Any, Any]) -> tuple[float, float]:
    """The statistic over bins of at least 5 expected (the rest pooled), and a limit five standard deviations above
    its mean.
    """
    expected = probabilities * counts.sum()
    large = expected >= 5
    seen = np.append(counts[large], counts[~large].sum())
    wanted = np.append(expected[large], expected[~large].sum())
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    degrees = len(seen) - 1
    return float(((seen - wanted) ** 2 / wanted).sum()), degrees + 5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("what", ["seed", "choice", "position"])
def test_sampled_distribution_is_the_softmax(what: str) -> None:
    """Over seeds, over choices and over output positions the tokens must follow softmax(logits), each alone."""
    draws, logits = 6000, logits_for(1, seed=3, spread=1.5)
    if what == "position":
        sequence = row(seed=5).sequence
        tokens = []
        for _ in range(draws // 1000):
            rows = []
            for _ in range(1000):
                frozen = Sequence(sequence.request, 0, list(sequence.tokens), 3, 0.0)
                rows.append(SampleRow(frozen))
                sequence.accept(0)
            tokens += sample(logits.expand(1000, -1), rows)
    else:
        rows = [row(seed=i if what == "seed" else 5, index=i if what == "choice" else 0) for i in range(draws)]
        tokens = sample(logits.expand(draws, -1), rows)
    counts = np.bincount(tokens, minlength=V)
    statistic, limit = chi_square(counts, logits.softmax(-1)[0].double().numpy())
    assert statistic < limit
    wrong, _ = chi_square(counts, (logits * 0.85).softmax(-1)[0].double().numpy())
    assert wrong > limit, "the test would not see a wrong distribution"


def test_noise_is_standard_gumbel() -> None:
    """Mean 0.5772, variance pi^2/6, and the whole distribution function; no infinities."""
    noise = gumbel_noise([row(seed=i) for i in range(200)], 2000, CPU).double().flatten()
    assert noise.isfinite().all()
    assert float(noise.mean()) == pytest.approx(0.57722, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.02)
    uniform = torch.exp(-torch.exp(-noise))
    counts = torch.histc(uniform, bins=50, min=0, max=1).numpy()
    statistic, limit = chi_square(counts, np.full(50, 1 / 50))
    assert statistic < limit


def test_noise_of_neighbours_is_independent() -> None:
    """Neighbouring seeds, choices, positions and vocabulary ids: correlated noise would make n choices alike."""

    def noise(seed: int = 9, index: int = 0, position: int = 0) -> Tensor:
        return gumbel_noise([row(seed=seed, index=index, output=[0] * position)], 20000, CPU)[0].double()

    reference = noise()
    others = {
        "seed": noise(seed=10), "choice": noise(index=1), "position": noise(position=1), "id": reference.roll(1),
        "seed - 1, choice + 1": noise(seed=8, index=1), "largest seed": noise(seed=2**63 - 1),
    }  # fmt: skip
    for name, other in others.items():
        correlation = float(torch.corrcoef(torch.stack([reference, other]))[0, 1])
        assert abs(correlation) < 4 / math.sqrt(20000), name
        assert not torch.equal(reference, other)


def test_keys_do_not_collide() -> None:
    """(seed, choice, position) must not be added up: seed 1 choice 2 is not seed 2 choice 1."""
    rows = [row(seed=s, index=c, output=[0] * p) for s in range(8) for c in range(8) for p in range(8)]
    first = gumbel_noise(rows, 2, CPU)
    assert len({tuple(line) for line in first.tolist()}) == len(rows)


def test_noise_is_a_function_of_its_key_alone() -> None:
    """Not of the batch around it, of the vocabulary's size or of the history."""
    rows = [row(seed=3, output=[1, 2]), row(seed=4), row([9, 9], [7, 8], seed=3), row(output=[5], pending=(6,), seed=3)]
    noise = gumbel_noise(rows, 50, CPU)
    assert torch.equal(noise[0], noise[2])
    assert torch.equal(noise[0], noise[3])
    assert torch.equal(gumbel_noise(rows[::-1], 50, CPU), noise.flip(0))
    assert torch.equal(gumbel_noise(rows, 20, CPU), noise[:, :20])


def test_noise_is_pinned() -> None:
    """A seed in somebody's notebook must give the same text after an upgrade:
    the hash is splitmix64, written out here.
    """
    mask = (1 << 64) - 1

    def splitmix(value: int) -> int:
        value = (value + 0x9E3779B97F4A7C15) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return value ^ (value >> 31)

    for seed, choice, position in ((0, 0, 0), (123, 2, 1), (2**63 - 1, 1, 3)):
        key = splitmix(splitmix(splitmix(seed) + choice) + position)
        found = gumbel_noise([row(seed=seed, index=choice, output=[0] * position)], 5, CPU)[0].tolist()
        for token, value in enumerate(found):
            bits = splitmix((key + token * 0x9E3779B97F4A7C15) & mask)
            uniform = ((bits >> 11) + 0.5) * 2.0**-53
            assert value == pytest.approx(-math.log(-math.log(uniform)), rel=1e-5, abs=1e-6)
