"""Steered gates against PEFT: in its own classes where it can be asked, else with its classifier's answer changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from service.contract import wire
from service.contract.checks import checked_request, layer_of
from service.contract.errors import InvalidRequestError
from service.contract.request import Request, SamplingParams
from service.contract.steering import GateWeight, Steering
from service.engine.engine import Engine
from service.engine.gate.batch_gate import fixed_row
from service.engine.sampler import SampleRow, sample
from service.engine.sequence import Sequence
from tests.engine.gate.test_gate_rows import assert_observed_once
from tests.engine.test_engine import same
from tests.support.driver import Choice, Engines, Run, greedy, run, sampled, words
from tests.support.tiny import Tiny, Variant

PROMPT = words(1, 45)
ALL: dict[str, Any] = {"return_scalings": "full", "scalings_start": 0}
Forward = Callable[[list[int]], tuple[Tensor, Tensor]]  # tokens -> logits [T, V], scalings [T, S, E]
EXPERTS, SITES = 3, 10  # of the tiny bundle


def weights(*values: float) -> Steering:
    """The same weights at every site."""
    return Steering(weights=tuple(GateWeight(expert, value) for expert, value in enumerate(values) if value))


BY_LAYER = Steering(
    weights=(GateWeight(0, 0.7), GateWeight(1, -0.4), GateWeight(0, 1.3, (1, 1)), GateWeight(2, 1, (0, 0)))
)
GATES: dict[str, Steering] = {
    "only one": Steering(only=(1,)),
    "only two": Steering(only=(2, 0)),
    "without one": Steering(exclude=(2,)),
    "only and without": Steering(only=(0, 1), exclude=(0,)),
    "cold": Steering(temperature=0.3),
    "hot, one left out": Steering(exclude=(1,), temperature=2.5),
    "the best": Steering(top_k=1),
    "the best two": Steering(top_k=2, temperature=3.0),
    "nobody": Steering(only=()),
    "all left out": Steering(exclude=(0, 1, 2)),
    "no weights": Steering(weights=()),
    "one expert": weights(0, 1.0),
    "weights": weights(0.2, 0.5, -0.3),
    "weights by layer": BY_LAYER,
}


@contextmanager
def steered(variant: Variant, steering: Steering) -> Iterator[Forward]:
    """PEFT, whose classifier's answer is changed on its way to the real pass; its scaling pass stays as it is."""
    oracle = variant.oracle()
    config, stored = oracle.xlora.xlora_config, variant.checkpoint.xlora
    predict = oracle.classifier.forward

    def change(*args: Any, **kwargs: Any) -> Tensor:
        gate: Tensor = predict(*args, **kwargs).clone()  # [1, T, S, E], after the softmax
        config.top_k_lora = stored.top_k_lora if steering.top_k is None else steering.top_k
        if is_fixed(steering):
            gate[:] = torch.tensor(fixed_by_hand(steering))
            config.top_k_lora, config.enable_softmax_topk = None, False
        elif stored.enable_softmax:
            logits = gate.double().log() * stored.softmax_temperature  # but for a constant
            logits[..., list(left_out(steering))] = float("-inf")
            gate = (logits / (steering.temperature or stored.softmax_temperature)).softmax(-1).float()
        else:
            gate[..., list(left_out(steering))] = 0.0
        return gate

    def forward(tokens: list[int]) -> tuple[Tensor, Tensor]:
        config.top_k_lora, config.enable_softmax_topk = stored.top_k_lora, stored.enable_softmax_topk
        return oracle.forward(tokens)

    oracle.classifier.forward = change
    try:
        yield forward
    finally:
        del oracle.classifier.forward
        config.top_k_lora, config.enable_softmax_topk = stored.top_k_lora, stored.enable_softmax_topk


def is_fixed(steering: Steering) -> bool:
    return steering.weights is not None or len(left_out(steering)) == EXPERTS


def left_out(steering: Steering) -> set[int]:
    return set(range(EXPERTS)) - (set(range(EXPERTS)) if steering.only is None else set(steering.only)) | set(
        steering.exclude
    )


