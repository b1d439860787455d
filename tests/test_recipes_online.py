"""Recipes that sample: what they make of completions, by hand; as commands; with a reward model."""

import math
import shutil
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow.parquet
import pytest
from logs import steady
from marks import exhaustive

import rlhf
from rlhf import cli, losses, rollouts, train
from rlhf.losses import presets
from rlhf.models import huggingface
from rlhf.recipes import nash_md, online_dpo, ppo, reward, rloo, xpo
from rlhf.rollouts import Rollout
from rlhf.training import datasets, loading, policy_gradient, rewards, sampling
from rlhf.training import preference as pair_losses
from rlhf.training.options import DatasetOptions, ModelOptions, RewardOptions
from rlhf.training.policy import Policy

import steps as tiny  # isort: skip

TASK = [
    "--dataset",
    "task:reverse",
    "--dataset_size",
    "16",
    "--max_new_tokens",
    "4",
    "--learning_rate",
    "1e-2",
]


@pytest.fixture(scope="module")
def reward_model(base, tmp_path_factory):
    """A reward model's run, as far as its export."""
    folder = tmp_path_factory.mktemp("runs") / "reward_model"
    model = loading.load_classifier(ModelOptions(base), 0, loading.one_device())
    params = {
        **model.params,
        "head": {"weight": jnp.linspace(-1.0, 1.0, 16), "bias": jnp.zeros(())},
    }
    state = train.TrainState(jnp.zeros(()), params, (), jax.random.key(0), {})
    model.export(folder, huggingface.load_tokenizer(base), state, True)
    return str(folder)


def a_rollout(rows: int = 4, seed: int = 0) -> Rollout:
    """Rows of a prompt of two tokens and three, two or one sampled ones."""
    rng = np.random.default_rng(seed)
    real = np.arange(5)[None, :] < 3 + (np.arange(rows) % 3)[::-1, None]
    batch = rollouts.unpacked_rows(
        jnp.asarray(rng.integers(1, tiny.VOCAB, (rows, 5)) * real), jnp.asarray(real)
    )
    mask = jnp.asarray(real & (np.arange(5) >= 2)[None, :])
    logprobs = jnp.where(mask, jnp.asarray(rng.normal(-2, 0.3, (rows, 5)), jnp.float32), 0.0)
    finished = jnp.arange(rows) % 2 == 0
    return Rollout(
        batch.tokens,
        mask,
        batch.positions,
        batch.segment_ids,
        logprobs,
        logprobs,
        finished,
        jnp.float32(1.0),
    )


@cache
def two_models():
    lm, _ = tiny.models()
    return lm, lm.init(jax.random.key(0)), lm.init(jax.random.key(1))


def state_of(reference) -> train.TrainState:
    return train.TrainState(jnp.zeros(()), (), (), jax.random.key(0), {"reference": reference})


def sums(lm, params, rollout) -> np.ndarray:
    return np.asarray((rollouts.score_batch(lm, params, rollout).logprobs * rollout.mask).sum(1))


