"""Adapters against their definition, against merged matrices, and against PEFT's files."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from marks import exhaustive
from safetensors.numpy import load_file, save_file

import rlhf
from rlhf import adapters, peft_files, sharding
from rlhf.adapters import LoRAWeight
from rlhf.models import TransformerConfig, huggingface, patterns, quantized, transformer
from rlhf.models.linear import linear

CHECKPOINTS = Path(__file__).parent / "checkpoints"
LM = transformer(
    TransformerConfig(
        vocab_size=14,
        hidden_size=8,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        mlp_size=16,
        qkv_bias=True,
    )
)
TOKENS = np.random.default_rng(0).integers(0, 13, (4, 6), np.int32)
WHERE = dict(
    positions=np.tile(np.arange(6, dtype=np.int32), (4, 1)), segment_ids=np.ones_like(TOKENS)
)

assert_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)


@functools.cache
def base():
    return LM.init(jax.random.key(0))


def randomised(trainable, seed=1):
    """As if trained: no B is 0 any more."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), trainable
    )


@functools.partial(jax.jit, static_argnames=("lm", "cached"))
def logits(params, tokens=TOKENS, lm=LM, cached=False):
    where = {name: x[: len(tokens), : tokens.shape[1]] for name, x in WHERE.items()}
    cache = lm.init_cache(*tokens.shape) if cached else None
    return lm.unembed(params, lm.hidden(params, tokens, cache=cache, **where)[0])


def loss_fn(params, batch):
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits(params, batch)), batch[..., None], -1)
    return -chosen.sum() / TOKENS.size


def on_adapters(trainable, context, batch, key, rate=None):
    params = adapters.join(trainable, context)
    return loss_fn(params if rate is None else adapters.dropout(params, key, rate), batch), {}


def one_weight(rng, magnitude, dtype=np.float64):
    shapes = dict(
        base=(5, 4), a=(5, 2), b=(2, 4), scale=(), **({"magnitude": (4,)} if magnitude else {})
    )
    return LoRAWeight(
        **{name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    )


def flat(tree):
    return {adapters.dotted(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


# --- one weight --------------------------------------------------------------------------------------------------------


def by_definition(x, w, norm=None):
    """`x (W + s A B)`, of DoRA `x m (W + s A B) / norm`."""
    total = w.base + float(w.scale) * w.a @ w.b
    if w.magnitude is None:
        return x @ total
    norm = np.sqrt((total**2).sum(axis=0)) if norm is None else norm
    return np.stack(
        [w.magnitude[j] * (x @ total[:, j]) / norm[j] for j in range(total.shape[1])], axis=-1
    )


@pytest.mark.parametrize("dora", [False, True])
def test_matmul_is_its_definition_and_so_are_its_gradients(dora):
    """Gradients by finite differences, in which DoRA's norm stays what it was."""
    rng = np.random.default_rng(0)
    w, x = one_weight(rng, dora), rng.normal(size=(3, 5))
    trained = ("a", "b", "magnitude") if dora else ("a", "b")
    norm = np.linalg.norm(w.base + w.scale * w.a @ w.b, axis=0)
    with jax.enable_x64(True):
        arrays = jax.tree.map(jnp.asarray, w)
        assert_close(linear(x, arrays), by_definition(x, w), atol=1e-12)
        assert_close(linear(x, arrays.merged()), by_definition(x, w), atol=1e-12)
        gradient = lambda fn: jax.grad(lambda own: fn(arrays._replace(**own)))(
            {name: getattr(arrays, name) for name in trained}
        )
        grads = gradient(lambda w: (linear(x, w) ** 2).sum())
        of_merged = gradient(lambda w: (linear(x, w.merged()) ** 2).sum())
    for name in trained:
        numeric, h = np.zeros_like(getattr(w, name)), 1e-6
        for at in np.ndindex(numeric.shape):
            moved = {sign: getattr(w, name).copy() for sign in (-1, 1)}
            for sign, array in moved.items():
                array[at] += sign * h
            up, down = (
                (by_definition(x, w._replace(**{name: moved[s]}), norm) ** 2).sum() for s in (1, -1)
            )
            numeric[at] = (up - down) / (2 * h)
        assert_close(grads[name], numeric, atol=1e-6)
        assert_close(of_merged[name], numeric, atol=1e-6)


def test_activations_keep_their_dtype():
    w = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32), one_weight(np.random.default_rng(0), True)
    )
    out = linear(jnp.ones((2, 3, 5), jnp.bfloat16), w)
    assert (out.dtype, out.shape) == (jnp.bfloat16, (2, 3, 4))
    assert_close(out.astype(jnp.float32), linear(jnp.ones((2, 3, 5)), w), atol=0.1)


def test_an_output_without_weights_stays_zero_under_dora():
    start = adapters.add(
        {"w": jnp.zeros((3, 2))}, jax.random.key(0), rank=1, targets="w", dora=True
    )
    np.testing.assert_array_equal(linear(jnp.ones((1, 3)), adapters.join(*start)["w"]), [[0, 0]])


# --- a model -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", exhaustive([False, True], quick=[True]))
def test_nothing_changes_at_the_start_and_merged_equals_unmerged(dora):
    """Through the scan that trains and, of DoRA, the loop that decodes."""
    trainable, frozen = adapters.add(base(), jax.random.key(1), rank=2, alpha=2, dora=dora)
    assert_close(logits(adapters.join(trainable, frozen)), logits(base()), atol=5e-6)
    trained = adapters.join(randomised(trainable), frozen)
    merged = adapters.merge(trained)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, base())
    expected = logits(merged)
    assert np.abs(expected - logits(base())).max() > 0.5
    assert_close(logits(trained), expected)
    if dora:
        assert_close(logits(trained, cached=True), expected)


