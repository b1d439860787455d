"""Tools: Python functions that a policy calls in its text, and an environment that runs them."""

import inspect
import json
import re
import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from rlhf.fields import documented
from rlhf.rollouts.calls import Outcome, attempt
from rlhf.rollouts.environment import Environment, Turn, shorten

JSON_TYPES: dict[Any, str] = {
    str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object", type(None): "null"
}  # fmt: skip
PYTHON_TYPES: dict[str, tuple] = {name: (kind,) for kind, name in JSON_TYPES.items()} | {
    "number": (int, float)
}


@documented
class Call(NamedTuple):
    """A tool call that a parser found.

    Attributes:
      name: of the tool.
      arguments: name -> value.
    """

    name: str
    arguments: dict


@documented
class Result(NamedTuple):
    """What came of a call.

    Attributes:
      name: of the tool.
      text: that the policy reads.
      error: what went wrong; None: nothing.
    """

    name: str
    text: str
    error: str | None


@documented
class Talk(NamedTuple):
    """A conversation in a tool environment.

    Attributes:
      row: what `reset` got.
      messages: role "assistant" or "tool", content; a tool's also has its name.
    """

    row: Any
    messages: tuple[dict, ...] = ()


def tool(fn: Callable) -> dict:
    """The JSON schema of a function, from its signature and docstring, as chat templates take it in
    `tools=`.

    Args:
      fn: a function whose parameters are annotated with str, int, float, bool, list, dict, None,
        Literal, Any, or compositions of them.  Parameters without a default are required.  What
        precedes "Args:" in its docstring describes it, and a line "name: text" below that describes
        a parameter.

    Raises: TypeError where a parameter has no such type, or cannot be given by name.

    >>> def add(a: int, b: int = 0):
    ...     '''Adds two numbers.
    ...
    ...     Args:
    ...       a: the first one.
    ...     '''
    >>> tool(add)["function"]["parameters"]["properties"]
    {'a': {'type': 'integer', 'description': 'the first one.'}, 'b': {'type': 'integer'}}
    """
    name = getattr(fn, "__name__", None)
    if name is None:
        raise TypeError(f"{fn!r} has no name that a policy could call; wrap it in a function")
    # Not `__annotations__`, which may be texts.
    hints = get_type_hints(fn)
    properties = {}
    required = []
    text, _, below = (inspect.getdoc(fn) or "").partition("Args:\n")
    # The next line that starts at the margin is another section of the docstring.
    below = re.split(r"\n\S", below)[0]
    for key, parameter in inspect.signature(fn).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(
                f"parameter {parameter} of tool {name} cannot be given by name, but calls name all "
                "arguments"
            )
        if key not in hints:
            raise TypeError(
                f"parameter {key} of tool {name} has no type; annotate it, with Any if nothing "
                "else fits"
            )
        properties[key] = _schema(hints[key], f"parameter {key} of tool {name}") | _description(
            below, key
        )
        required += [key] if parameter.default is parameter.empty else []
    parameters = {"type": "object", "properties": properties, "required": required}
    return {
        "type": "function",
        "function": {"name": name, "description": " ".join(text.split()), "parameters": parameters},
    }


def parse_hermes(text: str) -> list[Call]:
    """The calls in `<tool_call>{"name": …, "arguments": {…}}</tool_call>` blocks, as Hermes and
    Qwen models write them.

    Returns: the calls in their order; none where there is no block.

    Raises: ValueError on a block that is not closed or holds no call.

    >>> parse_hermes('so: <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')
    [Call(name='add', arguments={'a': 1})]
    """
    blocks = re.findall(r"<tool_call>(.*?)</tool_call>", text, re.DOTALL)
    # A block that is cut at the length limit is an error, not the end of the conversation.
    if text.count("<tool_call>") > len(blocks):
        raise ValueError("<tool_call> without </tool_call>")
    return [_call(json.loads(block)) for block in blocks]


