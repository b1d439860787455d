"""Samplers draw from exactly the distribution that they say; stop strings end rows wherever the text says so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import exhaustive
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from rlhf import rollouts
from rlhf.mixture import geometric_mixture
from rlhf.rollouts import samplers, stopping

import steps as tiny  # isort: skip

KEY = jax.random.key(0)
TOKENS = jnp.array(
    [[0, 3, 4, 3, 1, 0]]
)  # padding, a prompt of two, two sampled tokens, room for one
LOGITS = jnp.array([[0.5, 1.0, -2.0, 0.8, -0.3, 1.2]])
STEP = samplers.Step(
    tokens=TOKENS, here=jnp.array([[False, True, True, True, True, False]]),
    sampled=jnp.array([[False, False, False, True, True, False]]), column=jnp.array([5]), new=jnp.array([2]),
    hidden=jnp.array([[1.0, -1.0]]), temperature=jnp.float32(0.5),
)  # fmt: skip
INF = np.inf
WORDS = [
    [3, 1, 5],
    [4, 3, 1, 0],
    [1, 4],
    [3, 2],
    [0, 3, 4, 3, 1, 3],
]  # the last one begins with padding


def shift(logits, step):
    return logits + 2.0 * step.hidden[:, :1] * jnp.arange(6.0)[None, :]


CASES = {
    "repetition": (samplers.repetition_penalty(2.0), [0.5, 0.5, -2.0, 0.4, -0.6, 1.2]),  # 1, 3 and 4 stand there
    "presence": (samplers.presence_penalty(0.5), [0.5, 0.0, -2.0, -0.2, -0.3, 1.2]),  # 1 and 3 were sampled; 0.5 / 0.5
    "banned word": (samplers.banned(WORDS), [-INF, 1.0, -2.0, 0.8, -INF, -INF]),
    "allowed": (samplers.allowed([1, 4]), [-INF, 1.0, -INF, -INF, -0.3, -INF]),
    "allowed mask": (samplers.allowed(np.arange(6) % 2 == 0), [0.5, -INF, -2.0, -INF, -0.3, -INF]),
    "early end": (samplers.min_new_tokens(3, (5, 0)), [-INF, 1.0, -2.0, 0.8, -0.3, -INF]),
    "late end": (samplers.min_new_tokens(2, (5, 0)), [0.5, 1.0, -2.0, 0.8, -0.3, 1.2]),
    "user's": (shift, [0.5, 3.0, 2.0, 6.8, 7.7, 11.2]),
    "top k": (samplers.top_k(3), [-INF, 1.0, -INF, 0.8, -INF, 1.2]),
    "top p": (samplers.top_p(0.4), [-INF, 1.0, -INF, -INF, -INF, 1.2]),
    "min p": (samplers.min_p(0.6), [-INF, 1.0, -INF, 0.8, -INF, 1.2]),
    "greedy": (samplers.greedy().transforms[0], [-INF, -INF, -INF, -INF, -INF, 1.2]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_transform_does_what_it_says(name):
    transform, expected = CASES[name]
    np.testing.assert_allclose(transform(LOGITS, STEP)[0], np.float32(expected), rtol=1e-6)


def test_a_frequency_penalty_counts():
    step = STEP._replace(tokens=TOKENS.at[0, 4].set(3))
    np.testing.assert_allclose(
        samplers.frequency_penalty(0.5)(LOGITS, step)[0],
        [0.5, 1.0, -2.0, -1.2, -0.3, 1.2],
        rtol=1e-6,
    )


@pytest.mark.parametrize("name", CASES)
def test_sampled_frequencies_match_the_probabilities(name):
    number, sampler = 20_000, rollouts.sampler(CASES[name][0], temperature=0.5)
    _, filtered = samplers.apply(sampler, LOGITS * 0.5, STEP)
    drawn = samplers.draw(
        jax.random.uniform(KEY, (number,)), jnp.broadcast_to(filtered, (number, 6))
    )
    expected = number * np.exp(CASES[name][1] - np.logaddexp.reduce(CASES[name][1]))
    counts, possible = np.bincount(drawn, minlength=6), expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 20.5  # at most 5 degrees of freedom, p = 0.001


@pytest.mark.exhaustive
def test_a_large_vocabulary_is_drawn_from_as_a_whole():
    """Inverse of the cumulative distribution over blocks of tokens: its pieces fit together."""
    logits = jnp.sin(jnp.arange(1000.0)) * 3
    number = 100_000
    drawn = samplers.draw(
        jax.random.uniform(KEY, (number,)), jnp.broadcast_to(logits, (number, 1000))
    )
    expected = number * np.asarray(jax.nn.softmax(logits), np.float64)
    counts = np.bincount(drawn, minlength=1000)
    assert ((counts - expected) ** 2 / expected).sum() < 1143  # 999 degrees of freedom, p = 0.001


@pytest.mark.exhaustive
def test_penalties_and_minimum_length_in_a_rollout():
    """Against the sampler applied by hand to the rollout's own prefixes."""
    lm = tiny.models(num_layers=1)[0]
    params = jax.tree.map(lambda x: 1.8 * x, lm.init(KEY))
    prompts = rollouts.Prompts(
        jnp.array([[3, 4, 5], [0, 6, 7]]), jnp.array([[True, True, True], [False, True, True]])
    )
    transforms = (
        samplers.repetition_penalty(1.3),
        samplers.presence_penalty(0.7),
        samplers.min_new_tokens(4, (2, 9)),
    )
    sampler = rollouts.sampler(*transforms, samplers.banned([[5, 6], [11]]), temperature=0.8)
    r = rollouts.generate(
        lm, params, prompts, KEY, max_new_tokens=6, num_samples=8, sampler=sampler, eos_ids=(2, 9)
    )
    r = jax.device_get(r)
    assert (r.mask.sum(1) >= 4).all()
    assert r.finished.any()
    assert not (r.tokens == 11)[r.mask].any()
    where = dict(positions=r.positions, segment_ids=r.segment_ids)
    logits = np.asarray(lm.unembed(params, lm.hidden(params, r.tokens, **where)[0]))
    np.testing.assert_allclose(
        r.logprobs[r.mask],
        rollouts.token_logprobs(lm, params, r.tokens, temperature=r.temperature, **where)[r.mask],
        atol=1e-5,
    )
    for t in range(3, 9):
        before = np.arange(9)[None, :] < t
        step = samplers.Step(
            r.tokens,
            (r.segment_ids != 0) & before,
            r.mask & before,
            np.full(16, t),
            np.full(16, t - 3),
            None,
            r.temperature,
        )
        _, filtered = samplers.apply(sampler, jnp.asarray(logits[:, t - 1]), step)
        expected = np.take_along_axis(
            np.asarray(jax.nn.log_softmax(filtered)), r.tokens[:, t][:, None], axis=1
        )[:, 0]
        np.testing.assert_allclose(
            r.sampling_logprobs[:, t], np.where(r.mask[:, t], expected, 0), atol=1e-5
        )


