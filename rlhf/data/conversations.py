"""Rows of messages as text: rendered by the template, and held against what they say.

Templates leave turns out without a word: system messages, the second of two user turns, calls of
tools they do not know.  Every content must stand in the text.  As a short one, "no", stands in many
texts by chance, one conversation of every form (roles and keys) is also rendered with words in its
place that are nowhere else.
"""

import json
import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from rlhf.data import messages as of_messages
from rlhf.data.render import Conversation, render
from rlhf.data.types import Row
from rlhf.fields import documented
from rlhf.rollouts.stopping import special_tokens
from rlhf.rollouts.text import in_row

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# What a template, or the function that applies it, is given by us alone: a row that sets one of
# these would change what the tokens mean.
OURS = (
    "messages",
    "conversation",
    "conversations",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "padding",
    "truncation",
    "max_length",
    "tokenizer_kwargs",
)
REASONING = ("reasoning_content", "reasoning", "thinking")
CURE = "change the row, or give the model a template that takes it"


@documented
class Rendered(NamedTuple):
    """A conversation as text.

    Attributes:
      text: what the template made of it.
      generations: where assistants speak, if the template marks it.
      missed: what the template has left out that may be: tools, thinking.
    """

    text: str
    generations: Sequence[tuple[int, int]] = ()
    missed: tuple[str, ...] = ()


def goes_on(prompt: list[dict[str, Any]]) -> bool:
    """Whether the assistant has started the turn that follows.  Raises: ValueError after another
    role than user and tool.
    """
    role = prompt[-1]["role"]
    if role not in ("user", "assistant", *of_messages.TOOL_ROLES):
        raise ValueError(
            f"a prompt ends with the role {role!r}, but must with user, tool, or assistant to be "
            "continued"
        )
    return role == "assistant"


def rendered(
    tokenizer, wanted: Sequence[tuple[int, Row, list, dict]], *, marked: bool = False
) -> list[Rendered]:
    """Conversations through the tokenizer's template, or their row's own.

    Args:
      tokenizer: of `transformers`.
      wanted: number of the row, the row, its messages as `messages.normalised` returns them, and
        options of `transformers`.
      marked: whether the template must say what assistants say.

    Raises: ValueError, with the row's number, where there is no template, it fails or takes too
    long, or it leaves out what a message says.
    """
    requested = [
        in_row("row", number, _conversation, tokenizer, *rest, marked) for number, *rest in wanted
    ]
    try:
        found = _rendered(requested)
    except (RecursionError, ValueError) as error:
        # Raised by JSON, which does not say in which conversation: each is tried by itself.
        number = next(
            row for (row, *_), one in zip(wanted, requested, strict=True) if not _is_json(one)
        )
        raise ValueError(
            f"row {number}: its messages cannot be given to a template ({error}); simplify them"
        ) from None
    # Rendered before the loop, in one batch: one example of each form, with words in its place.
    words = _words(requested)
    out = []
    # Not strict: rendering stops at a conversation that takes too long, which is then the last.
    for (number, *_), conversation, (text, generations, failure) in zip(
        wanted, requested, found, strict=False
    ):
        if failure is not None:
            raise ValueError(f"row {number}: the chat template fails on it: {failure}; {CURE}")
        lost = of_messages.missing(conversation.messages, text)
        if lost := lost or words.get(_form(conversation)):
            raise ValueError(f"row {number}: the chat template leaves out {lost}; {CURE}")
        out.append(Rendered(text, generations, _missed(conversation, text)))
    return out


def warn(tokenizer, values: Sequence[Any], found: Sequence[Any]) -> None:
    """RuntimeWarnings of what templates have left out that may be, and of messages that hold
    special tokens.

    Args:
      values: texts and messages.
      found: for each a `Rendered`, or another tuple with `missed`.
    """
    for what in dict.fromkeys(what for one in found for what in one.missed):
        rows = [number for number, one in enumerate(found) if what in one.missed]
        warnings.warn(
            f"{len(rows)} of {len(found)} rows, the first row {rows[0]}: the chat template leaves "
            f"out {what}, so that no model "
            "sees it; give the model a template that writes it, or leave it out",
            RuntimeWarning,
            stacklevel=4,
        )
    # "(?!)" matches nothing: for tokenizers without special tokens.
    special = re.compile(
        "|".join(map(re.escape, filter(None, special_tokens(tokenizer).values()))) or "(?!)"
    )

    def contents(value):
        return (m["content"] for m in value if isinstance(m.get("content"), str))

    said = (
        (number, text)
        for number, value in enumerate(values)
        if not isinstance(value, str)
        for text in contents(value)
    )
    hits = {number: hit[0] for number, text in said if (hit := special.search(text))}
    if hits:
        number, token = next(iter(hits.items()))
        warnings.warn(
            f"{len(hits)} of {len(values)} rows have messages that hold special tokens, such as "
            f"{token} in row "
            f"{number}; a model reads those as the template's own; remove them unless they are "
            "meant",
            RuntimeWarning,
            stacklevel=4,
        )