def test_only_adapters_have_gradients_and_moments():
    """What is frozen keeps its numbers and, although the state is donated, its place in memory."""
    params = LM.init(jax.random.key(0))
    trainable, frozen = adapters.add(
        params, jax.random.key(1), rank=2, targets=(r"layers\.[qv]", "unembedding"), dora=True
    )
    names = {
        f"{at}.{end}"
        for at in ("layers.q", "layers.v", "unembedding")
        for end in ("a", "b", "magnitude")
    }
    assert flat(trainable).keys() == names
    optimizer = optax.adam(1e-2)
    state = rlhf.init_state(trainable, optimizer, jax.random.key(2), frozen)
    assert flat(state.opt_state[0].mu).keys() == names
    pointers = lambda tree: [x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)]
    places = pointers(params)
    step = jax.jit(rlhf.train_step(on_adapters, optimizer), donate_argnums=0)
    seen = []
    for _ in range(4):
        state, metrics = step(state, TOKENS)
        seen.append(metrics["loss"])
    assert seen == sorted(seen, reverse=True)
    assert flat(state.params).keys() == names
    jax.tree.map(np.testing.assert_array_equal, adapters.off(state.context), base())
    assert pointers(adapters.off(state.context)) == places


def test_the_reference_is_the_policy_s_own_arrays():
    params = base()
    trainable, frozen = adapters.add(params, jax.random.key(1), rank=2)
    for form in (frozen, adapters.join(trainable, frozen)):
        assert all(
            x is y
            for x, y in zip(
                jax.tree.leaves(adapters.off(form)), jax.tree.leaves(params), strict=True
            )
        )


OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def state_at_start(key):
    trainable, frozen = adapters.add(
        LM.init(key), key, rank=2, targets=r"layers\.(q|up|down)", dora=True
    )
    trainable = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), trainable)
    return rlhf.init_state(trainable, OPTIMIZER, key, frozen)


@functools.cache
def after_a_step():
    return jax.jit(rlhf.train_step(on_adapters, OPTIMIZER))(
        state_at_start(jax.random.key(0)), TOKENS
    )[0].params


def assert_the_step_was_the_same(params):
    jax.tree.map(
        lambda x, y: assert_close(y, x, atol=1e-5 * np.abs(x).max()),
        after_a_step(),
        jax.device_get(params),
    )


@pytest.mark.exhaustive
def test_micro_batches_and_a_dropout_of_nothing_give_the_same_step():
    step = rlhf.train_step(functools.partial(on_adapters, rate=0.0), OPTIMIZER, micro_batches=2)
    assert_the_step_was_the_same(jax.jit(step)(state_at_start(jax.random.key(0)), TOKENS)[0].params)


def test_start_and_scale():
    rank, alpha = 16, 8.0
    params = {"layers": {"q": jnp.ones((3, 25, 4), jnp.bfloat16)}}
    for stabilised, scale in ((False, alpha / 16), (True, alpha / 4)):
        trainable, frozen = adapters.add(
            params,
            jax.random.key(0),
            rank=rank,
            alpha=alpha,
            targets="layers.q",
            rank_stabilised=stabilised,
        )
        np.testing.assert_array_equal(frozen["layers"]["q"].scale, [scale] * 3)
    a = np.asarray(trainable["layers"]["q"]["a"])
    assert a.dtype == np.float32
    assert 0.19 < a.max() <= 0.2  # 25 ** -0.5, as torch's kaiming_uniform_(a=√5)
    assert -0.2 <= a.min() < -0.19
    assert_close(a.std(), 0.2 / 3**0.5, atol=0.01)
    assert not np.array_equal(a[0], a[1])
    assert not trainable["layers"]["q"]["b"].any()


