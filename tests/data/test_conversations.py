"""Conversations: what every message says stands in the text, or the row is refused by its number, whatever the template is."""

import itertools
import json
import random
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf import data
from rlhf.data import conversations, messages, render

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2, GEMMA, MISTRAL, QWEN = (
    (Path(__file__).parent / "templates" / f"{name}.jinja").read_text()
    for name in ("llama2", "gemma", "mistral", "qwen")
)  # Mistral's leaves out what tools say, Qwen's the thinking that a user has replied to
ANSWERS = """{% for m in messages if m.role in ('user', 'assistant') %}{{ m.content.split('</think>')[-1] + '\n' }}{% endfor %}"""
DEEPSEEK = """{% for m in messages %}{{ m.role + ': ' + (m.content or '') }}{% for c in m.tool_calls or [] %}{{ '\n' +
c.function.name + '\n```json\n' + c.function.arguments + '\n```' }}{% endfor %}{{ '\n' }}{% endfor %}"""
PYTHONIC = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ c.function }}{% endfor %}{% endfor %}"
TEMPLATES = {
    "chatml": CHATML,
    "llama2": LLAMA2,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "qwen": QWEN,
    "answers": ANSWERS,
}
CONTENTS = (
    "no",
    "a",
    "user",
    "",
    "  ",
    " is it?\n",
    "zwölf 12 µm 你好 😀",
    "a\n\n\nb",
    '{"a": "b"}',
    "<b>&amp;</b>",
    "\\n'\"",
    "[INST]",
)
SAY = lambda role, content: {"role": role, "content": content}
CALLED = {"name": "find", "arguments": {"city": "Zürich", "days": 3}}
END = "ignore:no row trains"


@pytest.fixture(scope="module")
def bytewise():
    """A token a byte, and two special ones."""
    inner = Tokenizer(
        models.BPE(
            {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []
        )
    )
    inner.pre_tokenizer, inner.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        decoders.ByteLevel(),
    )
    extra = ["<|im_start|>", "<|im_end|>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", extra_special_tokens=extra
    )


@pytest.fixture
def tokenizer(bytewise):
    bytewise.chat_template = QWEN
    return bytewise


def read(tokenizer, *rows) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return [tokenizer.decode(row.tokens) for row in data.tokenize_texts(tokenizer, rows)]


def conversation(rng) -> list[dict]:
    roles = rng.choices(["system", "user", "assistant", "tool"], [1, 4, 4, 1], k=rng.randint(1, 6))
    if rng.random() < 0.5:  # one that templates take
        roles = [
            *rng.choice([[], ["system"]]),
            *itertools.islice(itertools.cycle(["user", "assistant"]), rng.randint(1, 6)),
        ]
    return [SAY(role, "".join(rng.choices(CONTENTS, k=rng.randint(1, 2)))) for role in roles]


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_content_is_in_the_text_or_the_row_is_refused(name, tokenizer):
    rng, kept = random.Random(name), 0
    refused: list[str] = []
    tokenizer.chat_template = TEMPLATES[name]
    for _ in range(120):
        chat = conversation(rng)
        try:
            (text,) = read(tokenizer, {"messages": chat})
        except ValueError as error:
            refused.append(str(error))
            continue
        marked = [
            message | {"content": f"≺{i}≻" if message["content"].strip() else ""}
            for i, message in enumerate(chat)
        ]
        (whole,) = read(tokenizer, {"messages": marked})
        for message, mark in zip(chat, marked, strict=True):
            assert message["content"].strip() in text
            assert mark["content"] in whole, (chat, whole)
        kept += 1
    assert kept > 10
    assert len(refused) > 10 or name in ("chatml", "qwen")
    assert all(
        error.startswith("row 0: the chat template ") and "\n" not in error for error in refused
    )


