"""Sampling completions: prompts are read once, then one compiled loop runs over new tokens.

`generate` gives every completion a row of its own; `generate_many` runs any number of them through a fixed number of rows, each
of which takes the next prompt once its completion has ended.  Row, prompt and key decide what is sampled, and nothing else.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf.lm import LM, Params
from rlhf.rollouts import samplers
from rlhf.rollouts.types import Array, Prompts, Rollout


class _Settings(NamedTuple):
    """What a compiled program depends on."""

    max_new_tokens: int
    num_samples: int
    eos_ids: tuple[int, ...]
    pad_id: int


class _Rows(NamedTuple):
    """Completions in the making; their prompts stand in the first L columns of T = L + max_new_tokens."""

    tokens: Array  # [B, T] int32
    segment_ids: Array  # [B, T] int32
    logprobs: Array  # [B, N] float32, of new tokens, of softmax(logits / temperature)
    sampling_logprobs: Array  # [B, N] float32
    chances: Array  # [B, N] float32 in [0, 1), what decides each new token
    first: Array  # [B] int32, position of the first new token: the prompt's length
    new: Array  # [B] int32, new tokens so far
    last: Array  # [B] int32, the token sampled last
    stop: Array  # [B] int32, state of the stop strings' automaton
    finished: Array  # [B] bool, ended by an end token or a stop string
    cache: Any
    inputs: Any


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
    stop: Array | None = None,
    prefix: Array | None = None,
    pad_id: int = 0,
    early_end: bool = True,
) -> Rollout:
    """Samples `num_samples` completions of every prompt, in one jitted program.

    A prompt is read once; its keys and values serve all its samples.  A row's random numbers depend on its own key and
    position alone.  `key` is consumed.

    Args:
      lm, params: the policy.
      prompts: `[P, L]`, padded anywhere; they are shifted to end in column L.
      key: one key, or `[P]` keys, one a prompt, which then samples the same in whatever company.
      max_new_tokens: the most tokens sampled a row; the end token counts.
      sampler: from `samplers.sampler` or `samplers.greedy`.
      eos_ids: tokens that end a row; the end token itself is kept and trained on.
      stop: of `stop_strings`, texts that end a row; None: none.
      prefix: `[S]` int32 tokens before every prompt, read once for all: a common system prompt.
      pad_id: what stands in `tokens` after the end.
      early_end: stop when all rows have ended.  False: a loop of fixed length, for runs that are vmapped.

    Returns: a `Rollout` of `B = P * num_samples` rows and `T = S + L + max_new_tokens` columns; row `p * num_samples + g` is
    sample g of prompt p.  No gradient flows.

    Raises: ValueError on wrong shapes or counts, TypeError on a mask that is not bool.
    """
    settings = _checked(lm, prompts, key, max_new_tokens, num_samples, eos_ids, prefix, pad_id)
    return _generate(lm, settings, early_end, params, prompts, key, sampler, stop, prefix)


def generate_many(
    lm: LM,
    params: Params,
    prompts: Prompts,
    key: Array,
    *,
    slots: int,
    max_new_tokens: int,
    num_samples: int = 1,
    sampler: samplers.Sampler = samplers.Sampler(),
    eos_ids: tuple[int, ...] = (),
    stop: Array | None = None,
    prefix: Array | None = None,
    pad_id: int = 0,
    refill: int | None = None,
) -> Rollout:
    """As `generate`, with continuous batching: `slots` rows decode at a time, and rows that have ended take the next prompts.

    It gives what `generate` gives with the same key, whatever the number of slots (log-probs to rounding), and pays where the
    lengths of completions differ.

    Args:
      slots: rows that decode at a time; at least `num_samples`, since a prompt's samples start together.
      refill: prompts that are read together, once so many rows are free; None: an eighth of the slots.
      Others as `generate`.

    Returns: as `generate`.

    Raises: as `generate`; ValueError where the slots are fewer than the samples of the prompts that are read together.
    """
    settings = _checked(lm, prompts, key, max_new_tokens, num_samples, eos_ids, prefix, pad_id)
    refill = max(1, slots // (8 * num_samples)) if refill is None else refill
    if refill < 1 or slots < refill * num_samples:
        raise ValueError(
            f"{slots} slots but {refill} prompts of {num_samples} samples are read together; give at least "
            f"{max(refill, 1) * num_samples} slots"
        )
    return _generate_many(lm, settings, slots, refill, params, prompts, key, sampler, stop, prefix)


@partial(jax.jit, static_argnums=range(3))
def _generate(lm, settings, early_end, params, prompts, key, sampler, stop, prefix):
    read, emit, decode = _decoder(lm, settings, params, sampler, stop, prefix, prompts.tokens.shape[1])
    rows = emit(*read(prompts, _row_keys(key, prompts, settings)))
    if early_end:
        rows = jax.lax.while_loop(lambda rows: _alive(rows, settings).any(), decode, rows)
    else:
        rows = jax.lax.fori_loop(1, settings.max_new_tokens, lambda _, rows: decode(rows), rows)
    return _rollout(rows, prompts, prefix, settings, sampler)


@partial(jax.jit, static_argnums=range(4))
def _generate_many(lm, settings, slots, refill, params, prompts, key, sampler, stop, prefix):
    """An outer loop that reads prompts, and an inner one that decodes until there is room for the next ones."""
    number, samples, together = prompts.tokens.shape[0], settings.num_samples, refill * settings.num_samples
    total = number * samples
    read, emit, decode = _decoder(lm, settings, params, sampler, stop, prefix, prompts.tokens.shape[1])
    keys = _row_keys(key, prompts, settings)

    def start(next_prompt):
        """The next prompts' rows with their first tokens; rows beyond the last prompt are over before they begin."""
        of_prompts, of_rows = next_prompt + jnp.arange(refill), next_prompt * samples + jnp.arange(together)
        some = jax.tree.map(lambda x: jnp.take(x, of_prompts, axis=0, mode="clip"), prompts)
        rows = emit(*read(some, jnp.take(keys, of_rows, mode="clip")))
        beyond = of_rows >= total
        return rows._replace(finished=rows.finished | beyond), jnp.where(beyond, total, of_rows)

    def fill(state):
        rows, of_row, done, next_prompt = state
        done = _flush(done, rows, of_row)
        new, of_new = start(next_prompt)
        free = jnp.argsort(_alive(rows, settings), stable=True)[:together]
        rows, of_row = jax.tree.map(lambda old, new: old.at[free].set(new), (rows, of_row), (new, of_new))

        def room(state):
            alive = _alive(state, settings)
            waiting = (next_prompt + refill < number) & (slots - alive.sum() >= together)
            return alive.any() & ~waiting

        return jax.lax.while_loop(room, decode, rows), of_row, done, next_prompt + refill

    shapes, _ = jax.eval_shape(start, jnp.int32(0))
    empty = lambda rows: lambda x: jnp.broadcast_to(jnp.zeros((), x.dtype), (rows, *x.shape[1:]))
    rows = jax.tree.map(empty(slots), shapes)._replace(finished=jnp.ones(slots, bool))
    done = jax.tree.map(empty(total), shapes._replace(cache=None, inputs=None))
    state = rows, jnp.full(slots, total, jnp.int32), done, jnp.int32(0)
    rows, of_row, done, _ = jax.lax.while_loop(lambda state: state[-1] < number, fill, state)
    return _rollout(_flush(done, rows, of_row), prompts, prefix, settings, sampler)