def test_state_with_adapters_is_saved_and_restored(tmp_path):
    trainable, frozen = adapters.add(
        base(), jax.random.key(1), rank=2, targets="layers.q", dora=True
    )
    make = lambda trainable: rlhf.init_state(trainable, optax.adam(0.1), jax.random.key(2), frozen)
    state = make(randomised(trainable))
    with_run = rlhf.checkpoint.Checkpoints(tmp_path)
    with_run.save(state)
    restored = with_run.restore(make(trainable))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, restored.context, state.context)


# --- dropout -----------------------------------------------------------------------------------------------------------


def test_dropout_drops_the_adapter_s_inputs():
    """W = 0, A = B = 1: what comes out is what the adapter saw."""
    eye = jnp.eye(50)
    params = {
        "w": LoRAWeight(0 * eye, eye, eye, jnp.float32(1)),
        "v": LoRAWeight(0 * eye, eye, eye, jnp.float32(1)),
    }
    x = 1 + jax.random.uniform(jax.random.key(0), (200, 50))
    seen = lambda key, rate, at="w": np.asarray(
        linear(x, adapters.dropout(params, jax.random.key(key), rate)[at])
    )
    out = seen(1, 0.2)
    assert_close(out[out != 0], np.asarray(x / 0.8)[out != 0])
    assert_close((out == 0).mean(), 0.2, atol=0.02)
    np.testing.assert_array_equal(out, seen(1, 0.2))
    for other in (seen(2, 0.2), seen(1, 0.2, "v")):
        assert_close(((out == 0) & (other == 0)).mean(), 0.04, atol=0.01)
    np.testing.assert_array_equal(seen(1, 0.0), x)


def test_dropout_of_dora_is_peft_s():
    """The plain part sees all inputs: `x W + x' (W' − W)`."""
    rng = np.random.default_rng(0)
    w = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), one_weight(rng, True))
    x = rng.normal(size=(6, 5)).astype(np.float32)
    dropping = adapters.dropout(w, jax.random.key(0), 0.5)
    through = np.asarray(
        linear(
            x,
            LoRAWeight(
                jnp.zeros((5, 5)), jnp.eye(5), jnp.eye(5), jnp.float32(1), None, *dropping[5:]
            ),
        )
    )
    assert (through == 0).any()
    assert_close(linear(x, dropping), x @ w.base + through @ (w.merged() - w.base))


def test_layers_and_adapters_drop_for_themselves():
    trainable, frozen = adapters.add(base(), jax.random.key(1), rank=2)
    params = adapters.join(randomised(trainable), frozen)
    dropping = adapters.dropout(params, jax.random.key(2), 0.5)
    keys = np.concatenate(
        [jax.random.key_data(w.key) for w in dropping["layers"].values() if adapters.is_adapter(w)]
    )
    assert len(np.unique(keys, axis=0)) == len(keys) == 7 * 2
    assert np.abs(logits(dropping) - logits(params)).max() > 0.1
    np.testing.assert_array_equal(
        logits(adapters.dropout(params, jax.random.key(2), 0.0)), logits(params)
    )


# --- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (
            dict(targets=(r"layers\.q", r"layer\.v")),
            r"targets 'layer\\\\.v' match no leaf; .* layers\.q",
        ),
        (
            dict(targets="q"),
            r"targets 'q' match no leaf; an adapter can stand at: layers\.down, .*, unembedding",
        ),
        (
            dict(targets=r"layers\..*_norm"),
            r"layers\.attention_norm \[2, 8\], which is no matrix; .*layers\.mlp_norm \[2, 8\]",
        ),
        (dict(targets="final_norm"), r"final_norm \[8\], which is no matrix"),
        (
            dict(targets="embedding"),
            r"embedding \[14, 8\], whose rows are looked up, not multiplied; an adapter can stand at",
        ),
        (dict(targets=r"layers\.q_bias"), r"layers\.q_bias \[2, 8\], which is no matrix"),
        (dict(rank=0), r"rank must be a whole number at least 1 and at most 65,536, but is 0"),
    ],
)
def test_targets_that_cannot_be(knobs, message):
    with pytest.raises(ValueError, match=message):
        adapters.add(base(), jax.random.key(0), **knobs)


def test_halves_that_do_not_belong_together():
    make = lambda name: adapters.add(
        {"v": jnp.ones((2, 2)), "w": jnp.ones((2, 2))}, jax.random.key(0), targets=name
    )
    trainable, frozen = make("w")
    with pytest.raises(ValueError, match="trainable has an adapter at w but frozen has none"):
        adapters.join(trainable, adapters.off(frozen))
    with pytest.raises(ValueError, match="trainable has an adapter at v but frozen has none"):
        adapters.join(make("v")[0], frozen)
    with pytest.raises(ValueError, match="frozen has an adapter at w but trainable has none"):
        adapters.join({"v": None, "w": None}, frozen)


def test_dropout_rates_that_cannot_be():
    for rate in (1.0, -0.1):
        with pytest.raises(ValueError, match=rf"rate must be in \[0, 1\), but is {rate}"):
            adapters.dropout({}, jax.random.key(0), rate)


