"""Attention of GPUs: tiles in Pallas' interpreter, lengths by XLA's form of cuDNN's call, both against `kernel="xla"`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import exhaustive

from rlhf import sharding
from rlhf.models import cudnn, flash
from rlhf.models.attention import attention

COLUMNS = 140
# (segment, first column, end) of a row; columns in no segment are padding.
RIGHT_PADDED = [(1, 0, 90)]
LEFT_PADDED = [(1, 70, 140)]
BOTH_PADDED = [(3, 33, 133)]
PACKED = [(1, 0, 40), (2, 40, 65), (3, 65, 131)]
PADDING: list[tuple[int, int, int]] = []
WITH_ONE = [RIGHT_PADDED, LEFT_PADDED, BOTH_PADDED, PADDING]


def columns_of(rows):
    """Positions and segment ids, `[B, T]` each."""
    positions = np.zeros((len(rows), COLUMNS), np.int32)
    segment_ids = np.zeros((len(rows), COLUMNS), np.int32)
    for row, segments in enumerate(rows):
        for segment, start, end in segments:
            positions[row, start:end] = np.arange(end - start)
            segment_ids[row, start:end] = segment
    return jnp.asarray(positions), jnp.asarray(segment_ids)


def arrays_of(rows, heads, before=0, width=16, dtype=np.float32):
    rng = np.random.default_rng(7)
    shapes = [(len(rows), n, COLUMNS, width) for n in heads]
    q, k, v = (jnp.asarray(rng.normal(size=shape).astype(np.float32), dtype) for shape in shapes)
    return q[:, :, before:], k, v


def value_and_gradients(fn, arrays, segment_ids):
    """Of a sum over real queries, as a loss is."""
    real = (segment_ids != 0)[:, None, :, None]

    def loss(arrays):
        out = fn(*arrays)
        return jnp.sum(jnp.where(real, jnp.sin(out.astype(jnp.float32)), 0.0)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return jnp.where(real, out, 0), gradients


def assert_close(found, wanted, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def both(rows, before, **options):
    """Positions and segments of queries and of keys, and attention by XLA."""
    keys = columns_of(rows)
    queries = tuple(x[:, before:] for x in keys)
    names = "positions", "segment_ids", "kv_positions", "kv_segment_ids"
    where = dict(zip(names, (*queries, *keys), strict=True))
    return where, partial(attention, **where, scale=0.25, kernel="xla", **options)


@pytest.mark.parametrize(
    ("heads", "before", "options"),
    [
        ((4, 2, 2), 0, dict(window=17, softcap=5.0)),
        ((3, 1, 1), 75, {}),
        *exhaustive(
            [((2, 2, 2), 0, {}), ((2, 1, 1), 0, dict(causal=False)), ((2, 1, 1), 75, dict(window=9))],
            quick=[],
        ),
    ],
)  # fmt: skip
def test_tiles_are_attention(heads, before, options):
    rows = [PACKED, *WITH_ONE]
    arrays = arrays_of(rows, heads, before)
    where, by_xla = both(rows, before, **options)
    interpreted = flash.Options(**options, scale=0.25, interpret=True)

    def by_tiles(q, k, v):
        return flash.flash(q, k, v, *where.values(), interpreted)

    found = value_and_gradients(by_tiles, arrays, where["segment_ids"])
    assert_close(found, value_and_gradients(by_xla, arrays, where["segment_ids"]))


def test_tiles_take_keys_in_any_order():
    """As those of a cache, which holds them where they were written."""
    rows = [PACKED, LEFT_PADDED]
    q, k, v = arrays_of(rows, (2, 1, 1))
    where, by_xla = both(rows, 0, cached=True)
    order = np.random.default_rng(1).permutation(COLUMNS)
    keys = [where["kv_positions"][:, order], where["kv_segment_ids"][:, order]]
    queries = where["positions"], where["segment_ids"]
    options = flash.Options(scale=0.25, interpret=True)
    found = flash.flash(q, k[:, :, order], v[:, :, order], *queries, *keys, options)
    real = (where["segment_ids"] != 0)[:, None, :, None]
    assert_close(jnp.where(real, found, 0), jnp.where(real, by_xla(q, k, v), 0))


def test_tiles_without_a_visible_key_are_left_out():
    """A tile of queries reads the keys of its own segments, up to its last column."""
    positions, segment_ids = columns_of([[(1, 0, 64), (2, 64, 128)], [(1, 70, 128)]])
    columns = flash.Columns(positions[:, :128], segment_ids[:, :128])
    first, end = flash._bounds(columns, columns, flash.Options())
    np.testing.assert_array_equal((first, end), ([[0], [1]], [[2], [2]]))
    first, end = flash._bounds(columns, columns, flash.Options(), of_keys=True)
    np.testing.assert_array_equal((first, end), ([[0, 1], [0, 1]], [[1, 2], [0, 2]]))


@pytest.mark.parametrize("before", [0, 75])
def test_lengths_are_attention(before):
    """Rows padded on either side are moved to where a causal kernel that knows their length starts."""
    assert_lengths_are_attention(before)


def assert_lengths_are_attention(before):
    arrays = arrays_of(WITH_ONE, (4, 2, 2), before)
    where, by_xla = both(WITH_ONE, before)

    def by_lengths(q, k, v):
        ids = where["kv_segment_ids"]
        return cudnn.by_lengths(q, k, v, ids, scale=0.25, implementation="xla")

    found = value_and_gradients(by_lengths, arrays, where["segment_ids"])
    assert_close(found, value_and_gradients(by_xla, arrays, where["segment_ids"]))


def test_what_a_kernel_leaves_at_padding_goes_no_further(monkeypatch):
    """cuDNN says nothing of results and gradients beyond a row's length."""
    by_xla = jax.nn.dot_product_attention

    def spoiled(x, lengths):
        beyond = jnp.arange(x.shape[1])[None] >= lengths[:, None]
        return jnp.where(beyond[:, :, None, None], jnp.nan, x)

    def forward(q, k, v, lengths, options):
        def attend(*arrays):
            where = dict(query_seq_lengths=lengths, key_value_seq_lengths=lengths)
            return by_xla(*arrays, **where, **dict(options))

        out, backward = jax.vjp(attend, q, k, v)
        return spoiled(out, lengths), (backward, lengths)

    def backward(options, residuals, d_out):
        of_arrays, lengths = residuals
        gradients = of_arrays(jnp.nan_to_num(d_out))
        return *(spoiled(x, lengths) for x in gradients), None

    kernel = jax.custom_vjp(lambda *arguments: forward(*arguments)[0], nondiff_argnums=(4,))
    kernel.defvjp(forward, backward)

    def spoiling(q, k, v, *, query_seq_lengths, key_value_seq_lengths, **options):
        return kernel(q, k, v, key_value_seq_lengths, tuple(options.items()))

    monkeypatch.setattr(jax.nn, "dot_product_attention", spoiling)
    assert_lengths_are_attention(before=0)


