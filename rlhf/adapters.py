"""Adapters: two thin trained matrices beside each frozen one (LoRA, DoRA).

Only the thin ones have gradients and moments; the frozen model with its adapters off is the
reference model, for nothing.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rlhf.fields import documented
from rlhf.models.linear import linear
from rlhf.models.quantized import BLOCKS as BLOCKS
from rlhf.models.quantized import QuantizedWeight
from rlhf.models.stacks import rank as rank_in_file
from rlhf.ranges import between, checked

Array = jax.Array


@documented
class LoRAWeight(NamedTuple):
    """Stands where a matrix W stood, as `W + s A B`  (LoRA, arXiv:2106.09685, eq. 3).

    With a magnitude m, as `m (W + s A B) / ‖W + s A B‖`, the norm over the inputs of each output
    and without a gradient (DoRA, arXiv:2402.09353, eq. 5 and section 4.3).  Leading axes (layers,
    experts) are those of every field: slices are whole.

    Attributes:
      base: [.., in, out], the frozen W.
      a: [.., in, r]; None in `frozen`.
      b: [.., r, out]; None in `frozen`.
      scale: [..] float32, s.
      magnitude: [.., out], m of DoRA.
      key: [..] of the dropout; None: without.
      rate: [..] float32, share of the adapter's inputs that is dropped.
    """

    base: Any
    a: Any
    b: Any
    scale: Array
    magnitude: Any = None
    key: Any = None
    rate: Any = None

    def matmul(self, x: Array) -> Array:
        """`x [..., in]` times the adapted matrix, `[..., out]` in the dtype of `x`; no matrix
        `[in, out]` is made.
        """
        return self._product(x, linear, lambda y: y[(None,) * (x.ndim - y.ndim)])

    def grouped_matmul(self, x: Array, product: Callable, expert: Array) -> Array:
        """`matmul` of rows `[N, in]`, each with the matrix of its expert.

        Args:
          x: sorted by expert.
          product: (rows, matrices `[E, in, out]`) -> rows.
          expert: `[N]` int32; of a row without one the product is 0.
        """

        def of_rows(y):
            y = y.at[expert].get(mode="fill", fill_value=0)
            return y[:, None] if y.ndim == 1 else y

        # Rows of all experts drop by one key.
        one = self if self.key is None else self._replace(key=self.key[0], rate=self.rate[0])
        return one._product(x, product, of_rows)

    def _product(self, x: Array, product: Callable, of_rows: Callable) -> Array:
        y = product(x, self.base)
        dropped = x if self.key is None else _drop(x, self.key, self.rate)
        # Through the thin side first: `x A` is `[N, r]`, where `A B` would be a second `[in, out]`.
        thin = product(dropped, self.a) * of_rows(self.scale)
        delta = product(thin.astype(x.dtype), self.b)
        if self.magnitude is None:
            return y + delta

        def rescaled(plain: Array) -> Array:
            share = self.magnitude / column_norm(self)
            return (of_rows(share) * (plain + delta)).astype(x.dtype)

        if self.key is None:
            return rescaled(y)
        # As PEFT: x W + x' (W' - W), x' being the inputs of which some are dropped.  The frozen
        # part is never dropped.
        plain = product(dropped, self.base)
        return y - plain + rescaled(plain)

    def specs(self, of_base: PartitionSpec) -> "LoRAWeight":
        """Where each part of the experts' adapter lies, as its base `[E, in, out]` does.

        Raises: ValueError for DoRA where inputs are split: its norms are over all of them.
        """
        experts, inputs, outputs = of_base
        if self.magnitude is not None and inputs is not None:
            raise ValueError(
                f"DoRA on experts whose inputs the mesh splits over {inputs!r}; give dora=False, or "
                "a mesh without that axis"
            )
        of_experts = PartitionSpec(experts)
        places: dict[str, Any] = {
            "base": of_base,
            "a": PartitionSpec(experts, inputs, None),
            "b": PartitionSpec(experts, None, outputs),
            "scale": of_experts,
            "magnitude": PartitionSpec(experts, outputs),
            "key": of_experts,
            "rate": of_experts,
        }
        there = self._asdict()
        # Keywords of a dict, whose values the type checker would hold against each field's.
        of_parts: Any = {k: None if there[k] is None else v for k, v in places.items()}
        return LoRAWeight(**of_parts)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def merged(self) -> Array:
        """The adapted matrix `[.., in, out]`, in the dtype of `base`."""
        # In float32 and at the highest precision: this is done once, and is what is saved.
        base = _float(self.base)
        product = jnp.matmul(_float(self.a), _float(self.b), precision="highest")
        w = base + self.scale[..., None, None] * product
        if self.magnitude is not None:
            w = w * (self.magnitude / column_norm(self))[..., None, :]
        return w.astype(self.base.dtype)


def column_norm(w: LoRAWeight) -> Array:
    """`‖W + s A B‖` over the inputs, `[.., out]` in at least float32, constant for gradients.

    By `‖w + s A b‖² = ‖w‖² + s b·(2 Aᵀw + s AᵀA b)` for each output, so that no second `[in, out]`
    is made.
    """
    base, a, b, scale = (
        _float(jax.lax.stop_gradient(x)) for x in (w.base, w.a, w.b, w.scale[..., None, None])
    )
    # Aᵀ x, for x = w and x = A: products of r rows.
    by_a = lambda x: jnp.matmul(jnp.swapaxes(a, -1, -2), x, precision="highest")
    cross = scale * b * (2 * by_a(base) + scale * jnp.matmul(by_a(a), b, precision="highest"))
    square = (base * base).sum(-2) + cross.sum(-2)
    # Outputs that are all 0 stay 0: the smallest positive norm divides them, and not 0.
    return jnp.sqrt(jnp.maximum(square, jnp.finfo(square.dtype).tiny))


@checked
def add(
    params: Any,
    key: Array,
    *,
    rank: Annotated[int, between(1, 65_536)] = 16,
    alpha: Annotated[float, between(0, 1_000_000, above=True)] = 32,
    targets: str | Sequence[str] = BLOCKS,
    rank_stabilised: bool = False,
    dora: bool = False,
) -> tuple[Any, Any]:
    """Gives matrices an adapter that changes nothing yet: A uniform in ±in^-½, B = 0  (PEFT's
    start), m = ‖W‖.

    Args:
      params: of a model whose layers call `linear`; others take `merge(join(trainable, frozen))`.
      key: consumed.
      rank: r; each adapter has r (in + out) numbers.
      alpha: the adapter counts alpha / r.
      targets: regular expressions; a leaf whose whole dotted path (`layers.q`) matches one of them
        gets an adapter.  The default is every matrix of the blocks.
      rank_stabilised: the adapter counts alpha / √r instead  (rsLoRA, arXiv:2312.03732).
      dora: with a magnitude for each output.

    Returns: `(trainable, frozen)`.  `trainable` is like `params` with `{"a", "b"}`, for DoRA
    `"magnitude"` too, in at least float32 where a leaf got an adapter and None, so nothing,
    elsewhere: what the optimizer sees.  `frozen` holds the arrays of `params` themselves, no
    copies: what goes into the train state's context.

    Raises: ValueError where a pattern matches nothing, or something that is not a matrix that
    activations are multiplied with;
      where `rank` is not at least 1.

    >>> params = {"layers": {"q": jnp.ones((2, 4, 3)), "norm": jnp.ones((2, 4))}}
    >>> trainable, frozen = add(params, jax.random.key(0), rank=1, targets=r"layers\\.q")
    >>> jax.tree.map(jnp.shape, trainable)
    {'layers': {'norm': None, 'q': {'a': (2, 4, 1), 'b': (2, 1, 3)}}}
    >>> loss_fn = lambda trainable, context, batch, key: (jnp.sum(merge(join(trainable, context))["layers"]["q"]), {})
    >>> jax.grad(loss_fn, has_aux=True)(trainable, frozen, None, None)[0]["layers"]["q"]["b"].shape
    (2, 1, 3)
    """
    chosen = _targets(params, (targets,) if isinstance(targets, str) else tuple(targets))
    scale = alpha / (math.sqrt(rank) if rank_stabilised else rank)

    # One program instead of a small one for every leaf: compiling those takes seconds.
    @jax.jit
    def start(key, chosen):
        parts = {}
        # Sorted: which leaf gets which key must not depend on the order of the tree.
        for (name, w), one in zip(
            sorted(chosen.items()), jax.random.split(key, len(chosen)), strict=True
        ):
            *lead, inputs, outputs = w.shape
            dtype = jnp.promote_types(w.dtype, jnp.float32)
            bound = inputs**-0.5
            a = jax.random.uniform(one, (*lead, inputs, rank), dtype, -bound, bound)
            part = LoRAWeight(
                w, a, jnp.zeros((*lead, rank, outputs), dtype), jnp.full(lead, scale, jnp.float32)
            )
            # Without its base, which is put back below as the very array that was given.
            parts[name] = part._replace(base=None, magnitude=column_norm(part) if dora else None)
        return parts

    parts = {name: part._replace(base=chosen[name]) for name, part in start(key, chosen).items()}

    def replace(path, w):
        return parts.get(dotted(path), w)

    return split(jax.tree_util.tree_map_with_path(replace, params, is_leaf=is_matrix))


def split(params: Any) -> tuple[Any, Any]:
    """`(trainable, frozen)` of parameters with adapters: the inverse of `join`.

    >>> w = LoRAWeight(jnp.ones((2, 2)), jnp.ones((2, 1)), jnp.zeros((1, 2)), jnp.ones(()))
    >>> jax.tree.map(jnp.shape, split({"w": w, "bias": jnp.ones(2)})[0])
    {'bias': None, 'w': {'a': (2, 1), 'b': (1, 2)}}
    """

    def trained(w):
        fields = {} if w.magnitude is None else {"magnitude": w.magnitude}
        return {"a": w.a, "b": w.b, **fields}

    trainable = _map(trained, params, lambda x: None)
    return trainable, _map(lambda w: LoRAWeight(w.base, None, None, w.scale), params)


def join(trainable: Any, frozen: Any) -> Any:
    """The parameters that the model takes: adapters in their places, the frozen arrays as they are.

    Raises: ValueError where one has an adapter at a leaf and the other has not.

    >>> trainable, frozen = add({"w": jnp.ones((2, 2))}, jax.random.key(0), rank=1, targets="w")
    >>> linear(jnp.ones((1, 2)), join(trainable, frozen)["w"]).tolist()
    [[2.0, 2.0]]
    """

    def one(path, w, trained):
        # Both or neither: `trained` is None exactly where `frozen` holds a plain array.
        if is_adapter(w) is (trained is None):
            here, there = ("frozen", "trainable") if trained is None else ("trainable", "frozen")
            raise ValueError(
                f"{here} has an adapter at {dotted(path)} but {there} has none; give both as `add` "
                "returned them"
            )
        return w if trained is None else w._replace(**trained)

    return jax.tree_util.tree_map_with_path(one, frozen, trainable, is_leaf=is_adapter)


def merge(params: Any) -> Any:
    """Plain arrays that compute the same, in the base's dtype: for rollouts, for saving, for models
    without `linear`.

    Gradients flow to the adapters.

    >>> w = LoRAWeight(jnp.ones((1, 2)), jnp.ones((1, 1)), jnp.ones((1, 2)), jnp.float32(0.5))
    >>> merge({"w": w})["w"].tolist()
    [[1.5, 1.5]]
    """
    return _map(LoRAWeight.merged, params)


def off(params: Any) -> Any:
    """The model without its adapters, for a reference model: the frozen arrays themselves, of
    `join(…)` or of `frozen`.

    >>> w = jnp.ones((2, 2))
    >>> off(add({"w": w}, jax.random.key(0), rank=1, targets="w")[1])["w"] is w
    True
    """
    return _map(lambda w: w.base, params)


def dropout(params: Any, key: Array, rate: float) -> Any:
    """Parameters whose adapters see inputs of which a share `rate` is dropped, the others divided
    by `1 - rate`.

    Give it the key of the loss; without it nothing is dropped.  Every adapter and layer draws for
    itself.

    Args:
      params: what `join` returns.
      key: consumed.
      rate: in [0, 1).

    Raises: ValueError where `rate` is outside.

    >>> params = join(*add({"w": jnp.ones((2, 2))}, jax.random.key(0), rank=1, targets="w"))
    >>> dropout(params, jax.random.key(1), 0.1)["w"].rate.item()
    0.1
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate must be in [0, 1), but is {rate}")
    # A counter of the adapters in the tree's order, so that each folds in another number.
    number = iter(range(len(jax.tree.leaves(params, is_leaf=is_adapter))))

    def one(w):
        # One key for every layer of a stack: its scan slices keys like all other fields.
        keys = jax.random.split(jax.random.fold_in(key, next(number)), w.scale.shape)
        return w._replace(key=keys, rate=jnp.full(w.scale.shape, rate, jnp.float32))

    return _map(one, params)