def logits_of(lm, params, rollout):
    """`[B, T, V]`: column t holds what the token in column t + 1 was drawn from."""
    where = dict(positions=rollout.positions, segment_ids=rollout.segment_ids)
    return lm.unembed(params, lm.hidden(params, rollout.tokens, **where)[0])


def logprobs_of(logits, rollout):
    """`[B, T]` of the rollout's tokens, 0 outside the mask."""
    picked = np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits)), rollout.tokens[:, 1:, None], axis=-1
    )[..., 0]
    return np.where(rollout.mask, np.pad(picked, ((0, 0), (1, 0))), 0)


@pytest.mark.exhaustive
def test_ilql_samples_by_its_shift():
    """`log π + β (Q - V)`, heads of the hidden states that the logits are made from."""
    lm = tiny.models(num_layers=1)[0]
    params, beta = lm.init(KEY), 4.0
    size, vocabulary = params["embedding"].shape[1], params["embedding"].shape[0]
    q, v = jax.random.normal(KEY, (size, vocabulary)), jax.random.normal(KEY, (size,))
    shift = lambda hidden: beta * (hidden @ q - (hidden @ v)[..., None])
    sampler = rollouts.sampler(lambda logits, step: logits + shift(step.hidden))
    prompts = rollouts.Prompts(
        jnp.array([[3, 4, 5], [0, 6, 7]]), jnp.array([[True, True, True], [False, True, True]])
    )
    r = jax.device_get(
        rollouts.generate(
            lm, params, prompts, KEY, max_new_tokens=5, num_samples=4, sampler=sampler
        )
    )
    hidden = lm.hidden(params, r.tokens, positions=r.positions, segment_ids=r.segment_ids)[0]
    logits = logits_of(lm, params, r)
    np.testing.assert_allclose(r.logprobs, logprobs_of(logits[:, :-1], r), atol=1e-5)
    np.testing.assert_allclose(
        r.sampling_logprobs, logprobs_of((logits + shift(hidden))[:, :-1], r), atol=1e-5
    )
    assert abs(r.sampling_logprobs - r.logprobs).max() > 0.1


