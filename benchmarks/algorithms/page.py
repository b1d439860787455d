"""The page: what the results say, as tables, plots and sentences that the intervals allow."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.algorithms import statistics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESAMPLES = 20_000
MARGIN = 0.02  # within which two algorithms count as equal; set before the first run
BASE = "GRPO"
LEVEL = 0.05


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


def scores(table: pa.Table, **where: object) -> list[Scores]:
    """Each algorithm's reported runs, in the order of the table.

    Args:
      table: of `study.run_all`.
      where: column -> its value.
    """
    for column, value in {"purpose": "final", **where}.items():
        table = table.filter(pc.equal(table[column], value))
    found = []
    for name in dict.fromkeys(table["algorithm"].to_pylist()):
        of_name = table.filter(pc.equal(table["algorithm"], name))
        of_name = of_name.sort_by([(key, "ascending") for key in ("seed", "task", "evaluation")])
        shape = [len(set(of_name[key].to_pylist())) for key in ("seed", "task", "evaluation")]
        curves = of_name["exact"].to_numpy().reshape(shape)
        tokens = of_name["tokens"].to_numpy().reshape(shape).mean(axis=(0, 1))
        seconds = float(np.mean(of_name["run_seconds"].to_numpy()))
        found.append(Scores(name, curves, tokens, seconds))
    return found


def main_table(found: Sequence[Scores], rng: np.random.Generator) -> list[dict[str, str]]:
    """A line for each algorithm: its interquartile mean, and how it does against the base."""
    draws = {one.name: statistics.resamples(rng, one.final, RESAMPLES) for one in found}
    base = next((one for one in found if one.name == BASE), found[0])
    others = [one for one in found if one is not base]
    p_values = statistics.holm(
        [statistics.permutation_p(rng, one.final, base.final) for one in others]
    )
    adjusted = dict(zip((one.name for one in others), p_values, strict=True))
    lines = []
    for one in found:
        mean = statistics.interval(statistics.interquartile_mean, [one.final], [draws[one.name]])
        line = {
            "algorithm": one.name,
            "interquartile mean": f"{mean.estimate:.3f} [{mean.low:.3f}, {mean.high:.3f}]",
            "at the start": f"{one.curves[..., 0].mean():.3f}",
            "least of all runs": f"{one.final.min():.3f}",
            "thousand tokens": f"{one.tokens[-1] / 1000:.0f}",
            "seconds a run": f"{one.seconds:.2f}",
            f"P(better than {base.name})": "",
            "p, Holm": "",
            f"within {MARGIN}": "",
        }
        if one is not base:
            pair = [draws[one.name], draws[base.name]]
            better = statistics.interval(
                statistics.probability_of_improvement, [one.final, base.final], pair
            )
            equal = statistics.is_equivalent(one.final, base.final, pair, MARGIN)
            line[f"P(better than {base.name})"] = (
                f"{better.estimate:.2f} [{better.low:.2f}, {better.high:.2f}]"
            )
            line["p, Holm"] = f"{adjusted[one.name]:.3f}"
            line[f"within {MARGIN}"] = "yes" if equal else "not shown"
        lines.append(line)
    return sorted(lines, key=lambda line: line["interquartile mean"], reverse=True)


def distinguishable(found: Sequence[Scores], rng: np.random.Generator) -> tuple[int, int]:
    """Pairs of algorithms that differ after Holm's correction over all pairs, and all pairs."""
    pairs = list(combinations(found, 2))
    p_values = [statistics.permutation_p(rng, a.final, b.final) for a, b in pairs]
    return int((statistics.holm(p_values) < LEVEL).sum()), len(pairs)


