"""OPT: learned positions from row 2 on; the 350m model norms after the sum and has a narrower
embedding.
"""

from rlhf.models.config import LayerKind, TransformerConfig
from rlhf.models.families.table import Family, Tensor, activation, matrices, vectors

LAYER = "model.decoder.layers.{}."
PROJECTIONS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.out_proj",
    "up": "fc1",
    "down": "fc2",
}


def _read(hf) -> TransformerConfig:
    bias = dict(qkv_bias=hf.enable_bias, out_bias=hf.enable_bias, mlp_bias=hf.enable_bias)
    return TransformerConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        mlp_size=hf.ffn_dim,
        embed_size=None if hf.word_embed_proj_dim == hf.hidden_size else hf.word_embed_proj_dim,
        kinds=(LayerKind(rope=None),),
        max_positions=hf.max_position_embeddings,
        # As in BART, rows 0 and 1 of the table are unused.
        position_offset=2,
        norm="layer",
        norm_eps=1e-5,
        norm_place="pre" if hf.do_layer_norm_before else "sum",
        final_norm=hf.do_layer_norm_before and not hf._remove_final_layer_norm,
        activation=activation(hf.activation_function),
        gated=False,
        tied=hf.tie_word_embeddings,
        **bias,
    )


TENSORS = (
    Tensor("model.decoder.embed_tokens.weight", "embedding"),
    Tensor("model.decoder.embed_positions.weight", "position_embedding"),
    Tensor("model.decoder.project_in.weight", "project_in", transpose=True),
    Tensor("model.decoder.project_out.weight", "project_out", transpose=True),
    *vectors(LAYER, {"attention_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm"}),
    *matrices(LAYER, PROJECTIONS),
    *vectors("model.decoder.", {"final_norm": "final_layer_norm"}, to=""),
    Tensor("lm_head.weight", "unembedding", transpose=True),
)
FAMILIES = {
    "opt": Family(
        "OPTForCausalLM", "model.", TENSORS, _read, only={"layer_norm_elementwise_affine": (True,)}
    )
}
