"""Environments in JAX: the same conversations as by the host's `play`, exact log-probs, and nothing that depends on company."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf import rollouts
from rlhf.models import TransformerConfig, transformer
from rlhf.rollouts import Prompts, Reply, simulate
from rlhf.tasks import reviews

TOKENIZER = reviews.tokenizer()
LM = transformer(
    TransformerConfig(len(TOKENIZER), hidden_size=16, num_layers=2, num_heads=2, mlp_size=32)
)
PARAMS = LM.init(jax.random.key(0))
PROMPTS = Prompts(
    np.array([[5, 6, 7], [9, 1, 0], [3, 0, 0], [8, 4, 0]], np.int32),
    np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 0]], bool),
)
ENDS = tuple(range(10, 40))  # many, so that turns differ in length
TURNS, NEW, SAMPLES = 3, 4, 4


def step(state, tokens, mask):
    """Says the sum of what it heard and its own number, the latter `heard mod 3` times; over at 5 tokens."""
    heard = mask.sum()
    total = state["total"] + heard
    reply = jnp.stack([jnp.where(mask, tokens, 0).sum() % 50, state["number"], state["number"]])
    there = jnp.arange(3) < 1 + heard % 3
    reward = total / 10.0
    return Reply(
        {"total": total, "number": state["number"]}, reply, there, reward=reward, done=total >= 5
    )


STATES = {"total": jnp.zeros(4, jnp.int32), "number": jnp.arange(41, 45)}
go = functools.partial(simulate, LM, step=step, max_turns=TURNS, max_new_tokens=NEW, eos_ids=ENDS)


@pytest.fixture(scope="module")
def played():
    sampler = rollouts.sampler(temperature=0.7)
    return jax.device_get(
        go(
            PARAMS,
            prompts=PROMPTS,
            states=STATES,
            key=jax.random.key(1),
            num_samples=SAMPLES,
            sampler=sampler,
        )
    )


def test_rows_are_what_the_environment_says_of_them(played):
    """Follows every conversation by hand, from its sampled tokens."""
    rollout, seen = played.rollout, set()
    for b in range(4 * SAMPLES):
        number, total, turns, rewards = 41 + b // SAMPLES, 0, 0, np.zeros(rollout.tokens.shape[1])
        row = rollout.tokens[b]
        column, done = 3, False
        prompt = PROMPTS.tokens[b // SAMPLES][PROMPTS.mask[b // SAMPLES]]
        assert row[3 - len(prompt) : 3].tolist() == prompt.tolist()
        expected_mask = np.zeros(len(row), bool)
        while turns < TURNS and not done:
            turn = []
            while len(turn) < NEW and not (turn and turn[-1] in ENDS):
                turn.append(int(row[column]))
                expected_mask[column] = True
                column += 1
            turns, total = turns + 1, total + len(turn)
            rewards[column - 1], done = total / 10, total >= 5
            seen.add((len(turn), done))
            if not done and turns < TURNS:
                reply = [sum(turn) % 50, number, number][: 1 + len(turn) % 3]
                assert row[column : column + len(reply)].tolist() == reply
                column += len(reply)
        assert (row[column:] == 0).all()
        real = np.arange(len(row)) < column
        real[: 3 - len(prompt)] = False
        np.testing.assert_array_equal(rollout.segment_ids[b], real)
        np.testing.assert_array_equal(rollout.positions[b], np.where(real, real.cumsum() - 1, 0))
        np.testing.assert_array_equal(rollout.mask[b], expected_mask)
        np.testing.assert_allclose(played.rewards[b], rewards, rtol=1e-6)
        assert (played.turns[b], played.states["total"][b]) == (turns, total)
        assert rollout.finished[b] == (done and turn[-1] in ENDS)
    assert len({size for size, _ in seen}) > 2, "turns should differ in length"
    assert {done for _, done in seen} == {True, False}
    assert (played.rollout.finished != (played.states["total"] >= 5)).any(), (
        "one should be over in a turn that was cut"
    )


def test_log_probs_are_those_of_token_logprobs(played):
    r = played.rollout
    scored = rollouts.token_logprobs(
        LM,
        PARAMS,
        r.tokens,
        positions=r.positions,
        segment_ids=r.segment_ids,
        temperature=r.temperature,
    )
    np.testing.assert_allclose(r.logprobs, np.where(r.mask, scored, 0), atol=1e-5)
    np.testing.assert_allclose(r.sampling_logprobs, r.logprobs, atol=1e-6)


def test_a_greedy_conversation_is_the_one_that_play_has():
    """The host's loop reads the whole conversation again at every turn; this one keeps its cache."""

    def reset(row):
        return {"total": jnp.int32(0), "number": jnp.int32(row)}

    def answer(state, ids, text):
        padded = jnp.zeros(NEW, jnp.int32).at[: len(ids)].set(jnp.array(ids))
        reply = step(state, padded, jnp.arange(NEW) < len(ids))
        observation = np.asarray(reply.tokens)[np.asarray(reply.mask)].tolist()
        return rollouts.Turn(
            reply.state, observation, reward=float(reply.reward), done=bool(reply.done)
        )

    greedy = rollouts.greedy()
    here = jax.device_get(
        go(PARAMS, prompts=PROMPTS, states=STATES, key=jax.random.key(1), sampler=greedy)
    )
    there = rollouts.play(
        LM, PARAMS, TOKENIZER, rollouts.Environment(reset, answer), PROMPTS, jax.random.key(1), rows=range(41, 45),
        max_turns=TURNS, max_new_tokens=NEW, max_tokens=len(here.rollout.tokens[0]), sampler=greedy, eos_ids=ENDS, buckets=[32],
    )  # fmt: skip
    for name in ("tokens", "mask", "positions", "segment_ids", "finished"):
        np.testing.assert_array_equal(
            getattr(here.rollout, name), getattr(there.rollout, name), err_msg=name
        )
    np.testing.assert_allclose(here.rollout.logprobs, there.rollout.logprobs, atol=1e-5)
    np.testing.assert_allclose(here.rewards, there.rewards, rtol=1e-6)
    np.testing.assert_array_equal(here.turns, there.turns)


