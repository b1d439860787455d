"""Phi 1 to 2 (attention beside the MLP), and Phi 3 and 4 (Llama with fused projections)."""

from rlhf.models.config import LayerKind, TransformerConfig
from rlhf.models.families.llama import NORMS, read, tensors
from rlhf.models.families.table import Family, Tensor, activation, kinds, matrices, rope, vectors

PHI = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.dense",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
PHI_NORMS = {"q_norm": "self_attn.q_layernorm", "k_norm": "self_attn.k_layernorm"}
# Parts of a fused tensor in the order in which they lie in it.
PHI3 = {
    "q k v": "self_attn.qkv_proj",
    "o": "self_attn.o_proj",
    "gate up": "mlp.gate_up_proj",
    "down": "mlp.down_proj",
}


def _read_phi(hf) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        mlp_size=hf.intermediate_size,
        kinds=(LayerKind(rope=rope(hf)),),
        norm="layer",
        norm_eps=hf.layer_norm_eps,
        parallel=1,
        activation=activation(hf.hidden_act),
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        qk_norm="head" if hf.qk_layernorm else None,
        unembed_bias=True,
        tied=hf.tie_word_embeddings,
    )


def _read_phi3(hf) -> TransformerConfig:
    return read(hf, kinds=kinds(hf, ["sliding_attention"]))


PHI_TENSORS = (
    Tensor("model.embed_tokens.weight", "embedding"),
    *vectors("model.layers.{}.", {"attention_norm": "input_layernorm", **PHI_NORMS}),
    *matrices("model.layers.{}.", PHI),
    *vectors("model.", {"final_norm": "final_layernorm"}, to=""),
    *matrices("", {"unembedding": "lm_head"}, to=""),
)

FAMILIES = {
    "phi": Family("PhiForCausalLM", "model.", PHI_TENSORS, _read_phi),
    "phi3": Family("Phi3ForCausalLM", "model.", tensors(NORMS, PHI3), _read_phi3),
}