def test_thinking_that_a_user_has_replied_to_may_go_and_no_other(tokenizer):
    thought = SAY("assistant", "<think>\nis it?\n</think>\n\nyes")
    (text,) = read(
        tokenizer, {"messages": [SAY("user", "so"), thought, SAY("user", "and"), thought]}
    )
    assert text.count("is it?") == 1
    assert text.endswith("<think>\nis it?\n</think>\n\nyes<|im_end|>\n")
    tokenizer.chat_template = ANSWERS
    with pytest.raises(
        ValueError,
        match="row 0: the chat template leaves out message 1 of role 'assistant', 'is it",
    ):
        read(tokenizer, {"messages": [SAY("user", "so"), thought]})


@pytest.mark.parametrize(
    ("template", "error", "said"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported", ""),
        ("{{ x.y.z }}", "UndefinedError", "'x' is undefined"),
        ("{% if %}", "TemplateSyntaxError in its line 1", "Expected an expression"),
        ("{{ 1 / 0 }}", "ZeroDivisionError", "division by zero"),
        ("{{ messages + 1 }}", "TypeError", ""),
        ("{{ ().__class__.__mro__ }}", "SecurityError", ""),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "it calls itself without end", ""),
        ("{{ 'x' * 10 ** 10 }}", "it takes more memory than it may", ""),
        (
            "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
            "it takes more memory than it may",
            "",
        ),
        (
            "{{ 'x' * 17000000 }}",
            "it writes 17,000,000 characters, but 16,000,000 are the most",
            "",
        ),
        (
            "{{ messages[0].content | tojson(indent=2 ** 40) }}{{ [1] | tojson(indent=2 ** 40) }}",
            "",
            "",
        ),
    ],
)
def test_whatever_a_template_does_is_one_line_with_the_row(template, error, said, tokenizer):
    rows = [
        {"messages": [SAY("user", "so")], "chat_template_kwargs": {"chat_template": t}}
        for t in (CHATML, template)
    ]
    with pytest.raises(
        ValueError,
        match=f"^row 1: the chat template fails on it: {error}.*{said}.*; change the row, or give",
    ):
        read(tokenizer, *rows)
    assert read(tokenizer, rows[0]) == ["<|im_start|>user\nso<|im_end|>\n"], (
        "others are rendered as before"
    )


def test_a_template_that_never_ends_is_ended(tokenizer, monkeypatch):
    monkeypatch.setattr(render, "SECONDS", 0.1)
    render._WORKER.stop()
    power = "{{ 7 ** (10 ** 9) }}"  # in one instruction, which no signal handler would interrupt
    calls = (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}"
    )
    for template in (power, calls):
        tokenizer.chat_template, start = template, time.monotonic()
        with pytest.raises(
            ValueError,
            match="row 0: the chat template fails on it: it takes longer than 0.1 s, which is the mo",
        ):
            data.tokenize_prompts(tokenizer, [{"prompt": [SAY("user", "so")]}] * 300)
        assert time.monotonic() - start < 20
    render._WORKER.stop()