@pytest.mark.exhaustive
def test_a_row_does_not_depend_on_its_company():
    keys = jax.random.split(jax.random.key(2), 4)
    all_four = go(PARAMS, prompts=PROMPTS, states=STATES, key=keys)
    order = np.array([2, 0])
    some = jax.tree.map(lambda x: x[order], (PROMPTS, STATES, keys))
    two = go(PARAMS, prompts=some[0], states=some[1], key=some[2])
    tokens, logprobs = two.rollout.tokens, two.rollout.logprobs
    np.testing.assert_array_equal(tokens, all_four.rollout.tokens[order])
    np.testing.assert_allclose(logprobs, all_four.rollout.logprobs[order], atol=1e-5)


def test_every_turn_draws_its_own_numbers():
    """A model that finds all tokens alike says another thing at every turn."""
    silent = lambda state, tokens, mask: Reply(state, tokens[:1], jnp.zeros(1, bool))
    uniform = jax.tree.map(jnp.zeros_like, PARAMS)
    r = simulate(
        LM,
        uniform,
        silent,
        PROMPTS,
        STATES,
        jax.random.key(4),
        max_turns=3,
        max_new_tokens=2,
        num_samples=25,
    ).rollout
    turns = np.asarray(r.tokens[:, 3:9]).reshape(100, 3, 2)
    alike = [(turns[:, i] == turns[:, j]).mean() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert max(alike) < 0.1


@pytest.mark.exhaustive
def test_seeds_vmap():
    keys = jax.random.split(jax.random.key(3), 2)
    one = lambda early_end: (
        lambda key: go(PARAMS, prompts=PROMPTS, states=STATES, key=key, early_end=early_end)
    )
    together = jax.vmap(one(False))(keys)
    alone = [one(True)(key) for key in keys]
    for i in range(2):
        np.testing.assert_array_equal(together.rollout.tokens[i], alone[i].rollout.tokens)
        np.testing.assert_array_equal(together.rewards[i], alone[i].rewards)
        np.testing.assert_allclose(
            together.rollout.logprobs[i], alone[i].rollout.logprobs, atol=1e-5
        )


def no_reply(state, tokens, mask):
    return state


def two_shapes(state, tokens, mask):
    return Reply(state, tokens[:2], mask[:1])


@pytest.mark.parametrize(
    ("error", "message", "given"),
    [
        (TypeError, "step must return a Reply, but returned dict", dict(step=no_reply)),
        (ValueError, r"a reply's tokens \[2\] and mask bool \[1\]", dict(step=two_shapes)),
        (ValueError, "max_turns must be at least 1, but is 0", dict(max_turns=0)),
        (
            ValueError,
            r"states \[3\] but prompts.tokens \[4, 3\]; one a prompt",
            dict(states=jnp.zeros(3)),
        ),
        (ValueError, "max_new_tokens and num_samples must be at least 1", dict(num_samples=0)),
    ],
)
def test_bad_input(error, message, given):
    fine = dict(prompts=PROMPTS, states=STATES, key=jax.random.key(0), step=step, max_turns=2)
    with pytest.raises(error, match=message):
        simulate(LM, PARAMS, max_new_tokens=2, **(fine | given))
