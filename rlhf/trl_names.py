"""TRL's names of options, and what they are here: another name, another value, or a reason why not.

The same number means the same, or the difference is said: a rename says it by itself, and the
functions of `RULES` translate what another name alone would get wrong.  `rlhf.trl_tables` holds
names and defaults.
"""

import importlib.util
import json
import math
import os
import re
from collections.abc import Callable, Container, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from rlhf import trl_tables
from rlhf.fields import documented


@documented
class Given(NamedTuple):
    """What was given for an option.

    Attributes:
      written: its name as it stands there, with `--` or the file before it.
      value: a value as YAML has it, or the words behind an option that was typed.
      words: whether these are words.
    """

    written: str
    value: Any
    words: bool = False


@documented
class Command(NamedTuple):
    """What a rule may look at.

    Attributes:
      name: of the command.
      defaults: every option that it has, and what it is where nothing is given.
      given: all that was given, by names without marks, `-` being `_`.
      notes: lines for the user, which rules add to.
    """

    name: str
    defaults: Mapping[str, Any]
    given: Mapping[str, Given]
    notes: list[str]

    def value(self, name: str, default: Any = None) -> Any:
        """What was given for a name, plain."""
        return plain(self.given[name]) if name in self.given else default


def translated(
    command: str, defaults: Mapping[str, Any], given: Mapping[str, Given]
) -> tuple[dict[str, Given], list[str]]:
    """What was given, by our names, and notes for the user where something is not as in TRL.

    Args:
      command: its name.
      defaults: every option that it has, with its default.
      given: names as they were written, without marks and with `_` for `-`, to what was given.

    Raises: ValueError where a value of TRL's has no counterpart, naming what has; and where two
      names are one option.

    >>> defaults = {"batch_size": 8, "micro_batches": 1, "num_samples": 8}
    >>> written = Given("--per_device_train_batch_size", ["16"], words=True)
    >>> found, _ = translated("grpo", defaults, {"per_device_train_batch_size": written})
    >>> found["batch_size"].value  # of 16 completions, in groups of 8
    2
    """
    request = Command(command, defaults, given, [])
    found: dict[str, Given] = {}
    for name, one in given.items():
        rule = RULES.get(name)
        if rule is not None and (name not in defaults or name in ALWAYS):
            ours = {
                ours: Given(one.written, value)
                for ours, value in rule(one.written, plain(one), request).items()
            }
        elif name in trl_tables.IDLE and name not in defaults:
            ours = {}
            request.notes.append(f"{one.written} changes nothing here")
        else:
            ours = {name if name in defaults else trl_tables.RENAMED.get(name, name): one}
        for option, value in ours.items():
            if option in found and found[option].written != one.written:
                raise ValueError(
                    f"{one.written} and {found[option].written} are both --{option}; give one of "
                    "them"
                )
            found[option] = value
    return found | _batch(request, found), request.notes


def ours(name: str, options: Container[str]) -> str | None:
    """What a name of TRL's is here, where these options have it.

    >>> ours("num_generations", ["steps", "num_samples"])
    'num_samples'
    """
    found = (trl_tables.RENAMED | trl_tables.TARGETS).get(name, "")
    return found if found in options else None


def known(options: Container[str]) -> list[str]:
    """TRL's names that a command with these options knows."""
    return [name for name in trl_tables.RENAMED | trl_tables.TARGETS if ours(name, options)]


def suggestions(typed: str, names: Iterable[str]) -> list[str]:
    """The names that may have been meant: one spelt alike, or those that it is short for.

    >>> names = ["learning_rate", "kl_coef", "kl_target", "steps"]
    >>> [suggestions(typed, names) for typed in ("step", "lr", "kl", "xyz")]
    [['steps'], ['learning_rate'], ['kl_coef', 'kl_target'], []]
    """

    def is_short_for(name: str) -> bool:
        initials = "".join(word[:1] for word in name.split("_"))
        return typed == initials or name.startswith(f"{typed}_")

    return get_close_matches(typed, names, n=1) or list(filter(is_short_for, names))


