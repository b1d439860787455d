"""BART: learned positions from row 2 on, norms after the sum and on the embedding."""

from rlhf.models.config import EncoderDecoderConfig, LayerKind, TransformerConfig
from rlhf.models.families.table import Family, Tensor, activation, matrices, vectors

PROJECTIONS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.out_proj",
    "up": "fc1",
    "down": "fc2",
}
CROSS = {f"cross_{name}": f"encoder_attn.{name}_proj" for name in "qkv"} | {
    "cross_o": "encoder_attn.out_proj"
}
NORMS = {"attention_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm"}


def _stack(stack: str) -> tuple[Tensor, ...]:
    to = f"{stack}.layers."
    layer = f"model.{stack}.layers.{{}}."
    return (
        Tensor(f"model.{stack}.embed_positions.weight", f"{stack}.position_embedding"),
        *vectors(f"model.{stack}.", {"embed_norm": "layernorm_embedding"}, to=f"{stack}."),
        *vectors(layer, NORMS, to=to),
        *matrices(layer, PROJECTIONS, to=to),
    )


def _read(hf) -> EncoderDecoderConfig:
    common = dict(
        vocab_size=hf.vocab_size,
        hidden_size=hf.d_model,
        kinds=(LayerKind(rope=None),),
        max_positions=hf.max_position_embeddings,
        # Rows 0 and 1 of the table are unused: positions were once counted from the padding's id.
        position_offset=2,
        norm="layer",
        norm_eps=1e-5,
        norm_place="sum",
        embed_norm=True,
        final_norm=False,
        activation=activation(hf.activation_function),
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        embed_scale=hf.d_model**0.5 if hf.scale_embedding else 1.0,
    )
    encoder = dict(
        num_layers=hf.encoder_layers,
        num_heads=hf.encoder_attention_heads,
        mlp_size=hf.encoder_ffn_dim,
    )
    decoder = dict(
        num_layers=hf.decoder_layers,
        num_heads=hf.decoder_attention_heads,
        mlp_size=hf.decoder_ffn_dim,
    )
    return EncoderDecoderConfig(
        TransformerConfig(**encoder, **common, causal=False),
        TransformerConfig(
            **decoder, **common, cross=True, tied=hf.tie_word_embeddings, unembed_bias=True
        ),
    )


TENSORS = (
    Tensor("model.shared.weight", "embedding"),
    *_stack("encoder"),
    *_stack("decoder"),
    *vectors(
        "model.decoder.layers.{}.", {"cross_norm": "encoder_attn_layer_norm"}, to="decoder.layers."
    ),
    *matrices("model.decoder.layers.{}.", CROSS, to="decoder.layers."),
    Tensor("lm_head.weight", "unembedding", transpose=True),
    # A buffer [1, V], zero in most files, but part of the logits.
    Tensor("final_logits_bias", "unembedding_bias", ones=(0,)),
)
# Copies of `model.shared.weight`.
IGNORED = r"^model\.(encoder|decoder)\.embed_tokens\.weight$"
FAMILIES = {
    "bart": Family("BartForConditionalGeneration", "model.", TENSORS, _read, ignored=IGNORED)
}
