"""JSON read strictly, wherever it stands: what some readers let pass without a word is refused."""

from typing import Any


class TwiceError(ValueError):
    """A name that stands twice in one object."""


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names differ, for `json.loads(…, object_pairs_hook=without_duplicates)`,
    which else keeps the last of two.

    Raises: TwiceError for a name that stands twice.

    >>> without_duplicates([("a", 1), ("b", 2)])
    {'a': 1, 'b': 2}
    """
    # A dict keeps the last of two: fewer entries than pairs means that a name stands twice.
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise TwiceError(f"{twice!r:.60} is there twice in one object; leave one out")
    return found
