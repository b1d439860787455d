"""Text and messages as tokens: which ids, and which of them are trained."""

from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from rlhf import data
from rlhf.data import template

T, F = True, False
CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "tokenizer"
SAY = lambda role, content: {"role": role, "content": content}
CHAT = [
    SAY("system", "be terse"),
    SAY("user", "is it"),
    SAY("assistant", "that"),
    SAY("user", "so"),
    SAY("assistant", "then"),
]
UNMARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BORDER = "the tokenizer merges across the border of prompt and completion"


@pytest.fixture
def tokenizer():
    """Byte-level BPE with 39 merges, among them `at` and ` th`; its template marks generations."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(CHECKPOINT)
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def text(tokenizer, row) -> tuple[str, str]:
    """A row's text, and that of its trained tokens."""
    tokens, mask = np.array(row.tokens), np.array(row.mask)
    assert mask.dtype == bool
    assert tokens.shape == mask.shape
    return tokenizer.decode(tokens), tokenizer.decode(tokens[mask])


def test_strings_get_one_end_token(tokenizer):
    rows = [{"text": "that is"}, {"text": "that is<|im_end|>"}]
    for row in data.tokenize_texts(tokenizer, rows):
        assert row == (
            [*tokenizer.encode("that is"), tokenizer.eos_token_id],
            [True] * len(row.tokens),
        )
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer has no end token; set tokenizer.eos_token"):
        data.tokenize_texts(tokenizer, rows)