def test_texts_are_those_of_transformers(tokenizer):
    rng = random.Random(0)
    chats = [
        chat
        for chat in (conversation(rng) for _ in range(60))
        if chat[-1]["role"] in ("user", "assistant", "tool")
    ]
    for chat in chats:
        goes_on = chat[-1]["role"] == "assistant"
        options = {"continue_final_message": goes_on, "add_generation_prompt": not goes_on}
        for how in (options, {}):
            (ours,) = render.render([render.Conversation(QWEN, chat, {"tools": None, **how})])
            assert ours.text == tokenizer.apply_chat_template(chat, tokenize=False, **how)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "yes"}], "yes"),
        ([{"type": "text", "text": "y", "image": None}, {"text": "es"}], "yes"),
        (["y", {"type": "input_text", "text": "es"}], "yes"),
        ([], ""),
        (
            [{"type": "image"}],
            "content has a part of type 'image', but a model of text reads text alone",
        ),
        ([{"type": "text", "text": None}], "content has a part of type 'text'"),
        (
            [{"type": "text", "text": "y"}, {"type": "image_url", "image_url": {"url": "x"}}],
            "content has a part of type 'image_url'",
        ),
        (5, "content must be text, or parts with text, but is 5"),
        (True, "content must be text"),
        ({"a": 1}, "content must be text"),
        ([5], "content must be text"),
        (None, "of role 'user' has no content"),
    ],
)
def test_content_is_text_or_parts_of_text_or_refused(content, text, tokenizer):
    tokenizer.chat_template = CHATML
    good = SAY("user", "so")
    expected = f"<|im_start|>user\nso<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n"
    row = {"messages": [good, SAY("user", content)]}
    if (
        isinstance(content, list)
        and messages._part(content[0] if content else "") is not None
        and "part" not in text
    ):
        assert read(tokenizer, row) == [expected]
        prompt = data.tokenize_prompts(tokenizer, [{"prompt": row["messages"]}])
        assert tokenizer.decode(prompt[0]) == expected + "<|im_start|>assistant\n"
        return
    for tokenize, names in (
        (data.tokenize_texts, ("messages",)),
        (data.tokenize_prompts, ("prompt",)),
        (data.tokenize_completions, ("prompt", "completion")),
    ):
        with pytest.raises(ValueError, match=f"row 1: .*{text}"):
            tokenize(
                tokenizer, [{name: chat for name in names} for chat in ([good], row["messages"])]
            )


def test_an_assistant_that_calls_a_tool_needs_no_content(tokenizer):
    calls = [{"type": "function", "function": CALLED}]
    said = '<tool_call>{"name": "find", "arguments": {"city": "Zürich", "days": 3}}</tool_call>'
    texts = []
    for arguments in (CALLED["arguments"], json.dumps(CALLED["arguments"])):
        call = {"type": "function", "function": CALLED | {"arguments": arguments}}
        for extra in ({"content": None}, {}, {"content": ""}, {"tool_call_id": None}):
            texts += read(
                tokenizer,
                {
                    "messages": [
                        SAY("user", "so"),
                        {"role": "assistant", "tool_calls": [call], **extra},
                    ]
                },
            )
    assert set(texts) == {
        f"<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n\n{said}<|im_end|>\n"
    }
    row = {
        "messages": [SAY("user", "so"), {"role": "assistant", "content": "", "tool_calls": calls}]
    }
    tokenizer.chat_template = CHATML
    with pytest.raises(
        ValueError, match="leaves out the tool call of message 1 of role 'assistant', 'find'"
    ):
        read(tokenizer, row)


@pytest.mark.parametrize("template", [DEEPSEEK, PYTHONIC])
@pytest.mark.parametrize("change", [json.dumps, dict])
def test_templates_that_join_arguments_to_texts_get_them_as_text(template, change, tokenizer):
    tokenizer.chat_template = template
    call = {"function": CALLED | {"arguments": change(CALLED["arguments"])}}
    (text,) = read(
        tokenizer,
        {"messages": [SAY("user", "so"), SAY("assistant", "hm") | {"tool_calls": [call]}]},
    )
    assert '{"city": "Z' in text
    assert "{'city'" not in text


def test_what_a_tool_returned_may_be_an_object_that_the_template_writes_as_json(tokenizer):
    chat = [SAY("user", "so"), SAY("tool", {"t": [1, "ü"]}), SAY("assistant", "ok")]
    tokenizer.chat_template = "{% for m in messages %}{{ m.content if m.content is string else m.content | tojson }}{% endfor %}"
    assert read(tokenizer, {"messages": chat}) == ['so{"t": [1, "ü"]}ok']
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="leaves out message 1 of role 'tool'"):
        read(tokenizer, {"messages": chat})


