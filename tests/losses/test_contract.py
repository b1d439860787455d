"""The contract that every public function of `rlhf.losses` keeps; a function without an entry in `CASES` fails the suite.

Each function is compiled with the gradient of a weighted sum of its outputs, once per shape, and the checks share that.
"""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import CASES
from contracts.case import COLUMNS, EMPTY, ROWS
from contracts.run import (
    FUNCTIONS,
    HAS_MASK,
    IGNORES,
    PACKS,
    TRACES,
    assert_close,
    assert_equal,
    call,
    differentiated,
    eager,
    ignored,
    inputs_of,
    narrowing,
    split_floats,
    weights_for,
)
from jax.sharding import NamedSharding, PartitionSpec
from marks import exhaustive

HALF = slice(ROWS // 2)  # what is left when rows and columns are cropped
LEFT = slice(COLUMNS - 2)

# Fields of a `Batch` that are None unless somebody gives them.
SET_BY_USERS = {"old_logprobs", "ref_logprobs", "advantages", "weights", "values", "returns"}
OF_BATCHES = ("policy", "kl", "value", "ratios", "weights")  # modules that read them as they are

# By default one function of three, and the first of each module.
QUICK = {*list(CASES)[::3], *{name.split(".")[0]: name for name in reversed(CASES)}.values()}


def some(names):
    names = list(names)
    return exhaustive(names, quick=[name for name in names if name in QUICK])


every_function = pytest.mark.parametrize("name", some(CASES))
ADDS_UP = [name for name, case in CASES.items() if not case.couples]


def test_every_public_function_is_here():
    assert set(FUNCTIONS) == set(CASES)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_shows_an_example(name):
    assert ">>> " in inspect.getdoc(FUNCTIONS[name])


@pytest.mark.parametrize("name", some(CASES))
def test_jit_equals_eager(name):
    assert_close(call(name, inputs_of(name))[0], eager(name, inputs_of(name)))


@every_function
def test_other_values_and_knobs_do_not_compile(name):
    call(name, inputs_of(name))
    before = TRACES[name]
    call(
        name,
        inputs_of(name, seed=1),
        knobs={key: 1.1 * value for key, value in CASES[name].knobs.items()},
    )
    assert TRACES[name] == before


@pytest.mark.exhaustive
@every_function
def test_half_precision_is_widened_first(name):
    for half in (jnp.bfloat16, jnp.float16):
        arrays = {
            key: x.astype(half) if x.dtype == np.float32 else x
            for key, x in inputs_of(name).items()
        }
        out = jax.eval_shape(
            lambda arrays: differentiated(name)[1](**arrays, **CASES[name].knobs), arrays
        )
        narrow = (half,) if CASES[name].moves else ()
        assert all(
            x.dtype in (jnp.float32, jnp.int32, jnp.bool_, *narrow) for x in jax.tree.leaves(out)
        )
    if not split_floats(inputs_of(name))[0]:
        return
    arrays = {
        key: x.astype(jnp.bfloat16) if x.dtype == np.float32 else x
        for key, x in inputs_of(name).items()
    }
    wide = {
        key: x.astype(np.float32) if x.dtype == jnp.bfloat16 else x for key, x in arrays.items()
    }
    got, gradients, _ = call(name, arrays)
    assert_close(got, call(name, wide)[0], 1e-2 if CASES[name].moves else 1e-5)
    assert all(x.dtype == jnp.bfloat16 for x in gradients.values())


@every_function
def test_double_precision_stays(name):
    """No step of the program, forward or backward, makes less of it."""
    with jax.enable_x64(True):
        arrays, knobs = CASES[name].inputs(np.random.default_rng(0)), CASES[name].knobs
        compiled, plain = differentiated(name)
        if CASES[name].flow:
            program = compiled.trace(arrays, knobs, weights_for(name, arrays, np.float64)).jaxpr
        else:
            program = jax.make_jaxpr(lambda arrays: plain(**arrays, **knobs))(arrays)
    assert not list(narrowing(program.jaxpr))


@pytest.mark.parametrize("name", IGNORES)
def test_what_is_under_the_mask_changes_nothing(name):
    arrays = inputs_of(name)
    want = call(name, arrays)
    where = ignored(name, arrays)
    for junk in (np.nan, np.inf, -np.inf):
        dirty = {
            key: np.where(where[key], np.float32(junk), x) if key in where else x
            for key, x in arrays.items()
        }
        assert_equal(call(name, dirty), want)
        assert_close(
            eager(name, dirty), want[0]
        )  # the compiler makes a choice of a product with a mask: it would hide one
    out, gradients, _ = want
    for key, here in where.items():
        assert not gradients[key][here].any()
    if CASES[name].per == "token" and not CASES[name].untrained:
        assert not any(x[~arrays["mask"]].any() for x in jax.tree.leaves(out))


@pytest.mark.parametrize("name", IGNORES)
def test_nothing_trained_is_zero(name):
    arrays = inputs_of(name)
    nothing = "mask" if "mask" in arrays else "weights"
    arrays[nothing] = np.zeros_like(arrays[nothing])
    arrays |= {key: np.full_like(arrays[key], np.nan) for key in ignored(name, arrays)}
    out, gradients, _ = call(name, arrays)
    assert all((x == CASES[name].empty).all() for x in jax.tree.leaves((out, eager(name, arrays))))
    assert not any(x.any() for x in gradients.values())


@pytest.mark.parametrize("name", some(HAS_MASK))
def test_masked_equals_cropped(name):
    arrays = inputs_of(name)
    arrays["mask"][HALF.stop :] = False
    arrays["mask"][:, LEFT.stop :] = False
    crop = lambda x: (
        x[HALF, LEFT] if x.ndim > 1 and x.shape[1] == COLUMNS else x[HALF] if x.ndim else x
    )
    weights = weights_for(name, arrays)
    got = call(name, arrays, weights=weights)[:2]
    want = call(name, jax.tree.map(crop, arrays), weights=jax.tree.map(crop, weights))[:2]
    assert_close(jax.tree.map(crop, got), want, 1e-6)


@every_function
def test_unequal_shapes_are_refused(name):
    arrays = inputs_of(name)
    if name in PACKS:
        arrays |= {"segment_ids": np.ones((ROWS, COLUMNS), np.int32)}
    together = {
        key: x
        for key, x in arrays.items()
        if key not in (*CASES[name].apart, *CASES[name].per_sequence)
    }
    for key, x in together.items() if len(together) > 1 else ():
        for wrong in (x[:-1], x[:1]) + ((x[:, :-1], x[:, :1]) if x.ndim > 1 else ()):
            with pytest.raises(ValueError, match=r"\w+ \[.*\] but \w+ \[") as error:
                differentiated(name)[1](**(arrays | {key: wrong}), **CASES[name].knobs)
            one, shape, other, expected = re.search(
                r"(\w+) (\[.*?\]) but (\w+) (\[.*?\])", str(error.value)
            ).groups()
            assert str(list(wrong.shape)) in (shape, expected)
            assert shape != expected
            assert {one, other} <= {*arrays, "array"}


@pytest.mark.parametrize("name", [name for name in CASES if name.split(".")[0] in OF_BATCHES])
def test_a_field_that_was_never_set_is_named(name):
    """A `Batch` has None where nobody gave an array."""
    arrays = inputs_of(name)
    optional = {
        key for key, x in inspect.signature(FUNCTIONS[name]).parameters.items() if x.default is None
    }
    for key in sorted((arrays.keys() & SET_BY_USERS) - optional):
        with pytest.raises(ValueError, match=rf"^{key} is None; give an array"):
            FUNCTIONS[name](**(arrays | {key: None}), **CASES[name].knobs)


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name in HAS_MASK for key in CASES[name].per_sequence]
)
def test_one_number_per_sequence(name, key):
    for wrong in (np.ones(ROWS - 1), np.ones(1), np.ones((ROWS, 1)), np.ones(())):
        with pytest.raises(ValueError, match=re.escape(f"B = {ROWS}, but is {list(wrong.shape)}")):
            differentiated(name)[1](
                **(inputs_of(name) | {key: jnp.asarray(wrong, inputs_of(name)[key].dtype)})
            )


