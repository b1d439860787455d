"""Qwen 2 and 3, and their mixtures of experts."""

from rlhf.models.config import Experts, LayerKind, TransformerConfig
from rlhf.models.families.llama import read, tensors, write
from rlhf.models.families.table import (
    Family,
    Tensor,
    kinds,
    shared_mlp,
    sparse_where,
)

EXPERTS = tuple(
    Tensor(
        f"model.layers.{{}}.mlp.experts.{{}}.{name}_proj.weight",
        f"layers.expert_{name}",
        transpose=True,
    )
    for name in ("gate", "up", "down")
)
ROUTER = Tensor("model.layers.{}.mlp.gate.weight", "layers.router", transpose=True)


def _read_qwen2(hf) -> TransformerConfig:
    return read(hf, qkv_bias=True, kinds=kinds(hf, hf.layer_types))


def _write_qwen2(c: TransformerConfig) -> dict:
    types = layer_types(c)
    window = next((kind.window for kind in c.kinds if kind.window), None)
    sliding = dict(
        use_sliding_window=True,
        sliding_window=window,
        max_window_layers=types.count("full_attention"),
    )
    fields = {**write(c), "layer_types": types, **(sliding if window else {})}
    if c.width == c.hidden_size // c.num_heads:
        # Qwen 2 has no such field, but honours it: written only where it says something.
        del fields["head_dim"]
    return fields


def layer_types(c: TransformerConfig) -> list[str]:
    return [
        "full_attention" if c.kind(i).window is None else "sliding_attention"
        for i in range(c.num_layers)
    ]


def _read_qwen3(hf, **fields) -> TransformerConfig:
    fields = (
        {"kinds": kinds(hf, hf.layer_types), **fields} if hasattr(hf, "layer_types") else fields
    )
    return read(
        hf, qkv_bias=hf.attention_bias, out_bias=hf.attention_bias, qk_norm="head", **fields
    )


def _write_qwen3(c: TransformerConfig) -> dict:
    return {**_write_qwen2(c), "head_dim": c.width, "attention_bias": c.qkv_bias}


def _of_layers(hf) -> tuple[LayerKind, ...]:
    """Kinds of the layers of a mixture of experts."""
    every = ["sliding_attention" if hf.use_sliding_window else "full_attention"]
    dense = kinds(hf, getattr(hf, "layer_types", None) or every)

    # As transformers' decoder layer decides it.
    def sparse(i):
        on_step = (i + 1) % hf.decoder_sparse_step == 0
        return i not in hf.mlp_only_layers and hf.num_experts > 0 and on_step

    return sparse_where(dense, hf.num_hidden_layers, sparse)


def _experts(hf, **fields) -> Experts | None:
    sizes = hf.num_experts, hf.num_experts_per_tok, hf.moe_intermediate_size
    return Experts(*sizes, renormalise=hf.norm_topk_prob, **fields) if hf.num_experts else None


def _read_qwen3_moe(hf) -> TransformerConfig:
    return _read_qwen3(hf, kinds=_of_layers(hf), experts=_experts(hf))


def _read_qwen2_moe(hf) -> TransformerConfig:
    experts = _experts(hf, shared_size=hf.shared_expert_intermediate_size, shared_gate=True)
    return read(hf, kinds=_of_layers(hf), qkv_bias=hf.qkv_bias, experts=experts)


SHARED = (
    *shared_mlp("model.layers.{}.mlp.shared_expert."),
    Tensor("model.layers.{}.mlp.shared_expert_gate.weight", "layers.shared_router", transpose=True),
)
FAMILIES = {
    "qwen2": Family("Qwen2ForCausalLM", "model.", tensors(), _read_qwen2, _write_qwen2),
    "qwen3": Family("Qwen3ForCausalLM", "model.", tensors(), _read_qwen3, _write_qwen3),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        "model.",
        (*tensors(), *EXPERTS, ROUTER, *SHARED),
        _read_qwen2_moe,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", "model.", (*tensors(), *EXPERTS, ROUTER), _read_qwen3_moe
    ),
}
