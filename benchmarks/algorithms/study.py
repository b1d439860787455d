"""What is run: pieces, each one compiled program with runs side by side, and their results on disk."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.algorithms import closed_form, runs
from benchmarks.algorithms.offline import OFFLINE
from benchmarks.algorithms.online import ONLINE
from benchmarks.algorithms.runs import NONE, Algorithm, Setting
from rlhf import tasks
from rlhf.rollouts import Rollout
from rlhf.tasks.task import Task

ALGORITHMS = {**ONLINE, **OFFLINE}
POINTS = 8  # of a sweep: each learning rate with both values of the other hyper-parameter
# Of a piece's time a third is compilation: this halves it, and the runs take as long as before.
COMPILER_OPTIONS: dict[str, str | bool] = {"xla_backend_optimization_level": "1"}
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
      sweep_seeds: runs of each point of the sweep.
      staleness: of the sampler, on the first task, of `compared`.
      widths: hidden sizes beside the setting's, on the first task, of `compared`.
      controls: of GRPO, on every task.
      compared: algorithms of the smaller tables.
      bandit: those of `closed_form`.
    """

    settings: dict[str, Setting]
    algorithms: tuple[str, ...]
    sweep_seeds: int
    staleness: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()
    controls: tuple[str, ...] = ()
    compared: tuple[str, ...] = ()
    bandit: tuple[str, ...] = ("RLOO",)

    @property
    def seeds(self) -> int:
        """Runs that are reported: as many as a sweep has, so that one program serves both."""
        return POINTS * self.sweep_seeds


def _setting(name: str, **options) -> Setting:
    return Setting(tasks.find(name), **options)


