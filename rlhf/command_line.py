"""Command-line options out of a recipe's own signature: its types, ranges, defaults and docstrings
say what may be given.
"""

import copy
import dataclasses
import functools
import inspect
import itertools
import json
import re
import shutil
import sys
import textwrap
import types
import typing
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from rlhf import files, hosts, ranges, trl_names, yaml_files
from rlhf.fields import documented
from rlhf.ranges import Count, Every
from rlhf.trl_names import Given

SCREENS = 140  # lines of three screens
# Where compiled programs are saved.
CACHE = "~/.cache/rlhf/compilations"
# Options of every command.
OURS = ("config", "print_config", "help")


@documented
class Surroundings(NamedTuple):
    """Options of every command that change no number of it, and so are written in no config.yaml.

    Attributes:
      compilation_cache: folder of compiled programs, kept for the next start; null: none.
      coordinator: host:port of process 0 of several; auto: JAX finds it.
      num_processes: of the run.
      process_id: number of this one, from 0.
      start_timeout: seconds to wait for the other processes at the start.
      heartbeat_timeout: seconds without a sign of life after which a process counts as dead.
    """

    compilation_cache: str | None = CACHE
    coordinator: str | None = None
    num_processes: Count | None = None
    process_id: Every | None = None
    start_timeout: Count = hosts.START
    heartbeat_timeout: Count = hosts.HEARTBEAT


class Mistake(ValueError):
    """What the user typed cannot be; the message says why and what would do."""


@documented
class Option(NamedTuple):
    """What is known of an option.

    Attributes:
      hint: its type, with its range.
      default: inspect.Parameter.empty where it must be given.
      text: what it is.
      group: what it stands with.
      of: the function's parameter that is a dataclass of which it is a field.
    """

    hint: Any
    default: Any
    text: str
    group: str
    of: str | None

    @property
    def needed(self) -> bool:
        """Whether it must be given."""
        return self.default is inspect.Parameter.empty


@functools.cache
def options_of(fn: Any) -> dict[str, Option]:
    """The options of a function: its parameters; of those that are dataclasses the fields, side by
    side with the others.
    """
    hints = ranges.hints_of(fn)
    texts = _documented(fn)
    parameters = inspect.signature(fn).parameters.values()
    plain_parameters = [
        x
        for x in parameters
        if not (dataclasses.is_dataclass(hints[x.name]) or _is_from_python(hints[x.name]))
    ]
    found = {
        x.name: Option(hints[x.name], x.default, texts[x.name], _summary(fn), None)
        for x in plain_parameters
    }
    for name, kind in groups_of(fn).items():
        of_kind = ranges.hints_of(kind)
        of_function = inspect.signature(fn).parameters[name].default
        # Base classes first, without `object`: a subclass may say something else of a field.
        texts = _documented(*reversed(kind.__mro__[:-1]))
        for field in dataclasses.fields(kind):
            # A function's own default for the dataclass goes before those of its fields.
            default = getattr(of_function, field.name, _default(field))
            found[field.name] = Option(
                of_kind[field.name], default, texts[field.name], _summary(kind), name
            )
    return found


def _is_from_python(hint: Any) -> bool:
    return ranges.FromPython in getattr(hint, "__metadata__", ())


def groups_of(fn: Callable) -> dict[str, type]:
    """The parameters of a function that are dataclasses."""
    hints = ranges.hints_of(fn)
    return {
        name: hints[name]
        for name in inspect.signature(fn).parameters
        if dataclasses.is_dataclass(hints[name])
    }


