"""The decoder against itself: training path, cached path, padding, packing; and the attention's slow definition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import exhaustive

from rlhf.models import (
    Experts,
    LayerKind,
    Rope,
    TransformerConfig,
    q_head,
    scalar_head,
    transformer,
)
from rlhf.models.attention import attention
from rlhf.models.huggingface_config import config_of
from rlhf.models.rotary import Dynamic, LongRope

LENGTH = 7
KINDS = (LayerKind(window=3, rope=Rope(100.0)), LayerKind(window=20, rope=Rope(1000.0)))
CONFIG = TransformerConfig(
    vocab_size=13, hidden_size=8, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, mlp_size=12, kinds=KINDS,
    norm_place="both", norm_offset=1.0, qk_norm="head", qkv_bias=True, out_bias=True, mlp_bias=True, attention_softcap=4.0,
    final_softcap=3.0, embed_scale=2.0,
)  # fmt: skip
LM = transformer(CONFIG)
TOKENS = np.random.default_rng(0).integers(0, 13, (2, LENGTH), np.int32)
POSITIONS = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))
ONES = np.ones_like(TOKENS)

assert_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=3e-6)


def random_params(lm, seed=0):
    """Every parameter away from its initial value, norms and biases too."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lm.init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), x.dtype), shapes)


PARAMS = random_params(LM)


@functools.partial(jax.jit, static_argnums=0)
def run_all(lm, params, tokens, positions, segment_ids, cache=None):
    return lm.hidden(params, tokens, positions=positions, segment_ids=segment_ids, cache=cache)


def run(*args):
    hidden, cache, aux = run_all(*args)
    assert set(aux) <= {"routing", "experts"}
    return hidden, cache


@functools.cache
def whole():
    return np.asarray(run(LM, PARAMS, TOKENS, POSITIONS, ONES)[0])


# --- one path is the other ---------------------------------------------------------------------------------------------


SPARSE = dict(
    kinds=(KINDS[0], LayerKind(window=20, rope=Rope(1000.0), sparse=True)),
    experts=Experts(4, 2, 5),
)
LONG = LongRope(short=(1.0, 1.1, 1.2), long=(2.0, 3.0, 4.0), original=3, attention_factor=1.3)
NO_ROPE = dict(kinds=(LayerKind(rope=None),))
VARIANTS = {
    "windows": {},
    "experts": SPARSE,
    "longrope": dict(kinds=(LayerKind(rope=Rope(100.0, scaling=LONG)),)),
    "dynamic": dict(kinds=(LayerKind(rope=Rope(100.0, scaling=Dynamic(2.0, 3))),)),
    "pairs": dict(kinds=(LayerKind(rope=Rope(100.0, share=0.7, interleaved=True)),), parallel=2),
    "alibi": dict(NO_ROPE, alibi=True),
    "relative": dict(NO_ROPE, relative_buckets=6, relative_distance=5),
    "learned": dict(
        NO_ROPE,
        max_positions=LENGTH,
        position_offset=2,
        norm_place="sum",
        final_norm=False,
        embed_norm=True,
    ),
}


@functools.cache
def variant(name):
    lm = transformer(dataclasses.replace(CONFIG, **VARIANTS[name]))
    params = PARAMS if name == "windows" else random_params(lm)
    return lm, params, np.asarray(run(lm, params, TOKENS, POSITIONS, ONES)[0])


