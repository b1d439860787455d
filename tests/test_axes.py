"""The mesh axes `sequence` and `expert`: columns and experts over devices give what one device gives."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import exhaustive

from rlhf import losses, rollouts, sharding
from rlhf.models import TransformerConfig, transformer
from rlhf.models.attention import attention
from rlhf.models.config import Experts, LayerKind
from rlhf.models.delta import Delta
from rlhf.models.latent import Latent
from rlhf.models.rotary import Rope
from rlhf.models.splash import splash
from rlhf.shared_prefix import SharedPrefix
from rlhf.training import meshes

SIZES = dict(vocab_size=32, hidden_size=32, num_layers=2, num_heads=4, mlp_size=64)
NO_ROPE = (LayerKind(rope=None),)
CONFIGS = {
    "windows": dict(num_kv_heads=2, kinds=(LayerKind(), LayerKind(window=5))),
    "few keys": dict(num_kv_heads=1),
    "odd sizes": dict(num_heads=6, num_kv_heads=2, head_dim=8, vocab_size=33),
    "alibi": dict(kinds=NO_ROPE, alibi=True),
    "distances": dict(kinds=NO_ROPE, relative_buckets=4, relative_distance=8),
    "experts": dict(
        num_kv_heads=2,
        kinds=(LayerKind(sparse=True),),
        experts=Experts(
            4,
            2,
            16,
            scores="sigmoid",
            groups=2,
            groups_per_token=1,
            shared_size=8,
            shared_gate=True,
            bias=True,
        ),
    ),
    "delta": dict(
        kinds=(LayerKind(rope=None, mixer=Delta(2, 4, 8, 8)), LayerKind()),
        attention_gate=True,
        sinks=True,
        # The output of a segment's first token is `(q · k) v`, normed: near 0 it shows every rounding.
        norm_eps=1e-2,
    ),
    "latent": dict(
        head_dim=12, kinds=(LayerKind(rope=Rope(share=1 / 3), mixer=Latent(8, 8, 4, 6)),)
    ),
}
MESHES = {
    "data2sequence4": dict(data=2, sequence=4),
    "fsdp4sequence2": dict(fsdp=4, sequence=2),
    "fsdp2sequence2tensor2": dict(fsdp=2, sequence=2, tensor=2),
    "expert4data2": dict(expert=4, data=2),
    "expert2sequence2tensor2": dict(expert=2, sequence=2, tensor=2),
    "fsdp2tensor4": dict(fsdp=2, tensor=4),
}
CASES = [(config, mesh) for config in CONFIGS for mesh in MESHES]
QUICK = [
    ("windows", "fsdp2sequence2tensor2"),
    ("experts", "expert4data2"),
    ("odd sizes", "fsdp2tensor4"),
]


def packed(rows: int, columns: int, seed: int = 0):
    """Two sequences a row, which begin and end where no device's columns do, and padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, SIZES["vocab_size"], (rows, columns)).astype(np.int32)
    column = np.arange(columns)[None]
    cut, end = rng.integers(3, columns - 6, (rows, 1)), columns - rng.integers(0, 4, (rows, 1))
    segment_ids = np.where(column >= end, 0, 1 + (column >= cut)).astype(np.int32)
    positions = np.where(column >= cut, column - cut, column).astype(np.int32)
    return {"tokens": tokens, "positions": positions, "segment_ids": segment_ids}


def loss_of(lm, params, batch):
    scored = rollouts.score(lm, params, **batch, chunk_size=3)
    value = (0.1 * scored.entropy - scored.logprobs).mean()
    if "routing" in scored.aux:
        value += 0.01 * losses.routing.balance(*scored.aux["routing"]).sum()
    return value


def three_steps(lm, batch, mesh=None):
    """Parameters after three steps of plain gradient descent, and the losses before each."""
    one = sharding.make_mesh(devices=jax.devices()[:1])
    shapes = jax.eval_shape(lm.init, jax.random.key(0))
    where = sharding.shardings(shapes, lm.axes(), mesh or one, say=lambda text: None)
    params = jax.jit(lm.init, out_shardings=where)(jax.random.key(0))

    def step(params, batch):
        value, gradient = jax.value_and_grad(functools.partial(loss_of, lm))(params, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), value

    jitted = sharding.jit_step(step, mesh or one, params)
    batch = sharding.shard_batch(batch, mesh or one)
    values = []
    for _ in range(3):
        params, value = jitted(params, batch)
        values.append(value)
    return jax.device_get((params, values))


