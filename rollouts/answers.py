"""The final answer of a worked solution, as text and as a number."""

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple


class Number(NamedTuple):
    """A number as it was written: `50%` is 50 with `percent`."""

    value: Fraction
    percent: bool = False


def final(text: str) -> str:
    """The answer that a solution ends in: what its last `\\boxed{…}` holds, or else the line after its last `####`, or else
    all of it.

    >>> final("6 * 3 = 18 #### 18"), final(r"so \\boxed{\\frac{1}{2}} it is"), final("about 7")
    ('18', '\\\\frac{1}{2}', 'about 7')
    """
    boxed = _boxed(text)
    if boxed is not None:
        return boxed
    _, marker, after = text.rpartition("####")
    return after.strip().partition("\n")[0].strip() if marker else text.strip()


def normalised(text: str) -> str:
    """`final(text)` without case, without differences of width and spacing, without quotes around it and a full stop after it.

    >>> normalised('#### "New  York".')
    'new york'
    """
    words = " ".join(unicodedata.normalize("NFKC", final(text)).casefold().split())
    return words.strip("\"'`“”‘’*").rstrip(".!?,;:").strip("\"'`“”‘’*")


def number(text: str) -> Number | None:
    """The last number of `final(text)`, exactly; None where there is none.

    Reads signs, decimals, thousands (`1,234`), exponents (`1.5e3`, `1.5 \\times 10^3`), fractions (`3/4`, `\\frac{3}{4}`),
    mixed numbers (`1 3/4`), percents and currencies.  Exponents and indices (`m^2`, `x_1`) are not numbers of their own.

    >>> number("It costs $1,234.50."), number("from 10-12"), number("none")
    (Number(value=Fraction(2469, 2), percent=False), Number(value=Fraction(12, 1), percent=False), None)
    """
    found = list(_NUMBER.finditer(_plain(final(text))))
    return _value(found[-1]) if found else None


def same(a: Number, b: Number, *, tolerance: float = 0.0) -> bool:
    """Whether two numbers are equal, but for `tolerance · max(|a|, |b|)`.

    Where only one is a percentage, the other may be the share (`50%` and `0.5`) or leave the sign out (`50%` and `50`).

    >>> same(number("50%"), number("1/2")), same(number("50%"), number("0.5%"))
    (True, False)
    """
    near = lambda x, y: abs(x - y) <= Fraction(tolerance) * max(abs(x), abs(y))
    share = lambda x: x.value / 100 if x.percent else x.value
    return near(a.value, b.value) or near(share(a), share(b))


def _boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed{")
    for i in range(begin - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if not depth:
            return text[begin:i].strip()
    return None  # cut before it was closed


def _plain(text: str) -> str:
    """LaTeX, currencies and typographic signs as plain text: `-\\frac{1}{2}` is `-1/2`, `1\\frac12` is `1 1/2`."""
    text = text.replace("−", "-").replace("{,}", ",").replace("\\%", "%")
    text = re.sub(r"\\[,!;]|[$£€¥]|\\$", "", text)
    text = re.sub(r"(\d)\s?(?=\\[dt]?frac)", r"\1 ", text)
    text = re.sub(r"\\[dt]?frac\s?(?:\{([^{}]*)\}\s?\{([^{}]*)\}|(\d)\s?(\d))", r"\1\3/\2\4", text)
    return re.sub(r"\s?(?:\\times|\\cdot|×|\*)\s?10\s?\^\s?\{?([-+]?\d{1,3})\b\}?", r"e\1", text)


def _value(found: re.Match) -> Number | None:
    whole, numerator, denominator, decimal, percent = found.groups()
    if len(found[0]) > 1000:  # no answer; Python refuses to read integers of more than 4,300 digits
        return None
    read = lambda digits: Fraction(digits.replace(",", ""))
    if decimal:
        value = read(decimal)
    elif not read(denominator):
        return None
    else:
        value = read(numerator) / read(denominator) + (read(whole) if whole else 0)
    return Number(-value if found[0].startswith("-") else value, bool(percent))


_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|(?<!\.)\.\d+)"
_NUMBER = re.compile(
    rf"(?<![\d^_])(?<![\d^_]\.)(?<![\^_]\{{)(?:(?<![\w)\]}}])[-+])?"
    rf"(?:(?:(\d+)\ )?({_DIGITS})\s?/\s?({_DIGITS})|({_DIGITS}(?:[eE][-+]?\d{{1,3}}(?!\d))?))"
    r"(?:\s?(%|percent))?"
)
