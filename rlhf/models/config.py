"""What a transformer looks like: one table of choices, from which every family is put together."""

import dataclasses
from typing import Any, Protocol

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
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # arXiv:2109.08668
}


ROPE = Rope()


@dataclasses.dataclass(frozen=True)
class Temperature:
    """Queries times `1 + rate ln(1 + floor((position + offset) / length))`: sharper attention far
    from the start  (arXiv:2501.19399).
    """

    rate: float
    length: int
    offset: int = 0

    def of(self, positions: jax.Array) -> jax.Array:
        """The factor at each position."""
        return 1 + self.rate * jnp.log1p(jnp.floor((positions + self.offset) / self.length))


class Mixer(Protocol):
    """What lets a token read those before it: `Latent`, `Delta` and `ShortConvolution` are some."""

    def mix(self, block: Any, x: jax.Array, where: Any) -> tuple[jax.Array, Any]:
        """`x [B, T, D]` to `[B, T, D]`, and the state for a cache; `block` declares weights."""
        ...

    def empty(self, c: Any, batch: int, length: int) -> Any:
        """The state before the first of `length` columns; batch on axis 0 of every leaf."""
        ...


@dataclasses.dataclass(frozen=True)
class Heads:
    """Heads of layers where they are of another size than elsewhere in the model."""

    width: int  # entries of a head
    kv_heads: int
    # of their parameters' names: arrays of several shapes cannot lie in one stack
    prefix: str = ""
    keys_are_values: bool = False  # one projection for both, before norms and positions


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What may differ from layer to layer, and is known when the program is compiled."""

    window: int | None = None  # tokens a query sees, itself included; None: all before it
    rope: Rope | None = ROPE  # None: queries and keys do not turn
    sparse: bool = False  # experts in place of the MLP
    chunk: int | None = None  # a query sees those from the last multiple of it on (Llama 4)
    temperature: Temperature | None = None
    mixer: Mixer | None = None  # in place of attention over keys and values of its own
    heads: Heads | None = None  # None: as the model's config says
    # A name under which later layers get this one's keys and values; or that whose they take.
    lends: str | None = None
    borrows: str | None = None
    widening: int = 1  # the MLP is so many times as wide

    @property
    def mlp_prefix(self) -> str:
        """Of the names of the MLP's parameters."""
        return "" if self.widening == 1 else "wide_"


@dataclasses.dataclass(frozen=True)
class Experts:
    """MLPs of which each token goes through a few, and the router that chooses them."""

    number: int
    per_token: int
    size: int  # width of each
    # What the router's logits become: "softmax" over all experts, "chosen" over those that are
    # chosen, "sigmoid" of each, or "sparsemixer" (Phi 3.5)
    scores: str = "softmax"
    renormalise: bool = True  # the weights of the chosen ones are divided by their sum
    scale: float = 1.0  # of the weights, at last
    correction: bool = False  # a learned number an expert, added for the choice alone (DeepSeek V3)
    # The experts stand in so many groups; those of the best few alone can be chosen, by the sum of
    # a group's best scores, so many of them.
    groups: int = 1
    groups_per_token: int = 1
    group_best: int = 1
    # MLPs of this width in all that every token goes through, 0: none; and whether a learned
    # sigmoid weighs them.
    shared_size: int = 0
    shared_gate: bool = False
    beside: bool = False  # added to an MLP, with norms and a scale an expert (Gemma 4)
    weighs_input: bool = False  # an expert reads x times its weight (Llama 4)
    bias: bool = False  # of the router and of the experts
    # (α, limit) of `(u + 1) g σ(α g)`, g up to the limit and u within ± the limit  (GPT-OSS); None:
    # the MLP's activation
    clamp: tuple[float, float] | None = None

    def __post_init__(self):
        if self.scores not in (allowed := ("softmax", "chosen", "sigmoid", "sparsemixer")):
            raise ValueError(f"scores must be one of {allowed}, but is {self.scores!r}")
        if self.per_token is None or not 0 < self.per_token <= self.number:
            raise ValueError(f"{self.per_token} experts a token of {self.number}")
        if self.number % self.groups or not 0 < self.groups_per_token <= self.groups:
            raise ValueError(
                f"{self.groups_per_token} groups a token of {self.groups}, of {self.number} experts"
            )


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
    norm_bias: bool = True  # of "layer"
    embed_norm: bool = False
    final_norm: bool = True
    # "head": of each head's queries and keys (Qwen 3); "heads": over all heads jointly (OLMo 2);
    # "turned": of each head's, after they turned (Hunyuan); "unit": likewise, without weights, where
    # they turn (Llama 4)
    qk_norm: str | None = None
    v_norm: bool = False  # of each head's values, without weights (Gemma 4)
    qkv_clip: float | None = None  # queries, keys and values within ± this (OLMoE)
    # blocks
    # attention and MLP side by side: 1 with one norm (GPT-J), 2 with a norm each (GPT-NeoX)
    parallel: int = 0
    activation: str = "silu"  # a name of ACTIVATIONS; or "xielu", which has parameters
    gated: bool = True  # down(act(gate x) · up x), else down(act(up x))
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    experts: Experts | None = None  # of sparse layers
    sinks: bool = False  # a learned score a head joins each softmax, and has no value (GPT-OSS)
    attention_gate: bool = False  # of x, a sigmoid on every entry of the output (Qwen 3 Next)
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_softcap: float | None = None
    residual_scale: float = 1.0  # of every branch (Granite)
    # Numbers of each token for each layer by itself, of a table of their own; 0: none (Gemma 4)
    layer_input_size: int = 0
    layer_scalar: bool = False  # a number that a layer's output is multiplied by (Gemma 4)
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
            "qk_norm": (None, "head", "heads", "turned", "unit"),
            "parallel": (0, 1, 2),
            "activation": (*ACTIVATIONS, "xielu"),
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
        if any(kind.sparse for kind in self.kinds) and self.experts is None:
            raise ValueError("sparse layers need experts=Experts(…)")

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
