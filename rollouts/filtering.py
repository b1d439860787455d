"""What is worth a gradient: groups whose rewards differ, and the samples of a group that differ
most.

Rewards are `[P, G]`, prompts × samples; a NaN marks a sample that could not be scored, and is left
out.  Groups and samples are chosen by index, and `take_groups` and `take_samples` fetch them from
any pytree of rows.
"""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf.fields import documented
from rlhf.losses import groups as _groups
from rlhf.rollouts.types import Array, Prompts, Rollout, is_here


@documented
class Report(NamedTuple):
    """Where the groups of `dynamic_sampling` went: `selected + surplus + dropped_…` were sampled.
    Python integers.

    Attributes:
      rounds: chunks of prompts that were used up.
      selected: informative groups in the result.
      surplus: informative groups that it had no room for.
      dropped_high: groups without a difference, all of them good.
      dropped_low: groups without a difference, all of them bad.
      dropped_unscored: groups with fewer than two scored samples.
      short: groups of the result that fill it up, their masks False and their rewards NaN.
    """

    rounds: int
    selected: int
    surplus: int
    dropped_high: int
    dropped_low: int
    dropped_unscored: int
    short: int


@documented
class Collected(NamedTuple):
    """What `dynamic_sampling` returns.

    Attributes:
      rows: as `sample` returned them, groups * num_samples rows.
      rewards: [groups, num_samples] float32.
      report: how many groups were selected, and why the others were not.
    """

    rows: Any
    rewards: np.ndarray
    report: Report


def informative(rewards, *, tolerance=0.0) -> Array:
    """`max_g r - min_g r > tolerance`: which groups have a gradient  (DAPO's dynamic sampling,
    arXiv:2503.14476, §3.2).

    Args:
      rewards: `[P, G]`, NaN where a sample could not be scored.
      tolerance: the largest difference that counts as none, in units of reward.

    Returns: `[P]` bool; False where fewer than two samples are scored.

    Raises: ValueError where `rewards` is not `[P, G]` or the tolerance is below 0.

    >>> informative(jnp.array([[1., 0.], [1., 1.], [1., jnp.nan]])).tolist()
    [True, False, False]
    """
    if isinstance(tolerance, int | float) and not tolerance >= 0:
        raise ValueError(f"tolerance is a difference of rewards, at least 0, but is {tolerance}")
    rewards = _grouped(rewards)
    unscored = jnp.isnan(rewards)
    # With fewer than two scored samples high - low is 0, or minus infinity: not informative.
    low = jnp.where(unscored, jnp.inf, rewards).min(-1)
    high = jnp.where(unscored, -jnp.inf, rewards).max(-1)
    return high - low > tolerance


def best_groups(rewards, n: int) -> Array:
    """The `n` groups with the largest standard deviation: what remains of more groups than a step
    takes.

    Args:
      rewards: `[P, G]`, NaN where a sample could not be scored.
      n: static.

    Returns: `[n]` int32, the largest first, the first of equals; for `take_groups`.

    Raises: ValueError where `rewards` is not `[P, G]` or n is not in 1 … P.

    >>> best_groups(jnp.array([[1., 1.], [1., 0.], [3., 0.]]), 2).tolist()
    [2, 1]
    """
    rewards = _grouped(rewards)
    _check_number("n", n, rewards.shape[0], "groups")
    return jax.lax.top_k(_groups.group_std(rewards, correction=0)[:, 0], n)[1]


