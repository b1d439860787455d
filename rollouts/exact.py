"""Exact values of written numbers and expressions: fractions and square roots, as people and LaTeX
write them.

What is not understood to its end has no value: nothing is read off a part of it.
"""

import math
import re
from fractions import Fraction
from typing import NamedTuple

from rlhf.fields import documented

LONGEST = 300  # characters of an expression
DEEPEST = 12  # parentheses in parentheses
BITS = 20_000  # of a power
SQUARE = 10**10  # the largest number that is searched for square factors


@documented
class Surd(NamedTuple):
    """`Σ factor · √n`, irrational.

    Attributes:
      terms: n without square factors, ascending; factors other than 0.
    """

    terms: tuple[tuple[int, Fraction], ...]

    def __float__(self) -> float:
        return math.fsum(float(factor) * math.sqrt(n) for n, factor in self.terms)


Value = Fraction | Surd


class Unreadable(ValueError):
    """An expression that is not understood, or has no value."""


def value(text: str) -> tuple[Value, str]:
    """The value of the expression that a text begins with, and what follows it.

    Reads signs, decimals, thousands (`1,234`), exponents (`1.5e3`), fractions, mixed numbers
    (`3/4`, `\\frac{3}{4}`, `1 3/4`), `+ - * /`, powers, square roots, and roots that are rational.
    `1/2\\sqrt{3}`, which people read in two ways, is not read.

    Args:
      text: as `plain` gives it.

    Raises: Unreadable for a text that begins with no such expression, one too long or too deep, and
    one without a value.

    >>> value("2^{10}"), value("6/4 cups")
    ((Fraction(1024, 1), ''), (Fraction(3, 2), ' cups'))
    >>> value(r"\\sqrt{12}") == value(r"2\\sqrt{3}"), value(r"2\\sqrt{3}") == value(r"5\\sqrt{3}")
    (True, False)
    """
    if len(text) > LONGEST:
        raise Unreadable(f"{len(text)} characters")
    reader = _Reader(text)
    found = reader.sum(0)
    return _of_terms(found), text[reader.at :]


def plain(text: str) -> str:
    """LaTeX and typographic signs as the signs that `value` reads.

    >>> plain(r"$-\\dfrac{1}{2} \\times 10\\,000$")
    '-\\\\frac{1}{2} * 10000'
    """
    text = text.strip().strip("*").strip()
    # Marks of mathematics around the whole text.
    for opening, closing in (("\\(", "\\)"), ("\\[", "\\]"), ("$", "$")):
        if len(text) > 1 and text.startswith(opening) and text.endswith(closing):
            text = text[len(opening) : -len(closing)]
    text = re.sub(
        r"\\(?:left|right|displaystyle|quad|,|!|;|:)(?![a-zA-Z])|~", "", text.replace("{,}", ",")
    )
    text = re.sub(r"\^ ?\{? ?\\circ ?\}?", "°", text)
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"(?<![\\a-zA-Z])sqrt(?=\s*\()", r"\\sqrt", text)
    for written, sign in _SIGNS.items():
        text = text.replace(written, sign)
    text = re.sub(r"\\(?:cdot|times)(?![a-zA-Z])", "*", text)
    return re.sub(r"\\div(?![a-zA-Z])", "/", text).strip()


_SIGNS = {
    "−": "-",
    "×": "*",
    "⋅": "*",
    "·": "*",
    "∗": "*",
    "÷": "/",
    "⁄": "/",
    "√": "\\sqrt",
    "²": "^2",
    "³": "^3",
}
_SIGNS |= {"\\%": "%", "\\$": "$", "\\ ": " "}
_NUMBER = re.compile(
    r"((?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+)(?:[eE]([-+]?\d{1,3})(?![\w.]))?",
    re.ASCII,
)
_MIXED = re.compile(r"(\d+) +(\d+) ?/ ?(\d+)(?![\d.,^])", re.ASCII)
_MIXED_LATEX = re.compile(
    r"(\d+) *\\frac *(?:\{ *(\d+) *\} *\{ *(\d+) *\}|(\d) *(\d)(?!\d))(?! *\^)", re.ASCII
)

