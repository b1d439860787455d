"""The Hugging Face families that `DecoderConfig` spans: for each a table of tensors, and its config read and written.

A new family is a new entry of `FAMILIES`.  Configs are objects of transformers' own classes, which know each family's
defaults and turn the keys of older files into today's.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from rlhf.models.decoder import DecoderConfig, LayerKind

NOTHING: Mapping[str, tuple] = MappingProxyType({})


class Tensor(NamedTuple):
    """One tensor of a file, or one a layer."""

    name: str  # there; {} is the layer's number
    leaves: str  # here, `layers.q`; several names: parts of the tensor, side by side along our last axis
    transpose: bool = False  # there [out, in], here [in, out]


class Family(NamedTuple):
    """How a family writes what we hold.  Rows whose leaves a model lacks (biases, a tied output matrix) do not count."""

    architecture: str
    prefix: str  # of the trunk's tensors; files of the trunk alone leave it out
    tensors: tuple[Tensor, ...]
    read: Callable[[Any], dict]  # transformers' config -> fields of DecoderConfig
    write: Callable[[DecoderConfig], dict]  # DecoderConfig -> fields of transformers' config
    buffers: str = r"\.rotary_emb\.inv_freq$"  # stored, but no weights
    only: Mapping[str, tuple] = NOTHING  # fields of transformers' config, and what they may be


# --- tensors -----------------------------------------------------------------------------------------------------------

PROJECTIONS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
PRE_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
BOTH_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}


def _llama_tensors(norms: Mapping[str, str]) -> tuple[Tensor, ...]:
    """The names that Llama began and most families kept."""
    norms = {**norms, "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
    layer = "model.layers.{}."
    return (
        Tensor("model.embed_tokens.weight", "embedding"),
        *(Tensor(f"{layer}{theirs}.weight", f"layers.{ours}") for ours, theirs in norms.items()),
        *(Tensor(f"{layer}{theirs}.weight", f"layers.{ours}", transpose=True) for ours, theirs in PROJECTIONS.items()),
        *(Tensor(f"{layer}{theirs}.bias", f"layers.{ours}_bias") for ours, theirs in PROJECTIONS.items()),
        Tensor("model.norm.weight", "final_norm"),
        Tensor("lm_head.weight", "unembedding", transpose=True),
    )


GPT2_TENSORS = (
    Tensor("transformer.wte.weight", "embedding"),
    Tensor("transformer.wpe.weight", "position_embedding"),
    Tensor("transformer.h.{}.ln_1.weight", "layers.attention_norm"),
    Tensor("transformer.h.{}.ln_1.bias", "layers.attention_norm_bias"),
    Tensor("transformer.h.{}.attn.c_attn.weight", "layers.q layers.k layers.v"),
    Tensor("transformer.h.{}.attn.c_attn.bias", "layers.q_bias layers.k_bias layers.v_bias"),
    Tensor("transformer.h.{}.attn.c_proj.weight", "layers.o"),
    Tensor("transformer.h.{}.attn.c_proj.bias", "layers.o_bias"),
    Tensor("transformer.h.{}.ln_2.weight", "layers.mlp_norm"),
    Tensor("transformer.h.{}.ln_2.bias", "layers.mlp_norm_bias"),
    Tensor("transformer.h.{}.mlp.c_fc.weight", "layers.up"),
    Tensor("transformer.h.{}.mlp.c_fc.bias", "layers.up_bias"),
    Tensor("transformer.h.{}.mlp.c_proj.weight", "layers.down"),
    Tensor("transformer.h.{}.mlp.c_proj.bias", "layers.down_bias"),
    Tensor("transformer.ln_f.weight", "final_norm"),
    Tensor("transformer.ln_f.bias", "final_norm_bias"),
    Tensor("lm_head.weight", "unembedding", transpose=True),
)

# --- configs -----------------------------------------------------------------------------------------------------------

ACTIVATIONS = {  # theirs -> ours; the first of several is what we write
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
    "relu": "relu",
}
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


def _read_common(hf, activation: str = "hidden_act") -> dict:
    fields = {ours: getattr(hf, theirs) for ours, theirs in COMMON.items()}
    return {**fields, "head_dim": getattr(hf, "head_dim", None), "activation": _activation(getattr(hf, activation))}


def _write_common(c: DecoderConfig, activation: str = "hidden_act") -> dict:
    fields = {theirs: getattr(c, ours) for ours, theirs in COMMON.items()}
    return {**fields, "num_key_value_heads": c.kv_heads, "head_dim": c.width, activation: _activation_there(c.activation)}


def _activation(theirs: str) -> str:
    if theirs not in ACTIVATIONS:
        raise ValueError(f"activation {theirs!r} is not supported; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[theirs]


def _activation_there(ours: str) -> str:
    return next((theirs for theirs, name in ACTIVATIONS.items() if name == ours), "silu")  # what is lost, `save` names


def _theta(rope: Mapping[str, Any]) -> float:
    scaling, share = rope.get("rope_type", "default"), rope.get("partial_rotary_factor")
    if scaling != "default" or share not in (None, 1.0):
        raise ValueError(f"rotary scaling is not supported: rope_parameters {dict(rope)}, known: rope_type 'default'")
    return float(rope["rope_theta"])


def _kinds(hf, layer_types: Sequence[str]) -> tuple[LayerKind, ...]:
    def kind(layer_type):
        if layer_type not in ("full_attention", "sliding_attention"):
            raise ValueError(f"layer type {layer_type!r} is not supported; known: 'full_attention', 'sliding_attention'")
        window = hf.sliding_window if layer_type == "sliding_attention" else None
        return LayerKind(window, _theta(hf.rope_parameters.get(layer_type, hf.rope_parameters)))

    return pattern(tuple(map(kind, layer_types)))


def pattern(kinds: tuple[LayerKind, ...]) -> tuple[LayerKind, ...]:
    """The shortest beginning that repeats to all of them."""
    return next(kinds[:n] for n in range(1, len(kinds) + 1) if all(k == kinds[i % n] for i, k in enumerate(kinds)))


def _window(c: DecoderConfig) -> int | None:
    return next((kind.window for kind in c.kinds if kind.window), None)


def _layer_types(c: DecoderConfig) -> list[str]:
    windows = (c.kinds[i % len(c.kinds)].window for i in range(c.num_layers))
    return ["full_attention" if window is None else "sliding_attention" for window in windows]


def _rope(c: DecoderConfig) -> dict:
    return {"rope_type": "default", "rope_theta": c.kinds[0].rope_theta}


def _read_llama(hf) -> dict:
    bias = dict(qkv_bias=hf.attention_bias, out_bias=hf.attention_bias, mlp_bias=hf.mlp_bias)
    return {**_read_common(hf), **bias, "kinds": _kinds(hf, ["full_attention"])}


def _write_llama(c: DecoderConfig) -> dict:
    return {**_write_common(c), "rope_parameters": _rope(c), "attention_bias": c.qkv_bias, "mlp_bias": c.mlp_bias}


def _read_mistral(hf) -> dict:
    return {**_read_common(hf), "kinds": _kinds(hf, ["sliding_attention"])}


def _write_mistral(c: DecoderConfig) -> dict:
    return {**_write_common(c), "rope_parameters": _rope(c), "sliding_window": c.kinds[0].window}


def _read_qwen2(hf) -> dict:
    return {**_read_common(hf), "qkv_bias": True, "kinds": _kinds(hf, hf.layer_types)}


def _write_qwen2(c: DecoderConfig) -> dict:
    types, window = _layer_types(c), _window(c)
    sliding = dict(use_sliding_window=True, sliding_window=window, max_window_layers=types.count("full_attention"))
    fields = {**_write_common(c), "rope_parameters": _rope(c), "layer_types": types, **(sliding if window else {})}
    if c.width == c.hidden_size // c.num_heads:
        del fields["head_dim"]  # Qwen 2 has no such field, but honours it
    return fields


def _read_qwen3(hf) -> dict:
    bias = dict(qkv_bias=hf.attention_bias, out_bias=hf.attention_bias)
    return {**_read_common(hf), **bias, "qk_norm": True, "kinds": _kinds(hf, hf.layer_types)}


def _write_qwen3(c: DecoderConfig) -> dict:
    return {**_write_qwen2(c), "head_dim": c.width, "attention_bias": c.qkv_bias}


def _read_gemma(hf, activation: str = "hidden_act") -> dict:
    bias = dict(qkv_bias=hf.attention_bias, out_bias=hf.attention_bias)
    own = dict(norm_offset=1.0, embed_scale=hf.hidden_size**0.5, kinds=_kinds(hf, ["full_attention"]))
    return {**_read_common(hf, activation), **bias, **own}


def _write_gemma(c: DecoderConfig, activation: str = "hidden_act") -> dict:
    return {**_write_common(c, activation), "rope_parameters": _rope(c), "attention_bias": c.qkv_bias}


def _read_gemma2(hf) -> dict:
    caps = dict(attention_softcap=hf.attn_logit_softcapping, final_softcap=hf.final_logit_softcapping)
    own = dict(norm_place="both", attention_scale=hf.query_pre_attn_scalar**-0.5, kinds=_kinds(hf, hf.layer_types))
    return {**_read_gemma(hf, "hidden_activation"), **caps, **own}


def _write_gemma2(c: DecoderConfig) -> dict:
    caps = dict(attn_logit_softcapping=c.attention_softcap, final_logit_softcapping=c.final_softcap)
    scalar = c.width if c.attention_scale is None else max(1, round(c.attention_scale**-2))
    layers = dict(layer_types=_layer_types(c), sliding_window=_window(c))
    return {**_write_gemma(c, "hidden_activation"), **caps, **layers, "query_pre_attn_scalar": scalar}


def _read_gemma3(hf) -> dict:
    return {**_read_gemma2(hf), "qk_norm": True, "attention_softcap": None}  # in its configs, but not in its attention


def _write_gemma3(c: DecoderConfig) -> dict:
    types = _layer_types(c)
    thetas = {layer_type: c.kinds[types.index(layer_type)].rope_theta for layer_type in dict.fromkeys(types)}
    default = dict(full_attention=1_000_000.0, sliding_attention=10_000.0)
    rope = {layer_type: {"rope_type": "default", "rope_theta": theta} for layer_type, theta in {**default, **thetas}.items()}
    return {**_write_gemma2(c), "rope_parameters": rope, "attn_logit_softcapping": None}


GPT2 = {  # ours -> theirs
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "max_positions": "n_positions",
    "norm_eps": "layer_norm_epsilon",
    "tied": "tie_word_embeddings",
}


def _read_gpt2(hf) -> dict:
    fields = {ours: getattr(hf, theirs) for ours, theirs in GPT2.items()}
    own = dict(norm="layer", gated=False, qkv_bias=True, out_bias=True, mlp_bias=True)
    sizes = dict(mlp_size=hf.n_inner or 4 * hf.n_embd, activation=_activation(hf.activation_function))
    return {**fields, **own, **sizes}


def _write_gpt2(c: DecoderConfig) -> dict:
    fields = {theirs: getattr(c, ours) for ours, theirs in GPT2.items() if getattr(c, ours) is not None}
    activation = "gelu_new" if c.activation == "gelu" else _activation_there(c.activation)
    return {**fields, "n_inner": None if c.mlp_size == 4 * c.hidden_size else c.mlp_size, "activation_function": activation}


LLAMA_TENSORS, GEMMA2_TENSORS = _llama_tensors(PRE_NORMS), _llama_tensors(BOTH_NORMS)
CAUSAL = {"use_bidirectional_attention": (None, False)}

FAMILIES: Mapping[str, Family] = {  # by model_type; the first that can express a config is the one it is saved as
    "llama": Family("LlamaForCausalLM", "model.", LLAMA_TENSORS, _read_llama, _write_llama),
    "mistral": Family("MistralForCausalLM", "model.", LLAMA_TENSORS, _read_mistral, _write_mistral),
    "qwen2": Family("Qwen2ForCausalLM", "model.", LLAMA_TENSORS, _read_qwen2, _write_qwen2),
    "qwen3": Family("Qwen3ForCausalLM", "model.", LLAMA_TENSORS, _read_qwen3, _write_qwen3),
    "gemma": Family("GemmaForCausalLM", "model.", LLAMA_TENSORS, _read_gemma, _write_gemma, only=CAUSAL),
    "gemma2": Family("Gemma2ForCausalLM", "model.", GEMMA2_TENSORS, _read_gemma2, _write_gemma2, only=CAUSAL),
    "gemma3_text": Family("Gemma3ForCausalLM", "model.", GEMMA2_TENSORS, _read_gemma3, _write_gemma3, only=CAUSAL),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "transformer.",
        GPT2_TENSORS,
        _read_gpt2,
        _write_gpt2,
        buffers=r"\.attn\.(masked_)?bias$",
        only={"add_cross_attention": (False,), "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
    ),
}
