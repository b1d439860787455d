"""The decoding loop's parts: prompts are read, then every row gets a token at a time, written in
place.

`generate`, `generate_many` and `simulate` are compositions of these; a row's random numbers, cache
and columns are its own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf import losses
from rlhf.fields import documented
from rlhf.lm import EXPERTS
from rlhf.rollouts import samplers
from rlhf.rollouts.types import Array, Prompts, check_prompts
from rlhf.sharding import constrain_params, constrain_rows


@documented
class Settings(NamedTuple):
    """What a compiled program depends on.

    Attributes:
      max_new_tokens: the most tokens of a completion.
      num_samples: completions a prompt.
      eos_ids: tokens that end a completion.
      pad_id: the token of padding.
      record_experts: where a router sends each token that is read.
    """

    max_new_tokens: int
    num_samples: int
    eos_ids: tuple[int, ...]
    pad_id: int
    record_experts: bool = False


@documented
class Rows(NamedTuple):
    """Completions in the making; N new tokens at most, T columns.

    Attributes:
      tokens: [B, T] int32.
      segment_ids: [B, T] int32, of what stands before the first new token.
      logprobs: [B, N] float32, of new tokens, of softmax(logits / temperature).
      sampling_logprobs: [B, N] float32, where the sampler has transforms; else they are the same.
      uniforms: [B, N] float32 in [0, 1), what decides each new token.
      start: [B] int32, column of the first new token.
      first: [B] int32, its position: how many tokens stand before it.
      new: [B] int32, new tokens so far.
      last: [B] int32, the token sampled last.
      stop: [B] int32, state of the stop strings' automaton.
      finished: [B] bool, ended by an end token or a stop string.
      cache: of the model.
      inputs: arrays [B, ...] that the tokens are conditioned on.
      experts: [B, T, layers, k] int32, where a router sent the tokens that were read; None: not
        recorded.
    """

    tokens: Array
    segment_ids: Array
    logprobs: Array
    sampling_logprobs: Array
    uniforms: Array
    start: Array
    first: Array
    new: Array
    last: Array
    stop: Array
    finished: Array
    cache: Any
    inputs: Any
    experts: Any = None


def checked(
    prompts: Prompts, key, max_new_tokens, num_samples, eos_ids, pad_id, record_experts=False
) -> Settings:
    """The settings, once they, prompts `[P, L]` and a key, `[]` or `[P]`, are known to fit
    together.
    """
    if max_new_tokens < 1 or num_samples < 1:
        raise ValueError(
            f"max_new_tokens and num_samples must be at least 1, but are {max_new_tokens} and "
            f"{num_samples}"
        )
    check_prompts(prompts)
    # An int would be iterated over much later, inside the compiled program.
    if isinstance(eos_ids, int):
        raise TypeError(f"eos_ids must be a tuple of tokens, but is {eos_ids}; write ({eos_ids},)")
    if key.ndim and key.shape != prompts.tokens.shape[:1]:
        raise ValueError(
            f"key {list(key.shape)} but prompts.tokens {list(prompts.tokens.shape)}; one key, or "
            "one a prompt"
        )
    return Settings(max_new_tokens, num_samples, tuple(eos_ids), pad_id, record_experts)


@documented
class Decoder(NamedTuple):
    """What a decoding loop is made of; `decode` is `extend` and `sample_next`, one after the
    other.

    Attributes:
      prefill: (prompts [P, L], keys [B]) -> rows, B = P * num_samples, and the hidden states [B, D] of
        their last tokens.
      widen: (rows, columns) -> rows, with a cache of so many columns; `prefill` leaves one as wide as
        the prompts.
      extend: (rows, tokens, segment_ids, positions: [B, K], padded on the left) -> rows, hidden
        states of the last ones.
      sample_next: (rows, hidden states [B, D]) -> rows with a token more.
      decode: (rows) -> rows that have read their last token, with a token more.
    """

    prefill: Callable
    widen: Callable
    extend: Callable
    sample_next: Callable
    decode: Callable


def decoder(lm, settings, params, sampler, stop, prefix, width) -> Decoder:
    """The parts of a loop over rows of tokens `[B, width]`; `stop` `[V, states]` and `prefix` `[S]`
    as `generate` has them.
    """
    ahead = 0 if prefix is None else prefix.shape[0]
    # An encoder reads its parameters once, as they are.
    encode = partial(lm.encode, params) if lm.encode else None
    # Once, before the loop, which reads them for every token: in the dtype of the computation,
    # layers apart where XLA would copy them out of their stack, and on a mesh laid out anew.
    params = constrain_params(lm.unstack(params) if lm.unstack else params, lm.axes())
    if prefix is not None:
        # The prefix is read by one row, whose cache is then repeated for every prompt.
        ones = jnp.ones((1, ahead), jnp.int32)
        where = dict(positions=jnp.arange(ahead, dtype=jnp.int32)[None], segment_ids=ones)
        _, common, _ = lm.hidden(params, prefix[None], **where, cache=lm.init_cache(1, ahead))

    def room(cache, batch: int, columns: int):
        """The cache at the start of one for so many columns after the prefix."""

        def at_the_start(wide, narrow):
            return jax.lax.dynamic_update_slice(wide, narrow, (0,) * wide.ndim)

        # A larger cache is a new one with the old one written over its start.
        return jax.tree.map(at_the_start, lm.init_cache(batch, ahead + columns), cache)

    def prefill(prompts: Prompts, keys: Array) -> tuple[Rows, Array]:
        samples = settings.num_samples
        number, length = prompts.tokens.shape
        tokens, segment_ids, positions = align_right(prompts)
        # An encoder or a vision tower runs once, not at every token.
        inputs = encode(prompts.inputs) if encode else prompts.inputs
        cache = (
            lm.init_cache(number, length)
            if prefix is None
            else room(repeat(common, number), number, length)
        )
        where = dict(positions=positions + ahead, segment_ids=segment_ids)
        hidden, cache, aux = lm.hidden(params, tokens, **where, cache=cache, inputs=inputs)
        experts = None
        if settings.record_experts:
            if EXPERTS not in aux:
                raise ValueError("record_experts=True, but this model has no experts")
            experts = aux[EXPERTS]
        # Prompts end in the last column: the next position is one beyond it.
        first = positions[:, -1] + 1 + ahead
        # A prompt is read once, its cache copied to all of its samples.
        # Prompts may be too few for the devices, which then read all; their rows are shared out.
        hidden, cache, tokens, segment_ids, first, inputs, experts = constrain_rows(
            repeat((hidden[:, -1], cache, tokens, segment_ids, first, inputs, experts), samples)
        )

        def pad_right(x, value):
            more = ((0, 0), (0, width - length), *((0, 0) for _ in x.shape[2:]))
            return jnp.pad(x, more, constant_values=value)

        zeros = jnp.zeros((number * samples, settings.max_new_tokens), jnp.float32)
        none = jnp.zeros(number * samples, jnp.int32)
        rows = Rows(
            tokens=pad_right(tokens, settings.pad_id),
            segment_ids=pad_right(segment_ids, 0),
            logprobs=zeros,
            # Without transforms both log-probs are the same, and one array is carried.
            sampling_logprobs=zeros if sampler.transforms else None,
            uniforms=uniforms(keys, first, settings),
            start=jnp.full_like(first, length),
            first=first,
            new=none,
            last=none,
            stop=none,
            finished=none.astype(bool),
            cache=cache,
            inputs=inputs,
            experts=None if experts is None else pad_right(experts, 0),
        )
        return rows, hidden

    def widen(rows: Rows, columns: int) -> Rows:
        return rows._replace(cache=room(rows.cache, rows.tokens.shape[0], columns))

    def extend(
        rows: Rows, tokens: Array, segment_ids: Array, positions: Array
    ) -> tuple[Rows, Array]:
        where = dict(positions=positions, segment_ids=segment_ids, inputs=rows.inputs)
        # K tokens after those in the cache; the last column is that of the newest token.
        hidden, cache, aux = lm.hidden(params, tokens, **where, cache=rows.cache)
        experts = rows.experts
        if experts is not None:
            # Padding is in no column.  What is read ends before the column of the next token.
            ahead = jnp.arange(tokens.shape[1] - 1, -1, -1)[None] + 1
            columns = jnp.where(segment_ids != 0, (rows.start + rows.new)[:, None] - ahead, width)
            put = lambda old, at, new: old.at[at].set(new, mode="drop")
            experts = jax.vmap(put)(experts, columns, aux[EXPERTS])
        return rows._replace(cache=cache, experts=experts), hidden[:, -1]

    def sample_next(rows: Rows, hidden: Array) -> Rows:
        going = alive(rows, settings)
        column = rows.start + rows.new
        # Segment ids stand for prompts alone; new tokens are told apart by their columns.
        step = samplers.Step(
            tokens=rows.tokens,
            here=(rows.segment_ids != 0) | new_columns(rows),
            sampled=new_columns(rows),
            column=column,
            new=rows.new,
            hidden=hidden,
            temperature=jnp.asarray(sampler.temperature),
        )
        # Checked here, since only the logits say how large a vocabulary is.
        logits = lm.unembed(params, hidden)
        if unknown := [i for i in settings.eos_ids if not 0 <= i < logits.shape[-1]]:
            raise ValueError(
                f"eos_ids {unknown} but the model's vocabulary has {logits.shape[-1]} tokens"
            )
        if stop is not None and stop.shape[0] > logits.shape[-1]:
            raise ValueError(
                f"stop [V, S] = {list(stop.shape)} but the model's vocabulary has "
                f"{logits.shape[-1]} tokens"
            )
        tempered, filtered = samplers.apply(sampler, logits, step)
        # Rows that are over stand at the end of their numbers: clipped, and dropped below.
        uniform = jnp.take_along_axis(rows.uniforms, rows.new[:, None], axis=1, mode="clip")[:, 0]
        sampled = samplers.draw(uniform, filtered)

        def logprob_of_sampled(x):
            return losses.logits.token_logprob(x, sampled)

        # A column beyond the array is dropped: that is how rows which are over write nothing,
        # without a branch.  Row by row, so that XLA on a mesh need not gather them all.
        def put(x, at, value):
            column = jnp.where(going, at, x.shape[1])
            one = lambda row, column, value: row.at[column].set(value, mode="drop")
            return jax.vmap(one)(x, column, value.astype(x.dtype))

        state = rows.stop
        ends = _is_in(sampled, settings.eos_ids)
        if stop is not None:
            state = jnp.take(
                stop.reshape(-1), sampled * stop.shape[1] + rows.stop, mode="fill", fill_value=0
            )
            ends |= state == stop.shape[1] - 1
        return rows._replace(
            tokens=put(rows.tokens, column, sampled),
            logprobs=put(rows.logprobs, rows.new, logprob_of_sampled(tempered)),
            sampling_logprobs=put(rows.sampling_logprobs, rows.new, logprob_of_sampled(filtered))
            if sampler.transforms
            else None,
            new=rows.new + going,
            last=sampled,
            stop=state,
            finished=rows.finished | (going & ends),
        )

    def decode(rows: Rows) -> Rows:
        going = alive(rows, settings).astype(jnp.int32)
        return sample_next(
            *extend(rows, rows.last[:, None], going[:, None], (rows.first + rows.new - 1)[:, None])
        )

    return Decoder(prefill, widen, extend, sample_next, decode)


def new_columns(rows: Rows) -> Array:
    """`[B, T]` bool, where the new tokens stand."""
    columns = jnp.arange(rows.tokens.shape[1])[None, :]
    return (columns >= rows.start[:, None]) & (columns < (rows.start + rows.new)[:, None])


def logprobs_of(rows: Rows) -> tuple[Array, Array]:
    """Log-probs of new tokens `[B, N]` before and after the sampler's transforms."""
    return (
        rows.logprobs,
        rows.logprobs if rows.sampling_logprobs is None else rows.sampling_logprobs,
    )


