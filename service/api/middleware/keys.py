"""The keys that callers may send: read from a file and a variable, and read again when they are to be replaced."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from pydantic import SecretStr

from service.contract.errors import SettingsError

_MIN_KEY_CHARACTERS = 8


class Keys:
    """Some keys, of which only digests are kept."""

    def __init__(self, file: str | None, listed: SecretStr | None, flag: str) -> None:
        """Keys of a file (one a line, # begins a comment) and of a variable (separated by commas).

        Raises SettingsError for a file that cannot be read or has none, and for a key that is too short to be one.
        """
        self.file = file
        self._listed = listed
        self._flag = flag
        self._digests = self.read()

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __len__(self) -> int:
        return len(self._digests)

    def have(self, key: str) -> bool:
        """Whether this is one of them; takes the same time whichever it is, and when it is none."""
        given = _digest(key)
        return sum(hmac.compare_digest(given, digest) for digest in self._digests) > 0

    def read(self) -> frozenset[bytes]:
        """Digests of the keys as file and variable have them now. Raises SettingsError."""
        keys = [] if self._listed is None else self._listed.get_secret_value().split(",")
        if self.file is not None:
            keys += self._in_file(self.file)
        keys = [key.strip() for key in keys]
        for key in keys:
            if len(key) < _MIN_KEY_CHARACTERS or not key.isascii() or not key.isprintable() or " " in key:
                raise SettingsError(
                    f"one of the {self._flag}s is not {_MIN_KEY_CHARACTERS} or more ASCII characters without a space",
                    hint="make one with: openssl rand -hex 24",
                )
        return frozenset(map(_digest, keys))

    def replace(self, digests: frozenset[bytes]) -> None:
        """From the next request on, what `read` has returned counts."""
        self._digests = digests

    def _in_file(self, file: str) -> list[str]:
        try:
            lines = Path(file).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise SettingsError(f"--{self._flag}-file {file} cannot be read: {reason}") from None
        keys = [line for line in lines if line.strip() and not line.startswith("#")]
        if not keys and self._listed is None:
            raise SettingsError(f"--{self._flag}-file {file} has no key", hint="write one key on each line")
        return keys


def reload(every: list[Keys]) -> str:
    """Reads all of them again, and replaces all or none. Returns a line for the log. Raises SettingsError."""
    found = [keys.read() for keys in every]
    for keys, digests in zip(every, found, strict=True):
        keys.replace(digests)
    return ", ".join(f"{len(keys)} in {keys.file}" for keys in every if keys.file is not None)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
