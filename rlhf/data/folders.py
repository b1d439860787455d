"""Which files of a folder are a split of a data set, and which are about it."""

import json
import os
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from rlhf.data.formats import FORMATS

SPLITS = ("train", "validation", "test")  # what files of a folder are named after
MOST_FILES = 100_000  # that are looked at
# Files about the data, in formats of data.
ABOUT = (
    "dataset_infos.json",
    "dataset_info.json",
    "dataset_dict.json",
    "state.json",
    "metadata.json",
    "croissant.json",
)
# As `datasets` and the Hub name them.
SHARD = re.compile(r"(?P<split>[\w.-]+)-\d{5}-of-\d{5}(-\w+)?")


def files(path: Path, split: str) -> list[Path]:
    """The files of a split.

    Args:
      path: a file, which is `train` by itself, or a folder.
      split: files and folders belong to the one that their names have as a word; all are `train`
        where no name has one.  Where `datasets` wrote a name (`train_sft-00000-of-00002.parquet`,
        folders of a `DatasetDict`), the full name is the split's.

    Raises: ValueError, saying what is there, where the split is not.

    >>> import tempfile; folder = Path(tempfile.mkdtemp())
    >>> for name in ("train.jsonl", "test.jsonl", "dataset_info.json"): (folder / name).touch()
    >>> [file.name for file in files(folder, "train")]
    ['train.jsonl']
    """
    if not path.is_dir():
        return [_single(path, split)]
    found = _found(path)
    if (path / "dataset_dict.json").exists():
        # A `DatasetDict` names its folders after the splits: "train" must not find "train_sft" too.
        chosen = [file for file in found if file.relative_to(path).parts[0] == split]
    else:
        chosen = [file for file in found if split in _splits(file.relative_to(path))]
        # No file is named after a split: all of them are the training data.
        if (
            not chosen
            and split == "train"
            and not any(_words(file.relative_to(path)) & set(SPLITS) for file in found)
        ):
            chosen = found
    if not chosen:
        names = (
            ", ".join(str(file.relative_to(path)) for file in found[:10])
            or f"none with {', '.join(FORMATS)}"
        )
        raise ValueError(f"{path}: no file of split {split!r}; its files are {names}")
    return chosen


def _single(path: Path, split: str) -> Path:
    if path.suffix not in FORMATS:
        cure = (
            "unpack it" if path.suffix in (".gz", ".zip", ".bz2", ".xz", ".zst") else "convert it"
        )
        raise ValueError(
            f"{path}: a format that is not read; {cure} to one of {', '.join(FORMATS)}"
        )
    if split != "train":
        raise ValueError(
            f"{path}: a file has no split {split!r}, only 'train'; name the split's own file, or a "
            "folder of both"
        )
    return path


def _found(path: Path) -> list[Path]:
    """The files with rows, in order of their names, without caches and what is about the data."""
    # Bounded: a home folder given by mistake would be walked for minutes.
    every = list(islice(_walked(path), MOST_FILES + 1))
    if len(every) > MOST_FILES:
        raise ValueError(
            f"{path}: more than {MOST_FILES:,} files; name the folder of the data itself"
        )
    rows = [
        file
        for file in every
        if file.suffix in FORMATS and file.name not in ABOUT and file.is_file()
    ]
    # Where `save_to_disk` left a list, it alone counts: caches and older shards lie beside.
    saved = {file.parent: _saved(file) for file in every if file.name == "state.json"}
    saved = {folder: listed for folder, listed in saved.items() if listed}
    return sorted(
        [file for file in rows if file.parent not in saved]
        + [file for listed in saved.values() for file in listed]
    )


def _walked(path: Path) -> Iterable[Path]:
    for folder, inside, names in os.walk(path):
        # Assigned in place, which is how `os.walk` is kept from caches such as .cache and .git.
        inside[:] = [name for name in inside if not name.startswith(".")]
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _saved(state: Path) -> list[Path]:
    """The files that `datasets.save_to_disk` lists; others beside them are of an earlier data set,
    or caches.
    """
    try:
        listed = json.loads(state.read_bytes()[: 2**20])
        if not isinstance(listed, dict) or "_data_files" not in listed:
            return []  # of something else
        if listed.get("_indices_data_files"):
            raise ValueError("saved by an old version of datasets")
        return [state.parent / Path(file["filename"]).name for file in listed["_data_files"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{state}: not what datasets.save_to_disk writes ({error!s:.80}); save the data set "
            "again"
        ) from None


def _words(file: Path) -> set[str]:
    return set(re.split(r"[\W_]+", str(file)))


def _splits(file: Path) -> set[str]:
    """What a file may be called as a split."""
    shard = SHARD.fullmatch(file.stem)
    name = {shard["split"]} if shard else {file.stem} | _words(Path(file.name))
    return set(file.parts[:-1]) | _words(file.parent) | name
