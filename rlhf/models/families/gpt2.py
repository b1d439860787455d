"""GPT-2: learned positions, fused projections stored [in, out]."""

from rlhf.models.config import LayerKind, TransformerConfig
from rlhf.models.families.table import Family, Tensor, activation, activation_there, vectors

LAYER = "transformer.h.{}."
FUSED = {"q k v": "attn.c_attn", "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
FIELDS = {  # ours -> theirs
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "max_positions": "n_positions",
    "norm_eps": "layer_norm_epsilon",
    "tied": "tie_word_embeddings",
}


def _leaves(ours: str, end: str = "") -> str:
    return " ".join(f"layers.{part}{end}" for part in ours.split())


TENSORS = (
    Tensor("transformer.wte.weight", "embedding"),
    Tensor("transformer.wpe.weight", "position_embedding"),
    *vectors(LAYER, {"attention_norm": "ln_1", "mlp_norm": "ln_2"}),
    # GPT-2's `Conv1D` stores [in, out], as we do: nothing is transposed.
    *(Tensor(f"{LAYER}{theirs}.weight", _leaves(ours)) for ours, theirs in FUSED.items()),
    *(Tensor(f"{LAYER}{theirs}.bias", _leaves(ours, "_bias")) for ours, theirs in FUSED.items()),
    *vectors("transformer.", {"final_norm": "ln_f"}, to=""),
    Tensor("lm_head.weight", "unembedding", transpose=True),
)


def _read(hf) -> TransformerConfig:
    fields = {ours: getattr(hf, theirs) for ours, theirs in FIELDS.items()}
    fixed: dict = dict(
        norm="layer",
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        kinds=(LayerKind(rope=None),),
    )
    return TransformerConfig(
        **fields,
        **fixed,
        mlp_size=hf.n_inner or 4 * hf.n_embd,
        activation=activation(hf.activation_function),
    )


def _write(c: TransformerConfig) -> dict:
    fields = {
        theirs: getattr(c, ours) for ours, theirs in FIELDS.items() if getattr(c, ours) is not None
    }
    # Several of their names are our "gelu"; GPT-2's files say this one.
    act = "gelu_new" if c.activation == "gelu" else activation_there(c.activation)
    return {
        **fields,
        "n_inner": None if c.mlp_size == 4 * c.hidden_size else c.mlp_size,
        "activation_function": act,
    }


FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        "transformer.",
        TENSORS,
        _read,
        _write,
        # Causal masks, which old versions of torch stored as buffers.
        ignored=r"\.attn\.(masked_)?bias$",
        only={
            "add_cross_attention": (False,),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
        },
    ),
}
