"""DeepSeek V2 and V3: latent attention, experts beside shared ones, a router by groups."""

import dataclasses
import math

from rlhf.models.config import Experts, LayerKind, TransformerConfig
from rlhf.models.families.llama import PROJECTIONS, read, tensors
from rlhf.models.families.qwen import EXPERTS as QWEN_EXPERTS
from rlhf.models.families.qwen import ROUTER
from rlhf.models.families.table import Family, Tensor, rope, shared_mlp, sparse_where, vectors
from rlhf.models.latent import Latent

EXPERTS = (*QWEN_EXPERTS, ROUTER)
SHARED = shared_mlp("model.layers.{}.mlp.shared_experts.")
CORRECTION = Tensor("model.layers.{}.mlp.gate.e_score_correction_bias", "layers.router_correction")
LATENT = {
    "latent_q_down": "self_attn.q_a_proj",
    "latent_q_up": "self_attn.q_b_proj",
    "latent_down": "self_attn.kv_a_proj_with_mqa",
    "latent_up": "self_attn.kv_b_proj",
}
LATENT_NORMS = {
    "latent_q_norm": "self_attn.q_a_layernorm",
    "latent_norm": "self_attn.kv_a_layernorm",
}
OTHERS = {ours: theirs for ours, theirs in PROJECTIONS.items() if ours not in ("k", "v")}
TENSORS = (
    *tensors(projections=OTHERS | LATENT),
    *vectors("model.layers.{}.", LATENT_NORMS),
    *EXPERTS,
    *SHARED,
)
EVERY_LAYER = {"moe_layer_freq": (1,)}  # after the first dense ones


def experts(hf, **fields) -> Experts:
    """Of a router by sigmoids, as V3 has it."""
    v3 = dict(
        scores="sigmoid",
        renormalise=hf.norm_topk_prob,
        correction=True,
        groups=hf.n_group or 1,
        groups_per_token=hf.topk_group or 1,
        # A group is as good as its two best experts.
        group_best=2,
    )
    return Experts(
        hf.n_routed_experts,
        hf.num_experts_per_tok,
        hf.moe_intermediate_size,
        scale=hf.routed_scaling_factor,
        shared_size=(hf.n_shared_experts or 0) * hf.moe_intermediate_size,
        **{**v3, **fields},
    )


def latent(hf) -> Latent:
    return Latent(
        hf.kv_lora_rank,
        hf.qk_nope_head_dim,
        hf.qk_rope_head_dim,
        hf.v_head_dim,
        hf.q_lora_rank,
        hf.attention_bias,
    )


def _read(hf, interleaved: bool, experts: Experts) -> TransformerConfig:
    width = hf.qk_nope_head_dim + hf.qk_rope_head_dim
    # Of each head's entries the shared key's alone turn.
    turning = rope(hf, interleaved=interleaved)
    turning = dataclasses.replace(turning, share=hf.qk_rope_head_dim / width)
    p = hf.rope_parameters
    sharper = 1.0
    if p.get("rope_type", "default") != "default" and p.get("mscale_all_dim"):
        sharper = 0.1 * p["mscale_all_dim"] * math.log(p["factor"]) + 1.0
    return read(
        hf,
        kinds=sparse_where(
            (LayerKind(rope=turning, mixer=latent(hf)),),
            hf.num_hidden_layers,
            lambda i: i >= hf.first_k_dense_replace,
        ),
        num_kv_heads=None,
        head_dim=width,
        attention_scale=width**-0.5 * sharper**2,
        experts=experts,
    )


def _read_v2(hf) -> TransformerConfig:
    by_groups = hf.topk_method == "group_limited_greedy"
    groups = dict(groups=hf.n_group, groups_per_token=hf.topk_group) if by_groups else {}
    # The chosen ones' probabilities as they are: `norm_topk_prob` counts for nothing.
    softmax = dict(scores="softmax", renormalise=False, correction=False, group_best=1)
    none = dict(groups=1, groups_per_token=1)
    return _read(hf, True, experts(hf, **softmax, **{**none, **groups}))


def _read_v3(hf) -> TransformerConfig:
    return _read(hf, hf.rope_interleave, experts(hf))


FAMILIES = {
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        "model.",
        TENSORS,
        _read_v2,
        only={
            "topk_method": ("greedy", "group_limited_greedy"),
            "scoring_func": ("softmax",),
            "mlp_bias": (False,),
            **EVERY_LAYER,
        },
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        "model.",
        (*TENSORS, CORRECTION),
        _read_v3,
        only={"topk_method": ("noaux_tc",), "scoring_func": ("sigmoid",), **EVERY_LAYER},
    ),
}
