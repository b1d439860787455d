"""Our parameters from a file's tensors, and back: names, transposition, fused parts, layers and
experts stacked.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf import hosts
from rlhf.fields import documented
from rlhf.lm import Params
from rlhf.models.config import Config, TransformerConfig
from rlhf.models.families import Tensor
from rlhf.models.layers import leaves as leaves_of
from rlhf.models.safetensors_files import FLOATS, Stored

Path = tuple[str, ...]
# Names of a kind that an error lists; a wrong config could make them thousands.
LISTED = 20


@documented
class Place(NamedTuple):
    """Where a tensor of the file belongs.

    Attributes:
      row: of the family's table.
      leaves: paths of the leaves that the tensor holds.
      at: index into stacked leaves: the layer's place and the expert's; () if they are not stacked.
    """

    row: Tensor
    leaves: tuple[Path, ...]
    at: tuple[int, ...]


def places(
    rows: Sequence[Tensor], shapes: Mapping[Path, tuple[int, ...]], config: Config
) -> dict[str, Place]:
    """Every tensor that a file with these rows has for parameters of these shapes, by name."""
    out = {}
    for row in rows:
        leaves = tuple(tuple(leaf.split(".")) for leaf in row.leaves.split())
        # A family's table has rows for every variant; biases or a tied matrix may be absent here.
        if all(leaf in shapes for leaf in leaves):
            for numbers, at in _numbers(
                row, shapes[leaves[0]], _stack_of(config, leaves[0]), leaves[0][-1]
            ):
                out[row.name.format(*numbers)] = Place(row, leaves, at)
    return out


def _numbers(
    row: Tensor, shape: Sequence[int], config: TransformerConfig, leaf: str
) -> Iterator[tuple[tuple, tuple]]:
    """The numbers in a row's names, of layers and experts, beside their indices into the stacked
    leaf.
    """
    stacked = row.name.count("{}")
    if not stacked:
        yield (), ()
        return
    layers = [i for i in range(config.num_layers) if leaf in leaves_of(config, config.kind(i))]
    for place, layer in enumerate(layers):
        if stacked == 1:
            yield (layer,), (place,)
        else:
            yield from (((layer, expert), (place, expert)) for expert in range(shape[1]))


def least(config: Config, rows: Sequence[Tensor]) -> int:
    """Tensors that a model has at least: one a layer, and one for each expert of a sparse one where
    they do not lie in one tensor.
    """
    one_by_one = any(row.name.count("{}") > 1 for row in rows)
    stacks = (
        (config,) if isinstance(config, TransformerConfig) else (config.encoder, config.decoder)
    )
    return sum(
        stack.experts.number if one_by_one and stack.experts and stack.kind(i).sparse else 1
        for stack in stacks
        for i in range(stack.num_layers)
    )


def _stack_of(config: Config, leaf: Path) -> TransformerConfig:
    if isinstance(config, TransformerConfig):
        return config
    return config.encoder if leaf[0] == "encoder" else config.decoder


def file_shape(place: Place, shapes: Mapping[Path, tuple[int, ...]]) -> tuple[int, ...]:
    # Without the stacked axes; fused parts lie side by side along our last axis.
    parts = [shapes[leaf][len(place.at) :] for leaf in place.leaves]
    shape = (*parts[0][:-1], sum(part[-1] for part in parts)) if parts[0] else ()
    shape = (*shape[:-2], *shape[:-3:-1]) if place.row.transpose else shape
    return np.expand_dims(np.empty(shape, bool), place.row.ones).shape if place.row.ones else shape


def problems(
    parts: Sequence[tuple[Mapping[str, Place], Mapping]],
    tensors: Mapping[str, Stored],
    ignored: Callable,
) -> str:
    """What does not fit, all of it in one line; "" if everything does.

    Args:
      parts: of a trunk, and of a head where there is one: its places and the shapes of its leaves.
      ignored: whether a tensor that has no place does not matter.
    """
    expected = {
        name: list(file_shape(place, shapes))
        for where, shapes in parts
        for name, place in where.items()
    }
    both = sorted(expected.keys() & tensors.keys())
    found = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "left over": sorted(name for name in tensors.keys() - expected.keys() if not ignored(name)),
        "of another shape": [
            f"{name} {list(tensors[name].shape)} but the config says {expected[name]}"
            for name in both
            if list(tensors[name].shape) != expected[name]
        ],
        "not of floats": [
            f"{name} {tensors[name].dtype}" for name in both if tensors[name].dtype not in FLOATS
        ],
    }
    return "; ".join(f"{what}: {listed(names)}" for what, names in found.items() if names)


def listed(names: Sequence[str]) -> str:
    """Names in a line; of many the first.

    >>> listed(["a", "b"]), listed(["a"] * 100)[-12:]
    ('a, b', ' and 80 more')
    """
    more = f", … and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def read(
    where: Mapping[str, Place],
    tensors: Mapping[str, Stored],
    leaves: Mapping[Path, jax.ShapeDtypeStruct],
    put: Callable,
) -> dict[Path, Any]:
    """Our leaves, each put on the devices before the next is read.

    The largest come first, so that the host never holds much more than the parameters themselves.

    Args:
      put: `(path, array) -> jax.Array`.
    """
    names: dict[Path, list[str]] = {}
    for name, place in where.items():
        for leaf in place.leaves:
            names.setdefault(leaf, []).append(name)

    def filled(path):
        leaf = leaves[path]

        def part(name):
            return _part(tensors[name], where[name], path, leaves)

        if where[names[path][0]].at == ():
            return np.ascontiguousarray(part(names[path][0]).astype(leaf.dtype, copy=False))
        # Filled layer by layer: a list of layers that is stacked would be in memory twice.
        buffer = np.empty(leaf.shape, leaf.dtype)
        for name in names[path]:
            buffer[where[name].at] = part(name)
        return buffer

    out = {}
    for path in sorted(names, key=lambda path: -_bytes(leaves[path])):
        out[path] = jax.block_until_ready(put(path, filled(path)))
        # JAX lets go of the host's copy at its next call, so that one is made.
        jnp.zeros(())
    return out


def _part(
    stored: Stored, place: Place, path: Path, leaves: Mapping[Path, jax.ShapeDtypeStruct]
) -> np.ndarray:
    sizes = [(leaves[leaf].shape or (1,))[-1] for leaf in place.leaves]
    return parts_of(stored.read(), place.row, sizes)[place.leaves.index(path)]


def write(
    where: Mapping[str, Place], flat: Mapping[Path, Any]
) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """A file's tensors, each as a function that makes it."""

    # Made when it is called for: only one file of several need be in the host's memory.
    def make(place):
        parts = [np.asarray(hosts.fetch(flat[leaf][place.at])) for leaf in place.leaves]
        return joined(parts, place.row)

    for name, place in where.items():
        yield name, partial(make, place)


