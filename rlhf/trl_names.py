"""TRL's names of options, and what they are here: another name, another value, or a reason why not.

The same number means the same, or the difference is said: a rename says it by itself, the functions of `RULES` translate what
another name alone would get wrong, and `DEFAULTS` lists what TRL 1.16 takes where nothing is given.
"""

import importlib.util
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.fields import documented

RENAMED = {  # what TRL's users type -> what it is here, with the same value
    "model_name_or_path": "model",
    "dataset_name": "dataset",
    "dataset_train_split": "split",
    "dataset_test_split": "eval_split",
    "output_dir": "output",
    "num_train_epochs": "epochs",
    "logging_steps": "log_every",
    "eval_steps": "eval_every",
    "save_steps": "save_every",
    "save_total_limit": "keep",
    "lora_r": "lora_rank",
    "use_dora": "dora",
    "cpo_alpha": "nll_coef",
    "tpo_alpha": "nll_coef",
    "simpo_gamma": "gamma",
    "tpo_l_gamma": "gamma",
    "num_generations": "num_samples",
    "max_completion_length": "max_new_tokens",
    "response_length": "max_new_tokens",
    "reward_funcs": "reward",
    "reward_model_path": "reward",
    "reward_model_name_or_path": "reward",
    "reward_clip_range": "reward_clip",
    "center_rewards_coefficient": "center_coef",
    "epsilon_high": "clip_high",
    "cliprange": "clip",
    "cliprange_value": "value_clip",
    "vf_coef": "value_coef",
    "gamma": "discount",
    "num_mini_batches": "mini_batches",
    "missing_eos_penalty": "missing_end_penalty",
    "num_ppo_epochs": "updates_per_batch",
    "num_iterations": "updates_per_batch",
    "ref_model_sync_steps": "sync_every",
    "ref_model_mixup_alpha": "sync_share",
    "assistant_only_loss": "assistant_only",
    "completion_only_loss": "completion_only",
    "train_on_last_step_only": "last_step_only",
    "teacher_model_name_or_path": "teacher",
    "vllm_importance_sampling_mode": "importance",
    "vllm_importance_sampling_clip_max": "importance_max",
    "vllm_importance_sampling_clip_min": "importance_min",
}
# What makes no difference to what is learnt, or is always so here.
IDLE = """
attn_implementation bf16_full_eval dataloader_num_workers dataloader_pin_memory dataset_num_proc ddp_find_unused_parameters
disable_tqdm gradient_checkpointing_kwargs log_completions logging_dir logging_first_step per_device_eval_batch_size
remove_unused_columns trust_remote_code use_liger_kernel use_vllm vllm_gpu_memory_utilization vllm_mode
""".split()
LOSSES = {"exo_pair": "exo", "nca_pair": "nca", "sppo_hard": "sppo", "apo_zero_unpaired": "apo_zero", "tpo-l": "tpo_l"}
OF_LOSSES = {  # command and loss -> how the two differ under one name
    ("grpo", "dapo"): "the loss dapo clips at 1.28 here, and at 1.2 in TRL: --clip_high 0.2 is TRL's",
    ("grpo", "dr_grpo"): "the loss dr_grpo leaves rewards undivided here, as TRL's does with scale_rewards none alone",
    ("grpo", "luspo"): "the loss luspo clips at 3e-4 and 4e-4 here, and at 0.2 in TRL: --epsilon 0.2 is TRL's",
}
COUNT_COMPLETIONS = ("grpo", "rloo")  # whose batch sizes count completions in TRL; here all count prompts
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "generation_batch_size", "steps_per_generation")
PEFT = dict(lora_rank=16)  # TRL's, where adapters are asked for


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