@pytest.mark.parametrize(
    "name", ["windows", "experts", "longrope", "dynamic"]
)  # the others: what is generated is what is scored
def test_cached_equals_uncached(name):
    """Three layers of two kinds: the scan takes two, the third follows; one window is shorter than the row, one longer.

    Rows past the length at which long-rope factors change, from the first read on: before it they would be others.
    """
    lm, params, expected = variant(name)
    cache, prefill = lm.init_cache(2, LENGTH + 2), 4 if name != "dynamic" else LENGTH
    hidden, cache = run(
        lm, params, TOKENS[:, :prefill], POSITIONS[:, :prefill], ONES[:, :prefill], cache
    )
    out = [hidden]
    for t in range(prefill, LENGTH):
        here = slice(t, t + 1)
        hidden, cache = run(lm, params, TOKENS[:, here], POSITIONS[:, here], ONES[:, here], cache)
        out.append(hidden)
    assert_close(np.concatenate(out, axis=1), expected)
    np.testing.assert_array_equal(cache.written, [LENGTH, LENGTH])
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(cache))


@pytest.mark.parametrize("name", exhaustive(["windows", "experts"], quick=["experts"]))
def test_parameters_for_decoding_are_narrow_and_give_the_same_bits(name):
    lm, params, _ = variant(name)
    half = transformer(dataclasses.replace(config_of(lm), dtype=jnp.bfloat16))
    narrow = half.unstack(params)
    rows = TOKENS[:, :4], POSITIONS[:, :4], ONES[:, :4]
    logits = [
        half.unembed(each, run(half, each, *rows, half.init_cache(2, LENGTH))[0])
        for each in (params, narrow)
    ]
    np.testing.assert_array_equal(*logits)
    (first, *_) = narrow["layers"]
    assert {first["q"].dtype, narrow["embedding"].dtype} == {jnp.dtype(jnp.bfloat16)}
    assert first["attention_norm"].dtype == jnp.float32


def test_a_position_beyond_the_cache_is_nan():
    """Never a wrong angle: angles are read from a table of the cache's columns."""
    lm, params, _ = variant("windows")
    at = lambda start: run(
        lm, params, TOKENS[:, :2], POSITIONS[:, :2] + start, ONES[:, :2], lm.init_cache(2, 4)
    )[0]
    assert np.isfinite(at(2)).all()
    assert np.isnan(at(3)).all()


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_each_layer_is_of_its_kind(layer):
    """A layer that adds nothing is as good as absent, so that one is left, which has a window and a rotary base of its own."""
    only = np.arange(3) == layer
    silent = {
        name: x * only.reshape(3, *[1] * (x.ndim - 1))
        if name in ("o", "o_bias", "down", "down_bias")
        else x
        for name, x in PARAMS["layers"].items()
    }
    alone = transformer(dataclasses.replace(CONFIG, num_layers=1, kinds=KINDS[layer % 2 :][:1]))
    kept = {
        **PARAMS,
        "layers": {name: x[layer : layer + 1] for name, x in PARAMS["layers"].items()},
    }
    expected, _ = run(alone, kept, TOKENS, POSITIONS, ONES)
    assert_close(run(LM, {**PARAMS, "layers": silent}, TOKENS, POSITIONS, ONES)[0], expected)


