"""GLM 4 (norms on both sides of a branch), and its mixtures of experts, whose router is DeepSeek's."""

from rlhf.models.config import LayerKind, TransformerConfig
from rlhf.models.families.deepseek import CORRECTION, EXPERTS, SHARED, experts
from rlhf.models.families.llama import PROJECTIONS, read, tensors
from rlhf.models.families.table import Family, rope, sparse_where

NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_self_attn_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_mlp_layernorm",
}
FUSED = {
    **{ours: theirs for ours, theirs in PROJECTIONS.items() if ours not in ("gate", "up")},
    "gate up": "mlp.gate_up_proj",
}


def _read_glm4(hf) -> TransformerConfig:
    kind = LayerKind(rope=rope(hf, interleaved=True))
    return read(hf, norm_place="both", kinds=(kind,), qkv_bias=hf.attention_bias)


def _read_glm4_moe(hf) -> TransformerConfig:
    kind = LayerKind(rope=rope(hf))
    return read(
        hf,
        kinds=sparse_where((kind,), hf.num_hidden_layers, lambda i: i >= hf.first_k_dense_replace),
        # Its class has no default, and no heads that divide its width.
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        qk_norm="head" if hf.use_qk_norm else None,
        qkv_bias=hf.attention_bias,
        experts=experts(hf),
    )


FAMILIES = {
    "glm4": Family("Glm4ForCausalLM", "model.", tensors(NORMS, FUSED), _read_glm4),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        "model.",
        (*tensors(), *EXPERTS, *SHARED, CORRECTION),
        _read_glm4_moe,
    ),
}
