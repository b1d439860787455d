"""What is trained on: groups, samples, prompts and old rows are chosen as their definitions say, and shapes never change."""

import inspect
import itertools
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf import losses, rollouts
from rlhf.rollouts import classic, filtering, replay
from rlhf.tasks import reviews

KEY = jax.random.key(0)
NAN = np.nan
NONE: Any = None  # where no model is needed
REWARDS = (
    np.random.default_rng(0).normal(size=(40, 6)).round(1).astype(np.float32)
)  # rounded, so that some are equal
REWARDS[10:] = np.where(np.random.default_rng(1).random((30, 6)) < 0.3, NAN, REWARDS[10:])
REWARDS[20:30] = np.where(np.isnan(REWARDS[20:30]), NAN, REWARDS[20:30] > 0)
REWARDS[-1], REWARDS[-2] = NAN, [1, NAN, NAN, NAN, NAN, NAN]


def rows(values, width=3):
    """A rollout whose tokens say which row they are of."""
    tokens = np.broadcast_to(np.asarray(values, np.int32)[:, None], (len(values), width))
    numbers, yes = tokens.astype(np.float32), np.ones(tokens.shape, bool)
    return rollouts.Rollout(
        tokens,
        yes,
        tokens,
        tokens,
        numbers,
        numbers,
        yes[:, 0],
        np.float32(0.7),
        {"image": numbers},
    )


# Groups and samples


def test_informative_groups_are_those_with_a_difference():
    informative = jax.jit(
        lambda rewards, tolerance: filtering.informative(rewards, tolerance=tolerance)
    )
    for tolerance in (0.0, 0.85, 1.0):
        scored = [r[~np.isnan(r)] for r in REWARDS]
        expected = [len(r) > 1 and r.max() - r.min() > tolerance for r in scored]
        assert 3 < sum(expected) < 40
        np.testing.assert_array_equal(informative(REWARDS, tolerance), expected)
    assert filtering.informative(np.array([[True, True], [True, False]])).tolist() == [False, True]
    assert filtering.informative(np.array([[np.inf, np.inf], [0, -np.inf]])).tolist() == [
        False,
        True,
    ]


@pytest.mark.parametrize("k", [1, 3, 5, 6])
def test_no_choice_of_samples_varies_more(k):
    chosen = np.asarray(filtering.down_sample(REWARDS, k))
    assert (np.diff(chosen) > 0).all()
    for rewards, index in zip(REWARDS, chosen, strict=True):
        scored = rewards[~np.isnan(rewards)]
        kept = rewards[index][~np.isnan(rewards[index])]
        assert len(kept) == min(k, len(scored))  # the unscored are taken last
        best = (
            max((np.var(c) for c in itertools.combinations(scored, len(kept))), default=0)
            if len(kept)
            else 0
        )
        np.testing.assert_allclose(np.var(kept) if len(kept) else 0, best, atol=1e-5)


def test_best_groups_spread_most():
    spread = np.array([np.std(r[~np.isnan(r)]) if (~np.isnan(r)).any() else 0 for r in REWARDS])
    index = jax.jit(filtering.best_groups, static_argnums=1)(REWARDS, 12)
    np.testing.assert_allclose(spread[index], np.sort(spread)[::-1][:12], rtol=1e-5)
    assert len(set(index.tolist())) == 12


def test_groups_and_samples_are_fetched_from_any_pytree():
    source = rows(range(6))
    taken = filtering.take_groups(source, [2, 0, 2], 2)
    assert taken.tokens[:, 0].tolist() == [4, 5, 0, 1, 4, 5]
    assert taken.inputs["image"][:, 0].tolist() == [4, 5, 0, 1, 4, 5]
    assert taken.temperature == source.temperature
    assert isinstance(taken.tokens, np.ndarray)
    assert filtering.take_groups(source, np.array([False, True, True]), 2).tokens[
        :, 0
    ].tolist() == [2, 3, 4, 5]
    assert filtering.take_samples(source, [[1], [0], [1]], 2).tokens[:, 0].tolist() == [1, 2, 5]
    on_device = jax.tree.map(jnp.asarray, source)
    jitted = jax.jit(lambda x, i: filtering.take_groups(x, i, 2))(on_device, jnp.array([1]))
    assert jitted.tokens[:, 0].tolist() == [2, 3]


