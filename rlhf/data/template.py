"""Rows of text and messages as token ids, through a `transformers` tokenizer and its chat template.

The ids of a prompt are exactly those from which a policy samples: prompt and completion are
tokenised together, and where the tokenizer would merge across their border, the completion is
tokenised by itself (a warning says in how many rows).  Strings get an end token; after messages,
the template writes what ends a turn.

A row's `tools` (or `tool_defs`; a list of JSON schemas, or one as a JSON string) and
`chat_template_kwargs` go to the template, within bounds of time and size.  What messages say must
stand in the text that the template writes, or the row is refused.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from rlhf.data import conversations
from rlhf.data.conversations import Rendered
from rlhf.data.conversions import joined
from rlhf.data.messages import normalised
from rlhf.data.tokenized import Steps, Tokenized
from rlhf.data.types import LANGUAGE_MODELLING, PROMPT_ONLY, STEPWISE, Row, Type, checked
from rlhf.rollouts.text import encoder, framed, in_row, starting


def tokenize_texts(
    tokenizer, rows: Iterable[Row], *, assistant_only: bool = False
) -> list[Tokenized]:
    """Language modelling: every token is trained, or what assistants say.

    Args:
      tokenizer: of `transformers`.
      rows: with `text`, or `messages`.
      assistant_only: for messages: train what the template puts between `{% generation %}` and
        `{% endgeneration %}` alone.

    Returns: one `Tokenized` a row.  Rows without a trained token are for `truncate` to remove.

    Raises: ValueError for other rows, text where the tokenizer has no end token, messages where it
    has no template or which the template refuses or leaves out, and `assistant_only` where the rows
    are text or the template marks no generation.
    Warns: RuntimeWarning where no row of messages trains the tokenizer's end token, where messages
    hold special tokens, and where the template leaves out their tools or thinking.

    >>> from rlhf.tasks import reviews
    >>> tokenize_texts(reviews.tokenizer(), [{"text": "the film"}])[0].mask
    [True, True, True, True]
    """
    rows = _checked(rows, LANGUAGE_MODELLING, ("messages",))
    full = [row["text"] if row.get("messages") is None else row["messages"] for row in rows]
    return _tokenized(tokenizer, rows, [None] * len(rows), full, assistant_only, False)


def tokenize_completions(
    tokenizer,
    rows: Iterable[Row],
    *,
    column: str = "completion",
    assistant_only: bool = False,
    completion_only: bool = True,
    imitated: bool = True,
) -> list[Tokenized]:
    """A prompt and what follows: the completion is trained, or what assistants say in it.

    Args:
      tokenizer: of `transformers`.
      rows: with `prompt` and `column`.
      column: `completion`; `chosen`, `rejected`, `reference` for the sides of preferences.
      assistant_only: as in `tokenize_texts`.
      completion_only: False: the prompt is trained too.
      imitated: False: completions are scored and no model is trained to write them, so that no
        warning says that their end token is missing.

    Returns: one `Tokenized` a row.

    Raises: ValueError for other rows, text where the tokenizer has no end token, messages where it
    has no template or which the template refuses or leaves out, `assistant_only` where the rows are
    text or the template marks no generation, and where a template writes a prompt otherwise when
    its completion follows: then it is not known which tokens are the completion's.
    Warns: RuntimeWarning where no row of messages trains the tokenizer's end token, where messages
    hold special tokens, where the template leaves out their tools or thinking, and where the
    tokenizer merges across the border.

    >>> from rlhf.tasks import reviews
    >>> tokenize_completions(reviews.tokenizer(), [{"prompt": "the film", "completion": " is great ."}])[0].mask
    [False, False, False, True, True, True, True]
    """
    names = ("prompt", column)
    rows = _checked(rows, Type(f"prompt and {column}", names), names)
    starts = [row["prompt"] for row in rows]
    full = [joined(row["prompt"], row[column]) for row in rows]
    return _tokenized(tokenizer, rows, starts, full, assistant_only, completion_only, imitated)


def tokenize_joined(
    tokenizer, rows: Iterable[Row], *, column: str = "completion"
) -> list[Tokenized]:
    """A prompt with what follows as a classifying encoder reads it: one text, in the tokenizer's
    special tokens.

    A tokenizer without a chat template writes the contents of messages one below the other.

    Args:
      tokenizer: of `transformers`.
      rows: with `column`, and `prompt` unless the column begins with it.
      column: `completion`; `chosen`, `rejected` for the sides of preferences.

    Returns: one `Tokenized` a row, its mask True everywhere.

    Raises: ValueError for other rows, and messages that the template refuses or leaves out.

    >>> from rlhf.tasks import reviews
    >>> tokenize_joined(reviews.tokenizer(), [{"prompt": "the film", "completion": " is great ."}])[0].tokens
    [1, 83, 35, 47, 40, 4]
    """
    rows = list(rows)
    names = ("prompt", column) if any(row.get("prompt") is not None for row in rows) else (column,)
    rows = _checked(rows, Type(" and ".join(names), names), names)
    full = [joined(row["prompt"], row[column]) if len(names) > 1 else row[column] for row in rows]
    if tokenizer.chat_template is None:
        texts = [in_row("row", number, contents, value) for number, value in enumerate(full)]
    else:
        chats = [number for number, value in enumerate(full) if not isinstance(value, str)]
        wanted: list[tuple[int, Row, list, dict]] = [
            (number, rows[number], full[number], {}) for number in chats
        ]
        rendered = dict(zip(chats, conversations.rendered(tokenizer, wanted), strict=True))
        texts = [
            rendered[number].text if number in rendered else value
            for number, value in enumerate(full)
        ]
    encode = framed(tokenizer)
    ids = [in_row("row", number, encode, text) for number, text in enumerate(texts)]
    return [Tokenized(tokens, [True] * len(tokens)) for tokens in ids]


def contents(value: Any) -> str:
    """A text as it is; what messages say, one below the other, for tokenizers without a chat
    template.

    Args:
      value: a text or messages.

    Raises: ValueError for a message without text, such as a call of a tool.

    >>> contents([{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}])
    '1 + 1?\\n2'
    """
    if isinstance(value, str):
        return value
    for message in value:
        if not isinstance(message.get("content"), str):
            raise ValueError(
                f"a message of {message['role']} has no text, and the tokenizer no chat template "
                "that writes it"
            )
    return "\n".join(message["content"] for message in value)


def tokenize_prompts(tokenizer, rows: Iterable[Row]) -> list[list[int]]:
    """Prompts to sample from.  After a user or a tool the assistant's turn is opened; what an
    assistant started goes on.

    Args:
      tokenizer: of `transformers`.
      rows: with `prompt`.

    Returns: a list of tokens a row.

    Raises: ValueError for other rows, messages that end with another role or where there is no
    template.

    >>> from rlhf.tasks import reviews
    >>> len(tokenize_prompts(reviews.tokenizer(), [{"prompt": "the film"}])[0])
    3
    """
    rows = _checked(rows, PROMPT_ONLY, ("prompt",))
    found = _prompts(tokenizer, rows, [row["prompt"] for row in rows])
    conversations.warn(tokenizer, [row["prompt"] for row in rows], found)
    return [prompt.ids for prompt in found]


def tokenize_steps(tokenizer, rows: Iterable[Row], *, separator: str = "\n") -> list[Steps]:
    """Stepwise supervision: every step tokenised by itself, the separator after it, and its label
    at the last token.

    Args:
      tokenizer: of `transformers`.
      rows: with `prompt`, `completions`, `labels`.
      separator: ends a step; its last token is where a process reward model scores.

    Returns: one `Steps` a row.

    Raises: ValueError for other rows, and where a step and its separator have no token.

    >>> from rlhf.tasks import reviews
    >>> tokenize_steps(reviews.tokenizer(), [{"prompt": "the", "completions": ["film is", "great ."], "labels": [True, False]}])
    [Steps(tokens=[1, 83, 35, 47, 40, 4], mask=[False, False, False, True, False, True], labels=[0, 0, 0, 1, 0, 0])]
    """
    encode_start = starting(tokenizer)
    encode = encoder(tokenizer)
    return [
        in_row("row", number, _steps, encode_start, encode, row, separator)
        for number, row in enumerate(checked(rows, STEPWISE))
    ]


def _steps(encode_start: Callable, encode: Callable, row: Row, separator: str) -> Steps:
    tokens = encode_start(row["prompt"])
    ends = {}
    for step, label in zip(row["completions"], row["labels"], strict=True):
        ids = encode(step) + encode(separator)
        if not ids:
            raise ValueError(
                f"a step without tokens, {step!r}; give it text, or a separator that has some"
            )
        tokens = tokens + ids
        ends[len(tokens) - 1] = int(label)
    return Steps(
        tokens,
        [i in ends for i in range(len(tokens))],
        [ends.get(i, 0) for i in range(len(tokens))],
    )


def _checked(rows: Iterable[Row], type: Type, names: tuple[str, ...]) -> list[Row]:
    """Rows of a type, their messages as templates take them."""
    return [
        in_row("row", number, normalised, row, names)
        for number, row in enumerate(checked(rows, type))
    ]


class _Read(NamedTuple):
    """A text and its tokens."""

    text: str
    ids: list[int]
    mask: list[bool]  # which of them are trained
    missed: tuple[str, ...] = ()  # what the template has left out that may be


def _tokenized(
    tokenizer,
    rows: Sequence[Row],
    starts: Sequence[Any],
    full: Sequence[Any],
    assistant_only: bool,
    completion_only: bool,
    imitated: bool = True,
) -> list[Tokenized]:
    """Each row's `full` text or messages, of which `starts` is the prompt, or None."""
    out: list[Tokenized] = []
    merged = 0
    encode = encoder(tokenizer)
    read_full = _read_full(tokenizer, rows, full, assistant_only)
    nothing = _Read("", [], [])
    read_starts = (
        [nothing] * len(rows) if starts and starts[0] is None else _prompts(tokenizer, rows, starts)
    )
    for number, (value, (text, ids, mask, _), start) in enumerate(
        zip(full, read_full, read_starts, strict=True)
    ):
        if not text.startswith(start.text):
            raise ValueError(_rewritten(number, start.text, text))
        # A token across the border: a policy that samples from the prompt never has it before it.
        # The prompt's own ids stay, and the rest is tokenised by itself.
        if ids[: len(start.ids)] != start.ids:
            merged += 1
            apart = start.ids + in_row("row", number, encode, text[len(start.text) :])
            ids, mask = apart, _carried(mask, ids, apart)
        if completion_only:
            mask = [False] * len(start.ids) + mask[len(start.ids) :]
        # Strings get an end token unless they have one; after messages the template wrote what ends
        # a turn.
        ends_itself = ids[len(start.ids) :][-1:] == [tokenizer.eos_token_id]
        ended = [tokenizer.eos_token_id] if isinstance(value, str) and not ends_itself else []
        out.append(Tokenized(ids + ended, mask + [True] * len(ended)))
    _warn_of_borders(merged, len(rows))
    conversations.warn(tokenizer, full, read_full)
    if imitated and any(not isinstance(value, str) for value in full):
        _warn_of_ends(tokenizer, out)
    return out