def axes(names: Any, params: Any) -> Any:
    """Logical axis names for a state with adapters: A has its matrix's inputs, B its outputs, r is
    on no mesh axis.

    Args:
      names: `lm.axes()`.
      params: what `join` returns, or `frozen`.

    Returns: names for `rlhf.sharding`, which finds by them the arrays of `trainable`, its moments,
    and `frozen`.

    >>> trainable, frozen = add({"w": jnp.ones((2, 2))}, jax.random.key(0), rank=1, targets="w")
    >>> axes({"w": ("embed", "mlp")}, frozen)["w"].a
    ('embed', None)
    """

    def one(names_of_base, w):
        if names_of_base is None or not is_adapter(w):
            return names_of_base
        *lead, inputs, outputs = names_of_base
        return LoRAWeight(
            names_of_base,
            (*lead, inputs, None),
            (*lead, None, outputs),
            tuple(lead),
            (*lead, outputs),
        )

    # A tuple of names is a leaf here, and so is None: an array on no axis.
    return jax.tree.map(one, names, params, is_leaf=lambda x: x is None or isinstance(x, tuple))


def is_adapter(x: Any) -> bool:
    return isinstance(x, LoRAWeight)


def is_matrix(x: Any) -> bool:
    """Whether something stands for an array: a base in few bits."""
    return isinstance(x, QuantizedWeight)


