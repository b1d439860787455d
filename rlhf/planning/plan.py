"""A recipe's step on devices that are elsewhere: what it needs of their memory, and how long it takes
at best.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf.fields import documented
from rlhf.planning import flops, hlo, roofline
from rlhf.planning.topologies import Topology
from rlhf.training import programs

MIB = 2**20
# Bytes that an all-reduce brings from which on it is one of a matrix: norms of all layers are less.
MATRIX = 8 * MIB
# Columns of rows from which on an array of columns by columns matters.
WIDE = 256
# The pass moves sums of gradients over `data` out of the loop over layers.  To see that they start
# from 0 it writes those zeros out on this machine: all matrices of a device in float32, 17 GB of 70B
# on fsdp 16.  Without it as many bytes are summed, layer by layer.
COMPILER_OPTIONS = {"xla_disable_hlo_passes": "while-loop-all-reduce-code-motion"}


@documented
class Moved(NamedTuple):
    """Collectives of one kind along the same axes of the mesh.

    Attributes:
      kind: such as `all-gather`.
      axes: of the mesh.
      per_token: whether they stand in a loop of tokens.
      number: how often, for a token in a loop of tokens.
      bytes: that a device receives in all, for a token in a loop of tokens.
    """

    kind: str
    axes: tuple[str, ...]
    per_token: bool
    number: int
    bytes: int


@documented
class Row(NamedTuple):
    """A program of a plan; bytes and seconds are of one device.

    Attributes:
      program: `update` or `sample`.
      weights: bytes of parameters, those of a frozen base and a reference included.
      moments: bytes of the optimizer's state.
      batch: bytes of the program's other arguments.
      activations: bytes that layers keep for the backward pass, a part of the temporaries.
      cache: bytes that a loop of tokens hands on, a part of the temporaries.
      temporaries: bytes of all that the program makes and drops, and of results that take no
        argument's place.
      needed: bytes of all together; of what XLA found too large, its own figure.
      memory: bytes that a device has.
      flops: operations of one device, without those of tokens.
      times: of a step, or of reading the prompts.
      token: of a token where the program samples; None: it does not.
      token_least: seconds in which memory brings what a token must read: the weights and the cache.
      mfu: share of the peak that the times allow; None: the program trains nothing.
      moved: what it moves between devices.
      weights_by_all_reduce: bytes of weights that are gathered by all-reduces of padded matrices.
      squares: shapes `[.., T, T]`.
      seconds: that compilation took here.
    """

    program: str
    weights: int
    moments: int
    batch: int
    activations: int
    cache: int
    temporaries: int
    needed: int
    memory: int
    flops: float
    times: roofline.Times
    token: roofline.Times | None
    token_least: float
    mfu: float | None
    moved: tuple[Moved, ...]
    weights_by_all_reduce: int
    squares: tuple[str, ...]
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether the device has as much as is needed."""
        return self.needed <= self.memory

    @property
    def collective_bytes(self) -> int:
        """Bytes that a device receives, without those of tokens."""
        return sum(one.bytes for one in self.moved if not one.per_token)

    @property
    def token_bytes(self) -> int:
        """Bytes that a device receives for a token."""
        return sum(one.bytes for one in self.moved if one.per_token)


@documented
class Plan(NamedTuple):
    """Programs of a recipe on a topology.

    Attributes:
      topology: its name.
      mesh: axis -> devices.
      parameters: that are trained.
      rows_of_update: sequences of an update.
      rows: a program each.
    """

    topology: str
    mesh: Mapping[str, int]
    parameters: int
    rows_of_update: int
    rows: tuple[Row, ...]

    @property
    def fits(self) -> bool:
        """Whether every program does."""
        return all(row.fits for row in self.rows)


def make(main: Callable, topology: Topology, **options: Any) -> Plan:
    """A recipe's real programs, from its own options, compiled for a topology.

    Args:
      main: of a recipe.
      topology: of `rlhf.planning.topologies.find`.
      options: as the recipe takes them; `output` may be left out.

    Raises: as the recipe does of its options.
    """
    found, state = programs.traced(main, devices=topology.devices, **options)
    mesh = dict(jax.tree.leaves(state)[0].sharding.mesh.shape)
    rows = tuple(row(name, one, state, topology, mesh) for name, one in found.items())
    sequences = max((number for number, _ in _rows(found["update"])), default=0)
    return Plan(topology.name, mesh, _numbers(state.params), sequences, rows)


