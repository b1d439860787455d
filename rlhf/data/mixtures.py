"""Several sources as one, and one as two."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlhf.data.types import Row
from rlhf.fields import documented


@documented
class Mixture(NamedTuple):
    """Rows of several sources, and how many came from each.

    Attributes:
      rows: source after source; `batch_indices` shuffles.
      taken: of each source.
      left_out: of each source.
    """

    rows: list[Row]
    taken: list[int]
    left_out: list[int]


def mix(sources: Sequence[Sequence[Row]], fractions: Sequence[float], *, seed: int = 0) -> Mixture:
    """As many rows as sources can give at these fractions, none twice; which ones of a source is
    random.

    All of every source is a sum of lists, `a + b`.

    Args:
      sources: rows each.
      fractions: the share of each in the mixture, above 0, summing to 1.
      seed: of the choice; any integer from 0.

    Returns: a `Mixture`.  Its counts are right to a row: the n rows that source i gives are n =
    round(N fraction_i), for the largest N that all can serve.

    Raises: ValueError for fractions that do not sum to 1 or are not one a source, and for a source
    that would give no row.

    >>> mixture = mix([[{"id": i} for i in range(6)], [{"id": i} for i in range(6, 9)]], [0.5, 0.5])
    >>> mixture.taken, mixture.left_out
    ([3, 3], [3, 0])
    """
    sizes = [len(source) for source in sources]
    if len(fractions) != len(sources):
        raise ValueError(f"{len(sources)} sources but {len(fractions)} fractions; give one each")
    if not sources or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions must be above 0 and sum to 1, but are {list(fractions)}")
    # The source that runs out first decides how large the mixture is.
    total = min(size / fraction for size, fraction in zip(sizes, fractions, strict=True))
    taken = [
        min(size, round(total * fraction)) for size, fraction in zip(sizes, fractions, strict=True)
    ]
    if 0 in taken:
        raise ValueError(
            f"fractions {list(fractions)} of sources with {sizes} rows take {taken}; one would "
            "give none, leave it out"
        )
    rng = np.random.default_rng(seed)
    chosen = [np.sort(rng.permutation(size)[:n]) for size, n in zip(sizes, taken, strict=True)]
    rows = [source[i] for source, indices in zip(sources, chosen, strict=True) for i in indices]
    return Mixture(rows, taken, [size - n for size, n in zip(sizes, taken, strict=True)])


def hold_out(rows: Sequence[Row], size: int, *, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows to test on, at random; both keep their order.

    Args:
      rows: any.
      size: how many to hold out.
      seed: of the choice; any integer from 0.

    Returns: the two lists; each row is in one of them.

    Raises: ValueError where one of them would be empty.

    >>> train, test = hold_out([{"id": i} for i in range(5)], 2)
    >>> len(train), len(test)
    (3, 2)
    """
    if not 0 < size < len(rows):
        raise ValueError(
            f"{size} rows cannot be held out of {len(rows)}; both parts need at least one"
        )
    held = np.zeros(len(rows), bool)
    held[np.random.default_rng(seed).permutation(len(rows))[:size]] = True
    train = [row for row, is_held in zip(rows, held, strict=True) if not is_held]
    test = [row for row, is_held in zip(rows, held, strict=True) if is_held]
    return train, test