def translated(command: str, defaults: Mapping[str, Any], given: Mapping[str, Given]) -> tuple[dict[str, Given], list[str]]:
    """What was given, by our names, and notes for the user where something is not as in TRL.

    Args:
      command: its name.
      defaults: every option that it has, with its default.
      given: names as they were written, without marks and with `_` for `-`, to what was given for them.

    Raises: ValueError where a value of TRL's has no counterpart, naming what has; and where two names are one option.

    >>> defaults = {"batch_size": 8, "micro_batches": 1, "num_samples": 8}
    >>> given = {"per_device_train_batch_size": Given("--per_device_train_batch_size", ["16"], words=True)}
    >>> translated("grpo", defaults, given)[0]["batch_size"].value  # of 16 completions, in groups of 8
    2
    """
    asked = Command(command, defaults, given, [])
    found: dict[str, Given] = {}
    for name, one in given.items():
        rule = RULES.get(name)
        if rule is not None and (name not in defaults or name in ALWAYS):
            ours = {ours: Given(one.written, value) for ours, value in rule(one.written, plain(one), asked).items()}
        elif name in IDLE and name not in defaults:
            ours = {}
            asked.notes.append(f"{one.written} changes nothing here")
        else:
            ours = {name if name in defaults else RENAMED.get(name, name): one}
        for option, value in ours.items():
            if option in found and found[option].written != one.written:
                raise ValueError(f"{one.written} and {found[option].written} are both --{option}; give one of them")
            found[option] = value
    return found | _batch(asked, found), asked.notes


def known(defaults: Mapping[str, Any]) -> list[str]:
    """TRL's names that a command with these options knows."""
    return [name for name, ours in (RENAMED | TARGETS).items() if ours in defaults]


def merged(file: Mapping[str, Given], typed: Mapping[str, Given], defaults: Mapping[str, Any]) -> dict[str, Given]:
    """Both together: what is typed wins over the same option of the file, by whichever of its names."""
    ours = lambda name: name if name in defaults else (RENAMED | TARGETS).get(name, name)
    wins = {ours(name) for name in typed}

    def stays(name: str) -> bool:
        if name in BATCH:  # the batch is made of several
            return name not in typed and "batch_size" not in typed
        return ours(name) not in wins

    return {name: one for name, one in file.items() if stays(name)} | dict(typed)


def plain(given: Given) -> Any:
    """A value as YAML has it: of words a number, true, false or null where they are one, and a list where there are several.

    >>> [plain(Given("--x", words, words=True)) for words in (["0.1"], ["true"], [], ["none"], ["a", "b"])]
    [0.1, True, True, 'none', ['a', 'b']]
    """
    if not given.words:
        return given.value
    words = [_word(part) for word in given.value for part in (_listed(word) if word.startswith("[") else [word])]
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


# --- rules: (written, value, command) -> our options ---------------------------------------------------------------------


def _report_to(written: str, value: Any, command: Command) -> dict:
    if value in (None, "none", ["none"], False):
        return {"track": []}
    if value in ("all", ["all"]):
        packages = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
        return {"track": [name for name, package in packages.items() if importlib.util.find_spec(package)]}
    return {"track": value if isinstance(value, list) else [value]}


