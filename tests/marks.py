"""Parameters of tests whose whole matrix is for `.ci/run`: `pytest` takes a few of them, `pytest -m ''` all."""

from collections.abc import Iterable

import pytest


def exhaustive(values: Iterable, *, quick: Iterable) -> list:
    """All values as parameters; those that are not among the quick ones are marked `exhaustive`."""
    values = list(values)
    quick = list(quick)
    assert all(value in values for value in quick), (quick, values)
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=() if value in quick else pytest.mark.exhaustive,
        )
        for value in values
    ]
