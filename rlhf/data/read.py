"""Rows from files, folders and the Hugging Face Hub.

A row is a dictionary, a column's value what the file says it is.  CSV has no types: there everything is text but `label`.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf.data.types import Row

SPLITS = ("train", "validation", "test")  # what files of a folder are named after
BOOLS = {"true": True, "1": True, "false": False, "0": False}


def read_rows(source: str | Path, *, split: str = "train", config: str | None = None) -> list[Row]:
    """All rows of a source, in order.

    Args:
      source: a `.jsonl`, `.json`, `.csv` or `.parquet` file, a folder of those, or a name on the Hub, which is downloaded once.
      split: which; a file by itself is `train`.  In a folder, files and folders belong to the split that their names have as a
        word, as in `test.jsonl`, `data/train-00000-of-00002.parquet`, `train/1.csv`; all are `train` where no name has one.
        The Hub takes `datasets`' slices too, such as `train[:1000]`.
      config: a name on the Hub may need one, such as `main`.

    Returns: dictionaries.

    Raises: ValueError, naming file and line, for what is missing, unreadable, malformed or empty.

    >>> import tempfile; file = Path(tempfile.mkdtemp(), "some.jsonl")
    >>> _ = file.write_text('{"prompt": "1 + 1 ="}\\n')
    >>> read_rows(file)
    [{'prompt': '1 + 1 ='}]
    """
    return list(_rows(source, split, config, streaming=False))


def stream_rows(source: str | Path, *, split: str = "train", config: str | None = None) -> Iterator[Row]:
    """The rows of a source one by one, read and downloaded as they are asked for.

    Args and Raises: as `read_rows`; a source that is missing is refused at once, a malformed line when it is reached.
    JSON's lists are read whole, the other formats piece by piece.

    >>> import tempfile; file = Path(tempfile.mkdtemp(), "some.csv")
    >>> _ = file.write_text('prompt,label\\n"1 + 1 =",true\\n')
    >>> next(stream_rows(file))
    {'prompt': '1 + 1 =', 'label': True}
    """
    return _rows(source, split, config, streaming=True)


def read_lines(path: str | Path) -> list[str]:
    """The lines of a UTF-8 text file, one row each, without surrounding blanks.

    Args:
      path: of the file.

    Returns: the lines.

    Raises: ValueError, naming the file (and line) and the cure, where it is missing, unreadable or empty, or a row has no text.

    >>> import tempfile; file = Path(tempfile.mkdtemp(), "some.txt")
    >>> _ = file.write_text(" one \\ntwo")
    >>> read_lines(file)
    ['one', 'two']
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; check the path") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; convert it, for example with iconv -t utf-8") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    if not any(line.strip() for line in lines):
        raise ValueError(f"{path}: the file is empty; it needs one text a line")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise ValueError(f"{path}, line {number}: a row without text; remove it")
    return [line.strip() for line in lines]


def _rows(source: str | Path, split: str, config: str | None, *, streaming: bool) -> Iterator[Row]:
    path = Path(source).expanduser()
    if path.exists():
        return _file_rows(_files(path, split))
    if isinstance(source, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and path.suffix not in FORMATS:
        return _hub_rows(source, split, config, streaming)
    raise ValueError(f"{source}: no such file or folder; check the path")


def _files(path: Path, split: str) -> list[Path]:
    """The files of a split."""
    if path.is_file():
        if path.suffix not in FORMATS:
            raise ValueError(f"{path}: a format that is not read; convert it to one of {', '.join(FORMATS)}")
        if split != "train":
            raise ValueError(
                f"{path}: a file has no split {split!r}, only 'train'; name the split's own file, or a folder of both"
            )
        return [path]
    found = [file for file in sorted(path.rglob("*")) if file.suffix in FORMATS and file.is_file()]
    found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]  # caches
    words = {file: set(re.split(r"[\W_]+", str(file.relative_to(path)))) for file in found}
    chosen = [file for file in found if split in words[file]]
    if not chosen and split == "train" and not any(words[file] & set(SPLITS) for file in found):
        chosen = found
    if not chosen:
        names = ", ".join(str(file.relative_to(path)) for file in found[:10]) or f"none with {', '.join(FORMATS)}"
        raise ValueError(f"{path}: no file of split {split!r}; its files are {names}")
    return chosen


def _file_rows(files: Iterable[Path]) -> Iterator[Row]:
    for path in files:
        empty = True
        try:
            for row in FORMATS[path.suffix](path):
                empty = False
                yield row
        except OSError as error:
            raise _unreadable(path, error) from None
        if empty:
            raise ValueError(f"{path}: the file has no rows; remove it, or fill it")


def _unreadable(path: Path, error: OSError) -> ValueError:
    return ValueError(f"{path}: cannot be read ({error.strerror or error}); check its permissions")


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _row(_parsed(line.rstrip(), path, number), f"{path}, line {number}")


def _json(path: Path) -> Iterator[Row]:
    """A list of objects, or, as in many `.json` files, one object a line."""
    content = path.read_bytes()
    if not content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _jsonl(path)
        return
    for number, value in enumerate(_parsed(content, path, 1)):
        yield _row(value, f"{path}, entry {number} of its list")


def _parsed(content: bytes, path: Path, line: int) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        where = f"{path}, line {line + error.lineno - 1}, column {error.colno}"
        raise ValueError(
            f"{where}: not JSON ({error.msg}); a file holds one object a line, or a .json file a list of them"
        ) from None
    except UnicodeDecodeError as error:
        line += content[: error.start].count(b"\n")
        raise ValueError(f"{path}, line {line}: not UTF-8; convert it, for example with iconv -t utf-8") from None


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a row must be an object of columns, but is {value!r:.40}")
    return value


def _csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            names = next(reader, [])
            if len(set(names)) < len(names):
                raise ValueError(f"{path}, line 1: two columns have one name among {', '.join(names)}; rename one")
            for cells in filter(None, reader):
                where = f"{path}, line {reader.line_num}"
                if len(cells) != len(names):
                    raise ValueError(f"{where}: {len(cells)} cells but {len(names)} columns; quote cells that hold commas")
                yield _with_bool_label(dict(zip(names, cells, strict=True)), where)
        except UnicodeDecodeError:
            line = reader.line_num + 1
            raise ValueError(f"{path}, line {line} or after: not UTF-8; convert it, for example with iconv -t utf-8") from None
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {reader.line_num}: not CSV ({error}); quote cells, and double quotes inside"
            ) from None


def _with_bool_label(row: Row, where: str) -> Row:
    label = row.get("label")
    if label is not None and label.lower() not in BOOLS:
        raise ValueError(f"{where}: label must be true, false, 1 or 0, but is {label!r}")
    return row if label is None else row | {"label": BOOLS[label.lower()]}


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a whole Parquet file ({error}); write or download it again") from None


FORMATS: dict[str, Callable[[Path], Iterator[Row]]] = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def _hub_rows(name: str, split: str, config: str | None, streaming: bool) -> Iterator[Row]:
    import datasets

    number = 0
    try:
        for row in datasets.load_dataset(name, config, split=split, streaming=streaming):
            yield dict(row)
            number += 1
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        where = f"{name}, split {split!r}" + (f", row {number}" if number else "")
        raise ValueError(f"{where}: neither a file here, nor read from the Hub: {error}") from error
    if number == 0:
        raise ValueError(f"{name}: split {split!r} has no rows; choose another")
