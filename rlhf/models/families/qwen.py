"""Qwen 2, Qwen 3 and its mixture of experts."""

import dataclasses

from rlhf.models.config import TransformerConfig
from rlhf.models.families.llama import read, tensors, write
from rlhf.models.families.table import Family, Tensor, kinds, pattern

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


def _read_qwen3_moe(hf) -> TransformerConfig:
    dense = kinds(hf, ["sliding_attention" if hf.use_sliding_window else "full_attention"])[0]

    # As transformers' decoder layer decides it.
    def sparse(i):
        on_step = (i + 1) % hf.decoder_sparse_step == 0
        return i not in hf.mlp_only_layers and hf.num_experts > 0 and on_step

    of_layers = tuple(
        dataclasses.replace(dense, sparse=sparse(i)) for i in range(hf.num_hidden_layers)
    )
    sizes = dict(
        experts=hf.num_experts,
        experts_per_token=hf.num_experts_per_tok,
        expert_size=hf.moe_intermediate_size,
    )
    return _read_qwen3(hf, kinds=pattern(of_layers), expert_renormalise=hf.norm_topk_prob, **sizes)


FAMILIES = {
    "qwen2": Family("Qwen2ForCausalLM", "model.", tensors(), _read_qwen2, _write_qwen2),
    "qwen3": Family("Qwen3ForCausalLM", "model.", tensors(), _read_qwen3, _write_qwen3),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", "model.", (*tensors(), *EXPERTS, ROUTER), _read_qwen3_moe
    ),
}
