"""TRL's names of options, and what they are here: another name, another value, or a reason why not.

The same number means the same, or the difference is said: a rename says it by itself, the functions
of `RULES` translate what another name alone would get wrong, and `DEFAULTS` lists what TRL 1.16
takes where nothing is given.
"""

import importlib.util
import json
import math
import os
import re
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
    "use_rslora": "rslora",
    "lora_target_modules": "lora_targets",
    "load_best_model_at_end": "keep_best",
    "top_entropy_quantile": "top_entropy",  # both are the share of tokens that stay
    "cpo_alpha": "nll_coef",
    "tpo_alpha": "nll_coef",
    "simpo_gamma": "gamma",
    "tpo_l_gamma": "gamma",
    "num_generations": "num_samples",
    "max_completion_length": "max_new_tokens",
    "response_length": "max_new_tokens",
    "reward_model_path": "reward",
    "reward_model_name_or_path": "reward",
    "center_rewards_coefficient": "center_coef",
    "epsilon_high": "clip_high",
    "beta": "kl_coef",  # of grpo and rloo; others have a beta of their own
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
    "vllm_importance_sampling_cap": "importance_max",
    "vllm_importance_sampling_clip_min": "importance_min",
}
# What makes no difference to what is learnt, or is always so here.
IDLE = """
activation_checkpointing_kwargs attn_implementation average_tokens_across_devices
batch_eval_metrics bf16_full_eval bnb_4bit_quant_storage cache_implementation dataloader_drop_last
dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers
dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor dataset_num_proc
ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph
ddp_timeout debug disable_dropout disable_tqdm do_eval do_predict do_train
ds3_gather_for_generation enable_jit_checkpoint eval_accumulation_steps eval_do_concat_batches
eval_packing eval_use_gather_object gradient_checkpointing_kwargs ignore_bias_buffers
include_for_metrics include_num_input_tokens_seen label_names length_column_name
liger_kernel_config local_rank log_level log_level_replica log_multimodal log_on_each_node
log_unique_prompts logging_dir logging_first_step logging_nan_inf_filter lora_task_type
num_completions_to_print pad_to_multiple_of padding_free per_device_eval_batch_size
precompute_ref_batch_size precompute_ref_log_probs prediction_loss_only remove_unused_columns
restore_callback_states_from_checkpoint save_on_each_node skip_memory_metrics tf32 torch_compile
torch_compile_backend torch_compile_mode torch_empty_cache_steps
transformers_continuous_batching_config trust_remote_code use_cache use_liger_kernel
use_transformers_continuous_batching use_transformers_paged use_vllm vllm_enable_sleep_mode
vllm_gpu_memory_utilization vllm_group_port vllm_max_model_length vllm_mode vllm_model_impl
vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout
vllm_tensor_parallel_size
""".split()
LOSSES = {
    "exo_pair": "exo",
    "nca_pair": "nca",
    "sppo_hard": "sppo",
    "apo_zero_unpaired": "apo_zero",
    "tpo-l": "tpo_l",
}
OF_LOSSES = {  # command and loss -> how the two differ under one name
    (
        "grpo",
        "dapo",
    ): "the loss dapo clips at 1.28 here, and at 1.2 in TRL: --clip_high 0.2 is TRL's",
    (
        "grpo",
        "dr_grpo",
    ): "the loss dr_grpo leaves rewards undivided, as TRL's does with scale_rewards none alone",
    (
        "grpo",
        "luspo",
    ): "the loss luspo clips at 3e-4 and 4e-4 here, and at 0.2 in TRL: --epsilon 0.2 is TRL's",
}
OPTIMIZERS = {  # of transformers -> what it is here
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_torch_xla": "adamw",
    "adamw_torch_npu_fused": "adamw", "adamw_hf": "adamw", "paged_adamw_32bit": "adamw",
    "adafactor": "adafactor", "lion_32bit": "lion", "paged_lion_32bit": "lion", "sgd": "sgd",
    "rmsprop": "rmsprop", "adagrad": "adagrad",
}  # fmt: skip
COUPLED_DECAY = (
    "sgd",
    "rmsprop",
    "adagrad",
)  # whose weight decay is part of the gradient in PyTorch
SCHEDULES = {
    "linear": "linear", "cosine": "cosine", "constant_with_warmup": "constant",
    "cosine_with_restarts": "cosine", "cosine_with_min_lr": "cosine_with_min_lr",
    "warmup_stable_decay": "warmup_stable_decay", "inverse_sqrt": "inverse_sqrt",
}  # fmt: skip
GENERATION = {  # what `generation_kwargs` may hold
    "stop": "stop", "stop_strings": "stop", "min_new_tokens": "min_new_tokens",
    "min_tokens": "min_new_tokens", "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty", "max_new_tokens": "max_new_tokens",
    "repetition_penalty": "repetition_penalty", "temperature": "temperature", "top_k": "top_k",
    "top_p": "top_p", "min_p": "min_p",
}  # fmt: skip
FULLY_SHARDED = ("full_shard", "shard_grad_op", "auto_wrap")
REWARDS = {  # of TRL's command, with the arguments that it has there
    "accuracy_reward": "math",
    "reasoning_accuracy_reward": "reasoning_accuracy",
    "think_format_reward": "think_format",
    "get_soft_overlong_punishment": "soft_overlong(max_length=1280, cache=256)",
}
PUSH = "push when the run is over, with `rlhf export RUN --push NAME`"
MESH = "devices are split by --data, --fsdp and --tensor; leave it out"
SIDE = "advantages are of the sum of all rewards; give one reward, or --reward_weights"
NOT_HERE: dict[str, tuple] = {  # why, and the values that say the same as leaving it out
    "accelerator_config": (MESH, None),
    "activation_offloading": (
        "activations stay on the device; give --gradient_checkpointing to keep fewer",
        False,
    ),
    "auto_find_batch_size": (
        "the batch is what is given; give --micro_batches where memory is short",
        False,
    ),
    "bnb_4bit_quant_type": ("four bits are nf4 here; leave it out", "nf4"),
    "cast_lm_head_to_fp32": ("the whole model computes in one dtype; give --dtype float32", False),
    "chat_template_kwargs": ("rows have a column chat_template_kwargs for it", None),
    "dataset_kwargs": ("rows are always laid out here; leave it out", None),
    "dataset_streaming": (
        "rows are read before the first step; give --max_rows to download only some",
        False,
    ),
    "deepspeed": (MESH, None),
    "discopop_tau": ("discopop has 0.05 here; leave it out", 0.05),
    "entropy_coef_delta": ("the coefficient of the entropy stays; give --entropy_coef", 0.005),
    "entropy_coef_max": ("the coefficient of the entropy stays; give --entropy_coef", 1.0),
    "entropy_coef_min": ("the coefficient of the entropy stays; give --entropy_coef", 0.0),
    "entropy_target": ("the coefficient of the entropy stays; give --entropy_coef", 0.2),
    "eval_delay": ("evaluations begin with the first that --eval_every asks for; leave it out", 0),
    "f_alpha_divergence_coef": ("the divergence is the reverse KL here; leave it out", 0.5),
    "f_divergence_type": ("the divergence is the reverse KL here; leave it out", "reverse_kl"),
    "fp16_full_eval": ("nothing is computed in float16 here; give --dtype bfloat16", False),
    "fsdp_config": (MESH, None),
    "full_determinism": ("XLA decides; set XLA_FLAGS=--xla_gpu_deterministic_ops=true", False),
    "group_by_length": ("rows come in random order; give --packing bfd to waste no padding", False),
    "hub_always_push": (PUSH, False),
    "hub_model_id": (PUSH, None),
    "hub_private_repo": (PUSH, None),
    "hub_revision": (PUSH, None),
    "hub_strategy": (PUSH, "every_save"),
    "hub_token": ("the token is read from HF_TOKEN; leave it out", None),
    "ignore_data_skip": (
        "a resumed run takes the batches that it would have taken; leave it out",
        False,
    ),
    "label_smoothing_factor": ("the cross-entropy is of the tokens as they are; leave it out", 0),
    "ld_alpha": ("all tokens of a completion count alike; leave it out", None),
    "log_completions_hub_repo": (
        "completions go to samples/ in the run's folder; leave it out",
        None,
    ),
    "lora_modules_to_save": ("with adapters all else is frozen; leave it out", None),
    "lora_target_parameters": ("adapters are on matrices by --lora_targets; leave it out", None),
    "max_tool_calling_iterations": (
        "tools are those of an --environment; give --max_turns, one more than this",
        None,
    ),
    "model_init_kwargs": ("give --dtype, and a folder for another revision", None),
    "model_revision": ("download that revision, and give its folder as --model", "main"),
    "multi_objective_aggregation": (SIDE, "sum_then_normalize"),
    "neftune_noise_alpha": ("embeddings get no noise here; leave it out", None),
    "off_policy_mask_threshold": ("no completion is masked for its KL; leave it out", None),
    "optim_args": ("give --adam_beta1, --adam_beta2, --adam_epsilon or --momentum", None, ""),
    "optim_target_modules": ("all matrices are trained by one --optimizer; leave it out", None),
    "overwrite_output_dir": ("a run is never written over; give another --output", False),
    "parallelism_config": (MESH, None),
    "project": ("wandb reads WANDB_PROJECT; leave it out", "huggingface"),
    "push_to_hub": (PUSH, False),
    "router_aux_loss_coef": ("no load-balancing loss is added here; give 0", 0),
    "run_name": ("a run is named after its folder; give --output", None),
    "sapo_temperature_neg": ("sapo has 1.05 here; leave it out", 1.05),
    "sapo_temperature_pos": ("sapo has 1.0 here; leave it out", 1.0),
    "save_only_model": ("a checkpoint holds all that --resume needs; leave it out", False),
    "trackio_bucket_id": ("trackio writes to this machine; leave it out", None),
    "trackio_space_id": ("trackio writes to this machine; leave it out", None, "trackio"),
    "trackio_static_space_id": ("trackio writes to this machine; leave it out", None),
    "train_sampling_strategy": (
        "rows come in a new random order every epoch; leave it out",
        "random",
    ),
    "truncation_mode": ("rows are cut at their ends; leave it out", "keep_start"),
    "use_adaptive_entropy": ("the coefficient of the entropy stays; give --entropy_coef", False),
    "use_bias_correction_kl": ("the KL is not weighted by the ratio here; give false", False),
    "use_bnb_nested_quant": (
        "the scales of blocks are not quantised themselves; leave it out",
        False,
    ),
    "use_cpu": ("JAX chooses the device; set JAX_PLATFORMS=cpu", False),
    "use_weighting": ("pairs are not weighted by their probability; leave it out", False),
    "vespo_k_neg": ("vespo has 3.0 here; leave it out", 3.0),
    "vespo_k_pos": ("vespo has 2.0 here; leave it out", 2.0),
    "vespo_lambda_neg": ("vespo has 2.0 here; leave it out", 2.0),
    "vespo_lambda_pos": ("vespo has 3.0 here; leave it out", 3.0),
    "vllm_structured_outputs_regex": ("completions are sampled freely; leave it out", None),
}
COUNT_COMPLETIONS = (
    "grpo",
    "rloo",
)  # whose batch sizes count completions in TRL; here all count prompts
BATCH = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "generation_batch_size",
    "steps_per_generation",
)
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
        elif name in IDLE and name not in defaults:
            ours = {}
            request.notes.append(f"{one.written} changes nothing here")
        else:
            ours = {name if name in defaults else RENAMED.get(name, name): one}
        for option, value in ours.items():
            if option in found and found[option].written != one.written:
                raise ValueError(
                    f"{one.written} and {found[option].written} are both --{option}; give one of "
                    "them"
                )
            found[option] = value
    return found | _batch(request, found), request.notes