def dotted(path) -> str:
    """A leaf's path as `targets` name it, `layers.q`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _targets(params: Any, patterns: Sequence[str]) -> Mapping[str, Array]:
    # `is_matrix`: a quantised weight is several arrays, and one leaf here.
    leaves = {
        dotted(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_matrix)
    }
    matched = {
        pattern: [name for name in leaves if re.fullmatch(pattern, name)] for pattern in patterns
    }
    wrong = {name: no_target(name, leaves[name]) for names in matched.values() for name in names}
    there = (
        ", ".join(name for name, leaf in leaves.items() if not no_target(name, leaf)) or "nothing"
    )
    if empty := [pattern for pattern, names in matched.items() if not names]:
        raise ValueError(
            f"targets {', '.join(map(repr, empty))} match no leaf; an adapter can stand at: {there}"
        )
    if refused := [
        f"{name} {list(leaves[name].shape)}, {why}" for name, why in wrong.items() if why
    ]:
        raise ValueError(f"targets match {'; '.join(refused)}; an adapter can stand at: {there}")
    return {name: leaves[name] for name in leaves if name in wrong}


def no_target(name: str, leaf: Array) -> str:
    """Why a leaf cannot have an adapter, or nothing."""
    if rank_in_file(name.split("."), leaf) < 2:
        return "which is no matrix"
    if re.search(r"(?<!un)embedding$", name):  # not `unembedding`, which multiplies
        return "whose rows are looked up, not multiplied"
    if name.endswith(("_taps", "router")):
        return "which is no matrix that `linear` multiplies with"
    return ""


def _drop(x: Array, key: Array, rate: Array) -> Array:
    # Inverted dropout: what remains is divided by its share, so that the mean stays.
    keep = 1 - rate
    return jnp.where(jax.random.bernoulli(key, keep, x.shape), x / keep.astype(x.dtype), 0)


def _float(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _map(adapter, params, other=lambda x: x):
    return jax.tree.map(
        lambda x: adapter(x) if is_adapter(x) else other(x), params, is_leaf=is_adapter
    )