def fixed_by_hand(steering: Steering) -> list[list[float]]:
    """[S, E]; the tiny bundle's sites are the first layer's, then the second's."""
    row = [[0.0] * EXPERTS for _ in range(SITES)]
    for weight in steering.weights or ():
        for layer in (0, 1):
            if weight.layers is None or weight.layers[0] <= layer <= weight.layers[1]:
                for site in range(layer * SITES // 2, (layer + 1) * SITES // 2):
                    row[site][weight.expert] = weight.weight
    return row


def assert_follows(ours: Choice, prompt: list[int], forward: Forward) -> None:
    """Greedy tokens, their logprobs and every gate row are those of a full recomputation."""
    logits, scalings = forward(prompt + ours.tokens[:-1])
    logits = logits[len(prompt) - 1 :]
    best = logits.topk(2)
    clear = best.values[:, 0] - best.values[:, 1] >= 1e-3
    assert clear.sum() >= len(ours.tokens) - 1
    assert (best.indices[clear, 0].numpy() == np.array(ours.tokens)[clear]).all()
    expected = logits.log_softmax(-1)[range(len(ours.tokens)), ours.tokens]
    found = torch.tensor([token.logprob for token in ours.token_outputs])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    if ours.fulls:
        np.testing.assert_allclose(ours.full, scalings, atol=1e-5, rtol=0)


def greedy_with_logprobs(name: str, prompt: list[int], max_tokens: int, **request: Any) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, logprobs=0)
    return Request(name, prompt, sampling, **request)


# -- the oracle ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GATES)
def test_equals_peft_with_this_gate(engines: Engines, lookahead: bool, name: str) -> None:
    """Tokens, logprobs and reported rows, with drafts of both kinds."""
    engine = engines.build(lookahead=lookahead, adaptive=False)
    made = greedy_with_logprobs("a", PROMPT[:21], 16, steering=GATES[name], **ALL)
    ours = run(engine, [made])
    with steered(engines.tiny.as_stored(), GATES[name]) as forward:
        assert_follows(ours["a"], PROMPT[:21], forward)
    assert_observed_once(ours, [made], 3)
    free = run(engine, [greedy("a", PROMPT[:21], 16)])["a"]
    assert free.tokens != ours["a"].tokens, "steered and free tell these gates apart"


# What can go differently in a gate; the fixed gates have no top-k, whatever the checkpoint says.
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "raw gate": {"enable_softmax": False},
    "top-k, dummy row acts": {"top_k_lora": 2, "scaling_pass_value": 0.25, "enable_softmax_topk": True},
    "one row for all sites, temperature, weight": {
        "layerwise_scalings": False, "softmax_temperature": 0.6, "global_scaling_weight": 1.7,
    },
}  # fmt: skip


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_equals_peft_on_other_checkpoints(tiny: Tiny, checkpoint: str) -> None:
    """Steering that changes the scaling pass, forgets the global weight, or top-k of a fixed gate."""
    variant = tiny.variant(**CHECKPOINTS[checkpoint])
    engines = Engines(variant)
    engine = engines.build()
    for name, steering in GATES.items():
        made = greedy_with_logprobs(name, PROMPT[:12], 8, steering=steering, **ALL)
        if refused_by(steering, variant):
            with pytest.raises(InvalidRequestError):
                checked_request(made, engine.info)
            continue
        ours = run(engine, [made])[name]
        with steered(variant, steering) as forward:
            assert_follows(ours, PROMPT[:12], forward)


def refused_by(steering: Steering, variant: Variant) -> bool:
    config = variant.checkpoint.xlora
    by_layer = any(weight.layers for weight in steering.weights or ())
    return (steering.temperature is not None and not config.enable_softmax) or (
        by_layer and not config.layerwise_scalings
    )


@pytest.mark.parametrize(("steering", "fields"), [
    (Steering(temperature=0.4), {"softmax_temperature": 0.4}),
    (Steering(top_k=1), {"top_k_lora": 1}),
    (Steering(top_k=2, temperature=2.0), {"top_k_lora": 2, "softmax_temperature": 2.0}),
])  # fmt: skip
def test_equals_peft_configured_so(tiny: Tiny, engines: Engines, steering: Steering, fields: dict[str, Any]) -> None:
    """PEFT's own temperature and top-k; its scaling pass has no experts here, so it is as ours."""
    checkpoint = replace(tiny.checkpoint, xlora=replace(tiny.checkpoint.xlora, **fields))
    ours = run(engines.build(), [greedy_with_logprobs("a", PROMPT[:21], 16, steering=steering, **ALL)])["a"]
    assert_follows(ours, PROMPT[:21], Variant(tiny, checkpoint).oracle().forward)


