"""GPT-OSS: sinks beside the keys, experts with biases and a clamped gate."""

import dataclasses

from rlhf.models.config import Experts, TransformerConfig
from rlhf.models.families.llama import PROJECTIONS, read, tensors
from rlhf.models.families.table import Family, Tensor, kinds, matrices

LAYER = "model.layers.{}."
EXPERTS = f"{LAYER}mlp.experts."
ATTENTION = {ours: theirs for ours, theirs in PROJECTIONS.items() if ours in ("q", "k", "v", "o")}


TENSORS = (
    *tensors(projections=ATTENTION),
    Tensor(f"{LAYER}self_attn.sinks", "layers.sinks"),
    *matrices(LAYER, {"router": "mlp.router"}),
    # As a product takes them, [E, in, out].
    Tensor(f"{EXPERTS}gate_up_proj", "layers.expert_gate layers.expert_up", groups=-1),
    Tensor(
        f"{EXPERTS}gate_up_proj_bias", "layers.expert_gate_bias layers.expert_up_bias", groups=-1
    ),
    Tensor(f"{EXPERTS}down_proj", "layers.expert_down"),
    Tensor(f"{EXPERTS}down_proj_bias", "layers.expert_down_bias"),
)


def _read(hf) -> TransformerConfig:
    alpha = float(getattr(hf, "swiglu_alpha", 1.702))
    limit = float(getattr(hf, "swiglu_limit", 7.0))
    return read(
        hf,
        kinds=tuple(dataclasses.replace(kind, sparse=True) for kind in kinds(hf, hf.layer_types)),
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        sinks=True,
        experts=Experts(
            hf.num_local_experts,
            hf.num_experts_per_tok,
            hf.intermediate_size,
            scores="chosen",
            bias=True,
            clamp=(alpha, limit),
        ),
    )


FAMILIES = {"gpt_oss": Family("GptOssForCausalLM", "model.", TENSORS, _read)}
