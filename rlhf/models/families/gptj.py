"""GPT-J: attention beside the MLP, rotary positions in interleaved pairs."""

from rlhf.models.config import LayerKind, TransformerConfig
from rlhf.models.families.table import Family, Tensor, activation, matrices, vectors
from rlhf.models.rotary import Rope

LAYER = "transformer.h.{}."
PROJECTIONS = {
    "q": "attn.q_proj",
    "k": "attn.k_proj",
    "v": "attn.v_proj",
    "o": "attn.out_proj",
    "up": "mlp.fc_in",
    "down": "mlp.fc_out",
}


def _read(hf) -> TransformerConfig:
    width = hf.n_embd // hf.n_head
    return TransformerConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.n_embd,
        num_layers=hf.n_layer,
        num_heads=hf.n_head,
        mlp_size=hf.n_inner or 4 * hf.n_embd,
        kinds=(LayerKind(rope=Rope(share=(hf.rotary_dim or width) / width, interleaved=True)),),
        norm="layer",
        norm_eps=hf.layer_norm_epsilon,
        # One norm for both branches, and no second one in its files.
        parallel=1,
        activation=activation(hf.activation_function),
        gated=False,
        mlp_bias=True,
        unembed_bias=True,
        tied=hf.tie_word_embeddings,
    )


TENSORS = (
    Tensor("transformer.wte.weight", "embedding"),
    *vectors(LAYER, {"attention_norm": "ln_1"}),
    *matrices(LAYER, PROJECTIONS),
    *vectors("transformer.", {"final_norm": "ln_f"}, to=""),
    *matrices("", {"unembedding": "lm_head"}, to=""),
)
FAMILIES = {
    "gptj": Family(
        "GPTJForCausalLM", "transformer.", TENSORS, _read, ignored=r"\.attn\.(masked_)?bias$"
    )
}
