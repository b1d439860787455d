"""Llama 4's language model: attention in chunks, layers without positions, experts that read a weighted input."""

from rlhf.models.config import Experts, LayerKind, Temperature, TransformerConfig
from rlhf.models.families.llama import PROJECTIONS, read_llama, tensors
from rlhf.models.families.table import Family, Tensor, pattern, rope, shared_mlp

MLP = "model.layers.{}.feed_forward."
NAMES = {ours: theirs.replace("mlp.", "feed_forward.") for ours, theirs in PROJECTIONS.items()}
EXPERTS = (
    # As a product takes them, [E, in, out].
    Tensor(f"{MLP}experts.gate_up_proj", "layers.expert_gate layers.expert_up"),
    Tensor(f"{MLP}experts.down_proj", "layers.expert_down"),
    Tensor(f"{MLP}router.weight", "layers.router", transpose=True),
    *shared_mlp(f"{MLP}shared_expert."),
)


def _read(hf) -> TransformerConfig:
    turning = rope(hf, interleaved=True)
    tuned = hf.attn_temperature_tuning
    # (position + 1) // floor_scale
    temperature = Temperature(hf.attn_scale, int(hf.floor_scale), 1) if tuned else None

    def kind(i):
        sparse = i in hf.moe_layers
        # Despite the field's name, 1 means that the layer has rotary positions.
        if hf.no_rope_layers[i]:
            chunked = hf.layer_types[i] == "chunked_attention"
            return LayerKind(
                rope=turning, sparse=sparse, chunk=hf.attention_chunk_size if chunked else None
            )
        return LayerKind(rope=None, sparse=sparse, temperature=temperature)

    return read_llama(
        hf,
        kinds=pattern(tuple(map(kind, range(hf.num_hidden_layers)))),
        mlp_size=hf.intermediate_size_mlp,
        qk_norm="unit" if hf.use_qk_norm else None,
        experts=Experts(
            hf.num_local_experts,
            hf.num_experts_per_tok,
            hf.intermediate_size,
            scores="sigmoid",
            renormalise=False,
            weighs_input=True,
            shared_size=hf.intermediate_size,
        ),
    )


FAMILIES = {
    "llama4_text": Family(
        "Llama4ForCausalLM", "model.", (*tensors(projections=NAMES), *EXPERTS), _read
    )
}