def parsed(fn: Callable, name: str, argv: Sequence[str]) -> dict[str, Any]:
    """The arguments of a function from the command line, dataclasses made.

    Words before the first option are the function's first parameter: `rlhf chat RUN`,
    `rlhf plot RUN RUN`; so are all words after `--`.  A list may be written as words, `--loss sigmoid sft`, and a switch without
    its `true`.  What is typed wins over `--config FILE`.

    Raises: Mistake, in one line, for an option that is not known (naming the nearest that is),
    missing, or of another type or
      range; ValueError as `rlhf.yaml_files.load`; SystemExit after `--help` and `--print_config`.
    """
    options = options_of(fn)
    typed = list(_grouped(argv, next(iter(options))))
    written_options = {written for written, _ in typed}
    # Before anything is read or checked: help must come whatever else is typed.
    if "help" in written_options:
        print(help_of(options, name, full=("help", ["all"]) in typed))
        sys.exit(0)
    file = _from_files(
        [word for written, words in typed if written == "config" for word in words or [""]]
    )
    values = {
        # Copies: a default list is one object for all calls.
        name: copy.copy(option.default)
        for name, option in options.items()
        if not option.needed
    }
    values |= _values(name, options, file, _from_words(typed))
    if "print_config" in written_options:
        print(
            yaml.safe_dump(
                {name: values[name] for name in options if name in values}, sort_keys=False
            ),
            end="",
        )
        sys.exit(0)
    if missing := [f"--{name}" for name in options if name not in values]:
        raise Mistake(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; see --help"
        )
    # A folder that is written over must not hold the file that says so.
    if values.get("output"):
        files.check_apart(
            values["output"],
            [word for written, words in typed if written == "config" for word in words],
        )
    arguments = {name: values[name] for name, option in options.items() if option.of is None}
    for group, kind in groups_of(fn).items():
        arguments[group] = kind(
            **{name: values[name] for name, option in options.items() if option.of == group}
        )
    return arguments


def surroundings(argv: Sequence[str]) -> tuple[list[str], Surroundings]:
    """The command line without the options that every command has, and those.

    Raises: Mistake for one without a value, or with one of another type or range.

    >>> surroundings(["--steps", "2", "--compilation_cache", "null"])[0]
    ['--steps', '2']
    >>> surroundings(["--steps", "2", "--process_id=1"])[1].process_id
    1
    """
    rest: list[str] = []
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(Surroundings, include_extras=True)
    words = iter(argv)
    for word in words:
        # What follows is another command's.
        if word == "--":
            rest += [word, *words]
            break
        option, equals, value = word.partition("=")
        name = _bare(option.removeprefix("--"))
        if not option.startswith("--") or name not in hints:
            rest.append(word)
            continue
        given = value if equals else next(words, "")
        # The next word may be another option: the value was forgotten.
        if not given or given.startswith("--"):
            what = "a folder, or null for none," if name == "compilation_cache" else "one value,"
            raise Mistake(f"--{name} takes {what} but is given none")
        found[name] = _held(f"--{name}", hints[name], given)
    return rest, Surroundings(**found)


def help_of(options: Mapping[str, Option], name: str, *, full: bool = False) -> str:
    """An option's name, its default (... where there is none) and what it is, in a line or two.

    Where that is more than three screens, options that other commands have too are named with
    their defaults alone, unless `full` asks for all.
    """
    # Lines beyond 128 columns are hard to read, however wide the terminal.
    width = min(shutil.get_terminal_size().columns, 128)
    explained = _help_lines(options, name, width, in_short=False)
    if full or len(explained) <= SCREENS:
        return "\n".join(explained)
    return "\n".join(_help_lines(options, name, width, in_short=True))


def _help_lines(
    options: Mapping[str, Option], name: str, width: int, *, in_short: bool
) -> list[str]:
    needed = (f"--{option} {option.upper()}" for option in options if options[option].needed)
    lines = textwrap.wrap(" ".join(["usage: rlhf", name, *needed, "[options]"]), width)
    for group in dict.fromkeys(option.group for option in options.values()):
        lines += ["", *textwrap.wrap(group, width)]
        names = [option for option in options if options[option].group == group]
        short = [option for option in names if in_short and options[option].of]
        for option in names:
            if option not in short or options[option].needed:
                lines += _explained(option, options[option], width)
        # Non-breaking spaces keep a default with its option where lines are wrapped.
        pairs = [
            f"--{option}\N{NO-BREAK SPACE}{_shown_default(options[option])}"
            for option in short
            if not options[option].needed
        ]
        wrapped = textwrap.wrap("  ".join(pairs), width - 2, break_on_hyphens=False)
        lines += [f"  {line}".replace("\N{NO-BREAK SPACE}", " ") for line in wrapped]
    of_all = (
        "Of every command: --config FILE (YAML; what is typed beside it wins), --print_config, "
        "--compilation_cache FOLDER "
        f"(compiled programs, kept for the next start: {CACHE}; null: none).  Of recipes in several "
        "processes, one a host: --coordinator HOST:PORT, --num_processes, --process_id, "
        f"--start_timeout SECONDS ({hosts.START}), --heartbeat_timeout SECONDS ({hosts.HEARTBEAT}); "
        "rlhf launch starts several on this machine"
    )
    lines += ["", *textwrap.wrap(of_all, width)]
    return [*lines, f"rlhf {name} --help all explains every option."] if in_short else lines