# Dynamic sampling

CHUNKS = [  # rewards of two prompts with two samples each
    [[1, 1], [0, 1]],
    [[0, 0], [1, NAN]],
    [[1, 0], [0, 1]],
    [[0, 1], [0, 1]],
]


def collect(groups, max_rounds, chunks=CHUNKS, **kw):
    """Rows 10 · chunk + sample; the rewards travel with the rollout as a column."""
    keys, chunks = [], iter(list(enumerate(chunks)))

    def sample(chunk, key):
        keys.append(key)
        number, rewards = chunk
        return rows(10 * number + np.arange(np.size(rewards))), np.ravel(rewards)

    got = filtering.dynamic_sampling(
        sample,
        lambda sampled: list(sampled[1]),
        chunks,
        KEY,
        groups=groups,
        num_samples=2,
        max_rounds=max_rounds,
        **kw,
    )
    return got, keys, len(list(chunks))


def test_sampling_goes_on_until_enough_groups_are_informative():
    got, keys, left = collect(2, 9)
    assert left == 1  # a prompt that is not needed is not taken
    assert got.report == (3, 2, 1, 1, 1, 1, 0)
    rollout, column = got.rows
    assert rollout.tokens[:, 0].tolist() == [2, 3, 20, 21]
    assert rollout.mask.all()
    assert got.rewards.tolist() == [[0, 1], [1, 0]]
    assert column.tolist() == [0, 1, 1, 0]
    assert len({jax.random.key_data(k).tobytes() for k in keys}) == 3


@pytest.mark.parametrize(
    ("groups", "max_rounds", "kept"), [(5, 3, 3), (9, 4, 5), (2, 1, 1), (5, 2, 1)]
)
def test_a_shortfall_is_filled_with_groups_that_weigh_nothing(groups, max_rounds, kept):
    got, keys, _ = collect(groups, max_rounds)
    rollout = got.rows[0]
    assert got.report.selected == kept
    assert got.report.short == groups - kept
    assert got.report.rounds == len(keys) == max_rounds
    assert rollout.tokens.shape == (2 * groups, 3)
    assert rollout.mask[: 2 * kept].all()
    assert not rollout.mask[2 * kept :].any()
    assert np.isnan(got.rewards[kept:]).all()
    advantages = jax.jit(losses.group_relative)(got.rewards)
    assert (np.abs(advantages[:kept]) > 0.5).all()
    assert (advantages[kept:] == 0).all()
    weights = jax.jit(losses.weights.sequence_mean)(rollout.mask)
    np.testing.assert_allclose(weights[: 2 * kept], 1 / (3 * 2 * kept), rtol=1e-6)


def test_which_groups_are_accepted_is_a_function():
    got, *_ = collect(4, 9, accept=lambda rewards: np.nansum(rewards, axis=1) > 0)
    assert got.rows[0].tokens[::2, 0].tolist() == [0, 2, 12, 20]
    assert got.report.dropped_low == 1
    assert collect(1, 9, [[[5, 5]], [[3, 3]], [[4, 5]]], solved=4)[0].report[3:5] == (1, 1)