def _warn_of_borders(merged: int, rows: int) -> None:
    if merged:
        warnings.warn(
            f"{merged} of {rows} rows: the tokenizer merges across the border of prompt and "
            "completion; there the "
            "completion is tokenised by itself; let completions start where a token does, for "
            "example with their space",
            RuntimeWarning,
            stacklevel=4,
        )


def _warn_of_ends(tokenizer, rows: Sequence[Tokenized]) -> None:
    end = tokenizer.eos_token_id
    if not any(
        m and token == end for row in rows for token, m in zip(row.tokens, row.mask, strict=True)
    ):
        warnings.warn(
            f"no row trains the end token {tokenizer.eos_token}, so that a model cannot learn to "
            "stop by it; set "
            "tokenizer.eos_token (--eos_token) to what ends a turn in the template, and put that "
            "inside its generation markers",
            RuntimeWarning,
            stacklevel=4,
        )


def _read_full(
    tokenizer, rows: Sequence[Row], values: Sequence[Any], assistant_only: bool
) -> list[_Read]:
    """Texts and conversations, and which of their tokens are trained."""
    chats = [number for number, value in enumerate(values) if not isinstance(value, str)]
    wanted: list[tuple[int, Row, list, dict]] = [
        (number, rows[number], values[number], {}) for number in chats
    ]
    rendered = dict(
        zip(chats, conversations.rendered(tokenizer, wanted, marked=assistant_only), strict=True)
    )
    encode_start = starting(tokenizer)
    encode = encoder(tokenizer)
    out = []
    for number, value in enumerate(values):
        if number in rendered:
            out.append(_chat(tokenizer, number, encode, rendered[number], assistant_only))
            continue
        if assistant_only:
            raise ValueError(
                "assistant_only needs messages, which say who speaks, but a row holds text; leave "
                "it off"
            )
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no end token; set tokenizer.eos_token (--eos_token)"
            )
        ids = in_row("row", number, encode_start, value)
        out.append(_Read(value, ids, [True] * len(ids)))
    return out