# --- what is made of completions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
def test_rloo_compares_with_the_others_after_the_kl(normalize):
    lm, _, reference = two_models()
    rollout, rewards = a_rollout(6), np.array([1.0, 0.0, 0.5, np.nan, 1.0, 0.0], np.float32)
    batch, seen = rloo.estimate(
        Policy(lm),
        state_of(reference),
        rollout,
        jnp.asarray(rewards),
        num_samples=3,
        kl_coef=0.5,
        normalize_advantages=normalize,
    )
    kl = np.asarray((rollout.logprobs * rollout.mask).sum(1)) - sums(lm, reference, rollout)
    net = rewards - 0.5 * kl
    want = np.zeros(6)
    for i in range(6):
        others = [
            net[j] for j in range(i // 3 * 3, i // 3 * 3 + 3) if j != i and not np.isnan(net[j])
        ]
        want[i] = 0.0 if np.isnan(net[i]) else net[i] - np.mean(others)
    if normalize:
        scored = want[~np.isnan(rewards)]
        want = np.where(
            np.isnan(rewards), 0.0, (want - scored.mean()) / (scored.std(ddof=1) + 1e-4)
        )
    np.testing.assert_allclose(
        batch.advantages, want[:, None] * np.asarray(rollout.mask), atol=1e-5
    )
    np.testing.assert_allclose(seen["objective/kl"], kl.mean(), rtol=1e-5)


def test_rloo_weighs_completions_alike_and_clips_whole_ones():
    lm, params, reference = two_models()
    rollout, rewards = a_rollout(6), jnp.array([1.0, 0.0, 0.2, 0.4, 3.0, 3.0])
    batch, _ = rloo.estimate(
        Policy(lm), state_of(reference), rollout, rewards, num_samples=2, kl_coef=0.0
    )
    algorithm = presets.rloo(clip_low=0.1, clip_high=0.3)
    batch = batch._replace(weights=algorithm.weights(batch.mask))
    loss, _ = policy_gradient.make_loss(Policy(lm), algorithm)(params, (), batch, None)
    ratio = np.exp(sums(lm, params, rollout) - np.asarray(rollout.logprobs.sum(1)))
    advantages = np.array([1.0, -1.0, -0.2, 0.2, 0.0, 0.0])
    want = -np.minimum(ratio * advantages, np.clip(ratio, 0.9, 1.3) * advantages).mean()
    np.testing.assert_allclose(loss, want, rtol=1e-4)


def test_online_dpo_prefers_the_best_to_the_worst_and_leaves_ties_out():
    rollout = a_rollout(9)
    rewards = jnp.array([0.0, 1.0, 0.5, 2.0, 2.0, 2.0, jnp.nan, 3.0, 1.0])
    pairs, picked, seen = pair_losses.best_and_worst(rollout, rewards, num_samples=3)
    assert picked.tolist()[::2] == [[1, 0], [1, 2]]
    for pair, (row_chosen, row_rejected) in ((0, (1, 0)), (2, (7, 8))):
        for side, row in enumerate((row_chosen, row_rejected)):
            for name in ("tokens", "mask", "positions", "segment_ids"):
                np.testing.assert_array_equal(
                    getattr(pairs, name)[pair, side], getattr(rollout, name)[row]
                )
    assert not pairs.mask[1].any()
    np.testing.assert_allclose(pair_losses.with_weights(pairs).weights[:, 0], [0.5, 0.0, 0.5])
    np.testing.assert_allclose([seen["reward_margin"], seen["preferred"]], [1.0, 2 / 3], rtol=1e-6)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_xpo_is_dpo_and_optimism_about_the_reference_s_completion(loss):
    lm, params, reference = two_models()
    rollout, rewards = (
        a_rollout(6),
        jnp.array([1.0, 0.0, 0.0, 1.0, 0.5, 0.5]),
    )  # the policy wins, the reference wins, a tie
    pairs, picked, _ = pair_losses.best_and_worst(rollout, rewards, num_samples=2)
    pairs = pairs._replace(
        ref_logprobs=jnp.asarray(sums(lm, reference, rollout)[[0, 1, 3, 2, 4, 5]]).reshape(3, 1, 2)
    )
    duels = xpo.PolicyPairs(pair_losses.with_weights(pairs), picked[:, 0] == 1)
    loss_fn = xpo.make_loss(Policy(lm), alpha=0.3, beta=0.5, loss=online_dpo.LOSSES[loss])
    value, metrics = loss_fn(params, (), duels, None)
    lp, ref = sums(lm, params, rollout), sums(lm, reference, rollout)
    n, terms = np.asarray(rollout.mask.sum(1)), []
    for chosen, rejected, by_reference in ((0, 1, 1), (3, 2, 3)):
        a, b = lp[chosen] - ref[chosen], lp[rejected] - ref[rejected]
        of_pair = (
            math.log1p(math.exp(-0.5 * (a - b)))
            if loss == "sigmoid"
            else (a / n[chosen] - b / n[rejected] - 1) ** 2
        )
        terms.append(of_pair + 0.3 * lp[by_reference])
    np.testing.assert_allclose(value, np.mean(terms), rtol=1e-4)
    assert 0 <= metrics["rewards/accuracies"] <= 1


@pytest.mark.exhaustive
def test_nash_md_follows_the_gradient_of_the_regularised_game():
    lm, params, reference = two_models()
    rollout, rewards = a_rollout(6), jnp.array([1.0, 0.0, 0.5, 2.0, jnp.nan, 1.0])
    policy, context = Policy(lm), {"reference": reference}
    games, seen = nash_md.play(policy, context, rollout, rewards)
    weights = losses.weights.sequence_sum(games.batch.mask)
    games = games._replace(batch=games.batch._replace(weights=weights))
    own: Rollout = datasets.select(rollout, slice(0, None, 2))
    loss_fn = nash_md.make_loss(policy, beta=0.2)
    found = jax.grad(lambda p: loss_fn(p, (), games, None)[0])(params)
    logprobs = lambda p: rollouts.score_batch(lm, p, own).logprobs
    pull = 0.2 * (logprobs(params) - logprobs(reference))
    better = 1 / (1 + np.exp(-np.array([1.0, -1.5]))) - 0.5
    coefficients = jnp.where(own.mask[:2], pull[:2] - better[:, None], 0.0)

    def by_hand(p):
        where: dict[str, Any] = dict(positions=own.positions, segment_ids=own.segment_ids)
        return (coefficients * rollouts.token_logprobs(lm, p, own.tokens, **where)[:2]).sum() / 2

    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), found, jax.grad(by_hand)(params))
    np.testing.assert_allclose(seen["reward"], 0.75)
    np.testing.assert_allclose(seen["opponent_reward"], 1.0)


