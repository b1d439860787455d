"""Rows, pairs, lines and the order of batches; tests/data has the rest."""

import numpy as np
import pytest

from rlhf import data
from rlhf.tasks import reviews


def test_encode_rows_trains_the_completion_and_the_end():
    tokenizer = reviews.tokenizer()
    batch = data.encode_rows(tokenizer, ["the film", ""], ["is great .", "the plot is dull ."], 8)
    words = lambda row: tokenizer.convert_ids_to_tokens(row)
    assert words(batch.tokens[0]) == ["<bos>", "the", "film", "is", "great", ".", "<eos>", "<pad>"]
    np.testing.assert_array_equal(batch.mask[0], [False] * 3 + [True] * 4 + [False])
    np.testing.assert_array_equal(batch.mask[1], [False] + [True] * 6 + [False])
    np.testing.assert_array_equal(batch.positions[0], [0, 1, 2, 3, 4, 5, 6, 0])
    np.testing.assert_array_equal(batch.segment_ids[0], [1] * 7 + [0])


def test_preference_pairs_share_their_prompt():
    pairs = data.preference_pairs(
        reviews.tokenizer(), ["the film"], ["is great ."], ["was very dull ."], 8
    )
    assert pairs.tokens.shape == (1, 2, 8)
    np.testing.assert_array_equal(pairs.tokens[0, 0, :3], pairs.tokens[0, 1, :3])
    np.testing.assert_array_equal(pairs.mask.sum(-1), [[4, 5]])


def test_refusals_name_the_row_and_the_cure():
    tokenizer = reviews.tokenizer()
    with pytest.raises(ValueError, match="row 1 has no text to train on; remove it"):
        data.encode_rows(tokenizer, ["", ""], ["the film is great .", ""], 8)
    with pytest.raises(ValueError, match="row 0 has 7 tokens but length is 6"):
        data.encode_rows(tokenizer, [""], ["the film is great ."], 6)
    with pytest.raises(ValueError, match="1 prompts but 2 completions"):
        data.encode_rows(tokenizer, [""], ["is", "was"], 6)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        data.encode_rows(tokenizer, [""], ["is"], 6)


def test_read_lines_and_its_refusals(tmp_path):
    file = tmp_path / "x.txt"
    file.write_text("one\n two \n")
    assert data.read_lines(file) == ["one", "two"]
    for content, message in (
        (b"", "empty"),
        (b"a\n\nb\n", "line 2: a row without text"),
        (b"a\xff\n", "x.txt, line 1: not UTF-8"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            data.read_lines(file)
    with pytest.raises(ValueError, match="no such file"):
        data.read_lines(tmp_path / "missing.txt")
    with pytest.raises(ValueError, match="cannot be read"):
        data.read_lines(tmp_path)


def test_order_visits_every_row_once_an_epoch_and_depends_on_seed_and_step_alone():
    epoch = [data.batch_indices(3, step, 10, 3) for step in range(3)]
    assert len(set(np.concatenate(epoch))) == 9
    np.testing.assert_array_equal(epoch[2], data.batch_indices(3, 2, 10, 3))
    assert not np.array_equal(epoch[0], data.batch_indices(3, 3, 10, 3))
    assert not np.array_equal(epoch[0], data.batch_indices(4, 0, 10, 3))
    for size in (11, 0):
        with pytest.raises(ValueError, match=f"a batch of {size} rows cannot be made of 10"):
            data.batch_indices(0, 0, 10, size)
    assert len(data.batch_indices(0, 0, 1, 1)) == 1


@pytest.mark.parametrize("hosts", [1, 2, 3, 6])
def test_the_hosts_shares_are_the_batch_of_one_host(hosts):
    for step in range(4):
        shares = [
            data.batch_indices(3, step, 13, 6, process_index=i, process_count=hosts)
            for i in range(hosts)
        ]
        assert {len(share) for share in shares} == {6 // hosts}
        np.testing.assert_array_equal(np.concatenate(shares), data.batch_indices(3, step, 13, 6))
    with pytest.raises(
        ValueError, match=f"process_index {hosts} but process_count {hosts}; hosts count from 0"
    ):
        data.batch_indices(3, 0, 13, 6, process_index=hosts, process_count=hosts)
    with pytest.raises(
        ValueError, match="a batch of 6 rows does not split evenly over 4 hosts; use a multiple"
    ):
        data.batch_indices(3, 0, 13, 6, process_count=4)


def test_the_grammar_judges_itself():
    rng = np.random.default_rng(0)
    for positive in (True, False):
        for _ in range(200):
            assert (
                reviews.sentiment(f"{reviews.prompt(rng)} {reviews.completion(rng, positive)}")
                is positive
            )
    texts = [reviews.review(rng) for _ in range(2000)]
    assert 0.45 < np.mean([reviews.sentiment(text) for text in texts]) < 0.55
    assert np.mean([reviews.sentiment(reviews.garbled(rng, text)) is None for text in texts]) > 0.9
    for wrong in (
        "",
        "the film",
        "the film is great",
        "the film is great and the plot is dull .",
        "film the is great .",
    ):
        assert reviews.sentiment(wrong) is None
    tokenizer = reviews.tokenizer()
    longest = max(len(tokenizer.encode(text)) for text in texts)
    assert longest <= reviews.LONGEST
