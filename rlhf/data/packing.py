"""Several sequences in a row: less padding, the same gradient.

Each is a segment of its own with positions from 0, so that none attends to another.  Three ways, of
which the second loses nothing and the third hardly pads:

    best_fit(truncate(rows, length=T).sides[0], length=T)   # what is longer than a row is cut
    best_fit(split(rows, length=T), length=T)               # ... goes on as a sequence of its own
    wrapped(rows, length=T)                                 # end to end, cut where a row is full

A model cannot predict the first token of a sequence, nor the first of a piece, and
`recipes.sft.prepare` trains on neither.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from rlhf.data.tokenized import Tokenized
from rlhf.rollouts import Batch, Pairs


def best_fit(rows: Sequence[Tokenized], *, length: int) -> Batch:
    """Best-fit decreasing: the longest sequences first, each into the row that it fills best
    (arXiv:2404.10830).

    Args:
      rows: sequences of at most `length` tokens.
      length: T.

    Returns: a `Batch` of NumPy arrays `[B, T]`; segments count from 1 in each row.

    Raises: ValueError where there are no rows, or one has no tokens or more than `length`; it names
    the row.

    >>> rows = [Tokenized([5], [True]), Tokenized([6, 7], [True, True]), Tokenized([8, 9], [True, True])]
    >>> best_fit(rows, length=3).segment_ids.tolist()
    [[1, 1, 2], [1, 1, 0]]
    """
    bins = _best_fit([len(row.tokens) for row in rows], length)
    return _laid_out([[rows[i] for i in members] for members in bins], length)


def best_fit_pairs(
    chosen: Sequence[Tokenized], rejected: Sequence[Tokenized], *, length: int
) -> Pairs:
    """Preference pairs packed by best-fit decreasing, both sides of a pair in one row, next to each
    other.

    Args:
      chosen, rejected: N sequences each; both sides of a pair at most `length` tokens.
      length: T.

    Returns: packed `Pairs` of NumPy arrays `[R, 1, T]`, for objectives with `max_segments`, the
    largest segment id.

    Raises: ValueError where there is not one rejected for every chosen, there are no rows, or a
    pair has no tokens or more than `length`.

    >>> a, b = Tokenized([5, 6], [False, True]), Tokenized([5, 7], [False, True])
    >>> best_fit_pairs([a], [b], length=5).segment_ids.tolist()
    [[[1, 1, 2, 2, 0]]]
    """
    if len(chosen) != len(rejected):
        raise ValueError(f"{len(chosen)} chosen but {len(rejected)} rejected; a pair needs both")
    bins = _best_fit(
        [len(a.tokens) + len(b.tokens) for a, b in zip(chosen, rejected, strict=True)], length
    )
    # Chosen before rejected, next to each other: losses find the sides of a pair by their segment
    # ids.
    packed = _laid_out(
        [[side[i] for i in members for side in (chosen, rejected)] for members in bins], length
    )
    return Pairs(
        tokens=packed.tokens[:, None],
        mask=packed.mask[:, None],
        positions=packed.positions[:, None],
        segment_ids=packed.segment_ids[:, None],
    )


def split(rows: Sequence[Tokenized], *, length: int) -> list[Tokenized]:
    """Pieces of at most `length` tokens, all but a row's last of exactly so many.

    Args:
      rows: sequences of any length.
      length: tokens.

    Returns: the pieces, in order.

    Raises: ValueError where length is below 1.

    >>> split([Tokenized([5, 6, 7], [False, True, True])], length=2)
    [Tokenized(tokens=[5, 6], mask=[False, True]), Tokenized(tokens=[7], mask=[True])]
    """
    _check(length)
    return [_piece(row, i, i + length) for row in rows for i in range(0, len(row.tokens), length)]


def wrapped(rows: Sequence[Tokenized], *, length: int) -> Batch:
    """All sequences end to end, cut into rows; the last one is padded.

    Unlike elsewhere, a segment ends where its sequence ends: none attends to the one before it.

    Args:
      rows: sequences of any length.
      length: T.

    Returns: a `Batch` of NumPy arrays `[B, T]`.

    Raises: ValueError where there are no rows, one has no tokens, or length is below 1.

    >>> wrapped([Tokenized([5, 6], [True, True]), Tokenized([7, 8], [True, True])], length=3).tokens.tolist()
    [[5, 6, 7], [8, 0, 0]]
    """
    _check(length)
    bins: list[list[Tokenized]] = [[]]
    free = length
    for row in rows:
        start = 0
        while start < len(row.tokens):
            if free == 0:
                bins.append([])
                free = length
            piece = _piece(row, start, start + free)
            bins[-1].append(piece)
            start += len(piece.tokens)
            free -= len(piece.tokens)
    return _laid_out(bins, length)


def _check(length: int) -> None:
    if length < 1:
        raise ValueError(f"length must be at least 1 token, but is {length}")


def _piece(row: Tokenized, start: int, end: int) -> Tokenized:
    return Tokenized(row.tokens[start:end], row.mask[start:end])


def _best_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Which sizes share a bin of `length`."""
    for i, size in enumerate(sizes):
        if not 0 < size <= length:
            raise ValueError(
                f"row {i} has {size} tokens but length is {length}; truncate or split it, leave it "
                "out if empty"
            )
    bins: list[list[int]] = []
    # The space and the number of every bin that has space, ordered: the best bin for a size is
    # found by bisection, where a search through all bins would take quadratic time.
    free: list[tuple[int, int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        place = bisect_left(free, (sizes[i], 0))
        space, number = free.pop(place) if place < len(free) else (length, len(bins))
        bins += [[]] * (number == len(bins))
        bins[number] = [*bins[number], i]
        if space > sizes[i]:
            insort(free, (space - sizes[i], number))
    return bins


def _laid_out(bins: Sequence[Sequence[Tokenized]], length: int) -> Batch:
    """Bins as rows of arrays."""
    if not bins or not bins[0]:
        raise ValueError("there are no rows to pack; read some first")
    shape = (len(bins), length)
    tokens = np.zeros(shape, np.int32)
    mask = np.zeros(shape, bool)
    positions = np.zeros(shape, np.int32)
    segment_ids = np.zeros(shape, np.int32)
    for b, sequences in enumerate(bins):
        start = 0
        for number, sequence in enumerate(sequences, start=1):
            here = slice(start, start := start + len(sequence.tokens))
            tokens[b, here] = sequence.tokens
            mask[b, here] = sequence.mask
            positions[b, here] = np.arange(len(sequence.tokens))
            segment_ids[b, here] = number
    return Batch(tokens=tokens, mask=mask, positions=positions, segment_ids=segment_ids)
