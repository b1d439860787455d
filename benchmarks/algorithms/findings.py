"""What the runs say: tables as lists of lines, and sentences that the intervals allow."""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.algorithms import statistics
from benchmarks.algorithms.offline import OFFLINE
from benchmarks.algorithms.statistics import Interval

RESAMPLES = 20_000
FITS = 200  # resamples of a fit
MARGIN = 0.02  # within which two algorithms count as equal; set before the first run
BASE = "GRPO"
LEVEL = 0.05
BAR = 0.95  # of the oracle, which every run should reach
OF_PIECE = ("task", "algorithm", "hidden_size", "staleness", "control")
Lines = list[dict[str, str]]


class Scores(NamedTuple):
    """Of one algorithm.

    Attributes:
      name: of the algorithm.
      curves: [runs, tasks, evaluations], shares of right completions.
      tokens: [evaluations], sampled so far, the mean over runs and tasks.
      seconds: of a run, with others beside it; the mean over tasks.
    """

    name: str
    curves: np.ndarray
    tokens: np.ndarray
    seconds: float

    @property
    def final(self) -> np.ndarray:
        """`[runs, tasks]` at the last evaluation."""
        return self.curves[..., -1]


def reported(table: pa.Table, **where: object) -> pa.Table:
    """The rows of reported runs with these values in these columns."""
    for column, value in {"purpose": "final", **where}.items():
        table = table.filter(pc.equal(table[column], value))
    return table


def scores(table: pa.Table, by: str = "algorithm", **where: object) -> list[Scores]:
    """Each algorithm's reported runs, in the order of the table.

    Args:
      table: of `study.run_all`.
      by: the column whose values are named.
      where: column -> its value.
    """
    table = reported(table, **where)
    found = []
    for name in dict.fromkeys(table[by].to_pylist()):
        of_name = table.filter(pc.equal(table[by], name))
        of_name = of_name.sort_by([(key, "ascending") for key in ("seed", "task", "evaluation")])
        shape = [len(set(of_name[key].to_pylist())) for key in ("seed", "task", "evaluation")]
        curves = of_name["exact"].to_numpy().reshape(shape)
        tokens = of_name["tokens"].to_numpy().reshape(shape).mean(axis=(0, 1))
        seconds = float(np.mean(of_name["run_seconds"].to_numpy()))
        found.append(Scores(str(name), curves, tokens, seconds))
    return found


def minutes(table: pa.Table) -> float:
    """What all pieces took, each in its process, whenever that was."""
    seconds = table.group_by(["kind", *OF_PIECE]).aggregate([("piece_seconds", "min")])
    return float(pc.sum(seconds["piece_seconds_min"]).as_py()) / 60


def mean_of(rng: np.random.Generator, one: np.ndarray) -> Interval:
    """The interquartile mean of `[runs, tasks]`."""
    draws = statistics.resamples(rng, one, RESAMPLES)
    return statistics.interval(statistics.interquartile_mean, [one], [draws])


def change(rng: np.random.Generator, new: np.ndarray, old: np.ndarray) -> Interval:
    """The difference of two interquartile means."""
    draws = [statistics.resamples(rng, x, RESAMPLES) for x in (new, old)]
    return statistics.interval(
        lambda a, b: statistics.interquartile_mean(a) - statistics.interquartile_mean(b),
        [new, old],
        draws,
    )


def shown(found: Interval) -> str:
    return f"{found.estimate:.3f} [{found.low:.3f}, {found.high:.3f}]"


# ---- tables ------------------------------------------------------------------------------------


def main_table(found: Sequence[Scores], rng: np.random.Generator) -> Lines:
    """A line for each algorithm, the best first: its interquartile mean, and how it does against the base."""
    base = next(one for one in found if one.name == BASE)
    others = [one for one in found if one is not base]
    p_values = [statistics.permutation_p(rng, one.final, base.final) for one in others]
    adjusted = dict(zip((one.name for one in others), statistics.holm(p_values), strict=True))
    lines = []
    for one in sorted(found, key=lambda one: -statistics.interquartile_mean(one.final)):
        line = {
            "algorithm": one.name,
            "interquartile mean": shown(mean_of(rng, one.final)),
            "at the start": f"{one.curves[..., 0].mean():.3f}",
            "least of all runs": f"{one.final.min():.3f}",
            "thousand tokens": f"{one.tokens[-1] / 1000:.0f}",
            "seconds a run": f"{one.seconds:.2f}",
        }
        lines.append(
            line
            | (
                _against(rng, one, base, adjusted)
                if one is not base
                else dict.fromkeys(COMPARED, "")
            )
        )
    return lines


