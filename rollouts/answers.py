"""The final answer of a worked solution, as text and as a number."""

import math
import re
import unicodedata
from fractions import Fraction
from typing import Any, NamedTuple

from rlhf.fields import documented
from rlhf.rollouts import exact
from rlhf.rollouts.exact import Unreadable, Value


@documented
class Number(NamedTuple):
    """A number as it was written: `50%` is 50 with `percent`, `$5` is 5 with the unit `dollar`.

    Attributes:
      value: of the number.
      percent: whether a % stands behind it.
      unit: what else stands behind it.
    """

    value: Value
    percent: bool = False
    unit: str = ""


def solution(cell: Any) -> str:
    """A cell of a column of solutions as text: numbers as they are written, "" where there is none.

    Raises: TypeError for anything but text, numbers and None.

    >>> solution(18), solution(18.0), solution("#### 18"), solution(None), solution(float("nan"))
    ('18', '18', '#### 18', '', '')
    """
    # Columns of NumPy and Arrow give scalars of their own types.
    cell = cell.item() if hasattr(cell, "item") else cell
    if cell is None or isinstance(cell, str):
        return cell or ""
    if isinstance(cell, bool) or not hasattr(cell, "__float__"):
        raise TypeError(f"a solution must be a text or a number, but is {cell!r:.80}")
    if isinstance(cell, int):
        return str(cell)
    if not math.isfinite(cell):
        return ""
    # Integers with missing rows become floats in a table: 18.0 was 18.
    return str(int(cell)) if cell == int(cell) else str(cell)


def final(text: str) -> str:
    """The answer that a solution ends in: what its last `\\boxed{…}` holds, or else the line after
    its last `####`, or else all of it.

    >>> final("6 * 3 = 18 #### 18"), final(r"so \\boxed{\\frac{1}{2}} it is"), final("about 7")
    ('18', '\\\\frac{1}{2}', 'about 7')
    """
    boxed = _boxed(text)
    if boxed is not None:
        return boxed
    _, marker, after = text.rpartition("####")
    return after.strip().partition("\n")[0].strip() if marker else text.strip()


def normalised(text: str) -> str:
    """`final(text)` without case, without differences of width and spacing, without quotes around
    it and a full stop after it.

    >>> normalised('#### "New  York".')
    'new york'
    """
    words = " ".join(unicodedata.normalize("NFKC", final(text)).casefold().split())
    return words.strip("\"'`“”‘’*").rstrip(".!?,;:").strip("\"'`“”‘’*")


def number(text: str) -> Number | None:
    """The number that `final(text)` is, exactly; of a text without a mark the last one in it.  None
    where it is not understood.

    Reads what `exact.value` reads, with a currency before it, and percents and units behind it;
    `x = 5` and `2 + 3 = 5` are 5.  A text is read whole or not at all: the last number of a
    sentence is so with all that belongs to its expression.

    >>> number("It costs $1,234.50."), number("so it is 2^{10}").value
    (Number(value=Fraction(2469, 2), percent=False, unit='dollar'), Fraction(1024, 1))
    >>> number("none"), number("from 1,2,3"), number("so it is 5x")
    (None, None, None)
    """
    answer = final(text)
    found = _full_number(exact.plain(answer))
    marked = _boxed(text) is not None or "####" in text
    return found if found is not None or marked else _last(answer)


def same(a: Number, b: Number, *, tolerance: float = 0.0) -> bool | None:
    """Whether two numbers are equal, but for `tolerance · max(|a|, |b|)`; None where their units
    cannot be compared.

    Where only one is a percentage, the other may be the share (`50%` and `0.5`) or leave the sign
    out (`50%` and `50`).  Where only one has a unit, the other leaves it out; one letter may be a
    variable, and is no unit.

    >>> same(number("50%"), number("1/2")), same(number("50%"), number("0.5%")), same(number("5 km"), number("5 m"))
    (True, False, None)
    """
    if a.unit != b.unit and ((a.unit and b.unit) or _is_letter(a.unit or b.unit)):
        return None

    def near(x, y):
        if x == y or not tolerance:
            return x == y
        # Exact as long as both are: floats would make 1/3 and 0.3333333333333333 equal.
        if isinstance(x, Fraction) and isinstance(y, Fraction):
            return abs(x - y) <= Fraction(tolerance) * max(abs(x), abs(y))
        return abs(float(x) - float(y)) <= tolerance * max(abs(float(x)), abs(float(y)))

    if a.percent == b.percent:
        return near(a.value, b.value)
    # One of them is a percentage: the other may be its share, or leave the sign out.
    share, other = (a, b) if a.percent else (b, a)
    return near(share.value, other.value) or (
        isinstance(share.value, Fraction) and near(share.value / 100, other.value)
    )