@pytest.mark.parametrize("expert", [None, 0, 1, 2])
def test_equals_plain_lora(tiny: Tiny, engines: Engines, expert: int | None) -> None:
    """One expert with weight 1 is PEFT's plain LoRA; none is the base model."""
    model = AutoModelForCausalLM.from_pretrained(tiny.path / "base", dtype=torch.float32)
    made = Steering(only=())
    if expert is not None:
        name = ("alpha", "beta", "gamma")[expert]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT uses names that transformers deprecates
            model = PeftModel.from_pretrained(model, str(tiny.path / "experts" / name))
        made = Steering(weights=(GateWeight(expert, 1.0),))

    @torch.inference_mode()
    def forward(tokens: list[int]) -> tuple[Tensor, Tensor]:
        return model(input_ids=torch.tensor([tokens])).logits[0], torch.empty(0)

    for steering in (made, Steering(only=() if expert is None else (expert,))):
        ours = run(engines.build(), [greedy_with_logprobs("a", PROMPT[:21], 24, steering=steering)])["a"]
        assert_follows(ours, PROMPT[:21], forward)


@pytest.mark.parametrize("name", ["only two", "cold", "weights", "nobody"])
def test_sampling_equals_recomputation(engines: Engines, name: str) -> None:
    """The tokens that the same noise picks from PEFT's logits."""
    made = replace(sampled("a", PROMPT[:21], 14, seed=5, temperature=0.9, top_p=0.9), steering=GATES[name])
    ours = run(engines.build(adaptive=False), [made])["a"]
    sequence = Sequence.of(made, 0, 0.0)
    with steered(engines.tiny.as_stored(), GATES[name]) as forward:
        for token in ours.tokens:
            [expected] = sample(forward(sequence.tokens)[0][-1:], [SampleRow(sequence)]).tolist()
            assert token == expected
            sequence.accept(token)


# -- amid others -----------------------------------------------------------------------------------------------------


def mixed_requests() -> list[Request]:
    """Every gate with equal prompts, greedy and sampled; frozen, free, several choices, a look."""
    requests = [greedy(f"greedy {name}", PROMPT[:21], 12, steering=GATES[name], **ALL) for name in GATES]
    requests += [
        replace(sampled(f"sampled {name}", PROMPT[: 5 + 2 * i], 10, seed=i), steering=steering, **ALL)
        for i, (name, steering) in enumerate(GATES.items())
    ]
    several = SamplingParams(max_tokens=8, seed=3, n=3, ignore_eos=True)
    requests += [
        greedy("free", PROMPT[:21], 12, **ALL),
        greedy("frozen", PROMPT[:21], 12, freeze_after=3, **ALL),
        greedy("frozen, only", PROMPT[:21], 12, freeze_after=3, steering=GATES["only two"], **ALL),
        greedy("frozen, fixed", PROMPT[:21], 12, freeze_after=3, steering=BY_LAYER, **ALL),
        Request("n", PROMPT[:14], several, steering=GATES["only two"], **ALL),
        Request("n fixed", PROMPT[:14], several, steering=BY_LAYER, **ALL),
        Request("look", PROMPT, None, **ALL),
        Request("steered look", PROMPT, None, steering=GATES["hot, one left out"], **ALL),
    ]
    return requests


@pytest.fixture(scope="module")
def alone(engines: Engines) -> Run:
    """Each alone, without drafts and cache."""
    result = Run()
    engine = engines.build(lookahead=False, speculative_tokens=0, prefix_cache=False)
    for made in mixed_requests():
        result.choices |= run(engine, [made]).choices
    return result


@pytest.mark.parametrize(
    "options", [{}, {"adaptive": False}, {"max_num_batched_tokens": 9}, {"block_size": 1}, {"max_num_seqs": 5}], ids=str
)
def test_amid_others(engines: Engines, alone: Run, options: dict[str, Any]) -> None:
    """Steered, free and frozen requests in one batch, from one prefix cache: each gets what it gets alone."""
    engine = engines.build(**options)
    for _ in range(2):
        together = run(engine, mixed_requests())
        assert together.choices.keys() == alone.choices.keys()
        for key, choice in alone.choices.items():
            same(together[key], choice)
    assert_observed_once(together, mixed_requests(), 3)


def test_preempted(engines: Engines, alone: Run) -> None:
    """A fixed gate's row is written again, or found with its block."""
    for prefix_cache in (True, False):
        engine = engines.build(max_model_len=64, blocks=60, prefix_cache=prefix_cache)
        result = run(engine, mixed_requests())
        assert result.preemptions > 0
        for key, choice in alone.choices.items():
            same(result[key], choice)


def test_a_steered_look(engines: Engines, alone: Run) -> None:
    """The rows that generation with this gate would use."""
    steering = GATES["hot, one left out"]
    with steered(engines.tiny.as_stored(), steering) as forward:
        np.testing.assert_allclose(alone["steered look"].full, forward(PROMPT)[1], atol=1e-5, rtol=0)


def cached_tokens(choice: Choice) -> int:
    assert choice.usage is not None
    return choice.usage.cached_tokens


