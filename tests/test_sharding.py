"""On eight CPU devices the demo's steps equal those on one, rollouts included, and no large array of a state is ever whole."""

import dataclasses
import functools
import re

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from marks import exhaustive

import rlhf
from rlhf import demo, rollouts, sharding
from rlhf.models import transformer
from rlhf.recipes import dpo, grpo, ppo, reward
from rlhf.training import meshes
from rlhf.training.policy import Policy

import steps as tiny  # isort: skip

MESHES = (dict(data=8), dict(fsdp=8), dict(fsdp=2, tensor=4), dict(fsdp=4, sequence=2))
ROWS, SEQUENCE = 16, 12
SMALLEST = 512  # elements of a matrix, far above what rows of the batch have


@pytest.fixture(scope="module")
def task():
    task = demo.make_task(0, corpus=ROWS, pairs=ROWS, held_out=4)
    short = lambda tree: jax.tree.map(
        lambda x: jnp.asarray(x[..., :SEQUENCE] if np.ndim(x) > 1 else x), tree
    )
    return task._replace(
        corpus=short(task.corpus),
        pairs=short(task.pairs),
        prompts=jax.tree.map(lambda x: jnp.asarray(x[:8]), task.prompts),
    )


@pytest.fixture(scope="module")
def models(task):
    return demo.make_models(len(task.tokenizer), hidden_size=32, num_layers=1)


@pytest.fixture(scope="module")
def created(models):
    """The mesh of a shape, and the model's parameters born there."""

    @functools.cache
    def on(**shape):
        mesh = sharding.make_mesh(**shape)
        return mesh, sharding.create(models.lm.init, models.lm.axes(), mesh, jax.random.key(0))

    return on


def steps(task, models):
    """name -> (init(key) -> state, axes, step, inputs): each of the demo's steps, with plain gradient descent."""
    lm, head, optimizer = models.lm, models.value_head, optax.sgd(0.1)
    reward_fn = lambda context, rollout, key: (rollout.tokens % 7 == 0).sum(-1).astype(jnp.float32)
    sampling = dict(max_new_tokens=4, num_samples=2, eos_ids=(task.tokenizer.eos_token_id,))
    of_lm, of_both = lm.axes(), {"lm": lm.axes(), "head": head.axes()}
    context = lambda params: {
        "reference": jax.tree.map(lambda x: 0.9 * x, params)
    }  # another model, without a second start

    def alone(key):
        params = lm.init(key)
        return rlhf.init_state(params, optimizer, key, context(params))

    def both(key):
        params = lm.init(key)
        return rlhf.init_state(
            {"lm": params, "head": head.init(key)}, optimizer, key, context(params)
        )

    by_dpo = dpo.make_update(Policy(lm), optimizer, reference_in_step=True, micro_batches=2)
    actor = Policy(lm)
    group_update = grpo.make_update(actor, optimizer, num_samples=2, kl_coef=0.04, max_new_tokens=4)
    by_grpo = tiny.iteration(actor, group_update, reward_fn, **sampling)
    critic = Policy(lm, head)
    by_ppo = tiny.iteration(
        critic, ppo.make_update(critic, optimizer, epochs=1), reward_fn, **sampling
    )
    key = jax.random.key(7)
    return {
        "dpo": (alone, of_lm, by_dpo, (task.pairs,)),
        "grpo": (alone, of_lm, by_grpo, (task.prompts, key)),
        "ppo": (both, of_both, by_ppo, (task.prompts, key)),
    }


def three(step, state, inputs):
    for _ in range(3):
        state, metrics = step(state, *inputs)
    return jax.device_get((state.params, metrics))


@pytest.mark.parametrize("name", exhaustive(["dpo", "grpo", "ppo"], quick=[]))
def test_steps_on_meshes_equal_one_device(name, task, models):
    init, axes, step, inputs = steps(task, models)[name]
    start = init(jax.random.key(0))
    expected, metrics = three(jax.jit(step), start, inputs)
    moved = max(
        np.abs(a - b).max()
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(start.params), strict=True)
    )
    assert moved > 1e-4, "nothing was trained"
    for shape in MESHES:
        mesh = sharding.make_mesh(**shape)
        state = sharding.create(init, axes, mesh, jax.random.key(0))
        got, got_metrics = three(
            sharding.jit_step(step, mesh, state), state, sharding.shard_batch(inputs, mesh)
        )
        for path, x in jax.tree_util.tree_leaves_with_path(expected):
            y = dict(jax.tree_util.tree_leaves_with_path(got))[path]
            largest = np.abs(x).max()
            np.testing.assert_allclose(
                y, x, rtol=0, atol=1e-5 * largest, err_msg=f"{shape} {jax.tree_util.keystr(path)}"
            )
        for key, value in metrics.items():
            np.testing.assert_allclose(
                got_metrics[key], value, rtol=1e-4, atol=1e-5, err_msg=f"{shape} {key}"
            )


