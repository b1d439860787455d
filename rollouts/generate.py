"""Sampling completions: prefill once a prompt, then one compiled loop over new tokens."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf.lm import LM, Params
from rlhf.rollouts import samplers
from rlhf.rollouts.types import Array, Prompts, Rollout


class _Decoding(NamedTuple):
    column: Array  # [] int32, the next column to write
    tokens: Array  # [B, T] int32
    segment_ids: Array  # [B, T] int32
    logprobs: Array  # [B, T] float32
    sampling_logprobs: Array  # [B, T] float32
    last: Array  # [B] int32, the token written last
    done: Array  # [B] bool, the row has ended
    cache: Any


def generate(
    lm: LM,
    params: Params,
    prompts: Prompts,
    key: Array,
    *,
    max_new_tokens: int,
    num_samples: int = 1,
    sampler: samplers.Sampler = samplers.Sampler(),
    eos_ids: tuple[int, ...] = (),
    pad_id: int = 0,
    early_end: bool = True,
) -> Rollout:
    """Samples `num_samples` completions of every prompt, in one jitted program.

    A prompt is read once; its keys and values serve all its samples.  A row's random numbers depend on its own key and
    position alone.  `key` is consumed.

    Args:
      lm, params: the policy.
      prompts: `[P, L]`, padded anywhere; they are shifted to end in column L.
      max_new_tokens: the most tokens sampled a row; the end token counts.
      sampler: from `samplers.sampler` or `samplers.greedy`.
      eos_ids: tokens that end a row; the end token itself is kept and trained on.
      pad_id: what stands in `tokens` after the end.
      early_end: stop when all rows have ended.  False: a loop of fixed length, for runs that are vmapped.

    Returns: a `Rollout` of `B = P * num_samples` rows and `T = L + max_new_tokens` columns; row `p * num_samples + g` is sample
    g of prompt p.  No gradient flows.

    Raises: ValueError on wrong shapes or counts, TypeError on a mask that is not bool.
    """
    if max_new_tokens < 1 or num_samples < 1:
        raise ValueError(f"max_new_tokens and num_samples must be at least 1, but are {max_new_tokens} and {num_samples}")
    if prompts.tokens.ndim != 2 or prompts.tokens.shape != prompts.mask.shape:
        raise ValueError(
            f"prompts.tokens {list(prompts.tokens.shape)} but prompts.mask {list(prompts.mask.shape)}; both [P, L]"
        )
    if prompts.mask.dtype != jnp.bool_:
        raise TypeError(f"prompts.mask must be bool, True on real tokens, but is {prompts.mask.dtype}")
    if isinstance(eos_ids, int):
        raise TypeError(f"eos_ids must be a tuple of tokens, but is {eos_ids}; write ({eos_ids},)")
    return _generate(lm, max_new_tokens, num_samples, tuple(eos_ids), pad_id, early_end, params, prompts, key, sampler)


@partial(jax.jit, static_argnums=range(6))
def _generate(lm, max_new_tokens, num_samples, eos_ids, pad_id, early_end, params, prompts, key, sampler):
    tokens, segment_ids, positions = _align_right(prompts)
    batch, start = prompts.tokens.shape[0] * num_samples, prompts.tokens.shape[1]
    length = start + max_new_tokens
    per_sample = lambda tree: jax.tree.map(lambda x: jnp.repeat(x, num_samples, axis=0), tree)
    inputs = prompts.inputs if lm.encode is None else lm.encode(params, prompts.inputs)  # once, not at every token

    cache = lm.init_cache(prompts.tokens.shape[0], length)
    hidden, cache, _ = lm.hidden(params, tokens, positions=positions, segment_ids=segment_ids, cache=cache, inputs=inputs)
    hidden, cache, tokens, segment_ids, positions, inputs = per_sample(
        (hidden[:, -1], cache, tokens, segment_ids, positions, inputs)
    )
    keys = jax.random.split(key, batch)
    first_new = positions[:, -1] + 1  # [B], the position of the first sampled token

    def emit(state: _Decoding, hidden: Array) -> _Decoding:
        """Samples one token a row from the last hidden state, and writes it."""
        tempered, filtered = samplers.apply(sampler, lm.unembed(params, hidden))
        row_keys = jax.vmap(jax.random.fold_in)(keys, first_new + state.column - start)
        sampled = samplers.draw(row_keys, filtered)
        alive = ~state.done
        token = jnp.where(alive, sampled, pad_id)
        of_token = lambda x: jnp.take_along_axis(jax.nn.log_softmax(x, axis=-1), sampled[:, None], axis=-1)[:, 0]
        write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new[:, None].astype(old.dtype), state.column, 1)
        return _Decoding(
            column=state.column + 1,
            tokens=write(state.tokens, token),
            segment_ids=write(state.segment_ids, alive),
            logprobs=write(state.logprobs, jnp.where(alive, of_token(tempered), 0.0)),
            sampling_logprobs=write(state.sampling_logprobs, jnp.where(alive, of_token(filtered), 0.0)),
            last=token,
            done=state.done | _is_in(token, eos_ids),
            cache=state.cache,
        )

    def decode(state: _Decoding) -> _Decoding:
        """Reads the last token, then samples the next."""
        hidden, cache, _ = lm.hidden(
            params,
            state.last[:, None],
            positions=(first_new + state.column - start - 1)[:, None],
            segment_ids=(~state.done).astype(jnp.int32)[:, None],
            cache=state.cache,
            inputs=inputs,
        )
        return emit(state._replace(cache=cache), hidden[:, 0])

    extend = lambda x, value: jnp.pad(x, ((0, 0), (0, max_new_tokens)), constant_values=value)
    zeros = jnp.zeros((batch, length), jnp.float32)
    state = _Decoding(
        column=jnp.int32(start),
        tokens=extend(tokens, pad_id),
        segment_ids=extend(segment_ids, 0),
        logprobs=zeros,
        sampling_logprobs=zeros,
        last=tokens[:, -1],
        done=jnp.zeros(batch, bool),
        cache=cache,
    )
    state = emit(state, hidden)
    if early_end:
        state = jax.lax.while_loop(lambda s: (s.column < length) & ~s.done.all(), decode, state)
    else:
        state = jax.lax.fori_loop(start + 1, length, lambda _, s: decode(s), state)

    sampled = (state.segment_ids != 0) & (jnp.arange(length)[None, :] >= start)
    new_positions = jnp.where(sampled[:, start:], first_new[:, None] + jnp.arange(max_new_tokens)[None, :], 0)
    return Rollout(
        tokens=state.tokens,
        mask=sampled,
        positions=jnp.concatenate([positions, new_positions], axis=1),
        segment_ids=state.segment_ids,
        logprobs=state.logprobs,
        sampling_logprobs=state.sampling_logprobs,
        finished=state.done,
        temperature=jnp.asarray(sampler.temperature, jnp.float32),
        inputs=per_sample(prompts.inputs),
    )


def _align_right(prompts: Prompts) -> tuple[Array, Array, Array]:
    """Tokens shifted so that every prompt ends in the last column; their segment ids and positions."""
    order = jnp.argsort(prompts.mask, axis=1, stable=True)  # padding first, tokens in their order
    mask = jnp.take_along_axis(prompts.mask, order, axis=1)
    tokens = jnp.take_along_axis(prompts.tokens, order, axis=1)
    return tokens, mask.astype(jnp.int32), jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)


def _is_in(token, ids):
    return jnp.zeros(token.shape, bool) if not ids else (token[:, None] == jnp.asarray(ids)[None, :]).any(-1)
