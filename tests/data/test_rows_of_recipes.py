"""Rows as recipes read them: columns, forms of preferences, and numbers of rows in what is refused."""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from rlhf import data
from rlhf.training import datasets, pairs, prompts, unpaired
from rlhf.training.options import DatasetOptions, SourceOptions

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "tokenizer"
USER = lambda text: {"role": "user", "content": text}
SAY = lambda text: {"role": "assistant", "content": text}
EXPLICIT = [
    {"prompt": [USER("1 + 1?")], "chosen": [SAY("2")], "rejected": [SAY("three")]},
    {
        "prompt": [USER("is it"), SAY("that"), USER("so")],
        "chosen": [SAY("yes")],
        "rejected": [SAY("no")],
    },
]
ULTRAFEEDBACK = [
    {
        "prompt": row["prompt"][0]["content"], "prompt_id": "7", "score_chosen": 8.5, "messages": row["prompt"] + row["chosen"],
        **{side: row["prompt"] + row[side] for side in ("chosen", "rejected")},
    }
    for row in EXPLICIT
]  # fmt: skip


def lines(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(CHECKPOINT)


@pytest.mark.filterwarnings("ignore:no row trains the end token")
def test_a_prompt_that_both_sides_repeat_is_read_once(tokenizer):
    lay_out = lambda rows: pairs.lay_out(tokenizer, rows, "none", 128, print)
    for other, right in zip(lay_out(ULTRAFEEDBACK), lay_out(EXPLICIT), strict=True):
        np.testing.assert_array_equal(other, right)
    lay_out = lambda rows: unpaired.lay_out(tokenizer, rows, 128, print)
    for other, right in zip(lay_out(ULTRAFEEDBACK)[:5], lay_out(EXPLICIT)[:5], strict=True):
        np.testing.assert_array_equal(other, right)
    without = [{name: row[name] for name in ("chosen", "rejected")} for row in ULTRAFEEDBACK]
    for other, right in zip(
        *(pairs.lay_out(tokenizer, rows, "none", 128, print) for rows in (without, EXPLICIT)),
        strict=True,
    ):
        np.testing.assert_array_equal(other, right)


def test_every_conversion_reads_the_form_that_repeats_the_prompt():
    extra = {"prompt_id": "7"}
    form = {name: ULTRAFEEDBACK[1][name] for name in ("prompt", "prompt_id", "chosen", "rejected")}
    explicit = EXPLICIT[1] | extra
    assert data.extract_prompt(form) == data.as_messages(form) == explicit
    assert data.implicit_prompt(form) == data.implicit_prompt(explicit)
    assert data.unpaired(form) == data.unpaired(explicit)
    for convert in (data.prompt_completion, data.prompt_only, data.language_modelling):
        assert convert(form) == convert(explicit), convert
    parts = [{"type": "text", "text": "1 + 1?"}]
    row = {
        "prompt": "1 + 1?\n",
        "chosen": [USER(parts), SAY("2")],
        "rejected": [USER(parts), SAY("3")],
    }
    assert data.extract_prompt(row)["prompt"] == [USER(parts)]
    with pytest.raises(
        ValueError,
        match="the prompt 'is it' is in none of the messages that chosen and rejected begin with",
    ):
        data.extract_prompt(ULTRAFEEDBACK[0] | {"prompt": "is it"})
    mixed = {"prompt": "1 + 1?", "chosen": [SAY("2")], "rejected": [SAY("3")]}
    for convert in (data.implicit_prompt, data.unpaired, data.prompt_completion, data.as_messages):
        with pytest.raises(
            ValueError, match="chosen, rejected hold messages but prompt a string; make all"
        ):
            convert(mixed)


@pytest.mark.parametrize("value", [7, None, [], ["a"], {"a": 1}, True, 0.5])
def test_conversions_convert_or_refuse_whatever_a_column_holds(value):
    whole = {
        "prompt": "a",
        "chosen": "b",
        "rejected": "c",
        "completion": "d",
        "text": "e",
        "completions": ["f"],
        "labels": [True],
    }
    of = lambda *names: {name: whole[name] for name in names}
    kinds = (
        of("prompt", "chosen", "rejected"),
        of("chosen", "rejected"),
        of("prompt", "completion"),
        of("text"),
    )
    conversions = (data.as_messages, data.extract_prompt, data.implicit_prompt, data.unpaired, data.prompt_completion,
                   data.prompt_only, data.language_modelling)  # fmt: skip
    for row in (
        *kinds,
        of("prompt", "completions", "labels"),
        of("prompt", "chosen", "rejected") | {"reference": "g"},
    ):
        for name in row:
            for convert in conversions:
                converted: Any = []
                with contextlib.suppress(ValueError):  # any other exception is a traceback
                    converted = convert(row | {name: value})
                assert all(
                    isinstance(new, dict)
                    for new in (converted if isinstance(converted, list) else [converted])
                )


def test_labels_of_one_and_zero_are_verdicts(tokenizer):
    rows = [
        {"prompt": "a", "completion": "b", "label": 1},
        {"prompt": "a", "completion": "c", "label": 0},
    ]
    checked = list(data.checked(rows, data.UNPAIRED_PREFERENCE))
    assert [row["label"] for row in checked] == [True, False]
    assert all(isinstance(row["label"], bool) for row in checked)
    steps = [{"prompt": "a", "completions": ["b", "c"], "labels": [1, 0]}]
    assert next(data.checked(steps, data.STEPWISE))["labels"] == [True, False]
    for label in (2, -1, 1.0, "1", [1]):
        with pytest.raises(
            ValueError, match="row 1: label must be True or False, or 1 or 0, but is"
        ):
            list(data.checked([rows[0], rows[1] | {"label": label}], data.UNPAIRED_PREFERENCE))


def test_all_prompts_have_the_columns_of_any(tmp_path, tokenizer):
    rows = [{"prompt": "a"}, {"prompt": "b", "solution": 2}, {"prompt": "c", "level": "hard"}]
    one = lines(tmp_path / "one.jsonl", rows[:2])
    two = lines(tmp_path / "two.jsonl", rows[2:])
    read, _ = datasets.load_rows(DatasetOptions(one, more_datasets=[two]), None)
    assert read == data.filled(rows)
    for given in (rows, read):
        prompt_set = prompts.tokenize(tokenizer, given)
        for i, (prompt, solution, level) in enumerate(
            [("a", None, None), ("b", 2, None), ("c", None, "hard")]
        ):
            assert prompt_set.select([i], None).columns == {
                "prompt": [prompt],
                "solution": [solution],
                "level": [level],
            }
    assert datasets.read_held_out(SourceOptions(one, max_rows=2)) == datasets.read_held_out(
        SourceOptions(one)
    )


def test_columns_of_any_row_can_be_renamed_and_what_cannot_is_named(tmp_path):
    rows = [{"prompt": "a"}, {"question": "b"}]
    path = lines(tmp_path / "some.jsonl", rows)
    with pytest.raises(ValueError, match="columns renames answer, but .* has prompt, question"):
        datasets.read_held_out(SourceOptions(path, columns={"answer": "solution"}))
    with pytest.raises(
        ValueError, match="row 0: question cannot become prompt: a row has a prompt already"
    ):
        datasets.read_held_out(SourceOptions(path, columns={"question": "prompt"}))
    path = lines(tmp_path / "other.jsonl", [{"prompt": None, "question": "a"}, {"question": "b"}])
    assert datasets.read_held_out(SourceOptions(path, columns={"question": "prompt"})) == [
        {"prompt": "a"},
        {"prompt": "b"},
    ]


@pytest.mark.parametrize("of", ["pairs", "unpaired"])
def test_a_pair_that_cannot_be_cut_is_named_by_its_row(of, tokenizer):
    rows = [{"chosen": "a b", "rejected": "a c"}, {"chosen": "a b", "rejected": "a b"}]
    with pytest.raises(
        ValueError, match="row 1: chosen and rejected must share a beginning.*; remove the row"
    ):
        pairs.lay_out(tokenizer, rows, "none", 64, print) if of == "pairs" else unpaired.lay_out(
            tokenizer, rows, 64, print
        )