def test_an_end_token_that_also_pads_is_trained(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    batch = data.batch(
        data.tokenize_texts(tokenizer, [{"text": "that"}, {"text": "that is the end"}])
    )
    assert (batch.mask == (batch.segment_ids > 0)).all()
    assert ((batch.tokens == tokenizer.eos_token_id) & batch.mask).sum(1).tolist() == [1, 1]


def test_the_tokenizers_own_start_and_end_tokens_stand_at_the_ends_alone(tokenizer):
    from tokenizers.processors import TemplateProcessing

    start, end = tokenizer.convert_tokens_to_ids(["<s>", "<|im_end|>"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A <|im_end|>", special_tokens=[("<s>", start), ("<|im_end|>", end)]
    )
    assert (
        text(tokenizer, data.tokenize_texts(tokenizer, [{"text": "that"}])[0])[0]
        == "<s>that<|im_end|>"
    )
    row = {"prompt": "is", "completion": " that"}
    assert text(tokenizer, data.tokenize_completions(tokenizer, [row])[0]) == (
        "<s>is that<|im_end|>",
        " that<|im_end|>",
    )
    assert data.tokenize_prompts(tokenizer, [row]) == [
        [start, *tokenizer.encode("is", add_special_tokens=False)]
    ]


def test_completions_are_trained_and_prompts_are_not(tokenizer):
    row = {
        "prompt": "is it",
        "completion": " that",
        "chosen": " the",
        "rejected": "",
        "reference": " so",
    }
    for column in ("completion", "chosen", "rejected", "reference"):
        (out,) = data.tokenize_completions(tokenizer, [row], column=column)
        assert text(tokenizer, out) == (f"is it{row[column]}<|im_end|>", f"{row[column]}<|im_end|>")
    (out,) = data.tokenize_completions(tokenizer, [row], completion_only=False)
    assert all(out.mask)
    with pytest.raises(
        ValueError,
        match="prompt and chosen rows need the columns prompt, chosen, but row 0 has prompt",
    ):
        data.tokenize_completions(tokenizer, [{"prompt": ""}], column="chosen")


def test_prompts_keep_the_ids_that_a_policy_samples_from(tokenizer):
    rows = [{"prompt": "is it a", "completion": "t"}, {"prompt": "is it", "completion": " that"}]
    with pytest.warns(RuntimeWarning, match=f"1 of 2 rows: {BORDER}") as caught:
        out = data.tokenize_completions(tokenizer, rows)
    assert caught[0].filename == __file__, "it points at the caller"
    joint = [tokenizer.encode(row["prompt"] + row["completion"]) for row in rows]
    for row, prompt, new, together in zip(
        rows, data.tokenize_prompts(tokenizer, rows), out, joint, strict=True
    ):
        assert new.tokens[: len(prompt)] == prompt == tokenizer.encode(row["prompt"])
        assert tokenizer.decode(new.tokens) == row["prompt"] + row["completion"] + "<|im_end|>"
        assert new.mask == [i >= len(prompt) for i in range(len(new.tokens))]
        assert (new.tokens[:-1] == together) == (row is rows[1]), "together where it can be"


def test_messages_are_what_the_template_makes_of_them(tokenizer):
    prompt, completion = CHAT[:2], CHAT[2:]
    (whole,) = data.tokenize_texts(tokenizer, [{"messages": CHAT}])
    assert whole.tokens == tokenizer.apply_chat_template(CHAT)["input_ids"]
    assert all(whole.mask)
    (row,) = data.tokenize_completions(tokenizer, [{"prompt": prompt, "completion": completion}])
    assert row.tokens == whole.tokens
    start = data.tokenize_prompts(tokenizer, [{"prompt": prompt}])[0]
    assert start == tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    assert row.mask == [i >= len(start) for i in range(len(row.tokens))]
    assert text(tokenizer, row)[1].startswith("that<|im_end|>\n<|im_start|>user")


def test_assistants_alone_are_trained_where_asked(tokenizer):
    (row,) = data.tokenize_texts(tokenizer, [{"messages": CHAT}], assistant_only=True)
    assert text(tokenizer, row)[1] == "that<|im_end|>then<|im_end|>"
    split = [{"prompt": CHAT[:4], "completion": CHAT[4:]}]
    (row,) = data.tokenize_completions(tokenizer, split, assistant_only=True)
    assert text(tokenizer, row)[1] == "then<|im_end|>", "of the completion"
    (row,) = data.tokenize_completions(tokenizer, split, assistant_only=True, completion_only=False)
    assert text(tokenizer, row)[1] == "that<|im_end|>then<|im_end|>"
    with pytest.raises(ValueError, match="assistant_only needs messages"):
        data.tokenize_texts(tokenizer, [{"text": "that"}], assistant_only=True)
    tokenizer.chat_template = UNMARKED
    assert data.tokenize_completions(tokenizer, split)[0].tokens == row.tokens
    with pytest.raises(
        ValueError,
        match="assistant_only needs a chat template that marks .*but the tokenizer's does not",
    ):
        data.tokenize_texts(tokenizer, [{"messages": CHAT}], assistant_only=True)


def test_rows_without_an_assistant_are_left_to_truncate(tokenizer):
    rows = data.tokenize_texts(
        tokenizer, [{"messages": CHAT[:2]}, {"messages": CHAT}], assistant_only=True
    )
    left = data.truncate(rows, length=1000)
    assert (left.remaining.tolist(), left.rows_removed) == ([1], 1)


@pytest.mark.parametrize("assistant_only", [False, True])
def test_what_an_assistant_began_goes_on(assistant_only, tokenizer):
    row = {
        "prompt": [*CHAT[:2], SAY("assistant", "it is")],
        "completion": [SAY("assistant", " that")],
    }
    (out,) = data.tokenize_completions(tokenizer, [row], assistant_only=assistant_only)
    (start,) = data.tokenize_prompts(tokenizer, [row])
    assert tokenizer.decode(start).endswith("<|im_start|>assistant\nit is")
    assert out.tokens[: len(start)] == start
    assert text(tokenizer, out)[1] == " that<|im_end|>" + "\n" * (not assistant_only)


@pytest.mark.parametrize("completion_only", [False, True])
def test_assistants_alone_are_trained_where_the_tokenizer_merges(completion_only, tokenizer):
    row = {
        "prompt": [*CHAT[:4], SAY("assistant", "it is a")],
        "completion": [SAY("assistant", "t"), *CHAT[3:]],
    }
    with pytest.warns(RuntimeWarning, match=f"1 of 1 rows: {BORDER}"):
        (out,) = data.tokenize_completions(
            tokenizer, [row], assistant_only=True, completion_only=completion_only
        )
    (start,) = data.tokenize_prompts(tokenizer, [row])
    assert out.tokens[: len(start)] == start
    before = "" if completion_only else "that<|im_end|>it is a"
    assert text(tokenizer, out)[1] == f"{before}t<|im_end|>then<|im_end|>"


def test_a_mask_is_carried_to_other_tokens_of_the_same_text():
    carried = template._carried
    assert carried([T, F, F, T], [1, 2, 3, 4], [1, 7, 8, 9, 4]) == [T, F, F, F, T], (
        "what differs was not trained"
    )
    assert carried([F, T, F, F], [1, 2, 3, 4], [1, 7, 4]) == [F, T, F], "some of what differs was"
    assert carried([F, F, T], [1, 1, 1], [1, 1]) == [F, F], "no token is counted from both ends"


def test_prompts_end_with_a_role_that_can_be_followed(tokenizer):
    opened = "<|im_start|>assistant\n"
    for role in ("user", "tool"):
        (ids,) = data.tokenize_prompts(tokenizer, [{"prompt": [SAY(role, "it")]}])
        assert tokenizer.decode(ids) == f"<|im_start|>{role}\nit<|im_end|>\n{opened}"
    with pytest.raises(
        ValueError,
        match="a prompt ends with the role 'system', but must with user, tool, or assistant",
    ):
        data.tokenize_prompts(tokenizer, [{"prompt": CHAT[:1]}])


def test_tools_and_arguments_of_a_row_reach_the_template(tokenizer):
    tokenizer.chat_template = (
        "{% for t in tools or [] %}{{ t.name }} {% endfor %}{{ mood }} {{ messages[0].content }}"
    )
    row = {
        "messages": CHAT[1:2],
        "tools": [{"name": "add"}, {"name": "sort"}],
        "chat_template_kwargs": {"mood": "terse"},
    }
    no_tools = row | {"tools": None, "chat_template_kwargs": None}
    rows = [
        row,
        row | {"tools": '[{"name": "add"}]'},
        no_tools,
        no_tools | {"tool_defs": [{"name": "add"}]},
    ]
    rows += [
        row
        | {"tools": [], "tool_defs": [{"name": "add"}], "chat_template_kwargs": '{"mood": "terse"}'}
    ]
    with pytest.warns(RuntimeWarning, match="no row trains"):
        out = data.tokenize_texts(tokenizer, rows)
    said = ["add sort terse is it", "add terse is it", " is it", "add  is it", "terse is it"]
    assert [tokenizer.decode(x.tokens) for x in out] == said
    prompts = data.tokenize_prompts(tokenizer, [{**row, "prompt": CHAT[1:2]}])
    assert tokenizer.decode(prompts[0]) == "add sort terse is it"
    own = {"messages": CHAT, "chat_template_kwargs": {"chat_template": UNMARKED}}
    assert data.tokenize_texts(tokenizer, [own])[0].tokens[0] == tokenizer.convert_tokens_to_ids(
        "<|im_start|>"
    )
    with pytest.raises(ValueError, match="assistant_only needs a chat template that marks"):
        data.tokenize_texts(tokenizer, [own], assistant_only=True)


def test_an_end_of_turn_that_is_not_the_end_token_is_told(tokenizer):
    tokenizer.eos_token = "</s>"
    message = "no row trains the end token </s>, so that a model cannot learn to stop by it; set tokenizer.eos_token"
    for assistant_only in (True, False):
        with pytest.warns(RuntimeWarning, match=message) as caught:
            data.tokenize_texts(tokenizer, [{"messages": CHAT}], assistant_only=assistant_only)
        assert caught[0].filename == __file__


def test_templates_that_are_missing_or_rewrite_the_prompt_are_refused(tokenizer):
    row = {"prompt": CHAT[:2], "completion": CHAT[2:3]}
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %} {{ m.content }}{% endfor %}"
    )
    with pytest.raises(
        ValueError,
        match="row 0: the chat template writes the prompt otherwise .* '2 be terse is it' has become '3 be",
    ):
        data.tokenize_completions(tokenizer, [row])
    tokenizer.chat_template = None
    for tokenize in (data.tokenize_completions, data.tokenize_prompts):
        with pytest.raises(
            ValueError, match="no chat template for rows of messages; set tokenizer.chat_template"
        ):
            tokenize(tokenizer, [row])


