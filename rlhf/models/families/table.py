"""What a family of Hugging Face models is to us: a table of tensors, and its config read and, for
some, written.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from rlhf.fields import documented
from rlhf.models.config import EncoderDecoderConfig, LayerKind, TransformerConfig
from rlhf.models.rotary import Dynamic, Linear, Llama3, LongRope, Rope, Scaling, Yarn

NOTHING: Mapping[str, tuple] = MappingProxyType({})


@documented
class Tensor(NamedTuple):
    """One tensor of a file, or one a layer, or one for every expert of a layer.

    Attributes:
      name: there; {} is the layer's number, a second {} the expert's.
      leaves: here, `layers.q`; several names: parts of the tensor, side by side along our last
        axis.
      transpose: there [..., out, in], here [..., in, out].
      groups: the parts lie by so many groups: one group's of every part, then the next group's; 0:
        part after part; -1: a column of each part in turn.
      ones: where there are axes of size 1 there, which are not here.
    """

    name: str
    leaves: str
    transpose: bool = False
    groups: int = 0
    ones: tuple[int, ...] = ()


@documented
class Family(NamedTuple):
    """How a family writes what we hold.  Rows whose leaves a model lacks (biases, a tied output
    matrix) do not count.

    Attributes:
      architecture: the name of transformers' class.
      prefix: of the trunk's tensors; files of the trunk alone leave it out.
      tensors: a function of our config where names depend on it.
      read: of transformers' config.
      write: fields of transformers' config; None: saved beside an original.
      ignored: stored, but not of the trunk.
      only: fields of transformers' config, and what they may be.
      head: rows of a classifier's head.
      head_inner: activation of a layer before the labels; None: there is none.
      token_head: of classifiers of tokens, where it is another; without an inner layer.
      fused: rows in place of those of the same leaves, in files that have them: experts that lie in
        one tensor rather than each in its own.
    """

    architecture: str
    prefix: str
    tensors: tuple[Tensor, ...] | Callable[[Any], tuple[Tensor, ...]]
    read: Callable[[Any], TransformerConfig | EncoderDecoderConfig]
    write: Callable[[TransformerConfig], dict] | None = None
    # Frequencies of rotary positions: computed from the config, stored by old versions.
    ignored: str = r"\.rotary_emb\.inv_freq$"
    only: Mapping[str, tuple] = NOTHING
    head: tuple[Tensor, ...] = (
        Tensor("score.weight", "weight", transpose=True),
        Tensor("score.bias", "bias"),
    )
    head_inner: str | None = None
    token_head: tuple[Tensor, ...] | None = None
    fused: tuple[Tensor, ...] = ()

    def rows(
        self, config: TransformerConfig | EncoderDecoderConfig, names: Collection[str] = ()
    ) -> tuple[Tensor, ...]:
        """The table of a file with tensors of these names."""
        rows = self.tensors(config) if callable(self.tensors) else self.tensors
        fused = {row.name for row in self.fused}
        if fused.isdisjoint(numberless(name) for name in names):
            return rows
        leaves = {row.leaves for row in self.fused}
        leaves |= {leaf for names in leaves for leaf in names.split()}
        return (*(row for row in rows if row.leaves not in leaves), *self.fused)

    def head_rows(self, of_tokens: bool) -> tuple[Tensor, ...]:
        return self.token_head if of_tokens and self.token_head else self.head


def numberless(name: str) -> str:
    """A tensor's name as tables write it.

    >>> numberless("model.layers.3.mlp.experts.12.up_proj.weight")
    'model.layers.{}.mlp.experts.{}.up_proj.weight'
    """
    return re.sub(r"\.\d+(?=\.)", ".{}", name)


# --- tensors ----------------------------------------------------------------------


def matrices(layer: str, names: Mapping[str, str], to: str = "layers.") -> tuple[Tensor, ...]:
    """Weights `[out, in]` and biases of a layer's projections, ours -> theirs."""
    return tuple(
        row
        for ours, theirs in names.items()
        for row in (
            Tensor(
                f"{layer}{theirs}.weight",
                " ".join(to + part for part in ours.split()),
                transpose=True,
            ),
            Tensor(f"{layer}{theirs}.bias", " ".join(f"{to}{part}_bias" for part in ours.split())),
        )
    )


def shared_mlp(layer: str) -> tuple[Tensor, ...]:
    """The MLP beside the experts, which every token goes through, at a layer's name of it."""
    names = {f"shared_{name}": f"{name}_proj" for name in ("gate", "up", "down")}
    return matrices(layer, names)