def test_a_pair_sampler_takes_its_two_samplers_in_turn():
    sampler = lambda shift: (
        lambda state, prompts, key: a_rollout(2)._replace(tokens=prompts + shift)
    )
    both = sampling.pair_sampler(sampler(0), sampler(10))(
        None, jnp.array([[1] * 5, [2] * 5]), jax.random.key(0)
    )
    assert both.tokens[:, 0].tolist() == [1, 11, 2, 12]
    assert both.finished.tolist() == [True, True, False, False]
    assert both.temperature.shape == ()


def test_ppo_whitens_rewards_over_the_batch():
    lm, head = tiny.models()
    params = {
        "lm": lm.init(jax.random.key(0)),
        "head": {"weight": jnp.zeros(tiny.HIDDEN), "bias": jnp.zeros(())},
    }
    rollout, scores = a_rollout(3), jnp.array([1.0, 2.0, -1.0])
    state = train.init_state(
        params, optax.sgd(0.1), jax.random.key(0), {"reference": rlhf.reference(params["lm"])}
    )
    batch, _ = ppo.estimate(
        Policy(lm, head), state, rollout, scores, kl_coef=0.0, lam=1.0, whiten_rewards=True
    )
    mask = np.asarray(rollout.mask)
    along = np.zeros(mask.shape)
    for row, score in enumerate(scores):
        along[row, np.flatnonzero(mask[row])[-1]] = score
    there = along[mask]
    along = np.where(mask, (along - there.mean()) / there.std(ddof=1) + there.mean(), 0.0)
    np.testing.assert_allclose(
        batch.returns, np.where(mask, np.cumsum(along[:, ::-1], 1)[:, ::-1], 0.0), atol=1e-4
    )


# --- optimizer steps -----------------------------------------------------------------------------------------------------


def test_updates_beyond_the_target_kl_change_nothing():
    def loss_fn(params, context, batch, key):
        return jnp.sum(params * batch), {"approx_kl": jnp.sum(params**2)}

    optimizer = optax.adam(0.1)
    step, state = (
        train.train_step(loss_fn, optimizer),
        train.init_state(jnp.zeros(()), optimizer, jax.random.key(0)),
    )
    batches = jnp.ones((5, 2))
    run = lambda batches, target: train.run_minibatches(step, state, batches, target_kl=target)
    stopped, metrics = run(
        batches, 0.03
    )  # the KL is 0, 0.01, 0.04: the third sees it, and is the last
    three, of_three = run(batches[:3], None)
    assert (stopped.step, metrics["updates"]) == (5, 3)
    jax.tree.map(
        np.testing.assert_array_equal,
        (stopped.params, stopped.opt_state),
        (three.params, three.opt_state),
    )
    np.testing.assert_allclose(metrics["approx_kl"], of_three["approx_kl"], rtol=1e-6)
    whole, _ = run(batches, None)
    assert abs(whole.params - stopped.params) > 0.1
    np.testing.assert_allclose(run(batches, 10.0)[0].params, whole.params, rtol=1e-6)


