"""Rows of token ids as the library's arrays, in NumPy."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf.fields import documented
from rlhf.rollouts import Batch, Pairs, Prompts, unpacked_rows


@documented
class Tokenized(NamedTuple):
    """A sequence.

    Attributes:
      tokens: token ids.
      mask: True on trained tokens.
    """

    tokens: list[int]
    mask: list[bool]


@documented
class Steps(NamedTuple):
    """A solution in steps, for a process reward model.

    Attributes:
      tokens: token ids.
      mask: True on the last token of every step.
      labels: there 1 for a right step, 0 for a wrong one; 0 elsewhere.
    """

    tokens: list[int]
    mask: list[bool]
    labels: list[int]


@documented
class Truncated(NamedTuple):
    """What a length leaves of rows.

    Attributes:
      sides: as given, without the rows removed.
      remaining: [N] int, the index that each row left had among those given.
      rows_cut: how many of the sequences left lost tokens.
      tokens_cut: how many tokens they lost.
      rows_removed: no trained token left, on one side or more.
    """

    sides: tuple[list[Any], ...]
    remaining: np.ndarray
    rows_cut: int
    tokens_cut: int
    rows_removed: int


def truncate(*sides: Sequence[Any], length: int) -> Truncated:
    """Cuts sequences at the end, and removes rows in which one is left without a trained token,
    such as after a long prompt.

    Args:
      sides: `Tokenized` or `Steps`; several are cut row by row:
        `truncate(chosen, rejected, length=512)`.
      length: the most tokens a sequence may keep.

    Returns: a `Truncated`.  Labels and other columns follow by
    `np.asarray(labels)[truncated.remaining]`.

    Raises: ValueError where the sides have different numbers of rows, length is below 1, or no row
    is left.

    >>> rows = [Tokenized([5, 6, 7], [False, False, True]), Tokenized([5, 6, 7], [False, True, True])]
    >>> (left,), *report = truncate(rows, length=2)
    >>> left, report
    ([Tokenized(tokens=[5, 6], mask=[False, True])], [array([1]), 1, 1, 1])
    """
    if length < 1:
        raise ValueError(f"length must be at least 1 token, but is {length}")
    if len({len(side) for side in sides}) != 1:
        raise ValueError(
            f"sides have {', '.join(str(len(side)) for side in sides)} rows; give as many of each"
        )
    # A row goes with all its sides: a chosen completion without its rejected one is no pair.
    remaining = [
        i
        for i, row in enumerate(zip(*sides, strict=True))
        if all(any(sequence.mask[:length]) for sequence in row)
    ]
    if not remaining:
        raise ValueError(
            f"none of {len(sides[0])} rows has a trained token among its first {length}; raise "
            "length, or check masks"
        )
    lost = [max(len(side[i].tokens) - length, 0) for side in sides for i in remaining]
    shorter = tuple(
        [side[i]._make(field[:length] for field in side[i]) for i in remaining] for side in sides
    )
    return Truncated(
        shorter,
        np.array(remaining),
        sum(n > 0 for n in lost),
        sum(lost),
        len(sides[0]) - len(remaining),
    )


def fitted(row: Any, length: int) -> Any:
    """A text's first token and its last ones: what classifiers read of one that is too long, since
    the completion comes last.

    Args:
      row: a `Tokenized` or `Steps`.
      length: the most tokens it may keep.

    Raises: ValueError where length is below 2.

    >>> fitted(Tokenized([1, 5, 6, 7], [False, False, True, True]), 3).tokens
    [1, 6, 7]
    """
    if length < 2:
        raise ValueError(
            f"length must be at least 2 tokens, a text's first and its last, but is {length}"
        )
    if len(row.tokens) <= length:
        return row
    return row._make([*field[:1], *field[len(field) - length + 1 :]] for field in row)


def batch(rows: Sequence[Any], *, length: int | None = None) -> Batch:
    """Sequences side by side, padded on the right.

    Args:
      rows: N `Tokenized` or `Steps`.
      length: T; None: the longest row's.  One length for all batches means one compilation.

    Returns: a `Batch` of NumPy arrays `[N, T]`.  Real tokens are known by `segment_ids`, never by
    the token used for padding, so that an end token which is the tokenizer's padding too is trained
    like any other.

    Raises: ValueError where there are no rows, or one has no tokens or more than `length`; it names
    the row.

    >>> batch([Tokenized([5, 6], [False, True]), Tokenized([7], [True])]).segment_ids.tolist()
    [[1, 1], [1, 0]]
    """
    return _batch(rows, _columns([row.tokens for row in rows], length, "row"))


def aligned(rows: Sequence[Any]) -> Batch:
    """Sequences whose first trained token stands in one column: prompts are padded on the left,
    completions on the right.

    Args:
      rows: N `Tokenized` or `Steps` with a trained token each.

    Returns: a `Batch` of NumPy arrays `[N, T]`, T of the longest prompt and completion.

    Raises: ValueError where there are no rows, or one has none.

    >>> aligned([Tokenized([5, 6, 7], [False, False, True]), Tokenized([8, 9], [False, True])]).tokens.tolist()
    [[5, 6, 7], [0, 8, 9]]
    """
    lengths = _columns([row.tokens for row in rows], None, "row").sum(axis=1)
    # Where all prompts end in one column, a model needs logits of the columns after it alone.
    start = np.array([[*row.mask, True].index(True) for row in rows])
    if (start == lengths).any():
        raise ValueError(
            f"row {int((start == lengths).argmax())} has no trained token to align; leave it out"
        )
    first = start.max() - start
    columns = np.arange((first + lengths).max())
    return _batch(rows, (columns >= first[:, None]) & (columns < (first + lengths)[:, None]))


def step_batch(rows: Sequence[Steps], *, length: int | None = None) -> tuple[Batch, np.ndarray]:
    """Solutions in steps, and the label of the step that ends at a token, as
    `losses.process_reward` takes them.

    Args:
      rows: N solutions.
      length: T; None: the longest row's.

    Raises: ValueError where there are no rows, or one has no tokens or more than `length`.

    Returns: a `Batch` whose `mask` is True at the ends of steps, and labels `[N, T]` int32.

    >>> step_batch([Steps([5, 6, 7], [False, True, True], [0, 1, 0])])[1].tolist()
    [[0, 1, 0]]
    """
    arrays = batch(rows, length=length)
    return arrays, _filled([row.labels for row in rows], arrays.segment_ids != 0, np.int32)


def pairs(
    chosen: Sequence[Tokenized], rejected: Sequence[Tokenized], *, length: int | None = None
) -> Pairs:
    """Preference pairs, unpacked.

    Args:
      chosen, rejected: N sequences each, which start with the prompt.
      length: T; None: the longest sequence's.

    Returns: `Pairs` of NumPy arrays `[N, 2, T]`.

    Raises: ValueError where there is not one rejected for every chosen, there are no rows, or one
    has no tokens or more than `length`.

    >>> pairs([Tokenized([5, 6], [False, True])], [Tokenized([5, 7, 8], [False, True, True])]).tokens.tolist()
    [[[5, 6, 0], [5, 7, 8]]]
    """
    if len(chosen) != len(rejected):
        raise ValueError(f"{len(chosen)} chosen but {len(rejected)} rejected; a pair needs both")
    arrays = batch(
        [side for pair in zip(chosen, rejected, strict=True) for side in pair], length=length
    )
    shape = (len(chosen), 2, -1)
    return Pairs(
        tokens=arrays.tokens.reshape(shape),
        mask=arrays.mask.reshape(shape),
        positions=arrays.positions.reshape(shape),
        segment_ids=arrays.segment_ids.reshape(shape),
    )


def prompts(rows: Sequence[Sequence[int]], *, length: int | None = None) -> Prompts:
    """Prompts to sample from, padded on the left.  None is cut: a prompt without its beginning or
    end is another prompt.

    Args:
      rows: P lists of tokens.
      length: L; None: the longest prompt's.

    Returns: `Prompts` of NumPy arrays `[P, L]`.

    Raises: ValueError where there are none, or one has no tokens or more than `length`; it names
    it.

    >>> prompts([[5, 6], [7]]).tokens.tolist()
    [[5, 6], [0, 7]]
    """
    # Mirrored: padding on the left, so that all rows continue in the same column.
    real = _columns(rows, length, "prompt")[:, ::-1]
    return Prompts(_filled(rows, real, np.int32), real)


def mismatched(rows: Sequence[Tokenized]) -> list[Tokenized]:
    """Every prompt with the next row's completion, and the last with the first's: what
    `losses.unpaired.kto_kl` measures.

    Args:
      rows: N whose trained tokens follow the prompt.

    Returns: N rows; some are longer than any was.

    Raises: ValueError for fewer than two rows.

    >>> mismatched([Tokenized([5, 6], [False, True]), Tokenized([7, 8], [False, True])])
    [Tokenized(tokens=[5, 8], mask=[False, True]), Tokenized(tokens=[7, 6], mask=[False, True])]
    """
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} rows, but another prompt's completion needs at least 2")
    start = [[*row.mask, True].index(True) for row in rows]
    after = [*range(1, len(rows)), 0]

    def mixed(i, j):
        return Tokenized(
            rows[i].tokens[: start[i]] + rows[j].tokens[start[j] :],
            rows[i].mask[: start[i]] + rows[j].mask[start[j] :],
        )

    return [mixed(i, j) for i, j in enumerate(after)]


def _batch(rows: Sequence[Any], real: np.ndarray) -> Batch:
    tokens = _filled([row.tokens for row in rows], real, np.int32)
    mask = _filled([row.mask for row in rows], real, bool)
    # NumPy again: batches stay in the host's memory until a step needs them.
    return jax.tree.map(np.asarray, unpacked_rows(tokens, real, mask))


def _columns(rows: Sequence[Sequence[int]], length: int | None, what: str) -> np.ndarray:
    """`[N, T]` bool, True on the first columns of each row, as many as it has tokens."""
    lengths = np.array([len(row) for row in rows])
    if not lengths.all() or not len(rows):
        raise ValueError(
            f"{what} {int(lengths.argmin()) if len(rows) else 0} has no tokens; a model needs at "
            "least one"
        )
    if length is not None and lengths.max() > length:
        i = int(np.argmax(lengths > length))
        raise ValueError(
            f"{what} {i} has {lengths[i]} tokens but length is {length}; truncate it, leave it out "
            "or raise length"
        )
    return np.arange(length or lengths.max())[None, :] < lengths[:, None]


def _filled(rows: Sequence[Sequence[Any]], real: np.ndarray, dtype) -> np.ndarray:
    array = np.zeros(real.shape, dtype)
    # A mask is filled row by row, so that one assignment places all rows; a loop is slower.
    array[real] = np.concatenate([np.asarray(row, dtype) for row in rows])
    return array
