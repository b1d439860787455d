"""What a language model is: a tuple of pure functions, as optax does it for optimizers.

Nothing in `rlhf.losses` or `rlhf.rollouts` knows more of a model than this page.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf.fields import documented

Params = Any


@documented
class LM(NamedTuple):
    """A language model.  Two models built alike compare and hash equal, so that they share their compilations.

    Attributes:
      init: (key) -> params, plain arrays.
      axes: () -> pytree like params; a leaf is a tuple of logical axis names, or None.
      hidden: (params, tokens [B, T], *, positions, segment_ids, cache=None, inputs=None) -> ([B, T, D], cache,
        aux).
      unembed: (params, hidden [..., D]) -> logits [..., V], at least float32.
      init_cache: (batch, length) -> cache; batch on axis 0 of every leaf; a longer one begins as a shorter one.
      encode: encoder-decoders: (params, inputs) -> the encoded form of inputs.
      unstack: (params) -> params in the form that `hidden` with a cache reads fastest, again and again.
      shares: whether `hidden` takes `shared`, a `SharedPrefix`, and reads it once.
    """

    init: Callable
    axes: Callable
    hidden: Callable
    unembed: Callable
    init_cache: Callable
    encode: Callable | None = None
    unstack: Callable | None = None
    shares: bool = False


@documented
class SharedPrefix(NamedTuple):
    """Rows in groups that have their first columns in common: a prompt's samples, the two answers of a pair.

    Attributes:
      rows: of a group, one after another; 1: every row by itself.
      own: the last columns, in which they differ.

    >>> shared, x = SharedPrefix(rows=2, own=1), jnp.array([[5, 6, 7], [5, 6, 8]])
    >>> shared.once(x).tolist(), shared.whole(shared.once(x)).tolist()
    ([[5, 6, 7, 8]], [[5, 6, 7], [5, 6, 8]])
    """

    rows: int = 1
    own: int = 0

    def fitting(self, rows: int, parts: int) -> "SharedPrefix":
        """With as many rows to a group as can stay together where so many rows are cut into equal parts; at worst one.

        >>> [SharedPrefix(8, 64).fitting(32, parts).rows for parts in (1, 4, 8, 16, 32)]
        [8, 8, 4, 2, 1]
        """
        fit = [n for n in range(1, self.rows + 1) if self.rows % n == 0 and rows // n % parts == 0]
        return self._replace(rows=max(fit, default=1))

    def once(self, x: jax.Array) -> jax.Array:
        """`[B, T, ...]` -> `[B / rows, T - own + rows · own, ...]`: a group's prefix, then each row's own columns."""
        if self.rows == 1:
            return x
        x = x.reshape(-1, self.rows, *x.shape[1:])
        prefix, own = x[:, 0, : x.shape[2] - self.own], x[:, :, x.shape[2] - self.own :]
        return jnp.concatenate([prefix, own.reshape(len(x), -1, *x.shape[3:])], axis=1)

    def whole(self, x: jax.Array) -> jax.Array:
        """The inverse of `once`."""
        if self.rows == 1:
            return x
        start = x.shape[1] - self.rows * self.own
        prefix, own = jnp.repeat(x[:, :start], self.rows, axis=0), x[:, start:].reshape(-1, self.own, *x.shape[2:])
        return jnp.concatenate([prefix, own], axis=1)


ALONE = SharedPrefix()  # nothing is shared


@documented
class Head(NamedTuple):
    """A value head, a reward head: numbers from hidden states.

    Attributes:
      init: (key) -> params.
      axes: () -> pytree like params.
      apply: (params, hidden [..., D]) -> [...], or [..., K] for K labels.
      reads: the token by which a text is judged: "last", "first" (encoders), or "every" one by itself.
    """

    init: Callable
    axes: Callable
    apply: Callable
    reads: str = "last"


@dataclasses.dataclass(frozen=True)
class Bound:
    """`functools.partial` that compares and hashes by what it binds.

    >>> Bound(max, (1,)) == Bound(max, (1,)), Bound(max, (1,))(2)
    (True, 2)
    """

    fn: Callable
    args: tuple

    def __call__(self, *args, **kwargs):
        return self.fn(*self.args, *args, **kwargs)


def geometric_mixture(lm: LM, *, mixture_coef: float = 0.5) -> LM:
    """`log p = (1 - c) log π + c log π_ref + const`: two models of one kind as one, to sample from (Nash-MD, arXiv:2312.00886).

    Args:
      lm: what both are; no encoder-decoder.
      mixture_coef: c in [0, 1], the reference's share.

    Returns: an `LM` whose params are a pair `(policy, reference)`; its hidden states are both models' side by side.

    Raises: ValueError where c is outside [0, 1], or the model has an encoder.

    >>> from rlhf.models import TransformerConfig, transformer
    >>> lm = transformer(TransformerConfig(vocab_size=8, hidden_size=4, num_layers=1, num_heads=1, mlp_size=8))
    >>> geometric_mixture(lm).hidden == geometric_mixture(lm).hidden  # two that are alike share their compilations
    True
    """
    if not 0 <= mixture_coef <= 1:
        raise ValueError(f"mixture_coef is the reference's share, 0 <= c <= 1, but is {mixture_coef}")
    if lm.encode is not None:
        raise ValueError("a mixture of encoder-decoders is not supported: each would need its own encoding of the inputs")
    return LM(
        init=Bound(_mixed_init, (lm,)),
        axes=Bound(_mixed_axes, (lm,)),
        hidden=Bound(_mixed_hidden, (lm,)),
        unembed=Bound(_mixed_unembed, (lm, mixture_coef)),
        init_cache=Bound(_mixed_init_cache, (lm,)),
        unstack=Bound(_mixed_unstack, (lm,)) if lm.unstack else None,
        shares=lm.shares,
    )


def _mixed_init(lm, key):
    return tuple(map(lm.init, jax.random.split(key)))


def _mixed_axes(lm):
    return lm.axes(), lm.axes()


def _mixed_hidden(lm, params, tokens, *, cache=None, **where):
    pairs = zip(params, cache or (None, None), strict=True)
    hidden, caches, _ = zip(*(lm.hidden(p, tokens, cache=c, **where) for p, c in pairs), strict=True)
    return jnp.concatenate(hidden, axis=-1), caches, {}


def _mixed_unembed(lm, coef, params, hidden):
    parts = zip(params, jnp.split(hidden, 2, axis=-1), strict=True)
    policy, reference = (jax.nn.log_softmax(lm.unembed(p, h)) for p, h in parts)
    return (1 - coef) * policy + coef * reference


def _mixed_init_cache(lm, batch, length):
    return lm.init_cache(batch, length), lm.init_cache(batch, length)


def _mixed_unstack(lm, params):
    return tuple(map(lm.unstack, params))


def from_linen(module) -> LM:
    """An `LM` from a Flax Linen module with methods `hidden`, `unembed`, `init_cache`, and `encode` if it has one, as in `LM`
    but without `params`; `unstack(params)` and `shares` if it has them.

    `hidden` must create every parameter.  Parameters boxed by `nn.with_partitioning` give `axes`; others get None.

    Raises: TypeError where a method is missing.

    >>> from rlhf.models import Transformer, TransformerConfig
    >>> lm = from_linen(Transformer(TransformerConfig(vocab_size=8, hidden_size=4, num_layers=1, num_heads=1, mlp_size=8)))
    >>> sorted(lm.init(jax.random.key(0)))
    ['embedding', 'final_norm', 'layers', 'unembedding']
    """
    _check_methods(module, type(module).__name__)
    return LM(
        init=Bound(_linen_init, (module,)),
        axes=Bound(_linen_axes, (module,)),
        hidden=Bound(_linen_apply, (module, "hidden")),
        unembed=Bound(_linen_apply, (module, "unembed")),
        init_cache=Bound(_init_cache, (module,)),
        encode=Bound(_linen_apply, (module, "encode")) if hasattr(module, "encode") else None,
        unstack=Bound(_unstack, (module,)) if hasattr(module, "unstack") else None,
        shares=getattr(module, "shares", False),
    )


def _linen_boxed(module, key):
    one = jnp.ones((1, 1), jnp.int32)
    variables = module.init(key, one, positions=one - 1, segment_ids=one, method="hidden")
    if set(variables) - {"params"}:
        raise TypeError(f"{type(module).__name__} keeps state in {sorted(variables)}; an LM has 'params' alone")
    return variables["params"]


@partial(jax.jit, static_argnums=0)  # one program instead of hundreds of small ones
def _linen_init(module, key):
    from flax.core import meta

    return meta.unbox(_linen_boxed(module, key))


def _linen_axes(module):
    from flax.core import meta

    boxed = jax.eval_shape(Bound(_linen_boxed, (module,)), jax.random.key(0))
    names = lambda x: x.names if isinstance(x, meta.Partitioned) else None
    return jax.tree.map(names, boxed, is_leaf=lambda x: isinstance(x, meta.Partitioned))


def _linen_apply(module, method, params, *args, **kwargs):
    return module.apply({"params": params}, *args, **kwargs, method=method)


def _init_cache(module, batch, length):
    return module.init_cache(batch, length)


def _unstack(module, params):
    return module.unstack(params)


def from_nnx(make: Callable) -> LM:
    """An `LM` from a function that makes a Flax NNX module: `make(rngs) -> module` with `hidden`, `unembed`, `init_cache`.

    The module is split once, into its graph and its parameters; every call merges them inside the pure function.

    Raises: TypeError where a method is missing, or the module holds state other than `nnx.Param` (batch statistics,
      dropout keys): an LM is a function of its parameters.
    """
    from flax import nnx

    module = nnx.eval_shape(Bound(_nnx_make, (make, 0)))
    _check_methods(module, type(module).__name__)
    parts: Any = nnx.split(module, nnx.Param, ...)
    graph, _, rest = parts
    if jax.tree.leaves(rest):
        raise TypeError(f"{type(module).__name__} holds state beside nnx.Param: {list(nnx.to_pure_dict(rest))}; an LM has none")
    return LM(
        init=Bound(_nnx_init, (make,)),
        axes=Bound(_nnx_axes, (make,)),
        hidden=Bound(_nnx_call, (graph, "hidden")),
        unembed=Bound(_nnx_call, (graph, "unembed")),
        init_cache=Bound(_nnx_init_cache, (make,)),
    )


def _nnx_make(make, seed):
    from flax import nnx

    with nnx.use_eager_sharding(False):  # axes are names here; arrays are placed by rlhf.sharding
        return make(nnx.Rngs(seed))


@partial(jax.jit, static_argnums=0)
def _nnx_init(make, key):
    from flax import nnx

    return nnx.to_pure_dict(nnx.state(_nnx_make(make, key), nnx.Param))


def _nnx_axes(make):
    from flax import nnx

    state = nnx.state(nnx.eval_shape(Bound(_nnx_make, (make, 0))), nnx.Param)
    return jax.tree.map(lambda spec: tuple(spec) or None, nnx.to_pure_dict(nnx.get_partition_spec(state)))


def _nnx_call(graph, method, params, *args, **kwargs):
    from flax import nnx

    return getattr(nnx.merge(graph, params), method)(*args, **kwargs)


def _nnx_init_cache(make, batch, length):
    from flax import nnx

    return nnx.eval_shape(Bound(_nnx_make, (make, 0))).init_cache(batch, length)


def _check_methods(module, name) -> None:
    missing = [m for m in ("hidden", "unembed", "init_cache") if not callable(getattr(module, m, None))]
    if missing:
        raise TypeError(f"{name} has no {', '.join(missing)}; a module that becomes an LM has hidden, unembed and init_cache")