@pytest.mark.parametrize("dropped", [False, True])
def test_the_cache_keeps_gates_apart(engines: Engines, dropped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another gate's keys and values are another text. Negative control: without the gate in the key it is seen."""
    steerings = [None, *(GATES[name] for name in ("only one", "only two", "cold", "the best", "nobody", "weights"))]
    requests = [greedy_with_logprobs("a", PROMPT, 4, steering=steering, **ALL) for steering in steerings]
    expected = [run(engines.build(prefix_cache=False), [made])["a"] for made in requests]
    if dropped:
        monkeypatch.setattr(Request, "gate_key", ())
    engine = engines.build()
    wrong = 0
    for hit in (False, True):
        for made, theirs in zip(requests, expected, strict=True):
            ours = run(engine, [made])["a"]
            if dropped:
                wrong += differs(ours, theirs)
                continue
            same(ours, theirs)
            assert cached_tokens(ours) == (44 if hit else 0)
    assert bool(wrong) == dropped


def differs(ours: Choice, theirs: Choice) -> bool:
    logprobs = [[token.logprob for token in choice.token_outputs] for choice in (ours, theirs)]
    return ours.tokens != theirs.tokens or not np.allclose(*logprobs, atol=1e-3)


def test_equal_gates_share_their_blocks(engines: Engines) -> None:
    """However they are said."""
    engine = engines.build()
    for said in (
        [
            Steering(only=(0, 1)),
            Steering(only=(1, 0, 1)),
            Steering(exclude=(2,)),
            Steering(only=(0, 1, 2), exclude=(2,)),
        ],
        [Steering(only=()), Steering(exclude=(2, 1, 0)), Steering(weights=()), Steering(only=(1,), exclude=(1,))],
        [None, Steering(), Steering(only=(0, 1, 2))],
    ):
        found = [cached_tokens(run(engine, [greedy("a", PROMPT, 2, steering=one)])["a"]) for one in said]
        assert found == [0] + [44] * (len(said) - 1)


# -- what it costs ---------------------------------------------------------------------------------------------------


def test_a_fixed_gate_has_no_scaling_stream(engines: Engines) -> None:
    """One row and one forward per token; half the blocks."""
    held: list[int] = []

    def look(engine: Engine, _: object) -> None:
        held.extend(len(sequence.scaling.blocks) for sequence in engine._scheduler.running)

    engine = engines.build(speculative_tokens=0, blocks=2 * 12, max_model_len=48)
    made = replace(greedy("a", PROMPT[:21], 20, steering=BY_LAYER), return_scalings="none")
    usage = run(engine, [made], each_step=look)["a"].usage
    assert usage is not None
    assert (usage.scaling_rows, usage.real_rows, usage.forward_passes) == (0, 21 + 19, 20)
    assert not any(held)
    long = greedy("long", words(3, 40), 8, steering=Steering(only=()))
    small = engines.build(blocks=24, max_model_len=48)
    for number in range(3):
        small.add(replace(checked_request(long, small.info), id=str(number)))
    small.step()
    assert len(small._scheduler.running) == 2, "24 blocks hold two real streams"
    for number in range(3):
        small.abort(str(number))


def test_a_fixed_gate_copies_drafts(engines: Engines) -> None:
    """Text that repeats itself costs fewer forwards than tokens."""
    engine = engines.build(adaptive=False)
    prompt = [5, 6, 7, 8] * 6
    made = [greedy(str(i), prompt, 60, steering=steering) for i, steering in enumerate(GATES.values())]
    result = run(engine, [one for one in made if checked_request(one, engine.info).has_fixed_gate])
    assert sum(choice.usage.drafts.accepted for choice in result.choices.values() if choice.usage) > 20


@pytest.mark.parametrize("name", GATES)
def test_crosses_the_wire(name: str) -> None:
    """Tuples of weights and of layers come out as they went in, not as lists."""
    made = greedy("a", PROMPT, 4, steering=GATES[name])
    encoded = msgspec.msgpack.encode(wire.Submit(made))
    decoded = msgspec.msgpack.decode(encoded, type=wire.ToEngine)
    assert isinstance(decoded, wire.Submit)
    assert decoded.request == made
    assert decoded.request.gate_key == made.gate_key


def test_layers_of_sites() -> None:
    assert layer_of("model.layers.12.self_attn.q_proj") == 12
    assert layer_of("transformer.h.0.mlp.experts.3.up") == 0
    assert layer_of("lm_head") is None
    row = fixed_row([GateWeight(0, 1.0, (0, 9)), GateWeight(1, 2.0)], ["model.layers.3.a", "lm_head"], 2)
    assert row == [[1.0, 2.0], [0.0, 2.0]]
