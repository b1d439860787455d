"""YAML, and JSON which is a part of it, as people write it: read strictly, and in bounded size,
depth and time.
"""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, ClassVar

import yaml

# Options are short; these bounds keep a file from elsewhere from filling memory or the stack.
MOST_BYTES = 2**18
DEEPEST = 32
TOO_LONG = f"more than {MOST_BYTES // 1024} KB, which options never are"
# What is written without quotes and yet is no text: by the tag that YAML gives it, its form, and
# the first letters by which the parser looks it up.  Narrower than YAML 1.1, in which `no` is false
# and 1:30 is ninety.  Numbers of bounded length, since Python parses long ones in quadratic time.
PLAIN = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9]{0,17})", list("-+0123456789")),
    "float": (
        r"[-+]?[0-9]{1,30}\.[0-9]*(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


class Refused(yaml.MarkedYAMLError):
    """YAML, but nothing that is read here."""


class Loader(yaml.SafeLoader):
    """Of YAML's types null, true and false, numbers, text, lists and mappings; no aliases, no tags,
    no key twice.
    """

    # Empty here, filled below: without it the resolvers of SafeLoader, dates among them, would
    # hold.
    yaml_implicit_resolvers: ClassVar[dict] = {}
    depth = 0

    def compose_node(self, parent, index):
        """A node and what is below it.  Raises: YAMLError where it is an alias, has a tag, or lies
        too deep.
        """
        event = self.peek_event()
        # Aliases of aliases grow without bound: a few lines can stand for billions of entries.
        if isinstance(event, yaml.AliasEvent):
            raise _at(
                event.start_mark,
                f"*{event.anchor} stands for what is elsewhere, which is not read; write it out",
            )
        if getattr(event, "tag", None) is not None:
            raise _at(event.start_mark, f"{event.tag} is a tag, which is not read; leave it out")
        if self.depth == DEEPEST:
            raise _at(event.start_mark, f"more than {DEEPEST} levels, one in the other")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        """Raises: YAMLError where a key is no text or there twice."""
        names: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            # SafeLoader takes the last of two equal keys, without a word.
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _at(key_node.start_mark, "a key must be text")
            if key in names:
                raise _at(key_node.start_mark, f"{key} is there twice; leave one out")
            names[key] = self.construct_object(value_node, deep=deep)
        return names


for _tag, (_form, _first) in PLAIN.items():
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_form})$"), _first)


def parse(text: str, where: str) -> Any:
    """What a text says.

    Args:
      where: what the message of an error begins with.

    Raises: ValueError, with the line, for what is no YAML, and for aliases, tags, keys that are
    there twice, and more than
      `MOST_BYTES` or `DEEPEST` levels.

    >>> parse("{steps: 5, track: [wandb], split: '5', seed: null}", "--options")
    {'steps': 5, 'track': ['wandb'], 'split': '5', 'seed': None}
    >>> parse("steps: 5\\nsteps: 6", "run.yaml")
    Traceback (most recent call last):
    ValueError: run.yaml, line 2: steps is there twice; leave one out
    """
    if len(text) > MOST_BYTES:
        raise ValueError(f"{where}: {TOO_LONG}")
    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}" if mark else ""
        kind = "" if isinstance(error, Refused) else "not YAML: "
        raise ValueError(f"{where}{place}: {kind}{error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(
            f"{where}, line {line}: {chr(error.character)!r} is no letter of a text"
        ) from None


def load(file: str | Path) -> dict[str, Any]:
    """The options that a file holds.

    Raises: ValueError in one line that begins with the file: where it is missing, no text, empty,
    no mapping, and as `parse`.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(
            f"{file}: {'a folder' if path.is_dir() else 'no such file'}; give a YAML file of "
            "options"
        )
    try:
        with path.open("rb") as opened:
            # One byte more than the bound tells that there is more; the rest is never read.
            content = opened.read(MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from None
    if len(content) > MOST_BYTES:
        raise ValueError(f"{file}: {TOO_LONG}")
    try:
        # Editors on Windows begin files with a byte-order mark, which is no text.
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{file}, line {line}: not UTF-8 text; give a YAML file of options"
        ) from None
    found = parse(text, str(file))
    if not isinstance(found, dict):
        held = "is empty" if found is None else f"holds {_called(found)}, but no options"
        raise ValueError(f"{file}: {held}; write lines such as learning_rate: 1e-5")
    return found


def _called(value: Any) -> str:
    return (
        "a list"
        if isinstance(value, list)
        else "text"
        if isinstance(value, str)
        else "a single value"
    )


def _at(mark: Any, problem: str) -> Refused:
    return Refused(problem=problem, problem_mark=mark)
