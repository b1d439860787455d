"""Flax modules, Linen and NNX, as language models."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rlhf.bound import Bound
from rlhf.lm import LM


def from_linen(module) -> LM:
    """An `LM` from a Flax Linen module with methods `hidden`, `unembed`, `init_cache`, and `encode`
    if it has one, as in `LM` but without `params`; `unstack(params)` and `shares` if it has them.

    `hidden` must create every parameter.  Parameters boxed by `nn.with_partitioning` give `axes`;
    others get None.

    Raises: TypeError where a method is missing.

    >>> from rlhf.models import Transformer, TransformerConfig
    >>> lm = from_linen(Transformer(TransformerConfig(vocab_size=8, hidden_size=4, num_layers=1, num_heads=1, mlp_size=8)))
    >>> sorted(lm.init(jax.random.key(0)))
    ['embedding', 'final_norm', 'layers', 'unembedding']
    """
    _check_methods(module, type(module).__name__)
    return LM(
        # `Bound` rather than `partial`: two LMs of equal modules compare equal, and share
        # compilations.
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
    # One token is enough: parameters do not depend on the batch's size.
    one = jnp.ones((1, 1), jnp.int32)
    with no_mesh():
        variables = module.init(key, one, positions=one - 1, segment_ids=one, method="hidden")
    # Batch statistics and the like would have to be carried from step to step; an LM is pure.
    if set(variables) - {"params"}:
        raise TypeError(
            f"{type(module).__name__} keeps state in {sorted(variables)}; an LM has 'params' alone"
        )
    return variables["params"]


# One program instead of hundreds of small ones, each of which would be compiled.
@partial(jax.jit, static_argnums=0)
def _linen_init(module, key):
    from flax.core import meta

    boxed = _linen_boxed(module, key)
    with no_mesh():
        return meta.unbox(boxed)


def no_mesh():
    """On the mesh that is set Flax would look for logical names; where arrays go is
    `rlhf.sharding`'s to say.
    """
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def _linen_axes(module):
    from flax.core import meta

    # Shapes only: names are wanted, and no array is made.
    boxed = jax.eval_shape(Bound(_linen_boxed, (module,)), jax.random.key(0))

    def names(x):
        return x.names if isinstance(x, meta.Partitioned) else None

    return jax.tree.map(names, boxed, is_leaf=lambda x: isinstance(x, meta.Partitioned))


def _linen_apply(module, method, params, *args, **kwargs):
    return module.apply({"params": params}, *args, **kwargs, method=method)


def _init_cache(module, batch, length):
    return module.init_cache(batch, length)


def _unstack(module, params):
    return module.unstack(params)


def from_nnx(make: Callable) -> LM:
    """An `LM` from a function that makes a Flax NNX module: `make(rngs) -> module` with `hidden`,
    `unembed`, `init_cache`.

    The module is split once, into its graph and its parameters; every call merges them inside the
    pure function.

    Raises: TypeError where a method is missing, or the module holds state other than `nnx.Param`
    (batch statistics,
      dropout keys): an LM is a function of its parameters.
    """
    from flax import nnx

    module = nnx.eval_shape(Bound(_nnx_make, (make, 0)))
    _check_methods(module, type(module).__name__)
    parts: Any = nnx.split(module, nnx.Param, ...)
    graph, _, rest = parts
    if jax.tree.leaves(rest):
        raise TypeError(
            f"{type(module).__name__} holds state beside nnx.Param: "
            f"{list(nnx.to_pure_dict(rest))}; an LM has none"
        )
    return LM(
        init=Bound(_nnx_init, (make,)),
        axes=Bound(_nnx_axes, (make,)),
        hidden=Bound(_nnx_call, (graph, "hidden")),
        unembed=Bound(_nnx_call, (graph, "unembed")),
        init_cache=Bound(_nnx_init_cache, (make,)),
    )


def _nnx_make(make, seed):
    from flax import nnx

    # Axes are names here; arrays are placed by rlhf.sharding.
    with nnx.use_eager_sharding(False):
        return make(nnx.Rngs(seed))


@partial(jax.jit, static_argnums=0)
def _nnx_init(make, key):
    from flax import nnx

    return nnx.to_pure_dict(nnx.state(_nnx_make(make, key), nnx.Param))


def _nnx_axes(make):
    from flax import nnx

    state = nnx.state(nnx.eval_shape(Bound(_nnx_make, (make, 0))), nnx.Param)
    return jax.tree.map(
        lambda spec: tuple(spec) or None, nnx.to_pure_dict(nnx.get_partition_spec(state))
    )


def _nnx_call(graph, method, params, *args, **kwargs):
    from flax import nnx

    # Merged inside the traced function: the module lives as long as the call, so that nothing can
    # be kept in it.
    return getattr(nnx.merge(graph, params), method)(*args, **kwargs)


def _nnx_init_cache(make, batch, length):
    from flax import nnx

    # A module without arrays: a cache needs sizes alone.
    return nnx.eval_shape(Bound(_nnx_make, (make, 0))).init_cache(batch, length)


def _check_methods(module, name) -> None:
    missing = [
        m for m in ("hidden", "unembed", "init_cache") if not callable(getattr(module, m, None))
    ]
    if missing:
        raise TypeError(
            f"{name} has no {', '.join(missing)}; a module that becomes an LM has hidden, unembed "
            "and init_cache"
        )
