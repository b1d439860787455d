"""Micro-batches found by compiling a recipe's update: as few as the memory of a device has room for."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from rlhf import hosts
from rlhf.training import meshes, programs
from rlhf.training.options import AUTO, TrainingOptions
from rlhf.training.runs import RunFolder, options_of

GIB = 2**30


def doubled(micro_batches: int, most: int) -> Iterator[int]:
    """Twice as many, four times as many, … up to the most that rows can be cut into.

    >>> list(doubled(1, 12)), list(doubled(3, 12)), list(doubled(4, 4))
    ([2, 4, 8], [6, 12], [])
    """
    while micro_batches * 2 <= most:
        micro_batches *= 2
        yield micro_batches


def resolved(main: Callable, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's arguments with a number in place of `micro_batches auto`.

    A run that goes on has the number that it began with.  Where a device does not say how much
    memory it has, as a CPU, the number is 1.

    Args:
      main: of the recipe; takes the arguments.
      arguments: of the recipe, options in their dataclasses.

    Raises: ValueError where only programs are wanted, and as the recipe does of its options.
    """
    if not _is_auto(arguments):
        return dict(arguments)
    if programs.is_planned():
        raise ValueError(
            f"micro_batches {AUTO} is for a run or `rlhf plan`, which know a device's memory; give "
            "a number"
        )
    if arguments.get("resume") and (number := _of_earlier_run(Path(arguments["output"]))):
        return _with(arguments, number)
    # A folder that is in use is found before minutes of compiling.
    run = RunFolder(arguments["output"], options=_with(arguments, 1))
    devices = meshes.local_devices()
    memory = memory_of(devices)
    if memory is None:
        run.say(f"micro_batches {AUTO} is 1: {devices[0].device_kind} does not say its memory")
        return _with(arguments, 1)
    return found(main, arguments, devices=devices, memory=memory, say=run.say)


def found(
    main: Callable,
    arguments: Mapping[str, Any],
    *,
    devices: Sequence[jax.Device],
    memory: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """A recipe's arguments with a number in place of `micro_batches auto`: the fewest, 1 and its
    doubles, with which the update fits a device; where it never does, the most that its rows can be
    cut into.

    Args:
      main: of the recipe.
      arguments: of the recipe, options in their dataclasses.
      devices: those of the run, or that are planned for.
      memory: bytes of each.
      say: `(text)`, called with what is found.

    Returns: the arguments; those that have a number already as they are.

    Raises: as the recipe does of its options.
    """
    if not _is_auto(arguments):
        return dict(arguments)
    number = 1
    needed = _needed(main, _with(arguments, number), devices)
    for more in doubled(1, arguments["training"].batch_size):
        if needed <= memory:
            break
        try:
            needed = _needed(main, _with(arguments, more), devices)
        # Rows that cannot be cut so, or parts that the devices cannot share.
        except ValueError:
            break
        number = more
    fits = (
        "" if needed <= memory else "; more parts cannot be made, try --remat full or more devices"
    )
    size = f"{needed / GIB:.3g} GiB" if math.isfinite(needed) else "more than XLA compiles"
    say(
        f"micro_batches {AUTO} is {number}: the update needs {size} of a device, which has "
        f"{memory / GIB:.3g} GiB{fits}"
    )
    return _with(arguments, number)


def memory_of(devices: Sequence[jax.Device]) -> int | None:
    """Bytes that every one of these devices has for arrays; None where one does not say."""
    here = [device for device in devices if device.process_index == jax.process_index()]
    # 0: it does not say; JAX has no statistics of CPUs.
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in here]
    return min(hosts.gather(min(limits))) or None


def _is_auto(arguments: Mapping[str, Any]) -> bool:
    training = arguments.get("training")
    return isinstance(training, TrainingOptions) and training.micro_batches == AUTO


def _of_earlier_run(folder: Path) -> int | None:
    """What a run's config.yaml says; None where it is not there, or says nothing."""
    return hosts.of_first(lambda: (options_of(folder) or {}).get("micro_batches"))


def _needed(main: Callable, arguments: Mapping[str, Any], devices: Sequence) -> float:
    """Bytes that the update needs of a device; infinite where XLA finds it too large to compile."""
    # A plan begins at step 0, and writes nothing.
    options = {k: value for k, value in arguments.items() if k not in ("output", "resume")}
    traced, state = programs.traced(main, devices=devices, **options)
    update = traced["update"]
    try:
        compiled = update.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return math.inf
    before = state.params, state.context, state.opt_state, update.args_info[0][1:]
    return programs.local_bytes(before) + programs.temporaries(compiled)


def _with(arguments: Mapping[str, Any], number: int) -> dict[str, Any]:
    training = dataclasses.replace(arguments["training"], micro_batches=number)
    return {**arguments, "training": training}