def _shown_default(option: Option) -> str:
    if option.needed:
        return ""
    return option.default if isinstance(option.default, str) else json.dumps(option.default)


def _explained(name: str, option: Option, width: int) -> list[str]:
    kind, _ = ranges.kind_of(option.hint)
    listed = (
        f" ({', '.join(typing.get_args(kind))})"
        if typing.get_origin(kind) is typing.Literal
        else ""
    )
    start = f"  --{name} {'...' if option.needed else _shown_default(option)}"
    return textwrap.wrap(f"{start:<26}  {option.text}{listed}", width, subsequent_indent=" " * 28)


def _from_words(typed: Sequence[tuple[str, list[str]]]) -> dict[str, Given]:
    """What is typed, by names without marks; of an option that is typed twice the last."""
    # `written` goes along: messages show an option as it was typed, with its dashes.
    return {
        _bare(written): Given(f"--{written}", words, words=True)
        for written, words in typed
        if written not in OURS
    }


def _from_files(names: Sequence[str]) -> dict[str, Given]:
    """What files hold; of an option that two hold, the last."""
    if "" in names:
        raise Mistake("--config takes a file, but is given none")
    return {
        _bare(key): Given(f"{name}: {key}", value)
        for name in names
        for key, value in yaml_files.load(name).items()
    }


def _bare(written: str) -> str:
    return written.replace("-", "_")


def _values(
    command: str,
    options: Mapping[str, Option],
    file: Mapping[str, Given],
    typed: Mapping[str, Given],
) -> dict[str, Any]:
    """The values of options that are given, by our names; what differs from TRL is said."""
    defaults = {name: None if option.needed else option.default for name, option in options.items()}
    # Names first, values after: a name of TRL's may stand for several of ours, or for another unit.
    found, notes = trl_names.translated(command, defaults, trl_names.merged(file, typed, defaults))
    values = {}
    for name, given in found.items():
        if name not in options:
            raise Mistake(_unknown(command, options, given.written, name))
        called = (
            given.written
            if _bare(given.written.split()[-1].lstrip("-")) == name
            else f"{given.written} (here {name})"
        )
        value = (
            _of_words(given.written, options[name].hint, given.value)
            if given.words
            else given.value
        )
        values[name] = _held(called, options[name].hint, value)
    for note in notes:
        print(f"rlhf {command}: {note}", file=sys.stderr)
    return values


def _unknown(command: str, options: Mapping[str, Option], written: str, name: str) -> str:
    """Why an option is not one of the command, and the nearest that is."""
    typed = _bare(written.split()[-1].lstrip("-"))
    if typed != name:
        return (
            f"{written} (here --{name}) is no option of rlhf {command}; see rlhf {command} --help"
        )
    mark = "--" if written.startswith("--") else ""
    near = trl_names.suggestions(typed, [*options, *trl_names.known(options)])
    meant = " or ".join(f"{mark}{name}" for name in near)
    return f"{written} is not known; " + (f"did you mean {meant}?" if near else "see --help")


def _held(called: str, hint: Any, given: Any) -> Any:
    """The value as its type wants it.  Raises: Mistake for one of another type or range."""
    value = _as(hint, given)
    if wrong := ranges.mistake(called, hint, value):
        raise Mistake(wrong)
    return value


