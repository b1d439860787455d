"""Tensors of a folder of safetensors files: found and checked by their headers, read one at a time.

Read with plain file reads: a memory-mapped file would count as memory of the process until it is
closed.
"""

import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import ml_dtypes
import numpy as np

from rlhf.fields import documented
from rlhf.models.json_files import parse_object, read_object

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
HEADER = 100_000_000  # bytes of a header; the format allows no more
AXES = 8  # of a tensor
FLOATS = ("F64", "F32", "F16", "BF16")


@documented
class Stored(NamedTuple):
    """A tensor that lies in a file.

    Attributes:
      file: that holds the tensor.
      start: bytes from the start of the file.
      dtype: a name of DTYPES, if we can read it.
      shape: of the tensor.
    """

    file: Path
    start: int
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        number = math.prod(self.shape)
        return np.fromfile(self.file, DTYPES[self.dtype], number, offset=self.start).reshape(
            self.shape
        )


def has_weights(folder: Path) -> bool:
    """Whether a folder holds tensors, or an index that names files of them."""
    return (folder / WEIGHTS).exists() or (folder / INDEX).exists()


def find(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder by name; headers are read and checked, values are not.

    Raises: FileNotFoundError where files are missing; ValueError where there are pickles alone, the
      index names files elsewhere, or a file is cut off, not a safetensors file, or has a header
      that cannot be.
    """
    return {name: tensor for file in _files(folder) for name, tensor in header(folder / file)}


def _files(folder: Path) -> list[str]:
    if (folder / WEIGHTS).exists():
        return [WEIGHTS]
    if (folder / INDEX).exists():
        files = _indexed(folder / INDEX)
        if missing := [file for file in files if not (folder / file).exists()]:
            raise FileNotFoundError(
                f"{folder}: {INDEX} names files that are not there: {', '.join(missing)}"
            )
        return files
    # Pickles run code when they are read, and need torch: they are named, not read.
    if pickles := sorted(
        file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern)
    ):
        raise ValueError(
            f"{folder} holds pickled weights ({', '.join(pickles)}), which can run code when read; "
            "with torch installed, turn "
            "them into safetensors once: "
            f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(new_folder)"
        )
    raise FileNotFoundError(f"{folder} has no {WEIGHTS} and no {INDEX}")


def _indexed(index: Path) -> list[str]:
    """The files that an index names; all lie beside it."""
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(
            f"{index}: weight_map must be an object of tensors' names and files' names, but is "
            f"{places!r:.80}"
        )
    # An index may come from anywhere: it must not lead to files outside of the folder.
    files = sorted(set(places.values()))
    if elsewhere := [
        file for file in files if re.search(r"[/\\\0]", file) or file in ("", ".", "..")
    ]:
        raise ValueError(
            f"{index}: weight_map names {elsewhere[0]!r:.80}, which is not a file of this folder"
        )
    return files


def header(file: Path) -> Iterator[tuple[str, Stored]]:
    """The tensors of a file, by its header.

    Raises: ValueError where the file is cut off, not a safetensors file, or has a header that
    cannot be.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            # The format: 8 bytes with the header's length, the header in JSON, then the tensors.
            start = f.read(64)
            f.seek(8)
            # Padded, since a file of fewer than 8 bytes must get an error that names it.
            (length,) = struct.unpack("<Q", start[:8].ljust(8, b"\0"))
            text = f.read(length) if 0 < length <= min(size - 8, HEADER) else b""
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from error
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{file} is a pointer of Git LFS, not the weights; run git lfs pull in its folder"
        )
    # A ZIP archive, or pickle protocols 2, 4 and 5: both forms of torch.save.
    if start.startswith((b"PK\3\4", b"\x80\2", b"\x80\4", b"\x80\5")):
        raise ValueError(
            f"{file} is a pickle that torch wrote, not a safetensors file; write it again with "
            "save_pretrained"
        )
    if not text:
        raise ValueError(
            f"{file} is not a safetensors file, or is cut off: {size} bytes, of which the header "
            f"claims {length}"
        )
    entries = parse_object(text, f"{file} is not a safetensors file: its header")
    entries.pop("__metadata__", None)
    tensors = {name: _stored(file, 8 + length, name, entry) for name, entry in entries.items()}
    # Tensors must fill the file without gaps or overlaps: a header that was changed cannot.
    end = 8 + length
    for name, (tensor, stop) in sorted(
        tensors.items(), key=lambda entry: (entry[1][0].start, entry[1][1])
    ):
        if tensor.start != end:
            raise ValueError(
                f"{file} is corrupt: {name} begins at byte {tensor.start}, but the tensor before "
                f"it ends at {end}"
            )
        end = stop
    if end != size:
        raise ValueError(
            f"{file} is corrupt: its header describes {end} bytes, but it has {size}; download it "
            "again"
        )
    yield from ((name, tensor) for name, (tensor, _) in tensors.items())


def _stored(file: Path, first: int, name: str, entry: Any) -> tuple[Stored, int]:
    """A tensor as the header has it, and where it ends; `first` is the byte that offsets count
    from.
    """
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(field) for field in ("dtype", "shape", "data_offsets"))
    if (
        not isinstance(dtype, str)
        or not _are_sizes(shape)
        or not _are_sizes(offsets)
        or len(offsets) != 2
    ):
        wanted = "needs a dtype, a shape and two offsets"
        raise ValueError(f"{file} is corrupt: {name!r:.80} {wanted}, but is {entry!r:.120}")
    start, stop = offsets
    if start > stop or (
        dtype in DTYPES and stop - start != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    ):
        raise ValueError(f"{file} is corrupt: {name} {dtype} {shape} in {stop - start} bytes")
    return Stored(file, first + start, dtype, tuple(shape)), first + stop


def _are_sizes(numbers: Any) -> TypeGuard[list[int]]:
    """Whether something is a short list of sizes."""
    # `type` rather than `isinstance` below: True is an int.
    short = isinstance(numbers, list) and len(numbers) <= AXES
    return short and all(type(number) is int and 0 <= number < 2**60 for number in numbers)