def _conversation(tokenizer, row: Row, messages: list, options: dict, marked: bool) -> Conversation:
    variables = of_messages.variables(row)
    if ours := [name for name in OURS if name in variables]:
        raise ValueError(
            f"chat_template_kwargs has {', '.join(ours)}, which is not the template's; leave it out"
        )
    template = variables.pop("chat_template", None)
    tools = of_messages.tools(row)
    if tokenizer.chat_template is None and template is None:
        raise ValueError(
            "the tokenizer has no chat template for rows of messages; set tokenizer.chat_template, "
            "or give text"
        )
    template = tokenizer.get_chat_template(template, tools)
    if not isinstance(template, str):
        raise ValueError(f"the chat template must be text, but is {template!r:.60}")
    if marked and not GENERATION.search(template):
        raise ValueError(
            "assistant_only needs a chat template that marks what assistants say by {% generation "
            "%} and {% endgeneration %}, "
            "but the tokenizer's does not; set tokenizer.chat_template to one that does, or train "
            "completions of a prompt"
        )
    return Conversation(
        template,
        messages,
        {
            **tokenizer.special_tokens_map,
            **variables,
            "tools": tools,
            "return_assistant_tokens_mask": marked,
            **options,
        },
    )


def _rendered(requested: Sequence[Conversation]) -> list:
    """What `render` returns; arguments of calls as text where the template takes them in no other
    way.
    """
    # Objects first, as most templates want them; the few others are found by what they made of
    # them.
    found = render(requested)
    again = [
        i
        for i, (one, rendering) in enumerate(zip(requested, found, strict=False))
        if _joins_arguments(one, rendering.text, rendering.error)
    ]
    texts = [
        requested[i]._replace(messages=of_messages.with_argument_texts(requested[i].messages))
        for i in again
    ]
    for i, rendering in zip(again, render(texts), strict=False):
        found[i] = rendering if rendering.error is None else found[i]
    return found


def _is_json(conversation: Conversation) -> bool:
    try:
        json.dumps([conversation.messages, conversation.options], default=str)
    except (RecursionError, ValueError):
        return False
    return True


def _joins_arguments(conversation: Conversation, text: str, error: str | None) -> bool:
    """Whether the template may want arguments as text: it fails on objects, or writes them as
    Python does.
    """
    calls = [call for message in conversation.messages for call in of_messages.calls(message)]
    objects = [call["arguments"] for call in calls if isinstance(call.get("arguments"), dict)]
    return bool(objects) and (
        error is not None or any(str(a) in text and str(a) != json.dumps(a) for a in objects)
    )


def _form(conversation: Conversation) -> str:
    """Equal for conversations of which a template should leave out the same turns."""
    shape = [
        (m["role"], sorted(m), bool(str(m.get("content", "")).strip()))
        for m in conversation.messages
    ]
    options = conversation.options | {"tools": bool(conversation.options["tools"])}
    return json.dumps([conversation.template, shape, options], default=str, sort_keys=True)


def _words(requested: Sequence[Conversation]) -> dict[str, str]:
    """What a template leaves out of conversations, by their form; {} where nothing."""
    # Reversed, so that of each form the first conversation stays.
    examples = {_form(one): one for one in reversed(requested)}
    messages = [
        [_in_words(number, m) for number, m in enumerate(one.messages)] for one in examples.values()
    ]
    found = _rendered(
        [one._replace(messages=new) for one, new in zip(examples.values(), messages, strict=True)]
    )
    lost = {}
    for (form, one), new, rendering in zip(examples.items(), messages, found, strict=False):
        left_out = rendering.error is None and of_messages.missing(new, rendering.text)
        if left_out:
            found_at = re.search("message ([0-9]+)", left_out)
            number = int(found_at[1]) if found_at else 0
            lost[form] = (
                f"message {number} of role {new[number]['role']!r}, "
                f"{one.messages[number].get('content')!r:.60}"
            )
    return lost


def _in_words(number: int, message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return (
        message | {"content": f"q{number}zq7"}
        if isinstance(content, str) and content.strip()
        else message
    )


def _missed(conversation: Conversation, text: str) -> tuple[str, ...]:
    """What a template has left out that need not be there."""
    names = [
        (tool.get("function") or tool).get("name") for tool in conversation.options["tools"] or []
    ]
    missed = (
        ["the tools"] if any(isinstance(name, str) and name not in text for name in names) else []
    )
    # Thinking of earlier turns is dropped by design in templates for reasoning models; that of the
    # last turn is what a model is trained to write.
    speakers = [
        message for message in conversation.messages if message["role"] in ("user", "assistant")
    ]
    last = speakers[-1] if speakers and speakers[-1]["role"] == "assistant" else {}
    thoughts = [last[name] for name in REASONING if isinstance(last.get(name), str)]
    return (
        *missed,
        *(["the last turn's thinking"] if any(t.strip() not in text for t in thoughts) else []),
    )
