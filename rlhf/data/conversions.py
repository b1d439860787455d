"""From one type of data set to another: functions of a row, which keep the columns that have no
part in it.

Map them over rows: `[convert(row) for row in rows]`, `(convert(row) for row in stream)`, or
`each(rows, convert)`, which names the row where one is refused.  Where a row becomes several:
`[new for row in rows for new in unpaired(row)]`.
"""

from itertools import takewhile
from typing import Any

from rlhf.data import types
from rlhf.data.types import Row, Type, columns, is_messages, problem_of, type_of

ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's, where they are not called the same


def renamed(row: Row, **names: str) -> Row:
    """A row whose columns have other names, old to new.

    Args:
      row: a dictionary.
      names: `old="new"`.

    Raises: ValueError where an old name is missing, or a new one is taken.

    >>> renamed({"question": "1 + 1?", "answer": "2"}, question="prompt", answer="completion")
    {'prompt': '1 + 1?', 'completion': '2'}
    """
    # A column that is null does not take the name.
    free = {new for new in names.values() if new not in names and row.get(new) is None}
    row = _without(row, *free)
    for old, new in names.items():
        if old not in row or (new in row and new not in names):
            problem = "has no such column" if old not in row else f"has a {new} already"
            raise ValueError(
                f"{old} cannot become {new}: a row {problem}; its columns are {', '.join(row):.200}"
            )
    return {names.get(name, name): value for name, value in row.items()}


def as_messages(row: Row) -> Row:
    """A conversational row of a standard one: the prompt is the user's turn, every completion one
    of the assistant's.

    Args:
      row: of any type with a prompt but stepwise supervision.

    Raises: ValueError for rows of other types.

    >>> as_messages({"prompt": "1 + 1?", "solution": "2"})
    {'prompt': [{'role': 'user', 'content': '1 + 1?'}], 'solution': '2'}
    """
    row, kind = _typed(row)
    if kind in (types.LANGUAGE_MODELLING, types.IMPLICIT_PREFERENCE, types.STEPWISE):
        raise _refused(kind, "messages", "who speaks where is not known")
    return row | {
        name: [{"role": "user" if name == "prompt" else "assistant", "content": row[name]}]
        for name in kind.texts
        if isinstance(row[name], str)
    }


def from_sharegpt(row: Row) -> Row:
    """ShareGPT's `from`, `value` become `role`, `content`, and its column `conversations` becomes
    `messages`.

    Args:
      row: a dictionary; columns that hold no such turns stay as they are.

    Raises: ValueError where a row has both columns, `conversations` and `messages`.

    >>> from_sharegpt({"conversations": [{"from": "human", "value": "Hello"}]})
    {'messages': [{'role': 'user', 'content': 'Hello'}]}
    """
    row = {
        name: [_turn(turn) for turn in value] if _is_sharegpt(value) else value
        for name, value in row.items()
    }
    return renamed(row, conversations="messages") if row.get("conversations") is not None else row