@pytest.mark.exhaustive
def test_rollouts_on_every_mesh_are_the_same_tokens(task, models, created):
    eos = (task.tokenizer.eos_token_id,)
    sample = lambda params, prompts: rollouts.generate(
        models.lm, params, prompts, jax.random.key(3), max_new_tokens=6, num_samples=2, eos_ids=eos
    )
    expected = jax.device_get(jax.jit(sample)(models.lm.init(jax.random.key(0)), task.prompts))
    assert expected.mask.sum() > 50
    for shape in (dict(fsdp=8), dict(fsdp=2, tensor=4)):
        mesh, params = created(**shape)
        with jax.set_mesh(mesh):
            got = jax.device_get(jax.jit(sample)(params, sharding.shard_batch(task.prompts, mesh)))
        np.testing.assert_array_equal(got.tokens, expected.tokens)
        np.testing.assert_array_equal(got.mask, expected.mask)
        np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-5)


@pytest.mark.parametrize("shape", [dict(fsdp=8), dict(fsdp=2, tensor=4), dict(data=2, fsdp=4)])
def test_no_large_array_of_the_demos_state_is_whole_on_a_device(shape, task, created):
    full = demo.make_models(len(task.tokenizer))
    lm, heads = full.lm, full.value_head
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))

    def init(key):
        params = {"lm": lm.init(key), "head": heads.init(key)}
        reward_params = {"lm": lm.init(key), "head": full.reward_head.init(key)}
        return rlhf.init_state(
            params, optimizer, key, {"reference": lm.init(key), "reward": reward_params}
        )

    mesh = sharding.make_mesh(**shape)
    axes = {"lm": lm.axes(), "head": heads.axes()}
    where = sharding.shardings(jax.eval_shape(init, jax.random.key(0)), axes, mesh)
    large = 0
    for leaf, place in zip(
        jax.tree.leaves(jax.eval_shape(init, jax.random.key(0))),
        jax.tree.leaves(where),
        strict=True,
    ):
        if np.prod(leaf.shape) > 1024:
            large += 1
            assert np.prod(place.shard_shape(leaf.shape)) * shape["fsdp"] <= np.prod(leaf.shape)
    assert large >= 5 * 8  # policy, two moments, reference, reward model

    _, params = created(**shape)
    wide = [leaf for leaf in jax.tree.leaves(params) if leaf.size > 1024]
    assert len(wide) >= 4
    for leaf in wide:
        assert max(shard.data.size for shard in leaf.addressable_shards) < leaf.size


def test_a_loop_of_decoding_steps_gathers_no_parameters(task, models, created):
    """They are laid out anew once, before the loop."""
    mesh, params = created(fsdp=8)

    def sample(params, prompts, key):
        return rollouts.generate(models.lm, params, prompts, key, max_new_tokens=4)

    with jax.set_mesh(mesh):
        prompts = sharding.shard_batch(task.prompts, mesh)
        program = jax.jit(sample).lower(params, prompts, jax.random.key(0)).compile()
    moved = hlo.in_loops(program.as_text())
    assert max((number for _, number in moved), default=0) < SMALLEST, moved


def test_few_prompts_give_the_same_on_many_devices(task, models, created):
    """Two prompts of eight samples on eight devices, which read both and share out their rows."""
    few = jax.tree.map(lambda x: x[:2], task.prompts)
    sample = functools.partial(rollouts.generate, models.lm, max_new_tokens=4, num_samples=8)
    mesh, on_mesh = created(fsdp=8)
    with jax.set_mesh(mesh):
        found = jax.jit(sample)(on_mesh, meshes.place(few, mesh), jax.random.key(0))
    wanted = sample(jax.device_get(on_mesh), few, jax.random.key(0))
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    assert len(found.tokens.sharding.device_set) == 8
    assert not found.tokens.sharding.is_fully_replicated


