"""The train step: guard, keys, controllers, mini-batches, metrics, refusals; and checkpoints that resume bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rlhf
from rlhf.checkpoint import Checkpoints
from rlhf.metrics import Max, Ratio


def quadratic(params, context, batch, key):
    error = batch["x"] - params["w"]
    metrics = {
        "largest": Max(jnp.abs(error).max()),
        "ratio": Ratio(error.sum(), jnp.float32(error.size)),
    }
    return (error**2).sum(), metrics


def start(optimizer, context=()):
    return rlhf.init_state({"w": jnp.zeros(())}, optimizer, jax.random.key(0), context)


def test_metrics_do_not_depend_on_micro_batches():
    batch = {"x": jnp.array([1.0, 2.0, 3.0, -6.0])}
    seen = [
        rlhf.train_step(quadratic, optax.sgd(0.1), micro_batches=m)(start(optax.sgd(0.1)), batch)[1]
        for m in (1, 2, 4)
    ]
    for metrics in seen:
        assert float(metrics["loss"]) == 50.0
        assert float(metrics["largest"]) == 6.0
        assert float(metrics["ratio"]) == 0.0
        assert float(metrics["grad_norm"]) == 0.0


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_non_finite_gradient_skips_the_update_and_is_counted(bad):
    optimizer = optax.adam(0.1)
    step = rlhf.train_step(
        quadratic, optimizer, update_context=lambda context, params, metrics: context + 1
    )
    state, metrics = step(start(optimizer, jnp.zeros(())), {"x": jnp.array([bad, 1.0])})
    assert float(metrics["skipped"]) == 1
    assert int(state.step) == 1
    assert float(state.params["w"]) == 0
    assert float(state.context) == 0
    for x in jax.tree.leaves(state.opt_state):
        assert not np.any(x)
    state, metrics = step(state, {"x": jnp.array([1.0, 1.0])})
    assert float(metrics["skipped"]) == 0
    assert float(state.params["w"]) > 0
    assert float(state.context) == 1


def test_every_micro_batch_and_step_has_its_own_key():
    draw = lambda params, context, batch, key: (
        params["w"] * jax.random.normal(key),
        {"draw": Max(jax.random.normal(key))},
    )
    step = rlhf.train_step(draw, optax.sgd(1.0), micro_batches=2)
    state, first = step(start(optax.sgd(1.0)), {"x": jnp.zeros(2)})
    _, second = step(state, {"x": jnp.zeros(2)})
    key = jax.random.fold_in(jax.random.key(0), 0)
    draws = [jax.random.normal(jax.random.fold_in(key, m)) for m in range(2)]
    np.testing.assert_allclose(-state.params["w"], sum(draws), rtol=1e-6)
    assert float(first["draw"]) == max(draws)
    assert float(second["draw"]) != float(first["draw"])


def test_minibatches_hold_every_row_once_an_epoch():
    batch = {"x": jnp.arange(12), "scalar": 3.0}
    cut = rlhf.minibatches(jax.random.key(0), batch, 3, epochs=2)
    assert cut["x"].shape == (6, 4)
    for epoch in (cut["x"][:3], cut["x"][3:]):
        assert sorted(np.ravel(epoch)) == list(range(12))
    assert not np.array_equal(cut["x"][:3], cut["x"][3:])
    assert cut["scalar"].shape == (6,)


def test_groups_stay_together_in_mini_batches_and_micro_batches():
    rows = jnp.arange(12)
    groups = rlhf.minibatches(jax.random.key(0), rows, 2, epochs=3, group_size=2).reshape(-1, 2)
    assert (groups[:, 1] == groups[:, 0] + 1).all()
    assert (groups[:, 0] % 2 == 0).all()
    for epoch in groups.reshape(3, 12):
        assert sorted(epoch.tolist()) == list(range(12))

    def of_groups(params, context, batch, key):
        first, second = batch[::2], batch[1::2]
        return params["w"] * batch.sum(), {"apart": Max(jnp.abs(second - first - 1).max())}

    optimizer = optax.sgd(1.0)
    for micro_batches in (1, 2, 3):
        step = rlhf.train_step(of_groups, optimizer, micro_batches=micro_batches, group_size=2)
        state, metrics = step(start(optimizer), rows.astype(jnp.float32))
        assert state.params["w"] == -66
        assert metrics["apart"] == 0
    apart = rlhf.train_step(of_groups, optimizer, micro_batches=2)(
        start(optimizer), rows.astype(jnp.float32)
    )[1]["apart"]
    assert apart == 1
    with pytest.raises(ValueError, match="4 micro-batches do not divide 6 groups of 2 rows"):
        rlhf.train_step(of_groups, optimizer, micro_batches=4, group_size=2)(start(optimizer), rows)
    with pytest.raises(ValueError, match="5 mini-batches do not divide 6 groups of 2 rows"):
        rlhf.minibatches(jax.random.key(0), rows, 5, group_size=2)
    with pytest.raises(ValueError, match="groups of 5 rows do not divide 12 rows"):
        rlhf.minibatches(jax.random.key(0), rows, 2, group_size=5)


def test_refusals_name_both_sides():
    optimizer = optax.sgd(0.1)
    shared = jnp.ones(3)
    with pytest.raises(ValueError, match=r"context.*params.*one array.*reference\(params\)"):
        rlhf.init_state({"w": shared}, optimizer, jax.random.key(0), {"ref": shared})
    rlhf.init_state({"w": shared}, optimizer, jax.random.key(0), {"ref": rlhf.reference(shared)})
    with pytest.raises(ValueError, match="3 micro-batches do not divide 4 rows"):
        rlhf.train_step(quadratic, optimizer, micro_batches=3)(
            start(optimizer), {"x": jnp.zeros(4)}
        )
    with pytest.raises(ValueError, match="5 mini-batches do not divide 12 rows"):
        rlhf.minibatches(jax.random.key(0), jnp.arange(12), 5)
    with pytest.raises(ValueError, match=r"\[2, 4\]"):
        rlhf.train_step(quadratic, optimizer)(start(optimizer), {"x": jnp.zeros(4)})[
            0
        ] and rlhf.train_step(quadratic, optimizer, micro_batches=2)(
            start(optimizer), {"x": jnp.zeros(4), "y": jnp.zeros(2)}
        )
    must = r"loss_fn must return \(loss \[\], metrics dict\), but returned "
    for loss_fn, returned in (
        (lambda p, c, b, k: (b["x"] * p["w"], {}), r"an array \[4\], dict"),
        (lambda p, c, b, k: (b["x"] * p["w"]).sum(), r"an array \[\]"),
        (lambda p, c, b, k: ((b["x"] * p["w"]).sum(), {}, {}), r"an array \[\], dict, dict"),
        (lambda p, c, b, k: None, "NoneType"),
    ):
        with pytest.raises(ValueError, match=f"{must}{returned}(\n|$)"):
            rlhf.train_step(loss_fn, optimizer)(start(optimizer), {"x": jnp.zeros(4)})
    with pytest.raises(
        ValueError, match=r"scores_fn must return one entry a row, \[4, ...\], but returned \[3\]"
    ):
        rlhf.coupled_train_step(
            lambda p, c, b, k: jnp.zeros(3), lambda s, c, b: (s.sum(), {}), optimizer
        )(start(optimizer), {"x": jnp.zeros(4)})


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    optimizer = optax.adam(0.1)
    noisy = lambda params, context, batch, key: (
        ((batch["x"] - params["w"] - jax.random.normal(key)) ** 2).sum() + context["coef"] * params["w"] ** 2, {}
    )  # fmt: skip
    step = jax.jit(
        rlhf.train_step(
            noisy,
            optimizer,
            micro_batches=2,
            update_context=lambda c, p, m: {"coef": c["coef"] * 1.1},
        )
    )
    fresh = lambda: start(optimizer, {"coef": jnp.ones(())})
    data = lambda i: {"x": jnp.arange(4.0) * i}

    state = fresh()
    for i in range(3):
        state, _ = step(state, data(i))
    checkpoints = Checkpoints(tmp_path / "run", keep=2)
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoints.restore(fresh())
    checkpoints.save(state)
    straight = state
    for i in range(3, 6):
        straight, _ = step(straight, data(i))

    checkpoints.wait()
    resumed = Checkpoints(tmp_path / "run").restore(fresh())
    assert int(resumed.step) == 3
    for i in range(3, 6):
        resumed, _ = step(resumed, data(i))
    for path, x in jax.tree_util.tree_leaves_with_path(straight):
        y = dict(jax.tree_util.tree_leaves_with_path(resumed))[path]
        raw = lambda z: (
            jax.random.key_data(z) if jax.dtypes.issubdtype(z.dtype, jax.dtypes.prng_key) else z
        )
        np.testing.assert_array_equal(raw(x), raw(y), err_msg=jax.tree_util.keystr(path))