def _flush(done: _Rows, rows: _Rows, of_row: Array) -> _Rows:
    """Slots copied to the rows of the result that they hold; those that hold none are dropped."""
    rows = rows._replace(cache=None, inputs=None)
    return jax.tree.map(lambda all_rows, some: all_rows.at[of_row].set(some, mode="drop"), done, rows)


def _decoder(lm, settings, params, sampler, stop, prefix, length) -> tuple[Callable, Callable, Callable]:
    """`(read, emit, decode)`: prompts to rows, a token from hidden states, the next token of rows."""
    ahead = 0 if prefix is None else prefix.shape[0]
    width = length + settings.max_new_tokens
    encode, params = partial(lm.encode, params) if lm.encode else None, lm.unstack(params) if lm.unstack else params
    if prefix is not None:
        ones = jnp.ones((1, ahead), jnp.int32)
        where = dict(positions=jnp.arange(ahead, dtype=jnp.int32)[None], segment_ids=ones)
        _, common, _ = lm.hidden(params, prefix[None], **where, cache=lm.init_cache(1, ahead + width))

    def read(prompts: Prompts, keys: Array) -> tuple[_Rows, Array]:
        """The rows of prompts, and the hidden states of their last tokens."""
        samples, number = settings.num_samples, prompts.tokens.shape[0]
        tokens, segment_ids, positions = _align_right(prompts)
        inputs = encode(prompts.inputs) if encode else prompts.inputs  # once, not at every token
        cache = lm.init_cache(number, width) if prefix is None else _repeat(common, number)
        where = dict(positions=positions + ahead, segment_ids=segment_ids)
        hidden, cache, _ = lm.hidden(params, tokens, **where, cache=cache, inputs=inputs)
        first = positions[:, -1] + 1 + ahead
        hidden, cache, tokens, segment_ids, first, inputs = _repeat(
            (hidden[:, -1], cache, tokens, segment_ids, first, inputs), samples
        )
        extend = lambda x, value: jnp.pad(x, ((0, 0), (0, settings.max_new_tokens)), constant_values=value)
        zeros = jnp.zeros((number * samples, settings.max_new_tokens), jnp.float32)
        none = jnp.zeros(number * samples, jnp.int32)
        rows = _Rows(
            tokens=extend(tokens, settings.pad_id),
            segment_ids=extend(segment_ids, 0),
            logprobs=zeros,
            sampling_logprobs=zeros,
            chances=_chances(keys, first, settings),
            first=first,
            new=none,
            last=none,
            stop=none,
            finished=none.astype(bool),
            cache=cache,
            inputs=inputs,
        )
        return rows, hidden

    def emit(rows: _Rows, hidden: Array) -> _Rows:
        """Samples a token a row from the last hidden states, and writes it."""
        alive, column = _alive(rows, settings), length + rows.new
        here = rows.segment_ids != 0
        step = samplers.Step(
            tokens=rows.tokens, here=here, sampled=here & (jnp.arange(width) >= length)[None, :], column=column,
            new=rows.new, hidden=hidden, temperature=jnp.asarray(sampler.temperature),
        )  # fmt: skip
        logits = lm.unembed(params, hidden)
        if unknown := [i for i in settings.eos_ids if not 0 <= i < logits.shape[-1]]:
            raise ValueError(f"eos_ids {unknown} but the model's vocabulary has {logits.shape[-1]} tokens")
        if stop is not None and stop.shape[0] > logits.shape[-1]:
            raise ValueError(f"stop [V, S] = {list(stop.shape)} but the model's vocabulary has {logits.shape[-1]} tokens")
        tempered, filtered = samplers.apply(sampler, logits, step)
        chance = jnp.take_along_axis(rows.chances, rows.new[:, None], axis=1, mode="clip")[:, 0]
        sampled = samplers.draw(chance, filtered)
        of_token = lambda x: jnp.take_along_axis(x, sampled[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(x, axis=-1)
        each = jnp.arange(alive.shape[0])
        put = lambda x, at, value: x.at[each, jnp.where(alive, at, x.shape[1])].set(value.astype(x.dtype), mode="drop")
        state, ends = rows.stop, _is_in(sampled, settings.eos_ids)
        if stop is not None:
            state = jnp.take(stop.reshape(-1), sampled * stop.shape[1] + rows.stop, mode="fill", fill_value=0)
            ends |= state == stop.shape[1] - 1
        return rows._replace(
            tokens=put(rows.tokens, column, sampled),
            segment_ids=put(rows.segment_ids, column, jnp.ones_like(sampled)),
            logprobs=put(rows.logprobs, rows.new, of_token(tempered)),
            sampling_logprobs=put(rows.sampling_logprobs, rows.new, of_token(filtered)),
            new=rows.new + alive,
            last=sampled,
            stop=state,
            finished=rows.finished | (alive & ends),
        )

    def decode(rows: _Rows) -> _Rows:
        """Reads the last token, then samples the next."""
        hidden, cache, _ = lm.hidden(
            params,
            rows.last[:, None],
            positions=(rows.first + rows.new - 1)[:, None],
            segment_ids=_alive(rows, settings).astype(jnp.int32)[:, None],
            cache=rows.cache,
            inputs=rows.inputs,
        )
        return emit(rows._replace(cache=cache), hidden[:, 0])

    return read, emit, decode


def _rollout(rows: _Rows, prompts: Prompts, prefix, settings: _Settings, sampler) -> Rollout:
    start = prompts.tokens.shape[1]
    tokens, segment_ids = rows.tokens, rows.segment_ids
    if prefix is not None:  # the prefix moves to its prompt, so that padding is on the left
        before = Prompts(
            jnp.concatenate([jnp.broadcast_to(prefix, (tokens.shape[0], prefix.shape[0])), tokens[:, :start]], axis=1),
            jnp.pad(segment_ids[:, :start] != 0, ((0, 0), (prefix.shape[0], 0)), constant_values=True),
        )
        start += prefix.shape[0]
        aligned, real, _ = _align_right(before)
        tokens = jnp.concatenate([aligned, tokens[:, -settings.max_new_tokens :]], axis=1)
        segment_ids = jnp.concatenate([real, segment_ids[:, -settings.max_new_tokens :]], axis=1)
    columns = jnp.arange(tokens.shape[1])[None, :]
    sampled = (segment_ids != 0) & (columns >= start)
    positions = jnp.where(segment_ids != 0, columns - (start - rows.first)[:, None], 0)
    widen = lambda x: jnp.pad(x, ((0, 0), (start, 0)))
    return Rollout(
        tokens=tokens,
        mask=sampled,
        positions=positions.astype(jnp.int32),
        segment_ids=segment_ids,
        logprobs=widen(rows.logprobs),
        sampling_logprobs=widen(rows.sampling_logprobs),
        finished=rows.finished,
        temperature=jnp.asarray(sampler.temperature, jnp.float32),
        inputs=_repeat(prompts.inputs, settings.num_samples),
    )


def _alive(rows: _Rows, settings: _Settings) -> Array:
    return ~rows.finished & (rows.new < settings.max_new_tokens)


def _row_keys(key: Array, prompts: Prompts, settings: _Settings) -> Array:
    if key.ndim == 0:
        return jax.random.split(key, prompts.tokens.shape[0] * settings.num_samples)
    return jax.vmap(lambda key: jax.random.split(key, settings.num_samples))(key).reshape(-1)


def _chances(keys: Array, first: Array, settings: _Settings) -> Array:
    """A uniform number for every new token, of the row's key and the token's position; all at once, which costs less."""
    positions = first[:, None] + jnp.arange(settings.max_new_tokens)[None, :]
    of_token = lambda key, position: jax.random.uniform(jax.random.fold_in(key, position), (), jnp.float32)
    return jax.vmap(jax.vmap(of_token, in_axes=(None, 0)))(keys, positions)


def _repeat(tree, times: int):
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), tree)


