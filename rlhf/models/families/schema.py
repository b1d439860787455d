"""What a config.json may say: kind and range of every field that is read of it, checked at once.

A field means the same in every family that has it, so one table serves all; what a family has
otherwise stands in OF_FAMILY.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from rlhf.models.config import Config, TransformerConfig
from rlhf.models.families.table import ACTIVATIONS
from rlhf.models.rotary import Dynamic
from rlhf.ranges import above, at_least, between, problem

Layers = Annotated[int, between(1, 1000)]
Heads = Annotated[int, between(1, 4096)]
Width = Annotated[int, between(1, 10**6)]
Inner = Annotated[int, between(1, 10**7)]
Count = Annotated[int, at_least(1)]
Number = Annotated[int, between(1, 4096)]  # of experts
Epsilon = Annotated[float, between(0, 1, above=True)]
Positive = Annotated[float, above(0)]
Id = Annotated[int, at_least(0)]
LayerTypes = list[Literal["full_attention", "sliding_attention"]]
Linear = list[Literal["full_attention", "linear_attention"]] | None
Activation = Literal[tuple(ACTIVATIONS)]  # type: ignore[valid-type]
Gated = Literal[(*ACTIVATIONS, *(f"gated-{name}" for name in ACTIVATIONS))]  # type: ignore[valid-type]


def _all(names: str, hint: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), hint)


FIELDS: Mapping[str, Any] = {
    # sizes
    "vocab_size": Annotated[int, between(1, 10**7)],
    **_all("num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers", Layers),
    "num_decoder_layers": Layers | None,
    **_all(
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads "
        "decoder_attention_heads",
        Heads,
    ),
    **_all("num_key_value_heads num_kv_heads", Heads | None),
    **_all("hidden_size n_embd d_model dim d_kv", Width),
    **_all("n_embed head_dim word_embed_proj_dim", Width | None),
    **_all(
        "intermediate_size ffn_dim hidden_dim d_ff encoder_ffn_dim decoder_ffn_dim "
        "moe_intermediate_size",
        Inner,
    ),
    **_all("n_inner ffn_hidden_size", Inner | None),
    **_all("max_position_embeddings n_positions original_max_position_embeddings", Count),
    "type_vocab_size": Annotated[int, between(1, 10**5)],
    # layers that differ
    "layer_types": LayerTypes | None,
    "attention_layers": list[Literal["global", "local"]],
    "no_rope_layers": list[Annotated[int, between(0, 1)]] | None,
    "mlp_only_layers": list[Id] | None,
    **_all(
        "no_rope_layer_interval decoder_sparse_step sliding_window_pattern _sliding_window_pattern "
        "window_size",
        Count,
    ),
    "max_window_layers": Id,
    **_all("sliding_window attention_chunk_size", Count | None),
    # experts
    **_all("num_local_experts num_experts", Annotated[int, between(0, 4096)]),
    "num_experts_per_tok": Number,
    "n_routed_experts": Number,
    "n_shared_experts": Annotated[int, between(0, 4096)] | None,
    **_all("n_group topk_group", Count | None),
    "first_k_dense_replace": Annotated[int, at_least(0)],
    **_all("shared_expert_intermediate_size intermediate_size_mlp", Inner),
    "interleave_moe_layer_step": Count,
    "num_experts_per_token": Number,
    "num_shared_experts": Annotated[int, between(0, 4096)],
    **_all("num_expert_group", Count),
    "mlp_layer_types": list[Literal["dense", "sparse"]] | None,
    **_all("swiglu_alpha swiglu_limit block_ffn_dim_multiplier", Positive | None),
    # layers that are no attention, and latent attention
    **_all("linear_num_key_heads linear_num_value_heads linear_num_heads", Heads),
    **_all("linear_key_head_dim linear_value_head_dim linear_head_dim", Width),
    **_all("linear_conv_kernel_dim conv_L_cache", Annotated[int, between(2, 64)]),
    **_all("kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim", Width),
    "q_lora_rank": Width | None,
    **_all("full_attention_interval block_multiple_of", Count),
    # Gemma 4
    **_all("global_head_dim num_global_key_value_heads top_k_experts", Width | None),
    "hidden_size_per_layer_input": Annotated[int, between(0, 10**6)] | None,
    "vocab_size_per_layer_input": Annotated[int, between(0, 10**7)] | None,
    "num_kv_shared_layers": Annotated[int, between(0, 1000)] | None,
    "per_layer_config": dict | None,
    **_all("block_ff_dim", Inner),
    "moe_layers": list[Id] | None,
    # numbers in the equations
    **_all("rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps", Epsilon),
    **_all(
        "attention_multiplier embedding_multiplier logits_scaling residual_multiplier "
        "query_pre_attn_scalar routed_scaling_factor logit_scale floor_scale",
        Positive,
    ),
    "clip_qkv": Positive | None,
    "attn_scale": Annotated[float, at_least(0)],
    "router_jitter_noise": Annotated[float, at_least(0)],
    **_all("attn_logit_softcapping final_logit_softcapping", Positive | None),
    "relative_attention_num_buckets": Annotated[int, between(4, 10**5)],
    "relative_attention_max_distance": Count,
    # positions that turn
    **_all("rope_theta rotary_emb_base rope_local_base_freq", Annotated[float, above(1)]),
    **_all("partial_rotary_factor rotary_pct", Annotated[float, between(0, 1, above=True)] | None),
    "rotary_dim": Width | None,
    **_all("rope_parameters rope_scaling", dict | None),
    # choices
    **_all("hidden_act activation_function activation dense_act_fn", Activation),
    "hidden_activation": Activation | None,
    "feed_forward_proj": Gated,
    **_all(
        "tie_word_embeddings attention_bias mlp_bias enable_bias bias use_sliding_window "
        "scale_embedding",
        bool,
    ),
    **_all(
        "multi_query new_decoder_architecture parallel_attn alibi use_parallel_residual "
        "norm_topk_prob qkv_bias attention_out_bias use_bias use_qk_norm qk_layernorm "
        "lm_head_bias "
        "attn_temperature_tuning rope_interleave moe_renormalize conv_bias "
        "block_auto_adjust_ff_dim tie_embedding attention_k_eq_v enable_moe_block "
        "use_double_wide_mlp",
        bool,
    ),
    **_all(
        "do_layer_norm_before _remove_final_layer_norm is_gated_act scale_decoder_outputs", bool
    ),
    "num_ln_in_parallel_attn": Annotated[int, between(1, 2)] | None,
    **_all("dtype torch_dtype", Literal["float32", "bfloat16", "float16", "float64"] | None),
    # ids of tokens, and labels
    **_all("bos_token_id decoder_start_token_id forced_bos_token_id", Id | None),
    **_all("eos_token_id forced_eos_token_id", Id | list[Id] | None),
    "pad_token_id": Annotated[int, at_least(-1)] | None,  # -1: old Llamas have none
    "architectures": list[str] | None,
    "num_labels": Annotated[int, between(1, 10**6)] | None,
    **_all("id2label label2id", dict | None),
}
OF_FAMILY: Mapping[str, Mapping[str, Any]] = {
    "gpt_neo": {"intermediate_size": Inner | None},
    "phi3": {
        "original_max_position_embeddings": Annotated[int, at_least(2)],  # its logarithm divides
        "partial_rotary_factor": Annotated[float, between(0, 1, above=True)],
    },
    "roberta": {"pad_token_id": Id},  # positions start after it
    **_all("mixtral minimax_m2 phimoe granitemoe", {"num_local_experts": Number}),
    "llama4_text": {
        "num_local_experts": Number,
        "layer_types": list[Literal["full_attention", "chunked_attention"]] | None,
    },
    "olmoe": {"num_experts": Number},
    **_all("qwen3_next qwen3_5_text qwen3_5_moe_text kimi_linear", {"layer_types": Linear}),
    "lfm2": {"layer_types": list[Literal["full_attention", "conv"]] | None},
    "gemma4_text": {
        "num_experts": Number | None,
        "moe_intermediate_size": Inner | None,
    },
    "qwen2_moe": {"sliding_window": Annotated[int, at_least(0)] | None},
}
ROPE: Mapping[str, Any] = {  # of rope_parameters, and of each layer type's where they differ
    **_all("rope_type type", str),
    "rope_theta": FIELDS["rope_theta"],
    "partial_rotary_factor": Annotated[float, between(0, 1, above=True)],
    "factor": Annotated[float, at_least(1)] | None,
    "original_max_position_embeddings": Annotated[int, at_least(2)],
    **_all("low_freq_factor high_freq_factor", Positive),
    **_all("attention_factor beta_fast beta_slow", Positive | None),
    **_all("mscale mscale_all_dim", Annotated[float, at_least(0)] | None),
    **_all("short_factor long_factor", list[Positive]),
    "truncate": bool,
    **_all("llama_4_scaling_beta alpha", Positive | None),
    **_all("full_attention sliding_attention", dict | None),
}
NEEDED: Mapping[str, tuple[str, ...]] = {  # rope_type -> keys without which it computes nothing
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
# Names that transformers' objects have in every family, whatever the file calls the fields.
LAYERS = "num_hidden_layers"
HEADS = "num_attention_heads"
WIDTH = "hidden_size"
IDS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
)


def check(raw: Mapping[str, Any], model_type: str) -> None:
    """Holds the fields of a config.json against their kinds and ranges, each by itself.

    Raises: ValueError naming the field, what it may be and what it is.

    >>> check({"hidden_size": 10**12}, "llama")
    Traceback (most recent call last):
    ValueError: hidden_size must be a whole number at least 1 and at most 1,000,000, but is 1000000000000
    """
    _held({**FIELDS, **OF_FAMILY.get(model_type, {})}, raw)
    for field in ("rope_parameters", "rope_scaling"):
        for name, rope in _ropes(raw.get(field) or {}, field):
            _check_rope(rope, name)
    _check_labels(raw)
    if (types := raw.get("attention_types")) is not None:
        _check_attention_types(types, raw.get("num_layers"))
    for named in (LAYERS, "num_layers"):
        if raw.get(named) is not None:
            _check_lengths(raw, raw[named], named)


def check_ids(raw: Mapping[str, Any], vocab_size: int) -> None:
    """The ids of tokens that a config.json or generation_config.json names: of the right kind, and
    in the vocabulary.

    Raises: ValueError naming the field and both numbers.

    >>> check_ids({"eos_token_id": [2, 90]}, 64)
    Traceback (most recent call last):
    ValueError: eos_token_id is 90, but the model has 64 tokens (vocab_size), of which the last is 63
    """
    _held({field: FIELDS[field] for field in IDS}, raw)
    for field in IDS:
        value = raw.get(field)
        for token in value if isinstance(value, list) else [value]:
            if token is not None and token >= vocab_size:
                last = (
                    f"the model has {vocab_size} tokens (vocab_size), of which the last is "
                    f"{vocab_size - 1}"
                )
                raise ValueError(f"{field} is {token}, but {last}")


def check_consistency(hf, config: Config) -> None:
    """Fields that must fit one another, once defaults are filled in.

    Args:
      hf: transformers' config.
      config: ours, read of it.

    Raises: ValueError naming the fields and both sides.
    """
    _check_lengths(vars(hf), hf.num_hidden_layers, _said(hf, LAYERS))
    if (
        "sliding_attention" in (getattr(hf, "layer_types", None) or ())
        and hf.sliding_window is None
    ):
        raise ValueError(
            "layer_types has 'sliding_attention', but sliding_window is null, or "
            "use_sliding_window is false"
        )
    if (
        hf.model_type == "t5"
        and hf.relative_attention_max_distance <= hf.relative_attention_num_buckets // 2
    ):
        far = hf.relative_attention_max_distance
        buckets = hf.relative_attention_num_buckets
        raise ValueError(
            f"relative_attention_max_distance {far} must be above half of "
            f"relative_attention_num_buckets {buckets}"
        )
    for half in (
        (config,) if isinstance(config, TransformerConfig) else (config.encoder, config.decoder)
    ):
        _check_turning(hf, half)
        if half.max_positions is not None and half.max_positions < 1:
            raise ValueError(
                f"max_position_embeddings {hf.max_position_embeddings} leaves no position after "
                "the padding's"
            )


def check_heads(raw: Mapping[str, Any], hf) -> None:
    """Heads that divide what they are heads of, before a config of ours is made.

    Raises: ValueError naming the fields and both sides.
    """
    # A family's class has a default where it is not hidden / heads (Gemma), in files that say none.
    head_dim = raw.get("head_dim") or getattr(type(hf), "head_dim", None)
    halves = (
        ("encoder_attention_heads", "decoder_attention_heads")
        if hf.model_type == "bart"
        else (HEADS,)
    )
    for field in halves:
        heads = getattr(hf, field)
        if not isinstance(head_dim, int) and hf.model_type != "t5" and hf.hidden_size % heads:
            raise ValueError(
                f"{_said(hf, field)} {heads} does not divide {_said(hf, WIDTH)} {hf.hidden_size}"
            )
    for field in ("num_key_value_heads", "num_kv_heads"):
        # Not by `getattr`, which warns where layers have fields of their own.
        groups = vars(hf).get(field)
        if groups is not None and hf.num_attention_heads % groups:
            raise ValueError(
                f"{field} {groups} does not divide {_said(hf, HEADS)} {hf.num_attention_heads}"
            )
    experts = getattr(hf, "num_local_experts", None)
    chosen = getattr(hf, "num_experts_per_tok", 0)
    if experts and chosen > experts:
        raise ValueError(f"num_experts_per_tok {chosen} of {experts} experts (num_local_experts)")


def _said(hf, field: str) -> str:
    """A field's name in the family's files."""
    return hf.attribute_map.get(field, field)


def _held(hints: Mapping[str, Any], values: Mapping[str, Any], prefix: str = "") -> None:
    for name, value in values.items():
        if name in hints and (wanted := _problem(hints[name], value)):
            raise ValueError(f"{prefix}{name} must be {wanted}, but is {value!r:.80}")


def _problem(hint: Any, value: Any) -> str | None:
    if hint == dict | None:
        return None if value is None or isinstance(value, dict) else "an object or null"
    return problem(hint, value)


def _check_labels(raw: Mapping[str, Any]) -> None:
    labels = raw.get("id2label")
    if labels is not None and (not labels or not all(name.isdecimal() for name in labels)):
        raise ValueError(
            f"id2label must have an entry for each label, by its number, but is {labels!r:.80}"
        )


def _check_attention_types(types: Any, layers: Any) -> None:
    """`[[["global", "local"], 12]]`: kinds of layers, and how often."""
    well_formed = isinstance(types, list) and all(
        isinstance(entry, list) and len(entry) == 2 for entry in types
    )
    for kinds, times in types if well_formed else [(None, None)]:
        if problem(list[Literal["global", "local"]], kinds) or problem(Layers, times):
            form = 'a list such as [[["global", "local"], 12]]'
            raise ValueError(f"attention_types must be {form}, but is {types!r:.80}")
    number = sum(len(kinds) * times for kinds, times in types)
    if isinstance(layers, int) and number != layers:
        raise ValueError(f"attention_types gives {number} layers, but num_layers is {layers}")


def _check_lengths(fields: Mapping[str, Any], layers: int, named: str) -> None:
    for field in ("layer_types", "attention_layers", "no_rope_layers"):
        entries = fields.get(field)
        if entries is not None and len(entries) != layers:
            raise ValueError(
                f"{field} has {len(entries)} entries, but there are {layers} layers ({named})"
            )


def _ropes(rope: Mapping[str, Any], name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The parameters themselves, and those of each layer type."""
    yield name, rope
    yield from (
        (f"{name}.{layer_type}", entry)
        for layer_type, entry in rope.items()
        if isinstance(entry, dict)
    )


