"""Where arrays live: logical axis names, one table to mesh axes, states created sharded, steps
jitted for a mesh.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf import hosts

# The one table from an array's axes to the mesh's: models name their axes, and know of no mesh.
RULES: Mapping[str, Any] = {
    "batch": ("data", "fsdp", "expert"),
    "sequence": "sequence",
    # Rows of embedded tokens while `embed` splits their last axis, as it does the table's.
    "looked_up": ("data", "expert"),
    # Rows of a decoding loop, whose single columns cannot be split.
    "decoded": ("data", "fsdp", "expert", "sequence"),
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv": "tensor",
    "mlp": "tensor",
    "layers": None,
    "expert": "expert",
}
# Where a loop of decoding steps reads parameters: left on `fsdp`, every layer would be gathered
# again for every token.
ROLLOUT_RULES: Mapping[str, Any] = {**RULES, "embed": None}
# Elements.  Larger arrays of a state are always split when fsdp > 1; of smaller ones, such as
# norms, a copy on every device is cheaper than gathering them.
SMALL = 1024
# Bytes of a gradient that are summed and scattered at a time: of larger arrays XLA for TPU sums all on
# every device, which moves twice the bytes.
PIECE = 2**27
# Columns of a TPU's tile; pieces end where tiles do.
LANES = 128
# The mesh's axes, those that exchange the most last: their devices are neighbours.
AXES = ("data", "fsdp", "expert", "sequence", "tensor")


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    expert: int = 1,
    *,
    devices=None,
) -> Mesh:
    """A mesh with axes `data` (batch), `fsdp` (batch and parameters), `expert` (batch and experts),
    `sequence` (columns of the batch) and `tensor` (heads, MLP, vocabulary).

    Raises: ValueError where the sizes do not multiply to the number of devices.

    >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
    {'data': 1, 'fsdp': 1, 'expert': 1, 'sequence': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else devices
    given = dict(data=data, fsdp=fsdp, tensor=tensor, sequence=sequence, expert=expert)
    if (product := math.prod(given.values())) != len(devices):
        raise ValueError(f"{product_of(given)} = {product} but {len(devices)} devices")
    return Mesh(_neighbours([given[axis] for axis in AXES], devices), AXES)


def _neighbours(sizes: list[int], devices: Any) -> np.ndarray:
    """Devices as an array, those along an axis next to each other in a TPU's torus where they can be;
    others in their order, as `jax.make_mesh` has them.
    """
    try:
        return mesh_utils.create_device_mesh(sizes, devices=devices, allow_split_physical_axes=True)
    # Shapes and chips that it has no rule for, such as chips that are two devices.
    except (AssertionError, NotImplementedError, ValueError):
        return np.asarray(devices).reshape(sizes)


def product_of(sizes: Mapping[str, int]) -> str:
    """Sizes of a mesh in words; axes that few use are named where they have a size.

    >>> product_of(dict(data=2, fsdp=1, sequence=4, expert=1))
    'data 2 × fsdp 1 × sequence 4'
    """
    return " × ".join(
        f"{axis} {size}"
        for axis, size in sizes.items()
        if size > 1 or axis not in ("sequence", "expert")
    )


def spec(names, mesh, rules: Mapping[str, Any] = RULES) -> PartitionSpec:
    """Logical names to a `PartitionSpec`; mesh axes that `mesh` lacks, or has with size 1, are left
    out.

    Raises: ValueError for a name the table lacks, or two names of one array on the same mesh axis.

    >>> tuple(spec(("layers", "embed", "mlp"), make_mesh(devices=jax.devices()[:1])))
    (None, None, None)
    """
    out: list[Any] = []
    taken: dict[str, str | None] = {}
    for name in names:
        if name is not None and name not in rules:
            raise ValueError(
                f"logical axis {name!r} of {names} is not in the table, which has {sorted(rules)}"
            )
        target = rules[name] if name is not None else None
        # Axes of size 1 are left out, so that one device gives the same specs as no mesh at all.
        axes = tuple(
            a
            for a in ((target,) if isinstance(target, str) else target or ())
            if mesh.shape.get(a, 1) > 1
        )
        # An array split twice over one axis is an error in XLA, far from the name that caused it.
        for axis in axes:
            if axis in taken:
                raise ValueError(
                    f"{taken[axis]!r} and {name!r} of {names} both map to mesh axis {axis!r}"
                )
            taken[axis] = name
        out.append(axes[0] if len(axes) == 1 else axes or None)
    return PartitionSpec(*out)


def shardings(
    tree: Any,
    axes: Any,
    mesh: Mesh,
    rules: Mapping[str, Any] = RULES,
    *,
    say: Callable[[str], Any] | None = None,
) -> Any:
    """A `NamedSharding` for every leaf of a state.

    A leaf whose path ends like a path in `axes` gets those names: parameters, their moments in the
    optimizer, reference parameters.  With fsdp > 1, a leaf above `SMALL` elements that no name puts
    on `fsdp` is split there along its largest axis that divides.

    Args:
      tree: arrays or their shapes, for example a `TrainState`.
      axes: `lm.axes()`, or a dict of several.
      mesh: of devices.
      rules: logical axis name -> mesh axes.
      say: `(text)`, called where a size does not divide: the axis is kept whole.  None: that
        raises.

    Raises: ValueError where a size does not divide by its mesh axes, or a large array cannot be
    split at all.
    """

    def indivisible(what: str, cure: str) -> None:
        if say is None:
            raise ValueError(f"{what}; {cure}")
        say(f"{what}: kept whole")

    names = {_path(path): leaf for path, leaf in _with_path(axes)}

    def one(path, leaf):
        path = _path(path)
        # The longest end of the path that has names: Adam's `mu.layers.q` is found as `layers.q`.
        known = next((names[path[i:]] for i in range(len(path)) if path[i:] in names), None)
        # A leaf of another rank under the same name, such as Adafactor's means, has axes of its
        # own.
        known = (
            known
            if known is not None and len(known) == len(leaf.shape)
            else (None,) * len(leaf.shape)
        )
        parts = list(spec(known, mesh, rules))
        for i, (size, part, name) in enumerate(zip(leaf.shape, parts, known, strict=True)):
            ways = _ways(part, mesh)
            if size % ways:
                what = f"{'.'.join(path)} {list(leaf.shape)}: {name} = {size} does not divide by mesh axis {part} = {ways}"
                indivisible(what, f"pad it, or map {name!r} to None in the table")
                parts[i] = None
        # What no name puts on fsdp is split there all the same: memory is what fsdp is for.
        ways = _ways("fsdp", mesh)
        if "fsdp" not in jax.tree.leaves(parts) and ways > 1 and np.prod(leaf.shape) > SMALL:
            free = [i for i, part in enumerate(parts) if part is None and leaf.shape[i] % ways == 0]
            if free:
                parts[max(free, key=lambda i: leaf.shape[i])] = "fsdp"
            else:
                what = f"{'.'.join(path)} {list(leaf.shape)}: no free axis divides by fsdp = {ways}"
                indivisible(what, "pad one")
        return NamedSharding(mesh, PartitionSpec(*parts))

    return jax.tree_util.tree_map_with_path(one, tree)


def create(init: Callable, axes: Any, mesh: Mesh, *args, rules: Mapping[str, Any] = RULES) -> Any:
    """`init(*args)` with every leaf born in its place; nothing is ever whole on one device.

    >>> from rlhf.models import scalar_head
    >>> head = scalar_head(4)
    >>> create(head.init, head.axes(), make_mesh(devices=jax.devices()[:1]), jax.random.key(0))["weight"].shape
    (4,)
    """
    # Shapes first, places next, arrays last: a model larger than one device can be born only so.
    where = shardings(jax.eval_shape(init, *args), axes, mesh, rules)
    return jax.jit(init, out_shardings=where)(*args)


def batch_sharding(
    mesh: Mesh, shape: tuple[int, ...] = (), rules: Mapping[str, Any] = RULES
) -> NamedSharding:
    """Rows over `data`, `fsdp` and `expert`; columns over `sequence`, where the shape `[B, T, ...]`
    has as many as divide.
    """
    rows, columns = spec(("batch", "sequence"), mesh, rules)
    if columns is None or len(shape) < 2 or shape[1] % _ways(columns, mesh):
        return NamedSharding(mesh, PartitionSpec(rows))
    return NamedSharding(mesh, PartitionSpec(rows, columns))


def shard_batch(batch: Any, mesh: Mesh, rules: Mapping[str, Any] = RULES) -> Any:
    """Puts a batch's rows over `data`, `fsdp` and `expert`, and its columns over `sequence` where
    they divide; scalars and keys are copied to every device.

    Raises: ValueError where the rows do not divide.
    """
    ways = _ways(batch_sharding(mesh, rules=rules).spec[0], mesh)
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(path, x):
        shape = jax.typeof(x).shape
        if shape and shape[0] % ways:
            raise ValueError(
                f"{'.'.join(_path(path))} {list(shape)}: {shape[0]} rows do not divide by {ways} "
                "devices"
            )
        return hosts.put(x, batch_sharding(mesh, shape, rules) if shape else replicated)

    return jax.tree_util.tree_map_with_path(place, batch)


class MeshStep:
    """What `jit_step` returns: a jitted step that sees the mesh while it is called."""

    def __init__(self, jitted: Any, mesh: Mesh):
        self._jitted = jitted
        self._mesh = mesh

    def __call__(self, state: Any, *inputs: Any) -> tuple[Any, dict]:
        with jax.set_mesh(self._mesh):
            return self._jitted(state, *inputs)

    def trace(self, state: Any, *inputs: Any) -> jax.stages.Traced:
        """Its program, to be looked at or compiled ahead of time, from arrays or their shapes with
        places.
        """
        # Tracing needs the mesh's axes alone: its devices may be elsewhere.
        with jax.sharding.use_abstract_mesh(self._mesh.abstract_mesh):
            return self._jitted.trace(state, *inputs)


def jit_step(step: Callable, mesh: Mesh, state: Any, *, donate: bool = True) -> MeshStep:
    """Jits `step(state, *inputs) -> (state, metrics)` for a mesh; the state stays where it is and
    its memory is reused.

    Args:
      step: what `rlhf.train_step` returns, a recipe's iteration, or any function of that form.
      state: a state as `create` made it; only its shardings are read.
      donate: the state passed in is consumed.
    """
    # Pinned: left to XLA, the new state may be placed otherwise, and the second step would compile
    # again.
    where = jax.tree.map(lambda x: x.sharding, state)
    jitted = jax.jit(step, out_shardings=(where, None), donate_argnums=0 if donate else ())
    return MeshStep(jitted, mesh)


def fitting(
    names: tuple[str | None, ...], shape: tuple[int, ...], rules: Mapping[str, Any] = RULES
) -> PartitionSpec:
    """`spec` on the mesh that is set, without axes by which a size does not divide: the last of
    several first, and at worst all.

    >>> tuple(fitting(("batch", None), (3, 2)))
    (None, None)
    """
    mesh = jax.sharding.get_abstract_mesh()

    def one(size, part):
        axes = (part,) if isinstance(part, str) else part or ()
        fit = [axes[:n] for n in range(len(axes) + 1) if size % _ways(axes[:n], mesh) == 0][-1]
        return fit[0] if len(fit) == 1 else fit or None

    if mesh.empty:
        return PartitionSpec(*[None] * len(shape))
    return PartitionSpec(*map(one, shape, spec(names, mesh, rules)))


def constrain(x: jax.Array, *names: str | None, rules: Mapping[str, Any] = RULES) -> jax.Array:
    """Keeps an activation where its names say, if a mesh is set and the sizes divide; elsewhere `x`
    as it is.
    """
    # Without constraints XLA may replicate activations of a sharded batch on every device.
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, fitting(names, x.shape, rules))


