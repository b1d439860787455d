"""Command-line options out of a recipe's own signature: its types, defaults and docstrings are the parser."""

import dataclasses
import difflib
import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jsonargparse

TRL = {  # what TRL's users type -> what it is here
    "model_name_or_path": "model",
    "dataset_name": "dataset",
    "dataset_train_split": "split",
    "dataset_test_split": "eval_split",
    "output_dir": "output",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "micro_batches",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "lr_scheduler_type": "schedule",
    "logging_steps": "log_every",
    "eval_steps": "eval_every",
    "save_steps": "save_every",
    "save_total_limit": "keep",
    "report_to": "track",
    "lora_r": "lora_rank",
    "use_dora": "dora",
    "loss_type": "loss",
    "num_generations": "num_samples",
    "max_completion_length": "max_new_tokens",
    "response_length": "max_new_tokens",
    "reward_funcs": "reward",
    "epsilon": "clip_low",
    "epsilon_high": "clip_high",
    "cliprange": "clip_low",
    "num_ppo_epochs": "updates_per_batch",
    "num_iterations": "updates_per_batch",
    "resume_from_checkpoint": "resume",
    "assistant_only_loss": "assistant_only",
    "completion_only_loss": "completion_only",
}


class Mistake(ValueError):
    """What the user typed cannot be; the message says why and what would do."""


class _Parser(jsonargparse.ArgumentParser):
    def error(self, message, ex=None) -> NoReturn:
        raise Mistake(" ".join(str(message).split()))


def parser_of(fn: Callable, name: str) -> jsonargparse.ArgumentParser:
    """The parser of a function's parameters; those of a dataclass are options of their own, side by side with the others."""
    parser = _Parser(prog=f"rlhf {name}", description=(inspect.getdoc(fn) or "").split("\n\n")[0])
    parser.add_argument("--config", action="config", help="a YAML file of options; those typed beside it win")
    groups = _groups(fn)
    parser.add_function_arguments(fn, skip=set(groups), sub_configs=False)
    for kind in groups.values():
        parser.add_class_arguments(kind, nested_key=None)
    return parser


def parsed(fn: Callable, name: str, argv: Sequence[str]) -> dict[str, Any]:
    """The arguments of a function from the command line, dataclasses made.

    Raises: Mistake, in one line, for an option that is not known (naming the nearest that is), missing or of another type.
    """
    parser, groups = parser_of(fn, name), _groups(fn)
    known = {option for action in parser._actions for option in action.option_strings}
    try:
        values = vars(parser.parse_args(_translated(argv, known, parser)))
    except Mistake as error:
        raise Mistake(f"{_after(argv, '--config')}: {error}" if "parsing config" in str(error) else str(error)) from None
    made: dict[str, Any] = {}
    for group, kind in groups.items():
        fields = [field.name for field in dataclasses.fields(kind)]
        made[group] = kind(**{field: values.pop(field) for field in fields})
    return made | {key: value for key, value in values.items() if key in inspect.signature(fn).parameters}


def _groups(fn: Callable) -> dict[str, type]:
    hints = typing.get_type_hints(fn)
    return {name: hints[name] for name in inspect.signature(fn).parameters if dataclasses.is_dataclass(hints[name])}


def _translated(argv: Sequence[str], known: set[str], parser) -> list[str]:
    """The same in our names; an option that is only a switch gets its `true`."""
    switches = {option for action in parser._actions for option in action.option_strings if _is_switch(action)}
    out: list[str] = []
    for i, word in enumerate(argv):
        option, equals, value = word.partition("=")
        option = option.replace("-", "_").replace("__", "--", 1) if option.startswith("--") else option
        if option.removeprefix("--") in TRL and option not in known:
            option = "--" + TRL[option.removeprefix("--")]
        if option.startswith("--") and option not in known and option.split(".")[0] not in known:
            near = difflib.get_close_matches(option, [*known, *(f"--{name}" for name in TRL)], n=1)
            raise Mistake(f"{word.partition('=')[0]} is not known" + (f"; did you mean {near[0]}?" if near else "; see --help"))
        alone = option in switches and not equals and (i + 1 == len(argv) or argv[i + 1].startswith("--"))
        out.append(option + ("=true" if alone else equals + value))
    return out


def _after(argv: Sequence[str], option: str) -> str:
    """What stands behind an option."""
    words = " ".join(argv).replace(f"{option}=", f"{option} ").split()
    return words[words.index(option) + 1]


def _is_switch(action) -> bool:
    return getattr(action, "_typehint", None) is bool
