"""Sampling and scoring: the numbers of one are the numbers of the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf import losses, rollouts
from rlhf.tasks import reviews

import steps as tiny  # isort: skip

EOS = 2
PROMPTS = rollouts.Prompts(
    jnp.array([[3, 4, 5], [0, 6, 7], [8, 0, 0]]),
    jnp.array([[True, True, True], [False, True, True], [True, False, False]]),
)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def lm():
    return tiny.models(num_layers=2)[0]


@pytest.fixture(scope="module")
def params(lm):
    return jax.tree.map(
        lambda x: 2 * x, lm.init(KEY)
    )  # far from uniform; rounding alone reaches 1e-5 at 2.5


@pytest.fixture(scope="module")
def sample(lm, params):
    def run(key=KEY, prompts=PROMPTS, sampler=rollouts.sampler(temperature=0.7), **kw):
        settings = dict(max_new_tokens=8, num_samples=4, eos_ids=(EOS,)) | kw
        return rollouts.generate(lm, params, prompts, key, sampler=sampler, **settings)

    return run


@pytest.fixture(scope="module")
def rollout(sample):
    return jax.device_get(sample())


def logprobs_of(lm, params, rollout):
    where = dict(
        positions=rollout.positions,
        segment_ids=rollout.segment_ids,
        temperature=rollout.temperature,
    )
    return rollouts.token_logprobs(lm, params, rollout.tokens, **where)


def test_generated_logprobs_equal_token_logprobs(lm, params, rollout):
    scored = logprobs_of(lm, params, rollout)
    np.testing.assert_allclose(rollout.logprobs[rollout.mask], scored[rollout.mask], atol=1e-5)
    np.testing.assert_allclose(
        rollout.sampling_logprobs, rollout.logprobs, atol=1e-6
    )  # nothing was filtered
    assert rollout.mask.sum() > 30
    assert np.std(rollout.logprobs[rollout.mask]) > 0.1


def test_a_sharper_model_in_float64_leaves_no_difference():
    with jax.enable_x64(True):
        lm = tiny.models(num_layers=2, dtype=jnp.float64)[0]
        params = jax.tree.map(lambda x: 2.5 * x, lm.init(KEY))
        sampler = rollouts.sampler(temperature=0.7)
        r = rollouts.generate(
            lm,
            params,
            PROMPTS,
            KEY,
            max_new_tokens=8,
            num_samples=4,
            eos_ids=(EOS,),
            sampler=sampler,
        )
        scored = logprobs_of(lm, params, r)
    assert params["embedding"].dtype == jnp.float64
    np.testing.assert_allclose(
        np.asarray(r.logprobs)[r.mask], np.asarray(scored)[r.mask], atol=1e-6
    )


def test_form_of_a_rollout(rollout):
    assert rollout.tokens.shape == (12, 11)
    np.testing.assert_array_equal(
        rollout.tokens[::4, :3], [[3, 4, 5], [0, 6, 7], [0, 0, 8]]
    )  # samples contiguous, prompts right
    np.testing.assert_array_equal(rollout.segment_ids[::4, :3], [[1, 1, 1], [0, 1, 1], [0, 0, 1]])
    assert not rollout.mask[:, :3].any()
    for tokens, mask, positions, segment_ids, finished in zip(
        rollout.tokens,
        rollout.mask,
        rollout.positions,
        rollout.segment_ids,
        rollout.finished,
        strict=True,
    ):
        length = mask.sum()
        assert mask[3 : 3 + length].all()
        assert (tokens[3:][mask[3:]][:-1] != EOS).all()
        assert finished == (tokens[2 + length] == EOS)
        assert finished or length == 8
        assert (tokens[3 + length :] == 0).all()
        np.testing.assert_array_equal(
            positions[segment_ids != 0], np.arange((segment_ids != 0).sum())
        )
        np.testing.assert_array_equal(segment_ids[3:], mask[3:])
    assert 0 < rollout.finished.sum() < 12


def test_fixed_length_loop_gives_the_same(sample, rollout):
    fixed = jax.device_get(sample(early_end=False))
    np.testing.assert_array_equal(fixed.tokens, rollout.tokens)
    np.testing.assert_allclose(fixed.logprobs, rollout.logprobs, atol=1e-6)


def test_padding_of_prompts_changes_nothing(sample, rollout):
    wide = rollouts.Prompts(
        jnp.pad(PROMPTS.tokens, ((0, 0), (1, 2))), jnp.pad(PROMPTS.mask, ((0, 0), (1, 2)))
    )
    padded = jax.device_get(sample(prompts=wide))
    np.testing.assert_array_equal(padded.tokens[:, 3:], rollout.tokens)
    np.testing.assert_allclose(padded.logprobs[:, 3:], rollout.logprobs, atol=1e-5)


def test_another_key_gives_other_samples_and_compiles_nothing(sample, rollout):
    from rlhf.rollouts.generate import _generate

    sample()
    compiled = _generate._cache_size()
    other = sample(key=jax.random.key(1), sampler=rollouts.sampler(temperature=0.9))
    assert _generate._cache_size() == compiled
    assert not np.array_equal(other.tokens, rollout.tokens)


def test_sampled_frequencies_match_the_probabilities():
    logits = jnp.array([0.0, 1.0, -jnp.inf, 2.0, -1.0])
    number = 20_000
    drawn = rollouts.samplers.draw(
        jax.random.uniform(KEY, (number,)), jnp.broadcast_to(logits, (number, 5))
    )
    counts = np.bincount(drawn, minlength=5)
    expected = number * np.asarray(jax.nn.softmax(logits))
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    ("transform", "kept"),
    [
        (rollouts.top_k(2), [0, 3]),
        (rollouts.top_k(9), [0, 1, 2, 3]),
        (rollouts.top_p(0.4), [3]),
        (rollouts.top_p(0.65), [0, 3]),
        (rollouts.top_p(1.0), [0, 1, 2, 3]),
        (rollouts.min_p(0.3), [0, 1, 3]),
        (rollouts.min_p(1.0), [3]),
        (rollouts.greedy().transforms[0], [3]),
    ],
)
def test_transforms_keep_the_right_tokens(transform, kept):
    logits = jnp.log(jnp.array([[0.3, 0.15, 0.05, 0.5]]))
    filtered = transform(logits)[0]
    np.testing.assert_array_equal(np.flatnonzero(filtered > -jnp.inf), kept)
    np.testing.assert_array_equal(filtered[np.array(kept)], logits[0, np.array(kept)])


def test_filtered_sampling_has_both_logprobs(lm, params, sample):
    sampler = rollouts.sampler(rollouts.top_k(3), rollouts.top_p(0.9), temperature=0.7)
    r = jax.device_get(sample(sampler=sampler))
    scored = logprobs_of(lm, params, r)
    np.testing.assert_allclose(r.logprobs[r.mask], scored[r.mask], atol=1e-5)
    assert (r.sampling_logprobs[r.mask] >= r.logprobs[r.mask] - 1e-5).all()
    assert (r.sampling_logprobs - r.logprobs)[r.mask].max() > 0.01


def test_score_of_packed_rows_equals_the_rows_by_themselves(lm, params):
    head = tiny.models()[1]
    heads = {"v": (head, head.init(KEY))}
    batch = tiny.rows(np.random.default_rng(0))
    packed, sequences = tiny.packed(batch)
    score = lambda b, s: rollouts.score(
        lm,
        params,
        b.tokens,
        positions=b.positions,
        segment_ids=b.segment_ids,
        heads=heads,
        max_segments=s,
        chunk_size=4,
    )
    alone, together = score(batch, 1), score(packed, sequences)
    pairs = [(together.logprobs, alone.logprobs), (together.entropy, alone.entropy)]
    pairs += [
        (together.values["v"], alone.values["v"]),
        (together.last_value["v"], alone.last_value["v"]),
    ]
    for x, y in pairs:  # float32: equal within 1e-5 of the largest entry
        np.testing.assert_allclose(np.reshape(x, y.shape), y, rtol=0, atol=1e-5 * np.abs(y).max())
    assert np.std(alone.last_value["v"]) > 0.1


def test_score_against_whole_logits(lm, params):
    head = tiny.models()[1]
    head_params = head.init(KEY)
    batch = tiny.rows(np.random.default_rng(1))
    where = dict(positions=batch.positions, segment_ids=batch.segment_ids)
    scored = rollouts.score(
        lm,
        params,
        batch.tokens,
        temperature=0.5,
        heads={"v": (head, head_params)},
        chunk_size=3,
        **where,
    )
    hidden, _, _ = lm.hidden(params, batch.tokens, **where)
    logprobs = jax.nn.log_softmax(lm.unembed(params, hidden) / 0.5)
    values = head.apply(head_params, hidden)
    for b in range(8):
        length = int((batch.segment_ids[b] != 0).sum())
        for t in range(10):
            inside = 0 < t < length
            expected = logprobs[b, t - 1, batch.tokens[b, t]] if inside else 0.0
            np.testing.assert_allclose(scored.logprobs[b, t], expected, atol=1e-5)
            entropy = -(jnp.exp(logprobs[b, t - 1]) * logprobs[b, t - 1]).sum() if inside else 0.0
            np.testing.assert_allclose(scored.entropy[b, t], entropy, atol=1e-5)
            np.testing.assert_allclose(
                scored.values["v"][b, t], values[b, t - 1] if inside else 0.0, atol=1e-5
            )
        np.testing.assert_allclose(scored.last_value["v"][b], values[b, length - 1], atol=1e-5)

    mask = (
        batch.mask & (np.arange(10) >= 4) & (np.arange(8)[:, None] > 3)
    )  # whole chunks without, and rows without
    asked = batch._replace(mask=mask, temperature=0.5)
    of_batch = rollouts.score_batch(
        lm, params, asked, heads={"v": (head, head_params)}, chunk_size=3
    )
    np.testing.assert_allclose(of_batch.logprobs, np.where(mask, scored.logprobs, 0.0), atol=1e-6)
    np.testing.assert_allclose(of_batch.entropy, np.where(mask, scored.entropy, 0.0), atol=1e-6)
    np.testing.assert_allclose(of_batch.values["v"], scored.values["v"], atol=1e-6)
    assert np.asarray(of_batch.logprobs)[mask].all()
    with pytest.raises(ValueError, match=r"mask \[8, 9\] but tokens \[8, 10\]"):
        rollouts.score_batch(lm, params, asked._replace(mask=mask[:, 1:]))


def test_a_loss_in_one_pass_is_that_of_its_scores(lm, params):
    head = tiny.models()[1]
    heads = {"v": (head, head.init(KEY))}
    batch = tiny.rows(np.random.default_rng(1))
    mask = batch.mask & (np.arange(10) >= 4) & (np.arange(8)[:, None] > 3)
    batch = batch._replace(
        mask=mask,
        temperature=0.5,
        weights=losses.weights.sequence_mean(mask),
        advantages=jnp.asarray(np.random.default_rng(2).normal(size=mask.shape), jnp.float32),
    )

    def per_token(logprobs, entropy, batch):
        return batch.advantages * jnp.exp(logprobs) - 0.1 * jnp.where(batch.mask, entropy, 0.0) ** 2

    @jax.jit
    def in_one_pass(params):
        loss, scored = rollouts.score_loss(lm, params, batch, per_token, heads=heads, chunk_size=3)
        # Values have gradients of their own; log-probs and entropy have none.
        return loss + scored.values["v"].mean() + scored.logprobs.sum(), scored

    @jax.jit
    def by_scores(params):
        scored = rollouts.score_batch(lm, params, batch, heads=heads, chunk_size=3)
        per = per_token(scored.logprobs, scored.entropy, batch)
        fixed = jax.lax.stop_gradient(scored.logprobs.sum())
        return losses.weighted_sum(per, batch.weights) + scored.values["v"].mean() + fixed, scored

    for x, y in zip(
        *(
            jax.tree.leaves(jax.value_and_grad(fn, has_aux=True)(params))
            for fn in (in_one_pass, by_scores)
        ),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-6 * max(np.abs(y).max(), 1e-3))
    with pytest.raises(ValueError, match="weights is None; set them in the batch"):
        rollouts.score_loss(lm, params, batch._replace(weights=None), per_token)


@pytest.mark.parametrize(("first", "calls"), [(5, 1), (4, 2), (10, 0)])
def test_columns_of_prompts_have_no_logits(first, calls, lm, params):
    """Of two chunks of five columns, one is computed where no row is asked for a token of the other."""
    made = []

    def unembed(params, hidden):
        jax.debug.callback(lambda: made.append(1))
        return lm.unembed(params, hidden)

    batch = tiny.rows(np.random.default_rng(1))
    batch = batch._replace(mask=(batch.segment_ids != 0) & (np.arange(10) >= first))
    rollouts.score_batch(
        lm._replace(unembed=unembed), params, batch, chunk_size=5
    ).logprobs.block_until_ready()
    jax.effects_barrier()
    assert len(made) == calls


def test_text_goes_in_and_comes_out():
    tokenizer = reviews.tokenizer()
    prompts = rollouts.text.encode(tokenizer, ["the film", "honestly , the plot"])
    assert prompts.tokens.shape == (2, 5)
    np.testing.assert_array_equal(prompts.mask, [[False, False, True, True, True], [True] * 5])
    rest = tokenizer.encode("is great .", add_special_tokens=False)
    tokens = np.concatenate(
        [prompts.tokens, np.tile([*rest, tokenizer.eos_token_id], (2, 1))], axis=1
    )
    mask = np.concatenate([np.zeros_like(prompts.mask), np.ones((2, 4), bool)], axis=1)
    segments = np.concatenate([prompts.mask, np.ones((2, 4), bool)], axis=1).astype(np.int32)
    rollout = rollouts.Rollout(tokens, mask, segments, segments, None, None, None, None)
    assert rollouts.text.prompts(tokenizer, rollout) == ["the film", "honestly , the plot"]
    assert rollouts.text.completions(tokenizer, rollout) == ["is great .", "is great ."]


def test_refusals_name_both_sides(sample, lm, params):
    tokenizer = reviews.tokenizer()
    with pytest.raises(ValueError, match="at least 1, but are 0 and 4"):
        sample(max_new_tokens=0)
    with pytest.raises(ValueError, match=r"prompts.tokens \[3, 3\] but prompts.mask \[3, 2\]"):
        sample(prompts=PROMPTS._replace(mask=PROMPTS.mask[:, :2]))
    with pytest.raises(TypeError, match="mask must be bool"):
        sample(prompts=PROMPTS._replace(mask=PROMPTS.mask.astype(jnp.int32)))
    with pytest.raises(TypeError, match=r"write \(2,\)"):
        sample(eos_ids=2)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        rollouts.sampler(temperature=0)
    for make, wrong in ((rollouts.top_k, 0), (rollouts.top_p, 1.5), (rollouts.min_p, -1)):
        with pytest.raises(ValueError, match=f"{wrong}"):
            make(wrong)
    with pytest.raises(ValueError, match=r"keep the shape \[3, 16\], but returned \[3\]"):
        sample(num_samples=1, sampler=rollouts.sampler(lambda logits, step: logits.max(-1)))
    with pytest.raises(
        TypeError, match=r"a transform takes \(logits, step\), but .* does not: too many"
    ):
        rollouts.sampler(lambda logits: logits)
    with pytest.raises(
        ValueError, match=r"eos_ids \[16\] but the model's vocabulary has 16 tokens"
    ):
        sample(eos_ids=(2, 16))
    with pytest.raises(ValueError, match=r"prompts \[1\] have no tokens"):
        sample(prompts=rollouts.Prompts(np.ones((2, 1), np.int32), np.array([[True], [False]])))
    with pytest.raises(
        ValueError, match=r"key \[2\] but prompts.tokens \[3, 3\]; one key, or one a prompt"
    ):
        sample(key=jax.random.split(KEY, 2))
    with pytest.raises(ValueError, match="prompt 1 has 5 tokens but length is 3"):
        rollouts.text.encode(tokenizer, ["the film", "honestly , the plot"], length=3)
    with pytest.raises(ValueError, match="prompt 0 has no tokens"):
        rollouts.text.encode(tokenizer, [""], add_special_tokens=False)
    with pytest.raises(ValueError, match=r"positions \[1, 3\] but tokens \[1, 4\]"):
        rollouts.token_logprobs(
            lm,
            params,
            jnp.ones((1, 4), jnp.int32),
            positions=jnp.ones((1, 3)),
            segment_ids=jnp.ones((1, 4)),
        )


def test_sequence_sum_of_a_rollout_is_its_logprob(lm, params, rollout):
    total = losses.segment_sum(rollout.logprobs, rollout.mask)
    np.testing.assert_allclose(total, rollout.logprobs.sum(-1), rtol=1e-6)