def merged(
    file: Mapping[str, Given], typed: Mapping[str, Given], defaults: Mapping[str, Any]
) -> dict[str, Given]:
    """Both together: what is typed wins over the same option of the file, whichever its name."""

    def of_ours(name: str) -> str:
        return name if name in defaults else ours(name, defaults) or name

    wins = {of_ours(name) for name in typed}

    def stays(name: str) -> bool:
        if name in trl_tables.BATCH:  # the batch is made of several
            return name not in typed and "batch_size" not in typed
        return of_ours(name) not in wins

    return {name: one for name, one in file.items() if stays(name)} | dict(typed)


def plain(given: Given) -> Any:
    """A value as YAML has it: of words a number, true, false or null where they are one.

    Several words are a list.

    >>> several = (["0.1"], ["true"], [], ["none"], ["a", "b"])
    >>> [plain(Given("--x", words, words=True)) for words in several]
    [0.1, True, True, 'none', ['a', 'b']]
    """
    if not given.words:
        return given.value
    words = [
        _word(part)
        for word in given.value
        for part in (_listed(word) if word.startswith("[") else [word])
    ]
    if given.value and given.value[0].startswith("["):
        return words
    return words[0] if len(words) == 1 else words or True


def _listed(word: str) -> list[str]:
    return [part.strip(" '\"") for part in word.strip("[]").split(",") if part.strip()]


def _word(word: str) -> Any:
    if word.lower() in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[word.lower()]
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


# --- rules: (written, value, command) -> our options ----------------------------------------------


def _report_to(written: str, value: Any, command: Command) -> dict:
    if value in (None, "none", ["none"], False):
        return {"track": []}
    if value in ("all", ["all"]):
        packages = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
        return {
            "track": [
                name for name, package in packages.items() if importlib.util.find_spec(package)
            ]
        }
    return {"track": value if isinstance(value, list) else [value]}


