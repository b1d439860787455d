"""Properties of every public function of `rlhf.losses`, whatever the numbers: Hypothesis draws seeds, masks and scales.

The shapes are those of the contract suite, so that nothing is compiled anew.
"""

import jax
import numpy as np
import pytest
from contracts import CASES
from contracts.case import ROWS
from contracts.run import (
    HAS_MASK,
    IGNORES,
    assert_close,
    assert_equal,
    call,
    ignored,
    inputs_of,
    split_floats,
    weights_for,
)
from hypothesis import given, settings
from hypothesis import strategies as st

every_function = pytest.mark.parametrize("name", CASES)
drawn = settings(max_examples=4, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1)
densities = st.sampled_from([0.0, 0.3, 0.7, 1.0])
APART = [name for name, case in CASES.items() if not case.couples and case.per in ("token", "row")]


def drawn_inputs(name, seed, density, exponent=0):
    """A case's arrays with another mask, and their numbers times a power of ten."""
    arrays, rng = inputs_of(name, seed=seed), np.random.default_rng(seed)
    if "mask" in arrays:
        arrays["mask"] = rng.random(arrays["mask"].shape) < density
    floats, rest = split_floats(arrays)
    return rest | {key: (x * 10.0**exponent).astype(np.float32) for key, x in floats.items()}


@every_function
@given(seed=seeds, density=densities, exponent=st.sampled_from([-4, 0, 2, 4]))
@drawn
def test_extreme_numbers_give_finite_results_and_zeros_under_the_mask(
    name, seed, density, exponent
):
    arrays = drawn_inputs(name, seed, density, exponent)
    out, gradients, _ = call(name, arrays)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((out, gradients)))
    if name not in IGNORES:
        return
    for key, here in ignored(name, arrays).items():
        assert not gradients[key][here].any()
    if name in HAS_MASK and CASES[name].per == "token" and not CASES[name].untrained:
        assert not any(x[~arrays["mask"]].any() for x in jax.tree.leaves(out))


@pytest.mark.parametrize("name", IGNORES)
@given(seed=seeds, density=densities, junk=st.sampled_from([np.nan, np.inf, -np.inf, 1e30]))
@drawn
def test_what_is_under_any_mask_changes_nothing(name, seed, density, junk):
    arrays = drawn_inputs(name, seed, density)
    dirty = {
        key: np.where(here, np.float32(junk), arrays[key])
        for key, here in ignored(name, arrays).items()
    }
    assert_equal(call(name, arrays | dirty), call(name, arrays))


@pytest.mark.parametrize("name", APART)
@given(seed=seeds, density=densities)
@drawn
def test_rows_in_another_order_give_the_same_in_that_order(name, seed, density):
    arrays = drawn_inputs(name, seed, density)
    order = np.random.default_rng(seed).permutation(ROWS)
    shuffle = lambda x: x[order] if np.ndim(x) and len(x) == ROWS else x
    weights = weights_for(name, arrays)
    got = call(name, jax.tree.map(shuffle, arrays), weights=jax.tree.map(shuffle, weights))[:2]
    want = call(name, arrays, weights=weights)[:2]
    per_row = lambda x: shuffle(x) if x.ndim and len(x) == ROWS else x
    assert_close(got, jax.tree.map(per_row, want), 1e-5)
