"""Kimi Linear: a delta rule whose channels decay by themselves, between layers of latent attention."""

from rlhf.models.config import Experts, LayerKind, Mixer, TransformerConfig
from rlhf.models.delta import Delta
from rlhf.models.families.deepseek import LATENT, LATENT_NORMS, OTHERS, latent
from rlhf.models.families.llama import read, tensors
from rlhf.models.families.mixtral import EXPERTS, MOE
from rlhf.models.families.table import Family, Tensor, matrices, pattern, shared_mlp, vectors

LAYER = "model.layers.{}."
ATTENTION = f"{LAYER}self_attn."
DELTA = {
    "delta_q": "q_proj",
    "delta_k": "k_proj",
    "delta_v": "v_proj",
    "delta_step_down": "f_a_proj",
    "delta_step_up": "f_b_proj",
    "delta_gate_down": "g_a_proj",
    "delta_gate_up": "g_b_proj",
    "delta_beta": "b_proj",
    "delta_out": "o_proj",
}
TENSORS = (
    *tensors(projections=OTHERS | LATENT),
    *vectors(LAYER, LATENT_NORMS),
    *matrices(ATTENTION, DELTA),
    *(
        Tensor(
            f"{ATTENTION}{name}_conv1d.weight",
            f"layers.delta_{name}_taps",
            transpose=True,
            ones=(1,),
        )
        for name in ("q", "k", "v")
    ),
    Tensor(f"{ATTENTION}A_log", "layers.delta_rate", ones=(0, 1, 3)),
    Tensor(f"{ATTENTION}dt_bias", "layers.delta_dt_bias"),
    Tensor(f"{ATTENTION}o_norm.weight", "layers.delta_norm"),
    Tensor(f"{MOE}gate.weight", "layers.router", transpose=True),
    Tensor(f"{MOE}gate.e_score_correction_bias", "layers.router_correction"),
    *(
        Tensor(f"{MOE}experts.{{}}.{theirs}.weight", f"layers.expert_{ours}", transpose=True)
        for ours, theirs in EXPERTS.items()
    ),
    *shared_mlp(f"{MOE}shared_experts."),
)


def _read(hf) -> TransformerConfig:
    heads = hf.linear_num_heads
    size = hf.linear_head_dim
    delta = Delta(heads, heads, size, size, hf.linear_conv_kernel_dim, by_channel=True)
    mixers: dict[str, Mixer] = {"linear_attention": delta, "full_attention": latent(hf)}
    of_layers = tuple(
        LayerKind(rope=None, mixer=mixers[layer_type], sparse=mlp == "sparse")
        for layer_type, mlp in zip(hf.layer_types, hf.mlp_layer_types, strict=True)
    )
    experts = Experts(
        hf.num_experts,
        hf.num_experts_per_token,
        hf.moe_intermediate_size,
        scores="sigmoid",
        renormalise=hf.moe_renormalize,
        scale=hf.routed_scaling_factor,
        correction=True,
        groups=hf.num_expert_group,
        groups_per_token=hf.topk_group,
        group_best=2,
        shared_size=hf.num_shared_experts * hf.moe_intermediate_size,
    )
    width = hf.qk_nope_head_dim + hf.qk_rope_head_dim
    return read(hf, kinds=pattern(of_layers), num_kv_heads=None, head_dim=width, experts=experts)


FAMILIES = {
    "kimi_linear": Family(
        "KimiLinearForCausalLM",
        "model.",
        TENSORS,
        _read,
        only={"moe_router_activation_func": ("sigmoid",)},
    )
}
