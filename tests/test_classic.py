"""PPO's `step(queries, responses, scores)`: what it learns, what moves, when it stops, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf import classic, losses, rollouts
from rlhf.models import TransformerConfig, scalar_head, transformer

LM, HEAD = transformer(TransformerConfig(11, 8, 1, 1, 16)), scalar_head(8)
OPTIMIZER = optax.adam(3e-2)
QUERIES, RESPONSES, SCORES = [[1, 2], [3], [1, 2, 3]], [[4, 5, 6], [4, 5], [7]], [1.0, 1.0, -1.0]
FIXED = losses.controllers.fixed(0.05)


def begun(controller=FIXED):
    key = jax.random.key(0)
    return classic.start(
        {"lm": LM.init(key), "head": HEAD.init(key)}, OPTIMIZER, key, controller=controller
    )


def of_responses(params):
    """The log-probs of the three responses."""
    rows = classic.rows_of(QUERIES, RESPONSES, 8)
    found = rollouts.token_logprobs(
        LM, params["lm"], rows.tokens, positions=rows.positions, segment_ids=rows.segment_ids
    )
    return (found * rows.mask).sum(axis=1)


@pytest.fixture(scope="module")
def trained():
    step, state, metrics = (
        classic.ppo_step(LM, HEAD, OPTIMIZER, length=8, controller=FIXED),
        begun(),
        [],
    )
    before = of_responses(state.params)
    for _ in range(3):
        state, seen = step(state, QUERIES, RESPONSES, SCORES)
        metrics.append(seen)
    return before, state, metrics


def test_good_responses_become_likelier(trained):
    before, state, metrics = trained
    change = np.asarray(of_responses(state.params) - before)
    assert (change[:2] > 0).all()
    assert change[2] < 0
    assert float(metrics[0]["objective/kl"]) == pytest.approx(0.0, abs=1e-5)
    assert float(metrics[-1]["objective/kl"]) != 0
    assert float(metrics[0]["reward"]) == pytest.approx(1 / 3)
    assert int(state.step) == 12  # three batches, four passes each


def test_the_coefficient_follows_the_kl():
    controller = losses.controllers.adaptive_kl(target=6.0, horizon=30, init_coef=0.2)
    step = classic.ppo_step(
        LM,
        HEAD,
        OPTIMIZER,
        length=8,
        controller=controller,
        epochs=1,
        scale_scores=True,
        score_clip=0.5,
    )
    state, seen = step(begun(controller), QUERIES, RESPONSES, SCORES)
    assert float(seen["kl_coef"]) == pytest.approx(0.2)
    np.testing.assert_allclose(
        state.context["kl"].coef, 0.2 * (1 - 0.2 * 3 / 30), rtol=1e-5
    )  # a KL of 0 is 100% too low
    np.testing.assert_allclose(state.context["scores"].mean, 1 / 3, rtol=1e-5)


def test_updates_end_beyond_the_target():
    step = classic.ppo_step(LM, HEAD, OPTIMIZER, length=8, controller=FIXED, target_kl=1e-6)
    state, seen = step(begun(), QUERIES, RESPONSES, SCORES)
    assert int(state.step) == 4
    assert 1 <= int(seen["updates"]) < 4


@pytest.mark.parametrize(
    ("queries", "responses", "scores", "message"),
    [
        ([[1]], [[2], [3]], [0.0], "1 queries but 2 responses; give one each"),
        ([[1], [2]], [[2], []], [0.0, 0.0], "response 1 has no tokens"),
        ([[], [2]], [[2], [1]], [0.0, 0.0], "query 0 has no tokens"),
        ([[1]], [[2]], [0.0, 1.0], r"1 queries but scores \[2\]"),
        ([[1] * 6], [[2] * 3], [0.0], "has 9 tokens, but length is 8"),
    ],
)
def test_what_does_not_fit_is_refused(queries, responses, scores, message):
    step = classic.ppo_step(LM, HEAD, OPTIMIZER, length=8)
    with pytest.raises(ValueError, match=message):
        step(None, queries, responses, jnp.asarray(scores))


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        (
            ["a text"],
            r"query 0 is text, but must be a list of token ids; give tokenizer\(text\).input_ids",
        ),
        ("a", "query 0 is text"),
        ([["1", "2"]], "query 0 is text"),
        ([1], r"query 0 has shape \[\], but must be a list of token ids"),
        ([[[1, 2]]], r"query 0 has shape \[1, 2\]"),
        ([[0.5]], "query 0 holds float64, but must be a list of token ids, whole numbers"),
    ],
)
def test_texts_are_tokenised_first(queries, message):
    step = classic.ppo_step(LM, HEAD, OPTIMIZER, length=8)
    with pytest.raises(TypeError, match=message):
        step(None, queries, [[1]], [0.0])
