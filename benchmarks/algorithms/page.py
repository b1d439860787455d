"""The page: tables, plots and sentences of what the runs say."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pyarrow as pa

from benchmarks.algorithms import findings, statistics, study
from benchmarks.algorithms.findings import BASE, MARGIN, RESAMPLES, Lines, Scores

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HEAD = """# Algorithms against each other

Made by `python -m benchmarks.algorithms --size {size}`.  Every algorithm learns from as many sampled completions, takes two
optimizer steps on those of a step, starts with the same weights, and was tuned by a sweep of {points} points (learning rate ×
one more hyper-parameter) on other seeds.  Scores are shares of right completions on held-out prompts, at temperature 1, of
{seeds} runs each.
"""
LEGEND = """- *interquartile mean*: of all runs of all tasks at the end, with the 95% interval of {resamples} stratified resamples.
- *P(better than {base})*: of a run, ties half, the mean over tasks; *p, Holm*: of a permutation test that it is 1/2,
  adjusted for all lines.
- *within {margin}*: whether the two interquartile means are equal up to that margin, by two one-sided tests at 5%.
- *seconds a run*: of the compiled program, divided by the runs in it; other programs ran beside it.
"""
LIMITS = """What they do not say: an order of those that are not told apart; anything of models that are larger than a few thousand
parameters, of tasks that are not generated, of rewards that are learned, or of longer runs.  Each algorithm is the recipe's
own update with its defaults but for what was tuned.
"""
# Kinds of pieces beside the main table.
TABLES = {
    "control": f"Controls: {BASE} paid with other rewards",
    "staleness": "Samples of an older policy",
    "size": "Other widths of the model",
}
FITS = """`R(C) = R0 + (A - R0) / (1 + (C_mid / C)^B)` over sampled tokens C, of the mean over tasks, with 95% intervals over
runs.  *second half off by*: the farthest point of the curve's second half from a fit of its first half alone.
"""
BANDIT = """Total variation, the mean over contexts, between the policy at the end and `π_ref e^{r/β} / Z`, the best policy under a KL
to the reference; and what theory says each algorithm ends at.  `benchmarks/algorithms/closed_form.py` derives it.
"""


def write(
    table: pa.Table,
    bandit: list[dict[str, str | float]],
    folder: Path,
    about: dict[str, str],
    rng: np.random.Generator,
) -> str:
    """Writes `algorithms.md` and its plots; returns the text.

    Args:
      table: of `study.run_all`.
      bandit: of `closed_form.table`.
      folder: for the files.
      about: what was run, where.
      rng: of the resamples.
    """
    found = findings.scores(table, kind="main")
    sides = {title: findings.side_table(table, kind) for kind, title in TABLES.items()}
    said = [f"{i}. {text}" for i, text in enumerate(findings.sentences(table, rng), 1)]
    legend = LEGEND.format(resamples=RESAMPLES, base=BASE, margin=MARGIN)
    parts = [
        HEAD.format(size=about["size"], points=study.POINTS, seeds=len(found[0].final)),
        _as_table(findings.main_table(found, rng)),
        legend,
        "![Learning curves](algorithms-curves.png)\n\n![Profiles](algorithms-profiles.png)\n",
        "## What the intervals allow\n",
        "\n".join(said) + "\n",
        LIMITS,
        "## By task: mean of the runs at the end (the least of them)\n",
        _as_table(findings.tasks_table(table)),
        "## Fits over compute\n",
        FITS,
        _as_table(findings.fits_table(found, rng)),
        *(f"## {title}\n\n{_as_table(lines)}" for title, lines in sides.items() if lines),
        "## A bandit whose optimum is known\n",
        BANDIT,
        _as_table([{name: _digits(value) for name, value in line.items()} for line in bandit]),
        ", ".join(f"{key} {value}" for key, value in about.items()) + "\n",
    ]
    text = "\n".join(parts)
    (folder / "algorithms.md").write_text(text)
    plot_curves(found, folder / "algorithms-curves.png")
    plot_profiles(found, folder / "algorithms-profiles.png")
    return text


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


def _digits(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.4f}"


def _as_table(lines: Lines) -> str:
    rows = [list(lines[0]), ["---"] * len(lines[0]), *[list(line.values()) for line in lines]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
