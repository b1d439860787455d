"""The train step: a loss that is a weighted sum, differentiated in micro-batches, then one
optimizer update.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf import metrics as metrics_lib
from rlhf.fields import documented
from rlhf.typing import LossFn, ScoresFn, ScoresObjective, StepFn

Array = jax.Array


@documented
class TrainState(NamedTuple):
    """A whole run: save this pytree, and what comes after is the same bit for bit.

    Attributes:
      step: [] int32, steps taken, skipped ones included.
      params: what is trained, nothing else.
      opt_state: the optimizer's own.
      key: [] the run's key; steps fold their number into it.
      context: what the objective needs and does not train: reference params, KL coefficient, …
    """

    step: Array
    params: Any
    opt_state: Any
    key: Array
    context: Any = ()


def init_state(
    params: Any, optimizer: optax.GradientTransformation, key: Array, context: Any = ()
) -> TrainState:
    """The state at step 0.  `key` is consumed, and so is every array once the state is donated.

    Raises: ValueError where two leaves are the same array: a donated state would free it twice.

    >>> state = init_state({"w": jnp.ones(2)}, optax.sgd(0.1), jax.random.key(0))
    >>> state.step.item()
    0
    """
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), key, context)
    # XLA reports a buffer that is donated twice without saying which: names are found here.
    names: dict[int, str] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        if id(leaf) in names:
            raise ValueError(
                f"{name} and {names[id(leaf)]} are one array, which a donated state frees twice; "
                "use reference(params)"
            )
        names[id(leaf)] = name
    return state


def reference(params: Any) -> Any:
    """A copy of `params`, for a reference model in the same state.

    >>> w = jnp.ones(2)
    >>> reference({"w": w})["w"] is w
    False
    """
    return jax.tree.map(lambda x: jnp.array(x, copy=True), params)


def train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    micro_batches: int = 1,
    group_size: int = 1,
    update_context: Callable | None = None,
) -> StepFn:
    """A step of gradient descent on `loss_fn`, which must be a sum over rows.

    Args:
      loss_fn: `(params, context, batch, key) -> (loss, metrics)`.  The loss is a weighted sum over
        the batch's rows, so that the sum over micro-batches is the loss of the whole; `metrics` is
        a dict of scalars that add up, `Ratio`s and `Max`es.
      optimizer: any optax transformation.
      micro_batches: M; micro-batch m is groups m, m + M, …, so that a sharded batch stays where it
        is.
      group_size: rows that stay together, one after another, such as the samples of a prompt.
      update_context: `(context, params, metrics) -> context` after the update, for controllers and
        moving references.

    Returns: `step(state, batch) -> (state, metrics)`, a plain function to jit, scan, vmap or shard.
    The metrics gain `loss`, `grad_norm` and `skipped`, which is 1 where the gradient is not finite:
    params, optimizer and context then stay.  Leaves of the batch without axes are given whole to
    every micro-batch.

    Raises: ValueError where M does not divide the groups, or the group size the rows, or `loss_fn`
    returns something else than
      a scalar and a dict.

    >>> loss_fn = lambda params, context, batch, key: (jnp.sum((params - batch) ** 2), {})
    >>> step = train_step(loss_fn, optax.sgd(0.25), micro_batches=2)
    >>> state, metrics = step(init_state(jnp.zeros(()), optax.sgd(0.25), jax.random.key(0)), jnp.ones(2))
    >>> state.params.item(), metrics["loss"].item()
    (1.0, 2.0)
    """

    def gradients(state, batch):
        def one(params, rows, key):
            loss, metrics = _checked(loss_fn(params, state.context, rows, key), "loss_fn")
            # The loss is a metric too: micro-batches add it up like all others.
            return loss, {"loss": loss, **metrics}

        def run(rows, key):
            (_, metrics), grads = jax.value_and_grad(one, has_aux=True)(state.params, rows, key)
            return grads, metrics

        return _accumulate(run, state, batch, micro_batches, group_size)

    return _step(gradients, optimizer, update_context)


def coupled_train_step(
    scores_fn: ScoresFn,
    objective: ScoresObjective,
    optimizer: optax.GradientTransformation,
    *,
    micro_batches: int = 1,
    update_context: Callable | None = None,
) -> StepFn:
    """A step on an objective that couples rows, exact under any micro-batching.

    Pass 1 computes the scores of all rows, in micro-batches and without gradients; `objective` is
    differentiated with respect to them; pass 2 replays the micro-batches with those derivatives as
    constant cotangents, under the same keys.

    Args:
      scores_fn: `(params, context, batch, key) -> scores`, a pytree of `[rows, ...]` arrays, row by
        row.
      objective: `(scores, context, batch) -> (loss, metrics)` of the whole mini-batch.
      optimizer: any optax transformation.
      micro_batches: M; micro-batch m is rows m, m + M, …, so that a sharded batch stays where it
        is.
      update_context: `(context, params, metrics) -> context` after the update, for controllers and
        moving references.

    Returns: `step(state, batch) -> (state, metrics)`, a plain function to jit, scan, vmap or shard.
    The metrics gain `loss`, `grad_norm` and `skipped`, which is 1 where the gradient is not finite:
    params, optimizer and context then stay.

    Raises: ValueError where M does not divide the rows, a score does not have one entry a row, or
    `objective` returns something else than a scalar and a dict.

    >>> scores_fn = lambda params, context, batch, key: params * batch
    >>> objective = lambda scores, context, batch: (jnp.max(scores), {})
    >>> step = coupled_train_step(scores_fn, objective, optax.sgd(1.0), micro_batches=2)
    >>> step(init_state(jnp.ones(()), optax.sgd(1.0), jax.random.key(0)), jnp.array([1.0, 3.0]))[0].params.item()
    -2.0
    """

    def gradients(state, batch):
        def run(params, rows, key):
            return scores_fn(params, state.context, rows, key)

        def forward(rows, key):
            scores = run(state.params, rows, key)
            expected = _rows(rows)
            for x in jax.tree.leaves(scores):
                if x.ndim < 1 or x.shape[0] != expected:
                    raise ValueError(
                        f"scores_fn must return one entry a row, [{expected}, ...], but returned "
                        f"{list(x.shape)}"
                    )
            return scores

        scores = _over_micro_batches(forward, state, batch, micro_batches)
        scores = jax.lax.stop_gradient(_merge(scores))

        def of_scores(scores):
            loss, metrics = _checked(objective(scores, state.context, batch), "objective")
            return loss, {"loss": loss, **metrics}

        # The objective sees all scores at once, of which there are few: this is where rows couple.
        # `allow_int`: scores may include counts.
        cotangents, metrics = jax.grad(of_scores, has_aux=True, allow_int=True)(scores)

        def backward(inputs, key):
            rows, cotangent = inputs
            # The same keys as in pass 1, so that dropout is the same; the activations of one
            # micro-batch at a time are in memory.
            _, vjp = jax.vjp(lambda params: run(params, rows, key), state.params)
            return vjp(cotangent)[0], {}

        grads, _ = _accumulate(backward, state, (batch, cotangents), micro_batches)
        return grads, metrics

    return _step(gradients, optimizer, update_context)


def minibatches(key: Array, batch: Any, n: int, epochs: int = 1, *, group_size: int = 1) -> Any:
    """Cuts a batch into `n` optimizer mini-batches, `epochs` times over, each time in a new order.

    Make weights and whiten per mini-batch, inside the scan over them.

    Args:
      key: consumed.
      batch: a pytree; leaves without axes are repeated.
      n: mini-batches of an epoch.
      epochs: passes over the batch.
      group_size: rows that stay together, one after another, such as the samples of a prompt.

    Returns: the same pytree with leaves `[epochs * n, B / n, ...]`, to scan a step over.

    Raises: ValueError where `n` does not divide the groups, or the group size the rows.

    >>> minibatches(jax.random.key(0), jnp.arange(4), 2, epochs=3).shape
    (6, 2)
    >>> minibatches(jax.random.key(0), jnp.arange(6), 3, group_size=2).tolist()
    [[0, 1], [4, 5], [2, 3]]
    """
    rows = _rows(batch)
    groups = _number_of_groups(rows, group_size)
    if n < 1 or groups % n:
        raise ValueError(f"{n} mini-batches do not divide {_counted(rows, group_size)}")
    # Groups are shuffled and not rows: samples of a prompt stay neighbours, and share its prefix.
    orders = jax.vmap(lambda k: jax.random.permutation(k, groups))(jax.random.split(key, epochs))
    # Numbers of groups to numbers of rows: `[epochs, groups, group_size]`.
    order = orders[..., None] * group_size + jnp.arange(group_size)[None, None]
    order = order.reshape(epochs * n, rows // n)
    return jax.tree.map(
        lambda x: x[order] if jnp.ndim(x) else jnp.broadcast_to(x, (epochs * n,)), batch
    )


def run_minibatches(
    step: StepFn, state: TrainState, batches: Any, *, target_kl: float | None = None
) -> tuple[TrainState, dict]:
    """Optimizer steps over mini-batches; metrics are means over the steps that were taken.

    Args:
      step: `(state, mini-batch) -> (state, metrics)`, of `train_step`, with what is made of a
        mini-batch as a whole before it.
      batches: leaves `[N, B / N, ...]`, of `minibatches`.
      target_kl: nats a token; where a step's metric `approx_kl` is above, it is the last one.  The
        others are counted in `state.step`, and change nothing else.

    Returns: the state, and metrics; with a `target_kl` also `updates`, the number of steps that
    were taken.

    >>> step = lambda state, batch: (state + batch, {"batch": batch})
    >>> state, metrics = run_minibatches(step, jnp.float32(0.0), jnp.array([1.0, 3.0]))
    >>> state.item(), metrics["batch"].item()
    (4.0, 2.0)
    """
    if target_kl is None:
        state, metrics = jax.lax.scan(step, state, batches)
        return state, jax.tree.map(jnp.mean, metrics)
    # Both branches of a `cond` must return the same structure: that of the metrics is traced here.
    first = jax.tree.map(lambda x: x[0], batches)
    _, shapes = jax.eval_shape(step, state, first)
    no_metrics = jax.tree.map(jnp.zeros_like, shapes)

    def pass_over(state, batch):
        # The step still counts: schedules and resuming rely on a fixed number of them a rollout.
        return state._replace(step=state.step + 1), no_metrics

    def unless_far(carry, batch):
        state, is_far = carry
        # `cond` and not `where`: a step that is passed over is not computed either.  Under vmap it
        # is.
        new_state, metrics = jax.lax.cond(is_far, pass_over, step, state, batch)
        is_far_now = is_far | (metrics["approx_kl"] > target_kl)
        return (new_state, is_far_now), {**metrics, "updates": 1.0 - is_far}

    (state, _), metrics = jax.lax.scan(unless_far, (state, jnp.array(False)), batches)
    # At least 1: the first step is always taken.  The others added zeros.
    number = metrics.pop("updates").sum()
    return state, {**jax.tree.map(lambda x: x.sum() / number, metrics), "updates": number}


def _step(gradients, optimizer, update_context):
    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict]:
        grads, metrics = gradients(state, batch)
        metrics = metrics_lib.result(metrics)
        # One infinite or NaN number anywhere makes the norm so: a single test for all gradients.
        norm = optax.tree_utils.tree_norm(grads)
        finite = jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {**metrics, "grad_norm": norm, "skipped": (~finite).astype(jnp.float32)}
        context = (
            update_context(state.context, params, metrics) if update_context else state.context
        )
        unchanged = (state.params, state.opt_state, state.context)
        # Chosen inside the program, since a branch on the host would wait for every step.  What is
        # the same array on both sides needs no choice, and no copy: frozen parameters and
        # references.
        params, opt_state, context = jax.tree.map(
            lambda new, old: new if new is old else jnp.where(finite, new, old),
            (params, opt_state, context),
            unchanged,
        )
        return TrainState(state.step + 1, params, opt_state, state.key, context), metrics

    return step


def _accumulate(run, state, batch, micro_batches, group_size=1):
    """The sums over micro-batches of `run(rows, key) -> (gradients, metrics)`."""
    # Without a scan of one step: gradients need not be copied into a carry.
    if micro_batches == 1:
        return run(batch, _key(state, 0))
    pieces = _split(batch, micro_batches, group_size)
    # The sum starts at zeros of the gradients' own types, which the scan's carry must have.
    shapes, _ = jax.eval_shape(lambda: run(jax.tree.map(lambda x: x[0], pieces), _key(state, 0)))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def body(total, inputs):
        m, rows = inputs
        grads, metrics = run(rows, _key(state, m))
        return jax.tree.map(jnp.add, total, grads), metrics

    grads, metrics = jax.lax.scan(body, zeros, (jnp.arange(micro_batches), pieces))
    return grads, metrics_lib.reduce(metrics)


def _over_micro_batches(run, state, batch, micro_batches):
    """`run(rows, key)` of every micro-batch, stacked `[M, B / M, ...]`."""
    if micro_batches == 1:
        return jax.tree.map(lambda x: x[None], run(batch, _key(state, 0)))
    return jax.lax.map(
        lambda x: run(x[1], _key(state, x[0])),
        (jnp.arange(micro_batches), _split(batch, micro_batches)),
    )


def _key(state, micro_batch):
    # The run's key is never split: a key depends on step and micro-batch alone, and so resumes.
    return jax.random.fold_in(jax.random.fold_in(state.key, state.step), micro_batch)


def _rows(batch) -> int:
    sizes = {jnp.shape(x)[0] for x in jax.tree.leaves(batch) if jnp.ndim(x)}
    if len(sizes) != 1:
        raise ValueError(
            "the leaves of a batch must agree in their first axis, but have "
            f"{sorted(sizes) or 'no axes'}"
        )
    return sizes.pop()


def _number_of_groups(rows: int, group_size: int) -> int:
    if group_size < 1 or rows % group_size:
        raise ValueError(f"groups of {group_size} rows do not divide {rows} rows")
    return rows // group_size


def _counted(rows: int, group_size: int) -> str:
    return (
        f"{rows} rows" if group_size == 1 else f"{rows // group_size} groups of {group_size} rows"
    )


def _split(batch, micro_batches, group_size=1):
    """`[B, ...]` -> `[M, B / M, ...]`, micro-batch m being groups m, m + M, …"""
    rows = _rows(batch)
    groups = _number_of_groups(rows, group_size)
    if micro_batches < 1 or groups % micro_batches:
        raise ValueError(
            f"{micro_batches} micro-batches do not divide {_counted(rows, group_size)}"
        )

    def one(x):
        if not jnp.ndim(x):
            return jnp.broadcast_to(x, (micro_batches,))
        # Strided and not contiguous: of a batch split over devices every micro-batch has rows on
        # each.  Contiguous parts would lie on a few devices, and be moved.
        x = x.reshape(groups // micro_batches, micro_batches, group_size, *x.shape[1:])
        return jnp.moveaxis(x, 1, 0).reshape(micro_batches, rows // micro_batches, *x.shape[3:])

    return jax.tree.map(one, batch)


def _merge(pieces):
    """The inverse of `_split`."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), pieces)


def _checked(returned, name) -> tuple[Array, dict]:
    """What a user's function returned, if it is a loss and its metrics."""
    if isinstance(returned, tuple) and len(returned) == 2:
        loss, metrics = returned
        if jnp.shape(loss) == () and isinstance(metrics, dict):
            return loss, metrics
    parts = returned if isinstance(returned, tuple) else (returned,)
    shown = ", ".join(_shown(part) for part in parts)
    raise ValueError(f"{name} must return (loss [], metrics dict), but returned {shown}")


def _shown(part) -> str:
    return f"an array {list(part.shape)}" if hasattr(part, "shape") else type(part).__name__