@pytest.mark.parametrize("coef", exhaustive([0.0, 0.3, 1.0], quick=[0.3]))
def test_a_geometric_mixture_is_sampled_by_the_token(coef):
    """Nash-MD's other player: policy and reference, each with its own cache."""
    lm = tiny.models(num_layers=2)[0]
    params = lm.init(jax.random.key(1)), lm.init(jax.random.key(2))
    mixture = geometric_mixture(lm, mixture_coef=coef)
    prompts = rollouts.Prompts(
        jnp.array([[3, 4, 5], [0, 6, 7]]), jnp.array([[True, True, True], [False, True, True]])
    )
    r = jax.device_get(
        rollouts.generate(mixture, params, prompts, KEY, max_new_tokens=5, num_samples=2)
    )
    policy, reference = (jax.nn.log_softmax(logits_of(lm, p, r)) for p in params)
    expected = logprobs_of(((1 - coef) * policy + coef * reference)[:, :-1], r)
    np.testing.assert_allclose(r.logprobs, expected, atol=1e-5)
    assert abs(r.logprobs - logprobs_of(policy[:, :-1], r)).max() > (0.01 if coef else -1)


def test_what_cannot_be_mixed_is_refused():
    lm = tiny.models(num_layers=1)[0]
    with pytest.raises(ValueError, match="reference's share, 0 <= c <= 1, but is 1.5"):
        geometric_mixture(lm, mixture_coef=1.5)
    with pytest.raises(ValueError, match="a mixture of encoder-decoders is not supported"):
        geometric_mixture(lm._replace(encode=lambda params, inputs: inputs))


# --- stop strings ------------------------------------------------------------------------------------------------------


def words(*pieces, decoder):
    inner = Tokenizer(
        models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=pieces[0])
    )
    inner.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=pieces[0])


BYTEWISE = words(
    "<unk>", "a", "b", "ab", "ba", "aab", "Ġa", "Ã", "©", "abc", decoder=decoders.ByteLevel()
)
FALLBACK = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
SPACED = words("<unk>", "▁a", "▁b", "b", "<0x0A>", "ab", decoder=FALLBACK)


def test_tokens_are_the_bytes_that_they_add():
    assert stopping.token_bytes(BYTEWISE) == [
        b"", b"a", b"b", b"ab", b"ba", b"aab", b" a", b"\xc3", b"\xa9", b"abc"
    ]  # fmt: skip
    assert stopping.token_bytes(SPACED) == [b"", b" a", b" b", b"b", b"\n", b"ab"]


@pytest.mark.parametrize("strings", [["abab"], ["aaba", "bb"], ["é"], ["b a", "abc", "bc"]])
def test_a_stop_string_is_seen_where_the_text_first_has_it(strings):
    table = np.asarray(rollouts.stop_strings(BYTEWISE, strings))
    texts, rng = stopping.token_bytes(BYTEWISE), np.random.default_rng(0)
    seen_often = 0
    for _ in range(200):
        state, text = 0, b""
        for token in rng.integers(0, len(texts), 12):
            text += texts[token]
            state = table[token, state]
            assert (state == table.shape[1] - 1) == any(s.encode() in text for s in strings)
        seen_often += state == table.shape[1] - 1
    assert 10 < seen_often < 200


def test_a_rollout_ends_at_a_stop_string():
    lm = tiny.models(num_layers=1)[0]  # 16 tokens; the tokenizer knows ten of them
    prompts = rollouts.Prompts(jnp.full((2, 2), 1), jnp.ones((2, 2), bool))
    stop = rollouts.stop_strings(BYTEWISE, ["aba", "ba"])
    r = rollouts.generate(
        lm, lm.init(KEY), prompts, KEY, max_new_tokens=16, num_samples=16, stop=stop
    )
    r, texts = jax.device_get(r), [*stopping.token_bytes(BYTEWISE), *[b""] * 6]
    assert 4 < r.finished.sum() < 32
    for tokens, mask, finished in zip(r.tokens, r.mask, r.finished, strict=True):
        pieces = [texts[token] if token < 10 else b"|" for token in tokens[mask]]
        assert (b"ba" in b"".join(pieces)) == finished
        assert b"ba" not in b"".join(pieces[:-1])


def test_refusals_name_both_sides():
    for strings in ("ab", [], ["ab", ""]):
        with pytest.raises(ValueError, match="a list of texts that are not empty"):
            rollouts.stop_strings(BYTEWISE, strings)
    with pytest.raises(ValueError, match="at least one token"):
        samplers.banned([[3], []])
    with pytest.raises(ValueError, match="must be above 0, but is -1"):
        samplers.repetition_penalty(-1)