def extract_prompt(row: Row) -> Row:
    """Implicit to explicit: the longest start that `chosen` and `rejected` share becomes the
    `prompt`.

    Messages are compared in full.  Strings are cut where a word starts, its space with the
    completions, and each keeps a word.

    Args:
      row: with `chosen` and `rejected`; a `prompt` that is a string beside messages that repeat it,
        as in UltraFeedback, is replaced.

    Raises: ValueError where they have no common start or are equal, one has nothing after it, or
    the row has an explicit prompt, or one that the messages do not repeat.

    >>> extract_prompt({"chosen": "The sky is blue.", "rejected": "The sky is black."})
    {'chosen': ' blue.', 'rejected': ' black.', 'prompt': 'The sky is'}
    """
    if row.get("chosen") is None or row.get("rejected") is None:
        raise _refused(
            type_of(row), "preference with a prompt of its own", "it has no chosen and rejected"
        )
    if problem := problem_of(types.IMPLICIT_PREFERENCE, row):
        raise ValueError(problem)
    chosen = row["chosen"]
    rejected = row["rejected"]
    prompt = row.get("prompt")
    if prompt is not None and not (is_messages(chosen) and isinstance(prompt, str)):
        raise ValueError(
            "a row has a prompt already; leave it out if chosen and rejected begin with it, or "
            "extract none"
        )
    # Characters of strings, or messages.
    shared = sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
    )
    # Within a word, " blue" and " black" would leave " bl" to the prompt, which tokenises
    # otherwise.
    cut = _word_border(chosen, shared) if isinstance(chosen, str) else shared
    if chosen == rejected or not 0 < cut < min(len(chosen), len(rejected)):
        raise ValueError(
            "chosen and rejected must share a beginning, their prompt, and each go on in its own "
            "way, but are "
            f"{chosen!r:.80} and {rejected!r:.80}; remove the row, or give it a prompt"
        )
    if prompt is not None and not any(
        prompt.strip() in _text_of(message) for message in chosen[:cut]
    ):
        raise ValueError(
            f"the prompt {prompt!r:.80} is in none of the messages that chosen and rejected begin "
            f"with, {chosen[:cut]!r:.80}; "
            "make it a list of messages, or leave it out"
        )
    return row | {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}


def implicit_prompt(row: Row) -> Row:
    """Explicit to implicit: `chosen` and `rejected` start with the prompt.

    Args:
      row: preference, explicit prompt.

    Raises: ValueError for rows of other types.

    >>> implicit_prompt({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."})
    {'chosen': 'The sky is blue.', 'rejected': 'The sky is green.'}
    """
    row, kind = _typed(row)
    if kind != types.PREFERENCE:
        raise _refused(
            kind,
            "an implicit prompt",
            "it needs prompt, chosen and rejected, and no others of its type",
        )
    return _without(row, "prompt") | {
        side: joined(row["prompt"], row[side]) for side in ("chosen", "rejected")
    }


def unpaired(row: Row, *, separator: str = "\n") -> list[Row]:
    """Preference to two rows with a label, chosen True and rejected False; stepwise to one, True
    where all of its steps are.

    Args:
      row: preference, its prompt explicit or implicit, or stepwise supervision.
      separator: between steps.

    Raises: ValueError for rows of other types.

    >>> [new["label"] for new in unpaired({"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"})]
    [True, False]
    """
    row, kind = _typed(row)
    if kind == types.STEPWISE:
        return [prompt_completion(row, separator=separator) | {"label": all(row["labels"])}]
    if kind not in (types.PREFERENCE, types.IMPLICIT_PREFERENCE):
        raise _refused(kind, "unpaired preference", "it has no verdict on its completions")
    row = row if kind == types.PREFERENCE else extract_prompt(row)
    rest = _without(row, "chosen", "rejected")
    return [
        rest | {"completion": row[side], "label": side == "chosen"}
        for side in ("chosen", "rejected")
    ]


def prompt_completion(row: Row, *, separator: str = "\n") -> Row:
    """Rows of a prompt and the completion to imitate: the chosen one, or all steps in one.

    Labels are not heeded, as there is one row for every row: leave out the bad ones first,
    `[prompt_completion(row) for row in rows if row["label"]]`.

    Args:
      row: prompt-completion, preference, triple, unpaired preference or stepwise supervision.
      separator: between steps.

    Raises: ValueError for rows of other types.

    >>> prompt_completion({"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"})
    {'prompt': '1 + 1 =', 'completion': ' 2'}
    """
    row, kind = _typed(row)
    if kind == types.IMPLICIT_PREFERENCE:
        return prompt_completion(extract_prompt(row))
    if kind in (types.PREFERENCE, types.TRIPLE):
        completion = row["chosen"]
    elif kind in (types.PROMPT_COMPLETION, types.UNPAIRED_PREFERENCE):
        completion = row["completion"]
    elif kind == types.STEPWISE:
        completion = separator.join(row["completions"])
    else:
        raise _refused(kind, "prompt-completion", "it has no completion")
    return {"prompt": row["prompt"], "completion": completion} | _without(row, *columns(kind, row))


