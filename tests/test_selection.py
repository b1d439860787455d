"""What a step learns from: informative groups, prompts by a curriculum, groups of earlier steps."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from logs import steady
from marks import exhaustive

from rlhf import cli
from rlhf.rollouts import Prompts, Rollout
from rlhf.train import TrainState
from rlhf.training import meshes, sampling, selection
from rlhf.training.collecting import Collector, Completions
from rlhf.training.loading import one_device
from rlhf.training.prompts import PromptSet

G = 2
TASK = ["--dataset", "task:reverse", "--dataset_size", "16", "--batch_size", "4"]
SAMPLING = ["--max_new_tokens", "4", "--num_samples", "2", "--learning_rate", "1e-2"]


def rollout_of(prompts):
    tokens = np.repeat(np.asarray(prompts.tokens), G, axis=0)
    mask = np.ones(tokens.shape, bool)
    zeros = np.zeros(tokens.shape, np.float32)
    return Rollout(
        tokens, mask, tokens, tokens, zeros, zeros, np.ones(len(tokens), bool), np.float32(1)
    )


def prompt_set(number):
    tokens = np.arange(1, number + 1, dtype=np.int32)[:, None]
    rows = [{"prompt": f"row {i}"} for i in range(number)]
    return PromptSet(Prompts(tokens, tokens > 0), rows)


def collector_of(reward):
    """Rewards `reward(first token)` of a prompt's first completion, 0 of the second."""

    def collect(state, batch):
        rollout = rollout_of(batch.prompts)
        rewards = np.array([[reward(row[0]), 0.0] for row in batch.prompts.tokens], np.float32)
        metrics = {"reward": rewards.mean()}
        reasons = [f"of {row[0]}" for row in rollout.tokens]
        return Completions(rollout, rewards.reshape(-1), reasons, G, metrics, {"time": 1.0})

    return Collector(collect, lambda state, batch: rollout_of(batch.prompts), lambda *given: {})


def test_rounds_are_sampled_until_groups_differ():
    prompts = prompt_set(12)
    mesh = one_device()
    # Prompts of an even token have two completions of one reward.
    collector = selection.informative(collector_of(lambda token: token % 2), 3, G, mesh)
    batch = selection.rounds(prompts, 0, 3, 4)(0)
    scored = collector.collect(None, batch)
    tokens = np.asarray(scored.rollout.tokens)[::G, 0]
    odd = [token for part in batch.batches for token in part.prompts.tokens[:, 0] if token % 2]
    assert tokens.tolist() == odd[:3]
    assert scored.rewards.tolist() == [1.0, 0.0] * 3
    assert scored.reasons == [f"of {token}" for token in odd[:3] for _ in range(G)]
    rounds = scored.metrics["dynamic_sampling/rounds"]
    assert 1 < rounds < 4
    assert scored.times == {"time": rounds}
    # All completions that were sampled count, not only those that train.
    sampled = [token for part in batch.batches[:rounds] for token in part.prompts.tokens[:, 0]]
    share = np.mean([token % 2 for token in sampled])
    np.testing.assert_allclose(scored.of_all["reward"], share / 2)


def test_where_rounds_run_out_groups_fill_up_that_train_nothing():
    collector = selection.informative(collector_of(lambda token: token == 1), 3, G, one_device())
    prompts = prompt_set(6)
    batch = selection.rounds(prompts, 0, 3, 2)(0)
    scored = collector.collect(None, batch)
    assert scored.metrics["dynamic_sampling/missing"] == 2
    assert scored.metrics["dynamic_sampling/all_low"] == 5
    mask = np.asarray(scored.rollout.mask)
    assert mask[:G].all()
    assert not mask[G:].any()
    assert np.isnan(scored.rewards[G:]).all()
    # What is said of equal rewards is said of all that were sampled.
    assert len(scored.all_rewards) == 2 * 3 * G
    assert not np.isnan(scored.all_rewards).any()


def test_rounds_of_steps_have_prompts_and_keys_of_their_own():
    batch = selection.rounds(prompt_set(12), 0, 3, 2)
    seen = [part for number in range(2) for part in batch(number).batches]
    tokens = np.concatenate([part.prompts.tokens[:, 0] for part in seen])
    assert sorted(tokens.tolist()) == list(range(1, 13))
    keys = {tuple(jax.random.key_data(part.key).tolist()) for part in seen}
    assert len(keys) == 4


def test_a_curriculum_leaves_what_is_always_solved():
    prompts = prompt_set(8)
    collector, context = selection.by_curriculum(
        # Prompts up to 4: always solved, by both completions; the others: by one of two.
        collector_of(lambda token: 1.0)._replace(collect=solved_or_half),
        prompts,
        2,
        one_device(),
    )
    state = TrainState({}, (), jnp.int32(0), jax.random.key(0), context)
    seen = []
    for number in range(60):
        batch = prompts.take(0, number, 2)
        scored = collector.collect(state, batch)
        state = state._replace(context={**state.context, **scored.context})
        seen.append(np.asarray(scored.rollout.tokens)[::G, 0])
    easy = np.mean(np.concatenate(seen[20:]) <= 4)
    # p (1 - p) + 0.01 weighs the one 0.01 and the other 0.26.
    assert easy < 0.2
    assert state.context["curriculum"].pass_rate[:4].min() > 0.9


