"""Patterns of ECMAScript as expressions of the texts that JSON writes. Oracle: the package `regex`."""

from __future__ import annotations

from pathlib import Path

import pytest
import regex

from service.api.structured_output import terminals
from service.api.structured_output.pattern_regex import PatternError, pattern_regex
from service.grammar import GrammarCompiler

ROOT = Path(__file__).parents[3]
PATTERNS = [
    "^a+$", "a|^b$", "^[a-c]{2,3}?$", r"^\d+$", r"^\S+$", r"^\s$", r"^[^\d\s]+$", r"^\W$", r"^[\w.-]+@[\w-]+$",
    r"^\x41\u0042\n$", r'^"\\"$', r"^\\$", r"^[\]\\\"]$", '^[^"]*$', "^.$", "^.*$", r"^\p{L}+$", r"^[\p{L}']+$",
    r"^[^\p{L}]$", "^(foo|bar)+$", "(?:x)y", "^$", "", r"^[-a]$", r"^[a-]$", r"^[+--]$", r"^[(*+?{2}]$", r"^[(?:-a]$",
    r"^\/a\-b$", "^{a}$", "^a{$", r"^[\t-\r]$", "^[^a]$", r"^\D$", r"^[\D]$", r"^[^\D]$", r"^[^\S]$", r"^[^\W]$",
    r"^[\S\s]$", r"^[\d-x]$", "^[a-z]+(?<n>b)$", r"^[[a]$", r"^a&&b$", r"^\P{L}$", r"^[\P{L}]$",
]  # fmt: skip
TEXTS = [
    *("", "a", "aa", "b", "ab", "ac", "é", "\n", '"', "\\", "\x00", "\x1c", "\x85", "\ufeff", "\u2028", "٣", "1", "12"),
    *(
        "x y",
        "a@b-c",
        "AB\n",
        '"\\"',
        "]",
        "[",
        "🙂",
        "foo",
        "foobar",
        "xy",
        "-",
        "+",
        ",",
        "(",
        "{",
        "*",
        "2",
        "}",
        ":",
    ),
    *("/a-b", "{a}", "a{", "\t", "\r", "ab'", "_", " ", "\u00a0", "aab", "a&&b", "\x7f", "cb", "x" * 41, "?"),
]
# Where readers of patterns do not agree about a class, these are left out.
NOT_FOR_ALL = set("é\x1c\x85\ufeff\u2028٣\r\n\u00a0_")


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(str(ROOT / "model_store/demo/base/tokenizer.json"), 1024, [1])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_matches_what_the_pattern_matches(compiler: GrammarCompiler, pattern: str) -> None:
    """Nothing else, and all of it but characters that some readers count to a class and others do not."""
    expression = terminals.regex(pattern_regex(pattern))
    for text in TEXTS:
        ours = compiler.fits(terminals.all_of([terminals.string(text), expression]))
        theirs = regex.search(pattern.replace("(?<", "(?P<").replace("$", r"\Z"), text, regex.V0) is not None
        assert ours <= theirs, text
        assert ours == theirs or set(text) & NOT_FOR_ALL, text


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(?=a)", "look-around"), ("(?<!a)b", "look-around"), ("(?i)a", "nothing to repeat"),
        ("(^a|b)$", "within"), ("a$b", "where only"), ("a**", "nothing to repeat"), ("*", "nothing to repeat"),
        ("a{,3}", "some engines"),
        ("(a", "ends within"), ("a)", "without its ("), ("[a", "ends within"), ("[]", "empty class"),
        ("[b-a]", "range"), (r"\1", "does not know"), (r"\bx", "does not know"), (r"\p", "property"),
        ("\\", "backslash"),
        (r"\ud800", "no character"), (r"[a-\d]", "end of a range"), ("(" * 60 + ")" * 60, "50 deep"),
    ],
)  # fmt: skip
def test_what_cannot_be_held_is_refused(pattern: str, words: str) -> None:
    with pytest.raises(PatternError, match=words.replace("(", r"\(")):
        pattern_regex(pattern)
