"""A recipe's programs compiled for a pod or a cluster that is elsewhere: do they fit, and how fast can
they be?
"""

import importlib
import json as json_text
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table

from rlhf import command_line, files
from rlhf.ranges import FromPython, checked

GIB = 2**30


@checked
def main(
    recipe: str,
    *,
    topology: str,
    json: str | None = None,
    overwrite: bool = False,
    options: Annotated[Mapping[str, Any], FromPython] = {},
) -> None:
    """Plans a recipe's step on devices that are elsewhere: memory, collectives and times, as the
    compiler has them.

    All options of the recipe may be given, as in `rlhf plan grpo --topology v5p:4x4x4 --model …`.
    A model's folder needs no weights, only its config.json and tokenizer.  Where the step does not
    fit, options that would make it fit are tried.

    Args:
      recipe: the command to plan, such as sft or grpo.
      topology: v4:4x4x4, v5p:4x4x4, v5e:16x16, v6e:2x4, tpu7x:4x4x4 (chips), h100:1x4x8, h200:1x8x8
        (slices, hosts, GPUs of a host) or cpu:8.
      json: a file for the plan; null: the table alone.
      overwrite: write over that file if it exists.
      options: of the recipe.
    """
    # Here: these start JAX, which a mistake in the options need not wait for.
    import jax

    from rlhf.planning import cures, plan, topologies
    from rlhf.training import micro_batches

    # Programs for devices that are elsewhere cannot be read back from it.
    jax.config.update("jax_enable_compilation_cache", False)
    recipe_main = _recipe(recipe)
    if json is not None:
        files.check_output(json, overwrite=overwrite)
    devices = topologies.find(topology)
    console = Console()
    options = micro_batches.found(
        recipe_main,
        options,
        devices=devices.devices,
        memory=int(devices.chip.memory),
        say=console.print,
    )
    found = plan.make(recipe_main, devices, **options)
    show(console, recipe, found)
    tried = []
    if not found.fits and {"training", "model", "mesh"} <= options.keys():
        for cure in cures.tried(recipe_main, devices, found, **options):
            tried.append(cure)
            fits = cure.why if cure.plan is None else "fits" if cure.plan.fits else "does not fit"
            console.print(f"{cure.options}: {fits}")
    if json is not None:
        text = {"recipe": recipe, **as_json(found)}
        if "training" in options:
            text["micro_batches"] = options["training"].micro_batches
        text["tried"] = [
            {"options": cure.options, "fits": cure.plan is not None and cure.plan.fits}
            for cure in tried
        ]
        Path(json).write_text(json_text.dumps(text, indent=2) + "\n")


def parsed(fn: Callable, name: str, argv: Sequence[str]) -> dict[str, Any]:
    """The arguments of `main` from the command line, those of the recipe among them."""
    # An accelerator of this machine has no part in a plan.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    plan_words, rest = _split(argv)
    # Without a recipe there are no options but those of the plan.
    if not plan_words or "--help" in plan_words:
        return command_line.parsed(fn, name, plan_words or rest)
    arguments = command_line.parsed(fn, name, plan_words)
    recipe = arguments["recipe"]
    # Nothing is written there: a plan ends before the first step.
    output = [] if "--help" in rest or "--print_config" in rest else ["--output", "plan"]
    options = command_line.parsed(_recipe(recipe), recipe, [*rest, *output])
    options.pop("output", None)
    return {**arguments, "options": options}


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words that are `main`'s, and those that are the recipe's."""
    plan_words: list[str] = []
    rest: list[str] = []
    words = list(argv)
    if words and not words[0].startswith("-"):
        plan_words.append(words.pop(0))
    taker = rest
    for word in words:
        if word.startswith("-"):
            option = word.lstrip("-").partition("=")[0]
            mine = option in ("recipe", "topology", "json", "overwrite")
            # Help before a recipe is of the plan.
            mine = mine or (option in ("h", "help") and not plan_words)
            taker = plan_words if mine else rest
        taker.append(word)
    return plan_words, rest


def _recipe(name: str) -> Callable:
    # Here: `rlhf.cli` names this module among its commands.
    from rlhf.cli import COMMANDS

    known = [command for command, (module, _) in COMMANDS.items() if ".recipes." in module]
    if name not in known:
        raise ValueError(f"{name} is no recipe to plan; there are {', '.join(known)}")
    return importlib.import_module(COMMANDS[name][0]).main


def as_json(found: Any) -> dict[str, Any]:
    """A plan as JSON has it."""
    rows = []
    for row in found.rows:
        fields = row._asdict()
        fields["times"] = row.times._asdict()
        fields["token"] = row.token and row.token._asdict()
        fields["moved"] = [one._asdict() for one in row.moved]
        rows.append(fields)
    return {**found._asdict(), "mesh": dict(found.mesh), "fits": found.fits, "rows": rows}


def show(console: Console, recipe: str, found: Any) -> None:
    """Prints a plan."""
    mesh = " × ".join(f"{name} {size}" for name, size in found.mesh.items() if size > 1)
    console.print(f"rlhf {recipe} on {found.topology}: {mesh or 'one device'}")
    table = Table(title="GiB of a device")
    names = ("weights", "moments", "batch", "activations", "cache", "temporaries", "needed")
    # Short, so that a narrow terminal shows them whole.
    short = ("weights", "moments", "batch", "kept", "cache", "temp", "all")
    for heading in ("program", *short, "fits"):
        table.add_column(heading, justify="left" if heading == "program" else "right")
    for row in found.rows:
        sizes = [f"{getattr(row, name) / GIB:.2f}" for name in names]
        fits = "yes" if row.fits else f"no, of {row.memory / GIB:.0f}"
        table.add_row(row.program, *sizes, fits)
    console.print(table)
    table = Table(title="seconds at best")
    for heading in ("program", "products", "memory", "links", "step", "bound", "MFU"):
        table.add_column(heading, justify="left" if heading == "program" else "right")
    for row in found.rows:
        if row.moved or row.fits:
            mfu = "" if row.mfu is None else f"{row.mfu:.0%}"
            _timed(table, row.program, row.times, mfu)
        if row.token is not None:
            _timed(table, "a token", row.token, "")
    console.print(table)
    table = Table(title="what a device receives")
    for heading in ("program", "collective", "axes", "number", "MiB"):
        table.add_column(heading, justify="right" if heading in ("number", "MiB") else "left")
    for row in found.rows:
        for one in row.moved:
            where = f"{row.program}, a token" if one.per_token else row.program
            size = f"{one.bytes / 2**20:.1f}"
            table.add_row(where, one.kind, ", ".join(one.axes), str(one.number), size)
    console.print(table)
    for text in warnings(found):
        console.print(text)


def _timed(table: Table, name: str, times: Any, mfu: str) -> None:
    seconds = [f"{x:.2g}" for x in (times.matrix, times.memory, times.links, times.step)]
    table.add_row(name, *seconds, times.bound, mfu)


def warnings(found: Any) -> list[str]:
    """What a plan's programs do that costs more than it must."""
    said = []
    for row in found.rows:
        if row.weights_by_all_reduce:
            said.append(
                f"{row.program}: {row.weights_by_all_reduce / 2**20:.0f} MiB of weights move by "
                "all-reduces of padded matrices, twice the bytes of a gather; a smaller --fsdp with "
                "more --data may avoid it (on TPUs the default mesh does)"
            )
        if row.squares:
            said.append(
                f"{row.program}: arrays of rows by rows, {', '.join(row.squares)}, grow with the "
                "square of the length"
            )
    return said