def row(
    name: str, traced: jax.stages.Traced, state: Any, topology: Topology, mesh: Mapping[str, int]
) -> Row:
    """One program of a plan."""
    number = len(topology.devices)
    counted = flops.counted(traced.jaxpr)
    weights = programs.local_bytes(state.params) + programs.local_bytes(state.context)
    moments = programs.local_bytes(state.opt_state)
    batch = programs.local_bytes(traced.args_info[0][1:])
    cache = max((loop.carried for loop in counted.loops), default=0) // number
    known: dict[str, Any] = dict(
        program=name, weights=weights, moments=moments, batch=batch, cache=cache,
        activations=counted.saved // number, flops=counted.work.flops / number,
        memory=int(topology.chip.memory),
    )  # fmt: skip
    started = time.perf_counter()
    lowered = traced.lower()
    try:
        compiled = lowered.compile(compiler_options=COMPILER_OPTIONS)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _too_large(known, str(error), topology, time.perf_counter() - started)
    seconds = time.perf_counter() - started
    text = compiled.as_text()
    collectives = hlo.collectives(text)
    outside = [one for one in collectives if not one.per_token]
    outside_bytes, of_token = hlo.traffic(text)
    times = roofline.times(topology.chip, known["flops"], outside_bytes, outside, topology)
    token = None
    token_least = 0.0
    if counted.loops:
        inside = _widest([one for one in collectives if one.per_token])
        operations = max(loop.work.flops for loop in counted.loops) / number
        token = roofline.times(topology.chip, operations, of_token, inside, topology)
        read = _read_by_a_token(state, mesh) + cache
        token_least = read / topology.chip.memory_rate
    # Of the update the state is an argument; sampling leaves the moments where they are.
    temporaries = programs.temporaries(compiled)
    needed = weights + moments + batch + temporaries
    tokens = _tokens(traced)
    mfu = roofline.mfu(_numbers(state.params), tokens, number, topology.chip, times.step)
    # Prompts that samples share are read once: fewer operations than the tokens stand for.
    mfu = min(mfu, known["flops"] / topology.chip.flops / times.step)
    return Row(
        **known,
        temporaries=temporaries,
        needed=needed,
        times=times,
        token=token,
        token_least=token_least,
        mfu=None if counted.loops or not tokens else mfu,
        moved=_summed(collectives, mesh),
        weights_by_all_reduce=_weights_by_all_reduce(collectives, mesh),
        squares=_squares(text, traced, state, mesh),
        seconds=seconds,
    )


def _too_large(known: dict, message: str, topology: Topology, seconds: float) -> Row:
    """A program that XLA refused to compile, since it does not fit."""
    used = re.search(r"[Uu]sed ([\d.]+)([KMGT]?) of", message)
    needed = int(float(used[1]) * 1024 ** " KMGT".index(used[2] or " ")) if used else 0
    needed = max(needed, known["memory"] + 1)
    infinite = roofline.Times(float("inf"), float("inf"), float("inf"))
    return Row(
        **known,
        temporaries=max(0, needed - known["weights"] - known["moments"] - known["batch"]),
        needed=needed,
        times=infinite,
        token=None,
        token_least=0.0,
        mfu=None,
        moved=(),
        weights_by_all_reduce=0,
        squares=(),
        seconds=seconds,
    )


def _widest(collectives: Sequence[hlo.Collective]) -> list[hlo.Collective]:
    """Those of the last loop of tokens, whose cache is the widest."""
    last = max((one.loop for one in collectives if one.loop is not None), default=None)
    return [one for one in collectives if one.loop == last]


def _summed(collectives: Sequence[hlo.Collective], mesh: Mapping[str, int]) -> tuple[Moved, ...]:
    found: dict[tuple, Moved] = {}
    tokens = _widest([one for one in collectives if one.per_token])
    for one in [x for x in collectives if not x.per_token] + tokens:
        if not one.total:
            continue
        key = one.kind, hlo.axes_of(one.devices, mesh), one.per_token
        before = found.get(key, Moved(*key, 0, 0))
        found[key] = Moved(*key, before.number + one.times, before.bytes + one.total)
    return tuple(sorted(found.values(), key=lambda moved: -moved.bytes))


def _weights_by_all_reduce(collectives: Sequence[hlo.Collective], mesh: Mapping[str, int]) -> int:
    """Bytes of weights that are gathered by all-reduces: each device has zeros where its part is not."""
    return sum(
        one.total
        for one in collectives
        if one.kind == "all-reduce"
        and "fsdp" in hlo.axes_of(one.devices, mesh)
        and one.bytes >= MATRIX
        # The backward pass reduces gradients, but for what it computes of the forward pass again.
        and ("transpose(" not in one.op_name or "rematted" in one.op_name)
    )


def _read_by_a_token(state: Any, mesh: Mapping[str, int]) -> int:
    """Bytes of the weights that a token is multiplied with, in bfloat16, on one device."""
    leaves = jax.tree_util.tree_leaves_with_path((state.params, state.context.get("frozen", {})))
    paths = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    has_output = any("unembedding" in path for path in paths)
    # Of a table that is no output matrix too, a token reads one row.
    read = [
        leaf for path, leaf in paths.items() if not (has_output and path.endswith("['embedding']"))
    ]
    return 2 * _numbers(read) // mesh.get("tensor", 1)


def _numbers(tree: Any) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def _tokens(traced: jax.stages.Traced) -> int:
    """Tokens, padding included, of the rows that a program is given."""
    widths = _rows(traced)
    return max((rows * width for rows, width in widths), default=0)


def _rows(traced: jax.stages.Traced) -> list[tuple[int, int]]:
    """Shapes `[B, T]` of arguments that are called tokens."""
    leaves = jax.tree_util.tree_leaves_with_path(traced.args_info[0][1:])
    found = [x.shape for path, x in leaves if jax.tree_util.keystr(path).endswith(".tokens")]
    return [(int(np.prod(shape[:-1])), shape[-1]) for shape in found]


def _squares(
    text: str, traced: jax.stages.Traced, state: Any, mesh: Mapping[str, int]
) -> tuple[str, ...]:
    """Shapes `[.., T, T]` for the widths of rows, or of a device's part of T queries; matrices of the
    model may be as square.
    """
    of_model = {x.shape[-2:] for x in jax.tree.leaves(state.params) if len(x.shape) > 1}
    parts = {1, mesh.get("sequence", 1)}
    found = {
        (width // part, width) for _, width in _rows(traced) for part in parts if width >= WIDE
    }
    # Tokens of all rows, where these are as many as their columns.
    tokens = {f"s32[{rows},{width}]" for rows, width in _rows(traced)}
    shapes = (shape for sizes in sorted(found - of_model) for shape in hlo.squares(text, *sizes))
    return tuple(shape for shape in shapes if shape not in tokens)
