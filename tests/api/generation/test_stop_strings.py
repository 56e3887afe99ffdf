"""Stop strings in a growing text, against str.find."""

from __future__ import annotations

import random

import pytest

from service.api.generation.stop_strings import Pattern, Patterns, StopStrings


@pytest.mark.parametrize(
    "stops", [["ab"], ["aab", "ba"], ["aaa"], ["abab", "b"], ["c", "abc"], ["a", "aa", "aaab"], ["abcabc", "cab"]]
)
def test_stop_strings_cut_where_find_says(stops: list[str]) -> None:
    generator = random.Random(1)
    for _ in range(300):
        text = "".join(generator.choice("abc") for _ in range(generator.randrange(12)))
        ends = {end for stop in stops for end in range(len(text) + 1) if text[:end].endswith(stop)}
        end = min(ends, default=None)
        longest = max((len(stop) for stop in stops if end is not None and text[:end].endswith(stop)), default=0)
        expected = text if end is None else text[: end - longest]
        matcher, given, position = StopStrings(Patterns(stops)), "", 0
        while position < len(text) and not matcher.found:
            size = generator.randrange(1, 4)
            given += matcher.push(text[position : position + size])
            assert expected.startswith(given), "text was given out that a stop string may claim"
            position += size
        assert given + matcher.flush() == expected
        assert matcher.found == (end is not None)


def test_what_may_begin_a_stop_string_is_held_back_and_nothing_else() -> None:
    matcher = StopStrings(Patterns(["END"]))
    assert [matcher.push(text) for text in ["a E", "N", "x", "EN", "E", "ND", "more"]] == [
        "a ",
        "",
        "ENx",
        "",
        "EN",
        "",
        "",
    ]
    assert matcher.found


def test_special_tokens_count_for_the_stops_that_name_them() -> None:
    """ "<e>" is one: it is not in the text, and a stop string may go on before and after it."""
    patterns = Patterns(["<e>\n", "x<e>", "ab"], ["<e>", "<s>"])

    def given(*pushes: str) -> tuple[list[str], bool]:
        stops = StopStrings(patterns)
        texts = [stops.push_special(push) if push[0] == "<" else stops.push(push) for push in pushes]
        return [*texts, stops.flush()], stops.found

    assert given("one", "<e>", "\ntwo") == (["one", "", "", ""], True)
    assert given("one", "<e>", "two") == (["one", "", "two", ""], False)
    assert given("one x", "<e>", "two") == (["one ", "", "", ""], True)
    assert given("one x", "<s>", "<e>", "y") == (["one ", "x", "", "y", ""], False)
    assert given("a", "<s>", "b") == (["", "", "", ""], True), "a special token is not in the text of other stops"
    assert given("1", "<e>", "<e>", "\n") == (["1", "", "", "", ""], True)


def test_a_stop_string_that_is_complete_too_early_is_passed_over() -> None:
    for text, early, expected in (("ENDEND.", 3, "END"), ("ENDx", 3, "ENDx"), ("aEND", 3, "a"), ("ababab", 4, "abab")):
        stops = StopStrings(Patterns(["END", "abab"]))
        given = [stops.push(character, may_end=place >= early) for place, character in enumerate(text)]
        assert "".join(given) + stops.flush() == (expected if expected != "abab" else "ab"), text


def test_only_what_the_text_may_be_in_the_middle_of_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 strings of 1,024 characters cost no more than one."""
    looked: list[str] = []
    advance = Pattern.advance

    def counted(self: Pattern, matched: int, character: str) -> int:
        looked.append(character)
        return advance(self, matched, character)

    monkeypatch.setattr(Pattern, "advance", counted)
    stops = StopStrings(Patterns([chr(0x4E00 + number) + "x" * 1023 for number in range(64)]))
    assert stops.push("plain text " * 100 + "\u4e00xy") == "plain text " * 100 + "\u4e00xy"
    assert looked == ["\u4e00", "x", "y"]