def test_dynamic_sampling_refuses_what_does_not_fit():
    settings = dict(groups=1, num_samples=2, max_rounds=1)
    run = lambda sample, score, chunks=(0,), **kw: filtering.dynamic_sampling(
        sample, score, chunks, KEY, **{**settings, **kw}
    )
    with pytest.raises(ValueError, match="max_rounds must be at least 1, but is 0"):
        run(None, None, max_rounds=0)
    with pytest.raises(TypeError, match=r"write \[prompts\]"):
        run(None, None, rollouts.Prompts(np.ones((1, 1)), np.ones((1, 1), bool)))
    with pytest.raises(ValueError, match="prompts are empty"):
        run(None, None, [])
    with pytest.raises(TypeError, match="sample returned list; it must be a Rollout"):
        run(lambda *_: [1], None)
    with pytest.raises(ValueError, match=r"score returned \[3\] but there are 2 rows"):
        run(lambda *_: rows([1, 2]), lambda _: [1, 2, 3])
    with pytest.raises(ValueError, match="groups of 2 samples but 3 rows"):
        run(lambda *_: rows([1, 2, 3]), lambda _: [1, 2, 3])
    with pytest.raises(
        ValueError, match=r"accept returned float32 \[1, 2\] but must return \[P\] bool"
    ):
        run(lambda *_: rows([1, 2]), lambda _: [1, 2], accept=lambda rewards: rewards)
    with pytest.raises(
        ValueError, match=r"tokens \[2, 3\] but also \[2, 4\].*pad all prompts to one length"
    ):
        run(lambda width, _: rows([1, 2], width), lambda _: [1, 1], (3, 4), max_rounds=2)


# The curriculum


def test_pass_rates_are_running_means():
    prompts = replay.curriculum(4, rate=0.25)
    update = jax.jit(prompts.update)
    rng = np.random.default_rng(0)
    state, rate, count = prompts.init(), np.full(4, 0.5), np.zeros(4)
    for _ in range(12):
        index, passed = (
            rng.integers(0, 3, 3),
            np.where(rng.random((3, 4)) < 0.3, NAN, rng.integers(0, 2, (3, 4))),
        )
        state = update(state, index, passed)
        for i in range(4):
            seen = passed[index == i]
            if (~np.isnan(seen)).any():
                count[i] += 1
                rate[i] += max(0.25, 1 / count[i]) * (np.nanmean(seen) - rate[i])
    np.testing.assert_allclose(state.pass_rate, rate, atol=1e-6)
    assert state.count.tolist() == count.tolist()
    assert count[3] == 0 < count[:3].min()
    assert update._cache_size() == 1


def frequencies(draw, number, keys=8000):
    drawn = jax.jit(jax.vmap(draw))(jax.random.split(KEY, keys))
    return np.bincount(np.ravel(drawn), minlength=number) / keys


def assert_drawn(frequencies, probs, keys=8000):
    probs = np.asarray(probs) / np.sum(probs)
    np.testing.assert_array_less(
        np.abs(frequencies - probs), 4 * np.sqrt(probs * (1 - probs) / keys) + 1e-9
    )


def test_prompts_are_drawn_by_learnability():
    prompts = replay.curriculum(4)
    state = replay.CurriculumState(jnp.array([0.5, 0.9, 0.0, 0.2]), jnp.ones(4, jnp.int32))
    assert_drawn(
        frequencies(lambda key: prompts.sample(state, key, 1), 4), [0.26, 0.10, 0.01, 0.17]
    )
    twice = jax.vmap(lambda key: prompts.sample(state, key, 2))(jax.random.split(KEY, 50))
    assert (twice[:, 0] != twice[:, 1]).all()


def test_prompts_outside_the_band_come_last_and_evenly():
    prompts = replay.curriculum(5, weight=replay.band(0.2, 0.8))
    state = replay.CurriculumState(jnp.array([0.5, 0.9, 0.0, 1.0, 0.1]), jnp.array([1, 1, 1, 1, 0]))
    drawn = frequencies(lambda key: prompts.sample(state, key, 3), 5)
    assert drawn[0] == drawn[4] == 1  # inside, and never seen
    assert_drawn(drawn[1:4], np.ones(3))


# The replay buffer


def history(steps=12, n=3, seed=0):
    rng = np.random.default_rng(seed)
    for step in range(1, steps + 1):
        priority = np.where(rng.random(n) < 0.2, [NAN, -np.inf, NAN], rng.random(n)).astype(
            np.float32
        )
        yield {"step": np.full((n, 2), step), "priority": priority}, priority


STEP_KEYS = {
    name: jax.jit(partial(replay.add, keep=getattr(replay, name)), donate_argnums=0)
    for name in ("newest", "highest")
}