def test_a_chunk_is_counted_in_tokens_of_a_device_where_the_output_matrix_is_split(models):
    """`[B, C, V]` of the logits of a device that exist at a time."""
    rows = rollouts.unpacked_rows(jnp.ones((8, 128), jnp.int32), jnp.ones((8, 128), bool))
    # A size that no other array has.
    lm = transformer(dataclasses.replace(models.config, vocab_size=104))
    params = jax.eval_shape(lm.init, jax.random.key(0))

    def columns(**shape):
        with jax.set_mesh(sharding.make_mesh(**shape)):
            traced = jax.make_jaxpr(lambda params: rollouts.score_batch(lm, params, rows))(params)
        return {int(found) for found in re.findall(r"f32\[1,(\d+),104\]", str(traced))}

    assert columns(data=8) == {64}
    assert columns(fsdp=8) == {128}


class Chip:
    """A device of a TPU that is not here."""

    platform = "tpu"
    device_kind = "TPU v5"
    core_on_chip = 0
    process_index = 0

    def __init__(self, id, *coords):
        self.id = id
        self.coords = coords


def test_devices_of_an_axis_lie_along_one_of_a_tpu(monkeypatch):
    # In the order in which JAX lists them: hosts of 2 × 2 chips, one after the other.
    hosts = [(x, y, z) for z in range(4) for y in (0, 2) for x in (0, 2)]
    places = [(x + i, y + j, z) for x, y, z in hosts for j in (0, 1) for i in (0, 1)]
    chips = [Chip(number, *place) for number, place in enumerate(places)]
    monkeypatch.setattr(sharding, "Mesh", lambda devices, axes: devices)
    mesh = sharding.make_mesh(data=4, fsdp=4, tensor=4, devices=chips)
    rings = np.moveaxis(mesh, 1, -1).reshape(-1, 4)
    for ring in rings:
        assert sum(len(set(axis)) == 4 for axis in zip(*(x.coords for x in ring), strict=True)) == 1
        assert len({chip.coords for chip in ring}) == 4


def test_other_devices_stay_in_their_order():
    ids = [device.id for device in sharding.make_mesh(data=2, fsdp=4).devices.flat]
    assert ids == [device.id for device in jax.devices()]


def test_refusals_name_both_sides():
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    with pytest.raises(ValueError, match="data 3 × fsdp 1 × tensor 1 = 3 but 8 devices"):
        sharding.make_mesh(data=3)
    with pytest.raises(ValueError, match="logical axis 'colour'"):
        sharding.spec(("colour",), mesh)
    with pytest.raises(ValueError, match="'heads' and 'mlp'.*both map to mesh axis 'tensor'"):
        sharding.spec(("heads", "mlp"), mesh)
    axes = ("batch", "sequence", "decoded")
    with pytest.raises(ValueError, match="'batch' and 'decoded'.*both map to mesh axis 'expert'"):
        sharding.spec(axes, sharding.make_mesh(expert=8))
    with pytest.raises(
        ValueError, match=r"w \[6, 8\]: heads = 6 does not divide by mesh axis tensor = 4"
    ):
        sharding.shardings({"w": jnp.zeros((6, 8))}, {"w": ("heads", None)}, mesh)
    with pytest.raises(ValueError, match=r"w \[1025\]: no free axis divides by fsdp = 2"):
        sharding.shardings({"w": jnp.zeros(1025)}, {}, mesh)
    with pytest.raises(ValueError, match=r"x \[6, 2\]: 6 rows do not divide by 8 devices"):
        sharding.shard_batch({"x": jnp.zeros((6, 2))}, sharding.make_mesh(data=8))


def test_reward_model_scores_do_not_depend_on_the_mesh(task, models):
    params = {
        "lm": models.lm.init(jax.random.key(0)),
        "head": models.reward_head.init(jax.random.key(1)),
    }
    score = jax.jit(
        lambda params, batch: reward.scores(models.lm, models.reward_head, params, batch)
    )
    expected = score(params, task.corpus)
    got = score(params, sharding.shard_batch(task.corpus, sharding.make_mesh(data=8)))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert np.std(expected) > 0.01
