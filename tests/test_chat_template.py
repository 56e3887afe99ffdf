"""ChatTemplate against transformers' apply_chat_template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jinja2 import UndefinedError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from service.chat_template import Chat, ChatTemplate
from service.contract.errors import InvalidRequestError
from tests.support.fake_engine import build_tokenizer

DEMO = Path(__file__).parents[1] / "model_store/demo/base"
TURNS = [
    {"role": "system", "content": "Be <brief> & naïve."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "  Yes?\n"},
    {"role": "user", "content": '{"a": 1} 🙂'},
]
TEMPLATES = {
    "demo": (DEMO / "chat_template.jinja").read_text(),
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "blocks": "{%- for m in messages %}\n  {%- if m['role'] == 'system' %}\n    {%- continue %}\n  {%- endif %}\n"
    "{{ m | tojson }}{{ m.content | trim }}\n{%- endfor %}\n{{ bos_token }}",
    "sums": "{{ 2 ** 3 * 4 - 6 // 4 + 7 % 4 }}{{ 1 / 2 }}{{ 'ab' * 2 + 'c' }}{{ '%s' % 'd' }}{{ [1] + [2] }}",
    "absent": "{{ tools is none }}{{ documents is none }}{% if tools is not none %}{{ tools[0] }}{% endif %}"
    "{% if documents is not none %}{{ documents[0] }}{% endif %}{% if tools %}t{% endif %}{{ tools }}{{ x is defined }}"
    "{{ x }}{{ messages[0].tool_calls is defined }}{{ x | default('d') }}{% set tools = [1] %}{{ tools }}",
    "names": "{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}{% endgeneration %}{{ a }}"
    "{% for m in messages %}{% generation %}{{ loop.index }}{{ m.role }}{% endgeneration %}{% endfor %}",
    "tojson": "{{ messages | tojson(indent=2) }}{{ messages | tojson(true) }}{{ messages | tojson(false, 1) }}"
    "{{ messages | tojson(separators=(',', ':'), sort_keys=true) }}"
    "{{ messages | tojson(false, none, (',', ':'), true) }}",
    "state": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + loop.index %}{% endfor %}"
    "{{ ns.n }}"
    "{{ dict(a=1) | tojson }}{{ dict.fromkeys(['a'], 1) }}{% macro f(a, b=2) %}{{ a }}{{ b }}{% endmacro %}{{ f(1) }}",
    "filters": "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join('|') | e }}"
    "{{ messages[0].content.split('<')[0].strip() }}{{ messages[1:] | length }}{{ none }}{{ [none, true, 1e20] }}"
    "{%- set x -%} a {%- endset -%}{{ x }}{{ strftime_now('%Y') }}{{ messages | string }}{{ 'a' ~ 1 ~ none }}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages | tojson(default=1) }}", "got an unexpected keyword argument 'default'"),
        ("{{ x.y }}", "'x' is undefined"),
        ("{{ documents.x.y }}", "'None' has no attribute 'x'"),
    ],
)
def test_what_transformers_refuses(source: str, message: str) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(), chat_template=source)
    with pytest.raises((TypeError, UndefinedError), match=message):
        theirs.apply_chat_template(TURNS, tokenize=False)
    with pytest.raises(InvalidRequestError, match=message):
        ChatTemplate(source, {}).render(Chat(TURNS))


@pytest.mark.parametrize("name", TEMPLATES)
def test_as_transformers_writes_it(name: str) -> None:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    theirs = PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(), chat_template=TEMPLATES[name], **tokens)
    expected = theirs.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(TEMPLATES[name], tokens).render(Chat(TURNS)) == expected


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


def test_arguments_that_are_json_text_are_objects_to_a_template() -> None:
    """As tests of models' templates write them; a text that is none, as of a call that was cut off, stays."""

    def turns(*arguments: object) -> list[dict[str, object]]:
        calls = [{"type": "function", "function": {"name": "f", "arguments": one}} for one in arguments]
        return [*TURNS, {"role": "assistant", "content": "", "tool_calls": calls}, {"role": "tool", "content": "1"}]

    source = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}({% if c.function.arguments is mapping %}{% for k, v in c.function.arguments.items() %}"
        "{{ k }}={{ v | tojson }};{% endfor %}{% else %}{{ c.function.arguments | tojson }}{% endif %}){% endfor %}"
        "{% endfor %}"
    )
    theirs = PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(), chat_template=source)
    objects = ({"b": 1, "a": {"x": [None, 1.5, "é"]}}, {}, [1], '{"cut', "5")
    texts = ('{"b": 1, "a": {"x": [null, 1.5, "é"]}}', "{}", "[1]", '{"cut', "5")
    expected = theirs.apply_chat_template(turns(*objects), tokenize=False)
    for given in (objects, texts):
        chat = Chat(turns(*given), add_generation_prompt=False)
        assert ChatTemplate(source, {}).render(chat) == expected
        assert chat.messages == turns(*given), "the caller's messages are the caller's"


@pytest.mark.parametrize("content", ["Yes, it", " Yes, it \n", "a\n\nb ", ""])
@pytest.mark.parametrize("name", ["demo", "chatml", "trimmed"])
def test_a_last_message_is_continued_as_transformers_does(name: str, content: str) -> None:
    trimmed = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }};{% endfor %}"
    source = TEMPLATES.get(name, trimmed)
    theirs = PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(), chat_template=source, bos_token="<s>")
    turns = [*TURNS, {"role": "assistant", "content": content}]
    expected = theirs.apply_chat_template(turns, tokenize=False, continue_final_message=True)
    chat = Chat(turns, add_generation_prompt=False, continue_final_message=True)
    assert ChatTemplate(source, {"bos_token": "<s>"}).render(chat) == expected
    assert expected.endswith(content if name != "trimmed" else content.strip())


