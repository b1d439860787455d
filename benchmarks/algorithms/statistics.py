"""What final scores of several algorithms say: means with intervals, comparisons, fits.

Scores are `[runs, tasks]` in float64, a run a seed.  Random numbers come from a generator that the
caller gives, or from resamples made with it, so that every figure can be made again.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

Array = np.ndarray


class Interval(NamedTuple):
    """An estimate with its percentile interval."""

    estimate: Array
    low: Array
    high: Array


def interquartile_mean(scores: Array) -> Array:
    """Mean of the middle half of all runs of all tasks, `[.., runs, tasks]` -> `[..]`
    (arXiv:2108.13264).

    >>> interquartile_mean(np.array([[0.0], [1.0], [2.0], [9.0]])).item()
    1.5
    """
    pooled = np.sort(scores.reshape(*scores.shape[:-2], -1), axis=-1)
    cut = pooled.shape[-1] // 4
    return pooled[..., cut : pooled.shape[-1] - cut].mean(axis=-1)


def resamples(rng: np.random.Generator, scores: Array, number: int) -> Array:
    """Runs with replacement, within each task by themselves: `[number, runs, tasks]` indices."""
    return rng.integers(len(scores), size=(number, *scores.shape))


def resampled(scores: Array, indices: Array) -> Array:
    """The scores of runs that were drawn: `[runs, tasks]`, `[.., runs, tasks]` -> `[.., runs, tasks]`."""
    return np.take_along_axis(np.broadcast_to(scores, indices.shape), indices, axis=-2)


def interval(
    statistic: Callable, scores: Sequence[Array], indices: Sequence[Array], level: float = 0.95
) -> Interval:
    """A statistic of one or several algorithms' scores, with its bootstrap percentile interval.

    Args:
      statistic: `([.., runs, tasks], ...) -> [..]`, or with more axes behind.
      scores: an array `[runs, tasks]` for each algorithm.
      indices: of `resamples`, for each of them, all of the same number.
      level: the share of resamples that the interval holds.
    """
    values = statistic(*[resampled(x, of_x) for x, of_x in zip(scores, indices, strict=True)])
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return Interval(statistic(*scores), low, high)


def profile(scores: Array, thresholds: Array) -> Array:
    """The share of runs above each threshold: `[.., runs, tasks]` -> `[.., thresholds]`
    (arXiv:2108.13264, eq. 3).

    >>> profile(np.array([[0.2, 0.9]]), np.array([0.0, 0.5, 0.9])).tolist()
    [1.0, 0.5, 0.0]
    """
    return (scores[..., None] > thresholds).mean(axis=(-3, -2))


def probability_of_improvement(x: Array, y: Array) -> Array:
    """P(a run of X scores above a run of Y), ties half, averaged over tasks: `[.., runs, tasks]` of
    each -> `[..]`  (arXiv:2108.13264).

    >>> probability_of_improvement(np.array([[1.0], [3.0]]), np.array([[1.0], [2.0]])).item()
    0.625
    """
    x, y = x[..., :, None, :], y[..., None, :, :]
    return ((x > y) + (x == y) / 2).mean(axis=(-3, -2, -1))


def permutation_p(rng: np.random.Generator, x: Array, y: Array, number: int = 10_000) -> float:
    """Two-sided p-value of P(improvement) = 1/2, runs exchanged between X and Y within each task.

    The observed split counts as one of them, so that no p-value is 0  (Phipson and Smyth 2010).
    """
    both = np.concatenate([x, y])
    # Permuting ranks gives the same statistic as permuting scores, without comparing all pairs.
    ranks = stats.rankdata(both, axis=0)
    orders = rng.permuted(np.broadcast_to(ranks, (number, *ranks.shape)), axis=1)
    expected = len(x) * (len(both) + 1) / 2
    distances = np.abs((orders[:, : len(x)].sum(axis=1) - expected).sum(axis=1))
    observed = np.abs((ranks[: len(x)].sum(axis=0) - expected).sum())
    as_extreme = distances >= observed
    return float((1 + as_extreme.sum()) / (1 + number))


def holm(p_values: Sequence[float]) -> Array:
    """p-values adjusted for as many comparisons  (Holm 1979): the chance of one false claim or more
    stays below the level.

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    scaled = p[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty_like(p)
    # No p-value is adjusted below a smaller one's.
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted


def is_equivalent(x: Array, y: Array, indices: Sequence[Array], margin: float) -> bool:
    """Whether two interquartile means differ by less than a margin, by two one-sided tests at 5%: the
    90% interval of their difference lies within it  (Schuirmann 1987).
    """
    found = interval(
        lambda a, b: interquartile_mean(a) - interquartile_mean(b), [x, y], indices, level=0.9
    )
    return bool(-margin < found.low and found.high < margin)


class Sigmoid(NamedTuple):
    """`R(C) = R0 + (A - R0) / (1 + (C_mid / C)^B)`  (ScaleRL, arXiv:2510.13786, eq. 1).

    Attributes:
      start: R0, the score without training.
      asymptote: A, the score that compute without end leads to.
      midpoint: C_mid, the compute at which half of the way is done.
      exponent: B, how steep it is there.
    """

    start: float
    asymptote: float
    midpoint: float
    exponent: float

    def __call__(self, compute: Array) -> Array:
        rise = 1 / (1 + (self.midpoint / compute) ** self.exponent)
        return self.start + (self.asymptote - self.start) * rise


def fit(compute: Array, scores: Array, start: float) -> Sigmoid:
    """The sigmoid with the least squares; compute above 0, scores and asymptote at most 1.

    Args:
      compute: `[points]`, above 0, such as sampled tokens.
      scores: `[points]`.
      start: R0, which is measured and not fitted.
    """

    # Over logarithms: both are positive, and cover several powers of ten.
    def residuals(values):
        asymptote, log_midpoint, log_exponent = values
        return (
            Sigmoid(start, asymptote, np.exp(log_midpoint), np.exp(log_exponent))(compute) - scores
        )

    middle = np.log(compute).mean()
    bounds = [(0.0, middle - 12, -3.0), (1.0, middle + 12, 3.0)]
    guesses = [
        optimize.least_squares(residuals, (top, middle, exponent), bounds=bounds)
        for top in (np.clip(scores.max(), 0.01, 0.99), 0.5)
        for exponent in (0.0, 1.0)
    ]
    asymptote, log_midpoint, log_exponent = min(guesses, key=lambda found: found.cost).x
    return Sigmoid(
        start, float(asymptote), float(np.exp(log_midpoint)), float(np.exp(log_exponent))
    )