def _max_steps(written: str, value: Any, command: Command) -> dict:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        return {"steps": None if value == -1 else value}
    if command.name not in COUNT_COMPLETIONS:
        return {"steps": value}
    passes, cuts = _whole(command, "num_iterations", "updates_per_batch"), _mini_batches(command)
    if value % (passes * cuts):
        raise ValueError(
            f"{written} {value} counts optimizer steps, but a batch of completions is {passes * cuts} of them here; give a "
            f"multiple of {passes * cuts}, or --steps, which counts batches"
        )
    if passes * cuts > 1:
        command.notes.append(f"{written} {value} are {value // (passes * cuts)} steps here, each of {passes * cuts} updates")
    return {"steps": value // (passes * cuts)}


def _schedule(written: str, value: Any, command: Command) -> dict:
    same = {"linear": "linear", "cosine": "cosine", "constant_with_warmup": "constant", "cosine_with_restarts": "cosine"}
    if value == "constant":
        if command.value("warmup_steps", 0) or command.value("warmup_ratio", 0):
            raise ValueError(f"{written} constant has no warm-up in TRL; give constant_with_warmup, or leave the warm-up out")
        return {"schedule": "constant"}
    if not isinstance(value, str) or value not in same:  # restarts: TRL's default is one cycle, which is a cosine
        raise ValueError(f"{written} {value!r} is not here; give one of {', '.join([*same, 'constant'])}")
    return {"schedule": same[value]}


def _warmup_steps(written: str, value: Any, command: Command) -> dict:
    if isinstance(value, float) and 0 < value < 1:
        return {"warmup_ratio": value}
    return {"warmup_steps": int(value) if isinstance(value, float) and value.is_integer() else value}


def _resume(written: str, value: Any, command: Command) -> dict:
    if isinstance(value, bool) or value is None:
        return {"resume": bool(value)}
    named = "output" if "output" in command.given else "output_dir"
    output = command.value(named)
    path = Path(str(value))
    if output is None:
        return {"resume": True, "output": str(path)}
    if Path(str(output)).resolve() not in (path.resolve(), *path.resolve().parents):
        raise ValueError(f"{written} {value}: a run goes on in its own folder; give --output {value} --resume")
    if path.name.isdecimal() or path.name.startswith("checkpoint-"):
        command.notes.append(f"{written} {value}: a run goes on from its newest checkpoint, whichever is named")
    return {"resume": True}


def _precision(written: str, value: Any, command: Command) -> dict:
    if written.lstrip("-").endswith("bf16"):
        return {"dtype": "bfloat16" if value else "float32"}
    return {"dtype": value.removeprefix("torch.") if isinstance(value, str) else value}


def _fp16(written: str, value: Any, command: Command) -> dict:
    if value:
        raise ValueError(f"{written}: nothing is computed in float16 here; give --dtype bfloat16")
    return {}


def _use_peft(written: str, value: Any, command: Command) -> dict:
    if not value:
        return {} if "lora_r" in command.given or "lora_rank" in command.given else {"lora_rank": 0}
    return {} if "lora_r" in command.given or "lora_rank" in command.given else dict(PEFT)


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


def _strategy(option: str) -> Callable:
    def rule(written: str, value: Any, command: Command) -> dict:
        if value in ("no", False) and option != "log_every":
            return {option: 0}
        if value != "steps":
            raise ValueError(f"{written} {value!r} is not here; give --{option} steps")
        return {}

    return rule


def _epsilon(written: str, value: Any, command: Command) -> dict:
    high = {} if "epsilon_high" in command.given or "clip_high" in command.given else {"clip_high": value}
    return {"clip_low": value, **high}  # TRL's epsilon is both, where epsilon_high is not given


def _loss_type(written: str, value: Any, command: Command) -> dict:
    several = value if isinstance(value, list) else [value]
    if not {"epsilon", "clip_low"} & command.given.keys():
        command.notes.extend(note for (name, loss), note in OF_LOSSES.items() if name == command.name and loss in several)
    ours = [LOSSES.get(name, name) if isinstance(name, str) else name for name in several]
    return {"loss": ours if isinstance(value, list) else ours[0]}


def _packing(written: str, value: Any, command: Command) -> dict:
    if not isinstance(value, bool):
        return {"packing": value}
    named = command.value("packing_strategy", "bfd")
    return {"packing": ("split" if named in ("bfd_split", "bfd-requeue") else named) if value else "none"}


def _packing_strategy(written: str, value: Any, command: Command) -> dict:
    if "packing" not in command.given:
        raise ValueError(f"{written} {value}: TRL packs with packing true alone; give --packing beside it")
    return {}


def _nothing(written: str, value: Any, command: Command) -> dict:
    return {}


def _batch(command: Command, found: Mapping[str, Given]) -> dict[str, Given]:
    """The batch of a step: TRL's is of one device and of one of several accumulated parts; ours is the whole.

    TRL's GRPO and RLOO count completions, and all of ours prompts.
    """
    theirs = {name: command.given[name] for name in BATCH if name in command.given}
    if not theirs or "batch_size" not in command.defaults:
        return {}
    written = next(iter(theirs.values())).written
    parts = _positive(command, "gradient_accumulation_steps", 1)
    if "batch_size" in found:
        if set(theirs) == {"gradient_accumulation_steps"}:
            whole = found["batch_size"].written
            raise ValueError(
                f"{written} {parts} multiplies TRL's per_device_train_batch_size, but {whole} is the whole batch; "
                f"give --micro_batches {parts} to take it in {parts} parts, or --per_device_train_batch_size"
            )
        raise ValueError(f"{written} and {found['batch_size'].written} are both the batch; give one of them")
    size = _positive(command, "per_device_train_batch_size", 8) * parts  # TRL's default is 8
    cuts = 1
    if command.name in COUNT_COMPLETIONS:
        cuts, group = _mini_batches(command), _whole(command, "num_generations", "num_samples")
        if size * cuts % group:
            raise ValueError(
                f"{written}: {size * cuts} completions a step are no whole groups of num_generations {group}; give a batch "
                f"that {group} divides, or --batch_size, which counts prompts"
            )
        command.notes.append(f"{size * cuts} completions a step are {size * cuts // group} prompts here, --batch_size")
        size = size * cuts // group
    out = {"batch_size": Given(written, size)}
    if "micro_batches" not in found and "gradient_accumulation_steps" in theirs:
        if (fitting := math.gcd(size, parts)) != parts:
            command.notes.append(f"the {size} prompts of a step are taken in {fitting} parts, not {parts}, to the same end")
        out["micro_batches"] = Given(written, fitting)
    if cuts > 1:
        out["mini_batches"] = Given(written, cuts)
    return out


def _mini_batches(command: Command) -> int:
    """Optimizer steps of a pass over one generation, as `steps_per_generation` and `generation_batch_size` have it in TRL."""
    if "mini_batches" in command.given:
        return _positive(command, "mini_batches", 1)
    parts = _positive(command, "gradient_accumulation_steps", 1)
    rows = _positive(command, "per_device_train_batch_size", 8)
    drawn = _positive(command, "steps_per_generation", parts)
    if "generation_batch_size" in command.given:
        whole = _positive(command, "generation_batch_size", rows)
        drawn = whole // rows if whole % rows == 0 else 0
    if not drawn or drawn % parts:
        raise ValueError(
            f"steps_per_generation and generation_batch_size must hold whole optimizer steps, of per_device_train_batch_size "
            f"{rows} in gradient_accumulation_steps {parts}; give multiples"
        )
    return drawn // parts


def _whole(command: Command, theirs: str, ours: str) -> int:
    default = command.defaults.get(ours)
    default = default if isinstance(default, int) else 1
    return _positive(command, theirs if theirs in command.given else ours, default)


def _positive(command: Command, name: str, default: int) -> int:
    value = command.value(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise ValueError(f"{command.given[name].written} must be a whole number, at least 1, but is {value!r:.80}")
    return value


RULES: dict[str, Callable[[str, Any, Command], dict]] = {
    **dict.fromkeys(BATCH, _nothing),  # all together, in `_batch`
    "max_steps": _max_steps,
    "lr_scheduler_type": _schedule,
    "warmup_steps": _warmup_steps,
    "report_to": _report_to,
    "resume_from_checkpoint": _resume,
    "bf16": _precision,
    "torch_dtype": _precision,
    "dtype": _precision,
    "fp16": _fp16,
    "gradient_checkpointing": lambda written, value, command: {"remat": "full" if value else "none"},
    "use_peft": _use_peft,
    "lora_r": _lora_r,
    "lora_dropout": _without("adapters have no dropout here; leave it out", 0, 0.0),
    "lora_target_modules": _without("adapters are on every matrix here; leave it out", "all-linear", ["all-linear"]),
    "use_rslora": _without("adapters count lora_alpha / lora_rank here; give the --lora_alpha that comes to the same", False),
    "load_in_4bit": _without("no command trains on quantised matrices; leave it out", False),
    "load_in_8bit": _without("no command trains on quantised matrices; leave it out", False),
    "optim": _without("all train with AdamW here; leave it out", "adamw_torch", "adamw_torch_fused", "adamw_hf"),
    "push_to_hub": _without("push when the run is over, with `rlhf export RUN --push NAME`", False),
    "overwrite_output_dir": _without("a run is never written over; give another --output", False),
    "eval_strategy": _strategy("eval_every"),
    "save_strategy": _strategy("save_every"),
    "logging_strategy": _strategy("log_every"),
    "epsilon": _epsilon,
    "loss_type": _loss_type,
    "importance_sampling_level": _without("ratios of whole sequences are --loss gspo here", "token"),
    "scale_rewards": _without("undivided is --loss dr_grpo here, and divided by the batch's --loss lite_ppo", "group", True),
    "packing": _packing,
    "packing_strategy": _packing_strategy,
}  # fmt: skip
ALWAYS = ("warmup_steps", "packing", "dtype")  # of both systems, with other values
TARGETS = {  # what the rules make of a name, for suggestions and the list
    "per_device_train_batch_size": "batch_size", "gradient_accumulation_steps": "micro_batches",
    "generation_batch_size": "mini_batches", "steps_per_generation": "mini_batches", "max_steps": "steps",
    "lr_scheduler_type": "schedule", "warmup_steps": "warmup_steps", "report_to": "track", "resume_from_checkpoint": "resume",
    "bf16": "dtype", "torch_dtype": "dtype", "gradient_checkpointing": "remat", "use_peft": "lora_rank", "lora_r": "lora_rank",
    "eval_strategy": "eval_every", "save_strategy": "save_every", "logging_strategy": "log_every", "epsilon": "clip_low",
    "loss_type": "loss", "packing_strategy": "packing",
}  # fmt: skip

# --- defaults ------------------------------------------------------------------------------------------------------------

TRAINER = {  # of every trainer of TRL 1.16
    "epochs": 3.0, "batch_size": 8, "schedule": "linear", "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0,
    "seed": 42, "log_every": 10, "save_every": 500, "keep": None, "dtype": "bfloat16", "remat": "full", "lora_alpha": 32,
}  # fmt: skip
_TEXTS = {"max_length": 1024}
_SAMPLED = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 512, "updates_per_batch": 1}
_ONLINE = {"learning_rate": 5e-7, "beta": 0.1, "loss": "sigmoid", "max_new_tokens": 64, "temperature": 0.9}
DEFAULTS: dict[str, dict[str, Any]] = {  # command -> what TRL's trainer of it takes, by our names
    "sft": {"learning_rate": 2e-5, "packing": "none", "assistant_only": False, **_TEXTS},
    "reward": {"learning_rate": 1e-4, "center_coef": 0.0, **_TEXTS},
    "dpo": {"learning_rate": 1e-6, "beta": 0.1, "sync_share": 0.6, **_TEXTS},
    "kto": {"learning_rate": 1e-6, "beta": 0.1, "loss": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.0, **_TEXTS},
    "bco": {"learning_rate": 5e-7, "beta": 0.1, **_TEXTS},
    "orpo": {"learning_rate": 1e-6, "beta": 0.1, **_TEXTS},
    "cpo": {"learning_rate": 1e-6, "loss": "sigmoid", **_TEXTS},
    "grpo": {
        "learning_rate": 1e-6, "beta": 0.0, "loss": "dapo", "num_samples": 8, "batch_size": 1, "sync_share": 0.6, **_SAMPLED,
    },
    "rloo": {
        "learning_rate": 1e-6, "beta": 0.05, "num_samples": 2, "batch_size": 4, "clip_low": 0.2, "clip_high": 0.2,
        "normalize_advantages": False, **_SAMPLED,
    },
    "ppo": {
        "learning_rate": 3e-6, "kl_coef": 0.05, "updates_per_batch": 4, "mini_batches": 1, "clip": 0.2, "value_clip": 0.2,
        "value_coef": 0.1, "discount": 1.0, "lam": 0.95, "max_new_tokens": 53, "temperature": 0.7, "whiten_rewards": False,
    },
    "online_dpo": {"num_samples": 2, **_ONLINE},
    "xpo": {"alpha": 1e-5, **_ONLINE},
    "nash_md": {"mixture_coef": 0.5, **_ONLINE},
    "prm": {"learning_rate": 1e-5, "last_step_only": False, **_TEXTS},
    "gkd": {
        "learning_rate": 2e-5, "beta": 0.5, "lmbda": 0.5, "temperature": 0.9, "max_new_tokens": 128, "seq_kd": False, **_TEXTS,
    },
}  # fmt: skip
GONE = ("ppo", "prm", "bco", "xpo", "nash_md")  # TRL 1.16 has no trainer of these any more: defaults of the last that had


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Option -> (our default, TRL's), of those that both have, where they differ.

    >>> differences({"learning_rate": 1e-6, "beta": 0.1}, {"learning_rate": 1e-5, "beta": 0.1, "epochs": 1.0})
    {'learning_rate': (1e-05, 1e-06)}
    """
    return {name: (ours[name], value) for name, value in theirs.items() if name in ours and ours[name] != value}
