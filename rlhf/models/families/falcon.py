"""Falcon: attention beside the MLP; queries, keys and values fused by groups of heads."""

from rlhf.models.config import LayerKind, TransformerConfig
from rlhf.models.families.table import Family, Tensor, activation, matrices, rope, vectors

LAYER = "transformer.h.{}."
QKV = f"{LAYER}self_attention.query_key_value"
PROJECTIONS = {"o": "self_attention.dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}


def _read(hf) -> TransformerConfig:
    # Three layouts in one family: 7B has one key head (`multi_query`), 40B groups of them (the new
    # architecture), and the oldest one a key head for each query head.
    new = hf.new_decoder_architecture
    shared = 1 if hf.multi_query else hf.num_attention_heads
    norms = (2 if new else 1) if hf.num_ln_in_parallel_attn is None else hf.num_ln_in_parallel_attn
    return TransformerConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_kv_heads if new else shared,
        mlp_size=hf.ffn_hidden_size,
        kinds=(LayerKind(rope=rope(hf)),),
        norm="layer",
        norm_eps=hf.layer_norm_epsilon,
        parallel=(norms if new else 1) if hf.parallel_attn else 0,
        activation=activation(hf.activation),
        gated=False,
        qkv_bias=hf.bias,
        out_bias=hf.bias,
        mlp_bias=hf.bias,
        tied=hf.tie_word_embeddings,
    )


def _tensors(c) -> tuple[Tensor, ...]:
    names = (
        ("ln_attn", "ln_mlp")
        if c.parallel == 2
        else ("input_layernorm", "post_attention_layernorm")
    )
    return (
        Tensor("transformer.word_embeddings.weight", "embedding"),
        *vectors(LAYER, dict(zip(("attention_norm", "mlp_norm"), names, strict=True))),
        Tensor(f"{QKV}.weight", "layers.q layers.k layers.v", transpose=True, groups=c.kv_heads),
        Tensor(f"{QKV}.bias", "layers.q_bias layers.k_bias layers.v_bias", groups=c.kv_heads),
        *matrices(LAYER, PROJECTIONS),
        *vectors("transformer.", {"final_norm": "ln_f"}, to=""),
        Tensor("lm_head.weight", "unembedding", transpose=True),
    )


FAMILIES = {
    "falcon": Family("FalconForCausalLM", "transformer.", _tensors, _read, only={"alibi": (False,)})
}
