"""Matrices that a file holds in MXFP4: four bits a number, and a power of two for every 32 of them."""

from collections.abc import Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np

from rlhf.fields import documented
from rlhf.models.safetensors_files import Stored

METHOD = "mxfp4"  # of quantization_config
BLOCKS = "_blocks"
SCALES = "_scales"
# Of a code's lower three bits; the fourth is the sign  (OCP Microscaling Formats 1.0, table 4).
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
CODES = np.concatenate([VALUES, -VALUES])
BIAS = 127  # of a scale's exponent


@documented
class Packed(NamedTuple):
    """A tensor `[..., in, out]` in two tensors of a file, read as if it stood there in bfloat16,
    which holds all of its numbers exactly.

    Attributes:
      blocks: [..., out, in / 32, 16] bytes, of which the lower half comes first.
      scales: [..., out, in / 32] bytes.
    """

    blocks: Stored
    scales: Stored

    @property
    def dtype(self) -> str:
        return "BF16"

    @property
    def shape(self) -> tuple[int, ...]:
        *leading, out, groups, size = self.blocks.shape
        return (*leading, groups * size * 2, out)

    def read(self) -> np.ndarray:
        codes = self.blocks.read()
        halves = np.stack([codes & 15, codes >> 4], axis=-1)
        numbers = CODES[halves].reshape(*codes.shape[:-1], -1)
        scale = np.ldexp(np.float32(1), self.scales.read().astype(np.int32) - BIAS)
        numbers = numbers * scale[..., None]
        numbers = numbers.reshape(*numbers.shape[:-2], -1).astype(ml_dtypes.bfloat16)
        return np.swapaxes(numbers, -1, -2)


def unpacked(tensors: Mapping[str, Stored]) -> dict[str, Stored | Packed]:
    """Tensors of a file by name, each pair of blocks and scales as the one that they are.

    Raises: ValueError where one of a pair is missing, or they do not fit.
    """
    out: dict[str, Stored | Packed] = {}
    for name, stored in tensors.items():
        stem = name.removesuffix(BLOCKS)
        if name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS in tensors:
            continue
        if stem == name:
            out[name] = stored
            continue
        scales = tensors.get(stem + SCALES)
        wanted = "U8", stored.shape[:-1]
        if scales is None or stored.dtype != "U8" or (scales.dtype, scales.shape) != wanted:
            found = "missing" if scales is None else f"{scales.dtype} {list(scales.shape)}"
            raise ValueError(
                f"{name} {stored.dtype} {list(stored.shape)} needs {stem}{SCALES} U8 "
                f"{list(stored.shape[:-1])}, but that is {found}"
            )
        out[stem] = Packed(stored, scales)
    return out
