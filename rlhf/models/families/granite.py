"""Granite (four scales of its own), and its mixture of experts."""

import dataclasses

from rlhf.models.config import Experts, TransformerConfig
from rlhf.models.families.llama import read_llama, tensors
from rlhf.models.families.table import Family, Tensor, kinds

MOE = "model.layers.{}.block_sparse_moe."
EXPERTS = (
    Tensor(f"{MOE}input_linear.weight", "layers.expert_gate layers.expert_up", transpose=True),
    Tensor(f"{MOE}output_linear.weight", "layers.expert_down", transpose=True),
    Tensor(f"{MOE}router.layer.weight", "layers.router", transpose=True),
)


def _read(hf, **fields) -> TransformerConfig:
    return read_llama(
        hf,
        embed_scale=hf.embedding_multiplier,
        residual_scale=hf.residual_multiplier,
        attention_scale=hf.attention_multiplier,
        # `logits_scaling` divides, where ours multiplies.
        logit_scale=1 / hf.logits_scaling,
        **fields,
    )


def _read_moe(hf) -> TransformerConfig:
    kind = dataclasses.replace(kinds(hf, ["full_attention"])[0], sparse=True)
    sizes = hf.num_local_experts, hf.num_experts_per_tok, hf.intermediate_size
    return _read(hf, kinds=(kind,), experts=Experts(*sizes, scores="chosen"))


FAMILIES = {
    "granite": Family("GraniteForCausalLM", "model.", tensors(), _read),
    "granitemoe": Family("GraniteMoeForCausalLM", "model.", (*tensors(), *EXPERTS), _read_moe),
}
