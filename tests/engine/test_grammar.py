"""Forms of text: what is generated fits them, exactly as it would without drafts, and a bad one is one request's end.

Oracles: the package `regex`, which can tell whether a text is the beginning of a match; jsonschema_rs for schemas; the
plain engine (no lookahead, no copied drafts, one request alone) for everything that drafts could change.
"""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from typing import Any

import jsonschema_rs
import pytest
import regex
import torch
from tokenizers import Tokenizer

from service.api.structured_output.lark import schema_grammar
from service.api.structured_output.schema import Document
from service.contract.errors import InvalidRequestError
from service.contract.request import FormLimits, GrammarSpec, Request, SamplingParams
from service.grammar import Cursor, GrammarCompiler, GrammarError, Grammars
from tests.engine.test_engine import mixed_requests, same
from tests.engine.test_sampler import chi_square
from tests.engine.test_speculation import PLAIN, accepted
from tests.support.driver import Choice, Engines, Run, run, words

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "ok": {"type": "boolean"},
        "tags": {"type": "array", "items": {"enum": ["aa", "ab"]}, "maxItems": 4},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["ok", "tags"],
    "additionalProperties": False,
}
OBJECT = GrammarSpec(
    grammar=schema_grammar(Document("schema", SCHEMA), FormLimits(), GrammarCompiler("", 0, []))
)  # it has no patterns
REPEATS = GrammarSpec(regex="(ab|ba|c){4,30}!")
MAY_END = GrammarSpec(regex="[0-9]{2,40}")
EOS = 1


@pytest.fixture(scope="module")
def tokenizer(engines: Engines) -> Tokenizer:
    return Tokenizer.from_file(str(engines.tiny.path / "base" / "tokenizer.json"))


@pytest.fixture(scope="module")
def compiler(engines: Engines) -> GrammarCompiler:
    return GrammarCompiler(str(engines.tiny.path / "base" / "tokenizer.json"), 320, [EOS])


