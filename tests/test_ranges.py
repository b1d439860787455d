"""Numbers that cannot be: every option of every command, from the command line, a file and Python alike."""

import dataclasses
import importlib
import inspect
import math
import tempfile
import typing

import jax
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import exhaustive

from rlhf import adapters, cli, ranges, yaml_files
from rlhf.command_line import Mistake, options_of, parsed
from rlhf.losses import controllers
from rlhf.ranges import FLOAT32, Range, kind_of
from rlhf.rollouts import engine, replay, reward_functions, samplers
from rlhf.tools import new
from rlhf.training import averages

MAINS = {name: importlib.import_module(module).main for name, (module, _) in cli.COMMANDS.items()}
TEXT = st.text(st.characters(exclude_characters="\x85\u2028\u2029"), max_size=6)
WORDS = [
    "nan",
    "inf",
    "-inf",
    "0",
    "-1",
    "1e300",
    "null",
    "fast",
    "true",
    "[]",
    "[nan]",
    "{}",
    "9" * 400,
    "1" * 5000,
    "0.5",
]
VALUES: list = [
    math.nan,
    math.inf,
    -math.inf,
    0,
    -1,
    1e300,
    None,
    "fast",
    True,
    [],
    [math.nan],
    {},
    10**400,
    10**5000,
    0.5,
]
NAMED = {
    "text",
    "null",
    "true",
    "list",
    "mapping",
    "number",
    "one of",
}  # what a message may say that a value must be


def parts_of(hint) -> list:
    """A type's parts, unions and lists taken apart, each with its range."""
    kind, range_ = kind_of(hint)
    if typing.get_origin(kind) in (list, dict):
        return [part for inner in typing.get_args(kind) for part in parts_of(inner)]
    inner = typing.get_args(kind) if typing.get_origin(kind) is not typing.Literal else ()
    return [part for one in inner for part in parts_of(one)] or [(kind, range_)]


def least(command: str, but: str) -> list[str]:
    """What a command needs, without one option."""
    options = options_of(MAINS[command])
    return [
        word
        for name in options
        if options[name].needed and name != but
        for word in (f"--{name}", "x")
    ]