def test_steps_are_judged_at_their_last_token(tokenizer):
    row = {"prompt": "is it", "completions": ["that", "the end"], "labels": [True, False]}
    (steps,) = data.tokenize_steps(tokenizer, [row])
    assert tokenizer.decode(steps.tokens) == "is itthat\nthe end\n"
    newline = tokenizer.encode("\n")[0]
    assert steps.mask == [token == newline for token in steps.tokens]
    assert [label for label, judged in zip(steps.labels, steps.mask, strict=True) if judged] == [
        1,
        0,
    ]
    assert sum(steps.labels) == 1
    (steps,) = data.tokenize_steps(tokenizer, [row | {"labels": [True, True]}], separator="")
    assert tokenizer.decode(steps.tokens) == "is itthatthe end"
    assert np.flatnonzero(steps.mask).tolist() == np.flatnonzero(steps.labels).tolist()
    assert steps.mask[-1]
    assert sum(steps.mask) == 2
    with pytest.raises(
        ValueError,
        match="row 0: a step without tokens, ''; give it text, or a separator that has some",
    ):
        data.tokenize_steps(tokenizer, [row | {"completions": ["that", ""]}], separator="")


def test_worked_answers_come_back_as_text(tokenizer):
    rows = data.read_rows(Path(__file__).parent / "sums.jsonl")
    rows = [data.renamed(row, question="prompt", answer="completion") for row in rows]
    with pytest.raises(
        ValueError, match=r"row 0: the tokenizer has no token for 'A' \(U\+0041\), in 'Ann has 3"
    ):
        data.tokenize_completions(tokenizer, rows)
    known = lambda text: tokenizer.decode(tokenizer.encode(text))  # the vocabulary is small
    rows = [{name: known(value) for name, value in row.items()} for row in rows]
    for row, out in zip(rows, data.tokenize_completions(tokenizer, rows), strict=True):
        assert text(tokenizer, out)[1] == row["completion"] + "<|im_end|>"
    chats = [data.as_messages(row) for row in rows]
    last = data.tokenize_completions(tokenizer, chats, assistant_only=True)[-1]
    assert text(tokenizer, last)[1] == rows[1]["completion"] + "<|im_end|>"