# --- memory and meshes -------------------------------------------------------------------------------------------------


def temporaries(fn, *shapes):
    return jax.jit(jax.grad(fn)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def in_bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_a_step_holds_activations_and_adapters_alone():
    """Wide matrices, few tokens: neither a merged matrix nor a gradient of the base would fit."""
    lm = transformer(
        TransformerConfig(vocab_size=13, hidden_size=32, num_layers=4, num_heads=2, mlp_size=1024)
    )
    params = jax.eval_shape(lm.init, jax.random.key(0))
    trainable, frozen = jax.eval_shape(lambda p: adapters.add(p, jax.random.key(0), rank=2), params)
    loss = lambda params, tokens: (logits(params, tokens, lm) ** 2).sum()
    tokens = jax.ShapeDtypeStruct((2, 4), jnp.int32)
    rest = {name: x for name, x in params.items() if name != "embedding"}
    activations = temporaries(
        lambda e, rest, t: loss({**rest, "embedding": e}, t), params["embedding"], rest, tokens
    )
    allowed = 1.2 * (activations + in_bytes(trainable))
    assert (
        temporaries(
            lambda own, frozen, t: loss(adapters.join(own, frozen), t), trainable, frozen, tokens
        )
        <= allowed
    )


@pytest.mark.parametrize("dora", [False, True])
def test_no_matrix_of_the_base_s_size_is_made(dora):
    """A plain scan over eight layers: all temporaries together are smaller than three of them."""
    params = {"layers": {"up": jax.ShapeDtypeStruct((8, 256, 256), jnp.float32)}}
    make = lambda p: adapters.add(p, jax.random.key(0), rank=2, targets="layers.up", dora=dora)
    trainable, frozen = jax.eval_shape(make, params)
    block = lambda x, p: (jnp.tanh(linear(x, p["up"])), None)
    loss = lambda params, x: (jax.lax.scan(block, x, params["layers"])[0] ** 2).sum()
    x = jax.ShapeDtypeStruct((2, 256), jnp.float32)
    used = temporaries(
        lambda own, frozen, x: loss(adapters.join(own, frozen), x), trainable, frozen, x
    )
    merged = temporaries(
        lambda own, frozen, x: loss(adapters.merge(adapters.join(own, frozen)), x),
        trainable,
        frozen,
        x,
    )
    assert used < 3 / 8 * in_bytes(params), (used, in_bytes(params))
    assert merged > in_bytes(params), (merged, in_bytes(params))


@pytest.mark.exhaustive
def test_arrays_are_placed_and_a_sharded_step_is_the_same():
    mesh = sharding.make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
    names = adapters.axes(LM.axes(), jax.eval_shape(state_at_start, jax.random.key(0)).context)
    state = sharding.create(state_at_start, names, mesh, jax.random.key(0))
    placed = {name: tuple(x.sharding.spec) for name, x in flat(state).items()}
    for tree in ("params.layers", "opt_state.0.trace.layers"):
        got = {
            name: placed[f"{tree}.{name}"]
            for name in ("q.a", "q.b", "down.a", "down.b", "up.magnitude")
        }
        assert got == {
            "q.a": (None, "fsdp", None),
            "q.b": (None, None, "tensor"),
            "down.a": (None, "tensor", None),
            "down.b": (None, None, "fsdp"),
            "up.magnitude": (None, "tensor"),
        }
    assert placed["context.layers.q.base"] == (None, "fsdp", "tensor")
    assert placed["context.layers.q_bias"] == (None, "tensor")
    step = sharding.jit_step(rlhf.train_step(on_adapters, OPTIMIZER), mesh, state)
    assert_the_step_was_the_same(
        step(state, sharding.shard_batch(jnp.asarray(TOKENS), mesh))[0].params
    )


# --- a base in few bits ------------------------------------------------------------------------------------------------


def test_a_quantised_base_computes_as_its_plain_matrices():
    """With adapters on it: values, the adapters' gradients, merged weights; and nothing else has a gradient."""
    params = base()
    held = quantized.quantize(params, "nf4", block=4)
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), held, is_leaf=adapters.is_matrix)
    q = params["layers"]["q"]
    assert 0 < np.abs(wide["layers"]["q"] - q).max() < 0.16 * np.abs(q).max()
    trees = [adapters.add(tree, jax.random.key(1), rank=2, alpha=2) for tree in (held, wide)]
    assert jax.tree.structure(trees[0][0]) != jax.tree.structure(held)
    assert in_bytes(trees[0][0]) == in_bytes(trees[1][0])
    own = randomised(trees[1][0])
    where = lambda tree: jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(own))
    loss = lambda own, frozen: (logits(adapters.join(own, frozen)) ** 2).sum()
    results = [jax.jit(jax.value_and_grad(loss))(where(tree), frozen) for tree, frozen in trees]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        assert_close(a, b, atol=1e-4 * np.abs(b).max())
    merged = [adapters.merge(adapters.join(where(tree), frozen)) for tree, frozen in trees]
    assert_close(merged[0]["layers"]["q"], merged[1]["layers"]["q"])