def _chat(tokenizer, number: int, encode: Callable, chat: Rendered, assistant_only: bool) -> _Read:
    ids = in_row("row", number, encode, chat.text)
    if not assistant_only:
        return _Read(chat.text, ids, [True] * len(ids), chat.missed)
    offsets = tokenizer(chat.text, add_special_tokens=False, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    mask = []
    # A span beyond the text ends the list, so that the loop below needs no case for its end.
    spans = iter([*chat.generations, (len(chat.text) + 1,) * 2])
    span_start, span_end = next(spans)
    # Tokens and spans are both in the text's order: one pass over the two.
    for start, stop in offsets:
        while start >= span_end:
            span_start, span_end = next(spans)
        mask.append(stop > span_start)
    return _Read(chat.text, ids, mask, chat.missed)


def _prompts(tokenizer, rows: Sequence[Row], prompts: Sequence[Any]) -> list[_Read]:
    """Text and tokens of prompts, as a policy gets them."""
    wanted: list[tuple[int, Row, list, dict]] = []
    for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        if not isinstance(prompt, str):
            # A prompt that ends with the assistant is a turn to go on with, not one to follow.
            goes_on = in_row("row", number, conversations.goes_on, prompt)
            options = (
                {"continue_final_message": True} if goes_on else {"add_generation_prompt": True}
            )
            wanted.append((number, row, prompt, options))
    rendered = dict(
        zip(
            (number for number, *_ in wanted),
            conversations.rendered(tokenizer, wanted),
            strict=True,
        )
    )
    encode_start = starting(tokenizer)
    encode = encoder(tokenizer)
    out = []
    for number, prompt in enumerate(prompts):
        chat = rendered.get(number, Rendered(prompt))
        ids = in_row("row", number, encode if number in rendered else encode_start, chat.text)
        out.append(_Read(chat.text, ids, [], chat.missed))
    return out


def _carried(mask: list[bool], old: list[int], new: list[int]) -> list[bool]:
    """The mask of `old` tokens for `new` ones of the same text: what differs between equal ends is
    trained if any of it was.
    """

    def equal(pairs):
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    head = equal(zip(old, new, strict=False))
    # Limited, so that head and tail do not overlap where the same token is repeated.
    tail = min(
        equal(zip(reversed(old), reversed(new), strict=False)), min(len(old), len(new)) - head
    )
    between = any(mask[head : len(old) - tail])
    return mask[:head] + [between] * (len(new) - head - tail) + mask[len(old) - tail :]


def _rewritten(number: int, before: str, text: str) -> str:
    shared = sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, text, strict=False))
    )
    return (
        f"row {number}: the chat template writes the prompt otherwise when its completion follows, "
        f"{before[shared:]!r:.60} has "
        f"become {text[shared:]!r:.60}; use a template that keeps what came before, or messages "
        "without a prompt"
    )
