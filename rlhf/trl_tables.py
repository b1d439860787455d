"""TRL's names of options and values as tables: what they are here, why some are not, and what TRL
1.16 takes where nothing is given.
"""

from typing import Any

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
TARGETS = {  # what the rules of `rlhf.trl_names` make of a name, for suggestions and the list
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
        "the batch is what is given; give --micro_batches auto, which takes it in parts that fit",
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
        "importance": "sequence_mask", "sync_share": 0.6, **_SAMPLED,
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
