"""BLOOM: ALiBi, a norm on the embedding, queries, keys and values fused head by head."""

from rlhf.models.config import LayerKind, TransformerConfig
from rlhf.models.families.table import Family, Tensor, matrices, vectors

LAYER = "transformer.h.{}."
QKV = f"{LAYER}self_attention.query_key_value"
PROJECTIONS = {"o": "self_attention.dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}
NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def _read(hf) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        num_layers=hf.n_layer,
        num_heads=hf.n_head,
        mlp_size=4 * hf.hidden_size,
        kinds=(LayerKind(rope=None),),
        alibi=True,
        norm="layer",
        norm_eps=hf.layer_norm_epsilon,
        embed_norm=True,
        activation="gelu",
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=hf.tie_word_embeddings,
    )


def _tensors(c: TransformerConfig) -> tuple[Tensor, ...]:
    return (
        Tensor("transformer.word_embeddings.weight", "embedding"),
        *vectors("transformer.", {"embed_norm": "word_embeddings_layernorm"}, to=""),
        *vectors(LAYER, NORMS),
        # Head by head: a head's query, key and value lie side by side (`groups`).
        Tensor(f"{QKV}.weight", "layers.q layers.k layers.v", transpose=True, groups=c.num_heads),
        Tensor(f"{QKV}.bias", "layers.q_bias layers.k_bias layers.v_bias", groups=c.num_heads),
        *matrices(LAYER, PROJECTIONS),
        *vectors("transformer.", {"final_norm": "ln_f"}, to=""),
        Tensor("lm_head.weight", "unembedding", transpose=True),
    )


ONLY = {"apply_residual_connection_post_layernorm": (False,)}
FAMILIES = {"bloom": Family("BloomForCausalLM", "transformer.", _tensors, _read, only=ONLY)}
