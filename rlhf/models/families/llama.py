"""Llama, and those that kept its names: Mistral, SmolLM 3, Seed-OSS, Ernie 4.5, Hunyuan."""

from collections.abc import Mapping

from rlhf.models.config import LayerKind, Temperature, TransformerConfig
from rlhf.models.families.table import (
    Family,
    Tensor,
    activation,
    activation_there,
    kinds,
    matrices,
    pattern,
    rope,
    vectors,
)

PROJECTIONS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
QK_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
COMMON = {  # ours -> theirs
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "mlp_size": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}


def tensors(
    norms: Mapping[str, str] = NORMS, projections: Mapping[str, str] = PROJECTIONS
) -> tuple[Tensor, ...]:
    layer = "model.layers.{}."
    return (
        Tensor("model.embed_tokens.weight", "embedding"),
        *vectors(layer, {**QK_NORMS, **norms}),
        *matrices(layer, projections),
        *vectors("model.", {"final_norm": "norm"}, to=""),
        Tensor("lm_head.weight", "unembedding", transpose=True),
    )


def read(hf, activation_field: str | None = "hidden_act", **fields) -> TransformerConfig:
    # Families differ in a few of these fields, and our defaults serve for what is absent.  Not by
    # `getattr`, which warns where layers have fields of their own.
    of_model = vars(hf)
    common = {ours: of_model[theirs] for ours, theirs in COMMON.items() if theirs in of_model}
    common["head_dim"] = of_model.get("head_dim")
    if activation_field is not None:
        common["activation"] = activation(getattr(hf, activation_field))
    if "kinds" not in fields:
        common["kinds"] = kinds(hf, ["full_attention"])
    return TransformerConfig(**{**common, **fields})


def write(c: TransformerConfig, activation_field: str = "hidden_act") -> dict:
    fields = {theirs: getattr(c, ours) for ours, theirs in COMMON.items()}
    derived = {
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.width,
        activation_field: activation_there(c.activation),
    }
    theta = c.kinds[0].rope.theta if c.kinds[0].rope else 10_000.0
    return {**fields, **derived, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def read_llama(hf, **fields) -> TransformerConfig:
    # Granite's mixture of experts has no MLP, and no such field.
    mlp_bias = getattr(hf, "mlp_bias", False)
    biases = dict(qkv_bias=hf.attention_bias, out_bias=hf.attention_bias, mlp_bias=mlp_bias)
    return read(hf, **biases, **fields)


def _write_llama(c: TransformerConfig) -> dict:
    return {**write(c), "attention_bias": c.qkv_bias, "mlp_bias": c.mlp_bias}


def _read_mistral(hf) -> TransformerConfig:
    return read(hf, kinds=kinds(hf, ["sliding_attention"]))


def _write_mistral(c: TransformerConfig) -> dict:
    return {**write(c), "sliding_window": c.kinds[0].window}


def _read_smollm3(hf) -> TransformerConfig:
    windows = (
        hf.sliding_window if kind == "sliding_attention" and hf.use_sliding_window else None
        for kind in hf.layer_types
    )
    # Despite the field's name, 1 means that the layer has rotary positions.
    ropes = (rope(hf) if has_rope else None for has_rope in hf.no_rope_layers)
    return read_llama(
        hf, kinds=pattern(tuple(LayerKind(*kind) for kind in zip(windows, ropes, strict=True)))
    )


def _read_ministral3(hf) -> TransformerConfig:
    p = hf.rope_parameters
    beta = p.get("llama_4_scaling_beta")
    temperature = beta and Temperature(float(beta), int(p["original_max_position_embeddings"]))
    kind = LayerKind(hf.sliding_window, rope(hf), temperature=temperature or None)
    return read(hf, kinds=(kind,))


def _read_seed_oss(hf) -> TransformerConfig:
    return read(
        hf, qkv_bias=hf.attention_bias, out_bias=hf.attention_out_bias, mlp_bias=hf.mlp_bias
    )


def _read_ernie(hf) -> TransformerConfig:
    biases = dict(qkv_bias=hf.use_bias, out_bias=hf.use_bias, mlp_bias=hf.use_bias)
    return read(hf, kinds=(LayerKind(rope=rope(hf, interleaved=True)),), **biases)


def _read_hunyuan(hf) -> TransformerConfig:
    p = dict(hf.rope_parameters)
    if p.get("alpha"):
        # NTK with a factor that does not grow with the text: another base, and no scaling.
        size = hf.head_dim
        p["rope_theta"] = p["rope_theta"] * p["alpha"] ** (size / (size - 2))
        p["rope_type"] = "default"
    return read(
        hf,
        kinds=(LayerKind(rope=rope(hf, p)),),
        qk_norm="turned",
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
    )


HUNYUAN_NORMS = {"q_norm": "self_attn.query_layernorm", "k_norm": "self_attn.key_layernorm"}

FAMILIES = {
    "llama": Family("LlamaForCausalLM", "model.", tensors(), read_llama, _write_llama),
    "mistral": Family("MistralForCausalLM", "model.", tensors(), _read_mistral, _write_mistral),
    "smollm3": Family("SmolLM3ForCausalLM", "model.", tensors(), _read_smollm3),
    "ministral3": Family("Ministral3ForCausalLM", "model.", tensors(), _read_ministral3),
    "seed_oss": Family("SeedOssForCausalLM", "model.", tensors(), _read_seed_oss),
    "ernie4_5": Family(
        "Ernie4_5ForCausalLM",
        "model.",
        tensors(),
        _read_ernie,
        only={"compression_ratio": (1.0,)},
    ),
    "hunyuan_v1_dense": Family(
        "HunYuanDenseV1ForCausalLM",
        "model.",
        tensors({**NORMS, **HUNYUAN_NORMS}),
        _read_hunyuan,
        only={"use_cla": (False,), "use_qk_norm": (True,)},
    ),
}
