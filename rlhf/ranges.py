"""Ranges of numbers: what an option or an argument may be, declared beside its type and checked in
one place.

learning_rate: Annotated[float, above(0)] = 1e-5
"""

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache, wraps
from inspect import signature
from typing import Annotated, Any, NamedTuple

import numpy as np

from rlhf.fields import documented

# Numbers beyond it are infinite on a device.
FLOAT32 = 3.4e38
INT32 = 2**31 - 1
# Letters of a value that a message shows.
LONGEST = 80


@documented
class Range(NamedTuple):
    """An interval of finite numbers; open where `above` or `below` says so.  Beside a list, it is
    of its entries' number.

    Attributes:
      low: the lower bound.
      high: the upper bound.
      above: low itself is outside.
      below: high itself is outside.

    >>> 0.5 in Range(0, 1), 1 in Range(0, 1, below=True), str(Range(0, 1, below=True)), str(Range(0, above=True))
    (True, False, 'at least 0 and below 1', 'above 0')
    """

    low: float = -FLOAT32
    high: float = FLOAT32
    above: bool = False
    below: bool = False

    def __contains__(self, value: Any) -> bool:
        if not isinstance(value, int | float | np.number):
            return False
        if value == self.low:
            return not self.above
        if value == self.high:
            return not self.below
        # False for NaN, which compares with nothing.
        return bool(self.low < value < self.high)

    def __str__(self) -> str:
        low = (
            f"{'above' if self.above else 'at least'} {_number(self.low)}"
            if self.low > -FLOAT32
            else ""
        )
        high = (
            f"{'below' if self.below else 'at most'} {_number(self.high)}"
            if self.high < FLOAT32
            else ""
        )
        return " and ".join(filter(None, [low, high])) or "that is finite"


def above(low: float) -> Range:
    """Numbers above a bound."""
    return Range(low, above=True)


def at_least(low: float) -> Range:
    """Numbers from a bound on."""
    return Range(low)


def between(low: float, high: float, *, above: bool = False, below: bool = False) -> Range:
    """Numbers between two bounds; `above`, `below`: without the lower, the upper one."""
    return Range(low, high, above, below)


class FromPython:
    """A note on a type: such an option is given from Python alone, and the command line does not
    have it.
    """


# What options most often are.  A number beyond these bounds is a slip of the hand, not a choice.
Share = Annotated[float, between(0, 1)]
Coefficient = Annotated[float, between(0, 1000)]
Strength = Annotated[float, between(0, 1000, above=True)]
Temperature = Annotated[float, between(0, 100, above=True)]
Count = Annotated[int, between(1, 65_536)]
Length = Annotated[int, between(1, 1_000_000)]  # of a text, in tokens
Steps = Annotated[int, between(1, 1_000_000)]
Every = Annotated[int, between(0, 1_000_000)]  # steps between two events; 0: none
Seed = Annotated[int, between(0, INT32)]


