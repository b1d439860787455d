"""T5, both MLPs: relu (version 1), gated gelu (1.1)."""

from rlhf.models.config import EncoderDecoderConfig, LayerKind, TransformerConfig
from rlhf.models.families.table import Family, Tensor, activation, matrices, vectors

ATTENTION = {
    "q": "SelfAttention.q",
    "k": "SelfAttention.k",
    "v": "SelfAttention.v",
    "o": "SelfAttention.o",
}
CROSS = {f"cross_{name}": f"EncDecAttention.{name}" for name in "qkvo"}


def _stack(stack: str, mlp: int, gated: bool) -> tuple[Tensor, ...]:
    """Sub-layers are numbered: attention 0, in the decoder attention to the encoder 1, and the MLP
    last.
    """
    to = f"{stack}.layers."
    layer = f"{stack}.block.{{}}.layer."
    feed = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if gated else {"up": "wi", "down": "wo"}
    return (
        *vectors(f"{layer}0.", {"attention_norm": "layer_norm"}, to=to),
        *matrices(f"{layer}0.", ATTENTION, to=to),
        # The first layer alone has the table; all layers read it.
        Tensor(
            f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            f"{stack}.relative",
        ),
        *vectors(f"{layer}{mlp}.", {"mlp_norm": "layer_norm"}, to=to),
        *matrices(f"{layer}{mlp}.DenseReluDense.", feed, to=to),
        *vectors(f"{stack}.", {"final_norm": "final_layer_norm"}, to=f"{stack}."),
    )


def _read(hf) -> EncoderDecoderConfig:
    common = dict(
        vocab_size=hf.vocab_size,
        hidden_size=hf.d_model,
        num_heads=hf.num_heads,
        head_dim=hf.d_kv,
        mlp_size=hf.d_ff,
        kinds=(LayerKind(rope=None),),
        relative_buckets=hf.relative_attention_num_buckets,
        relative_distance=hf.relative_attention_max_distance,
        norm_eps=hf.layer_norm_epsilon,
        activation=activation(hf.dense_act_fn),
        gated=hf.is_gated_act,
        # T5 folds 1 / √width into the initial weights of q.
        attention_scale=1.0,
    )
    # Version 1 ties the output matrix and scales what it reads; 1.1 does neither, whatever
    # `tie_word_embeddings` says.
    ends = dict(
        tied=hf.scale_decoder_outputs,
        logit_scale=hf.d_model**-0.5 if hf.scale_decoder_outputs else 1.0,
    )
    return EncoderDecoderConfig(
        TransformerConfig(num_layers=hf.num_layers, causal=False, **common),
        TransformerConfig(num_layers=hf.num_decoder_layers, cross=True, **common, **ends),
    )


def _tensors(c: EncoderDecoderConfig) -> tuple[Tensor, ...]:
    return (
        Tensor("shared.weight", "embedding"),
        *_stack("encoder", 1, c.encoder.gated),
        *_stack("decoder", 2, c.decoder.gated),
        *vectors("decoder.block.{}.layer.1.", {"cross_norm": "layer_norm"}, to="decoder.layers."),
        *matrices("decoder.block.{}.layer.1.", CROSS, to="decoder.layers."),
        Tensor("lm_head.weight", "unembedding", transpose=True),
    )


# Copies of `shared.weight`, and a bias of cross attention in old files that no model reads.
IGNORED = (
    r"^(encoder|decoder)\.embed_tokens\.weight$"
    r"|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$"
)
FAMILIES = {"t5": Family("T5ForConditionalGeneration", "", _tensors, _read, ignored=IGNORED)}