def test_padding_on_the_left_changes_nothing():
    """In the row that is scored, and in the row that is decoded with a cache: the pads come first there too."""
    pad = lambda x, value: np.concatenate(
        [np.full((2, 2), value, np.int32), x[:, : LENGTH - 2]], axis=1
    )
    padded = (pad(TOKENS, 5), pad(POSITIONS, 0), pad(ONES, 0))
    assert_close(run(LM, PARAMS, *padded)[0][:, 2:], whole()[:, : LENGTH - 2])
    assert_close(
        run(LM, PARAMS, *padded, LM.init_cache(2, LENGTH + 2))[0][:, 2:], whole()[:, : LENGTH - 2]
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_sequences_equal_separate_rows(name):
    """Each with its own positions, and its own length where the rotary frequencies depend on it."""
    lm, params, _ = variant(name)
    packed = np.concatenate([TOKENS[:, :4], TOKENS[::-1, :3]], axis=1)
    ids = np.array([[1, 1, 1, 1, 2, 2, 2]] * 2, np.int32)
    hidden = run(lm, params, packed, np.array([[0, 1, 2, 3, 0, 1, 2]] * 2, np.int32), ids)[0]
    padded = lambda tokens, n: run(lm, params, tokens, POSITIONS, (np.arange(LENGTH) < n) * ONES)[
        0
    ][:, :n]
    assert_close(hidden[:, :4], padded(TOKENS, 4))
    assert_close(hidden[:, 4:], padded(TOKENS[::-1], 3))


def test_routing_is_counted_over_sparse_layers_and_real_tokens():
    """By the scan as by the cached path; the dense layers of the same model route nothing."""
    lm, params, _ = variant("experts")
    real = ONES * (np.arange(LENGTH) < np.array([[LENGTH], [3]]))
    caches = None, lm.init_cache(2, LENGTH + 2)
    both = [run_all(lm, params, TOKENS, POSITIONS, real, cache)[2]["routing"] for cache in caches]
    jax.tree.map(assert_close, *both)
    np.testing.assert_array_equal(both[0].tokens, [LENGTH, 3])  # one sparse layer of three
    assert_close(both[0].choices.sum(1), 2 * both[0].tokens)
    assert_close(both[0].probs.sum(1), both[0].tokens)


def test_a_row_does_not_depend_on_its_neighbours():
    """A long row beside a short one: each has the long-rope factors of its own length."""
    lm, params, expected = variant("longrope")
    short = ONES * (np.arange(LENGTH) < np.array([[LENGTH], [3]]))
    both = np.asarray(run(lm, params, TOKENS, POSITIONS * short, short)[0])
    assert_close(both[0], expected[0])
    plain = LONG.short  # as if there were no other factors
    narrow = dataclasses.replace(LONG, long=plain)
    alone = transformer(
        dataclasses.replace(CONFIG, kinds=(LayerKind(rope=Rope(100.0, scaling=narrow)),))
    )
    assert_close(both[1, :3], run(alone, params, TOKENS, POSITIONS, ONES)[0][1, :3])


def test_nothing_of_the_future_or_behind_the_windows_is_seen():
    """Three layers that each see one token back: a change reaches three further, and none before."""
    narrow = transformer(
        dataclasses.replace(CONFIG, kinds=(LayerKind(window=2, rope=Rope(100.0)),))
    )
    changed = TOKENS.copy()
    changed[:, 2] = (changed[:, 2] + 1) % 13
    a, b = (
        np.asarray(run(narrow, PARAMS, tokens, POSITIONS, ONES)[0]) for tokens in (TOKENS, changed)
    )
    moved = np.abs(a - b).max(axis=(0, 2)) > 1e-6
    np.testing.assert_array_equal(moved, [False, False, True, True, True, True, False])


SMALL = TransformerConfig(
    vocab_size=13, hidden_size=4, num_layers=2, num_heads=1, mlp_size=4, kinds=KINDS
)


@functools.cache
def gradients(**fields):
    lm = transformer(dataclasses.replace(SMALL, **fields))
    loss = lambda params: jnp.sum(
        lm.unembed(params, run(lm, params, TOKENS, POSITIONS, ONES)[0]) ** 2
    )
    compiled = jax.jit(jax.grad(loss)).lower(random_params(lm)).compile()
    return compiled(random_params(lm)), compiled.memory_analysis()


def assert_same_gradients(a, b):
    jax.tree.map(lambda a, b: assert_close(a, b, atol=1e-5 * np.abs(a).max()), a, b)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(a))


@pytest.mark.parametrize("remat", ["names", "full"])
def test_remat_gives_the_same_gradients(remat):
    assert_same_gradients(gradients()[0], gradients(remat=remat)[0])


def test_a_window_longer_than_the_row_is_none():
    """In value and gradient."""
    wide = lambda window: tuple(dataclasses.replace(kind, window=window) for kind in KINDS)
    assert_same_gradients(gradients(kinds=wide(LENGTH))[0], gradients(kinds=wide(None))[0])


