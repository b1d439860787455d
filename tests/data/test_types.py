"""Types of rows and the ways between them."""

import pytest

from rlhf import data

USER = {"role": "user", "content": "1 + 1?"}
SAY = lambda text: {"role": "assistant", "content": text}
STANDARD = {
    data.LANGUAGE_MODELLING: {"text": "a b"},
    data.PROMPT_ONLY: {"prompt": "a"},
    data.PROMPT_COMPLETION: {"prompt": "a", "completion": " b"},
    data.PREFERENCE: {"prompt": "a", "chosen": " b", "rejected": " c"},
    data.IMPLICIT_PREFERENCE: {"chosen": "a b", "rejected": "a c"},
    data.UNPAIRED_PREFERENCE: {"prompt": "a", "completion": " b", "label": False},
    data.STEPWISE: {"prompt": "a", "completions": ["b", "c"], "labels": [True, False]},
    data.TRIPLE: {"prompt": "a", "chosen": " b", "rejected": " c", "reference": " d"},
}
MESSAGES = {
    data.LANGUAGE_MODELLING: {"messages": [USER, SAY("2")]},
    data.PROMPT_ONLY: {"prompt": [USER]},
    data.PROMPT_COMPLETION: {"prompt": [USER], "completion": [SAY("2")]},
    data.PREFERENCE: {"prompt": [USER], "chosen": [SAY("2")], "rejected": [SAY("3")]},
    data.IMPLICIT_PREFERENCE: {"chosen": [USER, SAY("2")], "rejected": [USER, SAY("3")]},
    data.UNPAIRED_PREFERENCE: {"prompt": [USER], "completion": [SAY("2")], "label": True},
    data.TRIPLE: {
        "prompt": [USER],
        "chosen": [SAY("2")],
        "rejected": [SAY("3")],
        "reference": [SAY("4")],
    },
}


@pytest.mark.parametrize("rows", [STANDARD, MESSAGES])
def test_every_type_is_recognised_and_passes_its_own_check(rows):
    for type, row in rows.items():
        row = {"id": 1, "tools": "[]", **row}
        assert data.type_of(row) == type
        assert list(data.checked([row], type)) == [row]
    with pytest.raises(
        ValueError,
        match="columns question, answer, which fit no type; .*stepwise supervision: prompt, compl",
    ):
        data.type_of({"question": 1, "answer": 2})


def test_a_missing_column_is_named_with_what_is_needed_and_what_is_there():
    rows = [{"prompt": "a", "completion": "b"}, {"question": "a", "completion": "b"}]
    message = "prompt-completion rows need the columns prompt, completion, but row 1 has question, completion: prompt missing"
    with pytest.raises(ValueError, match=message):
        list(data.checked(rows, data.PROMPT_COMPLETION))
    stream = data.checked(iter(rows), data.PROMPT_COMPLETION)
    assert next(stream) == rows[0], "a row comes by before the next is looked at"
    with pytest.raises(ValueError, match="need the columns text, but row 0 has none"):
        list(data.checked([{}], data.LANGUAGE_MODELLING))


@pytest.mark.parametrize(
    ("type", "change", "message"),
    [
        (
            data.PROMPT_ONLY,
            {"prompt": 7},
            "row 0: prompt must be a string or messages with role and content, but is int",
        ),
        (data.PROMPT_ONLY, {"prompt": []}, "prompt must be .* but is a list without them"),
        (data.PROMPT_ONLY, {"prompt": [{"from": "user"}]}, "but is a list without them"),
        (
            data.PREFERENCE,
            {"prompt": [USER]},
            "prompt hold messages but chosen, rejected a string; make all",
        ),
        (
            data.UNPAIRED_PREFERENCE,
            {"label": 2},
            "label must be True or False, or 1 or 0, but is 2",
        ),
        (data.STEPWISE, {"labels": [True]}, "2 completions but 1 labels; one label a step"),
        (
            data.UNPAIRED_PREFERENCE,
            {"label": "yes"},
            "label must be True or False, or 1 or 0, but is 'yes'",
        ),
        (
            data.STEPWISE,
            {"labels": [True, 2]},
            r"labels must be a list of True and False, or of 1 .* but is \[True, 2\]",
        ),
        (
            data.STEPWISE,
            {"completions": "b"},
            "completions must be a list of strings, one a step, but is 'b'",
        ),
        (
            data.STEPWISE,
            {"completions": [], "labels": []},
            "0 completions but 0 labels; .*at least one",
        ),
        (
            data.STEPWISE,
            {"prompt": [USER]},
            "prompt holds messages, but stepwise supervision is of strings",
        ),
    ],
)
def test_wrong_values_are_refused(type, change, message):
    with pytest.raises(ValueError, match=message):
        list(data.checked([STANDARD[type] | change], type))


CONVERSIONS = {  # function -> (type from, type to)
    data.prompt_completion: [
        (type, data.PROMPT_COMPLETION) for type in (*list(STANDARD)[2:6], data.TRIPLE)
    ],
    data.language_modelling: [
        (type, data.LANGUAGE_MODELLING) for type in (*list(STANDARD)[2:6], data.TRIPLE)
    ],
    data.prompt_only: [(type, data.PROMPT_ONLY) for type in (*list(STANDARD)[1:6], data.TRIPLE)],
    data.extract_prompt: [(data.IMPLICIT_PREFERENCE, data.PREFERENCE)],
    data.implicit_prompt: [(data.PREFERENCE, data.IMPLICIT_PREFERENCE)],
}
PATHS = [(convert, *path) for convert, paths in CONVERSIONS.items() for path in paths]


@pytest.mark.parametrize(("convert", "source", "target"), PATHS)
def test_conversions_reach_the_row_of_the_other_type_and_keep_other_columns(
    convert, source, target
):
    for rows in (STANDARD, MESSAGES):
        assert convert(rows[source] | {"id": 5}) == rows[target] | {"id": 5}


