"""Tensors of a folder of safetensors files: found and checked by their headers, read one at a time.

Read with plain file reads: a memory-mapped file would count as memory of the process until it is closed.
"""

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
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
FLOATS = ("F64", "F32", "F16", "BF16")


class Stored(NamedTuple):
    """A tensor that lies in a file."""

    file: Path
    start: int  # bytes from the file's beginning
    dtype: str  # a name of DTYPES, if we can read it
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        number = math.prod(self.shape)
        return np.fromfile(self.file, DTYPES[self.dtype], number, offset=self.start).reshape(self.shape)


def find(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder by name; headers are read and checked, values are not.

    Raises: FileNotFoundError where files are missing, ValueError where there are pickles alone, or a file is cut off or not
      a safetensors file.
    """
    return {name: tensor for file in _files(folder) for name, tensor in _header(folder / file)}


def _files(folder: Path) -> list[str]:
    if (folder / WEIGHTS).exists():
        return [WEIGHTS]
    if (folder / INDEX).exists():
        files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        if missing := [file for file in files if not (folder / file).exists()]:
            raise FileNotFoundError(f"{folder}: {INDEX} names files that are not there: {', '.join(missing)}")
        return files
    if pickles := sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern)):
        raise ValueError(
            f"{folder} holds pickled weights ({', '.join(pickles)}), which can run code when read; with torch installed, turn "
            f"them into safetensors once: AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(new_folder)"
        )
    raise FileNotFoundError(f"{folder} has no {WEIGHTS} and no {INDEX}")


def _header(file: Path) -> Iterator[tuple[str, Stored]]:
    size = file.stat().st_size
    with file.open("rb") as f:
        (length,) = struct.unpack("<Q", f.read(8).ljust(8, b"\0"))
        if not 0 < length <= size - 8:
            raise ValueError(
                f"{file} is not a safetensors file, or is cut off: {size} bytes, of which the header claims {length}"
            )
        try:
            header = json.loads(f.read(length))
        except ValueError as error:
            raise ValueError(f"{file} is not a safetensors file: its header is not JSON ({error})") from error
    header.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != size:
        raise ValueError(f"{file} is corrupt: its header describes {end} bytes, but it has {size}; download it again")
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        stored = Stored(file, 8 + length + start, entry["dtype"], tuple(entry["shape"]))
        if stored.dtype in DTYPES and stop - start != math.prod(stored.shape) * np.dtype(DTYPES[stored.dtype]).itemsize:
            raise ValueError(f"{file} is corrupt: {name} {stored.dtype} {list(stored.shape)} in {stop - start} bytes")
        yield name, stored
