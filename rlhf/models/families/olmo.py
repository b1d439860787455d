"""OLMo 2 and 3, OLMoE, and EXAONE 4, which also norms what a branch gives rather than what it reads."""

import dataclasses

from rlhf.models.config import Experts, TransformerConfig
from rlhf.models.families.llama import read, tensors
from rlhf.models.families.qwen import EXPERTS, ROUTER
from rlhf.models.families.table import Family, kinds, pattern

POST_NORMS = {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}


def _biases(hf) -> dict:
    return dict(qkv_bias=hf.attention_bias, out_bias=hf.attention_bias)


def _read_olmo2(hf, **fields) -> TransformerConfig:
    return read(hf, norm_place="branch", qk_norm="heads", **_biases(hf), **fields)


def _read_olmo3(hf) -> TransformerConfig:
    return _read_olmo2(hf, kinds=kinds(hf, hf.layer_types))


def _read_olmoe(hf) -> TransformerConfig:
    return read(
        hf,
        kinds=(dataclasses.replace(kinds(hf, ["full_attention"])[0], sparse=True),),
        qk_norm="heads",
        qkv_clip=hf.clip_qkv,
        experts=Experts(
            hf.num_experts,
            hf.num_experts_per_tok,
            hf.intermediate_size,
            renormalise=hf.norm_topk_prob,
        ),
        **_biases(hf),
    )


def _read_exaone4(hf) -> TransformerConfig:
    of_layers = kinds(hf, hf.layer_types)
    if hf.sliding_window is not None:
        # Beside layers with a window the others have no positions.
        of_layers = tuple(
            kind if kind.window else dataclasses.replace(kind, rope=None) for kind in of_layers
        )
    return read(hf, norm_place="branch", qk_norm="head", kinds=pattern(of_layers))


FAMILIES = {
    "olmo2": Family("Olmo2ForCausalLM", "model.", tensors(POST_NORMS), _read_olmo2),
    "olmo3": Family("Olmo3ForCausalLM", "model.", tensors(POST_NORMS), _read_olmo3),
    "olmoe": Family("OlmoeForCausalLM", "model.", (*tensors(), *EXPERTS, ROUTER), _read_olmoe),
    "exaone4": Family("Exaone4ForCausalLM", "model.", tensors(POST_NORMS), _read_exaone4),
}