_Terms = dict[int, Fraction]  # n -> factor of √n; 1 is what is rational


class _Reader:
    """Recursive descent over a text."""

    def __init__(self, text: str):
        self.text = text
        self.at = 0

    def sum(self, depth: int) -> _Terms:
        if depth > DEEPEST:
            raise Unreadable("too deep")
        total = self.product(depth)
        # The sign must stand before a term: in "5 - km" it does not belong to the number.
        while sign := self.take(r" *([-+])(?! *[-+*/^]) *(?=[\d.(\\{])"):
            factor = self.product(depth)
            total = _add(total, factor if sign.strip() == "+" else _times(factor, _number(-1)))
        return total

    def product(self, depth: int) -> _Terms:
        found = self.signed(depth)
        divided = False
        while True:
            if sign := self.take(r" *(\*(?!\*)|/) *"):
                other = self.signed(depth)
                found = _times(found, other) if "*" in sign else _divided(found, other)
                divided |= "/" in sign
            elif self.sees(r" *(\(|\\sqrt|\\frac)"):
                # "1/2√3" is (1/2)√3 to some and 1/(2√3) to others; "2 1/2" as LaTeX is a mixed
                # number.
                bare = self.text[: self.at].rstrip()[-1:].isdigit()
                if divided or (bare and self.sees(r" *\\frac")):
                    raise Unreadable("a product without a sign, that can be read in two ways")
                self.take(" *")
                found = _times(found, self.power(depth))
            else:
                return found

    def signed(self, depth: int) -> _Terms:
        sign = self.take(r"([-+]) ?")
        found = self.power(depth)
        return _times(found, _number(-1)) if sign.startswith("-") else found

    def power(self, depth: int) -> _Terms:
        base = self.atom(depth)
        if not self.take(r" *(\^|\*\*) *"):
            return base
        in_braces = self.sees(r"[{(]")
        exponent = (
            self.atom(depth)
            if in_braces
            else _number(int(self.take(r"-?\d{1,5}(?![\d.])") or self.fail()))
        )
        if self.sees(r" *(\^|\*\*)"):
            self.fail()
        return _power(base, exponent)

    def atom(self, depth: int) -> _Terms:
        # Mixed numbers come before plain ones, which would read their first part.
        for pattern in (_MIXED, _MIXED_LATEX):
            if found := pattern.match(self.text, self.at):
                integer, *parts = (int(_digits(digits)) for digits in found.groups() if digits)
                # "1 5/4" is no mixed number; its writer meant something else.
                if not 0 < parts[0] < parts[1]:
                    self.fail()
                self.at = found.end()
                return _number(integer + Fraction(*parts))
        if found := _NUMBER.match(self.text, self.at):
            self.at = found.end()
            return _number(
                Fraction(_digits(found[1].replace(",", ""))) * Fraction(10) ** int(found[2] or 0)
            )
        for opening, closing in (("(", ")"), ("{", "}")):
            if self.take(rf" *\{opening} *"):
                inside = self.sum(depth + 1)
                return inside if self.take(rf" *\{closing}") else self.fail()
        if self.take(r"\\frac *"):
            return _divided(self.argument(depth), self.argument(depth))
        if self.take(r"\\sqrt *"):
            degree = int(self.take(r"\[ *\d{1,2} *\] *").strip("[] ") or 2)
            return _root(self.argument(depth), degree)
        return self.fail()

    def argument(self, depth: int) -> _Terms:
        """In braces or parentheses, or one digit, with no other behind it that a reader might take
        for its own.
        """
        self.take(" *")
        if self.sees(r"[{(]"):
            return self.atom(depth)
        digit = self.take(r"\d(?![.,]?\d{2})")
        return _number(int(digit)) if digit else self.fail()

    def take(self, pattern: str) -> str:
        found = re.compile(pattern, re.ASCII).match(self.text, self.at)
        self.at = found.end() if found else self.at
        return found[0] if found else ""

    def sees(self, pattern: str) -> bool:
        return re.compile(pattern).match(self.text, self.at) is not None

    def fail(self):
        raise Unreadable(f"not understood from character {self.at} on")