def known(defaults: Mapping[str, Any]) -> list[str]:
    """TRL's names that a command with these options knows."""
    return [name for name, ours in (RENAMED | TARGETS).items() if ours in defaults]


def merged(
    file: Mapping[str, Given], typed: Mapping[str, Given], defaults: Mapping[str, Any]
) -> dict[str, Given]:
    """Both together: what is typed wins over the same option of the file, whichever its name."""

    def ours(name: str) -> str:
        return name if name in defaults else (RENAMED | TARGETS).get(name, name)

    wins = {ours(name) for name in typed}

    def stays(name: str) -> bool:
        if name in BATCH:  # the batch is made of several
            return name not in typed and "batch_size" not in typed
        return ours(name) not in wins

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
    if command.name not in COUNT_COMPLETIONS:
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
        not isinstance(value, str) or value not in SCHEDULES
    ):  # restarts: TRL's default is one cycle, which is a cosine
        raise ValueError(
            f"{written} {value!r} is not here; give one of {', '.join([*SCHEDULES, 'constant'])}"
        )
    return {"schedule": SCHEDULES[value]}


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
    if not isinstance(value, str) or value not in OPTIMIZERS:
        raise ValueError(
            f"{written} {value!r:.80} is not here; give one of {', '.join(OPTIMIZERS)}, or "
            "--optimizer"
        )
    ours = OPTIMIZERS[value]
    if ours in COUPLED_DECAY and command.value("weight_decay", 0):
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
    if words and all(word in FULLY_SHARDED for word in words):
        command.notes.append(f"{written}: all devices are under fsdp here, without it too")
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