def test_a_quantised_base_is_smaller_and_never_wide_as_a_whole():
    """The step's temporaries hold a layer's plain matrix or two, not the model's."""
    params = {"layers": {"up": jax.random.normal(jax.random.key(0), (8, 256, 256))}}
    held = quantized.quantize(params, "int8")
    assert in_bytes(held) < 0.3 * in_bytes(params)
    trainable, frozen = adapters.add(held, jax.random.key(0), rank=2)
    block = lambda x, p: (jnp.tanh(linear(x, p["up"])), None)
    loss = lambda own, frozen, x: (
        jax.lax.scan(block, x, adapters.join(own, frozen)["layers"])[0] ** 2
    ).sum()
    assert temporaries(loss, trainable, frozen, jnp.ones((2, 256))) < 0.5 * in_bytes(params)


def test_quantising_refuses():
    with pytest.raises(ValueError, match=r"qtype must be one of \('nf4', 'int8'\), but is 'int3'"):
        quantized.quantize(base(), "int3")
    with pytest.raises(ValueError, match="targets 'x' match no leaf of embedding, "):
        quantized.quantize(base(), targets="x")
    with pytest.raises(
        ValueError,
        match=r"a block of 64 inputs does not divide those of layers\.down \[2, 16, 8\]; .*give another",
    ):
        quantized.quantize(base())


# --- PEFT's files ------------------------------------------------------------------------------------------------------

MODULES = "base_model.model.model.layers."
KINDS = {"lora": {}, "dora": dict(dora=True), "rslora": dict(rank_stabilised=True, alpha=7)}


@functools.cache
def checkpoint(name):
    return huggingface.load(CHECKPOINTS / name)[:2]


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_the_same_bit_for_bit(kind, tmp_path):
    lm, params = checkpoint("llama")
    start = adapters.add(
        params, jax.random.key(0), rank=3, targets=(adapters.BLOCKS, "unembedding"), **KINDS[kind]
    )
    trainable, frozen = randomised(start[0]), start[1]
    peft_files.save(tmp_path, lm, adapters.join(trainable, frozen), "llama", base="a/model")
    again = peft_files.load(tmp_path, lm, params, "llama")
    assert jax.tree.structure(again) == jax.tree.structure((trainable, frozen))
    jax.tree.map(np.testing.assert_array_equal, again, (trainable, frozen))

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    q = "base_model.model.model.layers.1.self_attn.q_proj."
    np.testing.assert_array_equal(tensors[f"{q}lora_A.weight"], trainable["layers"]["q"]["a"][1].T)
    np.testing.assert_array_equal(tensors[f"{q}lora_B.weight"], trainable["layers"]["q"]["b"][1].T)
    assert "base_model.model.lm_head.lora_A.weight" in tensors
    assert len(tensors) == (3 * 7 + 1) * (3 if kind == "dora" else 2)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["use_dora"], config["base_model_name_or_path"]) == (
        3,
        kind == "dora",
        "a/model",
    )
    assert config["lora_alpha"] == (float(np.float32(7 / 3**0.5)) * 3 if kind == "rslora" else 32)
    assert config["target_modules"][:2] == ["lm_head", "mlp.down_proj"]


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_saved_one_by_one(kind, tmp_path):
    """A layer is dense: its MLP is no expert's, though the names end alike."""
    lm, params = checkpoint("qwen3_moe")
    targets = (adapters.BLOCKS, r"layers\.expert_.*")
    start = adapters.add(params, jax.random.key(0), rank=2, targets=targets, **KINDS[kind])
    trainable, frozen = randomised(start[0]), start[1]
    peft_files.save(tmp_path, lm, adapters.join(trainable, frozen), "qwen3_moe")
    again = peft_files.load(tmp_path, lm, params, "qwen3_moe")
    assert jax.tree.structure(again) == jax.tree.structure((trainable, frozen))
    jax.tree.map(np.testing.assert_array_equal, again, (trainable, frozen))

    sparse, number = trainable["layers"]["expert_up"]["a"].shape[:2]
    assert sparse < params["layers"]["q"].shape[0]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    names = [f"{MODULES}{i}.mlp.experts.0.up_proj.lora_A.weight" for i in range(2)]
    layer = [i for i, name in enumerate(names) if name in tensors]
    assert len(layer) == sparse
    for expert in range(number):
        np.testing.assert_array_equal(
            tensors[f"{MODULES}{layer[-1]}.mlp.experts.{expert}.up_proj.lora_B.weight"],
            trainable["layers"]["expert_up"]["b"][-1, expert].T,
        )
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert {"mlp.up_proj", f"mlp.experts.{number - 1}.up_proj"} <= set(targets)
    assert "up_proj" not in targets


