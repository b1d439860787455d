"""What is sampled again: prompts, by how often they are solved, and rows of earlier steps from a
buffer.

Both are states of arrays with pure functions around them: they jit, vmap and donate, and a run that
saves them resumes bitwise.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf.fields import documented
from rlhf.ranges import INT32, Share, between, checked
from rlhf.rollouts.filtering import num_rows
from rlhf.rollouts.types import Array

NEVER = -1e4  # far below the logarithm of any weight


@documented
class CurriculumState(NamedTuple):
    """What is known of every prompt; arrays, so that it is saved and restored with the run.

    Attributes:
      pass_rate: [N] float32, a running mean; one half before the first update.
      count: [N] int32, updates.
    """

    pass_rate: Array
    count: Array


@documented
class Curriculum(NamedTuple):
    """`init() -> state`, `update(state, index, passed) -> state` and
    `sample(state, key, n) -> index`: pure, they jit.

    Attributes:
      init: () -> state.
      update: (state, index, passed) -> state.
      sample: (state, key, n) -> index.
    """

    init: Callable[[], CurriculumState]
    update: Callable[..., CurriculumState]
    sample: Callable[..., Array]


def learnability(state: CurriculumState, *, eps=0.01) -> Array:
    """`p (1 - p) + eps`, the variance of a reward that is 1 with probability p  (arXiv:2502.12272).
    -> `[N]` weights.

    >>> learnability(curriculum(2).init()).tolist()
    [0.26, 0.26]
    """
    return state.pass_rate * (1 - state.pass_rate) + eps


@checked
def band(low: Share, high: Share) -> Callable:
    """A weight function that is 1 where the pass rate is in `[low, high]` or unknown, and 0
    elsewhere.

    Raises: ValueError unless 0 <= low <= high <= 1.

    >>> band(0.2, 0.8)(CurriculumState(jnp.array([0.1, 0.5]), jnp.array([1, 1]))).tolist()
    [False, True]
    """
    if low > high:
        raise ValueError(
            f"a band of pass rates begins below its end, but low is {low} and high {high}"
        )
    return lambda state: ((state.pass_rate >= low) & (state.pass_rate <= high)) | (state.count == 0)


@checked
def curriculum(
    number: Annotated[int, between(1, INT32)],
    *,
    rate: Annotated[float, between(0, 1, above=True)] = 0.1,
    weight: Callable = learnability,
) -> Curriculum:
    """Samples prompts by how often they are solved: `p ← p + max(rate, 1/count) (x - p)`, x the share
    of samples that passed.

    `update(state, index [n], passed [n, G])` takes the prompts' indices and rewards in 0 … 1; NaN
    counts for nothing, and a prompt that is there twice is updated once, by all its samples.
    `sample(state, key, n)` samples n of the N prompts without replacement, each next one with
    probability proportional to its weight; `key` is consumed.

    Args:
      number: N, prompts in the data set.
      rate: of the exponential mean, in (0, 1]; the first 1/rate updates are a plain mean.
      weight: `(state) -> [N]`: `learnability`, `band(0.2, 0.8)`, or any function.

    Returns: a `Curriculum`.

    Raises: ValueError on a number below 1, a rate outside (0, 1], more prompts than there are, and
    unequal shapes.

    >>> prompts = curriculum(3, weight=band(0.2, 0.8))
    >>> state = prompts.update(prompts.init(), jnp.array([0, 2]), jnp.array([[1., 1.], [1., 0.]]))
    >>> state.pass_rate.tolist(), sorted(prompts.sample(state, jax.random.key(0), 2).tolist())
    ([1.0, 0.5, 0.5], [1, 2])
    """

    def init() -> CurriculumState:
        return CurriculumState(jnp.full(number, 0.5, jnp.float32), jnp.zeros(number, jnp.int32))

    def update(state: CurriculumState, index, passed) -> CurriculumState:
        passed = jnp.asarray(passed, jnp.float32)
        if passed.ndim != 2 or np.shape(index) != passed.shape[:1]:
            raise ValueError(
                f"index {list(np.shape(index))} but passed {list(passed.shape)}; they must be [n] "
                "and [n, G]"
            )
        if (
            not isinstance(index, jax.core.Tracer)
            and not ((np.asarray(index) >= 0) & (np.asarray(index) < number)).all()
        ):
            raise ValueError(
                f"index {np.asarray(index).tolist()} but there are {number} prompts, 0 to "
                f"{number - 1}"
            )
        # A traced index cannot be checked. Below 0 it would count from the end: moved beyond the
        # end, it is dropped.
        index = jnp.where(jnp.asarray(index) < 0, number, index)
        scored = ~jnp.isnan(passed)

        def of_prompt(x):
            return jnp.zeros(number, jnp.float32).at[index].add(x.sum(-1).astype(jnp.float32))

        samples = of_prompt(scored)
        # Sums, not assignments: a prompt that is there twice counts with all of its samples.
        share = of_prompt(jnp.where(scored, passed, 0.0)) / jnp.maximum(samples, 1)
        count = state.count + (samples > 0)
        # 1/count makes a plain mean of the first updates, which a fixed rate would bias to ½.
        step = jnp.where(samples > 0, jnp.maximum(rate, 1 / jnp.maximum(count, 1)), 0.0)
        return CurriculumState(state.pass_rate + step * (share - state.pass_rate), count)

    def sample(state: CurriculumState, key: Array, n: int) -> Array:
        return choose(key, _returned("weight", weight(state), (number,)), n)

    return Curriculum(init, update, sample)


def choose(key: Array, weights, n: int) -> Array:
    """`n` of N rows without replacement, each next one with probability proportional to its weight
    (Gumbel, arXiv:1903.06059).

    Args:
      key: consumed.
      weights: `[N]`, at least 0; rows of weight 0 come only after all others, in random order.
      n: static.

    Returns: `[n]` int32, all different.

    Raises: ValueError where weights is not `[N]` or n is not in 1 … N.

    >>> sorted(choose(jax.random.key(0), jnp.array([1., 0., 2.]), 2).tolist())
    [0, 2]
    """
    weights = jnp.asarray(weights, float)
    if weights.ndim != 1:
        raise ValueError(f"weights must be [N], one a row, but are {list(weights.shape)}")
    if not 1 <= n <= weights.shape[0]:
        raise ValueError(
            f"n is {n} but there are {weights.shape[0]} rows to choose from; n must be in 1 … "
            f"{weights.shape[0]}"
        )
    # The n largest of log w + Gumbel noise are a sample without replacement.
    noise = jax.random.gumbel(key, weights.shape, weights.dtype)
    some = weights > 0
    return jax.lax.top_k(noise + jnp.where(some, jnp.log(jnp.where(some, weights, 1.0)), NEVER), n)[
        1
    ]


@documented
class Buffer(NamedTuple):
    """Rows of earlier steps.  A step is one call of `add`.

    Attributes:
      rows: pytree of [C, ...]; leaves without axes, such as a temperature, belong to all rows and
        are the last ones added.
      priority: [C] float32, minus infinity where a slot is empty.
      added: [C] int32, the step in which a row was added.
      step: [] int32, steps so far.
    """

    rows: Any
    priority: Array
    added: Array
    step: Array


@documented
class Sampled(NamedTuple):
    """Rows that `sample` returns.

    Attributes:
      rows: pytree of [n, ...].
      index: [n] int32, their slots, for new priorities: buffer.priority.at[index].set(…).
      real: [n] bool, False where there was nothing to sample: put it into the rows' mask.
    """

    rows: Any
    index: Array
    real: Array


def init(rows: Any, capacity: int) -> Buffer:
    """An empty buffer.

    Args:
      rows: a pytree like those that will be added, arrays or their shapes, `[any, ...]`: a
        `Rollout`, or, for groups that stay together, arrays `[P, G, ...]`.
      capacity: C, rows.

    Raises: ValueError where the capacity is below 1, or the leaves differ in their rows.

    >>> init(jnp.zeros((2, 3)), 8).rows.shape
    (8, 3)
    """
    num_rows(rows)
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1 row, but is {capacity}")

    def slots(x):
        shape = (capacity, *np.shape(x)[1:]) if np.ndim(x) else ()
        return jnp.zeros(shape, jnp.result_type(x))

    return Buffer(
        rows=jax.tree.map(slots, rows),
        priority=jnp.full(capacity, -jnp.inf, jnp.float32),
        added=jnp.zeros(capacity, jnp.int32),
        step=jnp.zeros((), jnp.int32),
    )


def newest(priority: Array, age: Array) -> Array:
    """What `add` keeps: the youngest rows, first in, first out.

    >>> newest(jnp.array([5., 1.]), jnp.array([2, 0])).tolist()
    [-2.0, 0.0]
    """
    return -age.astype(jnp.float32)


def highest(priority: Array, age: Array) -> Array:
    """What `add` keeps: the rows of highest priority, however old; on ties those that are there.

    >>> highest(jnp.array([5., 1.]), jnp.array([2, 0])).tolist()
    [5.0, 1.0]
    """
    return priority


def add(buffer: Buffer, rows: Any, priority: Any = 1.0, *, keep: Callable = newest) -> Buffer:
    """Writes rows into empty slots first, then over those that are least worth keeping; ages all
    others by a step.

    Args:
      buffer: may be donated.
      rows: a pytree of `[n, ...]`, n at most the capacity.
      priority: a number or `[n]`; a row with NaN or minus infinity is not stored, so that
        `jnp.where(worth_it, priority, -jnp.inf)` chooses without a change of shapes.
      keep: `(priority [N], age [N] in steps) -> [N]`, what is worth more is kept: `newest`,
        `highest`, or any function.

    Returns: the new buffer.

    Raises: ValueError where the rows are more than the capacity, or not like the buffer's in
    structure, shapes or types, or
      where `keep` does not return a number a row.

    >>> buffer = init(jnp.zeros(1), 2)
    >>> buffer = add(buffer, jnp.array([1., 2.]), jnp.array([5., 3.]), keep=highest)
    >>> add(buffer, jnp.array([9., 8.]), jnp.array([4., 1.]), keep=highest).rows.tolist()
    [1.0, 9.0]
    """
    capacity = buffer.priority.shape[0]
    n = num_rows(rows)
    _check_alike(buffer.rows, rows)
    if n > capacity:
        raise ValueError(
            f"{n} rows do not fit a buffer of {capacity}; make it larger or add fewer at a time"
        )
    priority = jnp.asarray(priority, jnp.float32)
    if priority.shape not in ((), (n,)):
        raise ValueError(
            f"priority {list(priority.shape)} but there are {n} rows; one number, or one a row"
        )
    priority = jnp.broadcast_to(priority, (n,))
    step = buffer.step + 1

    # What is empty, or not to be stored, is worth less than anything that `keep` may return.
    def worth(p, added):
        return jnp.where(p > -jnp.inf, _returned("keep", keep(p, step - added), p.shape), -jnp.inf)

    old = worth(buffer.priority, buffer.added)
    new = worth(priority, jnp.full(n, step))
    # The best new row meets the worst old one, the second best the second worst, and so on: whoever
    # is worth more has the slot. A slot of `capacity` is none, and is dropped.
    order = jnp.argsort(-new)
    slots = jnp.argsort(old)[:n]
    slots = jnp.where(new[order] > old[slots], slots, capacity)

    def put(x, y):
        if not x.ndim:
            return jnp.asarray(y, x.dtype)
        return x.at[slots].set(jnp.asarray(y)[order], mode="drop")

    rows, priority, added = jax.tree.map(
        put, (buffer.rows, buffer.priority, buffer.added), (rows, priority, jnp.full(n, step))
    )
    return Buffer(rows, priority, added, step)


def fresh(buffer: Buffer, max_age: Any = jnp.inf) -> Array:
    """Which slots hold a row that was added at most `max_age` steps ago; 0 is the last step.  `[C]`
    bool.

    >>> fresh(add(init(jnp.zeros(1), 3), jnp.array([4., 5.])), 0).tolist()
    [True, True, False]
    """
    return (buffer.priority > -jnp.inf) & (buffer.step - buffer.added <= max_age)


def proportional(buffer: Buffer) -> Array:
    """Weights for `sample`: the priorities, 0 for empty slots and below.  `[C]` float32.

    >>> proportional(add(init(jnp.zeros(1), 3), jnp.array([4., 5.]), jnp.array([2., -1.]))).tolist()
    [2.0, 0.0, 0.0]
    """
    return jnp.maximum(buffer.priority, 0.0)


def sample(buffer: Buffer, key: Array, n: int, *, weight: Callable = fresh) -> Sampled:
    """`n` different rows, sampled without replacement by `choose`.

    Args:
      key: consumed.
      n: static, at most the capacity.
      weight: `(buffer) -> [C]`, at least 0: `fresh` (evenly), `proportional`, or
        `lambda buffer: fresh(buffer, 4) * proportional(buffer)`, which leaves stale rows alone.

    Returns: `Sampled`; where fewer than n rows have a weight, the others' `real` is False and they
    hold anything.

    Raises: ValueError where n is not in 1 … C, or `weight` does not return `[C]`.

    >>> sampled = sample(add(init(jnp.zeros(1), 3), jnp.array([7.])), jax.random.key(0), 2)
    >>> sampled.rows[0].item(), sampled.real.tolist()
    (7.0, [True, False])
    """
    weights = _returned("weight", weight(buffer), buffer.priority.shape)
    index = choose(key, weights, n)
    return Sampled(
        jax.tree.map(lambda x: x[index] if x.ndim else x, buffer.rows), index, weights[index] > 0
    )


def _returned(name: str, x: Any, shape: tuple) -> Array:
    if np.shape(x) != shape:
        raise ValueError(
            f"{name} returned {list(np.shape(x))} but must return {list(shape)}, a number for each"
        )
    return x


def _check_alike(old: Any, new: Any) -> None:
    def form(tree):
        shapes = {}
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            shape = ["n", *np.shape(x)[1:]] if np.ndim(x) else []
            shapes[jax.tree_util.keystr(path)] = f"{jnp.result_type(x)} {shape}"
        return shapes

    have = form(new)
    want = form(old)
    for name in sorted({*have, *want}):
        if have.get(name) != want.get(name):
            raise ValueError(
                f"rows{name}: {have.get(name, 'nothing')} but the buffer holds "
                f"{want.get(name, 'nothing')}"
            )