def solved_or_half(state, batch):
    rollout = rollout_of(batch.prompts)
    rewards = [[1.0, float(row[0] <= 4)] for row in batch.prompts.tokens]
    rewards = np.array(rewards, np.float32).reshape(-1)
    return Completions(rollout, rewards, [], G, {}, {})


@pytest.mark.exhaustive
def test_a_buffer_stands_in_for_groups_without_a_difference():
    seen = []

    def update(state, rollout, rewards, key):
        seen.append((np.asarray(rollout.tokens)[::G, 0].tolist(), rewards.tolist()))
        return state, {}

    shapes = rollout_of(prompt_set(2).prompts)
    replayed, context = selection.with_buffer(update, shapes, G, 4, one_device())
    state = TrainState({}, (), jnp.int32(0), jax.random.key(0), context)

    def take(state, tokens, rewards):
        prompts = Prompts(np.array(tokens, np.int32)[:, None], np.ones((len(tokens), 1), bool))
        rollout = jax.tree.map(jnp.asarray, rollout_of(prompts))
        return replayed(state, rollout, jnp.array(rewards, jnp.float32), jax.random.key(1))

    # Nothing is remembered yet: a group without a difference stays.
    state, metrics = take(state, [1, 2], [1, 0, 1, 1])
    assert seen[-1] == ([1, 2], [1, 0, 1, 1])
    assert metrics["replay/share"] == 0
    state, metrics = take(state, [3, 4], [0, 0, 0, 1])
    assert seen[-1] == ([1, 4], [1, 0, 0, 1])
    assert metrics["replay/share"] == 0.5
    # Not scored is no difference either, and is not remembered.
    state, _ = take(state, [5, 6], [np.nan, np.nan, 0, 2])
    assert seen[-1][0][0] in (1, 4)
    stored = np.asarray(state.context["replay"].priority)
    assert (stored > -np.inf).sum() == 3


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "options",
    exhaustive(
        [
            "--dynamic_sampling 2",
            "--replay_groups 8",
            "--curriculum learnability",
            "--dynamic_sampling 2 --replay_groups 8",
        ],
        quick=["--dynamic_sampling 2 --replay_groups 8"],
    ),
)
def test_a_resumed_run_selects_what_it_would_have(options, base, tmp_path):
    def run(name, *more):
        saves = ["--steps", "4", "--save_every", "2"]
        argv = ["grpo", "--model", base, *TASK, *SAMPLING, *saves, *options.split(), *more]
        return cli.main([*argv, "--output", str(tmp_path / name)])

    assert run("whole") == 0
    # As if it had been killed after step 2.
    left_out = shutil.ignore_patterns("model", "4")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts", ignore=left_out)
    assert run("parts", "--resume") == 0
    whole, parts = (steady(tmp_path / name) for name in ("whole", "parts"))
    assert len(whole) == 4
    np.testing.assert_equal(whole, parts)


@pytest.mark.exhaustive
@pytest.mark.mesh
@pytest.mark.parametrize(
    "options", ["--dynamic_sampling 2 --replay_groups 8", "--curriculum learnability"]
)
def test_a_mesh_selects_what_one_device_does(options, base, tmp_path, monkeypatch):
    def run(name, *more):
        argv = ["grpo", "--model", base, *TASK, *SAMPLING, "--steps", "3", "--optimizer", "sgd"]
        assert cli.main([*argv, *options.split(), *more, "--output", str(tmp_path / name)]) == 0
        return steady(tmp_path / name)

    on_mesh = run("mesh", "--fsdp", "8")
    monkeypatch.setattr(meshes, "local_devices", lambda: jax.devices()[:1])
    for row, golden in zip(on_mesh, run("one"), strict=True):
        for name in golden.keys() - {"phase"}:
            same = pytest.approx(golden[name], rel=1e-4, abs=2e-5, nan_ok=True)
            assert row[name] == same, (golden["step"], name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--dynamic_sampling 2 --curriculum learnability",
            "dynamic_sampling 2 passes over prompts, and curriculum learnability chooses them",
        ),
        ("--replay_groups 3", "replay_groups 3 is less than a step's 4 groups"),
    ],
)
def test_selections_that_cannot_be(options, message, base, tmp_path, capsys):
    argv = ["grpo", "--model", base, *TASK, "--steps", "1", *options.split()]
    assert cli.main([*argv, "--output", str(tmp_path / "no")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_groups_that_fill_up_are_in_no_metric_of_groups():
    nan = float("nan")
    groups = np.array([[1.0, 0.0], [1.0, 1.0], [nan, nan], [nan, nan]])
    found = sampling.group_metrics(jnp.asarray(groups))
    assert found["frac_reward_zero_std"] == 0.5
    np.testing.assert_allclose(found["reward_std"], np.std([1.0, 0.0], ddof=1) / 2)
    assert sampling.group_metrics(jnp.full((2, 2), nan))["frac_reward_zero_std"] == 0
