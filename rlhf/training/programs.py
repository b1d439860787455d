"""A recipe's programs from shapes alone, so that they can be compiled ahead of time, for any devices.

`of` runs a recipe's own `main` as far as its first step: options, rows and tokens are real, parameters and state are
shapes with their places.  Nothing is read of the weights but the headers of their files.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import jax
import numpy as np

_DEVICES: ContextVar[Sequence[jax.Device] | None] = ContextVar("devices", default=None)


class Planned(Exception):
    """Raised where a run would take its first step; holds the programs of that step and the state
    before it.
    """

    def __init__(self, programs: Mapping[str, jax.stages.Traced], state: Any):
        super().__init__("a run of which only the programs are wanted")
        self.programs = dict(programs)
        self.state = state


def devices() -> Sequence[jax.Device] | None:
    """The devices that programs are made for; None: the run is a real one."""
    return _DEVICES.get()


def is_planned() -> bool:
    """Whether only programs are wanted, and parameters are shapes."""
    return devices() is not None


def computed(fn: Callable, *args: Any) -> Any:
    """What a function returns; only its shapes where only programs are wanted."""
    return jax.eval_shape(fn, *args) if is_planned() else fn(*args)


def of(
    main: Callable, *, devices: Sequence[jax.Device] | None = None, **options: Any
) -> dict[str, jax.stages.Lowered]:
    """The programs of a recipe's step, lowered: `.compile()` makes them, also for devices that are elsewhere.

    Args:
      main: of a recipe.
      devices: such as those of `jax.experimental.topologies.get_topology_desc(…).devices`; None: those of this process.
      options: of the recipe, as it takes them; `output` may be left out, and nothing is written.

    Returns: name -> lowered program: "update", and "sample" where the recipe samples.

    Raises: as the recipe does of its options.
    """
    found, _ = traced(main, devices=devices, **options)
    return {name: program.lower() for name, program in found.items()}


def traced(
    main: Callable, *, devices: Sequence[jax.Device] | None = None, **options: Any
) -> tuple[dict[str, jax.stages.Traced], Any]:
    """`(programs, state)`: those of `of` before they are lowered, and the shapes of the state before
    the first step, with their places.

    Args:
      main, devices, options: as of `of`.

    Raises: as the recipe does of its options.
    """
    with (
        _planning(jax.devices() if devices is None else devices),
        tempfile.TemporaryDirectory() as folder,
    ):
        try:
            main(**{"output": str(Path(folder) / "run"), **options})
        except Planned as plan:
            return plan.programs, plan.state
    raise ValueError(f"{main.__module__} took no step; it is no recipe, or its run is over")


@contextmanager
def _planning(devices: Sequence[jax.Device]) -> Iterator[None]:
    token = _DEVICES.set(tuple(devices))
    try:
        yield
    finally:
        _DEVICES.reset(token)


def shaped(tree: Any, where: Any) -> Any:
    """Arrays, or their shapes, as shapes with places.

    Args:
      tree: arrays or shapes.
      where: a sharding for each leaf, one for all, or None for none.
    """
    if where is None or isinstance(where, jax.sharding.Sharding):
        return jax.tree.map(lambda x: _shape(x, where), tree)
    return jax.tree.map(_shape, tree, where)


def _shape(x: Any, where: Any) -> jax.ShapeDtypeStruct:
    # As jit would take it: without x64 NumPy's float64 is float32 there.
    on_device = isinstance(x, jax.Array | jax.ShapeDtypeStruct)
    dtype = x.dtype if on_device else jax.dtypes.canonicalize_dtype(np.asarray(x).dtype)
    return jax.ShapeDtypeStruct(np.shape(x), dtype, sharding=where)


def local_bytes(tree: Any) -> int:
    """Bytes on one device of shapes with places."""
    total = 0
    for x in jax.tree.leaves(tree):
        where = getattr(x, "sharding", None)
        shape = x.shape if where is None else where.shard_shape(x.shape)
        # Keys of random numbers say no size of NumPy's: two words each.
        total += int(np.prod(shape)) * getattr(x.dtype, "itemsize", 8)
    return total


def temporaries(compiled: jax.stages.Compiled) -> int:
    """Bytes on one device that a program makes beside its arguments: temporaries, and results that
    take no argument's place.
    """
    memory: Any = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes + results


class Step:
    """A step of the loop, and the programs that it runs.

    Args:
      call: `(state, batch) -> (state, metrics)`.
      trace: `(state, batch) -> {name: traced program}`, of shapes.
      update_inputs: `(batch) -> tree` of what the update of the last step was given, for a study of one
        that failed; None: the batch itself.
    """

    def __init__(self, call: Callable, trace: Callable, update_inputs: Callable | None = None):
        self._call = call
        self.trace = trace
        self.update_inputs = update_inputs or (lambda batch: batch)

    def __call__(self, state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        return self._call(state, batch)
