"""Frozen matrices in four or eight bits, by qwix; with adapters on them, QLoRA."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf.fields import documented
from rlhf.lm import Params
from rlhf.models.stacks import rank

Array = jax.Array
# Embeddings and the output matrix stay as they are, as in QLoRA.
BLOCKS = r"(.*\.)?layers\.(" + "|".join(
    (
        r"(cross_|full_)?[qkvo]|(full_)?q_gate",
        r"(wide_|shared_)?(gate|up|down)",
        r"latent_(q_)?(up|down)",
        r"delta_(q|k|v|z|out|(step|gate)_(up|down))",
        r"conv_(b|c|x|out)",
        r"input_(gate|projection)",
    )
) + ")"  # fmt: skip
TYPES = ("nf4", "int8")


@documented
class QuantizedWeight(NamedTuple):
    """Stands where a matrix `[.., in, out]` stood; leading axes (layers) are those of every field,
    so that a slice of it is a matrix too.

    Attributes:
      array: qwix's QArray: values in few bits, and a scale for every block of inputs of an output.
    """

    array: Any

    def matmul(self, x: Array) -> Array:
        """`x [..., in]` times the matrix; in the backward pass the matrix is computed again, not
        saved.
        """
        # Saved for the backward pass, the wide matrices of all layers would undo what few bits
        # spare.
        return jax.checkpoint(lambda x, array: x @ _wide(array).astype(x.dtype))(x, self.array)

    def astype(self, dtype) -> Array:
        """The plain matrix."""
        return _wide(self.array).astype(dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.qvalue.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self):
        return self.array.scale.dtype


def quantize(
    params: Params, qtype: str = "nf4", *, targets: str = BLOCKS, block: int = 64
) -> Params:
    """Parameters whose matrices are held in few bits: to freeze, under `adapters.add`  (QLoRA,
    arXiv:2305.14314).

    Args:
      params: of a model whose layers call `linear`.
      qtype: "nf4", 16 values spaced as a normal distribution's quantiles; or "int8".
      targets: a regular expression; a leaf whose full dotted path matches it is quantised.  The
        default is every matrix of the blocks.
      block: inputs that share a scale.

    Returns: like `params`, with a `QuantizedWeight` for each target.  No gradient flows through
    those.

    Raises: ImportError where qwix is not installed; ValueError where a type is not known, no leaf
    matches, a
      target is no matrix, or the block does not divide its inputs.

    >>> params = {"layers": {"q": jax.random.normal(jax.random.key(0), (1, 64, 8))}}
    >>> held = quantize(params, "int8")["layers"]["q"]
    >>> held.array.qvalue.dtype, bool(jnp.abs(held.astype(jnp.float32) - params["layers"]["q"]).max() < 0.02)
    (dtype('int8'), True)
    """
    try:
        import qwix
    except ImportError as error:
        raise ImportError("quantised weights need qwix: pip install 'rlhf[qlora]'") from error

    if qtype not in TYPES:
        raise ValueError(f"qtype must be one of {TYPES}, but is {qtype!r}")

    def name(path):
        return jax.tree_util.keystr(path, simple=True, separator=".")

    leaves = {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    chosen = [key for key in leaves if re.fullmatch(targets, key)]
    if not chosen:
        raise ValueError(f"targets {targets!r} match no leaf of {', '.join(leaves)}")

    def shape(key):
        return f"{key} {list(leaves[key].shape)}"

    if bad := [shape(key) for key in chosen if rank(key.split("."), leaves[key]) < 2]:
        raise ValueError(
            f"targets match {'; '.join(bad)}, which are no matrices; give patterns that match "
            "matrices alone"
        )
    if bad := [shape(key) for key in chosen if leaves[key].shape[-2] % block]:
        raise ValueError(
            f"a block of {block} inputs does not divide those of {'; '.join(bad)}; give another "
            "block"
        )

    # A scale for every output and block of inputs.
    def one(w):
        qtype_or_name = getattr(jnp, qtype, qtype)  # JAX has int8, but no nf4
        return qwix.quantize(w, qtype_or_name, channelwise_axes=(1,), tiled_axes={0: block})

    # A layer, an expert at a time, so that what is held on the way is of one matrix.
    @jax.jit
    def held(w):
        return jax.lax.map(held, w) if w.ndim > 2 else one(w)

    def replace(path, leaf):
        return QuantizedWeight(held(leaf)) if name(path) in chosen else leaf

    return jax.tree_util.tree_map_with_path(replace, params)


def _wide(array) -> Array:
    import qwix

    if array.qvalue.ndim == 2:
        return qwix.dequantize(array)
    return jax.lax.map(_wide, array)
