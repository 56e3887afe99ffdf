"""Ways to write a path so that a guard and a router might read it differently."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote

CONTROL = ("%0A", "%0D", "%0D%0A", "%09", "%00", "%0B", "%0C", "%1C", "%1F", "%7F", "%C2%85", "%E2%80%A8", "%E2%80%A9")
_ENDS = (*CONTROL, "%20", "%85", "%C2%A0", "%EF%BB%BF", "%CC%81", ".", "..", "%2e", "%2E%2e", "/.", "/..", "/%2e%2e")
_ENDS_AGAIN = (
    "/",
    "//",
    "%2F",
    ";",
    ";x",
    ";x=y",
    "%3Bx",
    "%3F",
    "%23",
    "%25",
    "\\",
    "%5C",
    "%",
    "%zz",
    "*",
    "~",
    ":80",
)
_STARTS = ("/", "/.", "/./", "/..", "/%2e", "/x/..", "/x/%2e%2e", "/web/..", "/web/%2e%2e", "/livez/..", "\\", "%5C")
_STARTS_AGAIN = ("/%0A", "/%00", "%0A", "/%20", "/%09", ";", "/;", "%2F", "/livez%0A", "/livez%00", "/%2F")
_LIKE = {
    "a": "а",
    "c": "с",
    "e": "е",
    "i": "ı",
    "o": "о",
    "p": "р",
    "s": "ſ",
    "k": "\u212a",
    "/": "\u2215",
    ".": "\u2024",
}


def spellings(path: str) -> Iterator[str]:
    """Raw paths, as they stand in a request line: some are other spellings of `path`, others only look so."""
    yield path
    for index, letter in enumerate(path):
        before, after = path[:index], path[index + 1 :]
        yield f"{before}%{ord(letter):02x}{after}"
        yield f"{before}%25{ord(letter):02X}{after}"
        yield f"{before}{quote(chr(ord(letter) + 0xFEE0))}{after}"  # of full width
        if letter in _LIKE:
            yield f"{before}{quote(_LIKE[letter])}{after}"
        if letter == "/":
            yield f"{before}//{after}"
            yield f"{before}/./{after}"
            yield f"{before}\\{after}"
    yield "".join(f"%{ord(letter):02X}" for letter in path)
    yield from (path.upper(), path.title(), path.swapcase())
    yield from (f"{path}{end}" for end in (*_ENDS, *_ENDS_AGAIN))
    yield from (f"{start}{path}" for start in (*_STARTS, *_STARTS_AGAIN))
    middle = len(path) // 2
    yield from (f"{path[:middle]}{character}{path[middle:]}" for character in CONTROL)
