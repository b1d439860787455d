"""The types of data sets that post-training reads: which columns their rows have.

Rows are dictionaries.  A text column is standard (a string) or conversational (messages
`{"role": …, "content": …}`), all of a row's alike.  Any further columns may stand beside: `tools`
and `chat_template_kwargs` for the chat template, others for reward functions.  A column that is
None is one that a row does not have.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from rlhf.data.values import plain_row
from rlhf.fields import documented

Row = dict[str, Any]


@documented
class Type(NamedTuple):
    """A type of data set by the columns that it needs.

    Attributes:
      name: of the type.
      texts: columns of a string, or of messages.
      labels: the others.
    """

    name: str
    texts: tuple[str, ...]
    labels: tuple[str, ...] = ()


# Its conversational column is called messages.
LANGUAGE_MODELLING = Type("language modelling", ("text",))
PROMPT_ONLY = Type("prompt-only", ("prompt",))
PROMPT_COMPLETION = Type("prompt-completion", ("prompt", "completion"))
PREFERENCE = Type("preference", ("prompt", "chosen", "rejected"))
# Both columns start with the prompt.
IMPLICIT_PREFERENCE = Type("implicit-prompt preference", ("chosen", "rejected"))
UNPAIRED_PREFERENCE = Type("unpaired preference", ("prompt", "completion"), ("label",))
STEPWISE = Type("stepwise supervision", ("prompt",), ("completions", "labels"))  # standard only
TRIPLE = Type("triple", ("prompt", "chosen", "rejected", "reference"))
# A type stands before those whose columns it has too: the first that fits is the right one.
TYPES = (
    TRIPLE,
    PREFERENCE,
    IMPLICIT_PREFERENCE,
    UNPAIRED_PREFERENCE,
    STEPWISE,
    PROMPT_COMPLETION,
    LANGUAGE_MODELLING,
    PROMPT_ONLY,
)


def columns(type: Type, row: Row) -> tuple[str, ...]:
    """The columns that a type needs of a row: those of its messages where it has `messages`.

    >>> columns(LANGUAGE_MODELLING, {"messages": []}), columns(UNPAIRED_PREFERENCE, {})
    (('messages',), ('prompt', 'completion', 'label'))
    """
    return (
        ("messages",)
        if type == LANGUAGE_MODELLING and row.get("messages") is not None
        else type.texts + type.labels
    )


def type_of(row: Row) -> Type:
    """The type of a row, by its columns: of several that fit, the one that needs most.

    Args:
      row: a dictionary; more columns than needed do no harm.

    Raises: ValueError where the columns fit no type.

    >>> type_of({"prompt": "1 + 1 =", "completion": " 2", "id": 7}).name
    'prompt-completion'
    """
    for type in TYPES:
        if not _missing(type, row):
            return type
    known = "; ".join(f"{type.name}: {', '.join(columns(type, row))}" for type in TYPES)
    raise ValueError(
        f"a row has the columns {_names(row)}, which fit no type; rename them to those of one "
        f"({known})"
    )


def is_messages(value: Any) -> bool:
    """Whether a value is a conversation: a list of dictionaries with a role each, at least one.

    >>> is_messages([{"role": "user", "content": "hello"}]), is_messages("hello")
    (True, False)
    """
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and "role" in m for m in value)
    )


def checked(rows: Iterable[Row], type: Type) -> Iterator[Row]:
    """The same rows one by one, each held against a type when it comes by.

    Columns, and fields of objects, that are None are left out, as the readers of files do; labels 1
    and 0 become bools.

    Args:
      rows: a list, a stream, or a `datasets.Dataset`.
      type: what they must be; rows of a type with more columns pass.

    Raises: ValueError, on the row in question, where a column is missing, text is neither a string
    nor messages or both kinds mix, or a label is neither True, False, 1 nor 0.

    >>> len(list(checked([{"prompt": "1 + 1 ="}], PROMPT_ONLY)))
    1
    """
    for number, given in enumerate(rows):
        missing = _missing(type, given)
        if missing:
            raise ValueError(
                f"{type.name} rows need the columns {', '.join(columns(type, given))}, but row "
                f"{number} has {_names(given)}: "
                f"{', '.join(missing)} missing; rename or convert them"
            )
        try:
            row = plain_row({name: value for name, value in given.items() if value is not None})
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from None
        for name in {"label", "labels"}.intersection(type.labels):
            row[name] = _as_bools(row[name])
        if problem := problem_of(type, row):
            raise ValueError(f"row {number}: {problem}")
        yield row


def each(rows: Iterable[Row], convert: Callable[[Row], Any]) -> Iterator[Any]:
    """What a function makes of every row, its errors with the row's number.

    Args:
      rows: a list or a stream.
      convert: of one row, such as `extract_prompt`.

    Raises: ValueError where `convert` does, naming the row.

    >>> list(each([{"prompt": "a"}], type_of)) == [PROMPT_ONLY]
    True
    """
    for number, row in enumerate(rows):
        try:
            yield convert(row)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from None


def _names(row: Row) -> str:
    names = [name for name, value in row.items() if value is not None]
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(names[:20]) + more or "none"


def _missing(type: Type, row: Row) -> list[str]:
    return [name for name in columns(type, row) if row.get(name) is None]


def _as_bools(value: Any) -> Any:
    """True and False of 1 and 0, which files without bools hold; anything else as it is."""
    if isinstance(value, list):
        return [_as_bools(item) for item in value]
    return bool(value) if isinstance(value, int) and value in (0, 1) else value


def problem_of(type: Type, row: Row) -> str | None:
    """What is wrong with the values of a row that has the columns of a type; None where nothing is.

    >>> problem_of(PROMPT_ONLY, {"prompt": 7})
    'prompt must be a string or messages with role and content, but is int'
    """
    return _text_problem(type, row) or _label_problem(type, row)


def _text_problem(type: Type, row: Row) -> str | None:
    names = [name for name in columns(type, row) if name not in type.labels]
    for name in names:
        if not isinstance(row[name], str) and not is_messages(row[name]):
            found = (
                row[name].__class__.__name__
                if not isinstance(row[name], list)
                else "a list without them"
            )
            return f"{name} must be a string or messages with role and content, but is {found}"
    conversational = [name for name in names if not isinstance(row[name], str)]
    if conversational and type == STEPWISE:
        return (
            "prompt holds messages, but stepwise supervision is of strings; render it to text first"
        )
    if conversational and len(conversational) < len(names):
        text = ", ".join(name for name in names if name not in conversational)
        messages = ", ".join(conversational)
        return f"{messages} hold messages but {text} a string; make all of them one or the other"
    return None


def _label_problem(type: Type, row: Row) -> str | None:
    if "label" in type.labels and not isinstance(row["label"], bool):
        return f"label must be True or False, or 1 or 0, but is {row['label']!r:.80}"
    if "labels" not in type.labels:
        return None
    steps = row["completions"]
    labels = row["labels"]
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        return f"completions must be a list of strings, one a step, but is {steps!r:.80}"
    if not isinstance(labels, list) or not all(isinstance(label, bool) for label in labels):
        return (
            "labels must be a list of True and False, or of 1 and 0, one a step, but is "
            f"{labels!r:.80}"
        )
    if not steps or len(steps) != len(labels):
        return (
            f"{len(steps)} completions but {len(labels)} labels; one label a step, and at least "
            "one step"
        )
    return None
