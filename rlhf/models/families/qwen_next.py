"""Qwen 3 Next and 3.5: layers of the gated delta rule between those of attention, whose output is gated."""

import dataclasses

from rlhf.models.config import Experts, TransformerConfig
from rlhf.models.delta import Delta
from rlhf.models.families.llama import PROJECTIONS, read, tensors
from rlhf.models.families.qwen import EXPERTS, ROUTER, SHARED
from rlhf.models.families.table import Family, Tensor, kinds, matrices, sparse_where

DELTA = "model.layers.{}.linear_attn."
QKV = "layers.delta_q layers.delta_k layers.delta_v"
TAPS = "layers.delta_q_taps layers.delta_k_taps layers.delta_v_taps"
COMMON = (
    Tensor(f"{DELTA}conv1d.weight", TAPS, transpose=True, ones=(1,)),
    Tensor(f"{DELTA}A_log", "layers.delta_rate"),
    Tensor(f"{DELTA}dt_bias", "layers.delta_dt_bias"),
    Tensor(f"{DELTA}norm.weight", "layers.delta_norm"),
    Tensor(f"{DELTA}out_proj.weight", "layers.delta_out", transpose=True),
)
SEPARATE = (
    Tensor(f"{DELTA}in_proj_qkv.weight", QKV, transpose=True),
    *matrices(
        DELTA, {"delta_z": "in_proj_z", "delta_beta": "in_proj_b", "delta_step": "in_proj_a"}
    ),
)
FUSED_EXPERTS = (
    Tensor(
        "model.layers.{}.mlp.experts.gate_up_proj",
        "layers.expert_gate layers.expert_up",
        transpose=True,
    ),
    Tensor("model.layers.{}.mlp.experts.down_proj", "layers.expert_down", transpose=True),
)


def _attention(c: TransformerConfig) -> tuple[Tensor, ...]:
    others = {ours: theirs for ours, theirs in PROJECTIONS.items() if ours != "q"}
    q = "model.layers.{}.self_attn.q_proj."
    return (
        *tensors(projections=others),
        # Head by head the query, then the gate.
        Tensor(f"{q}weight", "layers.q layers.q_gate", transpose=True, groups=c.num_heads),
        Tensor(f"{q}bias", "layers.q_bias layers.q_gate_bias", groups=c.num_heads),
    )


def _by_key_head(c: TransformerConfig) -> tuple[Tensor, ...]:
    """Key head by key head: its q, k, v and z; its β and steps."""
    groups = next((kind.mixer.key_heads for kind in c.kinds if isinstance(kind.mixer, Delta)), 1)
    qkvz = f"{QKV} layers.delta_z"
    ba = "layers.delta_beta layers.delta_step"
    return (
        Tensor(f"{DELTA}in_proj_qkvz.weight", qkvz, transpose=True, groups=groups),
        Tensor(f"{DELTA}in_proj_ba.weight", ba, transpose=True, groups=groups),
    )


def _tensors_next(c: TransformerConfig) -> tuple[Tensor, ...]:
    return (*_attention(c), *COMMON, *_by_key_head(c), *EXPERTS, ROUTER, *SHARED)


def _tensors_3_5(c: TransformerConfig) -> tuple[Tensor, ...]:
    return (*_attention(c), *COMMON, *SEPARATE, *EXPERTS, ROUTER, *SHARED)


def _read(hf, is_sparse=lambda i: False, **fields) -> TransformerConfig:
    delta = Delta(
        hf.linear_num_key_heads,
        hf.linear_num_value_heads,
        hf.linear_key_head_dim,
        hf.linear_value_head_dim,
        hf.linear_conv_kernel_dim,
    )
    attention = kinds(hf, ["full_attention"])[0]
    linear = dataclasses.replace(attention, rope=None, mixer=delta)

    of_layers = [linear if name == "linear_attention" else attention for name in hf.layer_types]
    return read(
        hf,
        kinds=sparse_where(of_layers, hf.num_hidden_layers, is_sparse),
        norm_offset=1.0,
        qk_norm="head",
        attention_gate=True,
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        **fields,
    )


def _experts(hf, renormalise: bool) -> Experts:
    return Experts(
        hf.num_experts,
        hf.num_experts_per_tok,
        hf.moe_intermediate_size,
        renormalise=renormalise,
        shared_size=hf.shared_expert_intermediate_size,
        shared_gate=True,
    )


def _read_next(hf) -> TransformerConfig:
    def is_sparse(i):
        return i not in hf.mlp_only_layers and (i + 1) % hf.decoder_sparse_step == 0

    return _read(hf, is_sparse, experts=_experts(hf, hf.norm_topk_prob))


def _read_3_5_moe(hf) -> TransformerConfig:
    # Every layer has experts, and no width of an MLP is given.
    size = hf.moe_intermediate_size
    return _read(hf, lambda i: True, experts=_experts(hf, True), mlp_size=size)


# Heads that predict tokens after the next one, which the language model itself does not read.
IGNORED = r"\.rotary_emb\.inv_freq$|^(model\.)?mtp\."

FAMILIES = {
    "qwen3_next": Family(
        "Qwen3NextForCausalLM", "model.", _tensors_next, _read_next, ignored=IGNORED
    ),
    "qwen3_5_text": Family("Qwen3_5ForCausalLM", "model.", _tensors_3_5, _read, ignored=IGNORED),
    "qwen3_5_moe_text": Family(
        "Qwen3_5MoeForCausalLM",
        "model.",
        _tensors_3_5,
        _read_3_5_moe,
        ignored=IGNORED,
        fused=FUSED_EXPERTS,
    ),
}
