"""Files of a model's folder, read within bounds: whatever is wrong with one becomes a line that
names it.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.json_text import TwiceError, without_duplicates

SIZE = 256_000_000  # bytes of a file; the largest tokenizers and indices have a tenth of it
DEPTH = 64  # of objects and lists in one another


def read_text(file: Path, limit: int = SIZE) -> str:
    """A file's text.

    Raises: FileNotFoundError where there is none; ValueError where it is larger than `limit` bytes,
    cannot be read, or is not text in UTF-8.

    >>> read_text(Path("/nowhere/config.json"))
    Traceback (most recent call last):
    FileNotFoundError: /nowhere/config.json is not there
    """
    try:
        # The size first: reading a file that is no config could fill the memory.
        size = file.stat().st_size
        if size > limit:
            raise ValueError(f"{file} has {size:,} bytes, but such a file has at most {limit:,}")
        return file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{file} is not there") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not text in UTF-8: byte {error.start} is {error.object[error.start]:#04x}"
        ) from error


def read_object(file: Path, limit: int = SIZE) -> dict[str, Any]:
    """A JSON object.

    Raises: FileNotFoundError where there is no file; ValueError where it is larger than `limit`
    bytes, cannot be read, is not UTF-8 or no JSON object, is nested deeper than any of its kind,
    says a name twice, or holds NaN or an infinity.
    """
    text = read_text(file, limit)
    # A clone without git-lfs has such texts in place of files; a JSON error would not say so.
    if text.startswith("version https://git-lfs"):
        raise ValueError(
            f"{file} is a pointer of Git LFS, not the file itself; run git lfs pull in its folder"
        )
    return parse_object(text, str(file))


def parse_object(text: str | bytes, where: str) -> dict[str, Any]:
    """`read_object` of a text; `where` it stands is named in the errors.

    >>> parse_object('{"a": 1, "a": 2}', "config.json")
    Traceback (most recent call last):
    ValueError: config.json: 'a' is there twice in one object; leave one out
    """
    try:
        value = json.loads(text, object_pairs_hook=without_duplicates)
    except TwiceError as error:
        raise ValueError(f"{where}: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deep") from error
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, {{…}}, but is {value!r:.40}")
    # Python's parser takes NaN and Infinity, which JSON does not have.
    for path, leaf, depth in _walk(value):
        if depth > DEPTH:
            raise ValueError(f"{where} is nested too deep, at {path[:80]}")
        if isinstance(leaf, float) and not math.isfinite(leaf):
            raise ValueError(f"{where}: {path} must be finite, but is {leaf}")
    return value


def _walk(value: Any) -> Iterator[tuple[str, Any, int]]:
    """Every value with its path and depth, without recursion; not below what is too deep."""
    # A stack of our own: what is nested too deep would end Python's.
    todo = [("", value, 0)]
    while todo:
        path, node, depth = todo.pop()
        yield path.removeprefix("."), node, depth
        entries: Any = ()
        if isinstance(node, dict):
            entries = node.items()
        elif isinstance(node, list):
            entries = enumerate(node)
        todo += [(f"{path}.{name}", below, depth + 1) for name, below in entries]