# --- rewards -------------------------------------------------------------------------------------------------------------


def test_a_reward_model_reads_the_policy_s_tokens(base, reward_model):
    source, tokenizer = DatasetOptions("task:reverse"), huggingface.load_tokenizer(base)
    options = RewardOptions(
        [reward_model, "length"], [2.0, 0.5], reward_clip=0.7, missing_end_penalty=0.25
    )
    assert not rewards.is_model("length")
    rollout = a_rollout()
    _, head, params, _ = huggingface.load_classifier(Path(reward_model) / "model")
    lm, of_policy, _ = huggingface.load(
        base
    )  # `reward.scores` computes log-probs beside, by the output matrix
    params = {"lm": {**of_policy, **params["lm"]}, "head": params["head"]}
    of_model = np.asarray(reward.scores(lm, head, params, rollout))
    scores, metrics, _ = rewards.load(options, source, tokenizer)(rollout, {}, 2)
    lengths = np.asarray(rollout.mask.sum(1))
    want = np.clip(2 * of_model + 0.5 * lengths, -0.7, 0.7) - 0.25 * np.array([0, 1, 0, 1])
    np.testing.assert_allclose(scores, want, atol=1e-5)
    alone, of_one, _ = rewards.load(RewardOptions([f"{reward_model}/model"]), source, tokenizer)(
        rollout, {}, 2
    )
    np.testing.assert_allclose(alone, of_model, atol=1e-5)
    assert np.std(of_model) > 0
    assert sorted(of_one) == ["reward", f"rewards/{reward_model}/model/mean", "task_score"]
    assert metrics["rewards/length/mean"] == lengths.mean()


# --- commands ------------------------------------------------------------------------------------------------------------

COMMANDS = {
    "rloo": ["--num_samples", "2", "--mini_batches", "2", "--normalize_advantages"],
    "ppo": ["--mini_batches", "2", "--num_ppo_epochs", "2", "--kl_target", "0.05", "--kl_horizon", "40", "--scale_rewards",
            "--target_kl", "9"],
    "online_dpo": ["--num_samples", "2", "--loss", "ipo"],
    "xpo": ["--alpha", "0.1", "--lora_rank", "2"],
    "nash_md": ["--mixture_coef", "0.3", "--missing_eos_penalty", "9", "--eval_dataset", "task:reverse"],
}  # fmt: skip


def weights(folder: Path) -> Any:
    return huggingface.load(folder / "model")[1]


@pytest.mark.parametrize("name", exhaustive(COMMANDS, quick=["ppo"]))
def test_a_command_samples_learns_and_exports_whatever_the_micro_batches(
    name, base, reward_model, tmp_path
):
    ask = [
        name,
        "--model",
        base,
        *TASK,
        *COMMANDS[name],
        "--reward",
        reward_model,
        "--batch_size",
        "4",
        "--steps",
        "2",
    ]
    assert cli.main([*ask, "--output", str(tmp_path / "one"), "--save_every", "1"]) == 0
    assert cli.main([*ask, "--output", str(tmp_path / "two"), "--micro_batches", "2"]) == 0
    for first, second in zip(steady(tmp_path / "one"), steady(tmp_path / "two"), strict=True):
        assert first.keys() == second.keys()
        ties = (
            abs(first.get("rewards/margins", 1.0)) < 1e-5
        )  # policy and reference are one: the sign of a margin is rounding
        for metric, value in first.items():
            if metric != "phase" and not (metric == "rewards/accuracies" and ties):
                np.testing.assert_allclose(
                    value, second[metric], rtol=1e-3, atol=1e-5, err_msg=metric
                )
    trained = weights(tmp_path / "one")
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), trained, weights(tmp_path / "two"))
    moved = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), trained, huggingface.load(base)[1]
    )
    assert moved["layers"]["q"] > 1e-3
    if name == "nash_md":  # an evaluation has the policy's completions alone
        *_, seen = steady(tmp_path / "one")
        of_model, clipped = (
            seen[f"eval_rewards/{reward_model}/mean"],
            seen["eval_completions/clipped_ratio"],
        )
        np.testing.assert_allclose(seen["eval_reward"], of_model - 9 * clipped)
        assert (
            pyarrow.parquet.read_table(tmp_path / "one" / "samples" / "00000002.parquet").num_rows
            == 4
        )
    if name == "ppo":
        first, second = steady(tmp_path / "one")
        error = np.clip(first["objective/kl"] / 0.05 - 1, -0.2, 0.2)
        np.testing.assert_allclose(
            second["kl_coef"], first["kl_coef"] * (1 + error * 4 / 40), rtol=1e-5
        )
        assert "v_head" not in str(sorted(trained))
        resumed = tmp_path / "resumed"  # what moves, coefficient and moments, is in the checkpoint
        shutil.copytree(tmp_path / "one", resumed, ignore=shutil.ignore_patterns("model", "8"))
        assert cli.main([*ask, "--output", str(resumed), "--save_every", "1", "--resume"]) == 0
        assert steady(resumed) == steady(tmp_path / "one")
        jax.tree.map(np.testing.assert_array_equal, trained, weights(resumed))


