"""What a compiled program does on one device, read from XLA's text: what it moves between devices,
how often its loops turn, what it reads and writes.

Loops without a known number of turns, such as those of decoding that end early, count as one turn,
"a token".
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rlhf.fields import documented

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
# Operations that name arrays and move nothing.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
    "after-all", "partition-id", "replica-id", "opt-barrier", "copy-done", "iota",
}  # fmt: skip
# Operations that read a part of their first operand.
SLICES = ("dynamic-slice", "slice", "gather")
# Operations that write a part of their first operand, and which operand that part is.
PART = {"dynamic-update-slice": 1, "scatter": 2}
# Operations inside of fusions whose result is the operand in another form.
SAME = ("bitcast", "reshape", "convert", "copy", "transpose")


@documented
class Instruction(NamedTuple):
    """A line of a computation.

    Attributes:
      name: of its result.
      shape: of its result, as it is written, layouts included; of a tuple all of its parts.
      op: what is done.
      operands: names.
      attributes: the rest of the line.
    """

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    attributes: str


@documented
class Collective(NamedTuple):
    """A collective of a program.

    Attributes:
      kind: one of `COLLECTIVES`.
      shape: of its result on one device.
      bytes: that a device receives each time.
      times: how often it is done; in a loop of tokens, for a token.
      devices: numbers of the devices of the first group.
      depth: loops that it stands in, one within another.
      loop: of tokens, in which it stands, by its place among them; None: in none.
      op_name: what JAX calls the operation that it serves.
    """

    kind: str
    shape: str
    bytes: int
    times: int
    devices: tuple[int, ...]
    depth: int
    loop: int | None
    op_name: str

    @property
    def per_token(self) -> bool:
        """Whether it stands in a loop of tokens."""
        return self.loop is not None

    @property
    def total(self) -> int:
        """Bytes that a device receives in all."""
        return self.bytes * self.times


def computations(text: str) -> dict[str, list[str]]:
    """Name -> instructions, one a line; the entry is there a second time as `""`."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        # Not ended at a `}` in the first column: configs of Mosaic kernels have lines that begin so.
        if begins := re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{", line):
            lines = found[begins[2]] = []
            if begins[1]:
                found[""] = lines
        else:
            lines.append(line)
    return found


def instruction(line: str) -> Instruction | None:
    """A line taken apart; None for one that is none.

    >>> instruction("  ROOT %y.1 = f32[4]{0} add(%x, f32[4]{0} %z), metadata={}").operands
    ('x', 'z')
    """
    # Layouts hold parentheses too, `{1,0:T(8,128)}`: the operation is the first word before one
    # that stands after a blank.
    named = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\(", line)
    if named is None:
        return None
    depth = 1
    end = named.end()
    while end < len(line) and depth:
        depth += {"(": 1, ")": -1}.get(line[end], 0)
        end += 1
    inside = line[named.end() : end - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    # Constants keep their value where others have operands.
    rest = inside if named[3] in ("constant", "parameter") else line[end:]
    return Instruction(named[1], named[2], named[3], operands, rest)


def size(shape: str, *, of_memory: bool = False) -> int:
    """Bytes of an array or a tuple, as text.

    Args:
      shape: such as `(f32[4,2]{1,0}, bf16[8])`.
      of_memory: leave out arrays in the chip's own vector memory (`S(1)` in their layout).

    >>> size("(f32[4,2]{1,0}, bf16[8])"), size("f32[2]{0:T(128)S(1)}", of_memory=True)
    (48, 0)
    """
    total = 0
    for dtype, sizes, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^{}]*\})?", shape):
        if dtype in BYTES and not (of_memory and "S(1)" in layout):
            total += BYTES[dtype] * product(sizes)
    return total


def collectives(text: str) -> list[Collective]:
    """Every collective of a program, with how often it is done."""
    found = []
    # On TPU one that goes on beside several products stands in the fusions of all of them.
    channels = set()
    for step in _walk(text):
        kind = step.instruction.op.removesuffix("-start")
        if kind in COLLECTIVES:
            found.append(_collective(kind, step))
        elif step.instruction.op == "fusion":
            for one, channel in _fused(step):
                if channel is None or (step.computation, channel) not in channels:
                    channels.add((step.computation, channel))
                    found.append(one)
    return found