def alike(a: str, b: str) -> bool:
    """Whether two final answers are the same text, but for spaces around signs.

    >>> alike(r"so \\boxed{x + 1}", "x+1"), alike("1 2", "12")
    (True, False)
    """
    # A space between two words is a difference, one beside a sign is not.
    tight = lambda text: re.sub(r" *([^\w ]) *", r"\1", " ".join(final(text).split()))
    return tight(a) == tight(b)


def is_mathematical(text: str) -> bool:
    """Whether a final answer has digits or mathematical signs, and so might be a number.

    >>> is_mathematical("about 7x"), is_mathematical("I do not know.")
    (True, False)
    """
    return re.search(r"[\d√π∞½⅓¼¾\\]", final(text)) is not None


def _full_number(text: str) -> Number | None:
    """A text that is a number, with its unit, and an equation before it at most."""
    if text.endswith(("..", "…")):
        # The number goes on, as in 3.14…: what is written is not all of it.
        return None
    text = text.rstrip(".,;: ")
    *before, text = text.split("=")
    currency = re.match(r" *([-+]? ?)([$£€¥])", text)
    if currency:
        text = text[: currency.start(2)].strip() + text[currency.end(2) :]
    try:
        found, rest = exact.value(text.strip())
        unit, factor = _unit(rest)
        # What is before an equals sign must have the same value, unless it is a name or words.
        left = [side for side in before if not re.fullmatch(r"[ A-Za-z\\][^,;]*", side)]
        if any(exact.value(side.strip()) != (found, "") for side in left):
            return None
    except Unreadable:
        return None
    unit = _UNITS.get(currency[2], currency[2]) if currency else unit
    # "5 million" is exact, "√2 million" is not read.
    if factor != 1:
        if not isinstance(found, Fraction):
            return None
        found *= factor
    return Number(found, unit == "%", "" if unit == "%" else unit)


def _unit(rest: str) -> tuple[str, int]:
    """What follows a number as `(unit, factor)`.  Raises: Unreadable for words and signs that are
    no unit.
    """
    words = re.sub(r"\\(?:text|textrm|textbf|mathrm|mbox)\s*\{([^{}]*)\}", r" \1 ", rest)
    words = (
        re.sub(r"\^ ?\{? ?\\circ ?\}?|°", " degrees ", words).replace("%", " % ").replace("$", " ")
    )
    if not re.fullmatch(r"(?:\s|%|[^\W\d_]+(?:[-'’/.][^\W\d_]+)*\.?(?:\^\{?[23]\}?)?)*", words):
        raise Unreadable(f"{rest!r} is no unit")
    found = []
    factor = 1
    for word in words.casefold().split():
        if word in _FACTORS:
            factor *= _FACTORS[word]
        elif word in _NO_UNITS:
            raise Unreadable(f"{word} changes the number")
        else:
            found.append(_UNITS.get(word.rstrip("."), word.rstrip(".")))
    # "5 x y" may be a product of variables; "5 km" is a unit.
    if len(found) > 1 and any(len(word) == 1 and word != "%" for word in found):
        raise Unreadable(f"{rest!r} may be a variable")
    return ("%" if found[:1] == ["%"] else " ".join(found)), factor


def _is_letter(unit: str) -> bool:
    return len(re.sub(r"\^\{?[23]\}?", "", unit)) == 1


def _found(match: re.Match[str] | None) -> str:
    # Both expressions also match the empty text, so there always is a match.
    assert match is not None
    return match[0]