def parse_json(text: str) -> list[Call]:
    """The calls of a text that is one JSON object `{"name": …, "arguments": {…}}`, or a list of
    them, as Llama 3 writes them.

    "parameters" may stand for "arguments".

    Returns: the calls in their order; none where the text does not start with `{` or `[`.

    Raises: ValueError on a text that starts so, but holds no call.

    >>> parse_json('{"name": "add", "parameters": {"a": 1}}'), parse_json("The sum is 3.")
    ([Call(name='add', arguments={'a': 1})], [])
    """
    if not text.lstrip().startswith(("{", "[")):
        return []
    found = json.loads(text)
    return [_call(call) for call in (found if isinstance(found, list) else [found])]


def tool_responses(results: Sequence[str]) -> str:
    """One `<tool_response>` block a result, as Hermes and Qwen templates have them.

    >>> tool_responses(["3"])
    '<tool_response>\\n3\\n</tool_response>'
    """
    return "\n".join(f"<tool_response>\n{result}\n</tool_response>" for result in results)


def tool_environment(
    tools: Sequence[Callable],
    parse: Callable[[str], list[Call]] = parse_hermes,
    render: Callable[[Sequence[str]], str] = tool_responses,
    *,
    reward: Callable | None = None,
    timeout: float = 10.0,
    max_characters: int = 2_000,
) -> Environment:
    """An environment that runs the tool calls of a turn, in their order, and is done when a turn
    has none.

    An unknown tool, a call that cannot be read, arguments that do not fit the tool's schema, a tool
    that raises or takes too long: each is answered by a text that says so.  Where a turn has one
    call that cannot be read, none of its calls is run.

    Args:
      tools: functions as `tool` takes them, plain or async.  What they return is passed on: a text
        as it is, the rest as JSON.
      parse: finds the calls in a turn, `(text) -> list of Call`; raises where one cannot be read.
      render: makes one observation of a turn's results, `(texts) -> text`; the chat template's
        words around it are `play`'s.
      reward: scores a conversation that is done, `(row, messages) -> float | None`, plain or async;
        messages are as in `Talk`.  None: every reward is 0.  A conversation that a limit of `play`
          ends is not scored: its reward is 0.
      timeout: seconds that one call has; a turn's calls together have `play`'s `turn_timeout`.
      max_characters: of one result; the rest is left out, and the text says so.

    Raises: ValueError where two tools have one name, TypeError where a function is no tool.

    >>> import asyncio
    >>> def add(a: int, b: int):
    ...     return a + b
    >>> reset, step = tool_environment([add])
    >>> turn = asyncio.run(step(reset(None), [], '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'))
    >>> turn.observation, turn.done
    ('<tool_response>\\n3\\n</tool_response>', False)
    """
    schemas = [tool(fn)["function"] for fn in tools]
    # Names to functions and schemas; as a dict it is shorter where two share a name.
    known = {
        schema["name"]: (fn, schema["parameters"])
        for schema, fn in zip(schemas, tools, strict=True)
    }
    if len(known) < len(tools):
        raise ValueError(f"tools share a name: {', '.join(schema['name'] for schema in schemas)}")

    async def step(talk: Talk, ids: list[int], text: str) -> Turn:
        said = (*talk.messages, {"role": "assistant", "content": text})
        try:
            # Where one call cannot be read none is run: half of a plan may do harm.
            calls = parse(text)
        except Exception as failure:
            results = [
                _result("tool_call", None, f"the call cannot be read: {failure}", max_characters)
            ]
        else:
            results = [
                _result(call.name, *await _run(known, call, timeout), max_characters)
                for call in calls
            ]
        if not results:
            score, error = (
                (0.0, None)
                if reward is None
                else await attempt(reward, talk.row, said, timeout=timeout)
            )
            return Turn(
                talk._replace(messages=said),
                reward=score,
                done=True,
                error=error and f"reward: {error}",
            )
        responses = (
            {"role": "tool", "name": result.name, "content": result.text} for result in results
        )
        errors = [
            f"{result.name}: {result.error}" for result in results if result.error is not None
        ]
        observation = render([result.text for result in results])
        return Turn(
            talk._replace(messages=(*said, *responses)),
            observation,
            error="; ".join(errors) or None,
        )

    return Environment(Talk, step)


