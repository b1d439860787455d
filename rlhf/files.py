"""Files that are written whole or not at all, and outputs that write over nothing."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

# The start of the name of a file that is being written.
PART = ".part."


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place when it is whole; where an error comes,
    nothing has changed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with replacing(Path(folder, "a.txt")) as part:
    ...         _ = part.write_text("whole")
    ...     Path(folder, "a.txt").read_text(), os.listdir(folder)
    ('whole', ['a.txt'])
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since a rename between file systems is a copy.  The ending stays: some
    # writers choose their format by it.
    part = path.with_name(PART + path.name)
    try:
        yield part
        with part.open("rb") as file:
            # Else a machine that loses power may have the new name on disk, of an empty file.
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write(path: str | Path, text: str) -> None:
    """Writes a text file whole, in the place of what was there.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(Path(folder, "new", "a.txt"), "whole")
    ...     Path(folder, "new", "a.txt").read_text()
    'whole'
    """
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def renewed(folder: str | Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `folder` when it is whole.

    Where the process is killed between the two, `.part.old.NAME` is the last whole one, and the
    next call puts it back first.
    """
    folder = Path(folder).absolute()
    new, old = (folder.with_name(f"{PART}{which}.{folder.name}") for which in ("new", "old"))
    # A process was killed between the two renames below.
    if old.exists() and not folder.exists():
        old.rename(folder)
    # What a process that was killed has left.
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    yield new
    # Two renames: a folder that is not empty cannot be replaced by one.
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def check_output(
    path: str | Path, *, inputs: Iterable[str | None] = (), overwrite: bool = False
) -> None:
    """Holds a file that a command is to write against what is there, before its work begins.

    Args:
      path: the file.
      inputs: what the command reads: files and folders; other names, such as those on the Hub, are
        passed over.
      overwrite: whether what is there may be written over; what the command reads may not.

    Raises: ValueError where the file exists, is one that the command reads, or cannot be written.

    >>> check_output("completions.jsonl", inputs=["Qwen/Qwen2.5-0.5B"])
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give a file as --output")
    _check(path, inputs, overwrite)


def check_output_folder(
    path: str | Path, *, inputs: Iterable[str | None] = (), overwrite: bool = False
) -> None:
    """`check_output` of a folder for a model: a new or empty one, or with `overwrite` one that
    holds a model.

    Raises: ValueError where the folder exists, is one that the command reads, cannot be written, or
    holds something else than a model, which is never deleted.

    >>> check_output_folder("a-new-folder")
    """
    path = Path(path)
    # Replacing it would take the folder away from under the process.
    if path.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise ValueError(f"{path}: is the folder that you are in; choose another --output")
    if path.is_dir() and not path.is_symlink():
        if not any(path.iterdir()):
            return
        if overwrite and not (path / "config.json").exists():
            raise ValueError(
                f"{path}: holds files and no model; --overwrite is for models, choose another "
                "--output"
            )
    elif overwrite and os.path.lexists(path):
        raise ValueError(f"{path}: is a file or a link, and no folder; choose another --output")
    _check(path, inputs, overwrite)


def check_place(path: str | Path) -> None:
    """Raises: ValueError where nothing can be made at a path that is free, since what is above it
    is no folder or is shut.
    """
    # The nearest folder that exists: what is missing below it will be made.
    above = next(folder for folder in Path(path).absolute().parents if os.path.lexists(folder))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        what = "nothing may be written in it" if above.is_dir() else "it is no folder"
        raise ValueError(f"{path}: cannot be made in {above}: {what}; choose another --output")


def check_apart(path: str | Path, inputs: Iterable[str | None]) -> None:
    """Raises: ValueError where a path that exists is one of the files that a command reads, in such
    a folder, or holds one.

    >>> check_apart("completions.jsonl", ["prompts.jsonl"])
    """
    for name in filter(None, inputs):
        if os.path.lexists(path) and os.path.exists(name) and _touches(Path(path), Path(name)):
            raise ValueError(
                f"{path}: is read by this command too ({name}), so it stays; choose another "
                "--output"
            )


def _check(path: Path, inputs: Iterable[str | None], overwrite: bool) -> None:
    if os.path.lexists(path):
        if not overwrite:
            raise ValueError(
                f"{path}: exists; choose another --output, move it away, or --overwrite it"
            )
        check_apart(path, inputs)
    check_place(path)


def _touches(path: Path, other: Path) -> bool:
    """Whether two are one, by whatever names, or one is inside the other."""
    # By inode and not by name: hard links are one file too.
    if path.exists() and path.samefile(other):
        return True
    path = path.resolve()
    other = other.resolve()
    return path in other.parents or other in path.parents