@pytest.mark.parametrize(
    ("columns", "error"),
    [
        ({"tools": "[{"}, "row 0: tools is a text, but not JSON"),
        (
            {"tools": "[" * 100_000},
            "row 0: tools is a text, but not JSON .lists and objects inside each other",
        ),
        ({"tools": 5}, "row 0: tools must be a list of JSON schemas, but is 5"),
        ({"tool_defs": [5]}, "row 0: tool_defs must be a list of JSON schemas, but holds 5"),
        ({"chat_template_kwargs": [1]}, "row 0: chat_template_kwargs must be an object"),
        (
            {"chat_template_kwargs": {"tokenize": True}},
            "row 0: chat_template_kwargs has tokenize, which is not the template's",
        ),
        ({"chat_template_kwargs": {"messages": []}}, "row 0: chat_template_kwargs has messages"),
        ({"messages": [{"role": 5, "content": "a"}]}, "row 0: message 0: role must be a text"),
        (
            {"messages": [SAY("assistant", "a") | {"tool_calls": "x"}]},
            "row 0: message 0: tool_calls must be a list of calls",
        ),
        (
            {"messages": [SAY("assistant", "a") | {"tool_calls": [5]}]},
            "row 0: message 0: a tool call must be an object",
        ),
    ],
)
def test_what_no_template_can_mean_is_refused_with_its_row(columns, error, tokenizer):
    with pytest.raises(ValueError, match=error):
        read(tokenizer, {"messages": [SAY("user", "so")], **columns})


def test_messages_that_no_process_can_be_sent_are_refused(tokenizer):
    good = {"messages": [SAY("user", "so")]}
    with pytest.raises(
        ValueError, match="row 1: its messages cannot be given to a template .Exceeds the limit"
    ):
        read(tokenizer, good, {"messages": [SAY("user", "so") | {"extra": 10**5000}]})
    tokenizer.chat_template = CHATML
    assert read(
        tokenizer, {"messages": [SAY("user", "so") | {"seen": np.int64(3), "of": object()}]}
    ) == read(tokenizer, good)


def test_special_tokens_in_messages_and_tools_left_out_are_told(tokenizer):
    rows = [
        {"messages": [SAY("user", "so")]},
        {"messages": [SAY("user", "so<|im_end|>")], "tools": [{"name": "find"}]},
    ]
    special = "1 of 2 rows have messages that hold special tokens, such as <|im_end|> in row 1"
    tokenizer.eos_token = "<|im_end|>"
    with pytest.warns(RuntimeWarning, match=special):
        data.tokenize_texts(tokenizer, rows)
    tokenizer.chat_template = CHATML
    with pytest.warns(RuntimeWarning) as caught:
        data.tokenize_prompts(tokenizer, [{"prompt": row["messages"], **row} for row in rows])
    told = [str(each.message) for each in caught]
    assert [special in message for message in told] == [False, True]
    assert "1 of 2 rows, the first row 1: the chat template leaves out the tools" in told[0]
    thought = SAY("assistant", "no") | {"reasoning_content": "is it?"}
    with pytest.warns(
        RuntimeWarning, match="the chat template leaves out the last turn's thinking"
    ):
        data.tokenize_texts(tokenizer, [{"messages": [SAY("user", "so"), thought]}])
    tokenizer.eos_token = "</s>"


def test_judged_completions_need_no_end_token(tokenizer):
    row = {"prompt": [SAY("user", "so")], "completion": [SAY("assistant", "no")]}
    assert data.tokenize_completions(tokenizer, [row], imitated=False)
    with pytest.warns(RuntimeWarning, match="no row trains the end token </s>.*--eos_token"):
        data.tokenize_completions(tokenizer, [row])


def test_conversations_of_one_form_are_asked_about_once(tokenizer, monkeypatch):
    asked = []
    monkeypatch.setattr(
        conversations,
        "render",
        lambda all_of_them: asked.append(len(all_of_them)) or render.render(all_of_them),
    )
    read(
        tokenizer,
        *[{"messages": [SAY("user", f"so {i}"), SAY("assistant", "no")]} for i in range(500)],
    )
    assert [number for number in asked if number] == [500, 1]
