"""Two language models as one, to sample from."""

import jax
import jax.numpy as jnp

from rlhf.bound import Bound
from rlhf.lm import LM


def geometric_mixture(lm: LM, *, mixture_coef: float = 0.5) -> LM:
    """`log p = (1 - c) log π + c log π_ref + const`: two models of one kind as one, to sample from
    (Nash-MD, arXiv:2312.00886).

    Args:
      lm: what both are; no encoder-decoder.
      mixture_coef: c in [0, 1], the reference's share.

    Returns: an `LM` whose params are a pair `(policy, reference)`; its hidden states are both
    models' side by side.

    Raises: ValueError where c is outside [0, 1], or the model has an encoder.

    >>> from rlhf.models import TransformerConfig, transformer
    >>> lm = transformer(TransformerConfig(vocab_size=8, hidden_size=4, num_layers=1, num_heads=1, mlp_size=8))
    >>> geometric_mixture(lm).hidden == geometric_mixture(lm).hidden  # two that are alike share their compilations
    True
    """
    if not 0 <= mixture_coef <= 1:
        raise ValueError(
            f"mixture_coef is the reference's share, 0 <= c <= 1, but is {mixture_coef}"
        )
    if lm.encode is not None:
        raise ValueError(
            "a mixture of encoder-decoders is not supported: each would need its own encoding of "
            "the inputs"
        )
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
    # Each model has its own cache; without one both are None.
    pairs = zip(params, cache or (None, None), strict=True)
    hidden, caches, _ = zip(
        *(lm.hidden(p, tokens, cache=c, **where) for p, c in pairs), strict=True
    )
    # Side by side: an LM returns one array of hidden states, which `_mixed_unembed` splits again.
    return jnp.concatenate(hidden, axis=-1), caches, {}


def _mixed_unembed(lm, coef, params, hidden):
    parts = zip(params, jnp.split(hidden, 2, axis=-1), strict=True)
    # Normalised first: logits of the two models have different constants, which must not be mixed.
    # The sum need not be normalised again, since sampling does it.
    policy, reference = (jax.nn.log_softmax(lm.unembed(p, h)) for p, h in parts)
    return (1 - coef) * policy + coef * reference


def _mixed_init_cache(lm, batch, length):
    return lm.init_cache(batch, length), lm.init_cache(batch, length)


def _mixed_unstack(lm, params):
    return tuple(map(lm.unstack, params))