COMPARED = (f"P(better than {BASE})", "p, Holm", f"within {MARGIN}")


def _against(rng, one: Scores, base: Scores, adjusted: dict[str, float]) -> dict[str, str]:
    pair = [one.final, base.final]
    draws = [statistics.resamples(rng, x, RESAMPLES) for x in pair]
    better = statistics.interval(statistics.probability_of_improvement, pair, draws)
    equal = statistics.is_equivalent(one.final, base.final, draws, MARGIN)
    values = (shown(better), f"{adjusted[one.name]:.3f}", "yes" if equal else "not shown")
    return dict(zip(COMPARED, values, strict=True))


def tasks_table(table: pa.Table) -> Lines:
    """Means over runs at the end, with the least: a column for each task."""
    table = reported(table, kind="main")
    table = table.filter(pc.equal(table["evaluation"], pc.max(table["evaluation"])))
    lines = []
    for name in dict.fromkeys(table["algorithm"].to_pylist()):
        line = {"algorithm": name}
        for task in dict.fromkeys(table["task"].to_pylist()):
            exact = reported(table, algorithm=name, task=task)["exact"].to_numpy()
            line[task] = f"{exact.mean():.3f} ({exact.min():.3f})"
        lines.append(line)
    return lines


def side_table(table: pa.Table, kind: str) -> Lines:
    """Of pieces beside the main table: the mean of all runs at the start and at the end, with the least and the greatest."""
    rows = reported(table, kind=kind).to_pylist()
    last = max((row["evaluation"] for row in rows), default=0)
    lines = []
    for where in dict.fromkeys(tuple(row[key] for key in OF_PIECE) for row in rows):
        of_piece = [row for row in rows if tuple(row[key] for key in OF_PIECE) == where]
        start = [row["exact"] for row in of_piece if row["evaluation"] == 0]
        end = [row["exact"] for row in of_piece if row["evaluation"] == last]
        named = {key: str(value) for key, value in zip(OF_PIECE, where, strict=True) if value != ""}
        of_runs = {"of runs": f"{min(end):.3f} to {max(end):.3f}"}
        lines.append(
            named | {"start": f"{np.mean(start):.3f}", "end": f"{np.mean(end):.3f}"} | of_runs
        )
    return lines


def fits_table(found: Sequence[Scores], rng: np.random.Generator) -> Lines:
    """ScaleRL's sigmoid of each algorithm's mean over sampled tokens, with intervals over runs; and how far the curve's
    second half is from what its first half predicts.
    """
    lines = []
    for one in found:
        curve = one.curves.mean(axis=1)
        draws = rng.integers(len(curve), size=(FITS, len(curve)))
        fits = [_fit(one.tokens, curve[draw].mean(axis=0)) for draw in draws]
        whole = _fit(one.tokens, curve.mean(axis=0))
        half = (len(one.tokens) + 1) // 2
        predicted = _fit(one.tokens[:half], curve.mean(axis=0)[:half])(one.tokens[half:])
        error = np.abs(predicted - curve.mean(axis=0)[half:]).max()
        lines.append(
            {
                "algorithm": one.name,
                "asymptote": _with_quantiles(
                    whole.asymptote, [fit.asymptote for fit in fits], 1, 3
                ),
                "midpoint, thousand tokens": _with_quantiles(
                    whole.midpoint, [fit.midpoint for fit in fits], 1000, 1
                ),
                "second half off by": f"{error:.3f}",
            }
        )
    return lines


def _fit(tokens: np.ndarray, curve: np.ndarray) -> statistics.Sigmoid:
    # The first point is the start, which is measured: at 0 tokens the sigmoid is there.
    return statistics.fit(tokens[1:], curve[1:], start=float(curve[0]))


def _with_quantiles(value: float, values: Sequence[float], unit: float, digits: int) -> str:
    low, high = np.quantile(values, [0.025, 0.975])
    return f"{value / unit:.{digits}f} [{low / unit:.{digits}f}, {high / unit:.{digits}f}]"


# ---- sentences ---------------------------------------------------------------------------------


def sentences(table: pa.Table, rng: np.random.Generator) -> list[str]:
    """What the intervals allow."""
    found = scores(table, kind="main")
    return [
        _of_the_best(found, rng),
        _of_pairs(found, rng),
        *_of_sampling(found, rng),
        *_of_staleness(table, rng),
        *_of_controls(table),
        _of_the_bar(table),
    ]