def _last(text: str) -> Number | None:
    """The last number of a text, with all of its expression."""
    # GSM8K writes <<2+1=3>> for a calculator: the same numbers a second time. The last 5,000
    # characters are enough, and bound the time that the patterns take.
    text = re.sub(r"\\[()\[\]]|<<[^<>]*>>", " ", text[-5_000:])
    digits = list(re.finditer(r"\d", text, re.ASCII))
    if not digits:
        return None
    line = text[: digits[-1].end()].rpartition("\n")[2]
    # The expression that the last digit ends, as far to the left as its characters go.
    start = len(line) - len(_found(_RUN_BEFORE.search(line[-exact.LONGEST :])))
    after = text[digits[-1].end() :].partition("\n")[0][: exact.LONGEST]
    tail = _found(_RUN_AFTER.match(after))
    before = line[:start]
    run = line[start:] + tail
    after = after[len(tail) :]
    # Glued to a word or a bracket, the digits belong to something else, but for a currency.
    if re.search(r"[\w\\^_)}\]]$|\d[:.,]$", before) and not re.match(r" |[$]", run):
        return (
            None
            if not re.search(r"(?:Rs\.?|US|USD|EUR|GBP)$", before)
            else _full_number(exact.plain(run))
        )
    if (
        re.search(r"(?:[<>≤≥≈±|~&]|\\[a-zA-Z]+)\s*$", before)
        or _CHANGES.search(before)
        or after.startswith(("..", "…", "\\}"))
    ):
        return None
    if re.match(r" *[-+*/^] ", run) and re.search(r"\w ?$", before):
        # The end of "x + 3": its last number is not its value.
        return None
    word = re.match(r"( ?)([^\W\d_]+|\\[a-zA-Z]+|[!^_{(\[*/+<>-]| ?[*/+^<>-])", after)
    unit = ""
    if word:
        name = word[2].casefold()
        if word[2].startswith("\\") and not re.match(
            r"\\(?:text|mathrm|mbox|textrm|textbf)", word[2]
        ):
            return None
        if (
            not word[2].strip()[0].isalpha()
            and not word[2].startswith("\\")
            and not re.match(r"\*\*|<<|>>", after)
        ):
            return None
        if not word[1] and len(name) == 1:
            # As in 5x: a factor of a variable.
            return None
        if name in _FACTORS or name in _UNITS or name in _NO_UNITS:
            unit = f" {name}"
    return _full_number(exact.plain(run.strip() + unit))


def _boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    inside = start + len("\\boxed{")
    for i in range(inside - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if not depth:
            return text[inside:i].strip()
    # The completion was cut before its box was closed.
    return None


_RUN_BEFORE = re.compile(  # what may stand before the last digit of an expression
    r"(?:\\(?:sqrt|[dtc]?frac|cdot|times|left|right|div|,|!)|(?<![.,]) (?=[\d.*/+^(\\{$-])|\d|(?<=\d)[.,](?=\d)|\.(?=\d)"
    r"|[-−+*/^(){}$£€¥%√×÷⋅·\[\]])*$"
)
_CHANGES = re.compile(  # words that make another number of the one behind them
    r"(?:\b(?:or|mod|modulo|times|plus|minus|over|by|log|ln|sin|cos|tan|sqrt|root|than|least|most|base)|\d,? (?:and|to))\s*$",
    re.IGNORECASE,
)
_RUN_AFTER = re.compile(r"(?:[)}\]]| ?\\?%|\$(?!\d))*")
_UNITS = {  # as it may be written -> as it is compared
    "$": "dollar", "dollars": "dollar", "usd": "dollar", "cents": "cent", "€": "euro", "euros": "euro", "eur": "euro",
    "£": "pound", "pounds": "pound", "percent": "%", "%": "%", "degrees": "degree", "kilometers": "km", "kilometer": "km",
    "meters": "meter", "centimeters": "cm", "centimeter": "cm", "millimeters": "mm", "kilograms": "kg", "grams": "gram",
    "hours": "hour", "minutes": "minute", "seconds": "second", "days": "day", "weeks": "week", "months": "month",
    "years": "year",
    "inches": "inch", "feet": "foot", "yards": "yard", "miles": "mile", "liters": "liter", "ounces": "ounce",
    "gallons": "gallon",
} | {word: word for word in ("cent", "dollar", "euro", "km", "cm", "mm", "kg", "mg", "ml", "hour", "minute", "second", "day",
                             "week", "month", "year", "inch", "foot", "yard", "mile", "meter", "gram", "liter")}  # fmt: skip
_FACTORS = {
    "hundred": 100,
    "thousand": 1000,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
}
_NO_UNITS = set(  # words that make another number of the one before them
    "half halves third thirds quarter quarters fourth fourths fifth fifths sixth sixths seventh "
    "eighth "
    "eighths ninth tenth tenths hundredth hundredths thousandth hundreds thousands millions "
    "billions "
    "dozens score pi tau squared cubed factorial mod modulo over times plus minus divided "
    "multiplied by "
    "power sqrt root log ln exp sin cos tan sec csc cot max min gcd lcm more less or and to than "
    "of "
    "choose infinity inf nan base".split()
)