def _as(hint: Any, given: Any) -> Any:
    """What was given, as the type wants it where it can be: numbers and null that are written as
    text, one entry as a list.
    """
    kind, _ = ranges.kind_of(hint)
    origin = typing.get_origin(kind)
    parts = typing.get_args(kind)
    # As YAML writes it, so that a command line can be copied from a config.yaml.
    if given == "null" and kind is not str:
        return None
    if origin in (typing.Union, types.UnionType):
        # Of `int | None` and its like: the first type that takes the text as it is; where none
        # does, the first one's value makes the message.
        tried = [_as(part, given) for part in parts]
        return next(
            (
                value
                for part, value in zip(parts, tried, strict=True)
                if not ranges.problem(part, value)
            ),
            tried[0],
        )
    if origin is list and given is not None and not isinstance(given, dict):
        return [_as(parts[0], entry) for entry in (given if isinstance(given, list) else [given])]
    if kind is bool and isinstance(given, str):
        return {"true": True, "false": False}.get(given.lower(), given)
    if kind in (int, float) and isinstance(given, str | int) and not isinstance(given, bool):
        try:
            # YAML 1.1 reads 1e-5 as text: numbers written so are read here, from files too.
            return kind(given)
        # No number, or one of thousands of digits: the range check will say so.
        except (ValueError, OverflowError):
            return given
    return given


def _of_words(called: str, hint: Any, words: list[str]) -> Any:
    """What the words behind an option say, before its type is known to hold."""
    if _takes(hint, bool) and not words:
        return True
    # Words or commas make a list; one that starts with a bracket is YAML.
    if _takes(hint, list) and words and not words[0].startswith("[") and words != ["null"]:
        # Not at the commas within a reward's arguments, as in soft_overlong(max_length=8, cache=2).
        return [entry for word in words for entry in re.split(r",(?![^(]*\))", word)]
    if len(words) != 1:
        raise Mistake(f"{called} takes one value, but is given {' '.join(words) or 'none'}")
    structured = _takes(hint, list) or _takes(hint, dict)
    return yaml_files.parse(words[0], called) if structured else words[0]


def _takes(hint: Any, kind: type) -> bool:
    """Whether a type is this one, or this one among others."""
    bare, _ = ranges.kind_of(hint)
    parts = (
        typing.get_args(bare)
        if typing.get_origin(bare) in (typing.Union, types.UnionType)
        else (bare,)
    )
    return any(kind in (part, typing.get_origin(part)) for part, _ in map(ranges.kind_of, parts))


def _grouped(argv: Sequence[str], first: str) -> Iterator[tuple[str, list[str]]]:
    """Options without their dashes, and the words behind each; words before any option are
    `first`'s, and so are those after `--`.
    """
    found: list[tuple[str, list[str]]] = []
    words = iter(argv)
    for word in words:
        if word == "--":
            found.append((first, list(words)))
            break
        word = "--help" if word == "-h" else word
        if word.startswith("--"):
            # `--steps=5` and `--steps 5` are the same; an empty value is one too.
            option, equals, value = word.removeprefix("--").partition("=")
            found.append((option, [value] if equals else []))
        else:
            found = found or [(first, [])]
            found[-1][1].append(word)
    yield from found


def _documented(*described: Any) -> dict[str, str]:
    """Name -> what the `Args:` of docstrings say of it."""
    found: dict[str, str] = defaultdict(str)
    for one in described:
        # Up to the next empty line: what follows is no argument.
        _, _, section = (inspect.getdoc(one) or "").partition("\nArgs:\n")
        for names, text in re.findall(
            r"^  (\w+(?:, \w+)*): (.*(?:\n    .*)*)", section.split("\n\n")[0], re.MULTILINE
        ):
            found |= dict.fromkeys(names.split(", "), re.sub(r"\n +", " ", text))
    return found


def _summary(described: Any) -> str:
    """The paragraphs of a docstring before its sections."""
    paragraphs = (inspect.getdoc(described) or "").split("\n\n")
    texts = itertools.takewhile(lambda text: not re.match(r"[A-Z]\w+:\n|>>>", text), paragraphs)
    return " ".join(" ".join(texts).split())


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
