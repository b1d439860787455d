"""Ranges of numbers: what an option or an argument may be, declared beside its type and checked in one place.

learning_rate: Annotated[float, above(0)] = 1e-5
"""

import math
import types
import typing
from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from typing import Any, NamedTuple

FLOAT32 = 3.4e38  # numbers beyond it are infinite on a device
INT32 = 2**31 - 1


class Range(NamedTuple):
    """An interval of finite numbers; open where `above` or `below` says so.

    >>> 0.5 in Range(0, 1), 1 in Range(0, 1, below=True), str(Range(0, 1, below=True)), str(Range(0, above=True))
    (True, False, 'at least 0 and below 1', 'above 0')
    """

    low: float = -FLOAT32
    high: float = FLOAT32
    above: bool = False  # low itself is outside
    below: bool = False  # high itself is outside

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float) or not math.isfinite(value):
            return False
        if value == self.low:
            return not self.above
        if value == self.high:
            return not self.below
        return self.low < value < self.high

    def __str__(self) -> str:
        low = f"{'above' if self.above else 'at least'} {self.low:g}" if self.low > -FLOAT32 else ""
        high = f"{'below' if self.below else 'at most'} {self.high:,g}" if self.high < INT32 else ""
        return " and ".join(filter(None, [low, high])) or "finite"


def above(low: float) -> Range:
    """Numbers above a bound."""
    return Range(low, above=True)


def at_least(low: float) -> Range:
    """Numbers from a bound on."""
    return Range(low)


def between(low: float, high: float, *, above: bool = False, below: bool = False) -> Range:
    """Numbers between two bounds; `above`, `below`: without the lower, the upper one."""
    return Range(low, high, above, below)


def check(hints: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Holds every value against its type and range.

    Args:
      hints: name -> type, as `typing.get_type_hints(…, include_extras=True)` gives it.
      values: name -> value; names without a hint are passed over.

    Raises: ValueError naming the option, its value and its range.

    >>> check({"discount": typing.Annotated[float, between(0, 1)]}, {"discount": 7.0})
    Traceback (most recent call last):
    ValueError: discount must be a number, at least 0 and at most 1, but is 7.0
    """
    for name, value in values.items():
        if name in hints and (wanted := problem(hints[name], value)):
            raise ValueError(f"{name} must be {wanted}, but is {value!r:.80}")


def check_fields(options: Any) -> None:
    """`check` of a dataclass, for its `__post_init__`."""
    check(typing.get_type_hints(type(options), include_extras=True), vars(options))


def checked(fn: Callable) -> Callable:
    """The same function; its arguments are held against their types and ranges first."""

    @wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        check(typing.get_type_hints(fn, include_extras=True), signature(fn).bind(*args, **kwargs).arguments)
        return fn(*args, **kwargs)

    return call


def problem(hint: Any, value: Any) -> str | None:
    """What a value should have been, where it is not."""
    kind, range_ = _kind(hint)
    if kind is float or kind is int:
        return _number(kind, range_, value)
    if kind is bool:
        return None if isinstance(value, bool) else "true or false"
    if kind is str:
        return None if isinstance(value, str) else "text"
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        wanted = [problem(part, value) for part in parts]
        told = [want for part, want in zip(parts, wanted, strict=True) if part is not type(None)]
        return None if None in wanted else " or ".join([*filter(None, told), *(["null"] if type(None) in parts else [])])
    if kind is type(None):
        return None if value is None else "null"
    if origin is typing.Literal:
        return None if value in parts else f"one of {', '.join(map(str, parts))}"
    if origin is list:
        if not isinstance(value, list | tuple):
            return "a list"
        return next((f"a list of which each is {want}" for entry in value if (want := problem(parts[0], entry))), None)
    return None


def _kind(hint: Any) -> tuple[Any, Range]:
    if typing.get_origin(hint) is typing.Annotated:
        kind, *notes = typing.get_args(hint)
        return kind, next((note for note in notes if isinstance(note, Range)), Range())
    return hint, Range()


def _number(kind: type, range_: Range, value: Any) -> str | None:
    if kind is int:
        whole = isinstance(value, int) and not isinstance(value, bool)
        range_ = range_._replace(low=max(range_.low, -INT32), high=min(range_.high, INT32))
        return None if whole and value in range_ else f"a whole number, {range_}"
    fits = isinstance(value, int | float) and not isinstance(value, bool) and value in range_
    return None if fits else f"a number, {range_}"