def turns(text: str) -> dict[str, int | None]:
    """Body of a loop -> how often it turns; None where that is not known."""
    program = _Program(text)
    return {
        _called(line.attributes, "body")[0]: program.trips(name, line)
        for name in program.lines
        for line in program.lines[name].values()
        if line.op == "while"
    }


def traffic(text: str) -> tuple[int, int]:
    """Bytes that a device reads from and writes to its memory: `(outside loops of tokens, a token of
    the widest such loop)`.

    An estimate: every operation reads its operands and writes its result once; of a slice the part
    that is read; arrays in vector memory are free.
    """
    outside = 0
    per_token: dict[int, int] = {}
    for step in _walk(text):
        if step.instruction.op in FREE or step.instruction.op.endswith("-done"):
            continue
        moved = step.times * _moved(step)
        if step.token is None:
            outside += moved
        else:
            per_token[step.token] = per_token.get(step.token, 0) + moved
    return outside, max(per_token.values(), default=0)


def squares(text: str, queries: int, keys: int) -> list[str]:
    """Shapes `[.., queries, keys]` of arrays of a program; those inside kernels are not arrays.

    >>> squares("%x = f32[2,8,8]{2,1,0} add(%y, %z)\\n%w = f32[8,2]{1,0} copy(%v)", 8, 8)
    ['f32[2,8,8]']
    """
    return sorted(set(re.findall(rf"\w+\[(?:\d+,)*{queries},{keys}\]", text)))