@partial(jax.jit, static_argnames="k")
def down_sample(rewards, k: int) -> Array:
    """The `k` samples of a group whose rewards vary most: its i best and k - i worst  (PODS,
    arXiv:2504.13818).

    Compare within the groups that are left: advantages are made of
    `take_along_axis(rewards, result, axis=1)`.

    Args:
      rewards: `[P, G]`; NaN where a sample could not be scored, which is chosen where there are
        fewer than k others.
      k: static.

    Returns: `[P, k]` int32, ascending; for `take_samples`.

    Raises: ValueError where `rewards` is not `[P, G]` or k is not in 1 … G.

    >>> down_sample(jnp.array([[1., 0., 0.9, 0.2]]), 2).tolist()
    [[0, 1]]
    """
    rewards = _grouped(rewards)
    size = rewards.shape[1]
    _check_number("k", k, size, "samples a group")
    scored = ~jnp.isnan(rewards)
    number = scored.sum(-1, keepdims=True)
    many = jnp.minimum(number, k)
    # NaN sorts last, so that the scored ones are the first `number` of the order.
    order = jnp.argsort(rewards, axis=-1)
    centered = jnp.where(scored, rewards - _groups.group_mean(rewards), 0.0)
    ordered = jnp.take_along_axis(centered, order, axis=-1)
    # i, how many of the best are taken: all of 0 … k are tried, and the largest variance wins.
    best = jnp.arange(k + 1)[None, :]

    # Sums over the many - i worst and the i best, for every i at once: [P, k + 1]. Differences of a
    # cumulative sum make them cheap.
    def total(x):
        cumulative = jnp.pad(jnp.cumsum(x, axis=-1), ((0, 0), (1, 0)))
        of_worst = lambda count: jnp.take_along_axis(cumulative, jnp.maximum(count, 0), axis=-1)
        return of_worst(many - best) + of_worst(number) - of_worst(number - best)

    # Σ x² - (Σ x)² / m: the variance times m. Centred before, so that it does not cancel.
    squares = total(ordered**2) - total(ordered) ** 2 / jnp.maximum(many, 1)
    i = jnp.argmax(jnp.where(best <= many, squares, -jnp.inf), axis=-1, keepdims=True)
    rank = jnp.arange(size)[None, :]
    # The unscored come after the best in the order, and fill up where there are too few.
    chosen = (rank < many - i) | ((rank >= number - i) & (rank < number - many + k))
    return jnp.sort(
        jnp.take_along_axis(order, jnp.argsort(~chosen, axis=-1)[:, :k], axis=-1), axis=-1
    )


def take_groups(tree: Any, which, num_samples: int) -> Any:
    """The rows of some groups: every leaf `[P * G, ...]` -> `[N * G, ...]`; leaves without axes
    stay.

    Args:
      tree: a pytree of rows, such as a `Rollout`; a prompt's samples contiguous.
      which: `[N]` indices of groups, in any order, also repeated; or `[P]` bool, outside of jit.
      num_samples: G.

    Raises: ValueError where leaves differ in their rows, G does not divide them, or `which` does
    not fit the groups.

    >>> take_groups(jnp.arange(6), jnp.array([2, 0]), 2).tolist()
    [4, 5, 0, 1]
    """
    which = _index(which)
    groups = _num_groups(tree, num_samples)
    if which.dtype == bool:
        if which.shape != (groups,):
            raise ValueError(
                f"which {list(which.shape)} but there are {groups} groups of {num_samples} samples"
            )
        which = np.flatnonzero(which)
    if which.ndim != 1:
        raise ValueError(f"which {list(which.shape)} but it must be [N], one index a group")
    _check_range(which, groups)
    return _take(
        tree,
        _or_none(which, groups, groups)[:, None] * num_samples + np.arange(num_samples)[None, :],
    )


def take_samples(tree: Any, which, num_samples: int) -> Any:
    """The rows of some samples of every group: every leaf `[P * G, ...]` -> `[P * k, ...]`; leaves
    without axes stay.

    Args:
      tree: a pytree of rows, such as a `Rollout`; a prompt's samples contiguous.
      which: `[P, k]` indices of samples, 0 … G - 1.
      num_samples: G.

    Raises: ValueError where leaves differ in their rows, G does not divide them, or `which` does
    not fit the groups.

    >>> take_samples(jnp.arange(6), jnp.array([[1, 0], [1, 1], [0, 1]]), 2).tolist()
    [1, 0, 3, 3, 4, 5]
    """
    which = _index(which)
    groups = _num_groups(tree, num_samples)
    if which.ndim != 2 or which.shape[0] != groups:
        raise ValueError(
            f"which {list(which.shape)} but there are {groups} groups of {num_samples} samples"
        )
    _check_range(which, num_samples)
    which = _or_none(which, num_samples, groups * num_samples)
    return _take(tree, which + np.arange(groups)[:, None] * num_samples)


def concatenate(trees: list) -> Any:
    """The rows of several pytrees of the same structure, one after another; leaves without axes are
    the first one's.

    Raises: ValueError where rows differ in shape.

    >>> concatenate([np.arange(2), np.arange(3)]).tolist()
    [0, 1, 0, 1, 2]
    """

    def join(path, first, *others):
        if not np.ndim(first):
            return first
        for other in others:
            if np.shape(other)[1:] != np.shape(first)[1:]:
                raise ValueError(
                    f"{jax.tree_util.keystr(path) or 'rows'} {list(np.shape(first))} but also "
                    f"{list(np.shape(other))}: rows of "
                    "different lengths do not go into one batch; pad all prompts to one length"
                )
        # NumPy stays on the host: rounds that are thrown away are not copied to the device.
        return (np if isinstance(first, np.ndarray) else jnp).concatenate([first, *others])

    return jax.tree_util.tree_map_with_path(join, *trees)


