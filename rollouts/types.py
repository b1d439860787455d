"""What goes into a rollout and what comes out."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf.fields import documented
from rlhf.lm import EXPERTS, LM

Array = Any  # of JAX, or of NumPy on its way to the device


@documented
class Prompts(NamedTuple):
    """Token prompts, padded anywhere.

    Attributes:
      tokens: [P, L] int32.
      mask: [P, L] bool, True on real tokens.
      inputs: arrays [P, ...] that the tokens are conditioned on.
    """

    tokens: Array
    mask: Array
    inputs: dict | None = None


def check_prompts(prompts: Prompts) -> None:
    """Raises what `generate` and its kin raise of prompts; rows without tokens are found where the
    mask is of NumPy.

    Args:
      prompts: `[P, L]`, padded anywhere.

    Raises: ValueError where tokens and mask are not both `[P, L]`, or a prompt has no tokens;
    TypeError where the mask is not
      bool.

    >>> check_prompts(Prompts(np.array([[5, 6]]), np.array([[True, False]])))
    """
    tokens = prompts.tokens
    mask = prompts.mask
    if tokens.ndim != 2 or tokens.shape != mask.shape:
        raise ValueError(
            f"prompts.tokens {list(tokens.shape)} but prompts.mask {list(mask.shape)}; both [P, L]"
        )
    if mask.dtype != jnp.bool_:
        raise TypeError(f"prompts.mask must be bool, True on real tokens, but is {mask.dtype}")
    # An array on a device may be traced, or far away: only what is here is looked at.
    if isinstance(mask, np.ndarray) and not mask.any(axis=1).all():
        empty = np.flatnonzero(~mask.any(axis=1)).tolist()
        raise ValueError(
            f"prompts {empty} have no tokens; a model needs at least one to start from"
        )


def check_ids(
    lm: LM, tokens: Array, real: Array, positions: Array | None = None, *, more: int = 0
) -> None:
    """Raises where a model has no embedding for a token or a position; arrays that are traced are
    not looked at.

    What cannot be looked at, within `jit`, gives NaN in its row.

    Args:
      lm: of a module with a `config`; of others nothing is known.
      tokens: `[B, T]`.  real: `[B, T]`, where no padding is.
      positions: `[B, T]`; None: the tokens of a row are counted.
      more: tokens that follow a row's last.

    Raises: ValueError naming the row.

    >>> from rlhf.models import TransformerConfig, transformer
    >>> lm = transformer(TransformerConfig(vocab_size=8, hidden_size=4, num_layers=1, num_heads=1, mlp_size=8))
    >>> check_ids(lm, np.array([[5, 8]]), np.array([[True, True]]))
    Traceback (most recent call last):
    ValueError: row 0 has token 8, but the model's vocabulary has 8 tokens, 0 to 7; grow it with rlhf.resized(lm, params, 9)
    """
    if any(isinstance(x, jax.Array) and not is_here(x) for x in (tokens, real, positions)):
        return
    # `lm.init` is a partial whose first argument is the module, if it is one of this library.
    config = getattr(next(iter(getattr(lm.init, "args", ())), None), "config", None)
    config = getattr(config, "decoder", config)
    tokens = np.asarray(tokens)
    real = np.asarray(real).astype(bool)
    number = getattr(config, "vocab_size", None)
    if number is not None and (wrong := real & ((tokens < 0) | (tokens >= number))).any():
        row, column = np.argwhere(wrong)[0]
        token = int(tokens[row, column])
        cure = f"; grow it with rlhf.resized(lm, params, {token + 1})" if token > 0 else ""
        raise ValueError(
            f"row {row} has token {token}, but the model's vocabulary has {number} tokens, 0 to "
            f"{number - 1}{cure}"
        )
    most = getattr(config, "max_positions", None)
    # An empty array has no smallest number, hence `places.size` below.
    places = real.cumsum(1) - 1 if positions is None else np.where(real, np.asarray(positions), 0)
    if most is not None and places.size and (places.min() < -1 or places.max() + more >= most):
        row = int(np.argmax(places.max(1)))
        after = f" and {more} after it" if more else ""
        raise ValueError(
            f"row {row} goes to position {places[row].max()}{after}, but the model has {most} "
            "learned positions; shorten it"
        )


def is_here(x: Array) -> bool:
    """Whether an array's numbers can be looked at: it is not traced, and all of it is on this
    machine.
    """
    return not isinstance(x, jax.core.Tracer) and x.is_fully_addressable


@documented
class Rollout(NamedTuple):
    """Prompts, padded on the left, with their completions, padded on the right; a prompt's samples
    are contiguous.

    Attributes:
      tokens: [B, T] int32.
      mask: [B, T] bool, sampled by the policy.
      positions: [B, T] int32.
      segment_ids: [B, T] int32, 0 = padding.
      logprobs: [B, T] float32, of softmax(logits / temperature): equals token_logprobs at that
        temperature.
      sampling_logprobs: [B, T] float32, of the distribution after all filters, for importance
        correction.
      finished: [B] bool, ended by an end token (False: cut at the length limit).
      temperature: [] float32.
      inputs: arrays [B, ...] that the tokens are conditioned on; None: nothing.
    """

    tokens: Array
    mask: Array
    positions: Array
    segment_ids: Array
    logprobs: Array
    sampling_logprobs: Array
    finished: Array
    temperature: Array
    inputs: dict | None = None


@documented
class Batch(NamedTuple):
    """What an on-policy objective reads.  Fields that it does not use stay None.

    Attributes:
      tokens: [B, T] int32.
      mask: [B, T] bool, True on trained tokens.
      positions: [B, T] int32.
      segment_ids: [B, T] int32, 0 = padding.
      temperature: [] float32.
      old_logprobs: [B, T] float32, of the policy that sampled.
      ref_logprobs: [B, T] float32, of the reference.
      values: [B, T] float32, when the batch was sampled.
      advantages: [B, T] float32.
      returns: [B, T] float32, targets of the values.
      weights: [B, T] float32, of the whole optimizer mini-batch.
      importance: [B, T] float32, π/μ of sampled tokens, which multiplies their loss; None: 1.
      inputs: arrays [B, ...] that the tokens are conditioned on; None: nothing.
    """

    tokens: Array
    mask: Array
    positions: Array
    segment_ids: Array
    temperature: Any = 1.0
    old_logprobs: Array | None = None
    ref_logprobs: Array | None = None
    values: Array | None = None
    advantages: Array | None = None
    returns: Array | None = None
    weights: Array | None = None
    importance: Array | None = None
    inputs: dict | None = None


@documented
class Pairs(NamedTuple):
    """Preference pairs: R rows of the leading axis travel together, `[chosen, rejected]` along K.

    Unpacked, a row is one pair: K = 2 rows of tokens with one sequence each.  Packed, K = 1 and
    segments 1, 2, 3, 4, … of a row are chosen, rejected, chosen, rejected, …

    Attributes:
      tokens: [R, K, T] int32.
      mask: [R, K, T] bool, True on completion tokens.
      positions: [R, K, T] int32.
      segment_ids: [R, K, T] int32, 0 = padding.
      ref_logprobs: [R, N, 2] float32, sequence log-probs under the reference; N pairs a row.
      weights: [R, N] float32, of the whole optimizer mini-batch.
      inputs: arrays [R, K, ...] that the tokens are conditioned on.
    """

    tokens: Array
    mask: Array
    positions: Array
    segment_ids: Array
    ref_logprobs: Array | None = None
    weights: Array | None = None
    inputs: dict | None = None


def pair_rows(pairs: Pairs) -> Batch:
    """The token rows of pairs, `[R * K, T]`."""
    # [R, K, T] to [R * K, T]; leaves without axes have no rows to flatten.
    rows_with_pairs = token_rows(pairs)
    return jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:]) if jnp.ndim(x) else x, rows_with_pairs
    )


def token_rows(source: Any) -> Batch:
    """A `Batch` of tokens alone: those of a rollout, of another batch, or of any tuple with the
    same fields.

    >>> rows = unpacked_rows(jnp.array([[5, 6]]), jnp.ones((1, 2), bool))
    >>> token_rows(rows._replace(weights=jnp.ones((1, 2)))).weights is None
    True
    """
    return Batch(
        tokens=source.tokens,
        mask=source.mask,
        positions=source.positions,
        segment_ids=source.segment_ids,
        inputs=source.inputs,
    )


def batch_of(rollout: Rollout, **fields) -> Batch:
    """A rollout as a `Batch`, with the fields given; its log-probs become the old ones.

    Args:
      rollout: `[B, T]`, with its `inputs`.
      fields: of `Batch`, `[B, T]`, such as advantages; they replace the rollout's own.
    """
    # The log-probs of the policy that sampled are the old ones of a ratio.
    rollout_fields = dict(temperature=rollout.temperature, old_logprobs=rollout.logprobs)
    return token_rows(rollout)._replace(**{**rollout_fields, **fields})


def without_experts(batch: Batch | Rollout) -> Batch | Rollout:
    """A mixture's batch or rollout without the experts that `generate` recorded, which another
    model is not to take.

    Args:
      batch: `[B, T]`, with `inputs["experts"]` `[B, T, sparse layers, k]` or without.

    >>> one = jnp.ones((1, 2), bool)
    >>> rows = unpacked_rows(jnp.array([[5, 6]]), one)._replace(inputs={EXPERTS: jnp.zeros((1, 2, 1, 1))})
    >>> without_experts(rows).inputs is None
    True
    """
    if not batch.inputs or EXPERTS not in batch.inputs:
        return batch
    others = {name: x for name, x in batch.inputs.items() if name != EXPERTS}
    return batch._replace(inputs=others or None)


def unpacked_rows(tokens: Array, real: Array, mask: Array | None = None) -> Batch:
    """A `Batch` whose rows hold one sequence each.

    Args:
      tokens: `[B, T]` int32.
      real: `[B, T]` bool, False on padding.
      mask: `[B, T]` bool, True on trained tokens; None: every real token.

    >>> unpacked_rows(jnp.array([[5, 6, 0]]), jnp.array([[True, True, False]])).positions.tolist()
    [[0, 1, 0]]
    """
    positions = jnp.where(real, jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, 0)
    return Batch(
        tokens=tokens,
        mask=real if mask is None else mask,
        positions=positions,
        segment_ids=real.astype(jnp.int32),
    )


def joined(rollout: Rollout) -> Rollout:
    """An encoder-decoder's rollout as a decoder's: what its encoder read, then what was sampled;
    others as they are.

    For what reads prompts and completions as one text, such as the score of a generated task.

    Args:
      rollout: `[B, T]` with `inputs` `[B, S]`.

    Returns: `[B, S + T]` without inputs.

    >>> one = jnp.ones((1, 3), bool)
    >>> rows = unpacked_rows(jnp.array([[0, 8, 9]]), one, one.at[0, 0].set(False))
    >>> inputs = {"tokens": jnp.array([[5, 6, 0]]), "segment_ids": jnp.array([[1, 1, 0]])}
    >>> joined(Rollout(*rows[:4], 0.0 * one, 0.0 * one, one[:, 0], jnp.float32(1.0), inputs)).tokens.tolist()
    [[0, 5, 6, 0, 8, 9]]
    """
    if not rollout.inputs or "tokens" not in rollout.inputs:
        return rollout
    read = jnp.asarray(rollout.inputs["tokens"])
    real = jnp.asarray(rollout.inputs["segment_ids"]) != 0
    # Padding first, as a decoder's prompts have it.
    order = jnp.argsort(real, axis=1, stable=True)
    read = jnp.take_along_axis(read, order, axis=1)
    real = jnp.take_along_axis(real, order, axis=1)
    nothing = jnp.zeros(read.shape, jnp.float32)
    beside = lambda before, x: jnp.concatenate([before.astype(x.dtype), x], axis=1)
    rows = unpacked_rows(
        beside(read, jnp.where(rollout.mask, rollout.tokens, 0)),
        beside(real, rollout.mask),
        beside(nothing, rollout.mask),
    )
    return rollout._replace(
        tokens=rows.tokens,
        mask=rows.mask,
        positions=rows.positions,
        segment_ids=rows.segment_ids,
        logprobs=beside(nothing, rollout.logprobs),
        sampling_logprobs=beside(nothing, rollout.sampling_logprobs),
        inputs=None,
    )
