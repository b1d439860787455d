"""What is run: pieces, each one compiled program with runs side by side, and their results on disk."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.algorithms import runs
from benchmarks.algorithms.offline import OFFLINE
from benchmarks.algorithms.online import ONLINE
from benchmarks.algorithms.runs import NONE, Algorithm, Setting
from rlhf import tasks
from rlhf.rollouts import Rollout
from rlhf.tasks.task import Task

ALGORITHMS = {**ONLINE, **OFFLINE}
RATES = (2e-4, 4e-4, 8e-4, 1.6e-3)
MORE_RATES = (
    1.4e-4,
    2.8e-4,
    5.7e-4,
    1.1e-3,
)  # between them, where there is no second hyper-parameter
SWEEP_SEED = 1000  # of the first run of a sweep: other seeds than those that are reported


class Piece(NamedTuple):
    """Runs of one algorithm in one setting.

    Attributes:
      kind: main, staleness, size or control.
      task: its name.
      algorithm: its name.
      setting: held equal.
      control: what the algorithm is paid in place of the score; "": that.
    """

    kind: str
    task: str
    algorithm: str
    setting: Setting
    control: str = ""

    @property
    def name(self) -> str:
        words = [self.kind, self.task, self.algorithm, str(self.setting.hidden_size)]
        words += [str(self.setting.staleness), self.control]
        return "-".join(word.replace(" ", "_") for word in words if word)


class Size(NamedTuple):
    """How much is run.

    Attributes:
      settings: task -> Setting.
      algorithms: names.
      seeds: runs that are reported.
      sweep_seeds: runs of each point of the sweep.
      staleness: of the sampler, on the first task, of `compared`.
      widths: hidden sizes beside the setting's, on the first task, of `compared`.
      controls: of GRPO, on every task.
      compared: algorithms of the smaller tables.
    """

    settings: dict[str, Setting]
    algorithms: tuple[str, ...]
    seeds: int
    sweep_seeds: int
    staleness: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()
    controls: tuple[str, ...] = ()
    compared: tuple[str, ...] = ()


def _setting(name: str, **options) -> Setting:
    return Setting(tasks.find(name), **options)


SETTINGS = {
    "walks": _setting("task:walks", hidden_size=16, warm_steps=100, steps=100),
    "sort": _setting("task:sort"),
    "reverse": _setting("task:reverse"),
    "sums": _setting("task:sums"),
}
SIZES = {
    "smallest": Size(
        {"walks": SETTINGS["walks"]._replace(steps=20, evaluations=2, eval_prompts=64)},
        ("GRPO", "RLOO", "DPO"), seeds=4, sweep_seeds=1, controls=("flipped",),
    ),
    "small": Size(
        SETTINGS, tuple(ALGORITHMS), seeds=16, sweep_seeds=2, staleness=(1, 4, 8), widths=(16, 64),
        controls=("flipped", "random", "masked", "spurious"),
        compared=("GRPO", "DAPO", "GSPO", "CISPO", "RLOO", "PPO"),
    ),
}  # fmt: skip

# ---- controls ----------------------------------------------------------------------------------


def _flipped(task: Task, rollout: Rollout, key: jax.Array) -> jax.Array:
    return 1.0 - task.score(rollout)


def _random(task: Task, rollout: Rollout, key: jax.Array) -> jax.Array:
    return jax.random.bernoulli(key, 0.5, (len(rollout.tokens),)).astype(jnp.float32)


def _masked(task: Task, rollout: Rollout, key: jax.Array) -> jax.Array:
    return jnp.zeros(len(rollout.tokens))


def _spurious(task: Task, rollout: Rollout, key: jax.Array) -> jax.Array:
    """Longer completions are paid more."""
    return rollout.mask.sum(axis=1) / task.max_new_tokens


CONTROLS: dict[str, Callable] = {
    "flipped": _flipped,
    "random": _random,
    "masked": _masked,
    "spurious": _spurious,
}

# ---- pieces ------------------------------------------------------------------------------------


def pieces(size: Size) -> Iterator[Piece]:
    """All of a size, the main table first: the others take what its sweeps chose."""
    for algorithm in size.algorithms:
        for task, setting in size.settings.items():
            yield Piece("main", task, algorithm, setting)
    first = next(iter(size.settings))
    setting = size.settings[first]
    for algorithm in size.compared:
        for steps in size.staleness:
            yield Piece("staleness", first, algorithm, setting._replace(staleness=steps))
        for width in size.widths:
            if width != setting.hidden_size:
                yield Piece("size", first, algorithm, setting._replace(hidden_size=width))
    for control in size.controls:
        for task, of_task in size.settings.items():
            yield Piece("control", task, "GRPO", of_task, control)


def points(algorithm: Algorithm) -> list[tuple[float, float]]:
    """(learning rate, knob) of the sweep: as many for every algorithm."""
    if algorithm.knob == NONE:
        return [(rate, 0.0) for rate in sorted(RATES + MORE_RATES)]
    return [(rate, knob) for rate in RATES for knob in algorithm.knobs[:2]]


def run(size: Size, piece: Piece, chosen: tuple[float, float] | None) -> pa.Table:
    """A piece's runs: those of the sweep, where nothing is chosen yet, and those of the best point."""
    algorithm = ALGORITHMS[piece.algorithm]
    reward = CONTROLS.get(piece.control)
    warm = jax.jit(jax.vmap(partial(runs.warm, piece.setting)))
    train = jax.jit(jax.vmap(runs.make_train(algorithm, piece.setting, reward)))
    tables = []
    programs: dict[int, Callable] = {}

    def runs_of(purpose: str, seeds: list[int], at: list[tuple[float, float]]) -> np.ndarray:
        """Final shares of right completions; the runs go to `tables`."""
        keys = jax.vmap(jax.random.key)(jnp.array(seeds))
        params = warm(keys)
        rates, knobs = (jnp.array(values) for values in zip(*at, strict=True))
        started = time.perf_counter()
        # The sweep and the runs that are reported are as many, and one program.
        if len(seeds) not in programs:
            programs[len(seeds)] = train.lower(keys, params, rates, knobs).compile()
        ready = time.perf_counter()
        curves = jax.device_get(programs[len(seeds)](keys, params, rates, knobs))
        seconds = (time.perf_counter() - ready) / len(seeds)
        tables.append(_table(piece, purpose, seeds, at, curves, ready - started, seconds))
        return curves["exact"][:, -1]

    if chosen is None:
        sweep = points(algorithm)
        seeds = list(range(SWEEP_SEED, SWEEP_SEED + size.sweep_seeds))
        final = runs_of("sweep", seeds * len(sweep), [point for point in sweep for _ in seeds])
        chosen = sweep[final.reshape(len(sweep), -1).mean(axis=1).argmax()]
    runs_of("final", list(range(size.seeds)), [chosen] * size.seeds)
    return pa.concat_tables(tables)


