"""Gemma 1, 2 and 3: scaled embeddings, norms that multiply by 1 + w, from the second on before and
after each branch.  Gemma 4: plain norms, layers that share keys and values, inputs of each layer.
"""

from typing import Any

from rlhf.models.config import Experts, Heads, LayerKind, TransformerConfig
from rlhf.models.families.llama import PROJECTIONS, QK_NORMS, read, tensors, write
from rlhf.models.families.qwen import layer_types
from rlhf.models.families.table import Family, Tensor, kinds, matrices, pattern, rope
from rlhf.models.rotary import Proportional, Rope

BOTH_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
CAUSAL = {"use_bidirectional_attention": (None, False)}


def _read_gemma(hf, activation_field: str = "hidden_act", **fields) -> TransformerConfig:
    bias = dict(qkv_bias=hf.attention_bias, out_bias=hf.attention_bias)
    return read(
        hf, activation_field, norm_offset=1.0, embed_scale=hf.hidden_size**0.5, **bias, **fields
    )


def _write_gemma(c: TransformerConfig, activation_field: str = "hidden_act") -> dict:
    return {**write(c, activation_field), "attention_bias": c.qkv_bias}


def _read_gemma2(hf, **fields) -> TransformerConfig:
    caps = dict(
        attention_softcap=hf.attn_logit_softcapping, final_softcap=hf.final_logit_softcapping
    )
    gemma2 = dict(
        norm_place="both",
        attention_scale=hf.query_pre_attn_scalar**-0.5,
        kinds=kinds(hf, hf.layer_types),
    )
    return _read_gemma(hf, "hidden_activation", **{**caps, **gemma2, **fields})


def _write_gemma2(c: TransformerConfig) -> dict:
    caps = dict(attn_logit_softcapping=c.attention_softcap, final_logit_softcapping=c.final_softcap)
    window = next((kind.window for kind in c.kinds if kind.window), None)
    layers = dict(
        layer_types=layer_types(c),
        sliding_window=window,
        query_pre_attn_scalar=max(1, round(c.scale**-2)),
    )
    return {**_write_gemma(c, "hidden_activation"), **caps, **layers}


def _read_gemma3(hf) -> TransformerConfig:
    # The soft cap stands in Gemma 3's configs, but its attention does not use it.
    return _read_gemma2(hf, qk_norm="head", attention_softcap=None)


def _write_gemma3(c: TransformerConfig) -> dict:
    types = layer_types(c)
    ropes = {kind: c.kinds[types.index(kind)].rope for kind in dict.fromkeys(types)}
    # Gemma 3 wants a base for both types of layers, also where a model has one of them.
    theta = {
        "full_attention": 1_000_000.0,
        "sliding_attention": 10_000.0,
        **{k: r.theta for k, r in ropes.items() if r},
    }
    rope = {
        layer_type: {"rope_type": "default", "rope_theta": value}
        for layer_type, value in theta.items()
    }
    return {**_write_gemma2(c), "rope_parameters": rope, "attn_logit_softcapping": None}


def _lends_and_borrows(types: list[str], shared: int) -> list[dict[str, Any]]:
    """The last `shared` layers take keys and values of the last layer of their type before them."""
    first = len(types) - shared
    out: list[dict[str, Any]] = [{} for _ in types]
    for name in set(types[first:]):
        lender = max(i for i in range(first) if types[i] == name)
        out[lender] = {"lends": name}
    for i in range(first, len(types)):
        out[i] = {"borrows": types[i]}
    return out


def _read_gemma4(hf) -> TransformerConfig:
    of_layers = []
    sharing = _lends_and_borrows(hf.layer_types, hf.num_kv_shared_layers)
    for i, layer_type in enumerate(hf.layer_types):
        is_full = layer_type == "full_attention"
        of_layer = hf.per_layer_config[i]
        p = hf.rope_parameters[layer_type]
        if p.get("rope_type") == "proportional":
            # All of a head counts in the exponents, and the first share of it turns.
            share = float(p.get("partial_rotary_factor") or 1.0)
            turning = Rope(float(p["rope_theta"]), scaling=Proportional(share))
        else:
            turning = rope(hf, p)
        heads = Heads(
            of_layer.head_dim,
            of_layer.num_key_value_heads,
            prefix="full_",
            keys_are_values=hf.attention_k_eq_v,
        )
        of_layers.append(
            LayerKind(
                window=None if is_full else hf.sliding_window,
                rope=turning,
                sparse=hf.enable_moe_block,
                heads=heads if is_full else None,
                widening=2 if hf.use_double_wide_mlp and "borrows" in sharing[i] else 1,
                **sharing[i],
            )
        )
    experts = None
    if hf.enable_moe_block:
        sizes = hf.num_experts, hf.top_k_experts, hf.moe_intermediate_size
        experts = Experts(*sizes, beside=True)
    return read(
        hf,
        "hidden_activation",
        kinds=pattern(tuple(of_layers)),
        norm_place="both",
        qk_norm="head",
        v_norm=True,
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        attention_scale=1.0,
        embed_scale=hf.hidden_size**0.5,
        final_softcap=hf.final_logit_softcapping,
        layer_input_size=hf.hidden_size_per_layer_input or 0,
        layer_scalar=True,
        experts=experts,
    )


LAYER = "model.layers.{}."
FULL = {
    f"full_{ours}": theirs for ours, theirs in PROJECTIONS.items() if theirs.startswith("self_attn")
}
WIDE = {f"wide_{ours}": theirs for ours, theirs in PROJECTIONS.items() if theirs.startswith("mlp")}
INPUTS = {"input_gate": "per_layer_input_gate", "input_projection": "per_layer_projection"}
GEMMA4_NORMS = {
    **BOTH_NORMS,
    **{f"full_{ours}": theirs for ours, theirs in QK_NORMS.items()},
    "input_norm": "post_per_layer_input_norm",
    "dense_post_norm": "post_feedforward_layernorm_1",
    "expert_norm": "pre_feedforward_layernorm_2",
    "expert_post_norm": "post_feedforward_layernorm_2",
}
GEMMA4 = (
    *tensors(GEMMA4_NORMS),
    *matrices(LAYER, {**FULL, **WIDE, **INPUTS, "router": "router.proj"}),
    Tensor("model.embed_tokens_per_layer.weight", "layer_input_embedding"),
    Tensor("model.per_layer_model_projection.weight", "layer_input_projection", transpose=True),
    Tensor("model.per_layer_projection_norm.weight", "layer_input_norm"),
    Tensor(f"{LAYER}layer_scalar", "layers.layer_scalar"),
    Tensor(f"{LAYER}router.scale", "layers.router_norm"),
    Tensor(f"{LAYER}router.per_expert_scale", "layers.router_scale"),
    # [E, out, in]
    Tensor(f"{LAYER}experts.gate_up_proj", "layers.expert_gate layers.expert_up", transpose=True),
    Tensor(f"{LAYER}experts.down_proj", "layers.expert_down", transpose=True),
)


FAMILIES = {
    "gemma": Family(
        "GemmaForCausalLM", "model.", tensors(), _read_gemma, _write_gemma, only=CAUSAL
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM", "model.", tensors(BOTH_NORMS), _read_gemma2, _write_gemma2, only=CAUSAL
    ),
    "gemma4_text": Family(
        "Gemma4ForCausalLM",
        "model.",
        GEMMA4,
        _read_gemma4,
        # "vision": of tokens of an image alone.
        only={"use_bidirectional_attention": (None, "vision")},
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM", "model.", tensors(BOTH_NORMS), _read_gemma3, _write_gemma3, only=CAUSAL
    ),
}