def constrain_rows(tree: Any) -> Any:
    """Keeps the rows of a decoding loop's activations `[B, ...]` over all axes but `tensor`, if a
    mesh is set and as far as their number divides; XLA places the other axes.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return tree

    def one(x):
        rows = fitting(("decoded",), x.shape[:1])[0] if x.ndim else None
        if not x.ndim or (rows is None and ways("decoded") > 1):
            return x
        others = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
        return jax.lax.with_sharding_constraint(x, PartitionSpec(rows, *others))

    return jax.tree.map(one, tree)


def constrain_params(params: Any, axes: Any, rules: Mapping[str, Any] = ROLLOUT_RULES) -> Any:
    """Parameters laid out anew by a table, if a mesh is set: once, where this stands in the program.

    Args:
      params: of a model, adapters in place of some of its matrices or not.
      axes: `lm.axes()`.  Leaves without names in it stay where they are.
      rules: logical axis name -> mesh axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return params

    def one(leaf, names):
        return leaf if names is None else constrain(leaf, *names, rules=rules)

    leaves, tree = jax.tree.flatten(params)
    placed = map(one, leaves, _names(params, axes))
    # Behind a barrier: XLA would gather a matrix anew for each of its uses.
    return jax.lax.optimization_barrier(jax.tree.unflatten(tree, placed))