def test_experts_in_one_tensor_are_no_modules(tmp_path):
    lm, params = checkpoint("granitemoe")
    start = adapters.add(params, jax.random.key(0), rank=2, targets=r"layers\.expert_up")
    with pytest.raises(ValueError, match="adapters at .*expert_up.*but a granitemoe file can name"):
        peft_files.save(tmp_path, lm, adapters.join(*start), "granitemoe")


@pytest.mark.parametrize(
    ("name", "dora", "targets"),  # side by side; by groups of heads
    [
        ("gpt2", False, adapters.BLOCKS),
        ("gpt2", True, r"layers\.(k|up)"),
        ("falcon_new", True, adapters.BLOCKS),
    ],
)
def test_fused_queries_keys_and_values_are_one_module(name, targets, dora, tmp_path):
    """All three with adapters, or the keys alone: each has its own columns of B, and nothing in the others'."""
    lm, params = checkpoint(name)
    trainable, frozen = adapters.add(params, jax.random.key(0), rank=2, targets=targets, dora=dora)
    joined = adapters.join(randomised(trainable), frozen)
    peft_files.save(tmp_path, lm, joined, name.removesuffix("_new"))
    again = adapters.join(*peft_files.load(tmp_path, lm, params, name.removesuffix("_new")))
    assert again["layers"]["q"].a.shape[-1] == (6 if targets == adapters.BLOCKS else 2)
    merged, expected = (adapters.merge(tree) for tree in (again, joined))
    jax.tree.map(lambda x, y: assert_close(x, y, atol=2e-6), merged, expected)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == (name == "gpt2")
    assert set(config["rank_pattern"].values()) == ({6} if targets == adapters.BLOCKS else set())


def test_files_that_do_not_fit(tmp_path):
    lm, params = checkpoint("llama")
    joined = adapters.join(
        *adapters.add(params, jax.random.key(0), rank=2, targets=r"layers\.[qk]")
    )
    with pytest.raises(
        FileNotFoundError, match=r"has no adapter_config\.json and no adapter_model\.safetensors"
    ):
        peft_files.load(tmp_path, lm, params, "llama")
    with pytest.raises(ValueError, match="params have adapters at no leaf"):
        peft_files.save(tmp_path, lm, params, "llama")
    with pytest.raises(
        ValueError,
        match=r"params have adapters at \['w'\], but a llama file can name \['embedding'",
    ):
        peft_files.save(tmp_path, lm, {**params, "w": joined["layers"]["q"]}, "llama")
    with pytest.raises(ValueError, match="model_type 'mamba' is not known; known: llama"):
        peft_files.save(tmp_path, lm, joined, "mamba")
    peft_files.save(tmp_path, lm, joined, "llama")
    with pytest.raises(FileExistsError, match="holds an adapter already"):
        peft_files.save(tmp_path, lm, joined, "llama")

    good = load_file(tmp_path / "adapter_model.safetensors")
    q, k = (f"base_model.model.model.layers.0.self_attn.{x}_proj.lora_" for x in "qk")
    bad = {name: x for name, x in good.items() if name != f"{q}A.weight"}
    bad |= {
        f"{k}B.weight": np.ones((3, 2), np.float32),
        "base_model.model.classifier.weight": np.ones(2, np.float32),
    }
    save_file(bad, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="does not fit the model") as error:
        peft_files.load(tmp_path, lm, params, "llama")
    for part in (
        f"missing: {q}A.weight",
        "left over: base_model.model.classifier",
        f"{k}B.weight [3, 2] but [16, 2]",
    ):
        assert part in str(error.value)

    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for field, value in dict(
        peft_type="IA3", init_lora_weights="pissa", alora_invocation_tokens=[1]
    ).items():
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, field: value}))
        with pytest.raises(ValueError, match=f"{field} = .* is not supported; known"):
            peft_files.load(tmp_path, lm, params, "llama")


# --- PEFT itself, where it is installed --------------------------------------------------------------------------------


def peft_logits(model):
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


