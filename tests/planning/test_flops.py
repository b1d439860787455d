"""Operations that are counted against formulas."""

import jax
import jax.numpy as jnp
import pytest

from rlhf import sharding
from rlhf.models import TransformerConfig, transformer
from rlhf.models.flash import Options, flash
from rlhf.models.splash import splash
from rlhf.planning import flops

B, T, D, F, V, LAYERS = 2, 8, 16, 32, 24, 3


def count(fn, *args):
    return flops.counted(jax.make_jaxpr(fn)(*args)).work.flops


def test_products_and_groups():
    x = jnp.ones((6, 4))
    assert count(lambda x: x @ x.T, x) == 2 * 6 * 4 * 6
    groups = jnp.array([2, 4])
    assert count(lambda x: jax.lax.ragged_dot(x, jnp.ones((2, 4, 5)), groups), x) == 2 * 6 * 4 * 5
    image, kernel = jnp.ones((1, 3, 8)), jnp.ones((5, 3, 2))

    def convolved(image):
        return jax.lax.conv_general_dilated(image, kernel, (1,), "VALID")

    assert count(convolved, image) == 2 * (5 * 7) * (3 * 2)


def test_the_dearer_branch_and_what_is_used_alone():
    x = jnp.ones((4, 4))

    def fn(x):
        _ = x @ x @ x
        return jax.lax.cond(x.sum() > 0, lambda x: x @ x, lambda x: x, x)

    assert count(fn, x) == 2 * 4**3


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_model_s_gradient(remat):
    """2 operations a parameter and token forward, twice that backward, and the forward pass again."""
    config = TransformerConfig(V, D, LAYERS, 2, F, remat=remat)
    lm = transformer(config)
    params = lm.init(jax.random.key(0))
    tokens = jnp.ones((B, T), jnp.int32)
    where = {"positions": jnp.tile(jnp.arange(T), (B, 1)), "segment_ids": tokens}

    def loss(params):
        hidden, _, _ = lm.hidden(params, tokens, **where)
        return hidden.sum()

    counted = flops.counted(jax.make_jaxpr(jax.grad(loss))(params))
    matrices = 4 * D * D + 3 * D * F
    scores = 2 * T * D  # of queries with keys, and with values; the half that is masked too
    a_layer = 2 * B * T * (matrices + scores)
    least, most = (3, 3) if remat == "none" else (3.5, 4)
    assert least * LAYERS * a_layer <= counted.work.flops * 1.001
    assert counted.work.flops <= 1.001 * most * LAYERS * a_layer
    kept = LAYERS * B * T * D * 4
    assert (counted.saved == kept) if remat == "full" else (counted.saved > 5 * kept)


def test_a_loop_that_ends_early_is_a_token():
    x = jnp.ones((4, 4))

    def fn(x):
        return jax.lax.while_loop(lambda x: x.sum() < 9.0, lambda y: y @ x, x @ x)

    counted = flops.counted(jax.make_jaxpr(fn)(x))
    assert counted.work.flops == 2 * 4**3
    (loop,) = counted.loops
    assert (loop.work.flops, loop.carried) == (2 * 4**3, 4 * 4 * 4)


def test_each_device_of_a_shard_map_counts_but_for_axes_left_to_xla():
    mesh = sharding.make_mesh(fsdp=4, tensor=2)

    def fn(x):
        rows = jax.sharding.PartitionSpec("fsdp")
        square = jax.shard_map(
            lambda x: x @ x.T @ x, in_specs=rows, out_specs=rows, axis_names={"fsdp"}
        )
        return square(x)

    with jax.set_mesh(mesh):
        assert count(fn, jnp.ones((8, 16))) == 4 * 2 * (2 * 2 * 2 * 16)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kernel", ["splash", "flash"])
def test_kernels_are_counted_by_formula(kernel, rows):
    """Half of the scores: 2 products forwards, 7 backwards where scores are computed twice; of one row as of several."""
    heads, length, width = 2, 256, 64
    q = jnp.ones((rows, heads, length, width), jnp.bfloat16)
    ids = jnp.ones((rows, length), jnp.int32)

    def loss(q, k, v):
        if kernel == "splash":
            return splash(q, k, v, ids, ids).sum()
        return flash(q, k, v, ids, ids, ids, ids, Options()).sum()

    product = 2 * rows * heads * length * length / 2 * width
    # The sums of out · d_out of the backward pass count too, and are small.
    found = count(jax.grad(loss, argnums=(0, 1, 2)), q, q, q)
    assert found == pytest.approx((2 + 7) * product, rel=0.01)