def _of_the_best(found: Sequence[Scores], rng: np.random.Generator) -> str:
    first = max(found, key=lambda one: statistics.interquartile_mean(one.final))
    others = [one for one in found if one is not first]
    p_values = statistics.holm(
        [statistics.permutation_p(rng, one.final, first.final) for one in others]
    )
    alike = [one.name for one, p in zip(others, p_values, strict=True) if p >= LEVEL]
    return (
        f"{first.name} has the highest interquartile mean, {shown(mean_of(rng, first.final))}; after Holm's correction it is "
        + (f"not told apart from {_listed(alike)}." if alike else "told apart from every other.")
    )


def _of_pairs(found: Sequence[Scores], rng: np.random.Generator) -> str:
    pairs = list(combinations(found, 2))
    p_values = [statistics.permutation_p(rng, a.final, b.final) for a, b in pairs]
    different = int((statistics.holm(p_values) < LEVEL).sum())
    equal = 0
    for a, b in pairs:
        draws = [statistics.resamples(rng, one.final, RESAMPLES // 10) for one in (a, b)]
        equal += statistics.is_equivalent(a.final, b.final, draws, MARGIN)
    return (
        f"Of {len(pairs)} pairs of algorithms {different} differ at the 5% level after Holm's correction, and {equal} are equal "
        f"within {MARGIN}."
    )


def _of_sampling(found: Sequence[Scores], rng: np.random.Generator) -> list[str]:
    """One sentence, where there are algorithms of both sorts."""
    offline = [one.final for one in found if one.name in OFFLINE]
    online = [one.final for one in found if one.name not in OFFLINE]
    if not (offline and online):
        return []
    # Algorithms beside each other as if they were tasks: each draws its runs by itself.
    difference = change(rng, np.concatenate(online, axis=1), np.concatenate(offline, axis=1))
    return [
        f"Those that sample from what they train end {shown(difference)} above those that read the start's completions, in "
        "interquartile means over all of each."
    ]


def _of_staleness(table: pa.Table, rng: np.random.Generator) -> list[str]:
    old = reported(table, kind="staleness")
    if not len(old):
        return []
    most = pc.max(old["staleness"]).as_py()
    task = old["task"][0].as_py()
    fresh = {one.name: one for one in scores(table, kind="main", task=task)}
    changes = {
        one.name: change(rng, one.final, fresh[one.name].final)
        for one in scores(table, kind="staleness", staleness=most)
    }
    worse = [f"{name} ({shown(by)})" for name, by in changes.items() if by.high < 0]
    same = [name for name, by in changes.items() if by.high >= 0]
    parts = []
    if worse:
        parts.append(f"costs {_listed(worse)}")
    if same:
        parts.append(f"costs nothing that the interval shows for {_listed(same)}")
    return [f"Sampling from a policy {most} steps old, on {task}, " + ", and ".join(parts) + "."]


def _of_controls(table: pa.Table) -> list[str]:
    lines = []
    for name in dict.fromkeys(reported(table, kind="control")["control"].to_pylist()):
        curves = np.concatenate(
            [
                one.curves.reshape(-1, one.curves.shape[-1])
                for one in scores(table, "task", kind="control", control=name)
            ]
        )
        lines.append(
            f"{name} {curves[:, 0].mean():.2f} → {curves[:, -1].mean():.2f} (at most {curves[:, -1].max():.2f})"
        )
    return (
        [f"With other rewards {BASE} goes, in the mean of all tasks: {', '.join(lines)}."]
        if lines
        else []
    )


def _of_the_bar(table: pa.Table) -> str:
    """How many tasks each algorithm that samples learns in every run."""
    ends = reported(table, kind="main")
    ends = ends.filter(pc.equal(ends["evaluation"], pc.max(ends["evaluation"])))
    least = ends.group_by(["algorithm", "task"]).aggregate([("exact", "min")]).to_pylist()
    learned = {row["algorithm"]: 0 for row in least if row["algorithm"] not in OFFLINE}
    for row in least:
        if row["algorithm"] in learned and row["exact_min"] >= BAR:
            learned[row["algorithm"]] += 1
    number = len({row["task"] for row in least})
    fewer = [f"{name} ({tasks})" for name, tasks in learned.items() if tasks < min(3, number)]
    return (
        f"Of {len(learned)} algorithms that sample, {len(learned) - len(fewer)} end at {BAR} or "
        f"above in every run of at least {min(3, number)} of the {number} tasks"
        + (f"; of fewer: {_listed(fewer)}." if fewer else ".")
    )


def _listed(names: Sequence[str]) -> str:
    *rest, last = names
    return f"{', '.join(rest)} and {last}" if rest else last