@pytest.mark.parametrize(
    ("name", "kind"),
    exhaustive(
        [
            ("llama", "lora"),
            ("llama", "dora"),
            ("llama", "rslora"),
            ("gpt2", "lora"),
            ("falcon_new", "dora"),
        ],
        quick=[("llama", "lora")],
    ),
)
@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_peft_reads_ours_and_we_read_peft_s(name, kind, tmp_path):
    """Ours after a step of training; PEFT's with random numbers in every place."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    plain = lambda: AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name, dtype=torch.float32)
    lm, params = checkpoint(name)
    trainable, frozen = adapters.add(params, jax.random.key(0), rank=3, **KINDS[kind])
    loss = lambda own, frozen, batch, key: (
        (logits(adapters.join(own, frozen), batch, lm) ** 2).mean(),
        {},
    )
    state = rlhf.init_state(randomised(trainable), optax.sgd(0.1), jax.random.key(0), frozen)
    state, _ = jax.jit(rlhf.train_step(loss, optax.sgd(0.1)))(state, TOKENS)
    ours = adapters.join(state.params, frozen)
    peft_files.save(tmp_path / "ours", lm, ours, name.removesuffix("_new"))
    model = peft.PeftModel.from_pretrained(plain(), tmp_path / "ours")
    assert_close(peft_logits(model), logits(ours, TOKENS, lm), atol=2e-4)
    huggingface.save(tmp_path / "merged", lm, adapters.merge(ours), like=CHECKPOINTS / name)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert_close(peft_logits(merged), logits(ours, TOKENS, lm), atol=2e-4)

    torch.manual_seed(0)
    targets = {
        "llama": ["q_proj", "v_proj", "down_proj"],
        "gpt2": ["c_attn", "mlp.c_proj"],
        "falcon_new": ["query_key_value"],
    }[name]
    knobs = dict(
        dora=dict(use_dora=True),
        rslora=dict(use_rslora=True),
        lora=dict(rank_pattern={targets[0]: 2}),
    )[kind]
    model = peft.get_peft_model(
        plain(), peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **knobs)
    )
    with torch.no_grad():
        for own in (p for p in model.parameters() if p.requires_grad):
            own += 0.3 * torch.randn_like(own)
    model.save_pretrained(tmp_path / "theirs")
    loaded = adapters.join(
        *peft_files.load(tmp_path / "theirs", lm, params, name.removesuffix("_new"))
    )
    expected = peft_logits(model)
    assert np.abs(expected - logits(params, TOKENS, lm)).max() > 0.1
    assert_close(logits(loaded, TOKENS, lm), expected, atol=2e-4)


PATTERNS = {  # what an adapter may say of layers and modules; two modules of three layers
    "ranks by layer": dict(
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 1, r"^model.layers.2.*down_proj": 5},
        alpha_pattern={"down_proj": 3, "layers.0.self_attn.q_proj": 11},
    ),
    "some layers": dict(
        target_modules=["q_proj", "up_proj"], layers_to_transform=[0, 2], layers_pattern="layers"
    ),
    "one layer": dict(target_modules=["v_proj"], layers_to_transform=1, use_rslora=True),
    "by name": dict(
        target_modules=["model.layers.1.mlp.up_proj", "o_proj"],
        exclude_modules=["layers.0.self_attn.o_proj"],
    ),
    "an expression": dict(
        target_modules=r".*layers\.[02]\..*(gate|v)_proj", exclude_modules=r".*2.*gate.*"
    ),
    "all": dict(target_modules="all-linear", rank_pattern={"mlp.*": 2}),
}


@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.exhaustive
def test_ranks_by_layer_and_some_layers_alone_are_peft_s(kind, tmp_path):
    """PEFT's logits from PEFT's files, from ours after a step, and no layer has an adapter that had none."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    plain = lambda: AutoModelForCausalLM.from_pretrained(CHECKPOINTS / "llama", dtype=torch.float32)
    lm, params = checkpoint("llama")
    torch.manual_seed(0)
    model = peft.get_peft_model(plain(), peft.LoraConfig(r=4, lora_alpha=6, **PATTERNS[kind]))
    with torch.no_grad():
        for own in (p for p in model.parameters() if p.requires_grad):
            own += 0.3 * torch.randn_like(own)
    model.save_pretrained(tmp_path / "theirs")
    trainable, frozen = peft_files.load(tmp_path / "theirs", lm, params, "llama")
    loaded = adapters.join(trainable, frozen)
    assert np.abs(peft_logits(model) - logits(params, TOKENS, lm)).max() > 0.1
    assert_close(logits(loaded, TOKENS, lm), peft_logits(model), atol=2e-4)

    loss = lambda own, frozen, batch, key: (
        (logits(adapters.join(own, frozen), batch, lm) ** 2).mean(),
        {},
    )
    optimizer = optax.adamw(0.01)
    state = rlhf.init_state(trainable, optimizer, jax.random.key(0), frozen)
    state, _ = jax.jit(rlhf.train_step(loss, optimizer))(state, TOKENS)
    peft_files.save(tmp_path / "ours", lm, adapters.join(state.params, frozen), "llama")
    shapes = lambda name: {
        k: x.shape for k, x in load_file(tmp_path / name / "adapter_model.safetensors").items()
    }
    assert shapes("ours") == shapes("theirs")
    again = peft.PeftModel.from_pretrained(plain(), tmp_path / "ours")
    trained = logits(adapters.join(state.params, frozen), TOKENS, lm)
    assert np.abs(trained - logits(loaded, TOKENS, lm)).max() > 1e-3
    assert_close(peft_logits(again), trained, atol=2e-4)