def test_bfloat16_computes_and_logits_are_float32():
    lm = transformer(dataclasses.replace(CONFIG, dtype=jnp.bfloat16))
    hidden, _ = run(lm, PARAMS, TOKENS, POSITIONS, ONES)
    logits = lm.unembed(PARAMS, hidden)
    assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    assert jax.tree.leaves(lm.init_cache(1, 2).layers)[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(logits, LM.unembed(PARAMS, whole()), rtol=0, atol=0.1)


# --- parameters and identity -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(
            CONFIG,
            norm="layer",
            norm_place="branch",
            gated=False,
            max_positions=9,
            tied=True,
            kinds=(LayerKind(rope=None),),
        ),
        TransformerConfig(vocab_size=5, hidden_size=4, num_layers=1, num_heads=1, mlp_size=8),
    ],
)
def test_axes_name_every_axis_of_every_parameter(config):
    lm = transformer(config)
    named = lambda leaf: isinstance(leaf, tuple)
    shapes, axes = jax.eval_shape(lm.init, jax.random.key(0)), lm.axes()
    jax.tree.map(
        lambda names, x: np.testing.assert_equal(len(names), x.ndim), axes, shapes, is_leaf=named
    )
    assert jax.tree.structure(axes, is_leaf=named) == jax.tree.structure(shapes)
    assert all(names[0] == "layers" for names in axes["layers"].values())


def test_init_gives_plain_parameters_of_the_stated_dtype():
    config = TransformerConfig(
        vocab_size=5, hidden_size=4, num_layers=2, num_heads=1, mlp_size=8, param_dtype=jnp.bfloat16
    )
    params = jax.jit(transformer(config).init)(jax.random.key(0))
    assert all(
        isinstance(x, jax.Array) and x.dtype == jnp.bfloat16 for x in jax.tree.leaves(params)
    )
    assert not np.array_equal(params["layers"]["q"][0], params["layers"]["q"][1])


def test_equal_configs_are_one_compilation():
    again = transformer(dataclasses.replace(CONFIG))
    assert again == LM
    assert hash(again) == hash(LM)
    assert transformer(dataclasses.replace(CONFIG, norm_eps=1e-5)) != LM
    run(LM, PARAMS, TOKENS, POSITIONS, ONES)
    before = run_all._cache_size()
    run(again, PARAMS, TOKENS, POSITIONS, ONES)
    assert run_all._cache_size() == before


def test_scalar_head():
    head = scalar_head(4, scale=0.2)
    params = head.init(jax.random.key(0))
    assert head == scalar_head(4, scale=0.2)
    assert head.axes().keys() == params.keys()
    hidden = jnp.arange(8.0).reshape(2, 4).astype(jnp.bfloat16)
    out = head.apply({**params, "bias": jnp.float32(2)}, hidden)
    assert out.dtype == jnp.float32
    assert_close(out, np.asarray(hidden, np.float32) @ np.asarray(params["weight"]) + 2)


def test_q_head():
    head, state = q_head(4, 6), q_head(4, 1)
    assert head == q_head(4, 6) != state
    params = jax.tree.map(lambda x: x + 0.1, head.init(jax.random.key(1)))
    assert jax.tree.structure(
        head.axes(), is_leaf=lambda x: x is None or isinstance(x, tuple)
    ) == jax.tree.structure(params)
    hidden = np.linspace(-1, 1, 12).reshape(3, 4)
    weights = {name: np.asarray(x, np.float64) for name, x in params.items()}
    inner = np.maximum(hidden @ weights["inner"] + weights["inner_bias"], 0)
    assert inner.shape == (3, 8)
    assert (inner == 0).any()
    assert_close(
        head.apply(params, jnp.asarray(hidden)), inner @ weights["weight"] + weights["bias"]
    )
    assert state.apply(state.init(jax.random.key(1)), jnp.asarray(hidden)).shape == (3,)


