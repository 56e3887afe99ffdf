"""Regular expressions of JSON numbers within bounds, on decimal digits: exact, however large the bounds are.

A bound is one expression; two bounds are the intersection of two. The texts are those of `TEXT`: no plus sign, no
leading zeros, and an exponent only where nothing bounds the number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from fractions import Fraction
from math import ceil, floor, inf, nextafter

INTEGER = "(?:0|-?[1-9][0-9]*)"
DECIMAL = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?"
TEXT = rf"{DECIMAL}(?:[eE][+-]?[0-9]{{1,2}})?"

MAX_DIGITS = 40  # of a number that is still written out
_ANY_DIGITS = 1000  # more than any double has


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds; `digits` is how many a number may have (None: any), as far as its bounds allow."""

    least: Decimal | None = None
    most: Decimal | None = None
    above: bool = False  # least itself is excluded
    below: bool = False
    integral: bool = False
    digits: int | None = None

    def at_least(self, bound: int | float, strict: bool) -> Range:
        """The numbers that are at least the bound, or over it, as well."""
        value = exact(bound)
        if self.least is not None and (value, strict) <= (self.least, self.above):
            return self
        return replace(self, least=value, above=strict)

    def at_most(self, bound: int | float, strict: bool) -> Range:
        """The numbers that are at most the bound, or under it, as well."""
        value = exact(bound)
        if self.most is not None and (value, not strict) >= (self.most, not self.below):
            return self
        return replace(self, most=value, below=strict)

    def has(self, number: int | float) -> bool:
        """Whether a number is one of them."""
        value = exact(number)
        if self.least is not None and (value < self.least or (self.above and value == self.least)):
            return False
        if self.most is not None and (value > self.most or (self.below and value == self.most)):
            return False
        return not self.integral or value == int(value)

    def normal(self, multiple: int = 1) -> Range | None:
        """The same numbers, their bounds included and among them where they are integers; None: there is none.

        A fraction is compared as a double, and one next to a bound may be the bound itself as a double. So a bound
        that is excluded, or is no double, becomes the next double inward.
        """
        digits = self.digits
        if digits is not None:
            bounds = [one for one in (self.least, self.most) if one is not None]
            digits = max([digits, *(_digits_before_point(one) + 1 for one in bounds)])
        if self.integral:
            return self._integers(multiple, digits)
        least = None if self.least is None else _inward(self.least, self.above, inf)
        most = None if self.most is None else _inward(self.most, self.below, -inf)
        made = Range(least, most, digits=digits)
        return made if made._has_one() else None

    def _integers(self, multiple: int, digits: int | None) -> Range | None:
        least = most = None
        if self.least is not None:
            start = floor(self.least) + 1 if self.above else ceil(self.least)
            least = Decimal(-(-start // multiple) * multiple)
        if self.most is not None:
            end = ceil(self.most) - 1 if self.below else floor(self.most)
            most = Decimal(end // multiple * multiple)
        if least is not None and most is not None and least > most:
            return None
        return Range(least, most, integral=True, digits=digits)

    def _has_one(self) -> bool:
        """Whether a decimal of few enough digits lies between the bounds, which are included."""
        if self.least is None or self.most is None or self.least <= 0 <= self.most:
            return self.least is None or self.most is None or self.least <= self.most
        least, most = Fraction(self.least), Fraction(self.most)
        for places in range((self.digits or MAX_DIGITS) + 1):
            unit = Fraction(1, 10**places)
            first, last = ceil(least / unit) * unit, floor(most / unit) * unit
            if first <= last and (self._is_short(first, places) or self._is_short(last, places)):
                return True
        return False

    def _is_short(self, value: Fraction, places: int) -> bool:
        return self.digits is None or len(str(floor(abs(value)))) + places <= self.digits

    def regexes(self) -> list[str]:
        """The expressions that a text must match, all of them; of a range that `normal` has made."""
        bounded = self.least is not None or self.most is not None
        found = [INTEGER if self.integral else DECIMAL if bounded else TEXT]
        if self.least is not None:
            found.append(_at_least(self.least, self.integral))
        if self.most is not None:
            found.append(_at_most(self.most, self.integral))
        if self.digits is not None:
            found.append(f"[^0-9]*(?:[0-9][^0-9]*){{1,{self.digits}}}")
        return found


def exact(bound: int | float) -> Decimal:
    """The number that a schema's number means: a fraction's shortest decimals, and every integer exactly."""
    return Decimal(int(bound)) if bound == int(bound) else Decimal(repr(bound))


def is_too_long(number: int | float | Decimal) -> bool:
    """Whether a number has more digits before its point than are written out."""
    return bool(abs(number) >= 10**MAX_DIGITS)


def _digits_before_point(value: Decimal) -> int:
    return min(MAX_DIGITS, max(1, value.adjusted() + 1))


def _inward(value: Decimal, strict: bool, towards: float) -> Decimal:
    """The nearest bound inward that is included, is a double where the value is none, and is short enough to write."""
    double = float(value)
    is_short = double < value if towards > 0 else double > value
    if strict or abs(value) >= 2**53:
        moves = is_short or (strict and exact(double) == value)
        value = exact(nextafter(double, towards) if moves else double)
    exponent = value.as_tuple().exponent
    if isinstance(exponent, int) and exponent < -MAX_DIGITS:
        rounding = ROUND_CEILING if towards > 0 else ROUND_FLOOR
        return value.quantize(Decimal(1).scaleb(-MAX_DIGITS), rounding, Context(prec=_ANY_DIGITS))
    return value


def _at_least(bound: Decimal, integral: bool) -> str:
    fraction = "" if integral else r"(?:\.[0-9]+)?"
    if bound < 0:
        return f"(?:[0-9.]+|-{_magnitude_at_most(-bound, fraction)})"
    return "[0-9.]+" if bound == 0 else _magnitude_at_least(bound, fraction)


def _at_most(bound: Decimal, integral: bool) -> str:
    fraction = "" if integral else r"(?:\.[0-9]+)?"
    if bound < 0:
        return f"-{_magnitude_at_least(-bound, fraction)}"
    return f"(?:-[0-9.]+|{_magnitude_at_most(bound, fraction)})"


def _magnitude_at_least(bound: Decimal, fraction: str) -> str:
    whole, places = _parts(bound)
    rest = rf"{whole}\.{_places_over(places)}" if places else f"{whole}{fraction}"
    return f"(?:{_integers_from(int(whole) + 1)}{fraction}|{rest})"


def _magnitude_at_most(bound: Decimal, fraction: str) -> str:
    if is_too_long(bound):
        return f"[0-9]{{1,{MAX_DIGITS}}}{fraction}"
    whole, places = _parts(bound)
    found = [f"{_integers_to(int(whole) - 1)}{fraction}"] if int(whole) else []
    if places:
        found.append(rf"{whole}(?:\.{_places_under(places)})?")
    else:
        found.append(rf"{whole}(?:\.0+)?" if fraction else whole)
    return f"(?:{'|'.join(found)})"


def _parts(value: Decimal) -> tuple[str, str]:
    whole, _, places = f"{value:f}".partition(".")
    return whole, places.rstrip("0")


def _integers_from(least: int) -> str:
    digits = str(least)
    same = [f"{digits[:i]}[{int(d) + 1}-9][0-9]{{{len(digits) - i - 1}}}" for i, d in enumerate(digits) if d != "9"]
    return f"(?:{'|'.join([digits, *same])}|[1-9][0-9]{{{len(digits)},}})"


def _integers_to(most: int) -> str:
    digits, found = str(most), [str(most)]
    for i, digit in enumerate(digits):
        first = 1 if i == 0 and len(digits) > 1 else 0
        if int(digit) > first:
            found.append(f"{digits[:i]}[{first}-{int(digit) - 1}][0-9]{{{len(digits) - i - 1}}}")
    if len(digits) > 1:
        found.append("[0-9]")
    if len(digits) > 2:
        found.append(f"[1-9][0-9]{{1,{len(digits) - 2}}}")
    return f"(?:{'|'.join(found)})"


def _places_over(places: str) -> str:
    """Decimal places that make at least as much as these."""
    found = [f"{places[:i]}[{int(d) + 1}-9][0-9]*" for i, d in enumerate(places) if d != "9"]
    return f"(?:{'|'.join([*found, f'{places}[0-9]*'])})"


def _places_under(places: str) -> str:
    """Decimal places that make at most as much as these."""
    found = [f"{places[:i]}[0-{int(d) - 1}][0-9]*" for i, d in enumerate(places) if d != "0"]
    found += [places[:i] for i in range(1, len(places))]
    return f"(?:{'|'.join([*found, f'{places}0*'])})"
