"""LFM2: short convolutions between layers of attention."""

import dataclasses

from rlhf.models.config import TransformerConfig
from rlhf.models.convolution import ShortConvolution
from rlhf.models.families.llama import read
from rlhf.models.families.table import Family, Tensor, kinds, matrices, pattern, vectors

LAYER = "model.layers.{}."
CONV = f"{LAYER}conv."
PROJECTIONS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.out_proj",
    "gate": "feed_forward.w1",
    "up": "feed_forward.w3",
    "down": "feed_forward.w2",
}
NORMS = {
    "attention_norm": "operator_norm",
    "mlp_norm": "ffn_norm",
    "q_norm": "self_attn.q_layernorm",
    "k_norm": "self_attn.k_layernorm",
}
TENSORS = (
    Tensor("model.embed_tokens.weight", "embedding"),
    *vectors(LAYER, NORMS),
    *matrices(LAYER, PROJECTIONS),
    *matrices(CONV, {"conv_b conv_c conv_x": "in_proj", "conv_out": "out_proj"}),
    Tensor(f"{CONV}conv.weight", "layers.conv_taps", transpose=True, ones=(1,)),
    Tensor(f"{CONV}conv.bias", "layers.conv_taps_bias"),
    *vectors("model.", {"final_norm": "embedding_norm"}, to=""),
    Tensor("lm_head.weight", "unembedding", transpose=True),
)


def _mlp_size(hf) -> int:
    size = hf.intermediate_size
    if not hf.block_auto_adjust_ff_dim:
        return size
    # As the published models count it: two thirds, times a factor, rounded up.
    size = int(2 * size / 3)
    if hf.block_ffn_dim_multiplier is not None:
        size = int(hf.block_ffn_dim_multiplier * size)
    return -(-size // hf.block_multiple_of) * hf.block_multiple_of


def _read(hf) -> TransformerConfig:
    attention = kinds(hf, ["full_attention"])[0]
    mixer = ShortConvolution(hf.conv_L_cache, hf.conv_bias)
    conv = dataclasses.replace(attention, rope=None, mixer=mixer)
    of_layers = tuple(conv if layer_type == "conv" else attention for layer_type in hf.layer_types)
    return read(
        hf,
        None,
        kinds=pattern(of_layers),
        mlp_size=_mlp_size(hf),
        norm_eps=hf.norm_eps,
        qk_norm="head",
    )


FAMILIES = {"lfm2": Family("Lfm2ForCausalLM", "model.", TENSORS, _read)}
