"""Completions in as few columns as hold them: what an update sees, and that it learns the same from it."""

import shutil
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from logs import steady
from marks import exhaustive

import rlhf
from rlhf import cli, rollouts
from rlhf.recipes import grpo, nash_md, online_dpo, ppo, rloo, xpo
from rlhf.rollouts import Rollout
from rlhf.training import collecting, online, policy_gradient
from rlhf.training.collecting import Collector, Completions
from rlhf.training.loading import one_device
from rlhf.training.policy import Policy
from rlhf.training.prompts import PromptBatch
from rlhf.training.rewards import Rewarded
from rlhf.training.sampling import BUCKET, PER_TOKEN, trimmed

import steps as tiny  # isort: skip

ROWS, PROMPT, NEW, WIDTH = 8, 3, 12, 4
REWARDS = np.array([1, 0, 0.5, 0.2, np.nan, 1, 0, 0.3], np.float32)


def a_rollout(longest: int) -> Rollout:
    """Four prompts of two completions each, of which row 5 is the longest."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, longest + 1, ROWS)
    lengths[5] = longest
    column = np.arange(PROMPT + NEW)[None, :]
    real = (column >= 1) & (column < PROMPT + lengths[:, None])
    # Drawn for all columns, so that a rollout with another longest row has the same tokens.
    tokens = rng.integers(1, tiny.VOCAB, (ROWS, PROMPT + NEW))
    tokens[:, :PROMPT] = np.repeat(tokens[::2, :PROMPT], 2, axis=0)
    rows = rollouts.unpacked_rows(np.where(real, tokens, 0).astype(np.int32), real)
    mask = real & (column >= PROMPT)
    logprobs = np.where(mask, rng.normal(-2.8, 0.3, mask.shape), 0).astype(np.float32)
    return Rollout(
        rows.tokens,
        mask,
        np.asarray(rows.positions),
        np.asarray(rows.segment_ids),
        logprobs,
        logprobs,
        lengths < longest,
        np.float32(1.0),
    )


@pytest.mark.parametrize(
    ("longest", "bucket", "wanted"),
    [(1, 4, 4), (4, 4, 4), (5, 4, 8), (8, 4, 8), (9, 4, 12), (3, 5, 5), (6, 5, 10), (11, 5, 12)],
)
def test_columns_are_the_least_multiple_that_holds_the_longest(longest, bucket, wanted):
    rollout = a_rollout(longest)
    cut = trimmed(rollout, NEW, bucket=bucket)
    assert {x.shape for x in cut[:6]} == {(ROWS, PROMPT + wanted)}
    for x, all_columns in zip(cut, rollout, strict=True):
        part = all_columns[:, : PROMPT + wanted] if np.ndim(all_columns) == 2 else all_columns
        np.testing.assert_array_equal(x, part)
    assert (cut is rollout) == (wanted == NEW)


def test_what_is_never_cut():
    rollout = a_rollout(2)
    # A single bucket, as of any run with at most 128 new tokens.
    assert BUCKET == 128
    assert trimmed(rollout, NEW) is rollout
    assert trimmed(rollout, NEW, bucket=NEW) is rollout
    # What an environment says is not sampled, and stands after what is.
    heard = rollout.segment_ids.copy()
    heard[0] = 1
    assert trimmed(rollout._replace(segment_ids=heard), NEW, bucket=WIDTH).tokens.shape == (
        ROWS,
        PROMPT + NEW,
    )


RECIPES = ["grpo", "rloo", "ppo", "online_dpo", "xpo", "nash_md"]
OBJECTIVES = [
    "dr_grpo", "dapo", "lite_ppo", "gspo", "luspo", "gmpo", "cispo", "sapo", "vespo", "dppo", "max_rl",
]  # fmt: skip


@cache
def updates():
    """A `make_update` of each recipe, with the parameters that it trains."""
    lm, head = tiny.models()
    policy = Policy(lm)
    optimizer = optax.sgd(0.1)
    params = lm.init(jax.random.key(0))
    with_head = {"lm": params, "head": head.init(jax.random.key(2))}
    of_groups = partial(grpo.make_update, policy, optimizer, num_samples=2)
    pairs = {"num_samples": 2, "num_minibatches": 2}
    of_ppo = ppo.make_update(Policy(lm, head), optimizer, epochs=2, whiten_rewards=True, lam=0.9)
    of_games = nash_md.make_update(policy, optimizer)
    named = {
        "grpo": partial(of_groups, kl_coef=0.1, entropy_coef=0.01, top_entropy=0.5),
        "rloo": partial(
            rloo.make_update, policy, optimizer, num_samples=2, normalize_advantages=True
        ),
        "ppo": lambda max_new_tokens: of_ppo,
        "online_dpo": partial(online_dpo.make_update, policy, optimizer, **pairs),
        "xpo": partial(xpo.make_update, policy, optimizer, alpha=0.1),
        "nash_md": lambda max_new_tokens: of_games,
    }
    objectives = {name: policy_gradient.named(name, NEW) for name in OBJECTIVES}
    named |= {name: partial(of_groups, algorithm=one) for name, one in objectives.items()}
    return {name: (one, with_head if name == "ppo" else params) for name, one in named.items()}


def taken(make_update, params, rollout, bucket):
    """The state and metrics after a step, and `(max_new_tokens, shape)` of what updates see."""
    seen = []

    def noting(*, max_new_tokens):
        update = make_update(max_new_tokens=max_new_tokens)

        def call(state, rollout, rewards, key):
            seen.append((max_new_tokens, rollout.tokens.shape))
            return update(state, rollout, rewards, key)

        return call

    reference = tiny.models()[0].init(jax.random.key(1))
    state = rlhf.init_state(
        rlhf.reference(params), optax.sgd(0.1), jax.random.key(0), {"reference": reference}
    )
    scored = Completions(rollout, REWARDS, [None] * ROWS, 2, {}, {})
    step = online.make_step(
        Collector(lambda *given: scored, lambda *given: rollout, lambda *given: {}),
        noting,
        one_device(),
        state,
        max_new_tokens=NEW,
        bucket=bucket,
    )
    state, metrics = step(state, PromptBatch(None, {}, jax.random.key(3)))
    return state.params, jax.device_get(metrics), seen


@pytest.mark.parametrize("name", exhaustive(RECIPES + OBJECTIVES, quick=["grpo", "dr_grpo", "ppo"]))
def test_a_step_learns_the_same_from_fewer_columns(name):
    make_update, params = updates()[name]
    full, full_metrics, all_columns = taken(make_update, params, a_rollout(3), NEW)
    cut, cut_metrics, few = taken(make_update, params, a_rollout(3), WIDTH)
    assert all_columns == [(NEW, (ROWS, PROMPT + NEW))]
    assert few == [(WIDTH, (ROWS, PROMPT + WIDTH))]
    moved = jax.tree.map(lambda new, old: float(jnp.abs(new - old).max()), full, params)
    largest = max(jax.tree.leaves(moved))
    assert largest > 1e-5
    for one, other in zip(jax.tree.leaves(cut), jax.tree.leaves(full), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * largest + 1e-7)
    assert cut_metrics.keys() == full_metrics.keys()
    for metric, value in full_metrics.items():
        np.testing.assert_allclose(cut_metrics[metric], value, rtol=1e-5, atol=1e-6, err_msg=metric)


def test_a_step_with_a_longer_completion_is_as_wide_as_that():
    make_update, params = updates()["dr_grpo"]
    wide, metrics, seen = taken(make_update, params, a_rollout(7), WIDTH)
    full, full_metrics, _ = taken(make_update, params, a_rollout(7), NEW)
    assert seen == [(2 * WIDTH, (ROWS, PROMPT + 2 * WIDTH))]
    np.testing.assert_allclose(metrics["loss"], full_metrics["loss"], rtol=1e-5)
    for one, other in zip(jax.tree.leaves(wide), jax.tree.leaves(full), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    _, _, seen = taken(make_update, params, a_rollout(NEW), WIDTH)
    assert seen == [(NEW, (ROWS, PROMPT + NEW))]


OPTIONS = (
    "--dataset task:reverse --dataset_size 16 --batch_size 4 --num_samples 2 --learning_rate 1e-2 "
    "--max_new_tokens 32 --stop a c e g i k --steps 4 --save_every 2"
).split()


@pytest.mark.exhaustive
@pytest.mark.parametrize("more", [[], ["--dynamic_sampling", "2"], ["--replay_groups", "8"]])
def test_runs_resume_bitwise_at_any_width(more, base, tmp_path, monkeypatch):
    widths = []

    def note(rollout, *given, **options):
        cut = trimmed(rollout, *given, **options)
        widths.append(cut.tokens.shape[1])
        return cut

    monkeypatch.setattr(online, "BUCKET", 2)
    monkeypatch.setattr(online, "trimmed", note)

    def run(name, *others):
        argv = ["grpo", "--model", base, *OPTIONS, *more, *others]
        assert cli.main([*argv, "--output", str(tmp_path / name)]) == 0
        return steady(tmp_path / name)

    whole = run("whole")
    shutil.copytree(
        tmp_path / "whole", tmp_path / "parts", ignore=shutil.ignore_patterns("model", "4")
    )
    np.testing.assert_equal(run("parts", "--resume"), whole)
    assert widths[4:] == widths[2:4]
    # Groups of other steps need all columns.
    assert (len(set(widths)) == 1) == ("--replay_groups" in more), widths


@pytest.mark.parametrize("more", [{}, {"dynamic_sampling": 1}])
def test_the_batch_of_a_failed_update_has_completions_and_rewards(more, base, tmp_path):
    lm, params, tokenizer = rlhf.load(base)
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
    with pytest.raises(ValueError, match="all 2 steps were skipped.*batch of step 2 is in .*npz"):
        grpo.main(
            model=(lm, broken, tokenizer),
            dataset=[{"prompt": f"{number}"} for number in range(4)],
            reward=lambda completions, **columns: [float(n) for n in range(len(completions))],
            output=str(tmp_path / "run"),
            batch_size=2,
            num_samples=2,
            max_new_tokens=5,
            max_skipped=2,
            steps=4,
            **more,
        )
    with np.load(tmp_path / "run" / "bad_batch.npz") as bad:
        names = set(bad.files)
        assert {f"rollout.{name}" for name in ("tokens", "mask", "logprobs", "finished")} < names
        assert bad["rewards"].tolist() == [0, 1, 2, 3]
        tokens, mask = bad["rollout.tokens"], bad["rollout.mask"]
        assert tokens.shape == mask.shape
        assert mask[:, -5:].any()
        assert not mask[:, :-5].any()
        prompts = bad["batches.0.prompts.tokens" if more else "prompts.tokens"]
        np.testing.assert_array_equal(tokens[::2, :-5], prompts)


def test_reward_models_read_as_few_columns(base):
    widths = []

    def reward_fn(rollout, columns, num_samples):
        widths.append(rollout.tokens.shape)
        return Rewarded(np.zeros(ROWS, np.float32), {}, [None] * ROWS)

    rollout = jax.tree.map(jnp.asarray, a_rollout(3)._replace(temperature=jnp.float32(1)))
    wide = {name: jnp.pad(getattr(rollout, name), ((0, 0), (0, 300 - NEW))) for name in PER_TOKEN}
    collector = collecting.sampled(lambda *given: rollout._replace(**wide), reward_fn, one_device())
    prompts = rollouts.Prompts(rollout.tokens[::2, :PROMPT], rollout.tokens[::2, :PROMPT] > 0)
    scored = collector.collect(None, PromptBatch(prompts, {}, None))
    assert widths == [(ROWS, PROMPT + 128)]
    assert scored.rollout.tokens.shape == (ROWS, PROMPT + 300)