def test_layers_without_an_adapter_and_of_a_smaller_rank_come_back(tmp_path):
    """Without PEFT: what is zero in A and in B is no part of the file, and is zero again."""
    lm, params = checkpoint("llama")
    trainable, frozen = adapters.add(params, jax.random.key(0), rank=3, targets=r"layers\.(q|up)")
    trainable = randomised(trainable)
    q = trainable["layers"]["q"]
    q["a"] = q["a"].at[1].set(0).at[2, :, 1:].set(0)
    q["b"] = q["b"].at[1].set(0).at[2, 1:].set(0)
    peft_files.save(tmp_path, lm, adapters.join(trainable, frozen), "llama")
    again = adapters.merge(adapters.join(*peft_files.load(tmp_path, lm, params, "llama")))
    jax.tree.map(
        lambda x, y: assert_close(x, y, atol=2e-6),
        again,
        adapters.merge(adapters.join(trainable, frozen)),
    )
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"model.layers.2.self_attn.q_proj": 1}
    assert "model.layers.0.self_attn.q_proj" in config["target_modules"]
    assert "model.layers.1.self_attn.q_proj" not in config["target_modules"]
    zero = jax.tree.map(jnp.zeros_like, trainable)
    with pytest.raises(ValueError, match="the adapters are 0 everywhere"):
        peft_files.save(tmp_path / "b", lm, adapters.join(zero, frozen), "llama")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(r=0), r"adapter_config\.json: r must be a whole number at least 1 .*, but is 0"),
        (dict(r=-3), "r must be a whole number"),
        (dict(r=10**12), "r must be a whole number"),
        (dict(r="8"), "r must be a whole number"),
        (dict(r=True), "r must be a whole number"),
        (
            dict(lora_alpha=float("nan")),
            r"adapter_config\.json: lora_alpha must be finite, but is nan",
        ),
        (dict(lora_alpha=0), "lora_alpha must be a number above 0"),
        (dict(lora_alpha=None), "lora_alpha must be a number above 0"),
        (dict(use_dora="yes"), "use_dora must be true or false"),
        (
            dict(rank_pattern=[1]),
            r"rank_pattern must be an object of patterns and numbers, but is \[1\]",
        ),
        (dict(rank_pattern={"q_proj": -1}), r"rank_pattern\.q_proj must be a whole number"),
        (dict(alpha_pattern={"q_proj": "x"}), r"alpha_pattern\.q_proj must be a number above 0"),
        (dict(target_modules=5), "target_modules must be text, or a list"),
        (dict(target_modules=[5]), "target_modules must be text, or a list"),
        (
            dict(target_modules="(q"),
            r"adapter_config\.json: the pattern '\(q' is no regular expression",
        ),
        (dict(target_modules=r"(\w+\.?)+X"), r"the pattern '\(.* takes more than 0\.3 s or 1 GB"),
        (dict(rank_pattern={r"([\w.]+)+X": 1}), "takes more than 0.3 s"),
        (dict(exclude_modules=r"([\w.]+)+X"), "takes more than 0.3 s"),
        (dict(layers_to_transform=[0], layers_pattern=r"([\w.]+)+X"), "takes more than 0.3 s"),
        (dict(layers_to_transform=-1), "layers_to_transform must be a whole number"),
        (dict(layers_to_transform=[0]), "left over: .*layers.1.self_attn"),
        (dict(target_modules=["q_proj"]), "left over: .*up_proj"),
        (dict(target_modules=["q_proj", "up_proj", "v_proj"]), "missing: .*v_proj"),
        (
            dict(modules_to_save=["lm_head"]),
            r"modules_to_save = \['lm_head'\] is not supported; .*merge_and_unload",
        ),
        (dict(bias="all"), "bias = 'all' is not supported"),
        (dict(peft_type={}), "peft_type = {} is not supported"),
    ],
)
def test_adapter_configs_that_cannot_be(fields, message, tmp_path, monkeypatch):
    """In one line that names the field, and in bounded time."""
    monkeypatch.setattr(peft_files, "matches", functools.partial(patterns.matches, seconds=0.3))
    lm, params = checkpoint("llama")
    joined = adapters.join(
        *adapters.add(params, jax.random.key(0), rank=2, targets=r"layers\.(q|up)")
    )
    peft_files.save(tmp_path, lm, joined, "llama")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    with pytest.raises(ValueError, match=message):
        peft_files.load(tmp_path, lm, params, "llama")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"r": 1, "r": 2}', "[" * 100_000, '{"a":' * 100_000]
)
def test_adapter_configs_that_are_no_json(text, tmp_path):
    lm, params = checkpoint("llama")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        peft_files.load(tmp_path, lm, params, "llama")