def outcome(call, *args, **kwargs) -> str | None:
    """The message of a mistake, None where there is none; all else is raised."""
    try:
        call(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return None


def holds(hint, value) -> bool:
    """Whether a value is of a type and its range, said once more and in other words."""
    kind, range_ = kind_of(hint)
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        few = range_.low > -FLOAT32 and len(value) < range_.low if isinstance(value, list) else True
        return (
            isinstance(value, list) and not few and all(holds(parts[0], entry) for entry in value)
        )
    if origin is dict:
        return isinstance(value, dict) and all(holds(parts[1], entry) for entry in value.values())
    if origin is typing.Literal:
        return value in parts
    if parts:
        return any(holds(part, value) for part in parts)
    if kind in (int, float):
        if (
            isinstance(value, bool)
            or not isinstance(value, int if kind is int else int | float)
            or value != value
        ):
            return False
        low = value > range_.low if range_.above else value >= range_.low
        high = value < range_.high if range_.below else value <= range_.high
        return low and high
    return isinstance(value, kind)


def said_well(message: str, option: str, hint) -> None:
    """One line with the option, what it must be, and what it is."""
    assert "\n" not in message
    assert len(message) < 500
    name, must, rest = message.partition(" must be ")
    assert must, message
    assert option in name
    assert any(kind in rest for kind in NAMED), message
    assert "but is" in rest
    assert "(" not in rest.partition("but is")[0], "no type of Python's"
    for _, range_ in parts_of(hint):
        assert range_ == Range() or str(range_) in rest or "list" in rest


@pytest.mark.parametrize("command", MAINS)
def test_every_number_has_a_range(command):
    for name, option in options_of(MAINS[command]).items():
        for kind, range_ in parts_of(option.hint):
            if kind in (int, float):
                assert -FLOAT32 < range_.low < range_.high < FLOAT32, f"--{name} may be any number"
        if not option.needed:
            assert holds(option.hint, option.default), f"the default of --{name}"


TRLS = (  # as TRL means them: translated
    ("packing", True),
    ("warmup_steps", 0.5),
    ("log_completions", True),
    ("log_completions", False),
    ("scale_rewards", True),
    ("scale_rewards", False),
)


@pytest.mark.parametrize("command", MAINS)
def test_every_option_from_the_command_line(command):
    fn, seen = MAINS[command], 0
    for name, option in options_of(fn).items():
        for word in WORDS:
            message = outcome(parsed, fn, command, [*least(command, name), f"--{name}={word}"])
            if (
                message is not None
                and " must be " in message
                and name in message.split(" must be ")[0]
            ):
                said_well(message, f"--{name}", option.hint)
                seen += 1
            elif message is not None:
                assert any(given in message for given in (name, word[:20])), message
            else:
                kinds = {kind for kind, _ in parts_of(option.hint)}
                if (name, word == "true") in TRLS and word in ("true", "false"):
                    continue
                assert kinds - {int, float, type(None)} or word in (
                    "0",
                    "0.5",
                    "null",
                    "[]",
                    "-1",
                ), (name, word)
    assert seen >= len(WORDS) // 3 or command in ("export", "help", "plot")


@pytest.mark.parametrize("command", exhaustive(MAINS, quick=["sft", "grpo", "eval"]))
def test_every_option_from_a_file(command, tmp_path):
    fn, file = MAINS[command], tmp_path / "run.yaml"
    for name, option in options_of(fn).items():
        for value in VALUES:
            if isinstance(value, int) and abs(value) > 10**18:
                continue  # beyond what YAML's numbers are read as; the command line has them
            if (name, value) in TRLS:
                continue
            file.write_text(yaml.safe_dump({name: value}))
            message = outcome(parsed, fn, command, [*least(command, name), "--config", str(file)])
            if holds(option.hint, value):
                assert message is None or " must be " not in message
            elif message is not None and " must be " in message:
                said_well(message, f"{file}: {name}", option.hint)
            else:
                kind = typing.get_origin(kind_of(option.hint)[0])
                assert message or kind is list or "list" in str(option.hint), (
                    name,
                    value,
                )  # one entry stands for a list


@pytest.mark.parametrize("command", [command for command in MAINS if command != "help"])
def test_every_option_from_python(command):
    """The arguments of a function, and the fields of its dataclasses; one reward is a list of one."""
    fn = MAINS[command]
    options = options_of(fn)
    for name, option in options.items():
        made = ranges.hints_of(fn)[option.of] if option.of else None
        needed = (
            {x.name: "x" for x in dataclasses.fields(made) if options[x.name].needed}
            if made
            else {}
        )
        for value in VALUES:
            if holds(option.hint, value):
                continue
            if name == "reward" and holds(option.hint, [value]):
                assert made(**{name: value}).reward == [value]
                continue
            if made:
                message = outcome(made, **{**needed, name: value})
            else:
                message = outcome(ranges.check, ranges.hints_of(fn), {name: value})
            assert message, f"{name} takes {ranges.shown(value)}"
            said_well(message, name, option.hint)


@pytest.mark.parametrize("command", MAINS)
def test_every_command_holds_its_arguments_to_their_types(command):
    fn = MAINS[command]
    assert inspect.unwrap(fn) is not fn, f"rlhf {command}: main is not @checked"
    for name, option in options_of(fn).items():
        if option.of is None and any(
            kind in (int, float, bool) for kind, _ in parts_of(option.hint)
        ):
            needed = {
                x.name: None
                for x in inspect.signature(fn).parameters.values()
                if x.default is x.empty
            }
            message = outcome(fn, **{**needed, name: math.nan})
            assert message
            assert " must be " in message


@settings(max_examples=200, deadline=None)
@given(
    st.floats(),
    st.floats(allow_nan=False),
    st.floats(allow_nan=False),
    st.booleans(),
    st.booleans(),
)
def test_a_range_is_an_interval(value, low, high, above, below):
    low, high = sorted([low, high])
    inside = (value > low if above else value >= low) and (value < high if below else value <= high)
    assert (value in Range(low, high, above, below)) == inside or low == high


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), np.int64(1), 1, 0.5])
def test_numbers_of_numpy_are_numbers(value):
    assert ranges.problem(ranges.Share, value) is None


