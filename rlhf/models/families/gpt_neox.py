"""GPT-NeoX and Pythia: attention beside the MLP with a norm each, queries, keys and values fused
head by head.
"""

from rlhf.models.config import LayerKind, TransformerConfig
from rlhf.models.families.table import Family, Tensor, activation, matrices, rope, vectors

LAYER = "gpt_neox.layers.{}."
QKV = f"{LAYER}attention.query_key_value"
PROJECTIONS = {"o": "attention.dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}


def _read(hf) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        mlp_size=hf.intermediate_size,
        kinds=(LayerKind(rope=rope(hf)),),
        norm="layer",
        norm_eps=hf.layer_norm_eps,
        parallel=2 if hf.use_parallel_residual else 0,
        activation=activation(hf.hidden_act),
        gated=False,
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        mlp_bias=True,
        tied=hf.tie_word_embeddings,
    )


def _tensors(c: TransformerConfig) -> tuple[Tensor, ...]:
    return (
        Tensor("gpt_neox.embed_in.weight", "embedding"),
        *vectors(
            LAYER, {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
        ),
        Tensor(f"{QKV}.weight", "layers.q layers.k layers.v", transpose=True, groups=c.num_heads),
        Tensor(f"{QKV}.bias", "layers.q_bias layers.k_bias layers.v_bias", groups=c.num_heads),
        *matrices(LAYER, PROJECTIONS),
        *vectors("gpt_neox.", {"final_norm": "final_layer_norm"}, to=""),
        Tensor("embed_out.weight", "unembedding", transpose=True),
    )


# Causal masks and frequencies, which old versions of torch stored as buffers.
IGNORED = r"\.attention\.((masked_)?bias|rotary_emb\.inv_freq)$"
FAMILIES = {"gpt_neox": Family("GPTNeoXForCausalLM", "gpt_neox.", _tensors, _read, ignored=IGNORED)}
