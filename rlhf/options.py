"""Command-line options out of a recipe's own signature: its types, defaults and docstrings are the parser."""

import argparse
import dataclasses
import difflib
import inspect
import json
import shutil
import textwrap
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
    "cpo_alpha": "nll_coef",
    "tpo_alpha": "nll_coef",
    "simpo_gamma": "gamma",
    "tpo_l_gamma": "gamma",
    "num_generations": "num_samples",
    "max_completion_length": "max_new_tokens",
    "response_length": "max_new_tokens",
    "reward_funcs": "reward",
    "epsilon": "clip_low",
    "epsilon_high": "clip_high",
    "cliprange": "clip",
    "cliprange_value": "value_clip",
    "vf_coef": "value_coef",
    "gamma": "discount",
    "num_mini_batches": "mini_batches",
    "missing_eos_penalty": "missing_end_penalty",
    "reward_model_path": "reward",
    "reward_model_name_or_path": "reward",
    "num_ppo_epochs": "updates_per_batch",
    "num_iterations": "updates_per_batch",
    "ref_model_sync_steps": "sync_every",
    "ref_model_mixup_alpha": "sync_share",
    "resume_from_checkpoint": "resume",
    "assistant_only_loss": "assistant_only",
    "completion_only_loss": "completion_only",
    "train_on_last_step_only": "last_step_only",
    "teacher_model_name_or_path": "teacher",
}

OURS = ("config", "print_config", "help")  # options of every command


class Mistake(ValueError):
    """What the user typed cannot be; the message says why and what would do."""


class _Parser(jsonargparse.ArgumentParser):
    needed: Sequence[str] = ()  # options without a default

    def error(self, message, ex=None) -> NoReturn:
        raise Mistake(" ".join(str(message).split()))

    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        """An option's name, its default (... where there is none) and what it is, in a line or two: two screens in all."""
        width = min(shutil.get_terminal_size().columns, 128)
        usage = ["usage: rlhf", *self.prog.split()[1:], *(f"--{name} {name.upper()}" for name in self.needed), "[options]"]
        lines = textwrap.wrap(" ".join(usage), width)
        for group in self._action_groups[2:]:  # behind those that every parser has
            options = (_explained(x, x.dest in self.needed, width) for x in group._group_actions)
            lines += ["", *textwrap.wrap(f"{group.title}:", width), *(line for option in options for line in option)]
        of_all = "Of every command: --config FILE (YAML; what is typed beside it wins), --print_config"
        return "\n".join([*lines, "", *textwrap.wrap(of_all, width), ""])


def _explained(option: argparse.Action, needed: bool, width: int) -> list[str]:
    value = "..." if needed else option.default if isinstance(option.default, str) else json.dumps(option.default)
    choices = str(option.metavar or "").strip("{}").split(",")
    listed = f" ({', '.join(choices)})" if len(choices) > 1 and isinstance(option.default, str) else ""
    return textwrap.wrap(f"{f'  --{option.dest} {value}':<26}  {option.help}{listed}", width, subsequent_indent=" " * 28)


def parser_of(fn: Callable, name: str) -> jsonargparse.ArgumentParser:
    """The parser of a function's parameters; those of a dataclass are options of their own, side by side with the others."""
    parser = _Parser(prog=f"rlhf {name}", description=(inspect.getdoc(fn) or "").split("\n\n")[0])
    parser.add_argument("--config", action="config")
    groups = _groups(fn)
    parser.add_function_arguments(fn, skip=set(groups), sub_configs=False)
    for kind in groups.values():
        parser.add_class_arguments(kind, nested_key=None)
    parser.needed = [option.dest for option in parser._actions if option.required]
    return parser


def parsed(fn: Callable, name: str, argv: Sequence[str]) -> dict[str, Any]:
    """The arguments of a function from the command line, dataclasses made.

    Words before the first option are the function's first parameter: `rlhf chat RUN`, `rlhf plot RUN RUN`.  A list may be
    written as words, `--loss sigmoid sft`, and a switch without its `true`.

    Raises: Mistake, in one line, for an option that is not known (naming the nearest that is), missing or of another type.
    """
    parser, groups, hints = parser_of(fn, name), _groups(fn), _hints(fn)
    try:
        values = vars(parser.parse_args(_translated(argv, hints)))
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


def _hints(fn: Callable) -> dict[str, Any]:
    """The type of every option."""
    own = {name: hint for name, hint in typing.get_type_hints(fn).items() if name in inspect.signature(fn).parameters}
    of_groups = {name: hint for kind in _groups(fn).values() for name, hint in typing.get_type_hints(kind).items()}
    return {name: hint for name, hint in own.items() if not dataclasses.is_dataclass(hint)} | of_groups


def _translated(argv: Sequence[str], hints: dict[str, Any]) -> list[str]:
    """The same as `--option=value` in our names."""
    out: list[str] = []
    theirs: dict[str, str] = {}
    typed: dict[str, str] = {}
    for written, words in _grouped(argv, next(iter(hints))):
        name = written.replace("-", "_")
        if name in TRL and name not in hints:
            theirs[name] = words[-1] if words else ""
            name = TRL[name]
        if typed.setdefault(name, written) != written:
            raise Mistake(f"--{written} and --{typed[name]} are both --{name}; give one of them")
        if name in OURS:
            out += [f"--{name}", *words]
            continue
        if name not in hints:
            near = difflib.get_close_matches(name, [*hints, *TRL], n=1)
            raise Mistake(f"--{written} is not known" + (f"; did you mean --{near[0]}?" if near else "; see --help"))
        if _is_list(hints[name]) and words and not words[0].startswith("["):
            words = [f"[{','.join(words)}]"]
        if hints[name] is bool and not words:
            words = ["true"]
        if len(words) != 1:
            raise Mistake(f"--{written} takes one value, but is given {' '.join(words) or 'none'}")
        out.append(f"--{name}={words[0]}")
    return out + _whole_batch(theirs)


def _grouped(argv: Sequence[str], first: str) -> list[tuple[str, list[str]]]:
    """Options without their dashes, and the words behind each; words before any option are `first`'s."""
    found: list[tuple[str, list[str]]] = []
    for word in argv:
        word = "--help" if word == "-h" else word
        if word.startswith("--"):
            option, equals, value = word.lstrip("-").partition("=")
            found.append((option, [value] if equals else []))
        else:
            found = found or [(first, [])]
            found[-1][1].append(word)
    return found


def _whole_batch(theirs: dict[str, str]) -> list[str]:
    """TRL's batch is of one device and one of several accumulated parts; ours is the whole, and the parts are cut from it."""
    parts = theirs.get("gradient_accumulation_steps")
    if parts is None or not parts.isdecimal():
        return []
    of_part = theirs.get("per_device_train_batch_size", "8")
    return [f"--batch_size={int(of_part) * int(parts)}"] if of_part.isdecimal() else []


def _is_list(hint: Any) -> bool:
    return typing.get_origin(hint) is list or any(typing.get_origin(part) is list for part in typing.get_args(hint))


def _after(argv: Sequence[str], option: str) -> str:
    """What stands behind an option."""
    words = " ".join(argv).replace(f"{option}=", f"{option} ").split()
    return words[words.index(option) + 1]