@pytest.mark.parametrize("name", STEP_KEYS)
def test_a_buffer_keeps_the_newest_or_the_highest(name):
    buffer, seen = (
        replay.init({"step": np.zeros((1, 2), np.int32), "priority": np.zeros(1, np.float32)}, 7),
        [],
    )
    for number, (new, priority) in enumerate(history(), 1):
        new = jax.tree.map(lambda x: x.astype(np.int32) if x.ndim == 2 else x, new)
        buffer = STEP_KEYS[name](buffer, new, priority)
        seen += [(number, p) for p in priority if p > -np.inf]
        held = np.asarray(replay.fresh(buffer))
        kept = sorted(zip(buffer.added[held].tolist(), buffer.priority[held].tolist(), strict=True))
        np.testing.assert_array_equal(
            buffer.rows["step"][held, 1], buffer.added[held]
        )  # whole rows move
        np.testing.assert_array_equal(buffer.rows["priority"][held], buffer.priority[held])
        assert len(kept) == min(7, len(seen))
        if name == "highest":
            assert kept == sorted(sorted(seen, key=lambda row: -row[1])[:7])
        else:
            assert [step for step, _ in kept] == [step for step, _ in seen[-7:]]
    assert int(buffer.step) == 12
    assert len(seen) > 20
    for age in (0, 2):
        np.testing.assert_array_equal(
            replay.fresh(buffer, age), held & (12 - np.asarray(buffer.added) <= age)
        )


def test_a_buffer_is_arrays_that_scan_vmap_and_resume_bitwise():
    stack = lambda seed: jax.tree.map(
        lambda *x: np.stack(x), *(new["priority"] for new, _ in history(seed=seed))
    )
    adds = np.stack([stack(seed) for seed in (1, 2)])

    def run(buffer, adds):
        return jax.lax.scan(
            lambda buffer, x: (replay.add(buffer, x, x, keep=replay.highest), None), buffer, adds
        )[0]

    runs = jax.jit(jax.vmap(run))
    empty = jax.tree.map(lambda x: jnp.stack([x, x]), replay.init(np.zeros(1, np.float32), 4))
    whole = runs(empty, adds)
    half = jax.tree.map(np.asarray, runs(empty, adds[:, :6]))  # saved, and read again
    jax.tree.map(np.testing.assert_array_equal, runs(half, adds[:, 6:]), whole)
    for seed, rows in zip((1, 2), whole.rows, strict=True):
        values = np.ravel(stack(seed))
        np.testing.assert_array_equal(np.sort(rows), np.sort(values[values > -np.inf])[-4:])


def test_rows_are_drawn_by_weight_and_stale_ones_are_not():
    add = jax.jit(replay.add)
    buffer = add(replay.init(np.zeros(1, np.float32), 6), np.array([7.0], np.float32), 5.0)
    buffer = add(buffer, np.array([1.0, 2.0, 4.0], np.float32), np.array([1.0, 2.0, 4.0]))
    weight = lambda buffer: replay.fresh(buffer, 0) * replay.proportional(buffer)
    drawn = frequencies(
        lambda key: replay.sample(buffer, key, 1, weight=weight).rows.astype(int), 8
    )
    assert_drawn(drawn, [0, 1, 2, 0, 4, 0, 0, 0])
    drawn = replay.sample(buffer, KEY, 5, weight=weight)
    assert drawn.real.tolist() == [True] * 3 + [False] * 2
    assert sorted(drawn.rows[:3].tolist()) == [1, 2, 4]
    assert len(set(drawn.index.tolist())) == 5
    assert sorted(replay.sample(buffer, KEY, 4).rows.tolist()) == [1, 2, 4, 7]
    np.testing.assert_array_equal(buffer.rows[drawn.index], drawn.rows)


