"""Messages and tools as chat templates take them, whatever container or service they come from; and
what became of them.

A content is text: parts `[{"type": "text", "text": …}]` are joined.  Arguments of a tool call are
an object: as JSON text they would be encoded twice by the many templates that say
`arguments | tojson`.  What no template can mean is refused.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

from rlhf.data.types import Row, is_messages
from rlhf.data.values import of_json

# Roles whose content may be an object.
TOOL_ROLES = ("tool", "function", "ipython", "environment", "observation")
# A message without content needs one of these.
WITHOUT_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
TEXT_PARTS = (None, "text", "input_text", "output_text")


def normalised(row: Row, names: tuple[str, ...]) -> Row:
    """A row whose messages are as templates take them; keys that are null are left out, as
    `transformers` does.

    Args:
      row: a dictionary.
      names: of columns; those that hold strings stay as they are.

    Raises: ValueError for content that is neither text nor parts with text, and calls that are
    none; it says which message.

    >>> parts = [{"type": "text", "text": "y"}, {"type": "text", "text": "es"}]
    >>> normalised({"messages": [{"role": "assistant", "content": parts}], "id": 7}, ("messages",))
    {'messages': [{'role': 'assistant', 'content': 'yes'}], 'id': 7}
    """
    changed = {name: row[name] for name in names if is_messages(row.get(name))}
    # Several columns of messages: the error says of which.
    where = "{} {}".format if len(changed) > 1 else lambda _, number: f"message {number}"
    changed = {
        name: [_message(message, where(name, number)) for number, message in enumerate(value)]
        for name, value in changed.items()
    }
    return row | changed


def tools(row: Row) -> list[Any] | None:
    """The tools of a row, `tools` or, where that is null, `tool_defs`: a list of JSON schemas, or
    JSON text of one.

    Raises: ValueError where they are something else.

    >>> tools({"tools": None, "tool_defs": '[{"name": "add"}]'}), tools({"tools": []})
    ([{'name': 'add'}], None)
    """
    name = "tools" if row.get("tools") is not None else "tool_defs"
    found = _parsed(row.get(name), name)
    if not found:
        return None
    if not isinstance(found, list):
        raise ValueError(f"{name} must be a list of JSON schemas, but is {found!r:.60}")
    return [_tool(_parsed(tool, name), name) for tool in found]


def variables(row: Row) -> dict[str, Any]:
    """A row's `chat_template_kwargs`: an object, or JSON text of one.  Raises: ValueError where it
    is something else.
    """
    found = _parsed(row.get("chat_template_kwargs"), "chat_template_kwargs") or {}
    if not isinstance(found, dict):
        raise ValueError(
            f"chat_template_kwargs must be an object of names and values, but is {found!r:.60}"
        )
    return found


def with_argument_texts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same messages, arguments of calls as JSON text, for templates that join them to texts of
    theirs.

    >>> called = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    >>> with_argument_texts([called])[0]["tool_calls"]
    [{'function': {'name': 'add', 'arguments': '{"a": 1}'}}]
    """

    def text(value):
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    return [_with_arguments(message, text) for message in messages]


