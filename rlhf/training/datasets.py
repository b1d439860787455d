"""Rows of data sets: read, laid out as arrays, and cut into batches."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from itertools import islice
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf import data, hosts, tasks
from rlhf.data import batch_indices, filled, mix, read_rows, renamed, stream_rows
from rlhf.data.types import Row
from rlhf.training import meshes, programs
from rlhf.training.options import DatasetOptions, SourceOptions, TrainingOptions


def read(
    options: SourceOptions,
    source: Any,
    split: str,
    kind: Callable,
    number: int,
    seed: int,
    **of_kind: Any,
) -> list[Row]:
    """The rows of a source.

    Args:
      options: names of columns, and how many rows are read.
      source: a name as in `SourceOptions.dataset`, or rows.
      split: of a data set by name.
      kind: of `rlhf.tasks`, makes the rows of a generated task.
      number: rows of a generated task.
      seed: of a generated task.
      of_kind: arguments of `kind`.
    """
    if isinstance(source, str) and source.startswith(tasks.PREFIX):
        return tasks.load(source, kind, number, seed=seed, **of_kind)
    if isinstance(source, str):
        # A stream ends the download after `max_rows`; read as a whole the data set is cached on
        # disk.
        read_source = read_rows if options.max_rows is None else stream_rows
        given = read_source(source, split=split, config=options.dataset_config)
    else:
        given = _copies(source)
    # `filled` gives every row the same columns: rows of JSON leave out what is null.
    rows = filled(list(islice(given, options.max_rows)))
    if not rows:
        raise ValueError("dataset has no rows; give at least one")
    if missing := [name for name in options.columns if name not in rows[0]]:
        named = source if isinstance(source, str) else "the dataset"
        raise ValueError(
            f"columns renames {', '.join(missing)}, but {named} has {', '.join(rows[0]):.200}"
        )
    return list(data.each(rows, lambda row: renamed(row, **options.columns)))


def _copies(rows: Iterable) -> Iterator[Row]:
    """Columns are renamed later, and the caller's rows stay as they are."""
    if isinstance(rows, Mapping):
        raise ValueError(
            "dataset is a dict of columns; give a list of rows, or datasets.Dataset.from_dict(...)"
        )
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(
                f"row {number} of dataset is {row!r:.80}; give a dict of columns and values"
            )
        yield dict(row)


def read_held_out(options: SourceOptions) -> list[Row]:
    """Rows to evaluate on alone; of a generated task not those that are trained on."""
    # Seed 1, where rows to train on have 0: generated rows differ.
    return read(options, options.dataset, options.split, tasks.prompts, options.dataset_size, 1)


def load_rows(
    options: DatasetOptions, kind: Callable, **of_kind: Any
) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and held-out rows, none where none were requested; `kind` makes those of a
    generated task.
    """
    sources = [options.dataset, *options.more_datasets]
    if options.dataset_accuracy is not None:
        # Only kinds of rows with completions have an accuracy; `kind` would raise without a hint.
        if kind is tasks.prompts:
            raise ValueError(
                f"dataset_accuracy {options.dataset_accuracy} is of completions, but prompts have "
                "none; leave it out"
            )
        of_kind = {**of_kind, "accuracy": options.dataset_accuracy}
    parts = [
        read(options, source, options.split, kind, options.dataset_size, 0, **of_kind)
        for source in sources
    ]
    if options.fractions:
        train = filled(mix(parts, options.fractions).rows)
    else:
        train = filled([row for rows in parts for row in rows])
    if options.eval_dataset is None and options.eval_split is None:
        return train, []
    source = options.dataset if options.eval_dataset is None else options.eval_dataset
    # 256 generated rows, of another seed than those that are trained on; files are read in full.
    return train, read(options, source, options.eval_split or "train", kind, 256, 1, **of_kind)


def load_arrays(
    options: DatasetOptions, kind: Callable, lay_out: Callable[[list[Row]], Any]
) -> tuple[Any, Any]:
    """`load_rows` as arrays; None for the second where no held-out rows were requested."""
    train, held_out = load_rows(options, kind)
    return lay_out(train), lay_out(held_out) if held_out else None


def truncated(*sides: Any, length: int, say: Callable) -> data.Truncated:
    """`data.truncate`; what is cut or left out is said."""
    fitting = data.truncate(*sides, length=length)
    # Silence would let a too small length train on half sentences unnoticed.
    if fitting.rows_cut or fitting.rows_removed:
        cut = f"{fitting.rows_cut} sequences lost {fitting.tokens_cut} tokens beyond {length}"
        say(f"{cut}; {fitting.rows_removed} rows with nothing left to train on were left out")
    return fitting


def select(arrays: Any, rows: Any) -> Any:
    """These rows of all arrays; an array without axes belongs to every row."""
    return jax.tree.map(lambda x: x[rows] if np.ndim(x) else x, arrays)


def number_of_rows(arrays: Any) -> int:
    """How many rows arrays have."""
    return len(jax.tree.leaves(arrays)[0])


def take(arrays: Any, seed: int, number: int, size: int) -> Any:
    """The batch of step `number`, from 0: a pure function of seed and number."""
    return select(arrays, batch_indices(seed, number, number_of_rows(arrays), size))


def batches(arrays: Any, training: TrainingOptions, mesh: Mesh) -> Callable[[int], Any]:
    """`(number) -> batch` of step `number`, its rows over the mesh."""

    def batch(number: int) -> Any:
        return meshes.place(take(arrays, training.seed, number, training.batch_size), mesh)

    return batch


def in_parts(fn: Callable, arrays: Any, size: int, mesh: Mesh, *fixed: Any) -> Any:
    """`fn(*fixed, part)` of all rows, `size` at a time, as arrays of NumPy.

    Every part has `size` rows, so that one program serves all: the last one is filled up, and what
    is found for the filling is left out.
    """
    if programs.is_planned():  # zeros of the right shapes stand for what would be found
        part, _ = parts(arrays, size)[0]
        shapes = jax.eval_shape(fn, *fixed, programs.shaped(part, None))
        rows = number_of_rows(arrays)
        return jax.tree.map(lambda x: np.zeros((rows, *x.shape[1:]), x.dtype), shapes)
    found = []
    # Activations are constrained to the mesh that is set; without it they are replicated.
    with jax.set_mesh(mesh):
        for part, real in parts(arrays, size):
            out = jax.device_get(hosts.fetch(fn(*fixed, meshes.place(part, mesh))))
            # `real=real` binds the value now: a closure would read the last part's.
            found.append(jax.tree.map(lambda x, real=real: x[:real], out))
    return jax.tree.map(lambda *x: np.concatenate(x), *found)


def parts(arrays: Any, size: int) -> list[tuple[Any, int]]:
    """All rows, `size` at a time, and how many of them are real: the last part is filled up with
    its own last row.
    """
    number = number_of_rows(arrays)
    found = []
    for start in range(0, number, size):
        # Rows past the end repeat the last one: real data, so that nothing in it is NaN.
        rows = np.minimum(np.arange(start, start + size), number - 1)
        found.append((select(arrays, rows), min(size, number - start)))
    return found


def named(name: str, known: Mapping[str, Any], what: str) -> Any:
    """What a name stands for.  Raises: ValueError for one that is not known, with the nearest that
    is.
    """
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"{what} {name!r} is not known; {hint}known: {', '.join(known)}")
    return known[name]