SETTINGS = {
    "walks": _setting("task:walks", hidden_size=16, warm_steps=50, rates=(5e-4, 1e-3, 2e-3, 4e-3)),
    "countdown": _setting("task:countdown", warm_steps=350, steps=200),
    "sort": _setting("task:sort", warm_steps=380, steps=200),
    "sums": _setting("task:sums", warm_steps=240),
}
SIZES = {
    "smallest": Size(
        {
            "walks": SETTINGS["walks"]._replace(
                steps=60, evaluations=6, rates=(7e-4, 1.4e-3, 2.8e-3, 5.6e-3)
            )
        },
        ("GRPO", "RLOO", "DPO"), sweep_seeds=1, controls=("flipped",),
    ),
    "small": Size(
        SETTINGS, tuple(ALGORITHMS), sweep_seeds=2, staleness=(1, 4, 8), widths=(32, 64),
        controls=("flipped", "random", "masked", "spurious"),
        compared=("GRPO", "DAPO", "GSPO", "CISPO", "RLOO", "PPO"),
        bandit=tuple(closed_form.ALGORITHMS),
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


TUNED = ("main", "size")  # a model of another size is tuned again; what else is changed is not


def pieces(size: Size) -> Iterator[Piece]:
    """All of a size; those that are not tuned take what the sweep of the main table chose."""
    for task, setting in size.settings.items():
        for algorithm in size.algorithms:
            yield Piece("main", task, algorithm, setting)
        for control in size.controls:
            yield Piece("control", task, "GRPO", setting, control)
    first, setting = next(iter(size.settings.items()))
    for algorithm in size.compared:
        for steps in size.staleness:
            yield Piece("staleness", first, algorithm, setting._replace(staleness=steps))
        for width in size.widths:
            yield Piece("size", first, algorithm, setting._replace(hidden_size=width))


def points(algorithm: Algorithm, setting: Setting) -> list[tuple[float, float]]:
    """(learning rate, knob) of the sweep: as many for every algorithm."""
    if algorithm.knob == NONE:
        # Rates between them in place of the knob.
        return [(rate * factor, 0.0) for rate in setting.rates for factor in (0.7, 1.0)]
    return [(rate, knob) for rate in setting.rates for knob in algorithm.knobs]


def keys_of(seeds: Sequence[int]) -> jax.Array:
    """`[seeds, 2]` keys: of the start and of the run."""
    return jax.vmap(lambda seed: jax.random.split(jax.random.key(seed)))(jnp.array(seeds))


@cache
def starts(setting: Setting, seeds: tuple[int, ...]) -> Any:
    """The warm start of each seed, `[seeds, ..]`, the same for all algorithms."""
    warm = jax.jit(jax.vmap(partial(runs.warm, setting)), compiler_options=COMPILER_OPTIONS)
    return warm(keys_of(seeds)[:, 0])


def run(size: Size, piece: Piece, chosen: tuple[float, float] | None) -> pa.Table:
    """A piece's runs: those of the sweep, where nothing is chosen yet, and those of the best point."""
    algorithm = ALGORITHMS[piece.algorithm]
    sweep_seeds = tuple(range(SWEEP_SEED, SWEEP_SEED + size.sweep_seeds))
    # Without what a start does not depend on, so that pieces share it.
    of_start = Setting(piece.setting.task, piece.setting.hidden_size, piece.setting.warm_steps)
    both = (*range(size.seeds), *sweep_seeds)
    params = starts(of_start, both)

    def arguments(seeds: Sequence[int], at: Sequence[tuple[float, float]]) -> tuple:
        places = jnp.array([both.index(seed) for seed in seeds])
        rates, knobs = (jnp.array(values) for values in zip(*at, strict=True))
        return keys_of(seeds)[:, 1], jax.tree.map(lambda x: x[places], params), rates, knobs

    train = runs.make_train(algorithm, piece.setting, CONTROLS.get(piece.control))
    started = time.perf_counter()
    shapes = arguments([0] * size.seeds, [(0.0, 0.0)] * size.seeds)
    program = jax.jit(jax.vmap(train)).lower(*shapes).compile(COMPILER_OPTIONS)
    compile_seconds = time.perf_counter() - started
    tables = []

    def runs_of(
        purpose: str, seeds: Sequence[int], at: Sequence[tuple[float, float]]
    ) -> np.ndarray:
        """Final shares of right completions; the runs go to `tables`."""
        started = time.perf_counter()
        curves = jax.device_get(program(*arguments(seeds, at)))
        seconds = (time.perf_counter() - started) / len(seeds)
        tables.append(_table(piece, purpose, seeds, at, curves, compile_seconds, seconds))
        return curves["exact"][:, -1]

    if chosen is None:
        sweep = points(algorithm, piece.setting)
        at = [point for point in sweep for _ in sweep_seeds]
        final = runs_of("sweep", sweep_seeds * len(sweep), at)
        chosen = sweep[final.reshape(len(sweep), -1).mean(axis=1).argmax()]
    runs_of("final", range(size.seeds), [chosen] * size.seeds)
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
    final = table.filter(pc.equal(table["purpose"], "final"))
    return final["learning_rate"][0].as_py(), final["knob"][0].as_py()


def run_all(
    name: str, folder: Path, workers: int = 1, say: Callable[[str], None] = print
) -> pa.Table:
    """Every piece that the folder does not hold yet, each written as it ends; all of them as one table.

    Args:
      name: of the size.
      folder: of the pieces.
      workers: processes; a piece keeps about one core busy.
      say: gets the name of each piece that is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    all_pieces = list(pieces(SIZES[name]))
    # Tuned ones first: the others take what their sweeps chose.
    tuned = [i for i, piece in enumerate(all_pieces) if piece.kind in TUNED]
    others = [i for i, piece in enumerate(all_pieces) if piece.kind not in TUNED]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for numbers in (tuned, others):
            for number in pool.map(partial(_write, name, folder), numbers):
                say(all_pieces[number].name)
    return pa.concat_tables(pq.read_table(_file(folder, piece)) for piece in all_pieces)


def _write(name: str, folder: Path, number: int) -> int:
    """Runs a size's piece of that number, if the folder lacks it, and returns the number."""
    size = SIZES[name]
    piece = list(pieces(size))[number]
    file = _file(folder, piece)
    if not file.exists():
        main = piece._replace(kind="main", setting=size.settings[piece.task], control="")
        chosen = None if piece.kind in TUNED else chosen_by(pq.read_table(_file(folder, main)))
        started = time.perf_counter()
        table = run(size, piece, chosen)
        seconds = time.perf_counter() - started
        table = table.append_column("piece_seconds", pa.array([seconds] * len(table)))
        # Written beside and renamed: a run that is killed leaves no half of a file.
        part = file.with_suffix(".part")
        pq.write_table(table, part)
        part.rename(file)
        # Programs of other shapes: none is used again.
        jax.clear_caches()
    return number


def _file(folder: Path, piece: Piece) -> Path:
    return folder / f"{piece.name}.parquet"
