"""Embeddings for tokens that were added to a tokenizer after its model was made."""

import jax
import jax.numpy as jnp

from rlhf.lm import LM, Params
from rlhf.models.huggingface_config import config_of, decoder_of, lm_of, with_vocabulary

# All that has an axis of tokens; a tied model has the first alone.
AXES = {"embedding": 0, "unembedding": 1, "unembedding_bias": 0}  # leaf -> its axis of tokens


def resized(lm: LM, params: Params, size: int) -> tuple[LM, Params]:
    """The model with embeddings for `size` tokens: each new one starts as the mean of those there
    are, in and out.

    So does transformers' `resize_token_embeddings`, up to noise of 3e-5 of their spread.
    `rlhf.save(…, like=…)` writes the grown model.

    Args:
      lm, params: of `transformer`, `encoder_decoder` or `load`; plain arrays.
      size: tokens, usually `len(tokenizer)`.

    Returns: `(lm, params)`; the same where there are as many tokens already, or more: an embedding
    is often padded.

    Raises: TypeError for a model that has no config.

    >>> from rlhf.models import TransformerConfig, transformer
    >>> lm = transformer(TransformerConfig(vocab_size=8, hidden_size=4, num_layers=1, num_heads=1, mlp_size=8))
    >>> lm, params = resized(lm, lm.init(jax.random.key(0)), 10)
    >>> params["embedding"].shape, params["unembedding"].shape
    ((10, 4), (4, 10))
    """
    config = config_of(lm)
    more = size - decoder_of(config).vocab_size
    if more <= 0:
        return lm, params
    grown = {
        name: _grown(params[name], axis, more) for name, axis in AXES.items() if name in params
    }
    return lm_of(with_vocabulary(config, size)), {**params, **grown}


def _grown(x: jax.Array, axis: int, more: int) -> jax.Array:
    # The mean: a random row could get a high logit at once, and change every distribution.
    mean = jnp.mean(
        x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis=axis, keepdims=True
    ).astype(x.dtype)
    return jnp.concatenate([x, jnp.repeat(mean, more, axis=axis)], axis=axis)