def _max_steps(written: str, value: Any, command: Command) -> dict:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        return {"steps": None if value == -1 else value}
    if command.name not in trl_tables.COUNT_COMPLETIONS:
        return {"steps": value}
    passes, cuts = _integer(command, "num_iterations", "updates_per_batch"), _mini_batches(command)
    if value % (passes * cuts):
        raise ValueError(
            f"{written} {value} counts optimizer steps, but a batch of completions is "
            f"{passes * cuts} of them here; give a "
            f"multiple of {passes * cuts}, or --steps, which counts batches"
        )
    if passes * cuts > 1:
        command.notes.append(
            f"{written} {value} are {value // (passes * cuts)} steps here, each of "
            f"{passes * cuts} updates"
        )
    return {"steps": value // (passes * cuts)}


def _schedule(written: str, value: Any, command: Command) -> dict:
    if value == "constant":
        if command.value("warmup_steps", 0) or command.value("warmup_ratio", 0):
            raise ValueError(
                f"{written} constant has no warm-up in TRL; give constant_with_warmup, or leave "
                "the warm-up out"
            )
        return {"schedule": "constant"}
    if (
        not isinstance(value, str) or value not in trl_tables.SCHEDULES
    ):  # restarts: TRL's default is one cycle, which is a cosine
        raise ValueError(
            f"{written} {value!r} is not here; give one of {', '.join([*trl_tables.SCHEDULES, 'constant'])}"
        )
    return {"schedule": trl_tables.SCHEDULES[value]}


def _schedule_options(written: str, value: Any, command: Command) -> dict:
    cycles = 1 if command.value("lr_scheduler_type") == "cosine_with_restarts" else 0.5
    same = {"num_cycles": cycles, "decay_type": "cosine", "warmup_type": "linear"}
    out: dict[str, Any] = {}
    for name, number in _object(written, value).items():
        if name in ("min_lr_rate", "min_lr_ratio"):
            out["min_learning_rate_ratio"] = number
        elif name == "min_lr":
            peak = command.value("learning_rate", command.defaults.get("learning_rate"))
            out["min_learning_rate_ratio"] = _share(
                f"{written}: min_lr", number, "learning_rate", peak
            )
        elif name == "num_decay_steps":
            steps = command.value("max_steps")
            if steps is None:
                raise ValueError(
                    f"{written}: num_decay_steps {number} is a share here; give --decay_ratio, "
                    "or --max_steps beside"
                )
            out["decay_ratio"] = _share(f"{written}: num_decay_steps", number, "max_steps", steps)
        elif name not in same or number != same[name]:
            raise ValueError(
                f"{written}: {name} {number!r:.80} is not here; give min_lr_rate, min_lr or "
                "num_decay_steps"
            )
    return out


def _share(written: str, part: Any, name: str, total: Any) -> float:
    numbers = [
        one for one in (part, total) if isinstance(one, int | float) and not isinstance(one, bool)
    ]
    if len(numbers) < 2 or not 0 <= part <= total or not 0 < total < math.inf:
        raise ValueError(
            f"{written} {part!r:.80} is no share of {name} {total!r:.80}; give a number from 0 "
            "to that"
        )
    return part / total


def _object(written: str, value: Any) -> dict[str, Any]:
    """Names and values, which may be written as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(
                f'{written} must be names and values, as in {{"a": 1}}, but is {value!r:.80}'
            ) from None
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ValueError(
            f'{written} must be names and values, as in {{"a": 1}}, but is {value!r:.80}'
        )
    return value


def _optim(written: str, value: Any, command: Command) -> dict:
    if isinstance(value, str) and value.endswith(("8bit", "4bit")):
        raise ValueError(
            f"{written} {value}: no moments of 8 bits here; give --moments bfloat16, or "
            "--optimizer adafactor"
        )
    if not isinstance(value, str) or value not in trl_tables.OPTIMIZERS:
        raise ValueError(
            f"{written} {value!r:.80} is not here; give one of {', '.join(trl_tables.OPTIMIZERS)}, or "
            "--optimizer"
        )
    ours = trl_tables.OPTIMIZERS[value]
    if ours in trl_tables.COUPLED_DECAY and command.value("weight_decay", 0):
        command.notes.append(
            f"weight decay is decoupled here as in AdamW; {written} {value} adds it to the "
            "gradient in TRL"
        )
    return {"optimizer": ours}


def _warmup_steps(written: str, value: Any, command: Command) -> dict:
    if isinstance(value, float) and 0 < value < 1:
        return {"warmup_ratio": value}
    return {
        "warmup_steps": int(value) if isinstance(value, float) and value.is_integer() else value
    }


def _resume(written: str, value: Any, command: Command) -> dict:
    if isinstance(value, bool) or value is None:
        return {"resume": bool(value)}
    named = "output" if "output" in command.given else "output_dir"
    output = command.value(named)
    path = Path(str(value))
    if output is None:
        return {"resume": True, "output": str(path)}
    if Path(str(output)).resolve() not in (path.resolve(), *path.resolve().parents):
        raise ValueError(
            f"{written} {value}: a run goes on in its own folder; give --output {value} --resume"
        )
    if path.name.isdecimal() or path.name.startswith("checkpoint-"):
        command.notes.append(
            f"{written} {value}: a run goes on from its newest checkpoint, whichever is named"
        )
    return {"resume": True}


def _precision(written: str, value: Any, command: Command) -> dict:
    if written.lstrip("-").endswith("bf16"):
        return {"dtype": "bfloat16" if value else "float32"}
    return {"dtype": value.removeprefix("torch.") if isinstance(value, str) else value}


def _fp16(written: str, value: Any, command: Command) -> dict:
    if value:
        raise ValueError(f"{written}: nothing is computed in float16 here; give --dtype bfloat16")
    return {}


def _remat(written: str, value: Any, command: Command) -> dict:
    return {"remat": "full" if value else "none"}


def _quantized(written: str, value: Any, command: Command) -> dict:
    return {"quantize": "nf4" if "4bit" in written else "int8"} if value else {}


def _fsdp(written: str, value: Any, command: Command) -> dict:
    words = value.replace(",", " ").split() if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        words = []
    if words and all(word in trl_tables.FULLY_SHARDED for word in words):
        command.notes.append(
            f"{written}: all devices are under fsdp here, without it too but on a TPU of 32 or more"
        )
        return {"fsdp": -1}
    # PyTorch's other strategies have words too; numbers of devices, and all else, are ours to check.
    if words and words[0].endswith(("shard", "shard_op", "offload", "zero2")):
        raise ValueError(
            f"{written} {value!r:.80} is not here; give --data and --fsdp, how many devices each"
        )
    return {"fsdp": value}


def _chat_template(written: str, value: Any, command: Command) -> dict:
    if value is None:
        return {}
    inside = os.path.join(str(value), "chat_template.jinja")
    for file in (str(value), inside):
        if os.path.isfile(file):
            return {"chat_template": file}
    raise ValueError(
        f"{written} {value!r:.200}: no such Jinja file, nor a folder with chat_template.jinja; "
        "give one"
    )


def _text_field(written: str, value: Any, command: Command) -> dict:
    if value == "text":
        return {}
    if "columns" in command.given:
        raise ValueError(
            f"{written} {value!r:.80} and {command.given['columns'].written} both name columns; "
            "give --columns alone"
        )
    return {"columns": {str(value): "text"}}


def _use_peft(written: str, value: Any, command: Command) -> dict:
    if not value:
        return {} if "lora_r" in command.given or "lora_rank" in command.given else {"lora_rank": 0}
    return (
        {} if "lora_r" in command.given or "lora_rank" in command.given else dict(trl_tables.PEFT)
    )


def _lora_r(written: str, value: Any, command: Command) -> dict:
    if "use_peft" not in command.given:
        command.notes.append(f"{written} {value} trains adapters here, without --use_peft too")
    return {"lora_rank": value if command.value("use_peft", True) else 0}


def _without(cure: str, *allowed: Any) -> Callable:
    """A rule for what is not here: these values alone say so too."""

    def rule(written: str, value: Any, command: Command) -> dict:
        if value not in allowed:
            raise ValueError(f"{written} {value}: {cure}")
        return {}

    return rule


def _shuffled(written: str, value: Any, command: Command) -> dict:
    if (
        not value and command.name in trl_tables.COUNT_COMPLETIONS
    ):  # in SFT a sampler shuffles whichever is given
        raise ValueError(
            f"{written} {value}: prompts come in a new random order every epoch; leave it out"
        )
    return {}


def _best(written: str, value: Any, command: Command) -> dict:
    """What evaluations are compared by: the reward where completions are sampled, else the loss."""
    is_reward = "reward" in command.defaults
    metric = "reward" if is_reward else "loss"
    if value not in (None, metric, f"eval_{metric}") and value is not is_reward:
        raise ValueError(
            f"{written} {value!r:.80}: evaluations are compared by their {metric}; leave it out"
        )
    return {}


def _data_seed(written: str, value: Any, command: Command) -> dict:
    if value is not None and value != command.value("seed", command.defaults.get("seed")):
        raise ValueError(f"{written} {value!r:.80}: one seed is of everything random; give --seed")
    return {}


def _strategy(option: str) -> Callable:
    def rule(written: str, value: Any, command: Command) -> dict:
        if value in ("no", False) and option != "log_every":
            return {option: 0}
        if value != "steps":
            raise ValueError(f"{written} {value!r} is not here; give --{option} steps")
        return {}

    return rule


def _is_cispo(command: Command) -> bool:
    """Whether the loss has one bound, TRL's epsilon_high, which is of the ratio itself."""
    return command.value("loss_type", command.value("loss")) in ("cispo", ["cispo"])


def _epsilon(written: str, value: Any, command: Command) -> dict:
    has_high = "epsilon_high" in command.given or "clip_high" in command.given
    if _is_cispo(command):
        return {} if has_high else {"max_ratio": value}
    return {
        "clip_low": value,
        **({} if has_high else {"clip_high": value}),
    }  # epsilon is both, where it stands alone


def _epsilon_high(written: str, value: Any, command: Command) -> dict:
    return {"max_ratio" if _is_cispo(command) else "clip_high": value}


def _delta(written: str, value: Any, command: Command) -> dict:
    if _is_cispo(command) and value is not None:
        raise ValueError(
            f"{written} {value!r:.80}: cispo has one bound of its ratio, epsilon_high; give "
            "that, or --max_ratio"
        )
    return {"max_ratio": value}


def _importance_level(written: str, value: Any, command: Command) -> dict:
    of_sequences = value == "sequence" and command.value("loss_type", command.value("loss")) in (
        "luspo",
        "gspo",
    )
    if value != "token" and not of_sequences:
        raise ValueError(f"{written} {value}: ratios of whole sequences are --loss gspo here")
    return {}


def _scale_rewards(written: str, value: Any, command: Command) -> dict:
    if isinstance(command.defaults.get("scale_rewards"), bool):  # ppo's own, which is a switch
        return {"scale_rewards": value}
    return {
        "scale_rewards": {True: "group", False: "none"}[value] if isinstance(value, bool) else value
    }


def _corrected(written: str, value: Any, command: Command) -> dict:
    return {} if value else {"importance": "none"}


def _log_completions(written: str, value: Any, command: Command) -> dict:
    return {"log_completions": int(value) if isinstance(value, bool) else value}


def _num_eval(written: str, value: Any, command: Command) -> dict:
    number = _integer(command, "num_generations", "num_samples")
    if value is not None and value != number:
        raise ValueError(
            f"{written} {value!r:.80}: evaluations sample as many as steps do, {number} a "
            "prompt; leave it out"
        )
    return {}


def _generation(written: str, value: Any, command: Command) -> dict:
    found = _object(written, value)
    if unknown := [name for name in found if name not in trl_tables.GENERATION]:
        raise ValueError(
            f"{written}: {unknown[0]:.80} is not here; give of {', '.join(trl_tables.GENERATION)}"
        )
    return {trl_tables.GENERATION[name]: one for name, one in found.items()}


def _reward_funcs(written: str, value: Any, command: Command) -> dict:
    several = re.split(r",(?![^(]*\))", value) if isinstance(value, str) else value
    if not isinstance(several, list):
        return {"reward": value}
    return {"reward": [_reward(one) if isinstance(one, str) else one for one in several]}


def _reward(name: str) -> str:
    """TRL's reward by our name, and `module.function` as `module:function`.

    >>> _reward("accuracy_reward"), _reward("mine.rewards.closeness"), _reward("exact")
    ('math', 'mine.rewards:closeness', 'exact')
    """
    if re.fullmatch(r"\w+(\.\w+)+", name) and not os.path.exists(name):  # a model's folder is
        return ":".join(name.rsplit(".", 1))
    return trl_tables.REWARDS.get(name, name)


def _clip_range(written: str, value: Any, command: Command) -> dict:
    if not isinstance(value, list):
        return {"reward_clip": value}
    if len(value) != 2 or not isinstance(value[1], int | float) or value[0] != -value[1]:
        raise ValueError(
            f"{written} {value!r:.80} is not here; give --reward_clip, ± which rewards are "
            "clipped to"
        )
    return {"reward_clip": value[1]}


def _sync(written: str, value: Any, command: Command) -> dict:
    if not value:
        return {"sync_every": 0} if "sync_every" in command.defaults else {}
    return {"sync_every": command.value("ref_model_sync_steps", 512)}  # TRL's default


def _sync_steps(written: str, value: Any, command: Command) -> dict:
    if "sync_ref_model" in command.given:
        return {}  # said there
    command.notes.append(
        f"{written} {value} moves the reference here, without --sync_ref_model too"
    )
    return {"sync_every": value}


def _loss_type(written: str, value: Any, command: Command) -> dict:
    several = value if isinstance(value, list) else [value]
    if not {"epsilon", "clip_low"} & command.given.keys():
        command.notes.extend(
            note
            for (name, loss), note in trl_tables.OF_LOSSES.items()
            if name == command.name and loss in several
        )
    if "loss" not in command.defaults and several in (
        ["nll"],
        ["chunked_nll"],
    ):  # of sft, which has no other
        return {}
    ours = [
        trl_tables.LOSSES.get(name, name) if isinstance(name, str) else name for name in several
    ]
    return {"loss": ours if isinstance(value, list) else ours[0]}


def _packing(written: str, value: Any, command: Command) -> dict:
    if not isinstance(value, bool):
        return {"packing": value}
    named = command.value("packing_strategy", "bfd")
    return {
        "packing": ("split" if named in ("bfd_split", "bfd-requeue") else named)
        if value
        else "none"
    }


def _packing_strategy(written: str, value: Any, command: Command) -> dict:
    if "packing" not in command.given:
        raise ValueError(
            f"{written} {value}: TRL packs with packing true alone; give --packing beside it"
        )
    return {}


def _nothing(written: str, value: Any, command: Command) -> dict:
    return {}


def _batch(command: Command, found: Mapping[str, Given]) -> dict[str, Given]:
    """The batch of a step: TRL's is of one device and one accumulated part; ours is the whole.

    TRL's GRPO and RLOO count completions, and all of ours prompts.
    """
    theirs = {name: command.given[name] for name in trl_tables.BATCH if name in command.given}
    if not theirs or "batch_size" not in command.defaults:
        return {}
    written = next(iter(theirs.values())).written
    parts = _positive(command, "gradient_accumulation_steps", 1)
    if "batch_size" in found:
        if set(theirs) == {"gradient_accumulation_steps"}:
            total = found["batch_size"].written
            raise ValueError(
                f"{written} {parts} multiplies TRL's per_device_train_batch_size, but {total} is "
                "the whole batch; "
                f"give --micro_batches {parts} to take it in {parts} parts, or "
                "--per_device_train_batch_size"
            )
        raise ValueError(
            f"{written} and {found['batch_size'].written} are both the batch; give one of them"
        )
    size = _positive(command, "per_device_train_batch_size", 8) * parts  # TRL's default is 8
    cuts = 1
    if command.name in trl_tables.COUNT_COMPLETIONS:
        cuts, group = _mini_batches(command), _integer(command, "num_generations", "num_samples")
        if size * cuts % group:
            raise ValueError(
                f"{written}: {size * cuts} completions a step are no whole groups of "
                f"num_generations {group}; give a batch "
                f"that {group} divides, or --batch_size, which counts prompts"
            )
        command.notes.append(
            f"{size * cuts} completions a step are {size * cuts // group} prompts here: "
            f"--batch_size {size * cuts // group}"
        )
        size = size * cuts // group
    out = {"batch_size": Given(written, size)}
    if "micro_batches" not in found and "gradient_accumulation_steps" in theirs:
        if (fitting := math.gcd(size, parts)) != parts:
            command.notes.append(
                f"the {size} prompts of a step are taken in {fitting} parts, not {parts}, to the "
                "same end"
            )
        out["micro_batches"] = Given(written, fitting)
    if cuts > 1:
        out["mini_batches"] = Given(written, cuts)
    return out


def _mini_batches(command: Command) -> int:
    """Optimizer steps of a pass over one generation, by TRL's names `steps_per_generation` and
    `generation_batch_size`."""
    if "mini_batches" in command.given:
        return _positive(command, "mini_batches", 1)
    parts = _positive(command, "gradient_accumulation_steps", 1)
    rows = _positive(command, "per_device_train_batch_size", 8)
    accumulated = _positive(command, "steps_per_generation", parts)
    if "generation_batch_size" in command.given:
        total = _positive(command, "generation_batch_size", rows)
        accumulated = total // rows if total % rows == 0 else 0
    if not accumulated or accumulated % parts:
        raise ValueError(
            "steps_per_generation and generation_batch_size must hold whole optimizer steps, of "
            "per_device_train_batch_size "
            f"{rows} in gradient_accumulation_steps {parts}; give multiples"
        )
    return accumulated // parts


def _integer(command: Command, theirs: str, ours: str) -> int:
    default = command.defaults.get(ours)
    default = default if isinstance(default, int) else 1
    return _positive(command, theirs if theirs in command.given else ours, default)


def _positive(command: Command, name: str, default: int) -> int:
    value = command.value(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise ValueError(
            f"{command.given[name].written} must be a whole number, at least 1, but is "
            f"{value!r:.80}"
        )
    return value


RULES: dict[str, Callable[[str, Any, Command], dict]] = {
    **dict.fromkeys(trl_tables.BATCH, _nothing),  # all together, in `_batch`
    "max_steps": _max_steps,
    "optim": _optim,
    "lr_scheduler_type": _schedule,
    "lr_scheduler_kwargs": _schedule_options,
    "warmup_steps": _warmup_steps,
    "report_to": _report_to,
    "resume_from_checkpoint": _resume,
    "bf16": _precision,
    "torch_dtype": _precision,
    "dtype": _precision,
    "fp16": _fp16,
    "gradient_checkpointing": _remat,
    "activation_checkpointing": _remat,
    "use_peft": _use_peft,
    "lora_r": _lora_r,
    "load_in_4bit": _quantized,
    "load_in_8bit": _quantized,
    "fsdp": _fsdp,
    "chat_template_path": _chat_template,
    "dataset_text_field": _text_field,
    "shuffle_dataset": _shuffled,
    "data_seed": _data_seed,
    "metric_for_best_model": _best,
    "greater_is_better": _best,
    "eval_strategy": _strategy("eval_every"),
    "save_strategy": _strategy("save_every"),
    "logging_strategy": _strategy("log_every"),
    "epsilon": _epsilon,
    "epsilon_high": _epsilon_high,
    "delta": _delta,
    "loss_type": _loss_type,
    "importance_sampling_level": _importance_level,
    "vllm_importance_sampling_correction": _corrected,
    "scale_rewards": _scale_rewards,
    "reward_clip_range": _clip_range,
    "reward_funcs": _reward_funcs,
    "sync_ref_model": _sync,
    "ref_model_sync_steps": _sync_steps,
    "num_generations_eval": _num_eval,
    "generation_kwargs": _generation,
    "log_completions": _log_completions,
    "packing": _packing,
    "packing_strategy": _packing_strategy,
    **{name: _without(*why) for name, why in trl_tables.NOT_HERE.items()},
}
# Of both systems, with other values.
ALWAYS = ("warmup_steps", "packing", "dtype", "fsdp", "scale_rewards", "log_completions")


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Option -> (our default, TRL's), of those that both have, where they differ.

    >>> theirs = {"learning_rate": 1e-6, "beta": 0.1}
    >>> differences(theirs, {"learning_rate": 1e-5, "beta": 0.1, "epochs": 1.0})
    {'learning_rate': (1e-05, 1e-06)}
    """
    return {
        name: (ours[name], value)
        for name, value in theirs.items()
        if name in ours and ours[name] != value
    }
