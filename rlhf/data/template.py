"""Rows of text and messages as token ids, through a `transformers` tokenizer and its chat template.

The ids of a prompt are exactly those from which a policy samples: prompt and completion are tokenised together, and where the
tokenizer would merge across their border, the completion is tokenised by itself (a warning says in how many rows).  Strings
get an end token; after messages, the template writes what ends a turn.

A row's `tools` (a list of JSON schemas, or one as a JSON string) and `chat_template_kwargs` go to the template.
"""

import json
import re
import warnings
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

from rlhf.data.conversions import joined
from rlhf.data.tokenized import Steps, Tokenized
from rlhf.data.types import LANGUAGE_MODELLING, PROMPT_ONLY, STEPWISE, Row, Type, checked

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def tokenize_texts(tokenizer, rows: Iterable[Row], *, assistant_only: bool = False) -> list[Tokenized]:
    """Language modelling: every token is trained, or what assistants say.

    Args:
      tokenizer: of `transformers`.
      rows: with `text`, or `messages`.
      assistant_only: for messages: train what the template puts between `{% generation %}` and `{% endgeneration %}` alone.

    Returns: one `Tokenized` a row.  Rows without a trained token are for `truncate` to remove.

    Raises: ValueError for other rows, text where the tokenizer has no end token, messages where it has no template, and
      `assistant_only` where the rows are text or the template marks no generation.
    Warns: RuntimeWarning where no row of messages trains the tokenizer's end token.

    >>> from rlhf.tasks import reviews
    >>> tokenize_texts(reviews.tokenizer(), [{"text": "the film"}])[0].mask
    [True, True, True, True]
    """
    rows = list(checked(rows, LANGUAGE_MODELLING))
    whole = [row.get("messages", row.get("text")) for row in rows]
    return _tokenized(tokenizer, rows, [None] * len(rows), whole, assistant_only, False)


def tokenize_completions(
    tokenizer, rows: Iterable[Row], *, column: str = "completion", assistant_only: bool = False, completion_only: bool = True
) -> list[Tokenized]:
    """A prompt and what follows: the completion is trained, or what assistants say in it.

    Args:
      tokenizer: of `transformers`.
      rows: with `prompt` and `column`.
      column: `completion`; `chosen`, `rejected`, `reference` for the sides of preferences.
      assistant_only: as in `tokenize_texts`.
      completion_only: False: the prompt is trained too.

    Returns: one `Tokenized` a row.

    Raises: as `tokenize_texts`; ValueError where a template writes a prompt otherwise when its completion follows, since then
      nobody can say which tokens are the completion's.
    Warns: RuntimeWarning as `tokenize_texts`, and where the tokenizer merges across the border.

    >>> from rlhf.tasks import reviews
    >>> tokenize_completions(reviews.tokenizer(), [{"prompt": "the film", "completion": " is great ."}])[0].mask
    [False, False, False, True, True, True, True]
    """
    rows = list(checked(rows, Type(f"prompt and {column}", ("prompt", column))))
    starts, whole = [row["prompt"] for row in rows], [joined(row["prompt"], row[column]) for row in rows]
    return _tokenized(tokenizer, rows, starts, whole, assistant_only, completion_only)


def tokenize_prompts(tokenizer, rows: Iterable[Row]) -> list[list[int]]:
    """Prompts to sample from.  After a user or a tool the assistant's turn is opened; what an assistant began goes on.

    Args:
      tokenizer: of `transformers`.
      rows: with `prompt`.

    Returns: a list of tokens a row.

    Raises: ValueError for other rows, messages that end with another role or where there is no template.

    >>> from rlhf.tasks import reviews
    >>> len(tokenize_prompts(reviews.tokenizer(), [{"prompt": "the film"}])[0])
    3
    """
    return [_prompt(tokenizer, row, row["prompt"])[1] for row in checked(rows, PROMPT_ONLY)]


def tokenize_steps(tokenizer, rows: Iterable[Row], *, separator: str = "\n") -> list[Steps]:
    """Stepwise supervision: every step tokenised by itself, the separator after it, and its label at the last token.

    Args:
      tokenizer: of `transformers`.
      rows: with `prompt`, `completions`, `labels`.
      separator: ends a step; its last token is where a process reward model judges.

    Returns: one `Steps` a row.

    Raises: ValueError for other rows, and where a step and its separator have no token.

    >>> from rlhf.tasks import reviews
    >>> tokenize_steps(reviews.tokenizer(), [{"prompt": "the", "completions": ["film is", "great ."], "labels": [True, False]}])
    [Steps(tokens=[1, 83, 35, 47, 40, 4], mask=[False, False, False, True, False, True], labels=[0, 0, 0, 1, 0, 0])]
    """
    return [_steps(tokenizer, number, row, separator) for number, row in enumerate(checked(rows, STEPWISE))]


def _steps(tokenizer, number: int, row: Row, separator: str) -> Steps:
    tokens = _text_ids(tokenizer, row["prompt"])
    ends = {}
    for step, label in zip(row["completions"], row["labels"], strict=True):
        ids = _ids(tokenizer, step) + _ids(tokenizer, separator)
        if not ids:
            raise ValueError(f"row {number} has a step without tokens, {step!r}; give it text, or a separator that has some")
        tokens = tokens + ids
        ends[len(tokens) - 1] = int(label)
    return Steps(tokens, [i in ends for i in range(len(tokens))], [ends.get(i, 0) for i in range(len(tokens))])