def check(hints: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Holds every value against its type and range.

    Args:
      hints: name -> type, as `typing.get_type_hints(…, include_extras=True)` gives it.
      values: name -> value; names without a hint are passed over.

    Raises: ValueError naming the option, its value and its range.

    >>> check({"discount": typing.Annotated[float, between(0, 1)]}, {"discount": 7.0})
    Traceback (most recent call last):
    ValueError: discount must be a number at least 0 and at most 1, but is 7.0
    """
    for name, value in values.items():
        if name in hints and (wrong := mistake(name, hints[name], value)):
            raise ValueError(wrong)


def mistake(name: str, hint: Any, value: Any) -> str | None:
    """The message about a value that cannot be; None about one that can."""
    wanted = problem(hint, value)
    return f"{name} must be {wanted}, but is {shown(value)}" if wanted else None


def shown(value: Any) -> str:
    """A value as options are written, cut where it is long."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    # Python writes no whole number of more than 4,300 digits.
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def check_fields(options: Any) -> None:
    """`check` of a dataclass, for its `__post_init__`."""
    described: Any = type(options)
    check(hints_of(described), vars(options))


def checked(fn: Callable) -> Callable:
    """The same function; its arguments are held against their types and ranges first."""

    @wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        # `bind` raises TypeError for arguments that do not fit, as the call itself would; defaults
        # are not checked.
        check(hints_of(fn), signature(fn).bind(*args, **kwargs).arguments)
        return fn(*args, **kwargs)

    return call


# Cached: resolving annotations imports and evaluates them, for every checked call.
@cache
def hints_of(described: Any) -> dict[str, Any]:
    """The types of a function's parameters or a dataclass's fields, with their ranges."""
    return typing.get_type_hints(described, include_extras=True)


def problem(hint: Any, value: Any) -> str | None:
    """What a value should have been, where it is not.

    >>> problem(Share | None, "half"), problem(Annotated[list[str], at_least(1)], [])
    ('a number at least 0 and at most 1, or null', 'a list with entries')
    """
    kind, range_ = kind_of(hint)
    origin = typing.get_origin(kind)
    parts = typing.get_args(kind)
    # A kind that is not listed, such as Any, takes everything.
    fits = True
    wanted = ""
    # `bool` is a subclass of `int` in Python: true is no number here.
    if kind is float:
        fits = not isinstance(value, bool) and value in range_
        wanted = f"a number {range_}"
    elif kind is int:
        is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
        fits = is_integer and value in range_
        wanted = f"a whole number {range_}"
    elif kind is bool:
        fits = isinstance(value, bool)
        wanted = "true or false"
    elif kind is str:
        fits = isinstance(value, str)
        wanted = "text"
    elif kind is type(None):
        fits = value is None
        wanted = "null"
    elif origin is typing.Literal:
        fits = value in parts
        wanted = f"one of {', '.join(map(str, parts))}"
    elif origin in (typing.Union, types.UnionType):
        wants = [problem(part, value) for part in parts]
        fits = None in wants
        # "null" last, wherever None stands in the type.
        in_order = sorted(wants, key=lambda want: want == "null")
        wanted = ", or ".join(filter(None, in_order))
    elif origin is list:
        # A range beside a list is of the number of its entries.
        few = range_.low > -FLOAT32 and isinstance(value, list | tuple) and len(value) < range_.low
        fits = isinstance(value, list | tuple) and not few
        wanted = "a list with entries" if range_.low > -FLOAT32 else "a list"
        wrong = (
            next((want for entry in value if (want := problem(parts[0], entry))), None)
            if fits
            else None
        )
        fits = fits and not wrong
        wanted = f"a list of which each is {wrong}" if wrong else wanted
    elif origin is dict:
        of_text = isinstance(value, dict) and not any(problem(str, name) for name in value)
        wrong = (
            next((want for entry in value.values() if (want := problem(parts[1], entry))), None)
            if of_text
            else None
        )
        fits = of_text and not wrong
        wanted = f"a mapping of text to {wrong or problem(parts[1], None) or 'anything'}"
    elif dataclasses.is_dataclass(kind):
        fits = isinstance(value, typing.cast(type, kind))
        wanted = f"a {getattr(kind, '__name__', kind)}"
    elif isinstance(kind, type) and kind is not typing.Any:
        # An object from Python, beside the names that the command line takes: it has no words.
        fits = isinstance(value, kind)
    return None if fits else wanted


def kind_of(hint: Any) -> tuple[Any, Range]:
    """A type without its notes, and its range."""
    if typing.get_origin(hint) is Annotated:
        kind, *notes = typing.get_args(hint)
        return kind, next((note for note in notes if isinstance(note, Range)), Range())
    return hint, Range()


def _number(bound: float) -> str:
    return f"{bound:,.0f}" if bound == round(bound) and abs(bound) < 1e12 else f"{bound:g}"