def num_rows(tree: Any) -> int:
    """B of a pytree of rows: the leading axis of every leaf that has axes.

    Raises: ValueError where leaves differ in it, or none has axes.

    >>> num_rows({"tokens": np.zeros((2, 5)), "temperature": 1.0})
    2
    """
    sizes = {
        jax.tree_util.keystr(path): np.shape(x)[0]
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if np.ndim(x)
    }
    if len(set(sizes.values())) != 1:
        raise ValueError(
            f"a pytree of rows has one leading axis, but its leaves have {sizes or 'no axes'}"
        )
    return next(iter(sizes.values()))


def group_scores(scores, rows: Any, num_samples: int) -> Array:
    """What a reward function says of rows, as rewards: B numbers, `[B]` or a list with None ->
    `[P, G]` float32, NaN for None.

    Raises: ValueError where there is not one number a row, or G does not divide the rows.

    >>> group_scores([1.0, None], np.zeros(2), 2).tolist()
    [[1.0, nan]]
    """
    groups = _num_groups(rows, num_samples)
    scores = scores if isinstance(scores, jax.Array) else np.asarray(scores, np.float32)
    if scores.shape != (groups * num_samples,):
        raise ValueError(
            f"score returned {list(scores.shape)} but there are {groups * num_samples} rows; one "
            "number a row"
        )
    return jnp.asarray(_groups.split(scores, size=num_samples), jnp.float32)


def dynamic_sampling(
    sample: Callable,
    score: Callable,
    prompts: Iterable,
    key: Array,
    *,
    groups: int,
    num_samples: int,
    max_rounds: int,
    accept: Callable = informative,
    solved: float = 0.5,
) -> Collected:
    """Samples chunk after chunk of prompts until `groups` groups are informative  (DAPO,
    arXiv:2503.14476, §3.2).

    The result has `groups * num_samples` rows whatever happens, so that a jitted step compiles
    once.  Where the rounds or the prompts run out, uninformative groups fill it up: their masks are
    False, so that they weigh nothing, and their rewards NaN, so that their advantages are 0.  Plain
    Python around the two functions, which holds all rounds' rows; `key` is consumed.

    Args:
      sample: `(chunk, key) -> Rollout` of `[P * num_samples, T]`, a prompt's samples contiguous; or
        a pytree of rows that holds one, together with columns that `score` reads.
      score: `(what sample returned) -> [P * num_samples]` rewards, or a list of them; NaN or None:
        not scorable.
      prompts: an iterable of chunks, `Prompts` or whatever `sample` takes; no more is taken of it
        than needed.
      groups: wanted.
      num_samples: G, samples a prompt.
      max_rounds: the most chunks.
      accept: `(rewards [P, G]) -> [P]` bool; for another tolerance
        `partial(informative, tolerance=0.1)`.
      solved: a dropped group whose mean reward is above this counts as all high, else as all low.

    Returns: `Collected(rows, rewards, report)`, groups in the order in which they were sampled.

    Raises: ValueError on counts below 1, no prompts at all, and wrong shapes of what the functions
    return, TypeError where
      `sample` returns no `Rollout`.

    >>> row = lambda tokens: Rollout(tokens, tokens > 0, tokens, tokens, tokens, tokens, tokens[:, 0] > 0, np.float32(1))
    >>> chunks = (np.array([[i, 1], [i, 0]]) for i in (7, 8))  # one prompt each, with two samples
    >>> sample, score = lambda chunk, key: row(chunk), lambda rollout: rollout.tokens[:, 1]
    >>> got = dynamic_sampling(sample, score, chunks, jax.random.key(0), groups=3, num_samples=2, max_rounds=9)
    >>> got.rewards.tolist(), got.report.rounds, got.report.short
    ([[1.0, 0.0], [1.0, 0.0], [nan, nan]], 2, 1)
    """
    for name, value in (
        ("groups", groups),
        ("num_samples", num_samples),
        ("max_rounds", max_rounds),
    ):
        if value < 1:
            raise ValueError(f"dynamic_sampling: {name} must be at least 1, but is {value}")
    if isinstance(prompts, Prompts):
        raise TypeError(
            "dynamic_sampling takes an iterable of chunks but got one Prompts; write [prompts], or "
            "cut it in chunks"
        )
    rows = []
    scores = []
    accepted = []
    for number, chunk in enumerate(islice(prompts, max_rounds)):
        # The chunk's number is folded into the key: how many rounds follow changes nothing.
        rows.append(sample(chunk, jax.random.fold_in(key, number)))
        if not any(map(_is_rollout, jax.tree.leaves(rows[-1], is_leaf=_is_rollout))):
            raise TypeError(
                f"sample returned {type(rows[-1]).__name__}; it must be a Rollout, or a pytree "
                "that holds one"
            )
        scores.append(np.asarray(group_scores(score(rows[-1]), rows[-1], num_samples)))
        accepted.append(np.asarray(accept(scores[-1])))
        if accepted[-1].shape != scores[-1].shape[:1] or accepted[-1].dtype != bool:
            raise ValueError(
                f"accept returned {accepted[-1].dtype} {list(accepted[-1].shape)} but must return "
                "[P] bool"
            )
        if sum(map(np.sum, accepted)) >= groups:
            break
    if not rows:
        raise ValueError("dynamic_sampling: prompts are empty; give at least one chunk")
    rewards = np.concatenate(scores)
    keep = np.concatenate(accepted)
    real = np.arange(groups) < keep.sum()
    # Informative groups first. `resize` repeats the order where even all groups are too few; those
    # rows are masked out.
    order = np.resize(np.argsort(~keep, kind="stable"), groups)
    taken = _mask(take_groups(concatenate(rows), order, num_samples), np.repeat(real, num_samples))
    return Collected(
        taken,
        np.where(real[:, None], rewards[order], np.nan),
        _report(rewards, keep, groups, len(rows), solved),
    )


