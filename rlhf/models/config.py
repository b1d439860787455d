"""What a transformer looks like: one table of choices, from which every family is put together."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rlhf.models.rotary import Rope

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    # The tanh form, which is JAX's default; Hugging Face calls the exact one "gelu".
    "gelu": jax.nn.gelu,
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_quick": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "tanh": jnp.tanh,
}


ROPE = Rope()


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What may differ from layer to layer, and is known when the program is compiled."""

    window: int | None = None  # tokens a query sees, itself included; None: all before it
    rope: Rope | None = ROPE  # None: queries and keys do not turn
    sparse: bool = False  # experts in place of the MLP


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A stack of attention and MLP blocks.  Defaults are Llama's."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    num_kv_heads: int | None = None  # None: num_heads
    head_dim: int | None = None  # None: hidden_size // num_heads
    # of the embedding, where it is projected to hidden_size and back (OPT-350m)
    embed_size: int | None = None
    kinds: tuple[LayerKind, ...] = (LayerKind(),)  # layer i is of kind i modulo their number
    causal: bool = True  # False: an encoder, every token sees its whole segment
    cross: bool = False  # attends to an encoder's output too
    # positions, where they are not rotary
    max_positions: int | None = None  # learned, so many
    position_offset: int = 0  # position i reads row i + offset of the table (OPT, BART, RoBERTa)
    alibi: bool = False  # scores fall with the distance, by a slope a head  (arXiv:2108.12409)
    relative_buckets: int = 0  # learned score per bucket of distances (T5)
    relative_distance: int = 128  # from which on all distances share a bucket
    token_types: int = 0  # learned vectors added by `inputs["token_types"]` (BERT)
    # norms
    norm: str = "rms"  # "rms" or "layer" (mean taken off, with bias)
    norm_eps: float = 1e-6
    # "pre", "branch" (of its output, OLMo 2), "both" (Gemma 2) or "sum" (of x and the branch, BERT)
    norm_place: str = "pre"
    norm_offset: float = 0.0  # Gemma: scale by 1 + w
    embed_norm: bool = False
    final_norm: bool = True
    # "head": of each head's queries and keys (Qwen 3); "heads": over all heads jointly (OLMo 2)
    qk_norm: str | None = None
    # blocks
    # attention and MLP side by side: 1 with one norm (GPT-J), 2 with a norm each (GPT-NeoX)
    parallel: int = 0
    activation: str = "silu"  # a name of ACTIVATIONS
    gated: bool = True  # down(act(gate x) · up x), else down(act(up x))
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    experts: int = 0  # of sparse layers
    experts_per_token: int = 2
    expert_size: int = 0
    expert_renormalise: bool = True  # the chosen experts' weights sum to 1
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_softcap: float | None = None
    residual_scale: float = 1.0  # of every branch (Granite)
    # ends
    embed_scale: float = 1.0  # Gemma: √hidden_size
    unembeds: bool = True  # False: hidden states alone, no output matrix
    tied: bool = False  # logits from the embedding matrix
    unembed_bias: bool = False
    logit_scale: float = 1.0
    final_softcap: float | None = None
    # computation
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel: str | None = None  # of `attention`; None: the fastest that can serve
    remat: str = "none"  # what the backward pass finds: a name of `REMAT`

    def __post_init__(self):
        choices = {
            "norm": ("rms", "layer"),
            "norm_place": ("pre", "branch", "both", "sum"),
            "qk_norm": (None, "head", "heads"),
            "parallel": (0, 1, 2),
            "activation": tuple(ACTIVATIONS),
            "remat": tuple(REMAT),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"{field} must be one of {allowed}, but is {getattr(self, field)!r}"
                )
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads {self.num_heads} does not divide hidden_size {self.hidden_size}; give "
                "head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads {self.kv_heads} does not divide num_heads {self.num_heads}"
            )
        if not self.rotary and any(kind.rope for kind in self.kinds):
            raise ValueError(
                "learned, relative or ALiBi positions beside rotary ones; give "
                "kinds=(LayerKind(rope=None),)"
            )
        if (
            any(kind.sparse for kind in self.kinds)
            and not 0 < self.experts_per_token <= self.experts
        ):
            raise ValueError(
                f"sparse layers need experts, but {self.experts_per_token} a token of "
                f"{self.experts} are given"
            )

    @property
    def rotary(self) -> bool:
        return not (self.max_positions or self.alibi or self.relative_buckets)

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def width(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def scale(self) -> float:
        return self.width**-0.5 if self.attention_scale is None else self.attention_scale

    def kind(self, layer: int) -> LayerKind:
        return self.kinds[layer % len(self.kinds)]


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig:
    """An encoder of `inputs`, and a decoder that attends to it; they share the embedding."""

    encoder: TransformerConfig
    decoder: TransformerConfig

    def __post_init__(self):
        if self.encoder.causal or not self.decoder.cross:
            raise ValueError("the encoder must have causal=False, and the decoder cross=True")
        if (self.encoder.vocab_size, self.encoder.hidden_size) != (
            self.decoder.vocab_size,
            self.decoder.hidden_size,
        ):
            raise ValueError(
                "encoder and decoder share the embedding; vocab_size and hidden_size must be equal"
            )

    @property
    def param_dtype(self):
        return self.decoder.param_dtype


Config = TransformerConfig | EncoderDecoderConfig

# Names that `checkpoint_name` gives to activations in a block.
SAVED = ("q", "k", "v", "attention", "mlp")
_policies = jax.checkpoint_policies
# A layer's weights cut from the stack, and cast: saved, they would be a second copy of the model.
WEIGHTS = ("dynamic_slice", "squeeze", "convert_element_type")
# Cheap to compute again, and as large as what they were computed from.
ELEMENTWISE = (
    "add",
    "sub",
    "mul",
    "neg",
    "select_n",
    "reshape",
    "transpose",
    "broadcast_in_dim",
    "slice",
    "concatenate",
)
REMAT = {  # what the backward pass finds; the rest it computes again
    # all that is worth the memory
    "none": lambda primitive, *_, **__: primitive.name not in WEIGHTS + ELEMENTWISE,
    # results of products with weights; attention's scores, which have a batch axis, are not
    "dots": _policies.dots_with_no_batch_dims_saveable,
    "names": _policies.save_only_these_names(*SAVED),
    # as "names", in the host's memory
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(SAVED),
        offload_src="device",
        offload_dst="pinned_host",
    ),
    # a block's input alone
    "full": _policies.nothing_saveable,
}
