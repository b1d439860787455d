"""Tokens as arrays, packed and unpacked: none is lost, none is seen twice, and the gradient is the same."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf import data, losses
from rlhf.training import supervised
from rlhf.training.policy import Policy

import steps as tiny  # isort: skip

T, F = True, False
LENGTH = 7


def numbered(sizes) -> list[data.Tokenized]:
    """Sequences in which every token of all of them is another; every third is not trained."""
    ends = np.cumsum(sizes)
    ids = [list(range(1 + end - size, 1 + end)) for size, end in zip(sizes, ends, strict=True)]
    return [data.Tokenized(row, [token % 3 > 0 for token in row]) for row in ids]


def segments(batch) -> list[list[data.Tokenized]]:
    """The sequences of each row of a batch; checks that each is one piece, from position 0, and that padding is empty."""
    assert (batch.tokens.dtype, batch.mask.dtype) == (np.int32, bool)
    assert (batch.positions.dtype, batch.segment_ids.dtype) == (np.int32, np.int32)
    padding = batch.segment_ids == 0
    for array in (batch.tokens, batch.mask, batch.positions):
        assert array.shape == padding.shape
        assert not array[padding].any()
    rows = []
    for tokens, mask, positions, ids in zip(
        batch.tokens, batch.mask, batch.positions, batch.segment_ids, strict=True
    ):
        row: list[data.Tokenized] = []
        for number in range(1, ids.max() + 1):
            columns = np.flatnonzero(ids == number)
            np.testing.assert_array_equal(
                columns, np.arange(len(columns)) + sum(map(len, (x.tokens for x in row)))
            )
            np.testing.assert_array_equal(positions[columns], np.arange(len(columns)))
            row.append(data.Tokenized(tokens[columns].tolist(), mask[columns].tolist()))
        rows.append(row)
    return rows


def flat(rows):
    return [x for row in rows for x in row]


def best_fit_by_definition(sizes, length) -> list[list[int]]:
    """The fullest bin with room, else a new one."""
    bins: list[list[int]] = []
    for size in sorted(sizes, reverse=True):
        room = [members for members in bins if sum(members) + size <= length]
        if room:
            max(room, key=sum).append(size)
        else:
            bins.append([size])
    return bins


SIZES = st.lists(st.integers(1, LENGTH), min_size=1, max_size=30)
ANY_SIZES = st.lists(st.integers(1, 3 * LENGTH), min_size=1, max_size=20)


@settings(deadline=None)
@given(SIZES)
def test_best_fit_holds_every_sequence_once_in_the_bins_of_the_definition(sizes):
    packed = segments(data.best_fit(numbered(sizes), length=LENGTH))
    assert sorted(flat(packed)) == sorted(numbered(sizes))
    used = [sorted(len(x.tokens) for x in row) for row in packed]
    assert sorted(used) == sorted(map(sorted, best_fit_by_definition(sizes, LENGTH)))


@settings(deadline=None)
@given(ANY_SIZES)
def test_split_and_wrapped_lose_no_token_and_best_fit_of_truncated_rows_what_it_says(sizes):
    rows = numbered(sizes)
    tokens, mask = (
        np.concatenate([row.tokens for row in rows]),
        np.concatenate([row.mask for row in rows]),
    )
    pieces = data.split(rows, length=LENGTH)
    assert flat([piece.tokens for piece in pieces]) == tokens.tolist()
    packed = segments(data.best_fit(pieces, length=LENGTH))
    assert sorted(flat(packed)) == sorted(pieces)

    batch = data.wrapped(rows, length=LENGTH)
    real = batch.segment_ids > 0
    assert (batch.tokens[real].tolist(), batch.mask[real].tolist()) == (
        tokens.tolist(),
        mask.tolist(),
    )
    assert real.all(axis=1)[:-1].all(), "no row but the last is padded"
    assert len(batch.tokens) == -(-len(tokens) // LENGTH)
    own = {token: i for i, row in enumerate(rows) for token in row.tokens}
    for row in segments(batch):
        owners = [{own[token] for token in piece.tokens} for piece in row]
        assert all(len(owner) == 1 for owner in owners), "a segment is of one sequence"
        assert len(set.union(*owners)) == len(owners), "and of all that a row has of it"

    if any(any(row.mask[:LENGTH]) for row in rows):
        left = data.truncate(rows, length=LENGTH)
        kept = flat(segments(data.best_fit(left.sides[0], length=LENGTH)))
        removed = [row for i, row in enumerate(rows) if i not in left.remaining]
        assert len(removed) == left.rows_removed
        assert sum(len(x.tokens) for x in kept) + left.tokens_cut + sum(
            len(x.tokens) for x in removed
        ) == len(tokens)


def assert_equal(a, b):
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(a))
    assert largest > 1e-6, "a gradient that is zero proves nothing"
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-10 * largest), a, b)


def test_the_gradient_is_the_same_packed_and_unpacked():
    rng = np.random.default_rng(0)
    sequence = lambda n: data.Tokenized(
        rng.integers(1, tiny.VOCAB, n).tolist(), [i >= 2 for i in range(n)]
    )
    rows = [sequence(n) for n in (3, 12, 5, 4, 8, 3, 6)]
    short, pieces = data.truncate(rows, length=8).sides[0], data.split(rows, length=8)
    ends = np.cumsum([0, *(len(row.tokens) for row in rows)])
    cuts = sorted({*ends.tolist(), *range(0, ends[-1], 8)})
    every = data.Tokenized(flat([row.tokens for row in rows]), flat([row.mask for row in rows]))
    wrapped_pieces = [
        data.Tokenized(every.tokens[a:b], every.mask[a:b]) for a, b in itertools.pairwise(cuts)
    ]
    with jax.enable_x64(True):
        lm, _ = tiny.models(jnp.float64)
        params = jax.jit(lm.init)(jax.random.key(0))
        loss_fn = supervised.make_loss(Policy(lm))
        loss = lambda params, batch: loss_fn(params, (), supervised.with_weights(batch), None)[0]
        one_program = jax.jit(jax.grad(loss))

        def gradient(batch):
            more = len(wrapped_pieces) - len(
                batch.tokens
            )  # rows of padding, so that all have one shape
            return one_program(
                params,
                jax.tree.map(lambda x: np.pad(x, ((0, more), (0, 0))) if np.ndim(x) else x, batch),
            )

        for unpacked, packed in (
            (short, data.best_fit(short, length=8)),
            (pieces, data.best_fit(pieces, length=8)),
            (wrapped_pieces, data.wrapped(rows, length=8)),
        ):
            assert len(packed.tokens) < len(unpacked), "something is packed"
            assert packed.segment_ids.max() > 1
            assert_equal(gradient(data.batch(unpacked, length=8)), gradient(packed))


def test_pairs_are_packed_whole():
    chosen, rejected = numbered([2, 3, 1, 4]), numbered([3, 1, 2, 1])
    unpacked, packed = data.pairs(chosen, rejected), data.best_fit_pairs(chosen, rejected, length=8)
    assert (unpacked.tokens.shape, packed.tokens.shape) == ((4, 2, 4), (3, 1, 8))
    rows = [
        type(p)(*(x if x is None else x.reshape(-1, x.shape[-1]) for x in p))
        for p in (unpacked, packed)
    ]
    both = [flat(segments(x)) for x in rows]
    together = [sorted(zip(x[::2], x[1::2], strict=True)) for x in both]
    assert together[0] == together[1] == sorted(zip(chosen, rejected, strict=True))
    for row in segments(rows[1]):
        assert len(row) % 2 == 0, "both sides of a pair in one row"


def test_packing_refuses_what_does_not_fit():
    rows = numbered([2, 9])
    with pytest.raises(
        ValueError, match="row 1 has 9 tokens but length is 8; truncate or split it"
    ):
        data.best_fit(rows, length=8)
    with pytest.raises(ValueError, match="row 1 has 18 tokens but length is 17"):
        data.best_fit_pairs(rows, rows, length=17)
    with pytest.raises(ValueError, match="row 0 has 0 tokens"):
        data.best_fit([data.Tokenized([], [])], length=8)
    for pack in (data.best_fit, data.wrapped):
        with pytest.raises(ValueError, match="there are no rows to pack"):
            pack([], length=8)
    for cut in (data.split, data.wrapped):
        with pytest.raises(ValueError, match="length must be at least 1 token, but is 0"):
            cut(rows, length=0)
    with pytest.raises(ValueError, match="2 chosen but 1 rejected; a pair needs both"):
        data.best_fit_pairs(rows, rows[:1], length=8)


def test_truncation_says_what_it_cut():
    a = [
        data.Tokenized([1, 2, 3], [F, F, T]),
        data.Tokenized([4, 5, 6, 7], [F, T, T, T]),
        data.Tokenized([8, 9], [F, T]),
    ]
    b = [
        data.Tokenized([1, 5], [F, T]),
        data.Tokenized([4, 6, 7], [F, T, T]),
        data.Tokenized([8], [F]),
    ]
    left = data.truncate(a, b, length=2)
    assert left.sides == ([data.Tokenized([4, 5], [F, T])], [data.Tokenized([4, 6], [F, T])])
    assert (left.remaining.tolist(), left.rows_cut, left.tokens_cut, left.rows_removed) == (
        [1],
        2,
        3,
        2,
    )
    steps = data.Steps([1, 2, 3], [F, T, T], [0, 1, 0])
    assert data.truncate([steps], length=2).sides == ([data.Steps([1, 2], [F, T], [0, 1])],)
    for sides, length, message in (
        ((a, b[:2]), 2, "sides have 3, 2 rows; give as many of each"),
        ((a,), 0, "length must be at least 1 token, but is 0"),
        ((a,), 1, "none of 3 rows has a trained token among its first 1; raise length"),
    ):
        with pytest.raises(ValueError, match=message):
            data.truncate(*sides, length=length)


def test_batches_pad_on_the_right_and_prompts_on_the_left():
    rows = [data.Tokenized([5, 0, 7], [F, T, T]), data.Tokenized([8], [T])]
    batch = data.batch(rows, length=4)
    assert segments(batch) == [[row] for row in rows]
    assert batch.tokens.shape == (2, 4)
    assert all(isinstance(x, np.ndarray) for x in batch[:4])
    assert batch.old_logprobs is None
    prompts = data.prompts([[5, 0], [7, 8, 9]], length=4)
    np.testing.assert_array_equal(prompts.tokens, [[0, 0, 5, 0], [0, 7, 8, 9]])
    np.testing.assert_array_equal(prompts.mask, [[F, F, T, T], [F, T, T, T]])
    assert data.prompts([[5, 0], [7, 8, 9]]).tokens.shape == (2, 3)
    for call, message in (
        (
            lambda: data.batch(rows, length=2),
            "row 0 has 3 tokens but length is 2; truncate it, leave it out or raise length",
        ),
        (
            lambda: data.batch([rows[0], data.Tokenized([], [])]),
            "row 1 has no tokens; a model needs at least one",
        ),
        (lambda: data.batch([]), "row 0 has no tokens"),
        (lambda: data.prompts([[5], [6, 7]], length=1), "prompt 1 has 2 tokens but length is 1"),
        (lambda: data.pairs(rows, rows[:1]), "2 chosen but 1 rejected; a pair needs both"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_steps_carry_their_labels_to_the_loss():
    rows = [data.Steps([5, 6, 7], [F, T, T], [0, 1, 0]), data.Steps([8, 9], [F, T], [0, 1])]
    batch, labels = data.step_batch(rows, length=4)
    np.testing.assert_array_equal(labels, [[0, 1, 0, 0], [0, 1, 0, 0]])
    np.testing.assert_array_equal(batch.mask, [[F, T, T, F], [F, T, F, F]])
    assert (labels.dtype, labels.shape) == (np.int32, batch.tokens.shape)
    surely_right = jnp.stack([jnp.zeros((2, 4)), jnp.full((2, 4), 9.0)], axis=-1)
    loss = losses.reward_model.process_reward(surely_right, labels, batch.mask)
    np.testing.assert_allclose(loss, [[0, 0, 9, 0], [0, 0, 0, 0]], atol=1e-3)


def test_mismatched_rows_answer_the_next_prompt():
    rows = [
        data.Tokenized([1, 2], [F, T]),
        data.Tokenized([3, 4, 5], [F, F, T]),
        data.Tokenized([6, 7, 8], [F, T, T]),
    ]
    assert data.mismatched(rows) == [
        data.Tokenized([1, 5], [F, T]),
        data.Tokenized([3, 4, 7, 8], [F, F, T, T]),
        data.Tokenized([6, 2], [F, T]),
    ]
    with pytest.raises(
        ValueError, match="1 rows, but another prompt's completion needs at least 2"
    ):
        data.mismatched(rows[:1])