def _shuffled(written: str, value: Any, command: Command) -> dict:
    if (
        not value and command.name in COUNT_COMPLETIONS
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
    if unknown := [name for name in found if name not in GENERATION]:
        raise ValueError(
            f"{written}: {unknown[0]:.80} is not here; give of {', '.join(GENERATION)}"
        )
    return {GENERATION[name]: one for name, one in found.items()}


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
    return REWARDS.get(name, name)


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
            for (name, loss), note in OF_LOSSES.items()
            if name == command.name and loss in several
        )
    if "loss" not in command.defaults and several in (
        ["nll"],
        ["chunked_nll"],
    ):  # of sft, which has no other
        return {}
    ours = [LOSSES.get(name, name) if isinstance(name, str) else name for name in several]
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
    theirs = {name: command.given[name] for name in BATCH if name in command.given}
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
    if command.name in COUNT_COMPLETIONS:
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
    **dict.fromkeys(BATCH, _nothing),  # all together, in `_batch`
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
    **{name: _without(*why) for name, why in NOT_HERE.items()},
}
# Of both systems, with other values.
ALWAYS = ("warmup_steps", "packing", "dtype", "fsdp", "scale_rewards", "log_completions")
TARGETS = {  # what the rules make of a name, for suggestions and the list
    "per_device_train_batch_size": "batch_size", "gradient_accumulation_steps": "micro_batches",
    "generation_batch_size": "mini_batches", "steps_per_generation": "mini_batches",
    "max_steps": "steps", "optim": "optimizer", "lr_scheduler_type": "schedule",
    "lr_scheduler_kwargs": "min_learning_rate_ratio", "warmup_steps": "warmup_steps",
    "report_to": "track", "resume_from_checkpoint": "resume", "bf16": "dtype",
    "torch_dtype": "dtype", "gradient_checkpointing": "remat", "activation_checkpointing": "remat",
    "use_peft": "lora_rank", "lora_r": "lora_rank", "load_in_4bit": "quantize",
    "load_in_8bit": "quantize", "chat_template_path": "chat_template",
    "dataset_text_field": "columns", "eval_strategy": "eval_every", "save_strategy": "save_every",
    "logging_strategy": "log_every", "epsilon": "clip_low", "epsilon_high": "clip_high",
    "delta": "max_ratio", "loss_type": "loss", "sync_ref_model": "sync_every",
    "generation_kwargs": "stop", "packing_strategy": "packing",
    "vllm_importance_sampling_correction": "importance", "reward_clip_range": "reward_clip",
    "reward_funcs": "reward",
}  # fmt: skip

