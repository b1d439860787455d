"""What a program computes, counted from its jaxpr: XLA's own count takes the body of a loop once, and
leaves out kernels.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr

from rlhf.fields import documented


@documented
class Work(NamedTuple):
    """Operations and bytes of matrix products, on all devices together.

    Attributes:
      flops: floating point operations, two for a multiplication and its addition.
      bytes: of operands and results.
    """

    flops: float = 0.0
    bytes: float = 0.0

    def plus(self, other: "Work", times: float = 1) -> "Work":
        return Work(self.flops + times * other.flops, self.bytes + times * other.bytes)


@documented
class Loop(NamedTuple):
    """A loop whose number of turns is not known, such as one of decoding: a turn is a token.

    Attributes:
      work: of one turn.
      carried: bytes that it hands from turn to turn, such as the cache.
    """

    work: Work
    carried: int


@documented
class Counted(NamedTuple):
    """A program.

    Attributes:
      work: outside of loops of tokens.
      loops: of tokens, in their order.
      saved: bytes that loops over layers keep for the backward pass.
    """

    work: Work
    loops: tuple[Loop, ...]
    saved: int


def counted(jaxpr: Any) -> Counted:
    """Operations, bytes and loops of a jaxpr, closed or not.

    >>> import jax
    >>> x = jax.numpy.ones((2, 3))
    >>> def fn(x):
    ...     return jax.lax.scan(lambda y, _: (y @ x.T @ x, None), x, None, length=5)
    >>> counted(jax.make_jaxpr(fn)(x)).work.flops == 5 * (2 * 2 * 3 * 2) * 2
    True
    """
    plain = _plain(jaxpr)
    # Derivatives leave computations behind whose results nobody uses; XLA drops them.
    used, _ = dce_jaxpr(plain, [True] * len(plain.outvars))
    loops: list[Loop] = []
    work = _of(used, loops)
    return Counted(work, tuple(loops), _saved(used))


def _of(jaxpr: Any, loops: list[Loop]) -> Work:
    total = Work()
    for eqn in _plain(jaxpr).eqns:
        name = eqn.primitive.name
        if name in PRODUCTS:
            total = total.plus(Work(PRODUCTS[name](eqn), _bytes(eqn)))
        elif name == "pallas_call" or "attention" in name or "fmha" in name:
            total = total.plus(Work(_attention(eqn), _bytes(eqn)))
        elif name == "scan":
            total = total.plus(_of(eqn.params["jaxpr"], loops), eqn.params["length"])
        elif name == "while":
            # A loop within a turn counts once with it.
            body = _of(eqn.params["body_jaxpr"], [])
            known = eqn.params["body_nconsts"] + eqn.params["cond_nconsts"]
            carried = sum(_size(x) for x in eqn.invars[known:])
            loops.append(Loop(body, carried))
        elif name == "cond":
            branches = [_of(branch, loops) for branch in eqn.params["branches"]]
            total = total.plus(max(branches, key=lambda one: one.flops))
        else:
            ways = _ways(eqn)
            for inner in _inner(eqn):
                total = total.plus(_of(inner, loops), ways)
    return total


def _ways(eqn: Any) -> int:
    """Devices that each run the body of a `shard_map`; 1 for all else."""
    if eqn.primitive.name != "shard_map":
        return 1
    # Rows or heads that are split make a device's part smaller; those that are not are computed by
    # every device anew.  Axes that are left to XLA do not show in the body's shapes.
    mesh = eqn.params["mesh"].shape
    return math.prod(mesh[axis] for axis in eqn.params["newly_manual_axes"])


def _inner(eqn: Any) -> list[Any]:
    """Jaxprs of a call: of jit, remat, custom derivatives and their like."""
    found = [x for x in eqn.params.values() if hasattr(x, "eqns") or hasattr(x, "jaxpr")]
    # A custom derivative holds the function, and its rules as functions.
    return found[:1]


def _plain(jaxpr: Any) -> Any:
    return jaxpr.jaxpr if hasattr(jaxpr, "jaxpr") else jaxpr


def _size(x: Any) -> int:
    shape = getattr(x.aval, "shape", ())
    # Keys of random numbers are no numbers of NumPy's.
    width = getattr(x.aval.dtype, "itemsize", 4) if hasattr(x.aval, "dtype") else 0
    return int(math.prod(shape) * width)


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(getattr(x.aval, "dtype", int), jnp.floating)


def _bytes(eqn: Any) -> int:
    return sum(_size(x) for x in (*eqn.invars, *eqn.outvars))


def _dot_general(eqn: Any) -> float:
    ((contracted, _), _) = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _ragged_dot(eqn: Any) -> float:
    # Every row meets the matrix of its own group alone.
    return 2.0 * math.prod(eqn.invars[0].aval.shape) * eqn.invars[1].aval.shape[-1]


def _conv(eqn: Any) -> float:
    kernel = eqn.invars[1].aval.shape
    out_channels = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / out_channels


# Matrix products of each fused kernel: two of the forward pass, and in the backward pass those for
# the gradients of keys and values (4: scores again, dp, dv, dk), and of queries (3).
_KERNELS = {"dkv": 4, "dq": 3, "bwd": 5, "backward": 5}


def _attention(eqn: Any) -> float:
    """Of a fused causal kernel, by formula: half of the scores are computed."""
    name = str(eqn.params.get("name", "")) + str(eqn.params.get("name_and_src_info", ""))
    name += eqn.primitive.name
    products = next((n for key, n in _KERNELS.items() if key in name), 2)
    # Queries, keys and values come first among the numbers with heads; of a single row, which JAX
    # does not batch, without an axis of rows.
    arrays = [x.aval.shape for x in eqn.invars if _is_float(x) and x.aval.ndim in (3, 4)]
    if len(arrays) < 3:
        return 0.0
    queries, keys = arrays[:2]
    # cudnn has [B, T, N, H], Pallas' kernels [.., N, T, H].
    axis = -3 if "dot_product_attention" in eqn.primitive.name else -2
    length = keys[axis]
    return 2.0 * products * math.prod(queries) * length / 2


# Operations whose results are their operands in another form.
SAME = (
    "optimization_barrier",
    "sharding_constraint",
    "reshape",
    "convert_element_type",
    "name",
    "copy",
)
PRODUCTS: Mapping[str, Callable[[Any], float]] = {
    "dot_general": _dot_general,
    "ragged_dot": _ragged_dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _conv,
}


def _saved(jaxpr: Any) -> int:
    """Bytes of what one scan stacks and a later one reads: what the backward pass needs of layers."""
    saved: dict[int, int] = {}
    _follow(_plain(jaxpr), [None] * len(_plain(jaxpr).invars), saved)
    return sum(saved.values())


def _follow(jaxpr: Any, given: list, saved: dict[int, int]) -> list:
    """`(number, bytes)` of the results of a jaxpr that are stacked by a scan, None for others; what a
    scan reads of them is put into `saved`.
    """
    # The inputs of a scan's body are parts of arrays, and no stacks.
    stacked = dict(zip(jaxpr.invars, given, strict=True))

    def of(x):
        return None if hasattr(x, "val") else stacked.get(x)

    for eqn in jaxpr.eqns:
        found = [of(x) for x in eqn.invars]
        name = eqn.primitive.name
        if name == "scan":
            inner = _plain(eqn.params["jaxpr"])
            # By their shapes: how JAX writes their numbers differs from version to version.
            read = [
                one
                for one, x, part in zip(found, eqn.invars, inner.invars, strict=True)
                if one is not None and x.aval.shape != part.aval.shape
            ]
            saved.update(read)
            _follow(inner, [None] * len(inner.invars), saved)
            stacked |= {
                x: (id(x), _size(x))
                for x, part in zip(eqn.outvars, inner.outvars, strict=True)
                if x.aval.shape != part.aval.shape
            }
        elif name in SAME:
            stacked |= dict(zip(eqn.outvars, found, strict=False))
        elif inner_jaxprs := _inner(eqn):
            inner = _plain(inner_jaxprs[0])
            if len(inner.invars) == len(found):
                results = _follow(inner, found, saved)
                stacked |= dict(zip(eqn.outvars, results, strict=False))
    return [of(x) for x in jaxpr.outvars]