# --- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(norm="batch"), r"norm must be one of \('rms', 'layer'\), but is 'batch'"),
        (dict(norm_place="middle"), r"norm_place must be one of .*, but is 'middle'"),
        (dict(activation="swiglu"), r"activation must be one of \('silu', .*\), but is 'swiglu'"),
        (dict(remat="some"), r"remat must be one of .*, but is 'some'"),
        (
            dict(max_positions=9),
            r"learned, relative or ALiBi positions beside rotary ones; give kinds=",
        ),
        (
            dict(kinds=(LayerKind(sparse=True),)),
            r"sparse layers need experts=Experts\(…\)",
        ),
        (
            dict(head_dim=None, num_heads=3, num_kv_heads=3),
            r"num_heads 3 does not divide hidden_size 8",
        ),
        (dict(num_kv_heads=3), r"num_kv_heads 3 does not divide num_heads 4"),
    ],
)
def test_bad_configs_name_both_sides(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_inputs_are_refused():
    with pytest.raises(
        ValueError, match=r"conditioned on its tokens alone, but got inputs \['pixels'\]"
    ):
        LM.hidden(PARAMS, TOKENS, positions=POSITIONS, segment_ids=ONES, inputs={"pixels": TOKENS})


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (dict(v=(2, 2, 4, 3)), r"k \[2, 2, 5, 4\] but v \[2, 2, 4, 3\]"),
        (dict(q=(2, 3, 5, 4)), r"q .* \[2, 3, 5, 4\] but k .* \[2, 2, 5, 4\]; K must divide N"),
        (dict(q=(2, 4, 5, 6)), r"q .* \[2, 4, 5, 6\] but k"),
        (dict(q=(1, 4, 5, 4)), r"q .* \[1, 4, 5, 4\] but k"),
        (dict(positions=(5,)), r"positions \[5\] but expected \[2, 5\]"),
        (dict(segment_ids=(2, 4)), r"segment_ids \[2, 4\] but expected \[2, 5\]"),
        (dict(kv_positions=(2, 6)), r"kv_positions \[2, 6\] but expected \[2, 5\]"),
        (dict(kv_segment_ids=(1, 5)), r"kv_segment_ids \[1, 5\] but expected \[2, 5\]"),
    ],
)
def test_attention_refuses_shapes_that_do_not_fit(shapes, message):
    fitting = dict(
        q=(2, 4, 5, 4), k=(2, 2, 5, 4), v=(2, 2, 5, 4), positions=(2, 5), segment_ids=(2, 5)
    )
    arrays = {name: jnp.ones(shape, jnp.float32) for name, shape in {**fitting, **shapes}.items()}
    with pytest.raises(ValueError, match=message):
        attention(**arrays, scale=1.0)


# --- attention, slowly -------------------------------------------------------------------------------------------------


