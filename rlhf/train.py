"""The train step: a loss that is a weighted sum, differentiated in micro-batches, then one optimizer update."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf import metrics as metrics_lib
from rlhf.fields import documented

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


def init_state(params: Any, optimizer: optax.GradientTransformation, key: Array, context: Any = ()) -> TrainState:
    """The state at step 0.  `key` is consumed, and so is every array once the state is donated.

    Raises: ValueError where two leaves are the same array: a donated state would free it twice.

    >>> state = init_state({"w": jnp.ones(2)}, optax.sgd(0.1), jax.random.key(0))
    >>> state.step.item()
    0
    """
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), key, context)
    seen: dict[int, str] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        if id(leaf) in seen:
            raise ValueError(
                f"{name} and {seen[id(leaf)]} are one array, which a donated state frees twice; use reference(params)"
            )
        seen[id(leaf)] = name
    return state


def reference(params: Any) -> Any:
    """A copy of `params`, for a reference model in the same state.

    >>> w = jnp.ones(2)
    >>> reference({"w": w})["w"] is w
    False
    """
    return jax.tree.map(lambda x: jnp.array(x, copy=True), params)


def train_step(
    loss_fn: Callable,
    optimizer: optax.GradientTransformation,
    *,
    micro_batches: int = 1,
    update_context: Callable | None = None,
) -> Callable:
    """A step of gradient descent on `loss_fn`, which must be a sum over rows.

    Args:
      loss_fn: `(params, context, batch, key) -> (loss, metrics)`.  The loss is a weighted sum over the batch's rows, so that
        the sum over micro-batches is the loss of the whole; `metrics` is a dict of scalars that add up, `Ratio`s and `Max`es.
      optimizer: any optax transformation.
      micro_batches: M; micro-batch m is rows m, m + M, …, so that a sharded batch stays where it is.
      update_context: `(context, params, metrics) -> context` after the update, for controllers and moving references.

    Returns: `step(state, batch) -> (state, metrics)`, a plain function to jit, scan, vmap or shard.  The metrics gain `loss`,
    `grad_norm` and `skipped`, which is 1 where the gradient is not finite: params, optimizer and context then stay.
    Leaves of the batch without axes are given whole to every micro-batch.

    Raises: ValueError where M does not divide the rows, or `loss_fn` returns something else than a scalar and a dict.

    >>> loss_fn = lambda params, context, batch, key: (jnp.sum((params - batch) ** 2), {})
    >>> step = train_step(loss_fn, optax.sgd(0.25), micro_batches=2)
    >>> state, metrics = step(init_state(jnp.zeros(()), optax.sgd(0.25), jax.random.key(0)), jnp.ones(2))
    >>> state.params.item(), metrics["loss"].item()
    (1.0, 2.0)
    """

    def gradients(state, batch):
        def one(params, rows, key):
            loss, metrics = loss_fn(params, state.context, rows, key)
            _check_loss(loss, metrics, "loss_fn")
            return loss, {"loss": loss, **metrics}

        def run(rows, key):
            (_, metrics), grads = jax.value_and_grad(one, has_aux=True)(state.params, rows, key)
            return grads, metrics

        return _accumulate(run, state, batch, micro_batches)

    return _step(gradients, optimizer, update_context)


def coupled_train_step(
    scores_fn: Callable,
    objective: Callable,
    optimizer: optax.GradientTransformation,
    *,
    micro_batches: int = 1,
    update_context: Callable | None = None,
) -> Callable:
    """A step on an objective that couples rows, exact under any micro-batching.

    Pass 1 computes the scores of all rows, in micro-batches and without gradients; `objective` is differentiated with respect
    to them; pass 2 replays the micro-batches with those derivatives as constant cotangents, under the same keys.

    Args:
      scores_fn: `(params, context, batch, key) -> scores`, a pytree of `[rows, ...]` arrays, row by row.
      objective: `(scores, context, batch) -> (loss, metrics)` of the whole mini-batch.
      optimizer, micro_batches, update_context: as `train_step`.

    Returns and raises as `train_step`; ValueError too where a score does not have one entry a row.

    >>> scores_fn = lambda params, context, batch, key: params * batch
    >>> objective = lambda scores, context, batch: (jnp.max(scores), {})
    >>> step = coupled_train_step(scores_fn, objective, optax.sgd(1.0), micro_batches=2)
    >>> step(init_state(jnp.ones(()), optax.sgd(1.0), jax.random.key(0)), jnp.array([1.0, 3.0]))[0].params.item()
    -2.0
    """

    def gradients(state, batch):
        run = lambda params, rows, key: scores_fn(params, state.context, rows, key)

        def forward(rows, key):
            scores = run(state.params, rows, key)
            expected = _rows(rows)
            for x in jax.tree.leaves(scores):
                if x.ndim < 1 or x.shape[0] != expected:
                    raise ValueError(f"scores_fn must return one entry a row, [{expected}, ...], but returned {list(x.shape)}")
            return scores

        scores = _over_micro_batches(forward, state, batch, micro_batches)
        scores = jax.lax.stop_gradient(_merge(scores))

        def whole(scores):
            loss, metrics = objective(scores, state.context, batch)
            _check_loss(loss, metrics, "objective")
            return loss, {"loss": loss, **metrics}

        cotangents, metrics = jax.grad(whole, has_aux=True, allow_int=True)(scores)

        def backward(inputs, key):
            rows, cotangent = inputs
            _, vjp = jax.vjp(lambda params: run(params, rows, key), state.params)
            return vjp(cotangent)[0], {}

        grads, _ = _accumulate(backward, state, (batch, cotangents), micro_batches)
        return grads, metrics

    return _step(gradients, optimizer, update_context)


def minibatches(key: Array, batch: Any, n: int, epochs: int = 1) -> Any:
    """Cuts a batch into `n` optimizer mini-batches, `epochs` times over, each time in a new order.

    Make weights and whiten per mini-batch, inside the scan over them.

    Args:
      key: consumed.
      batch: a pytree; leaves without axes are repeated.

    Returns: the same pytree with leaves `[epochs * n, B / n, ...]`, to scan a step over.

    Raises: ValueError where `n` does not divide the rows.

    >>> minibatches(jax.random.key(0), jnp.arange(4), 2, epochs=3).shape
    (6, 2)
    """
    rows = _rows(batch)
    if n < 1 or rows % n:
        raise ValueError(f"{n} mini-batches do not divide {rows} rows")
    order = jax.vmap(lambda k: jax.random.permutation(k, rows))(jax.random.split(key, epochs)).reshape(epochs * n, rows // n)
    return jax.tree.map(lambda x: x[order] if jnp.ndim(x) else jnp.broadcast_to(x, (epochs * n,)), batch)


def _step(gradients, optimizer, update_context):
    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict]:
        grads, metrics = gradients(state, batch)
        metrics = metrics_lib.result(metrics)
        norm = optax.tree_utils.tree_norm(grads)
        finite = jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {**metrics, "grad_norm": norm, "skipped": (~finite).astype(jnp.float32)}
        context = update_context(state.context, params, metrics) if update_context else state.context
        kept = (state.params, state.opt_state, state.context)
        params, opt_state, context = jax.tree.map(
            lambda new, old: new if new is old else jnp.where(finite, new, old), (params, opt_state, context), kept
        )
        return TrainState(state.step + 1, params, opt_state, state.key, context), metrics

    return step


def _accumulate(run, state, batch, micro_batches):
    """The sums over micro-batches of `run(rows, key) -> (gradients, metrics)`."""
    if micro_batches == 1:
        return run(batch, _key(state, 0))
    pieces = _split(batch, micro_batches)
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
    return jax.lax.map(lambda x: run(x[1], _key(state, x[0])), (jnp.arange(micro_batches), _split(batch, micro_batches)))


def _key(state, micro_batch):
    return jax.random.fold_in(jax.random.fold_in(state.key, state.step), micro_batch)


def _rows(batch) -> int:
    sizes = {jnp.shape(x)[0] for x in jax.tree.leaves(batch) if jnp.ndim(x)}
    if len(sizes) != 1:
        raise ValueError(f"the leaves of a batch must agree in their first axis, but have {sorted(sizes) or 'no axes'}")
    return sizes.pop()


def _split(batch, micro_batches):
    """`[B, ...]` -> `[M, B / M, ...]`, micro-batch m being rows m, m + M, …"""
    rows = _rows(batch)
    if micro_batches < 1 or rows % micro_batches:
        raise ValueError(f"{micro_batches} micro-batches do not divide {rows} rows")

    def one(x):
        if not jnp.ndim(x):
            return jnp.broadcast_to(x, (micro_batches,))
        return jnp.moveaxis(x.reshape(rows // micro_batches, micro_batches, *x.shape[1:]), 1, 0)

    return jax.tree.map(one, batch)


def _merge(pieces):
    """The inverse of `_split`."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), pieces)


def _check_loss(loss, metrics, name) -> None:
    if jnp.shape(loss) != () or not isinstance(metrics, dict):
        raise ValueError(
            f"{name} must return (loss [], metrics dict), but returned {list(jnp.shape(loss))}, {type(metrics).__name__}"
        )