def complete(
    decode: Callable,
    rows: Rows,
    settings: Settings,
    early_end: bool,
    start: int = 1,
    end: int | None = None,
) -> Rows:
    """The same `[B]` rows, of `start` new tokens, once every one is over or has `end`, the most
    there may be if None; decoded always as often without `early_end`, which is faster vmapped."""
    end = settings.max_new_tokens if end is None else end
    # A while loop under vmap runs until the last lane ends and selects in every lane at every turn;
    # a loop of fixed length does not select.
    if early_end:
        return jax.lax.while_loop(
            lambda rows: (alive(rows, settings) & (rows.new < end)).any(), decode, rows
        )
    return jax.lax.fori_loop(start, end, lambda _, rows: decode(rows), rows)


def alive(rows: Rows, settings: Settings) -> Array:
    """`[B]` bool, the rows that get another token."""
    return ~rows.finished & (rows.new < settings.max_new_tokens)


def row_keys(key: Array, prompts: Prompts, settings: Settings) -> Array:
    """`[P * num_samples]` keys, one a row, of one key or `[P]`, one a prompt."""
    if key.ndim == 0:
        return jax.random.split(key, prompts.tokens.shape[0] * settings.num_samples)
    return jax.vmap(lambda key: jax.random.split(key, settings.num_samples))(key).reshape(-1)


