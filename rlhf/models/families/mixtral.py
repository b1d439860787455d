"""Mixtral: Mistral with experts in every layer."""

import dataclasses

from rlhf.models.config import TransformerConfig
from rlhf.models.families.llama import read, tensors
from rlhf.models.families.table import Family, Tensor, kinds

MOE = "model.layers.{}.block_sparse_moe."
EXPERTS = {"gate": "w1", "down": "w2", "up": "w3"}  # ours -> theirs


def _read(hf) -> TransformerConfig:
    kind = dataclasses.replace(kinds(hf, ["sliding_attention"])[0], sparse=True)
    sizes = dict(
        experts=hf.num_local_experts,
        experts_per_token=hf.num_experts_per_tok,
        expert_size=hf.intermediate_size,
    )
    return read(hf, kinds=(kind,), **sizes)


TENSORS = (
    *tensors(),
    Tensor(f"{MOE}gate.weight", "layers.router", transpose=True),
    *(
        Tensor(f"{MOE}experts.{{}}.{theirs}.weight", f"layers.expert_{ours}", transpose=True)
        for ours, theirs in EXPERTS.items()
    ),
)
FAMILIES = {"mixtral": Family("MixtralForCausalLM", "model.", TENSORS, _read)}