def _check_rope(rope: Mapping[str, Any], name: str) -> None:
    _held(ROPE, rope, f"{name}.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if missing := [key for key in NEEDED.get(kind, ()) if not rope.get(key)]:
        raise ValueError(f"{name} with rope_type {kind!r} lacks {', '.join(missing)}")
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        low = rope["low_freq_factor"]
        high = rope["high_freq_factor"]
        raise ValueError(f"{name}.high_freq_factor {high} must be above low_freq_factor {low}")


def _check_turning(hf, config: TransformerConfig) -> None:
    """Entries of a head rotate in pairs, and a scaling with a number for each has as many."""
    for kind in config.kinds:
        if kind.rope is None:
            continue
        size = kind.rope.size(config.width)
        # Dynamic scaling divides by size - 2.
        least = 4 if isinstance(kind.rope.scaling, Dynamic) else 2
        if size % 2 or not least <= size <= config.width:
            share = "rotary_dim" if hf.model_type == "gptj" else "partial_rotary_factor"
            raise ValueError(
                f"{size} entries of a head of {config.width} turn ({share}; head_dim is "
                f"{config.width}), "
                f"but they turn in pairs: give an even number from {least} to {config.width}"
            )
        for name, factors in _by_pair(kind.rope.scaling):
            if len(factors) != size // 2:
                raise ValueError(
                    f"rope_parameters.{name} has {len(factors)} numbers, but {size // 2} pairs of "
                    "entries turn"
                )


def _by_pair(scaling) -> Iterator[tuple[str, Sequence[float]]]:
    for name in ("short", "long"):
        if (factors := getattr(scaling, name, None)) is not None:
            yield f"{name}_factor", factors