OUT = ["--model", "BASE", "--output", "OUT", *TASK]
MISTAKES = [
    (["rloo", *OUT, "--num_samples", "1"], "--num_samples must be a whole number at least 2"),
    (
        ["rloo", *OUT, "--clip_low", "1.5"],
        "--clip_low must be a number above 0 and below 1, but is 1.5",
    ),
    (
        ["ppo", *OUT, "--cliprange", "0"],
        "--cliprange (here clip) must be a number above 0 and below 1, but is 0.0",
    ),
    (
        ["ppo", *OUT, "--cliprange_value", "-1"],
        "--cliprange_value (here value_clip) must be a number above 0",
    ),
    (["ppo", *OUT, "--kl_target", "6", "--kl_coef", "0"], "init_coef must be above 0"),
    (
        ["ppo", *OUT, "--num_mini_batches", "3"],
        "a step's 8 rows cannot be taken in 3 mini-batches of 1 equal parts",
    ),
    (["online_dpo", *OUT, "--num_samples", "1"], "--num_samples must be a whole number at least 2"),
    (["online_dpo", *OUT, "--loss", "hinge"], "--loss must be one of sigmoid, ipo, but is 'hinge'"),
    (["online_dpo", *OUT, "--beta", "0"], "--beta must be a number above 0"),
    (["xpo", *OUT, "--num_samples", "2"], "--num_samples is not known"),
    (["xpo", *OUT, "--max_new_tokens", "0"], "--max_new_tokens must be a whole number at least 1"),
    (
        ["nash_md", *OUT, "--mixture_coef", "2"],
        "--mixture_coef must be a number at least 0 and at most 1, but is 2.0",
    ),
    (["grpo", *OUT, "--clip_low", "2"], "clip_low is a half-width"),
    (["grpo", *OUT, "--reward", "BASE"], "is it a reward model, as `rlhf reward` writes them?"),
    (["grpo", *OUT, "--reward", "no/model"], "no/model is no folder, and no name that the Hub"),
    (["grpo", *OUT, "--reward_clip", "0"], "--reward_clip must be a number above 0"),
    (
        ["grpo", *OUT, "--missing_end_penalty", "-1"],
        "--missing_end_penalty must be a number at least 0",
    ),
]


@pytest.mark.parametrize(
    ("argv", "message"), MISTAKES, ids=lambda x: " ".join(x[-2:]) if isinstance(x, list) else ""
)
def test_a_mistake_is_one_line_before_the_policy_loads(
    argv, message, base, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(loading.huggingface, "load", None)
    monkeypatch.setattr(loading.huggingface, "load_for_classification", None)
    names = {"BASE": base, "OUT": str(tmp_path / "out")}
    assert cli.main([names.get(word, word) for word in argv]) == 2
    error = capsys.readouterr().err.strip("\n")
    assert message in error
    assert "\n" not in error
