"""What would make a plan fit that does not: tried one after the other, the cheapest first."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from rlhf.fields import documented
from rlhf.planning import plan
from rlhf.planning.plan import Plan
from rlhf.planning.topologies import Topology
from rlhf.training import micro_batches

RANK = 16  # of the adapters that are tried
TENSOR = (2, 4, 8)


@documented
class Cure(NamedTuple):
    """Other options, and what comes of them.

    Attributes:
      options: as they are typed, such as `--micro_batches 2`.
      plan: with them; None: the recipe refuses them.
      why: the recipe's words where it does.
    """

    options: str
    plan: Plan | None
    why: str = ""


def tried(main: Callable, topology: Topology, found: Plan, **options: Any) -> Iterator[Cure]:
    """Plans with other options, up to the first that fits.

    More micro-batches; all of the forward pass computed again (`--remat full`); another mesh; LoRA.
    Each goes on from the ones before it, and those that cannot help are left out.

    Args:
      main: of a recipe.
      topology: of `found`.
      found: a plan that does not fit.
      options: the recipe's, its groups of options as their dataclasses.
    """
    for typed, changed in _candidates(found, options):
        try:
            new_plan = plan.make(main, topology, **changed)
        # Such as rows that the devices cannot share.
        except ValueError as error:
            yield Cure(typed, None, str(error))
            continue
        yield Cure(typed, new_plan)
        if new_plan.fits:
            return


def _candidates(found: Plan, options: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """`(what is typed, options)`, each beside those before it."""
    failing = [row for row in found.rows if not row.fits]
    memory = failing[0].memory
    # What is there before the step alone is too much, or sampling, which neither makes smaller.
    state_fits = all(row.weights + row.moments + row.batch < memory for row in failing)
    helps = state_fits and any(row.program == "update" for row in failing)
    typed = ""
    ways = found.mesh.get("data", 1) * found.mesh.get("fsdp", 1)
    rows = found.rows_of_update
    more = micro_batches.doubled(options["training"].micro_batches, rows // ways)
    for micro in more if helps else ():
        typed = f"--micro_batches {micro}"
        options = _with(options, "training", micro_batches=micro)
        yield typed, options
    if options["model"].remat != "full" and helps:
        typed = f"{typed} --remat full".strip()
        options = _with(options, "model", remat="full")
        yield typed, options
    number = math.prod(found.mesh.values())
    meshes = [{"data": 1, "fsdp": number, "tensor": 1}] + [
        {"data": 1, "fsdp": number // tensor, "tensor": tensor} for tensor in TENSOR
    ]
    for mesh in meshes:
        if mesh["fsdp"] and mesh != {name: found.mesh.get(name, 1) for name in mesh}:
            words = " ".join(f"--{name} {size}" for name, size in mesh.items() if size > 1)
            yield f"{typed} {words}".strip(), _with(options, "mesh", **mesh)
    if not options["model"].has_adapters:
        words = f"{typed} --lora_rank {RANK}".strip()
        yield words, _with(options, "model", lora_rank=RANK)


def _with(options: Mapping[str, Any], group: str, **values: Any) -> Mapping[str, Any]:
    return {**options, group: dataclasses.replace(options[group], **values)}