def axes_of(devices: Sequence[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of a mesh along which a group's devices lie.

    >>> axes_of((0, 1, 2, 3), {"data": 2, "fsdp": 4})
    ('fsdp',)
    """
    places = np.array(np.unravel_index(np.asarray(devices), tuple(mesh.values())))
    return tuple(
        name for name, where in zip(mesh, places, strict=True) if (where != where[0]).any()
    )


class _Step(NamedTuple):
    """An instruction that is executed, and how often."""

    program: "_Program"
    computation: str
    instruction: Instruction
    times: int
    depth: int  # loops that it stands in
    token: int | None  # the loop of tokens that it stands in, by its place among them


class _Program:
    """Computations of a text, their lines taken apart when they are asked for."""

    def __init__(self, text: str):
        self.lines: dict[str, dict[str, Instruction]] = {}
        self.roots: dict[str, Instruction] = {}
        for name, lines in computations(text).items():
            parsed = [(line, instruction(line)) for line in lines]
            self.lines[name] = {one.name: one for _, one in parsed if one is not None}
            for line, one in parsed:
                if one is not None and line.lstrip().startswith("ROOT "):
                    self.roots[name] = one

    def trips(self, computation: str, loop: Instruction) -> int | None:
        """How often a loop turns, where its text says so."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        # `counter < limit`, and nothing else: a condition of another kind may hold constants too.
        (condition,) = _called(loop.attributes, "condition")
        root = self.roots[condition]
        if root.op != "compare" or "direction=LT" not in root.attributes:
            return None
        lines = self.lines[condition]
        counter = next(
            (lines[x] for x in root.operands if _is(lines, x, "get-tuple-element")), None
        )
        limit = next((self.constant(condition, x) for x in root.operands[::-1]), None)
        if counter is None or limit is None:
            return None
        index = _index(counter)
        (body,) = _called(loop.attributes, "body")
        # XLA unrolls some of its own loops, whose counters then grow by more than 1.
        step = self._grows_by(body, index)
        start = self._operand(computation, loop.operands[0], index)
        begins = None if start is None else self.constant(computation, start)
        return -(-(limit - (begins or 0)) // step)

    def constant(self, computation: str, name: str) -> int | None:
        """The value of a scalar, through copies; None where it is no constant."""
        lines = self.lines[computation]
        while name in lines and lines[name].op in ("copy", "bitcast"):
            (name,) = lines[name].operands
        if not _is(lines, name, "constant"):
            return None
        value = lines[name].attributes
        return int(value) if value.lstrip("-").isdigit() else None

    def _operand(self, computation: str, name: str, index: int) -> str | None:
        source = self.lines[computation].get(name)
        return source.operands[index] if source is not None and source.op == "tuple" else None

    def _grows_by(self, body: str, index: int) -> int:
        root = self.roots[body]
        if root.op != "tuple":
            return 1
        step = 0
        name = root.operands[index]
        while _is(self.lines[body], name, "add"):
            one, other = self.lines[body][name].operands
            step += self.constant(body, other) or self.constant(body, one) or 0
            name = one if self.constant(body, one) is None else other
        return step or 1


def _walk(text: str) -> Iterator[_Step]:
    """Every instruction that is executed, those of fusions as one."""
    program = _Program(text)
    loops = itertools.count()

    def visit(name: str, times: int, depth: int, token: int | None) -> Iterator[_Step]:
        for line in program.lines.get(name, {}).values():
            yield _Step(program, name, line, times, depth, token)
            if line.op == "while":
                number = program.trips(name, line)
                (body,) = _called(line.attributes, "body")
                inside = next(loops) if number is None and token is None else token
                turns = 1 if number is None else number
                yield from visit(body, times * turns, depth + 1, inside)
            elif line.op in ("call", "async-start"):
                for called in _called(line.attributes, "to_apply|calls|called_computations"):
                    yield from visit(called, times, depth, token)
            elif line.op == "conditional":
                # One branch is taken; the dearest is not known, so that all are counted.
                branches = "branch_computations|true_computation|false_computation"
                for called in _called(line.attributes, branches):
                    yield from visit(called, times, depth, token)

    yield from visit("", 1, 0, None)


def _called(attributes: str, kinds: str) -> list[str]:
    """Computations that an instruction names under one of `kinds`, separated by `|`."""
    found = re.findall(rf"\b(?:{kinds})=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", attributes)
    return [name.strip().lstrip("%") for many, one in found for name in (many or one).split(",")]


def _fused(step: _Step) -> list[tuple[Collective, str | None]]:
    """Collectives inside a fusion, and the channel of each: on TPU a reduce-scatter is an all-reduce
    there, of which a part is kept.
    """
    (name,) = _called(step.instruction.attributes, "calls")
    inside = [line for line in step.program.lines[name].values() if line.op in COLLECTIVES]
    found = []
    for line in inside:
        kind = line.op
        is_part = len(inside) == 1 and size(step.instruction.shape) < size(line.shape)
        if kind == "all-reduce" and is_part:
            kind = "reduce-scatter"
            op_name = re.search(r'op_name="[^"]*"', step.instruction.attributes)
            line = line._replace(
                shape=step.instruction.shape,
                attributes=line.attributes + (op_name[0] if op_name else ""),
            )
        channel = re.search(r"channel_id=(\d+)", line.attributes)
        found.append((_collective(kind, step._replace(instruction=line)), channel and channel[1]))
    return found


def _collective(kind: str, step: _Step) -> Collective:
    line = step.instruction
    parts = re.findall(r"\w+\[[\d,]*\]", line.shape)
    if line.op.endswith("-start"):
        # (operand, result, …): of permutes with two counters more, of several arrays at once with
        # as many results as operands; an all-reduce has its results alone.
        many = len(line.operands)
        if kind == "collective-permute":
            parts = parts[1:2]
        elif kind != "all-reduce" and len(parts) >= 2 * many:
            parts = parts[many : 2 * many]
    full = sum(size(part) for part in parts)
    devices = groups(line.attributes)
    others = len(devices) - 1
    received = {
        "all-gather": full * others // len(devices),
        # Its result is reduced of the parts of all, then handed on.
        "all-reduce": 2 * full * others // len(devices),
        "reduce-scatter": full * others,
        "all-to-all": full * others // len(devices),
        "collective-permute": full,
    }[kind]
    name = re.search(r'op_name="([^"]*)"', line.attributes)
    shape = ", ".join(parts)
    return Collective(
        kind,
        shape,
        received,
        step.times,
        devices,
        step.depth,
        step.token,
        name[1] if name else "",
    )


def groups(attributes: str) -> tuple[int, ...]:
    """Devices of the first group of a collective, in any of the forms that XLA writes.

    >>> groups("replica_groups={{0,2},{1,3}}, x"), groups("replica_groups=[2,2]<=[2,2]T(1,0)")
    ((0, 2), (0, 2))
    >>> groups("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}")
    (0, 2)
    >>> groups("replica_groups=mesh['x'=3,'y'=2], device_ids=([2,3]T(1,0)) {'x'}")
    (0, 1, 2)
    """
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
    if pairs:
        every = re.findall(r"\{(\d+),(\d+)\}", attributes.partition("source_target_pairs=")[2])
        return _ring(dict((int(a), int(b)) for a, b in every))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(int(x) for x in listed[1].split(","))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        numbers = np.arange(product(iota[2])).reshape(_sizes(iota[2]))
        order = _sizes(iota[3]) if iota[3] else range(numbers.ndim)
        return tuple(numbers.transpose(order).reshape(_sizes(iota[1]))[0].tolist())
    mesh = re.search(
        r"replica_groups=@?mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
        r"[^{]*\{([^}]*)\}",
        attributes,
    )
    if mesh:
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        chosen = re.findall(r"'(\w+)'", mesh[4])
        numbers = np.arange(math.prod(sizes.values()))
        if mesh[2]:
            numbers = numbers.reshape(_sizes(mesh[2]))
            numbers = numbers.transpose(_sizes(mesh[3]) if mesh[3] else range(numbers.ndim))
        numbers = numbers.reshape(tuple(sizes.values()))
        first = tuple(slice(None) if name in chosen else 0 for name in sizes)
        return tuple(numbers[first].reshape(-1).tolist())
    return (0,)


def _ring(following: Mapping[int, int]) -> tuple[int, ...]:
    """The devices that the first one's array goes through."""
    ring = [next(iter(following))]
    while (after := following.get(ring[-1])) is not None and after not in ring:
        ring.append(after)
    return tuple(sorted(ring))


def _moved(step: _Step) -> int:
    """Bytes that an instruction reads and writes."""
    line = step.instruction
    lines = step.program.lines[step.computation]
    shapes = [lines[name].shape if name in lines else "" for name in line.operands]
    read = [size(shape, of_memory=True) for shape in shapes]
    written = size(line.shape, of_memory=True)
    arrays = re.findall(r"\w+\[[\d,]*\](?:\{[^{}]*\})?", line.shape)
    if line.op in SLICES:
        return 2 * written
    # (operand, result, …), from memory to vector memory or back.
    if line.op == "slice-start":
        return size(arrays[1])
    if line.op == "copy-start":
        return read[0] + size(arrays[0], of_memory=True)
    if line.op in PART:
        return 2 * min(read[PART[line.op]], written)
    if line.op != "fusion":
        return sum(read) + written
    (fused,) = _called(line.attributes, "calls")
    root = step.program.roots[fused]
    # Written in place: what is not the part stays as it is.
    if root.op in PART:
        lines = step.program.lines[fused]
        written = min(written, size(lines[root.operands[PART[root.op]]].shape))
    return written + sum(
        min(full, sum(_read(step.program, fused, number)))
        for number, full in enumerate(read)
        if full
    )


def _read(program: _Program, fused: str, number: int) -> tuple[int, int]:
    """Bytes that a fusion reads of an operand, of one that is only sliced the slices; and those that
    are its result, as they are.
    """
    lines = program.lines[fused]
    names = [x.name for x in lines.values() if x.op == "parameter" and int(x.attributes) == number]
    read = 0
    passed = 0
    while names:
        name = names.pop()
        full = size(lines[name].shape)
        if name == program.roots[fused].name:
            passed = full
        for user in lines.values():
            if name not in user.operands:
                continue
            place = user.operands.index(name)
            if user.op in SLICES and place == 0:
                read += size(user.shape)
            elif user.op in PART and place == 0:
                read += size(lines[user.operands[PART[user.op]]].shape)
            elif user.op in SAME:
                names.append(user.name)
            elif user.op == "fusion":
                (inner,) = _called(user.attributes, "calls")
                of_inner, is_result = _read(program, inner, place)
                read += min(full, of_inner)
                names += [user.name] if is_result else []
            else:
                read += full
    return read, passed


def _is(lines: Mapping[str, Instruction], name: str, op: str) -> bool:
    return name in lines and lines[name].op == op


def _index(line: Instruction) -> int:
    (index,) = re.findall(r"index=(\d+)", line.attributes)[:1]
    return int(index)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in text.split(",") if x)


def product(text: str) -> int:
    """Numbers of an array, of its sizes as XLA writes them.

    >>> product("2,8"), product("")
    (16, 1)
    """
    return math.prod(_sizes(text))
