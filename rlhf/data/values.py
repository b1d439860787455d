"""What a row's values may be, whichever container they come from: what JSON can hold, and nothing
that is no text.

null, booleans, numbers, Unicode text, lists, and objects.  A field of an object that is null is
left out, at every depth, since Arrow pads objects with fields that only others have:
`{"city": "Paris", "a": null}` is `{"city": "Paris"}`.
"""

import datetime
import decimal
import json
import math
import uuid
from collections.abc import Sequence
from typing import Any

from rlhf.json_text import without_duplicates

MEGABYTE = 2**20
MAX_BYTES = 16 * MEGABYTE  # of a row: four million tokens, more than a model reads at once
MAX_DEPTH = 100  # lists and objects inside each other
TOO_LARGE = (
    f"a row of more than {MAX_BYTES // MEGABYTE} MB; no model reads as much at once, split it or "
    "leave it out"
)


def plain(value: Any, depth: int = 0) -> Any:
    """A value as JSON has it: objects without the fields that are null, times in ISO 8601, bytes
    that are UTF-8 as text.

    Args:
      value: of a column.
      depth: of what holds it.

    Returns: the same in dictionaries, lists, text and numbers; what is none of these (images, bytes
    that are no text) as it is.

    Raises: ValueError, saying what, for half of a surrogate pair, which is no text, and for nesting
    beyond `MAX_DEPTH`.

    >>> plain([{"city": "Paris", "a": None}, (1, None)])
    [{'city': 'Paris'}, [1, None]]
    """
    if isinstance(value, str):
        # Most texts are ASCII, and `isascii` takes no time.
        return value if value.isascii() else _unicode(value)
    # The commonest kinds first: this runs for every value of every row.
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, dict | list | tuple):
        if depth == MAX_DEPTH:
            raise ValueError(
                f"lists and objects inside each other more than {MAX_DEPTH} deep; flatten them"
            )
        if isinstance(value, dict):
            return {
                plain(str(key)): plain(item, depth + 1)
                for key, item in value.items()
                if item is not None
            }
        return [plain(item, depth + 1) for item in value]
    return _of_arrow(value)


def plain_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of plain values; its columns stay where they are null, fields of objects do not.

    Raises: ValueError, saying what, for half of a surrogate pair, and for nesting beyond
    `MAX_DEPTH`.

    >>> plain_row({"prompt": "hello", "tools": None, "user": {"name": None}})
    {'prompt': 'hello', 'tools': None, 'user': {}}
    """
    return {plain(str(name)): plain(value, 1) for name, value in row.items()}


def filled(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that all have the columns of any of them, None where one had none; in the order of their
    first appearance.

    >>> filled([{"prompt": "a"}, {"prompt": "b", "solution": "2"}])
    [{'prompt': 'a', 'solution': None}, {'prompt': 'b', 'solution': '2'}]
    """
    names = dict.fromkeys(name for row in rows for name in row)
    return [
        row if len(row) == len(names) else {name: row.get(name) for name in names} for row in rows
    ]


def of_json(text: str) -> Any:
    """What JSON says, strictly.

    Raises: json.JSONDecodeError for what is no JSON; ValueError, saying what, for what some take
    for JSON: a name twice in an object, NaN, infinities, numbers too long, and nesting beyond
    Python's.

    >>> of_json('{"city": "Paris"}')
    {'city': 'Paris'}
    """
    try:
        return json.loads(
            text,
            object_pairs_hook=without_duplicates,
            parse_constant=_no_number,
            parse_float=_float,
            parse_int=_int,
        )
    except RecursionError:
        raise ValueError(
            f"lists and objects inside each other more than {MAX_DEPTH} deep; flatten them"
        ) from None
    except MemoryError:
        raise ValueError("takes more memory than there is; split it") from None


def _unicode(text: str) -> str:
    try:
        # JSON can name half of a pair ("\ud83d"), which no tokenizer takes.
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise ValueError(
            f"{half} is half of a surrogate pair and no text by itself; write the whole character"
        ) from None
    return text


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON; write null, or leave it out")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text:.20} is beyond what a number holds; write it as text")
    return value


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        # Python refuses beyond 4,300 digits, as converting takes quadratic time.
        raise ValueError(f"an integer of {len(text)} digits; write it as text") from None


def _of_arrow(value: Any) -> Any:
    """What Arrow has beyond JSON."""
    # A `datetime` is a `date` too.
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    return value
