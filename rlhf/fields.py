"""Fields of NamedTuples documented where `help` shows them."""

import inspect
import re
from typing import TypeVar

C = TypeVar("C", bound=type)


def documented(kind: C) -> C:
    """The same class; what the `Attributes:` of its docstring say of a field is the field's own
    docstring too.

    >>> from typing import NamedTuple
    >>> @documented
    ... class Point(NamedTuple):
    ...     '''Where it is.
    ...
    ...     Attributes:
    ...       x: metres to the right.
    ...     '''
    ...
    ...     x: float
    >>> Point.x.__doc__
    'metres to the right.'
    """
    # `or ""`: under `python -OO` there are no docstrings.
    _, _, section = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")
    # A field begins two spaces in, its further lines four; an empty line ends the section.
    for name, text in re.findall(
        r"^  (\w+): (.*(?:\n    .*)*)", section.split("\n\n")[0], re.MULTILINE
    ):
        getattr(kind, name).__doc__ = re.sub(r"\n +", " ", text)
    return kind