def test_stepwise_becomes_text():
    row = STANDARD[data.STEPWISE]
    assert data.prompt_completion(row) == {"prompt": "a", "completion": "b\nc"}
    assert data.language_modelling(row, separator="") == {"text": "abc"}
    assert data.prompt_only(row) == {"prompt": "a"}
    assert data.unpaired(row) == [{"prompt": "a", "completion": "b\nc", "label": False}]
    assert data.unpaired(row | {"labels": [True, True]})[0]["label"] is True


def test_preference_becomes_two_labelled_rows():
    for rows in (STANDARD, MESSAGES):
        for type in (data.PREFERENCE, data.IMPLICIT_PREFERENCE):
            pair = rows[data.PREFERENCE]
            assert data.unpaired(rows[type] | {"id": 5}) == [
                {"prompt": pair["prompt"], "completion": pair["chosen"], "label": True, "id": 5},
                {"prompt": pair["prompt"], "completion": pair["rejected"], "label": False, "id": 5},
            ]


def test_what_has_no_way_is_refused():
    for convert, type, message in (
        (
            data.prompt_completion,
            data.LANGUAGE_MODELLING,
            "language modelling row cannot .* prompt-completion: it has no comp",
        ),
        (
            data.language_modelling,
            data.PROMPT_ONLY,
            "prompt-only row cannot .*: it has no completion",
        ),
        (
            data.unpaired,
            data.PROMPT_COMPLETION,
            "cannot be converted to unpaired preference: it has no verdict",
        ),
        (
            data.extract_prompt,
            data.PROMPT_COMPLETION,
            "cannot be .* preference with a prompt of its own: it has no chosen and",
        ),
        (
            data.implicit_prompt,
            data.IMPLICIT_PREFERENCE,
            "cannot be converted to an implicit prompt",
        ),
        (data.as_messages, data.STEPWISE, "cannot be converted to messages: who speaks"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(STANDARD[type])


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue", "The sky is black", "The sky is"),  # not "The sky is bl"
        (
            "Human: a\n\nAssistant:\nSure",
            "Human: a\n\nAssistant:\nSorry",
            "Human: a\n\nAssistant:\n",
        ),
        ("A: yes", "A: yes it is", "A:"),
        ("a  b", "a  c", "a "),
    ],
)
def test_extracted_prompts_of_strings_end_between_words(chosen, rejected, prompt):
    row = data.extract_prompt({"chosen": chosen, "rejected": rejected})
    assert row == {
        "prompt": prompt,
        "chosen": chosen.removeprefix(prompt),
        "rejected": rejected.removeprefix(prompt),
    }
    assert data.implicit_prompt(row) == {"chosen": chosen, "rejected": rejected}


def test_extract_prompt_replaces_a_string_beside_messages_and_refuses_what_it_cannot_cut():
    row = MESSAGES[data.IMPLICIT_PREFERENCE] | {"prompt": "1 + 1?"}
    assert data.extract_prompt(row) == MESSAGES[data.PREFERENCE]
    for row in (STANDARD[data.PREFERENCE], MESSAGES[data.PREFERENCE]):
        with pytest.raises(ValueError, match="has a prompt already"):
            data.extract_prompt(row)
    for chosen, rejected in (
        ("a b", "a b"),
        ("yes", "no"),
        ([USER], [USER, SAY("2")]),
        ([SAY("2")], [SAY("3")]),
    ):
        with pytest.raises(
            ValueError,
            match="must share a beginning, their prompt, and each go on in its own way, but are .*; remove",
        ):
            data.extract_prompt({"chosen": chosen, "rejected": rejected})


def test_an_assistant_that_goes_on_speaks_in_one_message():
    row = {"prompt": [USER, SAY("It ")], "completion": [SAY("is 2"), USER]}
    assert data.language_modelling(row) == {"messages": [USER, SAY("It is 2"), USER]}
    call = {"role": "assistant", "tool_calls": [{}]}
    assert data.language_modelling(row | {"completion": [call]}) == {
        "messages": [USER, SAY("It "), call]
    }


def test_sharegpt_becomes_messages():
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "h"},
        {"from": "gpt", "value": "g", "weight": 1},
    ]
    expected = [{"role": "system", "content": "s"}, {"role": "user", "content": "h"}]
    expected += [{"role": "assistant", "content": "g", "weight": 1}]
    assert data.from_sharegpt({"conversations": turns, "id": 1}) == {"messages": expected, "id": 1}
    assert data.from_sharegpt({"prompt": turns[:2]}) == {"prompt": expected[:2]}
    for row in (*STANDARD.values(), *MESSAGES.values()):
        assert data.from_sharegpt(row) == row
    with pytest.raises(
        ValueError, match="conversations cannot become messages: a row has a messages already"
    ):
        data.from_sharegpt({"conversations": turns, "messages": []})


def test_texts_become_messages_and_columns_other_names():
    row = data.as_messages(STANDARD[data.PREFERENCE] | {"id": 5})
    user = {"role": "user", "content": "a"}
    assert row == {"prompt": [user], "chosen": [SAY(" b")], "rejected": [SAY(" c")], "id": 5}
    assert data.as_messages(row) == row
    assert data.renamed({"a": 1, "b": 2}, a="b", b="a") == {"b": 1, "a": 2}
    with pytest.raises(
        ValueError,
        match="question cannot become prompt: a row has no such column; its columns are a, b",
    ):
        data.renamed({"a": 1, "b": 2}, question="prompt")
    with pytest.raises(ValueError, match="a cannot become b: a row has a b already"):
        data.renamed({"a": 1, "b": 2}, a="b")