def vectors(layer: str, names: Mapping[str, str], to: str = "layers.") -> tuple[Tensor, ...]:
    """Scales and biases of norms, ours -> theirs."""
    return tuple(
        row
        for ours, theirs in names.items()
        for row in (
            Tensor(f"{layer}{theirs}.weight", f"{to}{ours}"),
            Tensor(f"{layer}{theirs}.bias", f"{to}{ours}_bias"),
        )
    )


# --- configs ----------------------------------------------------------------------

# Theirs -> ours; the first of several is what we write.  Their "gelu" is the exact form.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu": "gelu_exact",
    "quick_gelu": "gelu_quick",
    "relu": "relu",
    "relu2": "relu2",
    "xielu": "xielu",
    "tanh": "tanh",
}


def activation(theirs: str) -> str:
    if theirs not in ACTIVATIONS:
        raise ValueError(f"activation {theirs!r} is not supported; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[theirs]


def activation_there(ours: str) -> str:
    return next(theirs for theirs, name in ACTIVATIONS.items() if name == ours)


def rope(hf, parameters: Mapping[str, Any] | None = None, *, interleaved: bool = False) -> Rope:
    """Rotary positions as a config's `rope_parameters` describe them."""
    p = hf.rope_parameters if parameters is None else parameters
    return Rope(
        theta=float(p["rope_theta"]),
        share=float(p.get("partial_rotary_factor") or 1.0),
        interleaved=interleaved,
        scaling=_scaling(hf, p),
    )


def _scaling(hf, p: Mapping[str, Any]) -> Scaling | None:
    kind = p.get("rope_type", "default")
    length = hf.max_position_embeddings
    original = int(p.get("original_max_position_embeddings") or length)
    if kind == "default":
        return None
    if kind == "linear":
        return Linear(float(p["factor"]))
    if kind == "dynamic":
        return Dynamic(float(p["factor"]), length)
    if kind == "llama3":
        return Llama3(
            float(p["factor"]), float(p["low_freq_factor"]), float(p["high_freq_factor"]), original
        )
    # Without a factor: how many times longer than in pretraining.
    factor = float(p.get("factor") or length / original)
    if kind == "longrope":
        # Longer texts spread attention over more keys; the factor on cos and sin sharpens it.
        grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return LongRope(
            tuple(p["short_factor"]),
            tuple(p["long_factor"]),
            original,
            float(p.get("attention_factor") or grown),
        )
    if kind == "yarn":
        ends = dict(fast=float(p.get("beta_fast") or 32), slow=float(p.get("beta_slow") or 1))
        return Yarn(
            factor,
            original,
            _yarn_attention(p, factor),
            **ends,
            truncate=bool(p.get("truncate", True)),
        )
    known = "default, linear, dynamic, yarn, longrope, llama3"
    raise ValueError(f"rotary scaling {kind!r} (rope_type) is not supported; known: {known}")


def _yarn_attention(p: Mapping[str, Any], factor: float) -> float:
    """YaRN's factor on cos and sin, `0.1 log(factor) + 1`; DeepSeek divides two of them."""

    def of(mscale):
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    computed = (
        of(p["mscale"]) / of(p["mscale_all_dim"])
        if p.get("mscale") and p.get("mscale_all_dim")
        else of(1.0)
    )
    return float(p.get("attention_factor") or computed)


def kinds(hf, layer_types: Sequence[str]) -> tuple[LayerKind, ...]:
    """A kind for every layer type, with the window and the rotary positions that the config gives
    it.
    """

    def kind(layer_type):
        if layer_type not in ("full_attention", "sliding_attention"):
            raise ValueError(
                f"layer type {layer_type!r} is not supported; known: 'full_attention', "
                "'sliding_attention'"
            )
        window = hf.sliding_window if layer_type == "sliding_attention" else None
        return LayerKind(window, rope(hf, hf.rope_parameters.get(layer_type, hf.rope_parameters)))

    return pattern(tuple(map(kind, layer_types)))


def sparse_where(
    dense: Sequence[LayerKind], layers: int, is_sparse: Callable[[int], bool]
) -> tuple[LayerKind, ...]:
    """Layers of these kinds in turn, with experts where a layer's number says so."""
    return pattern(
        tuple(
            dataclasses.replace(dense[i % len(dense)], sparse=is_sparse(i)) for i in range(layers)
        )
    )


def pattern(kinds: tuple[LayerKind, ...]) -> tuple[LayerKind, ...]:
    """The shortest start that repeats to all of them."""
    # The scan over layers compiles one repeat: the shorter it is, the smaller the program.
    return next(
        kinds[:n]
        for n in range(1, len(kinds) + 1)
        if all(k == kinds[i % n] for i, k in enumerate(kinds))
    )