def by_rows(fn: Callable, params: Any, axes: Any, *arrays: Any) -> Any:
    """`fn(params, *arrays)`, each device for its own rows, with the matrices of the vocabulary gathered
    over the axes that share rows: once, and their gradients summed and scattered once, however often
    `fn` reads them.

    XLA by itself gathers a matrix in every turn of a loop that reads it, and sums its gradient over
    devices there too.  Without a mesh, and where the rows do not divide: `fn(params, *arrays)`.

    Args:
      fn: row by row: `(params, *arrays [B, ...]) -> pytree of [B, ...]`.
      params: of a model; gradients flow through them.
      axes: `lm.axes()`; the matrices are the leaves with an axis `vocab`.
      arrays: `[B, ...]`, or None.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sharing = {axis for axis in RULES["batch"] if mesh.shape.get(axis, 1) > 1}
    divides = jax.tree.leaves(arrays)[0].shape[0] % ways("batch") == 0
    # Where `tensor` splits the vocabulary, XLA would gather it over `tensor` too.
    if not sharing or not divides or ways("vocab") > 1:
        return fn(params, *arrays)
    leaves, tree = jax.tree.flatten(params)
    places = {
        i: fitting(names, leaf.shape)
        for i, (leaf, names) in enumerate(zip(leaves, _names(params, axes), strict=True))
        if names is not None and "vocab" in names
    }

    def local(parts, *arrays):
        gathered = {i: _gathered(part, places[i]) for i, part in parts.items()}
        read = [gathered.get(i, leaf) for i, leaf in enumerate(leaves)]
        return fn(jax.tree.unflatten(tree, read), *arrays)

    rows = spec(("batch",), mesh)
    mapped = jax.shard_map(
        local,
        in_specs=(places, *[rows] * len(arrays)),
        out_specs=rows,
        axis_names=sharing,
        # Branches of a cond may vary over different axes, which the check does not allow.
        check_vma=False,
    )
    return mapped({i: leaves[i] for i in places}, *arrays)


def _gathered(part: jax.Array, place: PartitionSpec) -> jax.Array:
    """All of a matrix, of the part that a device of a `shard_map` has."""
    for axis, over in enumerate(place):
        part = part if over is None else _gathered_along(part, axis, over)
    return part


def _gathered_along(part: jax.Array, axis: int, over: str | tuple[str, ...]) -> jax.Array:
    """Parts of a matrix one after another, in pieces whose gradients are scattered one by one."""

    def gather(piece):
        # Not one after another at once: XLA for TPU scatters sums along a leading axis alone.
        parts = jnp.moveaxis(jax.lax.all_gather(piece, over), 0, axis)
        return parts.reshape(*piece.shape[:axis], -1, *piece.shape[axis + 1 :])

    other = 1 if axis == 0 else 0
    size = part.shape[other]
    bytes_of_line = part.nbytes // size * jax.lax.axis_size(over)
    lines = max(PIECE // bytes_of_line // LANES, 1) * LANES
    pieces = jnp.split(part, list(range(lines, size, lines)), axis=other)
    return jnp.concatenate([gather(piece) for piece in pieces], axis=other)


def _names(params: Any, axes: Any) -> list[tuple[str | None, ...] | None]:
    """Logical names of each leaf of `params`, in their order, or None: those of `lm.axes()`, also for
    layers by themselves, and for matrices with an adapter.
    """
    names = {_without_numbers(path): leaf for path, leaf in _with_path(axes)}

    def one(path, leaf):
        # A layer by itself has a number where the stack of all has an axis.
        path = _without_numbers(path)
        # An adapter's matrix stands under `base`, where the matrix itself stood.
        known = names.get(path[:-1] if path[-1:] == ("base",) else path) or ()
        known = known[len(known) - leaf.ndim :]
        return known if len(known) == leaf.ndim else None

    return [one(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]


def ways(name: str, rules: Mapping[str, Any] = RULES) -> int:
    """How many parts the mesh that is set cuts a logical axis into; 1 without a mesh.

    >>> ways("batch")
    1
    """
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _ways(spec((name,), mesh, rules)[0], mesh)


def platform() -> str:
    """Where a program that is traced now will run, "cpu", "gpu" or "tpu": the devices of the mesh
    that is set, which may be elsewhere; without one JAX's default.

    >>> platform()
    'cpu'
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    name = jax.default_backend() if device is None else device.platform
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


def _ways(part, mesh) -> int:
    return int(
        np.prod(
            [mesh.shape.get(a, 1) for a in ((part,) if isinstance(part, str) else part or ())],
            dtype=int,
        )
    )


def _is_names(x) -> bool:
    return x is None or (isinstance(x, tuple) and all(n is None or isinstance(n, str) for n in x))


def _with_path(axes):
    return jax.tree_util.tree_leaves_with_path(axes, is_leaf=_is_names)


def _without_numbers(path) -> tuple[str, ...]:
    return tuple(key for key in _path(path) if not key.isdecimal())


def _path(path) -> tuple[str, ...]:
    # Keys of dicts, fields of NamedTuples and numbers of tuples, each by its name alone.
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