def plot_curves(found: Sequence[Scores], file: Path) -> None:
    """Interquartile means along sampled tokens, and along seconds."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for one in found:
        means = statistics.interquartile_mean(np.moveaxis(one.curves, -1, 0))
        share = np.linspace(0, 1, len(means))
        axes[0].plot(one.tokens / 1000, means, label=one.name)
        axes[1].plot(share * one.seconds, means, label=one.name)
    axes[0].set(xlabel="thousand sampled tokens", ylabel="right completions, interquartile mean")
    axes[1].set(xlabel="seconds of a run, others beside it")
    axes[1].legend(fontsize=6, ncols=2)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def plot_profiles(found: Sequence[Scores], file: Path) -> None:
    """The share of runs above every score."""
    thresholds = np.linspace(0, 1, 101)
    figure, axis = plt.subplots(figsize=(6, 4))
    for one in found:
        axis.plot(thresholds, statistics.profile(one.final, thresholds), label=one.name)
    axis.set(xlabel="right completions τ", ylabel="share of runs above τ")
    axis.legend(fontsize=6, ncols=2)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


HEAD = """# Algorithms against each other

Made by `python -m benchmarks.algorithms --size {size}`.  Every algorithm samples, or reads, as many completions a step,
takes two optimizer steps on what it samples, and was tuned by a sweep of as many points, on other seeds.  Scores are
shares of right completions on held-out prompts at temperature 1.

- *interquartile mean*: of all runs of all tasks at the end, with the 95% interval of {resamples} stratified resamples.
- *P(better than {base})*: of a run, ties half, the mean over tasks; *p, Holm*: of a permutation test that it is 1/2,
  adjusted for all lines.
- *within {margin}*: whether the two interquartile means are equal up to that margin, by two one-sided tests at 5%.
"""


def write(table: pa.Table, folder: Path, about: dict[str, str], rng: np.random.Generator) -> str:
    """Writes `algorithms.md` and its plots; returns the text."""
    found = scores(table, kind="main")
    parts = [
        HEAD.format(size=about["size"], resamples=RESAMPLES, base=BASE, margin=MARGIN),
        _as_table(main_table(found, rng)),
        "![Learning curves](algorithms-curves.png)\n\n![Profiles](algorithms-profiles.png)\n",
    ]
    different, pairs = distinguishable(found, rng)
    parts.append(
        f"Of {pairs} pairs of algorithms {different} differ at the 5% level after Holm's correction.\n"
    )
    for kind, title in TABLES.items():
        if lines := _lines_of(table, kind):
            parts.append(f"## {title}\n\n{_as_table(lines)}")
    parts.append(", ".join(f"{key} {value}" for key, value in about.items()) + "\n")
    text = "\n".join(parts)
    (folder / "algorithms.md").write_text(text)
    plot_curves(found, folder / "algorithms-curves.png")
    plot_profiles(found, folder / "algorithms-profiles.png")
    return text


# Kinds of pieces beside the main table.
TABLES = {
    "control": "Controls: GRPO paid with other rewards",
    "staleness": "Samples of an older policy",
    "size": "Other widths of the model",
}


def _lines_of(table: pa.Table, kind: str) -> list[dict[str, str]]:
    """Means of all runs at the start and at the end, with the least and the greatest."""
    table = table.filter(pc.equal(table["purpose"], "final"))
    table = table.filter(pc.equal(table["kind"], kind))
    last = pc.max(table["evaluation"]).as_py() if len(table) else 0
    keys = ("task", "algorithm", "hidden_size", "staleness", "control")
    lines = []
    rows = table.to_pylist()
    for where in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        of_piece = [row for row in rows if tuple(row[key] for key in keys) == where]
        start = [row["exact"] for row in of_piece if row["evaluation"] == 0]
        end = [row["exact"] for row in of_piece if row["evaluation"] == last]
        shown = {key: str(value) for key, value in zip(keys, where, strict=True) if value != ""}
        lines.append(
            {
                **shown,
                "start": f"{np.mean(start):.3f}",
                "end": f"{np.mean(end):.3f}",
                "of runs": f"{min(end):.3f} to {max(end):.3f}",
            }
        )
    return lines


def _as_table(lines: Sequence[dict[str, str]]) -> str:
    rows = [list(lines[0]), ["---"] * len(lines[0]), *[list(line.values()) for line in lines]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