def test_groups_of_a_rollout_stay_together_in_a_buffer():
    fold = lambda r: jax.tree.map(
        lambda x: np.reshape(x, (2, 2, *x.shape[1:])) if np.ndim(x) else x, r
    )
    buffer = replay.init(fold(rows(range(4))), 3)
    buffer = jax.jit(replay.add)(
        buffer,
        fold(rows([3, 4, 5, 6]))._replace(temperature=np.float32(0.9)),
        np.array([-np.inf, 1.0]),
    )
    assert buffer.rows.tokens.shape == (3, 2, 3)
    drawn = jax.jit(replay.sample, static_argnums=2)(buffer, KEY, 2)
    assert drawn.real.tolist() == [True, False]
    assert drawn.rows.tokens[0, :, 0].tolist() == [5, 6]
    np.testing.assert_array_equal(drawn.rows.temperature, np.float32(0.9))


# Classic conveniences


def test_lengths_are_drawn_evenly():
    drawn = frequencies(lambda key: classic.sample_length(key, 2, 5), 6)
    assert_drawn(drawn, [0, 0, 1, 1, 1, 0])


def test_pass_at_k_is_the_quotient_of_binomials():
    for n, k in ((5, 2), (8, 8), (200, 100)):
        counts = np.unique(np.linspace(0, n, 9).astype(int))
        expected = [1 - math.comb(n - c, k) / math.comb(n, k) for c in counts.tolist()]
        np.testing.assert_allclose(
            jax.jit(lambda c, k=k, n=n: classic.pass_at_k(c, k, n=n))(counts), expected, rtol=2e-6
        )
    assert classic.pass_at_k(np.array([1, 0]), 10, n=10).tolist() == [1, 0]
    np.testing.assert_allclose(
        classic.pass_at_k(np.array([1]), 1, n=10**7), [1e-7], rtol=1e-5
    )  # not the rounding of 1 - x
    samples = np.array([[1, 0, 0, 0], [1, 0, 0, NAN], [1, NAN, NAN, NAN]])
    np.testing.assert_allclose(classic.pass_at_k(samples, 2), [1 / 2, 2 / 3, NAN], rtol=1e-6)


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_best_of_n_are_kept(keep):
    scores = [3.0, None, 5.0, 5.0, NAN, -1.0, None, None]
    asked = {}

    def engine(lm, params, prompts, key, **settings):
        asked.update(settings)
        return rows(range(8))

    best = classic.best_of_n(
        NONE,
        NONE,
        NONE,
        KEY,
        n=4,
        score=lambda r: scores,
        keep=keep,
        generate=engine,
        max_new_tokens=3,
    )
    assert asked == {"num_samples": 4, "max_new_tokens": 3}
    order = np.array([[2, 3, 0, 1], [5, 4, 6, 7]])[:, :keep]
    assert best.rollout.tokens[:, 0].tolist() == order.ravel().tolist()
    np.testing.assert_array_equal(best.scores, np.array(scores, np.float32)[order])
    grouped = np.array(scores, np.float32).reshape(2, 4)
    np.testing.assert_array_equal(
        order[:, 0] - [0, 4], losses.offline.best_of_n(jnp.asarray(grouped))
    )


def test_text_in_text_out():
    tokenizer = reviews.tokenizer()
    asked = {}

    def engine(lm, params, prompts, key, **settings):  # says the prompt, once for each sample
        asked.update(settings)
        inspect.signature(rollouts.generate).bind(lm, params, prompts, key, **settings)
        each = lambda x: np.repeat(x, settings["num_samples"], axis=0)
        return rollouts.Rollout(each(prompts.tokens), each(prompts.mask), *[None] * 6)

    said = partial(
        classic.respond, NONE, NONE, tokenizer, key=KEY, max_new_tokens=3, generate=engine
    )
    texts = ["the film", "honestly , the plot"]
    assert said(texts) == texts
    assert asked == {"max_new_tokens": 3, "num_samples": 1, "eos_ids": (tokenizer.eos_token_id,)}
    assert said(texts, num_samples=2, eos_ids=(5,), pad_id=1, buckets=(5,)) == [
        [text] * 2 for text in texts
    ]
    assert asked == {"max_new_tokens": 3, "num_samples": 2, "eos_ids": (5,), "pad_id": 1}
    with pytest.raises(TypeError, match=r"write \['the film'\]"):
        said("the film")
    with pytest.raises(ValueError, match=r"5 tokens but buckets of \[4\]"):
        said(texts, buckets=(4,))