def assert_equal(found, wanted, bound=1e-5):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(found), strict=True
    ):
        largest = np.abs(x).max()
        assert largest > 0
        np.testing.assert_allclose(
            y, x, rtol=0, atol=bound * largest, err_msg=jax.tree_util.keystr(path)
        )


@functools.cache
def of_one_device(config):
    return three_steps(
        transformer(TransformerConfig(**{**SIZES, **CONFIGS[config]})), packed(8, 16)
    )


@pytest.mark.parametrize(("config", "mesh"), exhaustive(CASES, quick=QUICK))
def test_three_steps_equal_one_device(config, mesh):
    lm = transformer(TransformerConfig(**{**SIZES, **CONFIGS[config]}))
    mesh = sharding.make_mesh(**MESHES[mesh])
    assert_equal(three_steps(lm, packed(8, 16), mesh), of_one_device(config))


@pytest.mark.parametrize("columns", exhaustive([256, 2048], quick=[256]))
def test_long_rows_gather_keys_and_values_alone(columns):
    """Value and gradient on fsdp 2 × sequence 4; scores are a quarter of the queries with all keys, on no device more."""
    lm = transformer(TransformerConfig(**{**SIZES, "num_layers": 1}, num_kv_heads=2))
    mesh = sharding.make_mesh(fsdp=2, sequence=4)
    params = sharding.create(lm.init, lm.axes(), mesh, jax.random.key(0))
    batch = packed(4, columns)
    graded = jax.jit(jax.value_and_grad(functools.partial(loss_of, lm)))
    wanted = jax.device_get(graded(jax.device_get(params), batch))
    with jax.set_mesh(mesh):
        program = graded.lower(params, sharding.shard_batch(batch, mesh)).compile()
        found = jax.device_get(program(params, sharding.shard_batch(batch, mesh)))
    assert_equal(found, wanted)
    text = program.as_text()
    shapes = shapes_of(r"\w+\[([\d,]+)\]", text)
    assert any(shape[-2:] == (columns // 4, columns) for shape in shapes)
    assert not [shape for shape in shapes if shape.count(columns) > 1]
    gathered = shapes_of(r" = f32\[([\d,]+)\]\S* all-gather(?:-start)?\(", text)
    keys = (2, 2, columns, 8)  # of a device's rows
    assert {shape for shape in gathered if columns in shape} == {keys}
    assert keys not in shapes_of(r" f32\[([\d,]+)\]\S* all-reduce(?:-start)?\(", text)


def shapes_of(pattern: str, text: str) -> set[tuple[int, ...]]:
    return {tuple(map(int, dims.split(","))) for dims in re.findall(pattern, text)}


@pytest.mark.parametrize("before", exhaustive([0, 52], quick=[52]))
def test_splash_attention_splits_columns(before):
    """TPU's kernel, interpreted: each device's mask is that of its own columns."""
    rng = np.random.default_rng(4)
    q, k, v = (rng.normal(size=(2, heads, 300, 8)).astype(np.float32) for heads in (4, 2, 2))
    ids = np.tile(np.repeat(np.int32([1, 2, 0]), [120, 170, 10]), (2, 1))
    positions = np.concatenate([np.arange(120), np.arange(180)]).astype(np.int32)[None].repeat(2, 0)
    q = q[:, :, before:]
    where = dict(
        positions=positions[:, before:],
        segment_ids=jnp.asarray(ids[:, before:]),
        kv_positions=positions,
        kv_segment_ids=jnp.asarray(ids),
    )
    knobs = dict(window=70, softcap=5.0)

    def ours(q, k, v):
        return attention(q, k, v, **where, **knobs, scale=0.25, kernel="xla")

    def theirs(q, k, v):
        of_keys = where["segment_ids"], where["kv_segment_ids"]
        return splash(q * 0.25, k, v, *of_keys, **knobs, splits=True, interpret=True)

    real = (where["segment_ids"] != 0)[:, None, :, None]
    graded = lambda f: jax.jit(
        jax.value_and_grad(lambda qkv: jnp.sum(jnp.where(real, jnp.sin(f(*qkv)), 0.0)))
    )
    wanted = graded(ours)((q, k, v))
    with jax.set_mesh(sharding.make_mesh(fsdp=2, sequence=2, tensor=2)):
        found = graded(theirs)((q, k, v))
    assert_equal(found, wanted)


@pytest.mark.parametrize("config", exhaustive(["windows", "experts"], quick=["experts"]))
@pytest.mark.parametrize("mesh", exhaustive(MESHES, quick=["expert2sequence2tensor2"]))
def test_rollouts_are_the_same_tokens(config, mesh):
    """Of a loop of decoding steps the axis `sequence` splits rows, where they divide; a single prompt's are on every device."""
    lm = transformer(TransformerConfig(**{**SIZES, **CONFIGS[config]}))
    mesh = sharding.make_mesh(**MESHES[mesh])
    params = sharding.create(lm.init, lm.axes(), mesh, jax.random.key(0))
    tokens = jnp.asarray(packed(4, 12)["tokens"][:, :6])
    for prompts, samples in ((4, 2), (1, 1)):
        rows = rollouts.Prompts(tokens[:prompts], jnp.ones((prompts, 6), bool))
        sample = functools.partial(rollouts.generate, lm, max_new_tokens=4, num_samples=samples)
        wanted = sample(jax.device_get(params), rows, jax.random.key(1))
        with jax.set_mesh(mesh):
            found = jax.jit(sample)(params, meshes.place(rows, mesh), jax.random.key(1))
        np.testing.assert_array_equal(found.tokens, wanted.tokens)
        np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-5)


@pytest.mark.parametrize("tied", exhaustive([False, True], quick=[True]))
def test_logits_are_split_though_the_vocabulary_does_not_divide(tied):
    """A device's are a quarter of those with padding; those of all tokens are on none."""
    config = {**SIZES, "vocab_size": 51, "num_layers": 1, "tied": tied}
    lm = transformer(TransformerConfig(**config))
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    batch = packed(8, 16)
    with jax.set_mesh(mesh):
        graded = jax.jit(jax.grad(functools.partial(loss_of, lm)))
        params = meshes.everywhere(lm.init(jax.random.key(0)), mesh)
        program = graded.lower(params, sharding.shard_batch(batch, mesh)).compile()
    shapes = shapes_of(r"f32\[([\d,]+)\]", program.as_text())
    assert (4, 16, 13) in shapes
    assert not [shape for shape in shapes if len(shape) > 2 and shape[-1] in (51, 52)]


def test_rows_that_share_a_prefix_are_read_one_by_one_where_columns_are_split():
    lm = transformer(TransformerConfig(**SIZES))
    batch = packed(8, 16)
    half = {name: np.repeat(x[::2, :8], 2, axis=0) for name, x in batch.items()}
    batch = {name: np.concatenate([half[name], x[:, 8:]], axis=1) for name, x in batch.items()}
    shared = SharedPrefix(group_size=2, suffix=8)
    params = lm.init(jax.random.key(0))
    score = jax.jit(lambda params, batch: rollouts.score(lm, params, **batch, shared=shared))
    wanted = score(params, batch)
    mesh = sharding.make_mesh(fsdp=2, sequence=4)
    with jax.set_mesh(mesh):
        found = score(params, sharding.shard_batch(batch, mesh))
    np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-5)
    assert np.isfinite(wanted.logprobs).all()


def test_a_batch_lies_in_parts_of_rows_and_columns():
    mesh = sharding.make_mesh(data=2, expert=2, sequence=2)
    placed = meshes.place(
        {"tokens": np.zeros((8, 6)), "odd": np.zeros((8, 5)), "row": np.zeros(8)}, mesh
    )
    held = {name: x.sharding.shard_shape(x.shape) for name, x in placed.items()}
    assert held == {"tokens": (2, 3), "odd": (2, 5), "row": (2,)}
