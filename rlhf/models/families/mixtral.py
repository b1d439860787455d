"""Mixtral (Mistral with experts in every layer), and MiniMax M2 and Phi 3.5, which kept its names."""

import dataclasses

from rlhf.models.config import Experts, LayerKind, TransformerConfig
from rlhf.models.families.llama import read, tensors
from rlhf.models.families.table import Family, Tensor, kinds, rope

MOE = "model.layers.{}.block_sparse_moe."
EXPERTS = {"gate": "w1", "down": "w2", "up": "w3"}  # ours -> theirs


def _read(hf) -> TransformerConfig:
    kind = dataclasses.replace(kinds(hf, ["sliding_attention"])[0], sparse=True)
    experts = Experts(hf.num_local_experts, hf.num_experts_per_tok, hf.intermediate_size)
    return read(hf, kinds=(kind,), experts=experts)


def _read_minimax(hf) -> TransformerConfig:
    kind = LayerKind(rope=rope(hf), sparse=True)
    sizes = hf.num_local_experts, hf.num_experts_per_tok, hf.intermediate_size
    experts = Experts(*sizes, scores="sigmoid", correction=True)
    return read(hf, kinds=(kind,), qk_norm="heads", experts=experts)


def _read_phimoe(hf) -> TransformerConfig:
    kind = dataclasses.replace(kinds(hf, ["sliding_attention"])[0], sparse=True)
    sizes = hf.num_local_experts, hf.num_experts_per_tok, hf.intermediate_size
    return read(
        hf,
        kinds=(kind,),
        norm="layer",
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        unembed_bias=hf.lm_head_bias,
        experts=Experts(*sizes, scores="sparsemixer"),
    )


TENSORS = (
    *tensors(),
    Tensor(f"{MOE}gate.weight", "layers.router", transpose=True),
    *(
        Tensor(f"{MOE}experts.{{}}.{theirs}.weight", f"layers.expert_{ours}", transpose=True)
        for ours, theirs in EXPERTS.items()
    ),
)
FAMILIES = {
    "mixtral": Family("MixtralForCausalLM", "model.", TENSORS, _read),
    "minimax_m2": Family(
        "MiniMaxM2ForCausalLM",
        "model.",
        (*TENSORS, Tensor(f"{MOE}e_score_correction_bias", "layers.router_correction")),
        _read_minimax,
        only={
            "scoring_func": ("sigmoid",),
            "use_qk_norm": (True,),
            "qk_norm_type": ("per_layer",),
        },
    ),
    "phimoe": Family(
        "PhimoeForCausalLM",
        "model.",
        (*TENSORS, Tensor("lm_head.bias", "unembedding_bias")),
        _read_phimoe,
        # The jitter of its router is that of the paper.
        only={"router_jitter_noise": (0.01,)},
    ),
}