def say_lengths(prompts, keys):
    """Two samples a prompt; what is said depends on the prompt's tokens and its key, and stands on the right."""
    said = np.array(
        [
            row[keep].tolist()[0] * 100 + key
            for row, keep, key in zip(*prompts[:2], keys, strict=True)
        ]
    )
    width = prompts.tokens.shape[1]
    tokens = np.concatenate(
        [np.repeat(prompts.tokens, 2, axis=0), np.stack([said, -said], axis=1).reshape(-1, 1)],
        axis=1,
    )
    real = np.concatenate(
        [np.repeat(prompts.mask, 2, axis=0), np.ones((len(tokens), 1), bool)], axis=1
    )
    sampled = real & (np.arange(width + 1)[None, :] == width)
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    logprobs = np.where(sampled, -tokens, 0).astype(np.float32)
    return rollouts.Rollout(
        tokens,
        sampled,
        positions,
        real.astype(np.int32),
        logprobs,
        logprobs,
        tokens[:, -1] > 0,
        np.float32(0.7),
    )


def test_prompts_of_like_length_sample_as_all_together():
    rng, keys = np.random.default_rng(0), np.arange(1, 9)
    ids = [rng.integers(3, 16, length).tolist() for length in (1, 6, 3, 2, 5, 1, 4, 3)]
    [(index, everything)] = classic.by_length(ids, (6,))
    assert index.tolist() == list(range(8))
    batches = classic.by_length(everything, (3, 6), rows=2)
    assert [(batch.tokens.shape, index.tolist()) for index, batch in batches] == [
        ((2, 3), [0, 2]), ((2, 3), [3, 5]), ((2, 3), [7, 7]), ((2, 6), [1, 4]), ((2, 6), [6, 6]),
    ]  # fmt: skip
    for index, batch in batches:
        for i, tokens, mask in zip(index, batch.tokens, batch.mask, strict=True):
            assert tokens[mask].tolist() == ids[i]
            assert mask[-len(ids[i]) :].all()
    expected = say_lengths(everything, keys)
    got = classic.in_order([(index, say_lengths(batch, keys[index])) for index, batch in batches])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), expected)


