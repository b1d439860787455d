"""Differences and deviations of nearly equal numbers, against float64: nothing is made of rounding."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf import losses
from rlhf.losses import advantages, groups, moments, value

G = 32
MAGNITUDES = [10.0**n for n in range(-6, 7, 2)]
OFFSETS = [3e-6, 1e-3, 0.65, 3.0]  # of the one that is not equal, as a share of the others
ULP = 2.0**-23


def means(r):
    return r.mean(-1, keepdims=True)


def of_others(r, statistic):
    return np.stack([statistic(np.delete(r, i, -1)) for i in range(r.shape[-1])], -1)


def over(numbers, spread, eps):
    return np.where(spread > 0, numbers / np.where(spread > 0, spread + eps, 1.0), numbers)


def bessel(r):
    return r.std(-1, ddof=1)[..., None]


TRUTH = {  # name -> (ours, by definition in float64), of [P, G]
    "grpo": (groups.group_relative, lambda r: over(r - means(r), bessel(r), 1e-4)),
    "dr_grpo": (groups.dr_grpo, lambda r: r - means(r)),
    "lite_ppo": (groups.lite_ppo, lambda r: over(r - means(r), r.std(ddof=1), 1e-4)),
    "rloo": (groups.rloo, lambda r: r - of_others(r, lambda x: x.mean(-1))),
    "leave_one_out": (
        groups.leave_one_out,
        lambda r: over(
            r - of_others(r, lambda x: x.mean(-1)), of_others(r, lambda x: x.std(-1, ddof=1)), 1e-6
        ),
    ),
    "max_rl": (groups.max_rl, lambda r: over(r - means(r), means(r), 1e-4)),
    "opo": (lambda r: groups.opo(r, jnp.ones(r.shape, jnp.int32)), lambda r: r - means(r)),
    "pass_at_k": (
        lambda r: groups.pass_at_k(r, std=groups.group_std),
        lambda r: np.maximum(over(r - np.sort(r)[:, -2:-1], bessel(r), 1e-4), 0),
    ),
    "whiten": (
        lambda r: advantages.whiten(r, jnp.ones(r.shape, bool)),
        lambda r: (r - r.mean()) / np.sqrt(r.var(ddof=1) + 1e-8),
    ),
}
CLEAN = [*((m, 0.0) for m in MAGNITUDES), *((m, offset) for m in MAGNITUDES for offset in OFFSETS)]


def rows(magnitude, offset):
    """One group, 0.35 times a magnitude but for one sample; as float32 holds them."""
    r = np.full((1, G), 0.35 * magnitude)
    r[0, 5] *= 1 + offset
    return r.astype(np.float32)


@pytest.mark.parametrize("name", TRUTH)
def test_all_and_all_but_one_equal_as_in_float64(name):
    ours, truth = TRUTH[name]
    for magnitude, offset in CLEAN:
        r = rows(magnitude, offset)
        want = truth(r.astype(np.float64))
        got = np.asarray(ours(jnp.asarray(r)))
        if offset == 0:
            np.testing.assert_array_equal(got, 0.0, err_msg=f"{magnitude}")
        np.testing.assert_allclose(
            got, want, atol=1e-5 * np.abs(want).max(), err_msg=f"{magnitude} {offset}"
        )


@pytest.mark.parametrize("name", TRUTH)
@pytest.mark.parametrize("sign", [1, -1])
def test_what_differs_by_rounding_is_equal(name, sign):
    ours, _ = TRUTH[name]
    rng = np.random.default_rng(0)
    for magnitude in MAGNITUDES:
        noise = 1 + ULP * rng.integers(-1, 2, (3, G))
        r = sign * (0.35 * magnitude * noise).astype(np.float32)
        assert len(np.unique(r)) > 1
        np.testing.assert_array_equal(np.asarray(ours(jnp.asarray(r))), 0.0, err_msg=f"{magnitude}")


def test_the_others_agree_but_for_rounding():
    """One sample is apart, the others have no spread to divide by."""
    rng = np.random.default_rng(1)
    r = (0.35 * (1 + ULP * rng.integers(-1, 2, (1, G)))).astype(np.float32)
    r[0, 0] = 1.0
    got = np.asarray(groups.leave_one_out(jnp.asarray(r)))
    assert got[0, 0] == pytest.approx(0.65, abs=1e-6)


def test_samples_without_a_score_change_nothing():
    """Seen beside the same group without them."""
    r = np.array([[1.0, 0.35, 0.35, 0.35, 0.9]], np.float32)
    holes = np.insert(r, [0, 2, 5], np.nan, axis=-1)
    for name, (ours, _) in TRUTH.items():
        if name in ("whiten", "opo"):
            continue
        got = np.asarray(ours(jnp.asarray(holes)))[~np.isnan(holes)]
        np.testing.assert_allclose(
            got, np.asarray(ours(jnp.asarray(r)))[0], rtol=1e-6, err_msg=name
        )


@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_running_moments_and_explained_variance(magnitude):
    running = moments.running()
    state, seen = running.init(), []
    for offset in (0.0, 0.0, 1e-3, 0.65):
        r = rows(magnitude, offset)[0]
        state = running.update(state, jnp.asarray(r))
        seen.append(r)
        whole = np.concatenate(seen).astype(np.float64)
        np.testing.assert_allclose(state.mean, whole.mean(), rtol=1e-6)
        np.testing.assert_allclose(state.variance, whole.var(ddof=1), rtol=1e-4)
        if offset == 0:
            np.testing.assert_array_equal(running.scale(state, jnp.asarray(r)), 0.0)
    noise = 1 + ULP * np.random.default_rng(0).integers(-1, 2, G)
    returns = jnp.asarray((0.35 * magnitude * noise).astype(np.float32))
    assert float(value.explained_variance(jnp.zeros(G), returns, jnp.ones(G, bool))) == 0
    whitened = losses.advantages.whiten_rewards(returns, jnp.ones(G, bool))
    np.testing.assert_allclose(whitened, 0.35 * magnitude, rtol=1e-6)
