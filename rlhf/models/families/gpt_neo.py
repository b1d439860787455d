"""GPT-Neo: learned positions, scores that are not scaled, every other layer sees a window."""

from rlhf.models.config import LayerKind, TransformerConfig
from rlhf.models.families.table import Family, Tensor, activation, matrices, pattern, vectors

LAYER = "transformer.h.{}."
PROJECTIONS = {
    "q": "attn.attention.q_proj",
    "k": "attn.attention.k_proj",
    "v": "attn.attention.v_proj",
    "o": "attn.attention.out_proj",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}


def _read(hf) -> TransformerConfig:
    windows = (hf.window_size if layer == "local" else None for layer in hf.attention_layers)
    return TransformerConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        num_layers=hf.num_layers,
        num_heads=hf.num_heads,
        mlp_size=hf.intermediate_size or 4 * hf.hidden_size,
        kinds=pattern(tuple(LayerKind(window, rope=None) for window in windows)),
        max_positions=hf.max_position_embeddings,
        norm="layer",
        norm_eps=hf.layer_norm_epsilon,
        activation=activation(hf.activation_function),
        gated=False,
        out_bias=True,
        mlp_bias=True,
        # GPT-Neo was trained without the usual 1 / √width.
        attention_scale=1.0,
        tied=hf.tie_word_embeddings,
    )


TENSORS = (
    Tensor("transformer.wte.weight", "embedding"),
    Tensor("transformer.wpe.weight", "position_embedding"),
    *vectors(LAYER, {"attention_norm": "ln_1", "mlp_norm": "ln_2"}),
    *matrices(LAYER, PROJECTIONS),
    *vectors("transformer.", {"final_norm": "ln_f"}, to=""),
    Tensor("lm_head.weight", "unembedding", transpose=True),
)
FAMILIES = {
    "gpt_neo": Family(
        "GPTNeoForCausalLM",
        "transformer.",
        TENSORS,
        _read,
        ignored=r"\.attn\.attention\.(masked_)?bias$",
    )
}