def test_batches_carry_what_prompts_are_conditioned_on():
    prompts = rollouts.Prompts(
        np.ones((3, 2), np.int32), np.array([[1, 1], [1, 0], [1, 1]], bool), {"image": np.arange(3)}
    )
    batches = classic.by_length(prompts, (1, 2), rows=2)
    assert [(i.tolist(), batch.inputs["image"].tolist()) for i, batch in batches] == [
        ([1, 1], [1, 1]),
        ([0, 2], [0, 2]),
    ]
    assert len(classic.by_length(prompts, (1, 2))[0][0]) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: filtering.informative(np.ones(3)), r"rewards must be \[P, G\].*but are \[3\]"),
        (lambda: filtering.informative(np.ones((1, 2)), tolerance=-1), "at least 0, but is -1"),
        (lambda: filtering.best_groups(np.ones((2, 2)), 3), "n is 3 but there are 2 groups"),
        (lambda: filtering.down_sample(np.ones((2, 2)), 3), "k is 3 but there are 2 samples a group"),
        (lambda: filtering.down_sample(np.ones((2, 2)), 0), "k is 0"),
        (lambda: filtering.take_groups(rows(range(6)), [0, 3], 2), r"indices 0 … 3 but they must be in 0 … 2"),
        (lambda: filtering.take_groups(rows(range(6)), [True, False], 2), r"which \[2\] but there are 3 groups"),
        (lambda: filtering.take_groups(rows(range(6)), [[0]], 2), r"which \[1, 1\] but it must be \[N\]"),
        (lambda: filtering.take_samples(rows(range(6)), [[0], [1]], 2), r"which \[2, 1\] but there are 3 groups"),
        (lambda: filtering.take_samples(rows(range(2)), [[-1]], 2), r"indices -1 … -1"),
        (lambda: filtering.take_groups({"a": np.ones(2), "b": np.ones(4)}, [0], 2), r"leaves have {\"\['a'\]\": 2"),
        (lambda: filtering.num_rows({}), "no axes"),
        (lambda: replay.choose(KEY, np.ones(2), 3), "n is 3 but there are 2 rows to choose from"),
        (lambda: replay.choose(KEY, np.ones((2, 1)), 1), r"weights must be \[N\].*\[2, 1\]"),
        (lambda: replay.band(0.8, 0.2), "low is 0.8 and high 0.2"),
        (lambda: replay.curriculum(0), "number must be a whole number at least 1"),
        (lambda: replay.curriculum(2, rate=0), "rate must be a number above 0 and at most 1"),
        (lambda: replay.curriculum(2).update(None, np.zeros(2, int), np.ones(2)), r"\[2\] but passed \[2\]"),
        (lambda: replay.init(np.ones(2), 0), "capacity must be at least 1 row, but is 0"),
        (lambda: replay.add(replay.init(np.ones(2), 2), np.ones(3)), "3 rows do not fit a buffer of 2"),
        (lambda: replay.add(replay.init(np.ones(2), 2), np.ones(2), np.ones(3)), r"priority \[3\] but there are 2 rows"),
        (lambda: replay.add(replay.init({"a": np.ones(2)}, 2), {"b": np.ones(2)}), r"rows\['a'\]: nothing but the buffer"),
        (lambda: replay.add(replay.init(np.ones((2, 3)), 2), np.ones((2, 4))), r"\['n', 4\] but .* float32 \['n', 3\]"),
        (lambda: replay.add(replay.init(np.ones(2), 2), np.ones(2, int)), "rows: int32.*but the buffer holds float32"),
        (lambda: replay.add(replay.init(np.ones(2), 2), np.ones(2), keep=lambda p, age: 1), r"keep returned \[\] but must"),
        (lambda: replay.sample(replay.init(np.ones(2), 2), KEY, 1, weight=len), r"weight returned \[\] but must return \[2\]"),
        (lambda: replay.curriculum(2, weight=len).sample((), KEY, 1), r"weight returned \[\] but must return \[2\]"),
        (lambda: classic.sample_length(KEY, 5, 5), "low is 5 and high 5"),
        (lambda: classic.pass_at_k(np.ones((1, 4)), 5), "k is 5 but there are 4 samples"),
        (lambda: classic.pass_at_k(np.array([5]), 1, n=4), "counts 5 … 5 but there are 4 samples"),
        (lambda: classic.pass_at_k(np.array([1]), 1), r"is \[1\] and n is None"),
        (lambda: classic.best_of_n(NONE, NONE, NONE, KEY, n=2, score=len, keep=3), "keeps 3 of 2 samples"),
        (lambda: classic.bucket(9, (4, 8)), r"9 tokens but buckets of \[4, 8\]"),
        (lambda: classic.bucket(0), "length of 0"),
        (lambda: classic.by_length([]), "has 0 and rows=None"),
        (lambda: classic.by_length([[1]], rows=0), "has 1 and rows=0"),
        (lambda: classic.by_length([[1], []]), "prompt 1 has 0 tokens"),
        (lambda: classic.by_length([[1], [2] * 5], (4,)), "prompt 1 has 5 tokens but buckets hold 1 … 4"),
        (lambda: classic.in_order([(np.array([0, 2]), rows([0, 2]))]), r"prompts \[0, 2\]"),
        (lambda: classic.in_order([(np.array([0]), rows([0])), (np.array([1]), rows([1, 1]))]), r"\[1.0, 2.0\] samples each"),
        (lambda: classic.in_order([(np.array([0, 1]), rows([0, 0, 1]))]), r"\[1.5\] samples each"),
    ],
)  # fmt: skip
def test_refusals_name_both_sides(call, message):
    with pytest.raises(ValueError, match=message):
        call()