# --- defaults -------------------------------------------------------------------------------------

TRAINER = {  # of every trainer of TRL 1.16
    "epochs": 3.0, "batch_size": 8, "schedule": "linear", "warmup_steps": 0, "weight_decay": 0.0,
    "max_grad_norm": 1.0, "seed": 42, "log_every": 10, "save_every": 500, "keep": None,
    "dtype": "bfloat16", "remat": "full", "lora_alpha": 32, "lora_dropout": 0.05,
}  # fmt: skip
_TEXTS = {"max_length": 1024}
_SAMPLED = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "max_new_tokens": 512,
    "updates_per_batch": 1,
}
_ONLINE = {
    "learning_rate": 5e-7,
    "beta": 0.1,
    "loss": "sigmoid",
    "max_new_tokens": 64,
    "temperature": 0.9,
}
DEFAULTS: dict[str, dict[str, Any]] = {  # command -> what TRL's trainer of it takes, by our names
    "sft": {"learning_rate": 2e-5, "packing": "none", "assistant_only": False, **_TEXTS},
    "reward": {"learning_rate": 1e-4, "center_coef": 0.0, **_TEXTS},
    "dpo": {"learning_rate": 1e-6, "beta": 0.1, "sync_share": 0.6, **_TEXTS},
    "kto": {
        "learning_rate": 1e-6, "beta": 0.1, "loss": "kto", "desirable_weight": 1.0,
        "undesirable_weight": 1.0, **_TEXTS,
    },
    "bco": {"learning_rate": 5e-7, "beta": 0.1, **_TEXTS},
    "orpo": {"learning_rate": 1e-6, "beta": 0.1, **_TEXTS},
    "cpo": {"learning_rate": 1e-6, "loss": "sigmoid", **_TEXTS},
    "grpo": {
        "learning_rate": 1e-6, "kl_coef": 0.0, "loss": "dapo", "num_samples": 8, "batch_size": 1,
        "sync_share": 0.6, **_SAMPLED,
    },
    "rloo": {
        "learning_rate": 1e-6, "kl_coef": 0.05, "num_samples": 2, "batch_size": 4, "clip_low": 0.2,
        "clip_high": 0.2, "normalize_advantages": False, **_SAMPLED,
    },
    "ppo": {
        "learning_rate": 3e-6, "kl_coef": 0.05, "updates_per_batch": 4, "mini_batches": 1,
        "clip": 0.2, "value_clip": 0.2, "value_coef": 0.1, "discount": 1.0, "lam": 0.95,
        "max_new_tokens": 53, "temperature": 0.7, "whiten_rewards": False,
    },
    "online_dpo": {"num_samples": 2, **_ONLINE},
    "xpo": {"alpha": 1e-5, **_ONLINE},
    "nash_md": {"mixture_coef": 0.5, **_ONLINE},
    "prm": {"learning_rate": 1e-5, "last_step_only": False, **_TEXTS},
    "gkd": {
        "learning_rate": 2e-5, "beta": 0.5, "lmbda": 0.5, "temperature": 0.9,
        "max_new_tokens": 128, "seq_kd": False, **_TEXTS,
    },
}  # fmt: skip
GONE = (
    "ppo",
    "prm",
    "bco",
    "xpo",
    "nash_md",
)  # TRL 1.16 has no trainer of these any more: defaults of the last that had


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