@pytest.fixture
def without_gpu(monkeypatch):
    """`attention` with both kernels of GPUs in their forms for tests."""
    tiles, by_lengths = flash.flash, cudnn.by_lengths
    called = []

    def interpreted(*arguments):
        jax.debug.callback(lambda: called.append("tiles"))
        return tiles(*arguments[:-1], arguments[-1]._replace(interpret=True))

    def by_xla(*arguments, **options):
        jax.debug.callback(lambda: called.append("lengths"))
        return by_lengths(*arguments, **options, implementation="xla")

    monkeypatch.setattr(flash, "flash", interpreted)
    monkeypatch.setattr(cudnn, "flash", interpreted)
    monkeypatch.setattr(cudnn, "by_lengths", by_xla)
    return called


@pytest.mark.parametrize(
    ("rows", "kernel"),
    [(WITH_ONE, "lengths"), ([*WITH_ONE[:3], PACKED], "tiles")],
    ids=["one", "packed"],
)
def test_rows_choose_the_kernel(without_gpu, rows, kernel):
    """As their values are when the program runs."""
    q, k, v = arrays_of(rows, (2, 1, 1), dtype=jnp.bfloat16)
    where, by_xla = both(rows, 0)
    found = jax.jit(partial(by_xla, kernel="cudnn"))(q, k, v)
    jax.effects_barrier()
    assert set(without_gpu) == {kernel}
    real = (where["segment_ids"] != 0)[:, None, :, None]
    assert_close(jnp.where(real, found, 0), jnp.where(real, by_xla(q, k, v), 0), 2e-2)


@pytest.mark.parametrize(
    ("mesh", "kernel"),
    [
        (dict(fsdp=2, sequence=2, tensor=2), "triton"),
        *exhaustive([(dict(fsdp=4, tensor=2), "cudnn")], quick=[]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_devices_run_kernels_on_their_own_part(without_gpu, mesh, kernel):
    rows = [PACKED, *WITH_ONE[:3]]
    arrays = arrays_of(rows, (4, 2, 2), dtype=jnp.bfloat16)
    where, by_xla = both(rows, 0)
    wanted = value_and_gradients(by_xla, arrays, where["segment_ids"])
    with jax.set_mesh(sharding.make_mesh(**mesh)):
        by_kernel = partial(by_xla, kernel=kernel)
        found = value_and_gradients(by_kernel, arrays, where["segment_ids"])
    assert_close(found, wanted, 2e-2)


@pytest.mark.parametrize(
    ("change", "kernel"),
    [
        ({}, "cudnn"),
        (dict(softcap=5.0), "triton"),
        (dict(window=9), "triton"),
        (dict(causal=False), "triton"),
        (dict(before=100), "triton"),
        (dict(dtype=jnp.float32), "xla"),
        (dict(bias=jnp.zeros((1, 2, COLUMNS, COLUMNS))), "xla"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_gpus_choose_what_can_serve(monkeypatch, change, kernel):
    """cuDNN, else tiles, else XLA."""
    monkeypatch.setattr("rlhf.models.attention.platform", lambda: "gpu")
    by_lengths = jax.jit(partial(cudnn.by_lengths, implementation="xla"), static_argnames="scale")
    monkeypatch.setattr(cudnn, "by_lengths", by_lengths)
    options = dict(change)
    before = options.pop("before", 0)
    q, k, v = arrays_of([PACKED], (2, 1, 1), before, dtype=options.pop("dtype", jnp.bfloat16))
    where, _ = both([PACKED], before)
    if not before:
        where = dict(positions=where["positions"], segment_ids=where["segment_ids"])
    fn = partial(attention, **where, scale=0.25, last=before > 0, **options)
    text = str(jax.make_jaxpr(fn)(q, k, v))
    names = {"cudnn": "name=by_lengths", "triton": "flash_forward"}
    used = {name for name, primitive in names.items() if primitive in text}
    assert used == {"cudnn": {"cudnn", "triton"}, "triton": {"triton"}, "xla": set()}[kernel]
    has_scores = f"{COLUMNS - before},{COLUMNS}]" in text.replace(" ", "")
    # XLA's form of cuDNN's call has them.
    assert has_scores == (kernel != "triton")