def attention_by_definition(
    q, k, v, positions, segment_ids, kv_positions, kv_segment_ids, window, softcap, scale
):
    out = np.zeros(q.shape)
    share = q.shape[1] // k.shape[1]
    for b, n, t in np.ndindex(q.shape[:3]):
        scores, values = [], []
        for s in range(k.shape[2]):
            distance = positions[b, t] - kv_positions[b, s]
            if segment_ids[b, t] == kv_segment_ids[b, s] and 0 <= distance < (window or 10**9):
                score = scale * q[b, n, t] @ k[b, n // share, s]
                scores.append(softcap * np.tanh(score / softcap) if softcap else score)
                values.append(v[b, n // share, s])
        weights = np.exp(scores) / np.exp(scores).sum()
        out[b, n, t] = weights @ np.array(values)
    return out


@pytest.mark.parametrize(
    ("window", "softcap", "kv_heads"),
    [(None, None, 4), (3, None, 2), (None, 1.5, 1), (2, 1.5, 2), (50, None, 2)],
)
def test_attention_is_its_definition(window, softcap, kv_heads):
    """Two sequences in a row, then padding; as many queries as keys, and the last two queries alone."""
    rng = np.random.default_rng(1)
    q, k, v = (
        rng.normal(size=(2, heads, 9, 4)).astype(np.float32) for heads in (4, kv_heads, kv_heads)
    )
    segment_ids = np.array([[1] * 4 + [2] * 5, [1] * 6 + [2] * 1 + [0] * 2], np.int32)
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 0, 0]], np.int32)
    knobs = dict(window=window, softcap=softcap, scale=0.7)
    where = dict(
        positions=positions,
        segment_ids=segment_ids,
        kv_positions=positions,
        kv_segment_ids=segment_ids,
    )
    out = np.asarray(attention(q, k, v, positions=positions, segment_ids=segment_ids, **knobs))
    expected = attention_by_definition(q, k, v, **where, **knobs)
    real = segment_ids != 0
    assert_close(np.swapaxes(out, 1, 2)[real], np.swapaxes(expected, 1, 2)[real])
    assert np.isfinite(out).all()

    last = {**where, "positions": positions[:1, -2:], "segment_ids": segment_ids[:1, -2:]}
    last = {name: x[:1] for name, x in last.items()}
    assert_close(attention(q[:1, :, -2:], k[:1], v[:1], **last, **knobs), expected[:1, :, -2:])


def test_a_window_is_a_mask_in_value_and_gradient():
    """Against the same scores with the keys behind the window pushed away."""
    rng = np.random.default_rng(3)
    q, k, v = (rng.normal(size=(1, 2, 9, 4)).astype(np.float32) for _ in range(3))
    positions, ones = np.arange(9, dtype=np.int32)[None], np.ones((1, 9), np.int32)
    behind = positions[:, None, :, None] - positions[:, None, None, :] >= 3
    bias = np.where(behind, -1e9, 0.0).astype(np.float32) * np.ones((1, 2, 1, 1), np.float32)

    def loss(qkv, **knobs):
        return jnp.sum(
            attention(*qkv, positions=positions, segment_ids=ones, scale=0.7, **knobs) ** 3
        )

    windowed, pushed = (
        jax.value_and_grad(loss)((q, k, v), **knobs) for knobs in (dict(window=3), dict(bias=bias))
    )
    jax.tree.map(lambda a, b: assert_close(a, b, atol=1e-5), windowed, pushed)


@pytest.mark.exhaustive
def test_long_rows_are_read_in_halves():
    """A query sees no later column, so that its half of them is enough: as with keys that are said to be others'."""
    rng = np.random.default_rng(5)
    q, k, v = (rng.normal(size=(2, heads, 131, 8)).astype(np.float32) for heads in (2, 1, 1))
    segment_ids = np.array([[1] * 40 + [2] * 70 + [0] * 21, [0] * 6 + [1] * 125], np.int32)
    positions = (
        np.maximum(np.concatenate([np.arange(40), np.arange(91), np.arange(-6, 125)]), 0)
        .astype(np.int32)
        .reshape(2, 131)
    )
    bias = rng.normal(size=(1, 2, 131, 131)).astype(np.float32)
    real = (segment_ids != 0)[:, None, :, None]
    others = dict(kv_positions=positions.copy(), kv_segment_ids=segment_ids.copy())

    def loss(arrays, keys):
        *qkv, bias = arrays
        where = dict(positions=positions, segment_ids=segment_ids, bias=bias, **keys)
        return jnp.sum(
            jnp.where(
                real, jnp.sin(attention(*qkv, scale=0.3, softcap=4.0, window=50, **where)), 0.0
            )
        )

    halves, whole = (jax.value_and_grad(loss)((q, k, v, bias), keys) for keys in ({}, others))
    jax.tree.map(lambda a, b: assert_close(a, b, atol=2e-5), halves, whole)
    count = lambda keys: str(jax.make_jaxpr(loss)((q, k, v, bias), keys)).count("exp")
    assert count({}) > count(others)