def _table(piece, purpose, seeds, at, curves, compile_seconds, seconds) -> pa.Table:
    """A row for each evaluation of each run."""
    number, evaluations = curves["exact"].shape
    each = lambda values: np.repeat(values, evaluations)
    constant = lambda value: [value] * number * evaluations
    return pa.table(
        {
            "kind": constant(piece.kind),
            "task": constant(piece.task),
            "algorithm": constant(piece.algorithm),
            "hidden_size": constant(piece.setting.hidden_size),
            "staleness": constant(piece.setting.staleness),
            "control": constant(piece.control),
            "purpose": constant(purpose),
            "seed": each(seeds),
            "learning_rate": each([rate for rate, _ in at]),
            "knob": each([knob for _, knob in at]),
            "evaluation": np.tile(np.arange(evaluations), number),
            "tokens": curves["tokens"].ravel(),
            "exact": curves["exact"].ravel().astype(np.float64),
            "score": curves["score"].ravel().astype(np.float64),
            "compile_seconds": constant(compile_seconds),
            "run_seconds": constant(seconds),
        }
    )


def chosen_by(table: pa.Table) -> tuple[float, float]:
    """The point that a piece's sweep chose."""
    final = table.filter(pa.compute.equal(table["purpose"], "final"))
    return final["learning_rate"][0].as_py(), final["knob"][0].as_py()


def run_all(size: Size, folder: Path, say: Callable[[str], None] = print) -> pa.Table:
    """Every piece that the folder does not hold yet, each written as it ends; all of them as one table."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[Piece, pa.Table] = {}
    for piece in pieces(size):
        file = folder / f"{piece.name}.parquet"
        if not file.exists():
            # A model of another size is tuned again; what else is changed is not.
            is_tuned = piece.kind in ("main", "size")
            chosen = None if is_tuned else chosen_by(found[_main_of(piece, size)])
            table = run(size, piece, chosen)
            # Written beside and renamed: a run that is killed leaves no half of a file.
            part = file.with_suffix(".part")
            pq.write_table(table, part)
            part.rename(file)
            say(piece.name)
            # Programs of other shapes: none is used again.
            jax.clear_caches()
        found[piece] = pq.read_table(file)
    return pa.concat_tables(found.values())


def _main_of(piece: Piece, size: Size) -> Piece:
    """The piece of the main table whose sweep chose for another one."""
    return Piece("main", piece.task, piece.algorithm, size.settings[piece.task])