def _digits(digits: str) -> str:
    if len(digits) > 1000:
        raise Unreadable("too many digits")
    return digits


def _number(x: int | Fraction) -> _Terms:
    return {1: Fraction(x)} if x else {}


def _add(a: _Terms, b: _Terms) -> _Terms:
    total = {n: a.get(n, Fraction(0)) + b.get(n, Fraction(0)) for n in {*a, *b}}
    return {n: factor for n, factor in total.items() if factor}


def _times(a: _Terms, b: _Terms) -> _Terms:
    total: _Terms = {}
    for m, x in a.items():
        for n, y in b.items():
            # √m √n = g √(mn / g²), g the greatest common divisor: n stays without square factors.
            common = math.gcd(m, n)
            total = _add(total, {m * n // common**2: x * y * common})
    if len(total) > 16:
        raise Unreadable("too many terms")
    return total


def _divided(a: _Terms, b: _Terms) -> _Terms:
    if len(b) == 1:
        ((n, factor),) = b.items()
        return _times(a, {n: 1 / (factor * n)})
    if len(b) != 2:
        raise Unreadable("a division by 0, or by too many terms")
    (m, x), (n, y) = b.items()
    conjugate = {m: x, n: -y}
    return _divided(_times(a, conjugate), _times(b, conjugate))


def _power(base: _Terms, exponent: _Terms) -> _Terms:
    power = _of_terms(exponent)
    if not isinstance(power, Fraction) or power.denominator not in (1, 2):
        raise Unreadable("a power that is no whole number")
    if power.denominator == 2:
        return _power(_root(base, 2), _number(power.numerator))
    # The bits that the power will have: checked before it is computed, since 9^9^9 never ends.
    size = max(
        (abs(x.numerator * x.denominator).bit_length() + n.bit_length() for n, x in base.items()),
        default=1,
    )
    if abs(power) * size > BITS or (len(base) > 1 and abs(power) > 8):
        raise Unreadable("too large")
    if not base:
        return _number(0) if power > 0 else _divided(_number(1), base)
    found = _number(1)
    if list(base) == [1]:
        return _number(base[1] ** int(power))
    for _ in range(abs(int(power))):
        found = _times(found, base)
    return found if power >= 0 else _divided(_number(1), found)


def _root(x: _Terms, degree: int) -> _Terms:
    inside = _of_terms(x)
    if not isinstance(inside, Fraction) or degree < 2:
        raise Unreadable("a root of a root")
    # Odd roots of negative numbers are real.
    sign = -1 if inside < 0 and degree % 2 else 1
    if inside * sign < 0:
        raise Unreadable("a root of a negative number")
    above, below = (_integer_root(abs(part), degree) for part in inside.as_integer_ratio())
    if above is not None and below is not None:
        return _number(sign * Fraction(above, below))
    if degree != 2:
        raise Unreadable("a root that is no fraction")
    # √(a/b) = √(ab) / b.
    square, rest = _square_factor(inside.numerator * inside.denominator)
    return {rest: Fraction(square, inside.denominator)}


def _integer_root(n: int, degree: int) -> int | None:
    low = 0
    # Integers all the way: a float root of a large number would be wrong by one.
    high = 1 << (n.bit_length() // degree + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**degree <= n else (low, middle - 1)
    return low if low**degree == n else None


def _square_factor(n: int) -> tuple[int, int]:
    """`(a, b)` with n = a² b, b without square factors."""
    if n > SQUARE:
        raise Unreadable("a root of too large a number")
    square = 1
    rest = 1
    d = 2
    while d * d <= n:
        power = 0
        while n % d == 0:
            n = n // d
            power = power + 1
        square = square * d ** (power // 2)
        rest = rest * d ** (power % 2)
        d += 1
    return square, rest * n


def _of_terms(terms: _Terms) -> Value:
    if set(terms) <= {1}:
        return terms.get(1, Fraction(0))
    return Surd(tuple(sorted(terms.items())))
