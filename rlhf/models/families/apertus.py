"""Apertus: an MLP without a gate, whose activation is learned."""

from rlhf.models.config import TransformerConfig
from rlhf.models.families.llama import PROJECTIONS, read, tensors
from rlhf.models.families.table import Family, Tensor

NORMS = {"attention_norm": "attention_layernorm", "mlp_norm": "feedforward_layernorm"}
UNGATED = {ours: theirs for ours, theirs in PROJECTIONS.items() if ours != "gate"}
XIELU = {"positive": "alpha_p", "negative": "alpha_n", "beta": "beta", "eps": "eps"}
ACTIVATION = tuple(
    Tensor(f"model.layers.{{}}.mlp.act_fn.{theirs}", f"layers.xielu_{ours}")
    for ours, theirs in XIELU.items()
)


def _read(hf) -> TransformerConfig:
    return read(
        hf,
        gated=False,
        qk_norm="head",
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
    )


FAMILIES = {
    "apertus": Family(
        "ApertusForCausalLM", "model.", (*tensors(NORMS, UNGATED), *ACTIVATION), _read
    )
}