def prompt_only(row: Row) -> Row:
    """The prompt, without completions and labels.

    Args:
      row: of any type with a prompt, or with `chosen` and `rejected` that share one.

    Raises: ValueError for rows of other types.

    >>> prompt_only({"prompt": "1 + 1 =", "completion": " 2", "id": 7})
    {'prompt': '1 + 1 =', 'id': 7}
    """
    row, kind = _typed(row)
    return row if kind == types.PROMPT_ONLY else _without(prompt_completion(row), "completion")


def language_modelling(row: Row, *, separator: str = "\n") -> Row:
    """Prompt and completion in one: `text`, or `messages`.

    Args:
      row: prompt-completion, preference, triple, unpaired preference or stepwise supervision.
      separator: between steps.

    Raises: ValueError for rows of other types.

    >>> language_modelling({"prompt": "1 + 1 =", "completion": " 2"})
    {'text': '1 + 1 = 2'}
    """
    row = prompt_completion(row, separator=separator)
    full = joined(row["prompt"], row["completion"])
    return {"text" if isinstance(full, str) else "messages": full} | _without(
        row, "prompt", "completion"
    )


def joined(prompt: Any, completion: Any) -> Any:
    """A prompt and what follows: two strings, or messages, where an assistant that goes on speaks
    in one message.

    Args:
      prompt, completion: both strings, or both lists of messages.

    >>> joined([{"role": "assistant", "content": "1 + 1 ="}], [{"role": "assistant", "content": " 2"}])
    [{'role': 'assistant', 'content': '1 + 1 = 2'}]
    """
    if isinstance(prompt, str) or not prompt or not completion or prompt[-1]["role"] != "assistant":
        return prompt + completion
    last = prompt[-1]
    first = completion[0]
    if first["role"] != "assistant" or not (
        isinstance(last.get("content"), str) and isinstance(first.get("content"), str)
    ):
        return prompt + completion
    return [
        *prompt[:-1],
        last | first | {"content": last["content"] + first["content"]},
        *completion[1:],
    ]


def repeats_prompt(row: Row) -> bool:
    """Whether a row has UltraFeedback's form: the prompt a string, and chosen and rejected messages
    that start with it.

    >>> turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    >>> repeats_prompt({"prompt": "1 + 1?", "chosen": turns, "rejected": turns[:1]})
    True
    """
    sides = [row.get("chosen"), row.get("rejected")]

    # Sides that start with an assistant continue the prompt instead of repeating it.
    def has_prompt(side):
        return is_messages(side) and side[0]["role"] != "assistant"

    return isinstance(row.get("prompt"), str) and all(map(has_prompt, sides))


def _text_of(message: Row) -> str:
    """A message's text, also where its content is a list of parts."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    return "\n".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))


def _typed(row: Row) -> tuple[Row, Type]:
    """A row and its type, its prompt in one place.  Raises: ValueError where its columns do not
    hold what they should.
    """
    if repeats_prompt(row):
        row = extract_prompt(row)
    kind = type_of(row)
    if problem := problem_of(kind, row):
        raise ValueError(problem)
    return row, kind


def _without(row: Row, *names: str) -> Row:
    return {name: value for name, value in row.items() if name not in names}


def _refused(kind: Type, target: str, reason: str) -> ValueError:
    return ValueError(f"a {kind.name} row cannot be converted to {target}: {reason}")


def _word_border(text: str, shared: int) -> int:
    """The last place up to `shared` where a word starts, before its space if it has one."""
    while shared and not text[shared - 1].isspace():
        shared -= 1
    return shared - (text[shared - 1 : shared] == " ")


def _is_sharegpt(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(t, dict) and t.keys() >= {"from", "value"} for t in value)
    )


def _turn(turn: Row) -> Row:
    role = ROLES.get(turn["from"], turn["from"])
    return {"role": role, "content": turn["value"]} | _without(turn, "from", "value")
