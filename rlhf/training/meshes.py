"""The mesh that options ask for, and rows on it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf import hosts
from rlhf.sharding import RULES, batch_sharding, make_mesh, product_of, shard_batch
from rlhf.training import programs
from rlhf.training.options import MeshOptions

# The axes that share a batch's rows.
ROWS = RULES["batch"]
CHANGE = "change --data, --fsdp, --tensor, --sequence or --expert"
# Devices of a torus from which on parameters are split over half of them by default, and over no more
# than MOST: over all of 64, and over 256, XLA sums gradients by all-reduces, of which each device keeps
# its part, and over all of 64 in three axes gathers weights so too.  Both move twice the bytes.
MANY = 32
MOST = 64


def local_devices() -> Sequence[jax.Device]:
    """The devices that a run takes: all that this process sees, with those of other hosts."""
    return jax.devices()


def devices() -> Sequence[jax.Device]:
    """The devices of the mesh: those of the run, or those that programs are made for."""
    planned = programs.devices()
    return local_devices() if planned is None else planned


def make(options: MeshOptions, *, rows: int | None = None, micro_batches: int = 1) -> Mesh:
    """The mesh of a run.

    Args:
      options: its sizes.
      rows: of an optimizer step; None: they are not known.
      micro_batches: parts that they are taken in.

    Raises: ValueError where the sizes do not multiply to the devices, or the devices cannot share a
    micro-batch's rows equally.
    """
    sizes = options.sizes()
    number = len(devices())
    if options == MeshOptions():
        sizes = {**sizes, "data": -1, "fsdp": _default_fsdp(devices())}
    if -1 in sizes.values():
        # The axis given as -1 gets what the others leave, as in a reshape.
        others = int(np.prod([size for size in sizes.values() if size > 0]))
        rest = number // others
        if rest * others != number:
            given = product_of({name: size for name, size in sizes.items() if size > 0})
            raise ValueError(f"{given} = {others} does not divide {number} devices; {CHANGE}")
        sizes = {name: rest if size == -1 else size for name, size in sizes.items()}
    try:
        mesh = make_mesh(**sizes, devices=devices())
    except ValueError as error:
        raise ValueError(f"{error}; {CHANGE}") from None
    # Rows are split over these axes, of every micro-batch: found here, before a model loads, and not
    # by XLA at the first step.
    shared = {name: sizes[name] for name in ROWS}
    ways = math.prod(shared.values())
    if rows is not None and (rows // micro_batches) % ways:
        parts = f" in {micro_batches} micro-batches" if micro_batches > 1 else ""
        raise ValueError(
            f"a step's {rows} rows{parts} cannot be shared by {product_of(shared)} = {ways} "
            "devices; change --batch_size, or the mesh"
        )
    return mesh


def _default_fsdp(devices: Sequence[jax.Device]) -> int:
    """Devices that parameters are split over: all, but on a torus those over which XLA gathers them."""
    number = len(devices)
    most = min(MOST, number // 2)
    is_part = _is_torus(devices) and number >= MANY and number % most == 0
    return most if is_part else number


def _is_torus(devices: Sequence[jax.Device]) -> bool:
    """Whether devices are TPUs that lie along two or three axes.  GPUs have places too: their hosts."""
    if any(getattr(device, "platform", None) != "tpu" for device in devices):
        return False
    places = [tuple(getattr(device, "coords", ())) for device in devices]
    along = [len(set(axis)) for axis in zip(*places, strict=True)]
    return sum(size > 1 for size in along) > 1


def place(batch: Any, mesh: Mesh) -> Any:
    """A batch's rows over `data`, `fsdp` and `expert`, its columns over `sequence` where they
    divide; on every device where the rows do not divide, such as a few prompts.
    """
    if programs.is_planned():
        return place_shapes(batch, mesh)
    if not _divides(batch, mesh):
        # Every device computes all rows: slower than a split, and right for any number of them.
        return everywhere(batch, mesh)
    return shard_batch(batch, mesh)


def everywhere(tree: Any, mesh: Mesh) -> Any:
    """Arrays on every device of a mesh."""
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    if programs.is_planned():
        return programs.shaped(tree, replicated)
    return jax.tree.map(lambda x: hosts.put(x, replicated), tree)


def _divides(batch: Any, mesh: Mesh) -> bool:
    """Whether the devices that share rows can share these equally."""
    ways = math.prod(mesh.shape.get(name, 1) for name in ROWS)
    return not any(np.shape(x)[0] % ways for x in jax.tree.leaves(batch) if np.ndim(x))


def place_shapes(batch: Any, mesh: Mesh) -> Any:
    """What `place` gives, as shapes."""
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    divides = _divides(batch, mesh)
    where = jax.tree.map(
        lambda x: batch_sharding(mesh, np.shape(x)) if divides and np.ndim(x) else replicated, batch
    )
    return programs.shaped(batch, where)


def on(mesh: Mesh, fn: Callable) -> Callable:
    """`fn`, which sees the mesh while it is called: activations are constrained to it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with jax.set_mesh(mesh):
            return fn(*args, **kwargs)

    return call
