"""Gemma 1, 2 and 3: scaled embeddings, norms that multiply by 1 + w, from the second on before and
after each branch.
"""

from rlhf.models.config import TransformerConfig
from rlhf.models.families.llama import read, tensors, write
from rlhf.models.families.qwen import layer_types
from rlhf.models.families.table import Family, kinds

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


FAMILIES = {
    "gemma": Family(
        "GemmaForCausalLM", "model.", tensors(), _read_gemma, _write_gemma, only=CAUSAL
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM", "model.", tensors(BOTH_NORMS), _read_gemma2, _write_gemma2, only=CAUSAL
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM", "model.", tensors(BOTH_NORMS), _read_gemma3, _write_gemma3, only=CAUSAL
    ),
}