def tokens_of(mask: bytes) -> set[int]:
    return {id for id in range(8 * len(mask)) if mask[id // 8] >> id % 8 & 1}


def formed(name: str, form: GrammarSpec, prompt: int = 9, **sampling: Any) -> Request:
    params = {"max_tokens": 48, "seed": len(name), **sampling}
    return Request(
        name, words(len(name), prompt), SamplingParams(form=form, **params), return_scalings="full", scalings_start=0
    )


def formed_requests() -> list[Request]:
    return [
        formed("greedy", OBJECT, temperature=0.0, logprobs=3),
        formed("object", OBJECT, logprobs=2),
        formed("repeats", REPEATS, logit_bias={}, temperature=1.5),
        formed("penalised", REPEATS, frequency_penalty=0.4, repetition_penalty=1.3),
        formed("filtered", REPEATS, top_k=2, top_p=0.9, min_p=0.05),
        formed("choices", OBJECT, n=4),
        formed("digits", MAY_END, temperature=0.3),
        formed("cut", OBJECT, max_tokens=5),
        formed("held", REPEATS, min_tokens=30),
        formed("held at its end", MAY_END, min_tokens=40),
        formed("stopped", MAY_END, stop_token_ids=(20, 21)),
        replace(formed("frozen", REPEATS), freeze_after=3),
        replace(formed("free", OBJECT), sampling=SamplingParams(max_tokens=20, seed=4, ignore_eos=True)),
    ]


@pytest.fixture(scope="module")
def plain(engines: Engines) -> dict[tuple[str, int], Choice]:
    choices: dict[tuple[str, int], Choice] = {}
    for made in formed_requests():
        choices |= run(engines.build(**PLAIN), [made]).choices
    return choices


# -- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adaptive": False},
        {"adaptive": False, "speculative_tokens": 30},
        {"adaptive": False, "speculative_tokens": 0},
        {"adaptive": False, "lookahead": False},
        {"adaptive": False, "max_num_batched_tokens": 24},
        {"adaptive": False, "blocks": 64, "max_model_len": 64},
    ],
    ids=str,
)
def test_drafts_change_nothing(engines: Engines, plain: dict[tuple[str, int], Choice], options: dict[str, Any]) -> None:
    """Tokens, logprobs and scalings, greedy and sampled, with choices, penalties, preemption and a frozen gate."""
    result = run(engines.build(**options), formed_requests())
    for key, choice in plain.items():
        same(result[key], choice)
        for ours, theirs in zip(result[key].token_outputs, choice.token_outputs, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    kept = sum(
        choice.usage.drafts.hits + choice.usage.drafts.accepted for choice in result.choices.values() if choice.usage
    )
    dropped = sum(choice.usage.drafts.misses for choice in result.choices.values() if choice.usage)
    assert kept > 30, "hardly a draft was right: the test shows little"
    assert dropped > 20 or options.get("lookahead") is False, "hardly a draft was wrong: the test shows little"
    if options.get("speculative_tokens", 8):
        assert sum(accepted(choice)[0] for choice in result.choices.values()) > 10
    if "blocks" in options:
        assert result.preemptions > 0


def test_every_text_has_its_form(plain: dict[tuple[str, int], Choice], tokenizer: Tokenizer) -> None:
    """Whole where the end is "stop", the beginning of one where it is "length"; both happen."""
    fits = jsonschema_rs.validator_for(SCHEMA)
    ends = []
    for made in formed_requests():
        form = made.sampling.form if made.sampling is not None else None
        for (name, _), choice in plain.items():
            if name != made.id or form is None or name == "stopped":
                continue
            text = tokenizer.decode([token for token in choice.tokens if token != EOS])
            ends.append((form == OBJECT, choice.finish_reason))
            if form == OBJECT and choice.finish_reason == "stop":
                assert fits.is_valid(json.loads(text)), text
            elif form.regex is not None:
                match = regex.fullmatch(form.regex, text, partial=choice.finish_reason == "length")
                assert match is not None, text
    assert {(True, "stop"), (True, "length"), (False, "stop")} <= set(ends)


def test_a_stop_token_ends_a_text_within_its_form(plain: dict[tuple[str, int], Choice]) -> None:
    choice = plain["stopped", 0]
    assert choice.tokens[-1] in (20, 21, EOS)
    assert not {20, 21} & set(choice.tokens[:-1])


def test_logprobs_are_those_of_the_raw_distribution(engines: Engines) -> None:
    """The first token of a form has the logprobs it has without one, and so have its alternatives."""
    made = formed("greedy", OBJECT, temperature=0.0, logprobs=4, max_tokens=1)
    assert made.sampling is not None
    free = replace(made, id="free", sampling=replace(made.sampling, form=None))
    result = run(engines.build(), [made, free])
    ours, theirs = result["greedy"].token_outputs[0], result["free"].token_outputs[0]
    assert dict(ours.top_logprobs) == pytest.approx(dict(theirs.top_logprobs), abs=1e-4)
    assert ours.id != theirs.id
    logits = engines.tiny.as_stored().oracle().logits(made.prompt_token_ids)[-1]
    assert ours.logprob == pytest.approx(logits.log_softmax(-1)[ours.id].item(), abs=1e-4)


def test_the_distribution_is_the_model_s_among_what_is_allowed(engines: Engines, tokenizer: Tokenizer) -> None:
    prompt, draws = words(5, 8), 1500
    form = GrammarSpec(regex="[a-h]x")
    allowed = [tokenizer.token_to_id(letter) for letter in "abcdefgh"]
    made = [Request(str(seed), prompt, SamplingParams(max_tokens=1, seed=seed, form=form)) for seed in range(draws)]
    result = run(engines.build(max_num_seqs=400, max_model_len=16, blocks=3200), made)
    counts = torch.bincount(torch.tensor([result[str(i)].tokens[0] for i in range(draws)]), minlength=320).numpy()
    logits = engines.tiny.as_stored().oracle().logits(prompt)[-1].double()
    masked = torch.full_like(logits, float("-inf"))
    masked[allowed] = logits[allowed]
    statistic, limit = chi_square(counts, masked.softmax(-1).numpy())
    assert 0 < statistic < limit


# -- the end of a text -----------------------------------------------------------------------------------------------


def test_eos_only_where_the_text_may_end(engines: Engines) -> None:
    """However much it is wanted: here at once, and in vain before the second digit."""
    made = formed("digits", MAY_END, logit_bias={EOS: 100.0})
    choice = run(engines.build(), [made])["digits"]
    assert (len(choice.tokens), choice.tokens[-1], choice.finish_reason) == (3, EOS, "stop")


def test_a_text_that_must_end_ends_without_eos(engines: Engines, tokenizer: Tokenizer) -> None:
    choice = run(engines.build(), [formed("a", GrammarSpec(regex="abc"))])["a"]
    assert (tokenizer.decode(choice.tokens), choice.finish_reason) == ("abc", "stop")
    assert EOS not in choice.tokens


def test_a_text_that_is_complete_with_its_last_token_was_not_cut(engines: Engines, tokenizer: Tokenizer) -> None:
    length = len(run(engines.build(), [formed("a", GrammarSpec(regex="abc"))])["a"].tokens)
    choice = run(engines.build(), [formed("a", GrammarSpec(regex="abc"), max_tokens=length)])["a"]
    assert choice.finish_reason == "stop"


def test_an_empty_text(engines: Engines) -> None:
    choice = run(engines.build(), [formed("a", GrammarSpec(regex=""))])["a"]
    assert (choice.tokens, choice.finish_reason) == ([EOS], "stop")


def test_a_bias_does_not_overrule_the_form(engines: Engines, tokenizer: Tokenizer) -> None:
    """Neither for what is forbidden, nor against all that is allowed."""
    letters = {letter: tokenizer.token_to_id(letter) for letter in "abz"}
    bias = {letters["z"]: 100.0, letters["a"]: -100.0, letters["b"]: -100.0}
    choice = run(engines.build(), [formed("a", GrammarSpec(regex="[ab]{6}"), logit_bias=bias)])["a"]
    assert set(tokenizer.decode(choice.tokens)) <= set("ab")


# -- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [REPEATS.regex, MAY_END.regex, "(a|bb|ccc)*x?", "[^a]{0,5}é?", ".*\\.", "a?b?c?d?"])
def test_masks_allow_what_can_go_on(compiler: GrammarCompiler, tokenizer: Tokenizer, pattern: str) -> None:
    """Along random texts: exactly the tokens after which the text is the beginning of a match, and EOS after a whole
    one.
    """
    chance = torch.Generator().manual_seed(1)
    texts = {id: tokenizer.decode([id]) for id in range(3, 320) if "�" not in tokenizer.decode([id])}
    for _ in range(4):
        cursor, text = compiler.compile(GrammarSpec(regex=pattern)).start(), ""
        for _ in range(8):
            allowed = tokens_of(cursor.allowed())
            assert (EOS in allowed) == (regex.fullmatch(pattern, text) is not None)
            ours = {id for id in allowed if id in texts}
            theirs = {id for id, more in texts.items() if regex.fullmatch(pattern, text + more, partial=True) and more}
            assert ours == theirs, text
            choices = sorted(ours - {EOS})
            if not choices:
                break
            token = choices[int(torch.randint(len(choices), (), generator=chance))]
            cursor.accept(token)
            text += texts[token]
            if cursor.finished:
                break


@pytest.mark.parametrize("form", [OBJECT, REPEATS, MAY_END], ids=["object", "repeats", "digits"])
def test_looking_ahead_leaves_nothing_behind(compiler: GrammarCompiler, form: GrammarSpec) -> None:
    """A cursor that has looked after right, wrong and impossible drafts says what a fresh one says."""
    chance = torch.Generator().manual_seed(2)

    def any_of(tokens: set[int]) -> int:
        return sorted(tokens)[int(torch.randint(len(tokens), (), generator=chance))]

    grammar = compiler.compile(form)
    cursor, accepted_tokens = grammar.start(), []
    for _ in range(25):
        drafts: list[int] = []
        for _ in range(4):
            drafts.append(any_of(tokens_of(cursor.allowed(drafts)) & set(range(320))))
            fresh = grammar.start()
            for token in [*accepted_tokens, *drafts]:
                fresh.accept(token)
            assert fresh.allowed() == cursor.allowed(drafts)
            if fresh.finished:
                break
        assert tokens_of(cursor.allowed([300, *drafts])) >= set(range(320)), "after a wrong draft anything may follow"
        assert cursor.fitting(drafts) == len(drafts)
        assert cursor.fitting([300, *drafts]) == 0
        token = any_of(tokens_of(cursor.allowed()))
        cursor.accept(token)
        accepted_tokens.append(token)
        if cursor.finished:
            break
    assert len(accepted_tokens) > 3


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (GrammarSpec(grammar="start: nothing"), "unknown name"),
        (GrammarSpec(grammar="start: A\nA: /a/ & /b/"), "no text of this model"),
        (GrammarSpec(regex="(a"), "unclosed group"),
        (GrammarSpec(regex="(?=a)b"), "look-around"),
        (GrammarSpec(regex=r"(a)\1"), "backreferences"),
    ],
)
def test_what_is_no_grammar_is_refused(compiler: GrammarCompiler, form: GrammarSpec, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        compiler.compile(form)
    assert caught.value.param == "response_format"


def test_a_vocabulary_that_is_not_known_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text('{"version":"1.0","model":{"type":"WordLevel","vocab":{"a":0},"unk_token":"a"},"added_tokens":[]}')
    with pytest.raises(InvalidRequestError, match="this model's tokenizer"):
        GrammarCompiler(str(path), 1, [0]).compile(GrammarSpec(regex="a"))


# -- faults ----------------------------------------------------------------------------------------------------------


def others_are_unharmed(result: Run, engines: Engines) -> None:
    expected = run(engines.build(), mixed_requests())
    for key, choice in expected.choices.items():
        same(result[key], choice)


@pytest.mark.parametrize("where", ["allowed", "accept"])
@pytest.mark.parametrize("lookahead", [True, False])
@pytest.mark.parametrize(
    "error", [ZeroDivisionError(), GrammarError("it is too complex")], ids=["ours", "the caller's"]
)
def test_a_grammar_that_raises_ends_its_request(
    engines: Engines,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: str,
    lookahead: bool,
    error: Exception,
) -> None:
    """With a traceback in the log where it is a surprise, and none where it is the caller's fault."""
    genuine, calls = getattr(Cursor, where), []

    def fail(self: Cursor, *arguments: Any) -> Any:
        calls.append(where)
        if len(calls) > 4:
            raise error
        return genuine(self, *arguments)

    monkeypatch.setattr(Cursor, where, fail)
    result = run(engines.build(lookahead=lookahead), [formed("poison", REPEATS), *mixed_requests()])
    assert result["poison"].error is not None
    surprise = isinstance(error, ZeroDivisionError)
    assert ("ZeroDivisionError" if surprise else "it is too complex") in result["poison"].error
    assert any(record.exc_info for record in caplog.records) == surprise
    assert surprise or caplog.records == []
    others_are_unharmed(result, engines)


def test_a_form_that_turns_out_too_complex_is_the_caller_s_fault(
    engines: Engines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The lexer's states run out on the way."""
    monkeypatch.setattr("service.grammar._MAX_STATES", 400)
    made = formed("poison", GrammarSpec(regex="(.{1,90}a.{1,90}b){1,3}"), max_tokens=200)
    result = run(engines.build(), [made, *mixed_requests()])
    [last] = [piece for step in result.steps for piece in step.outputs if piece.error is not None]
    assert (last.request_id, last.error_param) == ("poison", "response_format")
    assert "too complex" in (last.error or "")
    assert caplog.records == []
    others_are_unharmed(result, engines)


def test_a_form_that_does_not_compile_ends_its_request(engines: Engines) -> None:
    """The API finds it before; callers in the process may not."""
    result = run(engines.build(), [formed("poison", GrammarSpec(regex="("), n=2), *mixed_requests()])
    assert {result["poison", index].finish_reason for index in (0, 1)} == {"error"}
    others_are_unharmed(result, engines)


class _Slow(GrammarCompiler):
    """Compiles when it is told to."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        super().__init__(compiler._tokenizer_path, compiler._vocab_size, compiler._eos_token_ids)
        self.go = threading.Event()
        self.compiled = 0

    def compile(self, form: GrammarSpec) -> Any:
        assert self.go.wait(30)
        self.compiled += 1
        return super().compile(form)


def test_others_run_while_a_grammar_is_compiled(engines: Engines, compiler: GrammarCompiler) -> None:
    """Two requests wait for one grammar, one of them leaves; the rest of the world goes on."""
    slow, engine = _Slow(compiler), engines.build()
    engine._grammars = Grammars(slow)
    waits = [formed("a", OBJECT), formed("b", OBJECT)]
    for made in waits:
        engine.add(made)
    with pytest.raises(ValueError, match="in use"):
        engine.add(waits[0])
    assert engine.has_work()
    idle = engine.step()
    assert (idle.outputs, idle.stats.step_seconds) == ([], 0.0)
    result = Run()
    other = Request("other", words(1, 5), SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
    engine.add(other)
    pieces = [piece for _ in range(12) for piece in engine.step().outputs]
    assert [piece.finish_reason for piece in pieces][-1] == "length"
    engine.abort("b")
    slow.go.set()
    result = run(engine, [])
    same(result["a"], run(engines.build(), [waits[0]])["a"])
    assert "b" not in {request for request, _ in result.choices}
    assert slow.compiled == 1
    engine.add(replace(waits[0], id="again"))
    same(run(engine, [])["again"], result["a"])
    assert slow.compiled == 1


def test_few_grammars_are_kept(compiler: GrammarCompiler) -> None:
    slow = _Slow(compiler)
    slow.go.set()
    grammars = Grammars(slow)
    for count in range(70):
        grammars.find(GrammarSpec(regex=f"a{{{count + 1}}}")).result()
    grammars.find(GrammarSpec(regex="a{70}")).result()
    assert slow.compiled == 70
    grammars.find(GrammarSpec(regex="a{1}")).result()
    assert slow.compiled == 71


def test_texts_of_one_grammar_never_fill_its_lexer(
    compiler: GrammarCompiler, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its states are shared by all texts and kept: when they are too many, a text goes on with new ones."""
    form = GrammarSpec(regex="[a-z]{1,40}(a[a-z]{3}b)?([a-y]{1,20}|[b-z]{1,20})!")
    plain, chance = compiler.compile(form), torch.Generator().manual_seed(3)
    monkeypatch.setattr("service.grammar._MAX_STATES", 300)
    grammar = compiler.compile(form)
    for _ in range(30):
        cursor, expected = grammar.start(), plain.start()
        while not cursor.finished:
            allowed = sorted(tokens_of(cursor.allowed()))
            assert cursor.allowed() == expected.allowed()
            token = allowed[int(torch.randint(len(allowed), (), generator=chance))]
            assert cursor.allowed([token]) == expected.allowed([token])
            cursor.accept(token)
            expected.accept(token)
    assert grammar.matcher()[0] > 2, "the lexer was never renewed: the test shows nothing"
