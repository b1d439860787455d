"""A frozen trunk and a trained top: what is below is held once, for the policy and its reference
alike  (trlX's hydra).
"""

from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf.fields import documented
from rlhf.lm import LM, Params
from rlhf.models.config import TransformerConfig
from rlhf.models.huggingface_config import config_of
from rlhf.models.layers import rank


@documented
class Parted(NamedTuple):
    """Stands where a stack of layers stood; the layers of the top follow those of the bottom.

    Attributes:
      bottom: [layers below, ...].
      top: [layers above, ...].
    """

    bottom: Any
    top: Any


def part(lm: LM, params: Params, *, top: int) -> tuple[Params, Params]:
    """`(trained, frozen)`: the last `top` layers, the final norm and the output matrix; the
    embedding and the layers below.

    Args:
      lm, params: a decoder of `transformer` or `load`.
      top: layers that are trained; at least 1, and not all.

    Returns: two pytrees for `join`.  `trained` is what the optimizer updates; `frozen` goes into
    the train state's context, and a reference model is `join(reference(trained), frozen)`.  A tied
    embedding stays frozen.

    Raises: ValueError where `top` is out of range, TypeError for an encoder-decoder.

    >>> from rlhf.models import transformer
    >>> lm = transformer(TransformerConfig(vocab_size=8, hidden_size=4, num_layers=3, num_heads=1, mlp_size=8))
    >>> trained, frozen = part(lm, lm.init(jax.random.key(0)), top=1)
    >>> sorted(trained), sorted(frozen), trained["layers"]["q"].shape, frozen["layers"]["q"].shape
    (['final_norm', 'layers', 'unembedding'], ['embedding', 'layers'], (1, 4, 4), (2, 4, 4))
    """
    config = config_of(lm)
    if not isinstance(config, TransformerConfig):
        raise TypeError("an encoder-decoder cannot be parted; a decoder can")
    if not 0 < top < config.num_layers:
        raise ValueError(
            f"top must be from 1 to {config.num_layers - 1}, of {config.num_layers} layers, but is "
            f"{top}"
        )
    halves: tuple[Params, Params] = ({}, {})
    for name, leaf in params["layers"].items():
        # Leaves of experts or MLPs are stacked over fewer layers, so each leaf has its own border.
        below = rank(config, name, config.num_layers - top)
        halves[0][name] = jax.tree.map(itemgetter(slice(below, None)), leaf)
        halves[1][name] = jax.tree.map(itemgetter(slice(below)), leaf)
    above = {
        name: leaf
        for name, leaf in params.items()
        if name.startswith(("final_norm", "unembedding", "project_out"))
    }
    rest = {name: leaf for name, leaf in params.items() if name not in above and name != "layers"}
    return {**above, "layers": halves[0]}, {**rest, "layers": halves[1]}


def join(trained: Params, frozen: Params) -> Params:
    """The parameters that the model takes; no array is copied.

    >>> import numpy as np
    >>> params = join({"layers": {"q": np.ones((1, 2))}}, {"layers": {"q": np.zeros((2, 2))}, "embedding": np.ones(3)})
    >>> params["layers"]["q"].top.shape
    (1, 2)
    """
    # A pair in place of the stack rather than one array: joining them would copy the model at every
    # step, and the scan over layers takes the two one after the other.
    layers = {
        name: Parted(bottom, trained["layers"][name]) for name, bottom in frozen["layers"].items()
    }
    return {**frozen, **trained, "layers": layers}


def merged(params: Params) -> Params:
    """Plain stacks again: for saving."""

    def concatenated(leaf):
        return jax.tree.map(lambda *p: jnp.concatenate(p), leaf.bottom, leaf.top)

    return {
        **params,
        "layers": {name: concatenated(leaf) for name, leaf in params["layers"].items()},
    }