def _tokenized(
    tokenizer, rows: Sequence[Row], starts: Sequence[Any], whole: Sequence[Any], assistant_only: bool, completion_only: bool
) -> list[Tokenized]:
    """Each row's `whole`, which begins with its start."""
    out, merged = [], 0
    for number, (row, start, value) in enumerate(zip(rows, starts, whole, strict=True)):
        text, ids, mask = (_text if isinstance(value, str) else _chat)(tokenizer, row, value, assistant_only)
        before, start_ids = ("", []) if start is None else _prompt(tokenizer, row, start)
        if not text.startswith(before):
            raise ValueError(_rewritten(number, before, text))
        if ids[: len(start_ids)] != start_ids:
            merged += 1
            apart = start_ids + _ids(tokenizer, text[len(before) :])
            ids, mask = apart, _carried(mask, ids, apart)
        if completion_only:
            mask = [False] * len(start_ids) + mask[len(start_ids) :]
        ended = [tokenizer.eos_token_id] if isinstance(value, str) and not text.endswith(tokenizer.eos_token) else []
        out.append(Tokenized(ids + ended, mask + [True] * len(ended)))
    _warn(tokenizer, out, merged, any(not isinstance(value, str) for value in whole))
    return out


def _warn(tokenizer, rows: Sequence[Tokenized], merged: int, conversational: bool) -> None:
    if merged:
        warnings.warn(
            f"{merged} of {len(rows)} rows: the tokenizer merges across the border of prompt and completion; there the "
            "completion is tokenised by itself; let completions begin where a token does, for example with their space",
            RuntimeWarning,
            stacklevel=4,
        )
    ends = lambda row: any(m and token == tokenizer.eos_token_id for token, m in zip(row.tokens, row.mask, strict=True))
    if conversational and not any(map(ends, rows)):
        warnings.warn(
            f"no row trains the end token {tokenizer.eos_token}, so that a model cannot learn to stop by it; set "
            "tokenizer.eos_token to what ends a turn in the template, and put that inside its generation markers",
            RuntimeWarning,
            stacklevel=4,
        )


def _text(tokenizer, row: Row, text: str, assistant_only: bool) -> tuple[str, list[int], list[bool]]:
    if assistant_only:
        raise ValueError("assistant_only needs messages, which say who speaks, but a row holds text; leave it off")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token; set tokenizer.eos_token")
    ids = _text_ids(tokenizer, text)
    return text, ids, [True] * len(ids)


def _chat(tokenizer, row: Row, messages: list, assistant_only: bool) -> tuple[str, list[int], list[bool]]:
    """Text, tokens, and which of them are trained."""
    options = _options(tokenizer, row)
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    if not assistant_only:
        ids = _ids(tokenizer, text)
        return text, ids, [True] * len(ids)
    if not GENERATION.search(tokenizer.get_chat_template(options.get("chat_template"), options["tools"])):
        raise ValueError(
            "assistant_only needs a chat template that marks what assistants say by {% generation %} and {% endgeneration %}, "
            "but the tokenizer's does not; set tokenizer.chat_template to one that does, or train completions of a prompt"
        )
    marked = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **options)
    return text, marked["input_ids"], [bool(m) for m in marked["assistant_masks"]]


def _prompt(tokenizer, row: Row, prompt: Any) -> tuple[str, list[int]]:
    """Text and tokens of a prompt, as a policy gets them."""
    if isinstance(prompt, str):
        return prompt, _text_ids(tokenizer, prompt)
    role = prompt[-1]["role"]
    if role not in ("user", "tool", "assistant"):
        raise ValueError(f"a prompt ends with the role {role!r}, but must with user, tool, or assistant to be continued")
    goes_on = role == "assistant"
    options = _options(tokenizer, row) | {"continue_final_message": goes_on, "add_generation_prompt": not goes_on}
    text = tokenizer.apply_chat_template(prompt, tokenize=False, **options)
    return text, _ids(tokenizer, text)


def _options(tokenizer, row: Row) -> dict[str, Any]:
    """What a row wants of the template."""
    options = dict(row.get("chat_template_kwargs") or {})
    if tokenizer.chat_template is None and "chat_template" not in options:
        raise ValueError("the tokenizer has no chat template for rows of messages; set tokenizer.chat_template, or give text")
    tools = row.get("tools") or None
    return options | {"tools": json.loads(tools) if isinstance(tools, str) else tools}


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _text_ids(tokenizer, text: str) -> list[int]:
    """With the tokenizer's own start token, but not with its end token: more may follow."""
    ids = tokenizer(text)["input_ids"]
    added = (
        tokenizer.eos_token_id is not None and ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(tokenizer.eos_token)
    )
    return ids[:-1] if added else ids


def _carried(mask: list[bool], old: list[int], new: list[int]) -> list[bool]:
    """The mask of `old` tokens for `new` ones of the same text: what differs between equal ends is trained if any of it was."""
    equal = lambda pairs: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    head = equal(zip(old, new, strict=False))
    tail = min(equal(zip(reversed(old), reversed(new), strict=False)), min(len(old), len(new)) - head)
    between = any(mask[head : len(old) - tail])
    return mask[:head] + [between] * (len(new) - head - tail) + mask[len(old) - tail :]


def _rewritten(number: int, before: str, text: str) -> str:
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, text, strict=False)))
    return (
        f"row {number}: the chat template writes the prompt otherwise when its completion follows, {before[shared:]!r:.60} has "
        f"become {text[shared:]!r:.60}; use a template that keeps what came before, or messages without a prompt"
    )