def parts_of(x: np.ndarray, row: Tensor, sizes: list[int]) -> list[np.ndarray]:
    """A tensor's parts, each `[..., out]`."""
    x = np.squeeze(x, row.ones) if row.ones else x
    x = np.swapaxes(x, -1, -2) if row.transpose else x
    if len(sizes) == 1:
        return [x]
    if not row.groups:
        return np.split(x, np.cumsum(sizes)[:-1], axis=-1)
    # [..., groups, the parts of a group]
    number = sizes[0] if row.groups < 0 else row.groups
    groups = x.reshape(*x.shape[:-1], number, -1)
    parts = np.split(groups, np.cumsum([size // number for size in sizes])[:-1], axis=-1)
    return [part.reshape(*x.shape[:-1], -1) for part in parts]


def joined(parts: list[np.ndarray], row: Tensor) -> np.ndarray:
    if row.groups:
        number = parts[0].shape[-1] if row.groups < 0 else row.groups
        parts = [part.reshape(*part.shape[:-1], number, -1) for part in parts]
    x = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
    x = x.reshape(*x.shape[:-2], -1) if row.groups else x
    x = np.asarray(np.swapaxes(x, -1, -2) if row.transpose else x, order="C")
    return np.expand_dims(x, row.ones) if row.ones else x


def _bytes(leaf) -> int:
    return int(np.prod(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize


def flat(tree) -> dict[Path, Any]:
    return {
        tuple(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def nested(leaves: Mapping[Path, Any]) -> Params:
    tree: dict = {}
    for (*above, last), leaf in leaves.items():
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree
