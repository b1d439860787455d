"""Callbacks of a run that end it where it goes wrong; its last checkpoints are from before.

    grpo.main(…, callbacks=[rlhf.guards.loss_spike(), rlhf.guards.kl_above(20.0)])

A run that one of them ends is saved and exported as at its end; `--resume` goes on with it.
"""

import math
import statistics
import sys
from collections import deque

from rlhf import hosts
from rlhf.typing import Callback


def loss_spike(deviations: float = 6.0, *, window: int = 50, metric: str = "loss") -> Callback:
    """Ends the run at a line whose loss is more than so many standard deviations above the mean of
    the last lines.

    Args:
      deviations: of the lines before, that are too many.
      window: lines of the log that are compared with; before there are as many the run never ends.
      metric: another metric than the loss.  Lines without it, or with NaN, are passed over: steps
        that cannot be taken are counted by `--max_skipped`.

    Raises: ValueError where `deviations` is not above 0, or `window` is below 2.

    >>> guard = loss_spike(3.0, window=2)
    >>> [guard(step, {"loss": loss}) for step, loss in enumerate([1.0, 1.2, 1.1])]
    [False, False, False]
    """
    if not deviations > 0 or window < 2:
        raise ValueError(
            f"deviations {deviations} must be above 0, and window {window} at least 2 lines"
        )
    before: deque[float] = deque(maxlen=window)

    def guard(step: int, metrics: dict[str, float]) -> bool:
        value = metrics.get(metric, math.nan)
        if not math.isfinite(value):
            return False
        full = len(before) == window
        bound = (
            statistics.fmean(before) + deviations * statistics.stdev(before) if full else math.inf
        )
        before.append(value)
        return _ends(step, metric, value, bound, f"{deviations} deviations above the lines before")

    return guard


def kl_above(bound: float, *, lines: int = 1, metric: str = "objective/kl") -> Callback:
    """Ends the run where the KL to the reference is above a bound.

    Args:
      bound: the largest KL that is let pass, in nats.
      lines: of the log, one after the other, that must be above it.
      metric: `objective/kl` is in nats a completion, `kl` in nats a token; lines without it are passed over.

    Raises: ValueError where `bound` is not above 0, or `lines` is below 1.

    >>> guard = kl_above(10.0, lines=2)
    >>> [guard(step, {"objective/kl": kl}) for step, kl in enumerate([11.0, 9.0, 12.0])]
    [False, False, False]
    """
    if not bound > 0 or lines < 1:
        raise ValueError(f"bound {bound} must be above 0, and lines {lines} at least 1")
    above = 0

    def guard(step: int, metrics: dict[str, float]) -> bool:
        nonlocal above
        if metric not in metrics:
            return False
        above = above + 1 if metrics[metric] > bound else 0
        return above >= lines and _ends(step, metric, metrics[metric], bound, "the bound")

    return guard


def _ends(step: int, metric: str, value: float, bound: float, what: str) -> bool:
    """Whether a value is beyond its bound, which is said."""
    if value > bound and hosts.is_first():
        print(
            f"step {step}: {metric} {value:.4g} is above {bound:.4g}, {what}; the run ends",
            file=sys.stderr,
        )
    return value > bound
