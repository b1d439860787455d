"""Rows of Arrow's columns, from Parquet and from the files that `datasets.save_to_disk` writes.

Columns marked as JSON (`arrow.json`, which `datasets` writes where objects differ) are decoded, at
every depth.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.data.types import Row
from rlhf.data.values import MAX_BYTES, MEGABYTE, TOO_LARGE, of_json, plain_row

# An array that is repeated, or compressed, can be a thousand times larger in memory than in its
# file: rows are unpacked in small parts, and the sum is bounded.
MOST_ROWS = 64  # unpacked at once: what is a few bytes in a file may be megabytes in memory
UNPACKED = 100  # times its size on disk a file may have in memory …
UNPACKED_BYTES = 2048 * MEGABYTE  # … beyond this size
ROW_BYTES = 100  # what a row takes beside its values, at least


def parquet(path: Path) -> Iterator[Row]:
    """The rows of a Parquet file.  Raises: ValueError, naming the file and the row, for what cannot
    be read.
    """
    import pyarrow.parquet

    with _errors(path, "Parquet"), pyarrow.parquet.ParquetFile(path) as file:
        _check_unpacked(path, file.metadata.num_rows * ROW_BYTES)
        yield from _rows(path, file.schema_arrow, file.iter_batches(batch_size=MOST_ROWS))


def arrow(path: Path) -> Iterator[Row]:
    """The rows of an Arrow file or stream; `datasets` writes streams.  Raises: ValueError, naming
    the file and the row, for what cannot be read.
    """
    import pyarrow

    with _errors(path, "Arrow"), pyarrow.memory_map(str(path)) as source:
        # The magic bytes tell a file with a footer from a stream, which has none.
        if source.read_at(6, 0) == b"ARROW1":
            file = pyarrow.ipc.open_file(source)
            schema = file.schema
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            stream = pyarrow.ipc.open_stream(source)
            schema = stream.schema
            batches = iter(stream)
        yield from _rows(path, schema, batches)


@contextmanager
def _errors(path: Path, kind: str) -> Iterator[None]:
    """Any exception of Arrow's as one line."""
    try:
        yield
    except (GeneratorExit, _Refused):
        # The caller stopped reading, or the error says already what is wrong.
        raise
    except OSError as error:
        # Errors of the system have a number; those of pyarrow, which is about the content, have
        # none.
        if error.errno is None:
            raise _broken(path, kind, error) from None
        raise
    except MemoryError:
        raise ValueError(
            f"{path}: takes more memory than there is; write it again in smaller row groups"
        ) from None
    except Exception as error:
        # pyarrow raises kinds of its own, and many of Python's.
        raise _broken(path, kind, error) from None


def _broken(path: Path, kind: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())
    return ValueError(
        f"{path}: not a whole {kind} file ({reason:.200}); write or download it again"
    )


class _Refused(ValueError):
    """A file that can be read, with something in it that is refused."""


def _rows(path: Path, schema: Any, batches: Iterator[Any]) -> Iterator[Row]:
    _check_names(path, schema.names)
    decoders = {field.name: decode for field in schema if (decode := _decoder(field.type))}
    number = 0
    unpacked = 0
    for record_batch in batches:
        # Offsets of a damaged file lead anywhere, and pyarrow follows them unless it has checked.
        record_batch.validate(full=True)
        for first in range(0, record_batch.num_rows, MOST_ROWS):
            # Decoded before it is measured: a dictionary holds a value once that a thousand rows
            # name.
            batch = _dense(record_batch.slice(first, MOST_ROWS))
            unpacked += batch.nbytes + ROW_BYTES * batch.num_rows
            _check_unpacked(path, unpacked)
            for values in _listed(batch, f"{path}, row", number):
                yield _row(values, decoders, f"{path}, row {number}")
                number += 1


def _listed(batch: Any, where: str, number: int) -> Iterator[Row]:
    """A batch's rows as Python's values; where they may be large, one by one and not beyond the
    bound.
    """
    if batch.nbytes <= MAX_BYTES:
        yield from batch.to_pylist(maps_as_pydicts="strict")
        return
    for i in range(batch.num_rows):
        one = batch.slice(i, 1)
        if one.nbytes > MAX_BYTES:
            raise _Refused(f"{where} {number + i}: {TOO_LARGE}")
        yield from one.to_pylist(maps_as_pydicts="strict")


def _row(values: Row, decoders: dict[str, Callable[[Any], Any]], where: str) -> Row:
    name = ""
    try:
        for name, decode in decoders.items():
            values[name] = decode(values[name])
    except ValueError as error:
        raise _Refused(
            f"{where}: {name} is marked as JSON, but is not ({error}); write the file again"
        ) from None
    try:
        return plain_row(values)
    except ValueError as error:
        raise _Refused(f"{where}: {error}") from None


def _decoder(type: Any) -> Callable[[Any], Any] | None:
    """What decodes the JSON inside values of an Arrow type; None where there is none."""
    from pyarrow import types

    if getattr(type, "extension_name", None) == "arrow.json":
        return lambda value: None if value is None else of_json(value)
    if types.is_struct(type):
        inner = {field.name: decode for field in type if (decode := _decoder(field.type))}
        if not inner:
            return None
        return lambda value: (
            value and value | {name: decode(value[name]) for name, decode in inner.items()}
        )
    if types.is_map(type):
        of_item = _decoder(type.item_type)
        if of_item is None:
            return None
        return lambda value: value and {name: of_item(item) for name, item in value.items()}
    if types.is_dictionary(type) or types.is_run_end_encoded(type):
        return _decoder(type.value_type)
    if hasattr(type, "value_type"):  # the kinds of lists
        of_entry = _decoder(type.value_type)
        if of_entry is None:
            return None
        return lambda value: value and [of_entry(entry) for entry in value]
    return None


def _dense(batch: Any) -> Any:
    """A batch whose columns hold their values, so that its size is that in memory."""
    import pyarrow

    columns = [
        c.dictionary_decode() if pyarrow.types.is_dictionary(c.type) else c for c in batch.columns
    ]
    return pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _check_names(path: Path, names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise _Refused(
            f"{path}: two columns have one name among {', '.join(names):.200}; rename one"
        )


def _check_unpacked(path: Path, unpacked: int) -> None:
    size = path.stat().st_size
    if unpacked > max(UNPACKED_BYTES, UNPACKED * size):
        raise _Refused(f"{path}: its {size:,} bytes unpack to {unpacked:,} or more; split it")