@pytest.mark.parametrize("name", some(HAS_MASK))
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_a_mask_is_boolean(name, dtype):
    arrays = inputs_of(name)
    with pytest.raises(TypeError, match=f"mask must be bool.*{np.dtype(dtype).name}"):
        differentiated(name)[1](
            **(arrays | {"mask": arrays["mask"].astype(dtype)}), **CASES[name].knobs
        )


@every_function
def test_gradients_flow_where_the_docstring_says_and_nowhere_else(name):
    _, gradients, _ = call(name, inputs_of(name))
    assert {key for key, x in gradients.items() if x.any()} == set(CASES[name].flow)


@pytest.mark.exhaustive
@every_function
def test_sharded_equals_unsharded(name):
    arrays = inputs_of(name)
    weights = weights_for(name, arrays)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = lambda x: PartitionSpec("data") if x.ndim and x.shape[0] == ROWS else PartitionSpec()
    sharded, weights_sharded = jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, rows(x))), (arrays, weights)
    )
    compiled = differentiated(name)[0].lower(sharded, CASES[name].knobs, weights_sharded).compile()
    got = compiled(sharded, CASES[name].knobs, weights_sharded)
    assert_close(jax.tree.map(np.asarray, got), call(name, arrays, weights=weights))
    if not CASES[name].couples:  # rows stay where they are
        assert "all-gather" not in compiled.as_text()