@settings(max_examples=150, deadline=None)
@given(st.recursive(
    st.none() | st.booleans() | st.integers(-(10**17), 10**17) | TEXT | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8,
))  # fmt: skip
def test_what_is_written_is_read(value):
    assert yaml_files.parse(yaml.safe_dump({"x": value}, allow_unicode=True), "x") == {"x": value}


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="{}[]:,-&*!|>'\"# \n\tab01.~%@`?\\", max_size=40) | st.text(max_size=20))
def test_whatever_is_written_is_read_or_refused(text):
    message = outcome(yaml_files.parse, text, "run.yaml")
    assert message is None or message.startswith("run.yaml")


PYTHON = {  # functions of hyperparameters: arguments that can be, and those that are tried
    averages.ema: {"decay": 0.9},
    averages.bema: {"ema_power": 0.5, "bias_power": 0.2, "lag": 10.0, "multiplier": 1.0},
    averages.following: {"every": 2, "share": 0.5},
    replay.band: {"low": 0.1, "high": 0.9},
    replay.curriculum: {"number": 3, "rate": 0.1},
    reward_functions.cosine_scaled: {"max_length": 5},
    reward_functions.soft_overlong: {"max_length": 5, "cache": 2},
    reward_functions.repetition_penalty: {"ngram": 3, "max_penalty": -1.0},
    reward_functions.missing_end: {"penalty": -1.0},
    engine.openai_engine: {"timeout": 1.0, "retries": 1, "concurrency": 2},
    adapters.add: {"rank": 2, "alpha": 4.0},
    samplers.sampler: {"temperature": 1.0},
    samplers.top_k: {"k": 2},
    samplers.top_p: {"p": 0.5},
    samplers.min_p: {"p": 0.5},
    samplers.repetition_penalty: {"penalty": 1.1},
    samplers.presence_penalty: {"penalty": 1.1},
    samplers.frequency_penalty: {"penalty": 1.1},
    controllers.adaptive_kl: {"target": 6.0, "horizon": 10, "init_coef": 0.1},
}
BESIDE: dict = {
    reward_functions.cosine_scaled: {"correctness": reward_functions.length},
    engine.openai_engine: {"url": "http://localhost", "model": "m"},
    adapters.add: {
        "params": {"layers": {"q": np.ones((2, 3, 3), np.float32)}},
        "key": jax.random.key(0),
    },
}


@pytest.mark.parametrize("fn", PYTHON, ids=lambda fn: fn.__name__)
def test_functions_of_hyperparameters_refuse_what_cannot_be(fn):
    fine = {**BESIDE.get(fn, {}), **PYTHON[fn]}
    fn(**fine)
    for name in PYTHON[fn]:
        for value in (math.nan, math.inf, -math.inf):
            assert outcome(fn, **{**fine, name: value}), f"{name} takes {value}"


def test_an_error_of_another_package_keeps_its_traceback(tmp_path, capsys, monkeypatch):
    """It may be no mistake of the user's, so that one line is not all that is left of it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(new.tasks, "find", lambda name: np.zeros(3).reshape(2, 2))
    assert cli.main(["new", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "cannot reshape array" in error
    (kept,) = tmp_path.glob("rlhf-*.txt")
    assert str(kept) in error
    assert "reshape(2, 2)" in kept.read_text()


def test_mistakes_of_options_are_our_own_words():
    with pytest.raises(Mistake, match=r"^--output, --model are missing; see --help$"):
        parsed(MAINS["sft"], "sft", ["--dataset", "d"])
    with pytest.raises(
        Mistake, match=r"^--num_generations \(here num_samples\) must be a whole number at least 1"
    ):
        parsed(MAINS["grpo"], "grpo", ["--num_generations", "0"])