def test_a_template_that_leaves_the_last_message_out_cannot_continue_it() -> None:
    for source in ("{{ messages[0].content }}", "{{ messages[-1].content | replace('Yes', 'No') }}"):
        with pytest.raises(InvalidRequestError, match="continue_final_message"):
            ChatTemplate(source, {}).render(Chat(TURNS[:3], continue_final_message=True))


def test_tools_and_variables_are_those_of_transformers() -> None:
    both = {"default": "d{{ tools }}{{ mood }}{{ documents }}", "tool_use": "t{{ tools | tojson }}{{ mood }}"}
    theirs = PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(), chat_template=both)
    ours = ChatTemplate(both["default"], {}, both["tool_use"])
    for tools in (None, TOOLS):
        for variables in ({}, {"mood": {"good": [1]}, "documents": [{"title": "x", "text": "y"}]}):
            expected = theirs.apply_chat_template(TURNS, tokenize=False, tools=tools, **variables)
            assert ours.render(Chat(TURNS, tools, add_generation_prompt=False, variables=variables)) == expected


def test_where_a_template_is_found(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ bos_token }}d"}]
    config = {"chat_template": named, "bos_token": {"content": "<s>"}, "eos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = ChatTemplate.load(tmp_path)
    assert found is not None
    assert found.render(Chat(TURNS)) == "<s>d"
    assert found.render(Chat(TURNS, TOOLS)) == "tools"
    (tmp_path / "chat_template.jinja").write_text("file")
    found = ChatTemplate.load(tmp_path)
    assert found is not None
    assert found.render(Chat(TURNS)) == "file"


TEMPLATE, FOLDER = "chat_template.jinja", "additional_chat_templates"


@pytest.mark.parametrize(
    ("files", "has_field"),
    [
        ((TEMPLATE, f"{FOLDER}/tool_use.jinja"), True),
        ((TEMPLATE, f"{FOLDER}/default.jinja"), True),
        ((f"{FOLDER}/default.jinja",), True),
        ((f"{FOLDER}/default.jinja", f"{FOLDER}/rag.jinja"), False),
        ((f"{FOLDER}/tool_use.jinja",), True),
        ((f"{FOLDER}/tool_use.jinja",), False),
        ((f"{FOLDER}/tool_use.json",), True),
        ((), True),
    ],
)
def test_which_of_several_templates_as_transformers_chooses(
    tmp_path: Path, files: tuple[str, ...], has_field: bool
) -> None:
    build_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "field"} if has_field else {}))
    (tmp_path / FOLDER).mkdir()
    for name in files:
        (tmp_path / name).write_text(name)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), ChatTemplate.load(tmp_path)
    if ours is None:
        with pytest.raises(ValueError, match="multiple chat templates with no default"):
            theirs.apply_chat_template(TURNS, tokenize=False)
    else:
        assert ours.render(Chat(TURNS)) == theirs.apply_chat_template(TURNS, tokenize=False)
        tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
        theirs_with_tools = theirs.apply_chat_template(TURNS, tools=tools, tokenize=False)
        assert ours.render(Chat(TURNS, tools=tools)) == theirs_with_tools


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}{{ messages[0].__class__.__base__.__subclasses__() }}",
        "{{ messages[0].content + 1 }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 1 // 0 }}",
        "{{ 2.0 ** 5000 }}",
        "{{ {}.popitem() }}",
        "{{ messages[0].nothing.more }}",
        "{{ messages.nothing() }}",
        "{{ messages[5].content }}",
        "{{ messages | map(attribute='a.b') | join | int('x') }}{{ strftime_now(1) }}",
        "{{ '%d' % 'x' }}",
        "{{ '{0}{1}'.format(1) }}",
        "{{ self | tojson }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ 10 ** 5000 }}",
        "{{ raise_exception(10 ** 5000) }}",
        "{{ raise_exception() }}",
        "{% include 'other' %}",
        "{{ ''.join(messages) }}",
    ],
)
def test_a_template_that_refuses_is_the_caller_s_error(source: str) -> None:
    """In whichever of Python's ways it fails."""
    with pytest.raises(InvalidRequestError) as caught:
        ChatTemplate(source, {}).render(Chat([{"role": "user", "content": "x"}]))
    assert caught.value.param == "messages"
    assert caught.value.message.startswith("the model's chat template does not take these messages: ")
    assert len(caught.value.message.splitlines()) == 1


def test_what_went_wrong_is_named_in_few_words() -> None:
    def message_of(source: str) -> str:
        with pytest.raises(InvalidRequestError) as caught:
            ChatTemplate(source, {}).render(Chat(TURNS))
        return caught.value.message.partition("messages: ")[2]

    assert message_of("{{ raise_exception('roles must\n alternate') }}") == "roles must alternate"
    assert message_of("{{ 1 // 0 }}") == "ZeroDivisionError: integer division or modulo by zero"
    assert message_of("{{ raise_exception('x' * 5000) }}") == "x" * 300


def test_compiling_computes_nothing() -> None:
    """As Jinja does by itself; this one would take years."""
    ChatTemplate("{% if False %}{{ 9 ** 9 ** 9 }}{% endif %}{{ 9 ** 9 ** 9 }}", {})