def _mask(tree: Any, real: np.ndarray) -> Any:
    """Rollouts in a pytree, their masks False where `real [B]` is."""
    mask = lambda x: x._replace(mask=x.mask & real[:, None]) if _is_rollout(x) else x
    # The rollout may stand anywhere in the tree, beside columns that a reward function reads.
    return jax.tree.map(mask, tree, is_leaf=_is_rollout)


def _is_rollout(x) -> bool:
    return isinstance(x, Rollout)


def _report(rewards, keep, groups: int, rounds: int, solved: float) -> Report:
    unscored = (~np.isnan(rewards)).sum(-1) < 2
    high = np.asarray(_groups.group_mean(rewards))[:, 0] > solved
    found = int(keep.sum())
    return Report(
        rounds=rounds,
        selected=min(found, groups),
        surplus=max(found - groups, 0),
        dropped_high=int((~keep & ~unscored & high).sum()),
        dropped_low=int((~keep & ~unscored & ~high).sum()),
        dropped_unscored=int((~keep & unscored).sum()),
        short=max(groups - found, 0),
    )


def _grouped(rewards) -> Array:
    if np.ndim(rewards) != 2:
        raise ValueError(
            f"rewards must be [P, G], prompts × samples, but are {list(np.shape(rewards))}: use "
            "groups.split"
        )
    return jnp.asarray(rewards, float)


def _index(which) -> Array:
    return which if isinstance(which, jax.Array) else np.asarray(which)


def _take(tree: Any, rows) -> Any:
    """These rows of every leaf; of one that is not there NaN, or the least integer."""
    # "fill" makes NaN of rows that are not there, where the default would take the nearest.
    at = lambda x, i: x[i] if isinstance(i, np.ndarray) else jnp.take(x, i, axis=0, mode="fill")
    return jax.tree.map(lambda x: at(x, rows.reshape(-1)) if np.ndim(x) else x, tree)


def _or_none(which, size: int, none: int):
    """Indices; `none` in place of traced ones that are out of range, which no check has looked at."""
    return (
        which
        if isinstance(which, np.ndarray)
        else jnp.where((which >= 0) & (which < size), which, none)
    )


def _num_groups(tree: Any, num_samples: int) -> int:
    rows = num_rows(tree)
    if num_samples < 1 or rows % num_samples:
        raise ValueError(
            f"groups of {num_samples} samples but {rows} rows: the group size must divide them"
        )
    return rows // num_samples


def _check_range(which, size: int) -> None:
    if isinstance(which, jax.Array) and not is_here(which):
        return
    if which.size and not 0 <= which.min() <= which.max() < size:
        raise ValueError(
            f"which has indices {which.min()} … {which.max()} but they must be in 0 … {size - 1}"
        )


def _check_number(name: str, value: int, most: int, things: str) -> None:
    if not 1 <= value <= most:
        raise ValueError(
            f"{name} is {value} but there are {most} {things}; {name} must be in 1 … {most}"
        )