@pytest.mark.parametrize("before", exhaustive([0, 40], quick=[40]))
def test_splash_attention_is_ours(before):
    """TPU's kernel, interpreted: two sequences and padding in a row, a length that is no multiple of its tiles; queries of all
    columns, or of all but the first."""
    from rlhf.models.splash import splash

    rng = np.random.default_rng(4)
    q, k, v = (rng.normal(size=(1, heads, 150, 16)).astype(np.float32) for heads in (2, 1, 1))
    ids = np.array([[1] * 60 + [2] * 80 + [0] * 10], np.int32)
    positions = np.concatenate([np.arange(60), np.arange(80), np.zeros(10)]).astype(np.int32)[None]
    knobs, q, asked = dict(window=17, softcap=5.0), q[:, :, before:], jnp.asarray(ids[:, before:])
    where = dict(
        positions=positions[:, before:],
        segment_ids=asked,
        kv_positions=positions,
        kv_segment_ids=jnp.asarray(ids),
    )
    ours = lambda q, k, v: attention(q, k, v, **where, scale=0.25, kernel="xla", **knobs)
    theirs = lambda q, k, v: splash(
        q * 0.25, k, v, asked, where["kv_segment_ids"], interpret=True, **knobs
    )
    real = (asked != 0)[:, None, :, None]
    loss = lambda f: lambda qkv: jnp.sum(jnp.where(real, jnp.sin(f(*qkv)), 0.0))
    a, b = (jax.value_and_grad(loss(f))((q, k, v)) for f in (ours, theirs))
    jax.tree.map(lambda a, b: assert_close(a, b, atol=2e-5), a, b)


@pytest.mark.parametrize(
    ("kernel", "change", "message"),
    [
        (
            "cudnn",
            dict(softcap=1.0),
            r"cudnn attention cannot serve this: float32, where it wants bfloat16 or float16; heads 4 wide, .*",
        ),
        (
            "cudnn",
            dict(bias=np.zeros((1, 2, 5, 5), np.float32)),
            r"a bias on the scores; .*; give kernel='xla' or None",
        ),
        (
            "splash",
            dict(causal=False),
            "splash attention cannot serve this: attention that is not causal",
        ),
        (
            "splash",
            dict(kv_positions=np.zeros((1, 5), np.int32)),
            "keys of a cache, beside the queries' own",
        ),
        (
            "cudnn",
            dict(kv_positions=np.zeros((1, 5), np.int32)),
            "keys of a cache, beside the queries' own; give kernel='xla' or None",
        ),
        (
            "triton",
            dict(bias=np.zeros((1, 2, 5, 5), np.float32)),
            "triton attention cannot serve this: a bias on the scores; float32, .*",
        ),
        (
            "flash",
            {},
            "it is not known; known are 'xla', 'cudnn', 'triton' and 'splash', but not 'flash'",
        ),
    ],
)
def test_a_kernel_that_cannot_serve_says_why(kernel, change, message):
    x, ids = jnp.ones((1, 2, 5, 4)), jnp.ones((1, 5), jnp.int32)
    with pytest.raises(ValueError, match=message):
        attention(x, x, x, positions=ids, segment_ids=ids, scale=1.0, kernel=kernel, **change)


def test_attention_has_finite_gradients_at_padding():
    x = np.random.default_rng(2).normal(size=(1, 1, 3, 2)).astype(np.float32)
    where = dict(positions=np.array([[0, 1, 0]]), segment_ids=np.array([[1, 1, 0]]))
    gradient = jax.grad(lambda x: attention(x, x, x, **where, scale=1.0)[:, :, :2].sum())(x)
    assert np.isfinite(gradient).all()
    assert not gradient[0, 0, 2].any()