async def _run(known: dict, call: Call, timeout: float) -> Outcome:
    """What a call returns, and None; or None, and what went wrong."""
    if call.name not in known:
        return None, f"unknown tool; there are {', '.join(known)}"
    fn, parameters = known[call.name]
    error = _misfit(call.arguments, parameters)
    return (
        (None, error)
        if error is not None
        else await attempt(partial(fn, **call.arguments), timeout=timeout)
    )


def _result(name: str, value: Any, error: str | None, most: int) -> Result:
    """What the policy reads of a call: a text as it is, anything else as JSON, or what went wrong."""
    try:
        text = (
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        )
    except Exception as failure:
        error = f"the result does not become JSON: {failure}"
    return Result(name, shorten(text if error is None else f"error: {error}", most), error)


def _misfit(arguments: dict, parameters: dict) -> str | None:
    """Why arguments do not fit a tool's parameters; None where they do."""
    properties = parameters["properties"]
    missing = [key for key in parameters["required"] if key not in arguments]
    unknown = [key for key in arguments if key not in properties]
    if missing or unknown:
        return f"missing arguments {missing}, unknown arguments {unknown}; the tool has {json.dumps(parameters)}"
    wrong = [key for key, value in arguments.items() if not _fits(value, properties[key])]
    return (
        f"argument {wrong[0]} is {arguments[wrong[0]]!r}, but must fit "
        f"{json.dumps(properties[wrong[0]])}"
        if wrong
        else None
    )


def _fits(value: Any, schema: dict) -> bool:
    """Whether a value is what a schema of `_schema` describes."""
    if "anyOf" in schema:
        return any(_fits(value, option) for option in schema["anyOf"])
    if "enum" in schema:
        return any(type(value) is type(option) and value == option for option in schema["enum"])
    # A bool is an int to Python, but not to JSON.
    if "type" in schema and (
        not isinstance(value, PYTHON_TYPES[schema["type"]])
        or (isinstance(value, bool) and schema["type"] != "boolean")
    ):
        return False
    # Entries of a list, values of an object; whatever else has none.
    inside = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
    return all(
        _fits(x, schema.get("items", schema.get("additionalProperties", {}))) for x in inside
    )


def _schema(kind: Any, where: str) -> dict:
    """The JSON schema of a type."""
    origin = get_origin(kind)
    inner = get_args(kind)
    if kind is Any:
        return {}
    if origin is Literal:
        return {"enum": list(inner)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(option, where) for option in inner]}
    if origin is list:
        return {"type": "array", "items": _schema(inner[0], where)}
    if origin is dict and inner[0] is str:
        return {"type": "object", "additionalProperties": _schema(inner[1], where)}
    if kind in JSON_TYPES:
        return {"type": JSON_TYPES[kind]}
    raise TypeError(
        f"{where} is {kind}, which JSON does not have; take str, int, float, bool, list, dict[str, "
        "…]"
    )


def _description(below: str, key: str) -> dict:
    """What a docstring says of a parameter: its line, and those further to the right that follow."""
    found = re.search(rf"^( *){key}(?: \([^)]*\))?: *(.*(?:\n\1 +.*)*)", below, re.MULTILINE)
    return {"description": " ".join(found[2].split())} if found else {}


def _call(found: Any) -> Call:
    """A call of its JSON form."""
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        raise ValueError(
            f'a call is an object {{"name": …, "arguments": {{…}}}}, but this is {json.dumps(found)}'
        )
    arguments = found.get("arguments", found.get("parameters", {}))
    if not isinstance(arguments, dict):
        raise ValueError(
            f"arguments of {found['name']} must be an object, but are {json.dumps(arguments)}"
        )
    return Call(found["name"], arguments)