def _align_right(prompts: Prompts) -> tuple[Array, Array, Array]:
    """Tokens shifted so that every prompt ends in the last column; their segment ids and positions."""
    order = jnp.argsort(prompts.mask, axis=1, stable=True)  # padding first, tokens in their order
    mask = jnp.take_along_axis(prompts.mask, order, axis=1)
    tokens = jnp.take_along_axis(prompts.tokens, order, axis=1)
    return tokens, mask.astype(jnp.int32), jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)


def _is_in(token, ids):
    return jnp.zeros(token.shape, bool) if not ids else (token[:, None] == jnp.asarray(ids)[None, :]).any(-1)


def _checked(lm, prompts, key, max_new_tokens, num_samples, eos_ids, prefix, pad_id) -> _Settings:
    if max_new_tokens < 1 or num_samples < 1:
        raise ValueError(f"max_new_tokens and num_samples must be at least 1, but are {max_new_tokens} and {num_samples}")
    if prompts.tokens.ndim != 2 or prompts.tokens.shape != prompts.mask.shape:
        raise ValueError(
            f"prompts.tokens {list(prompts.tokens.shape)} but prompts.mask {list(prompts.mask.shape)}; both [P, L]"
        )
    if isinstance(prompts.mask, np.ndarray) and not prompts.mask.any(axis=1).all():
        empty = np.flatnonzero(~prompts.mask.any(axis=1)).tolist()
        raise ValueError(f"prompts {empty} have no tokens; a model needs at least one to start from")
    if prompts.mask.dtype != jnp.bool_:
        raise TypeError(f"prompts.mask must be bool, True on real tokens, but is {prompts.mask.dtype}")
    if isinstance(eos_ids, int):
        raise TypeError(f"eos_ids must be a tuple of tokens, but is {eos_ids}; write ({eos_ids},)")
    if key.ndim and key.shape != prompts.tokens.shape[:1]:
        raise ValueError(f"key {list(key.shape)} but prompts.tokens {list(prompts.tokens.shape)}; one key, or one a prompt")
    if prefix is not None and prefix.ndim != 1:
        raise ValueError(f"prefix {list(prefix.shape)} but it must be [S], the same tokens for every prompt")
    if prefix is not None and prompts.inputs is not None:
        raise ValueError("a prefix is read once for all, but these prompts have inputs of their own; write it before each")
    return _Settings(max_new_tokens, num_samples, tuple(eos_ids), pad_id)
