"""Rows of one file, by its format: objects a line, a list of them, cells, or Arrow's columns.

Every exception of a parser becomes a ValueError that names the file and the place in it, what is
wrong, and the cure.  What is read is bounded: rows by `values.MAX_BYTES`, nesting by
`values.MAX_DEPTH`; all formats are read piece by piece.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from rlhf.data import arrow_files
from rlhf.data.types import Row, is_messages
from rlhf.data.values import MAX_BYTES, TOO_LARGE, of_json, plain, plain_row

BOOLS = {"true": True, "1": True, "false": False, "0": False}
# Their cells in CSV are JSON, or empty.
JSON_COLUMNS = ("messages", "conversations", "tools", "chat_template_kwargs")
# Of stepwise supervision: cells that look like lists are JSON.
LIST_COLUMNS = ("completions", "labels")
FORM = "a file holds one object a line, or a .json file a list of them"
UTF8 = "not UTF-8; convert it, for example with iconv -t utf-8"
MAGIC = {  # first bytes -> what a file is, whatever its name says, and the cure
    b"\x1f\x8b": "is compressed; unpack it with gunzip",
    b"PK\x03\x04": "is compressed; unpack it with unzip",
    b"BZh9": "is compressed; unpack it with bunzip2",
    b"\xfd7zXZ": "is compressed; unpack it with unxz",
    b"\x28\xb5\x2f\xfd": "is compressed; unpack it with unzstd",
    b"PAR1": "is Parquet; call it .parquet",
    b"ARROW1": "is Arrow; call it .arrow",
    b"\xff\xfe": "is UTF-16; convert it, for example with iconv -f utf-16 -t utf-8",
    b"\xfe\xff": "is UTF-16; convert it, for example with iconv -f utf-16 -t utf-8",
    b"version https://git-lfs": "is a pointer of Git LFS, not the data; get that with git lfs pull",
}
# A list's entries are separated by these alone; a quote by itself starts a string whose end is not
# read yet.  Possessive repeats (`*+`): without them a long string would be tried in many ways.
INSIDE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{}]', re.DOTALL)
BETWEEN = re.compile(INSIDE.pattern + rb"|,", re.DOTALL)


def rows_of(path: Path) -> Iterator[Row]:
    """The rows of a file, in order.

    Args:
      path: of a file with one of `FORMATS` as its suffix.

    Raises: ValueError, naming the file and the place in it, for what cannot be read, is malformed,
    too large or too deep, or empty.

    >>> import tempfile; file = Path(tempfile.mkdtemp(), "some.csv")
    >>> _ = file.write_text('prompt,label\\n"1 + 1 =",true\\n')
    >>> list(rows_of(file))
    [{'prompt': '1 + 1 =', 'label': True}]
    """
    empty = True
    try:
        with path.open("rb") as file:
            first = file.read(32)
        for magic, what in MAGIC.items():
            if first.startswith(magic) and not what.endswith(path.suffix):
                raise ValueError(f"{path}: {what}")
        for row in FORMATS[path.suffix](path):
            empty = False
            yield row
    except OSError as error:
        raise unreadable(path, error) from None
    if empty:
        raise ValueError(f"{path}: the file has no rows; remove it, or fill it")


def unreadable(path: Path, error: OSError) -> ValueError:
    """What to say of a file that the system does not give."""
    return ValueError(f"{path}: cannot be read ({error.strerror or error}); check its permissions")


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_BYTES + 1):
            number += 1
            if len(line) > MAX_BYTES:
                raise ValueError(f"{path}, line {number}: {TOO_LARGE}")
            # A byte order mark, which some programs write before UTF-8.
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield _row(_parsed(line.rstrip(), path, number), f"{path}, line {number}")


def _json(path: Path) -> Iterator[Row]:
    """A list of objects, or, as in many `.json` files, one object a line."""
    with path.open("rb") as file:
        if file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            file.seek(0)
            yield from _listed(path, file)
            return
    yield from _jsonl(path)


def _listed(path: Path, file: BinaryIO) -> Iterator[Row]:
    """The entries of a list, each parsed when its end is read, so that a large file takes no more
    memory than its rows.
    """
    buffer = file.read(2**16)
    at = buffer.index(b"[") + 1  # where the next token is looked for
    start = at  # of the entry
    line = 1 + buffer[:at].count(b"\n")  # of the start
    column = at - buffer.rfind(b"\n", 0, at) - 1  # of the start
    depth = 1
    number = 0
    while True:
        token = (INSIDE if depth > 1 else BETWEEN).search(buffer, at)
        if token is None or token[0] == b'"':  # further on in the file
            at = len(buffer) if token is None else token.start()
            # Doubling: a long entry is searched from `at`, and copied a few times only.
            more = file.read(max(2**16, len(buffer) - start))
            if not more or len(buffer) - start > MAX_BYTES:
                break
            # What lies before the entry is dropped, so that memory holds one entry.
            buffer = buffer[start:] + more
            at -= start
            start = 0
            continue
        at = token.end()
        depth += 1 if token[0] in b"[{" else -1 if token[0] in b"]}" else 0
        # At depth 1 a comma ends an entry, at depth 0 the list's bracket does.
        if depth > 1 or (depth == 1 and token[0] != b","):
            continue
        entry = buffer[start : token.start()]
        # Blank between the brackets is an empty list; elsewhere an entry is missing.
        if entry.strip() or number or depth:
            yield _entry(entry, path, line, column, number)
        number += 1
        line += buffer.count(b"\n", start, at)
        if depth == 0:
            _blank_to_the_end(buffer[at:], file, path, line)
            return
        last = buffer.rfind(b"\n", start, at)
        column = at - last - 1 if last >= 0 else column + at - start
        start = at
    # The rest is parsed for its error, which says more than that the list has no end.
    _entry(buffer[start:], path, line, column, number)
    raise ValueError(f"{path}: the list has no end; write or download the file again")


def _entry(content: bytes, path: Path, line: int, column: int, number: int) -> Row:
    blanks = content[: len(content) - len(content.lstrip())]
    if b"\n" in blanks:
        line += blanks.count(b"\n")
        column = -blanks.rfind(b"\n") - 1
    column += len(blanks)
    content = content.lstrip()
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path}, line {line}: {TOO_LARGE}")
    return _row(_parsed(content, path, line, column), f"{path}, entry {number} of its list")


def _blank_to_the_end(rest: bytes, file: BinaryIO, path: Path, line: int) -> None:
    while rest:
        if rest.strip():
            raise ValueError(f"{path}, line {line}: not JSON (text after the list's end); {FORM}")
        rest = file.read(2**20)


def _parsed(content: bytes, path: Path, line: int, column: int = 0) -> Any:
    """What JSON says that starts in a line, and a column, of a file; of an object plain values."""
    try:
        value = of_json(content.decode())
        return plain_row(value) if isinstance(value, dict) else plain(value)
    except UnicodeDecodeError as error:
        line += content[: error.start].count(b"\n")
        raise ValueError(f"{path}, line {line}: {UTF8}") from None
    except json.JSONDecodeError as error:
        # An entry's first line starts in the middle of the file's line.
        column = error.colno + (column if error.lineno == 1 else 0)
        raise ValueError(
            f"{path}, line {line + error.lineno - 1}, column {column}: not JSON ({error.msg}); "
            f"{FORM}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}, line {line}: {error}") from None


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a row must be an object of columns, but is {value!r:.40}")
    return value


class _Lines:
    """The lines of a CSV file for its parser, which itself bounds nothing but cells."""

    def __init__(self, file: TextIO, path: Path):
        self.file = file
        self.path = path
        self.number = 0  # of the last line
        self.first = 1  # line of the row
        self.size = 0  # characters of the row so far

    def __iter__(self) -> Iterator[str]:
        while line := self.file.readline(MAX_BYTES + 1):
            self.number += 1
            self.size += len(line)
            if self.size > MAX_BYTES:
                raise ValueError(
                    f"{self.path}, line {self.first}: {TOO_LARGE} (is a quote left open?)"
                )
            if "\0" in line:
                raise ValueError(
                    f"{self.path}, line {self.number}: a NUL byte, which no text has; write the "
                    "file again as UTF-8"
                )
            yield line

    def next_row(self) -> None:
        self.first = self.number + 1
        self.size = 0


def _csv(path: Path) -> Iterator[Row]:
    # 131,072 characters by default, too few for a conversation.  The limit is the module's, for all
    # who use it, so that it is set back.
    limit = csv.field_size_limit(MAX_BYTES)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _csv_rows(path, _Lines(file, path))
    finally:
        csv.field_size_limit(limit)


def _csv_rows(path: Path, lines: _Lines) -> Iterator[Row]:
    reader = csv.reader(iter(lines), strict=True)
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise ValueError(
                f"{path}, line 1: two columns have one name among {', '.join(names):.200}; rename "
                "one"
            )
        lines.next_row()
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            lines.next_row()
            if not cells:
                continue
            if len(cells) != len(names):
                raise ValueError(
                    f"{where}: {len(cells)} cells but {len(names)} columns; quote cells that hold "
                    "commas"
                )
            yield {name: _cell(name, cell, where) for name, cell in zip(names, cells, strict=True)}
    except UnicodeDecodeError:
        raise ValueError(f"{path}, line {reader.line_num + 1} or after: {UTF8}") from None
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num}: not CSV ({error}); quote cells, and double quotes "
            "inside"
        ) from None


def _cell(name: str, cell: str, where: str) -> Any:
    """Text; but a label is a bool, and conversations, tools and lists of steps are what their JSON
    says.
    """
    if name == "label":
        if cell.lower() not in BOOLS:
            raise ValueError(f"{where}: label must be true, false, 1 or 0, but is {cell!r:.40}")
        return BOOLS[cell.lower()]
    text = cell.strip()
    if name in JSON_COLUMNS:
        return _json_cell(name, text, where) if text else None
    if name in LIST_COLUMNS and text.startswith("[") and text.endswith("]"):
        return _json_cell(name, text, where)
    # Python's way to write messages is looked for too: it is no JSON, but no text to train on
    # either.
    if (
        text.startswith("[{")
        and text.endswith("}]")
        and re.search(r"""["'](role|from)["']\s*:""", text)
    ):
        value = _json_cell(name, text, where)
        return value if is_messages(value) or _is_sharegpt(value) else cell
    return cell


def _is_sharegpt(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(turn, dict) and turn.keys() >= {"from", "value"} for turn in value
    )


def _json_cell(name: str, text: str, where: str) -> Any:
    try:
        return plain(of_json(text), 1)
    except json.JSONDecodeError as error:
        problem = f"not JSON ({error.msg} at character {error.colno})"
    except ValueError as error:
        problem = str(error)
    raise ValueError(
        f"{where}: {name} must be JSON, but {text!r:.40} is not: {problem}; write it with "
        "json.dumps"
    )


FORMATS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": arrow_files.parquet,
    ".arrow": arrow_files.arrow,
}