def calls(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The calls of a message, each with `name` and `arguments`."""
    found = [call.get("function") or call for call in message.get("tool_calls") or []]
    return [*found, message["function_call"]] if "function_call" in message else found


def missing(messages: list[dict[str, Any]], text: str) -> str | None:
    """What of a conversation a template has left out of its text; None where all is there.

    Contents must stand in it one after another, as written but for blanks around them.  Two things
    may differ: what the system says may stand anywhere, and the thinking before `</think>` of a
    turn to which a user has replied may be gone, since templates for reasoning models drop it.

    Args:
      messages: as `normalised` returns them.
      text: of the template.

    >>> missing([{"role": "system", "content": "be brief"}, {"role": "user", "content": " is it? "}], "user: is it?")
    "message 0 of role 'system', 'be brief'"
    """
    place = 0
    users = [number for number, message in enumerate(messages) if message["role"] == "user"]
    for number, message in enumerate(messages):
        has_reply = any(user > number for user in users)
        named = f"message {number} of role {message['role']!r}"
        anywhere = message["role"] in ("system", "developer")
        # The search goes on from the last place found, so that contents must stand in their order.
        for piece in _pieces(message, has_reply):
            start = 0 if anywhere else place
            ends = [at + len(form) for form in _forms(piece) if (at := text.find(form, start)) >= 0]
            if not ends:
                return f"{named}, {piece!r:.60}"
            place = place if anywhere else min(ends)
        for call in calls(message):
            if lost := next(
                (
                    value
                    for value in _leaves(call)
                    if not any(form in text for form in _forms(value))
                ),
                None,
            ):
                return f"the tool call of {named}, {lost!r:.60}"
    return None


def _pieces(message: dict[str, Any], has_reply: bool) -> Iterator[Any]:
    """What must be in the text."""
    content = message.get("content", "")
    if not isinstance(content, str):
        yield content
        return
    if message["role"] != "assistant" or "</think>" not in content:
        pieces = [content]
    elif has_reply:
        # Templates for reasoning models drop the thinking of earlier turns.
        pieces = [content.rpartition("</think>")[2]]
    else:
        pieces = [part for piece in content.split("<think>") for part in piece.split("</think>")]
    yield from filter(None, map(str.strip, pieces))


def _forms(value: Any) -> list[str]:
    """How a template may write a value: a text as it is or in JSON, anything else as JSON."""
    as_json = {json.dumps(value, ensure_ascii=ensure) for ensure in (False, True)}
    if isinstance(value, str):
        return [value, *(text[1:-1] for text in as_json)]
    return [*as_json, json.dumps(value, ensure_ascii=False, separators=(",", ":"))]


def _leaves(value: Any) -> Iterator[Any]:
    """The texts and numbers of a call's name and arguments."""
    if isinstance(value, dict) and "name" in value and "arguments" in value:
        yield from _leaves([value["name"], value["arguments"]])
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)
    # Booleans and floats are left out: templates write them in many ways ("True", "true", 1.0, 1).
    elif value not in ("", None) and not isinstance(value, bool | float):
        yield value


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    role = message["role"]
    if not isinstance(role, str) or not role:
        raise ValueError(
            f"{where}: role must be a text such as user or assistant, but is {role!r:.60}"
        )
    present = {name: value for name, value in message.items() if value is not None}
    if "content" in present:
        present["content"] = _content(present["content"], role, where)
    elif not any(present.get(name) for name in WITHOUT_CONTENT):
        raise ValueError(
            f"{where} of role {role!r} has no content; give it text, or leave the message out"
        )
    for name, kind in (("tool_calls", list), ("function_call", dict)):
        if name in present and not isinstance(present[name], kind):
            raise ValueError(
                f"{where}: {name} must be {_KINDS[kind]}, but is {present[name]!r:.60}"
            )
    if wrong := [call for call in present.get("tool_calls", []) if not isinstance(call, dict)]:
        raise ValueError(f"{where}: a tool call must be {_KINDS[dict]}, but is {wrong[0]!r:.60}")
    return _with_arguments(present, _object)


_KINDS = {list: "a list of calls", dict: "an object with name and arguments"}


def _content(content: Any, role: str, where: str) -> Any:
    """Text, or what a tool returned."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [_part(part) for part in content]
        if None not in texts:
            return "".join(map(str, texts))
    if role in TOOL_ROLES and isinstance(content, dict | list):
        return content
    if isinstance(content, list) and isinstance(wrong := content[texts.index(None)], dict):
        kind = f"type {wrong['type']!r:.40}" if "type" in wrong else f"{wrong!r:.60}"
        raise ValueError(
            f"{where}: content has a part of {kind}, but a model of text reads text alone; leave "
            "it out"
        )
    raise ValueError(
        f"{where}: content must be text, or parts with text, but is {content!r:.60}; write it as "
        "text"
    )


def _part(part: Any) -> str | None:
    """The text of a part; None for another kind."""
    if not isinstance(part, dict):
        return part if isinstance(part, str) else None
    text = part.get("text", part.get("content"))
    return text if part.get("type") in TEXT_PARTS and isinstance(text, str) else None


def _with_arguments(message: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """A message whose calls have other arguments."""

    def changed(call: dict[str, Any]) -> dict[str, Any]:
        if isinstance(call.get("function"), dict):
            return call | {"function": changed(call["function"])}
        return call | {"arguments": change(call["arguments"])} if "arguments" in call else call

    new = dict(message)
    if "tool_calls" in message:
        new["tool_calls"] = [changed(call) for call in message["tool_calls"]]
    if "function_call" in message:
        new["function_call"] = changed(message["function_call"])
    return new


def _object(value: Any) -> Any:
    """The object that JSON text holds; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return value
    try:
        found = of_json(value)
    except ValueError:
        return value
    return found if isinstance(found, dict) else value


def _tool(tool: Any, name: str) -> Any:
    """A schema whose parameters are an object, of a schema or a Python function."""
    if callable(tool):
        from transformers.utils.chat_template_utils import get_json_schema

        try:
            return get_json_schema(tool)
        except Exception as error:
            raise ValueError(f"{name}: {error}") from None
    if not isinstance(tool, dict):
        raise ValueError(f"{name} must be a list of JSON schemas, but holds {tool!r:.60}")
    if isinstance(tool.get("function"), dict):
        return tool | {"function": _tool(tool["function"], name)}
    return tool | {"parameters": _object(tool["parameters"])} if "parameters" in tool else tool


def _parsed(value: Any, name: str) -> Any:
    """What JSON text says; anything else as it is."""
    if not isinstance(value, str) or not value.strip():
        return None if isinstance(value, str) else value
    try:
        return of_json(value)
    except ValueError as error:
        raise ValueError(
            f"{name} is a text, but not JSON ({str(error)[:80]}): {value!r:.60}"
        ) from None