@pytest.mark.parametrize("name", some(ADDS_UP))
@pytest.mark.parametrize("parts", [4])
def test_micro_batches_sum_to_the_whole(name, parts):
    arrays = inputs_of(name)
    weights = weights_for(name, arrays)
    _, gradients, whole = call(name, arrays, weights=weights)
    split = lambda x, part: x[part::parts] if x.shape and x.shape[0] == ROWS else x
    total, summed = np.float32(0), jax.tree.map(np.zeros_like, gradients)
    for part in range(parts):
        here, weights_here = jax.tree.map(functools.partial(split, part=part), (arrays, weights))
        _, part_gradients, part_total = call(name, here, weights=weights_here)
        total += part_total
        for key, x in part_gradients.items():
            split(summed[key], part)[...] += x
    assert_close((total, summed), (whole, gradients))


@every_function
def test_rows_are_coupled_only_where_it_says(name):
    if CASES[name].per == "batch":
        return
    arrays, others = inputs_of(name), inputs_of(name, seed=1)
    swap = lambda x, y: (
        np.concatenate([x[:EMPTY], y[:1], x[EMPTY + 1 :]]) if x.shape[0] == ROWS else x
    )
    changed = call(name, {key: swap(x, others[key]) for key, x in arrays.items()})[0]
    differs = jax.tree.map(
        lambda x, y: np.delete(x != y, EMPTY, axis=0).any(), changed, call(name, arrays)[0]
    )
    assert CASES[name].couples == any(jax.tree.leaves(differs))


# ---- packing ----------------------------------------------------------------------------------------------------------

LENGTHS = np.array(
    [6, 3, 4, 5, 1, 2, 6, 3]
)  # rows 2i and 2i + 1 share the packed row i; columns beyond the second are padding
WIDTH, SEGMENTS = 13, 3  # and no row has a third sequence


def pack(x, padding=0):
    """`[ROWS, COLUMNS]` -> `[ROWS / 2, WIDTH]`, and `[ROWS]` -> `[ROWS / 2 * SEGMENTS]`."""
    if x.ndim == 1:
        return np.pad(
            x.reshape(-1, 2), ((0, 0), (0, SEGMENTS - 2)), constant_values=padding
        ).reshape(-1)
    packed = np.full_like(x, padding, shape=(ROWS // 2, WIDTH))
    for row, length in enumerate(LENGTHS):
        start = LENGTHS[row - 1] if row % 2 else 0
        packed[row // 2, start : start + length] = x[row, :length]
    return packed


@pytest.mark.parametrize("name", some(PACKS))
def test_packed_equals_unpacked(name):
    arrays = inputs_of(name)
    inside = np.arange(COLUMNS) < LENGTHS[:, None]
    arrays["mask"] &= inside
    weights = weights_for(name, arrays)
    want = call(name, arrays, weights=weights)[:2]
    in_segment = lambda x: np.where(inside, x, 0) if x.ndim == 2 else x
    want_in_segment = jax.tree.map(in_segment, want)

    ids = np.where(inside, 1, 0).astype(np.int32)
    one_segment = call(name, arrays | {"segment_ids": ids}, weights=weights)[:2]
    assert_close(jax.tree.map(in_segment, one_segment), want_in_segment, 1e-6)

    # What belongs to no sequence, or to one that nothing is trained of, holds junk.
    dirty = {
        key: np.where(here, np.nan, arrays[key]).astype(np.float32)
        for key, here in ignored(name, arrays).items()
    }
    packed = {
        key: pack(x, np.nan if x.dtype == np.float32 else 0) for key, x in (arrays | dirty).items()
    }
    packed["segment_ids"] = pack(np.where(inside, 1 + np.arange(ROWS)[:, None] % 2, 0)).astype(
        np.int32
    )
    static = {"max_segments": SEGMENTS} if "max_segments" in CASES[name].static else {}
    packed_weights = jax.tree.map(lambda x: pack(x, 1) if x.ndim else x, weights)
    got = call(name, packed, weights=packed_weights, **static)[:2]
    assert_close(got, jax.tree.map(lambda x: pack(x) if x.ndim else x, want_in_segment), 1e-6)


# ---- knobs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "knobs", "message"), [(name, *case) for name in CASES for case in CASES[name].refuses]
)
def test_knobs_out_of_range(name, knobs, message):
    with pytest.raises(ValueError, match=message):
        FUNCTIONS[name](**inputs_of(name), **(CASES[name].knobs | knobs))
