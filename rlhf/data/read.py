"""Rows from files, folders and the Hugging Face Hub.

A row is a dictionary, and the same one whichever container it comes from: text, numbers, booleans,
lists and objects, as in JSON.  Fields of objects that are null are left out; all rows have the
columns of any of them, None where one has none.  CSV has no types: there everything is text but
`label`, a bool, and conversations and tools, which are JSON.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from rlhf.data.folders import files
from rlhf.data.formats import FORMATS, UTF8, rows_of, unreadable
from rlhf.data.types import Row
from rlhf.data.values import MAX_BYTES, TOO_LARGE, filled, plain_row


def read_rows(source: str | Path, *, split: str = "train", config: str | None = None) -> list[Row]:
    """All rows of a source, in order.

    Args:
      source: a `.jsonl`, `.json`, `.csv`, `.parquet` or `.arrow` file, a folder of those, such as
        `datasets.save_to_disk` writes, or a name on the Hub, which is downloaded once.
      split: which; a file by itself is `train`.  In a folder, files and folders belong to the split
        that their names have as a word, as in `test.jsonl`, `data/train-00000-of-00002.parquet`,
        `train/1.csv`; all are `train` where no name has one.  The Hub takes `datasets`' slices too,
        such as `train[:1000]`.
      config: a name on the Hub may need one, such as `main`.

    Returns: dictionaries, all with the same columns.

    Raises: ValueError, naming file and line, for what is missing, unreadable, malformed, too large
    or empty.

    >>> import tempfile; file = Path(tempfile.mkdtemp(), "some.jsonl")
    >>> _ = file.write_text('{"prompt": "1 + 1 ="}\\n')
    >>> read_rows(file)
    [{'prompt': '1 + 1 ='}]
    """
    return filled(list(_rows(source, split, config, streaming=False)))


def stream_rows(
    source: str | Path, *, split: str = "train", config: str | None = None
) -> Iterator[Row]:
    """The rows of a source one by one, read and downloaded as they are asked for.

    Args:
      source: a file, a folder or a name on the Hub, as `read_rows` takes them.
      split: which; a file by itself is `train`.  A folder's files belong to the split that their
        names have as a word; all are `train` where no name has one.
      config: a name on the Hub may need one, such as `main`.

    Returns: dictionaries; each has the columns of those before it.

    Raises: ValueError: at once where the source is missing; naming file and line, when it is
    reached, for what is unreadable, malformed, too large or empty.

    >>> import tempfile; file = Path(tempfile.mkdtemp(), "some.csv")
    >>> _ = file.write_text('prompt,label\\n"1 + 1 =",true\\n')
    >>> next(stream_rows(file))
    {'prompt': '1 + 1 =', 'label': True}
    """
    return _with_columns_so_far(_rows(source, split, config, streaming=True))


def read_lines(path: str | Path) -> list[str]:
    """The lines of a UTF-8 text file, one row each, without surrounding blanks.

    Args:
      path: of the file; its lines end with a line feed, before which a carriage return may stand,
        and with nothing else.

    Returns: the lines.

    Raises: ValueError, naming the file (and line) and the cure, where it is missing, unreadable or
    empty, or a row has no text.

    >>> import tempfile; file = Path(tempfile.mkdtemp(), "some.txt")
    >>> _ = file.write_text(" one \\ntwo")
    >>> read_lines(file)
    ['one', 'two']
    """
    path = Path(path)
    lines: list[str] = []
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_BYTES + 1):
                if len(line) > MAX_BYTES:
                    raise ValueError(f"{path}, line {len(lines) + 1}: {TOO_LARGE}")
                # Split as bytes: `str.splitlines` would also cut at form feeds and U+2028 in a
                # text.
                lines.append(line.decode("utf-8" if lines else "utf-8-sig").strip())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; check the path") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}, line {len(lines) + 1}: {UTF8}") from None
    except OSError as error:
        raise unreadable(path, error) from None
    if not any(lines):
        raise ValueError(f"{path}: the file is empty; it needs one text a line")
    for number, text in enumerate(lines, start=1):
        if not text:
            raise ValueError(f"{path}, line {number}: a row without text; remove line {number}")
    return lines


def _rows(source: str | Path, split: str, config: str | None, *, streaming: bool) -> Iterator[Row]:
    path = Path(source).expanduser()
    try:
        if path.exists():
            return _file_rows(files(path, split))
    except OSError as error:
        # No permission, or no name that a file may have.
        raise unreadable(path, error) from None
    # A misspelt path such as "data/train.jsonl" looks like owner/name: its suffix says that it is
    # not.
    if (
        isinstance(source, str)
        and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source)
        and path.suffix not in FORMATS
    ):
        return _hub_rows(source, split, config, streaming)
    raise ValueError(f"{source}: no such file or folder; check the path")


def _file_rows(paths: Iterable[Path]) -> Iterator[Row]:
    """The rows of a split's files, one after another; they must have a column in common."""
    known: set[str] = set()
    for path in paths:
        rows = rows_of(path)
        first = next(rows)  # `rows_of` refuses an empty file, so that there is one
        # Without a column in common one of them is hardly data: a licence, or a list of labels.
        if known and not known & first.keys():
            new_columns = ", ".join(first)
            known_columns = ", ".join(sorted(known))
            raise ValueError(
                f"{path}: its columns {new_columns:.200} are none of those of the files before, "
                f"{known_columns:.200}; "
                "if it is about the data, move it out of the folder, if it is data, name it by "
                "itself"
            )
        for row in chain([first], rows):
            known.update(row)
            yield row


def _with_columns_so_far(rows: Iterable[Row]) -> Iterator[Row]:
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(row))
        yield {name: row.get(name) for name in names}


def _hub_rows(name: str, split: str, config: str | None, streaming: bool) -> Iterator[Row]:
    import datasets

    number = 0
    try:
        for row in datasets.load_dataset(name, config, split=split, streaming=streaming):
            yield plain_row(row)
            number += 1
    except Exception as error:
        # Of datasets, of the libraries that it calls, and of the network.
        where = f"{name}, split {split!r}" + (f", row {number}" if number else "")
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{where}: neither a file here, nor read from the Hub: {reason:.500}"
        ) from error
    if number == 0:
        raise ValueError(f"{name}: split {split!r} has no rows; choose another")