def uniforms(keys: Array, first: Array, settings: Settings) -> Array:
    """`[B, max_new_tokens]` uniform float32, of a row's key `[B]` and a new token's position, from
    `first` `[B]` on; all at once, which costs less."""
    positions = first[:, None] + jnp.arange(settings.max_new_tokens)[None, :]

    def of_token(key, position):
        return jax.random.uniform(jax.random.fold_in(key, position), (), jnp.float32)

    # The position is folded into the key, so that a row samples the same whatever its prompt is
    # padded to, and whichever rows are beside it.
    return jax.vmap(jax.vmap(of_token, in_axes=(None, 0)))(keys, positions)


def repeat(tree, times: int):
    """Leaves `[P, ...]` -> `[P * times, ...]`, the copies of a row side by side."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), tree)


def align_right(prompts: Prompts) -> tuple[Array, Array, Array]:
    """Tokens `[P, L]` shifted so that every prompt ends in the last column; their segment ids and
    positions, `[P, L]` int32.
    """
    # False sorts before True, and a stable sort leaves tokens in their order: padding on the left.
    order = jnp.argsort(prompts.mask, axis=1, stable=True)
    mask = jnp.take_along_axis(prompts.mask, order, axis=1)
    tokens = jnp.take_along_axis(prompts.tokens, order, axis=1)
    return (
        tokens,
        mask.astype(jnp.int32),
        jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0),
    )


def _is_in(token, ids):
    return (
        jnp.zeros(token.shape, bool)
        if not ids
        else (token[:, None] == jnp.asarray(ids)[None, :]).any(-1)
    )
