"""Environments in JAX: whole conversations inside one compiled program, so that rollout and update
jit, scan and vmap together.

For environments in Python, tools among them, see `play`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf.fields import documented
from rlhf.lm import LM, Params
from rlhf.rollouts import samplers
from rlhf.rollouts.decoding import (
    Rows,
    align_right,
    checked,
    complete,
    decoder,
    logprobs_of,
    new_columns,
    repeat,
    row_keys,
    uniforms,
)
from rlhf.rollouts.types import Array, Prompts, Rollout


@documented
class Reply(NamedTuple):
    """What an environment returns for a turn of one conversation.

    Attributes:
      state: of the conversation, for its next step: a pytree of arrays whose shapes stay.
      tokens: [O] int32, what the policy reads before its next turn.
      mask: [O] bool, which of them are there.
      reward: [] float, of this turn.
      done: [] bool, the conversation is over, and its tokens are not read.
    """

    state: Any
    tokens: Array
    mask: Array
    reward: Any = 0.0
    done: Any = False


@documented
class Simulated(NamedTuple):
    """Conversations as a `Rollout`, and what the environment made of them.

    Attributes:
      rollout: [B, T], replies are outside the mask; finished: the environment was done, and no
        limit had cut.
      rewards: [B, T] float32, each turn's on its last sampled token.
      turns: [B] int32, turns that were sampled.
      states: [B, ...], the last of each conversation.
    """

    rollout: Rollout
    rewards: Array
    turns: Array
    states: Any


class _Talks(NamedTuple):
    """Conversations between two turns."""

    rows: Rows
    hidden: Array  # [B, D], from which the next turn's first token is sampled
    going: Array  # [B] bool
    finished: Array  # [B] bool, as in the result
    mask: Array  # [B, T] bool
    logprobs: Array  # [B, T] float32
    sampling_logprobs: Array  # [B, T] float32
    rewards: Array  # [B, T] float32
    turns: Array  # [B] int32
    states: Any


def simulate(
    lm: LM,
    params: Params,
    step: Callable,
    prompts: Prompts,
    states: Any,
    key: Array,
    *,
    max_turns: int,
    max_new_tokens: int,
    num_samples: int = 1,
    sampler: samplers.Sampler = samplers.Sampler(),
    eos_ids: tuple[int, ...] = (),
    stop: Array | None = None,
    pad_id: int = 0,
    early_end: bool = True,
) -> Simulated:
    """Samples a turn of every conversation that goes on, asks the environment, appends what it
    says; and again, in one program.

    What was read stays in the cache: a turn reads the reply before it and nothing else.  A row's
    random numbers depend on its own key and position alone.  `key` is consumed.

    Args:
      lm, params: the policy.
      step: `(state, tokens [N] int32, mask [N] bool) -> Reply`, of one conversation (it is
        vmapped); N is `max_new_tokens`, `tokens` are what was sampled this turn, where `mask` is
        True.  The same function compiles once.
      prompts: `[P, L]`, padded anywhere; they are shifted to end in column L.
      states: a pytree of arrays `[P, ...]`, where each conversation starts.
      key: one key, or `[P]` keys, one a prompt.
      max_turns: the most turns of a conversation.
      max_new_tokens: the most tokens sampled a turn; one that is cut there goes to the environment
        as it is.
      num_samples: conversations a prompt; they start in the same state.
      sampler, eos_ids, stop, pad_id: as in `generate`; penalties and minimum lengths count by the
        turn.
      early_end: stop when all rows have ended.  False: loops of fixed length, for runs that are
        vmapped.

    Returns: `Simulated` of `B = P * num_samples` rows; row `p * num_samples + g` is sample g of
    prompt p.  It has `T = L + max_turns * max_new_tokens + (max_turns - 1) * O` columns for replies
    of O tokens, and no gaps in a row.  No gradient flows.

    Raises: ValueError on wrong shapes or counts, TypeError on a mask that is not bool or a step
    that returns no `Reply`.

    >>> from rlhf.models import TransformerConfig, transformer
    >>> def echo(count, tokens, mask):
    ...     return Reply(count + 1, tokens[:1], mask[:1], reward=count, done=count == 2)
    >>> lm = transformer(TransformerConfig(vocab_size=9, hidden_size=4, num_layers=1, num_heads=1, mlp_size=8))
    >>> prompts = Prompts(jnp.array([[1, 5]]), jnp.array([[True, True]]))
    >>> params, states = lm.init(jax.random.key(0)), jnp.array([1])
    >>> played = simulate(lm, params, echo, prompts, states, jax.random.key(1), max_turns=3, max_new_tokens=2)
    >>> played.rollout.mask[0].astype(int).tolist(), played.rewards[0].astype(int).tolist()
    ([0, 0, 1, 1, 0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0, 2, 0, 0, 0])
    """
    settings = checked(prompts, key, max_new_tokens, num_samples, eos_ids, pad_id)
    if max_turns < 1:
        raise ValueError(f"max_turns must be at least 1, but is {max_turns}")
    for leaf in jax.tree.leaves(states):
        if jnp.shape(leaf)[:1] != prompts.tokens.shape[:1]:
            raise ValueError(
                f"states {list(jnp.shape(leaf))} but prompts.tokens {list(prompts.tokens.shape)}; "
                "one a prompt"
            )
    return _simulate(
        lm, settings, step, max_turns, early_end, params, prompts, states, key, sampler, stop
    )


@partial(jax.jit, static_argnums=range(5))
def _simulate(
    lm, settings, step, max_turns, early_end, params, prompts, states, key, sampler, stop
):
    most = settings.max_new_tokens
    number = prompts.tokens.shape[0] * settings.num_samples
    states = repeat(states, settings.num_samples)
    keys = row_keys(key, prompts, settings)
    width = (
        prompts.tokens.shape[1]
        + max_turns * most
        + (max_turns - 1) * _reply_size(step, states, most)
    )
    parts = decoder(lm, settings, params, sampler, stop, None, width)
    each = jnp.arange(number)[:, None]
    ahead = jnp.arange(most)[None, :]

    # A column of `width` is beyond the array, and dropped.
    def put(array, columns, where, values):
        return array.at[each, jnp.where(where, columns, width)].set(
            values.astype(array.dtype), mode="drop"
        )

    def turn(t, talks: _Talks) -> _Talks:
        rows = complete(
            parts.decode, parts.sample_next(talks.rows, talks.hidden), settings, early_end
        )
        columns = rows.start[:, None] + ahead
        said = ahead < rows.new[:, None]
        tokens = jnp.where(
            said, jnp.take_along_axis(rows.tokens, columns, axis=1, mode="clip"), settings.pad_id
        )
        reply = jax.vmap(step)(talks.states, tokens, said)
        # Conversations that are over keep what they had; the environment still runs for them.
        stays = lambda new, old: jnp.where(talks.going.reshape(-1, *[1] * (old.ndim - 1)), new, old)
        going = talks.going & ~reply.done & (t + 1 < max_turns)
        # The turn ended by itself. Without end tokens it cannot, and counts as such.
        uncut = rows.finished | (not settings.eos_ids)
        appended = reply.mask & going[:, None]
        # Column and position of what comes next.
        end = rows.start + rows.new
        position = rows.first + rows.new
        # Closed up: a reply may leave out tokens anywhere, a row of the result has no gaps.
        places = end[:, None] + jnp.cumsum(appended, axis=1) - 1
        logprobs, sampling_logprobs = logprobs_of(rows)
        # The last sampled token is not in the cache: it is read together with the reply.
        last = jnp.take_along_axis(tokens, jnp.maximum(rows.new - 1, 0)[:, None], axis=1)
        unread = Prompts(
            jnp.concatenate([last, reply.tokens], axis=1),
            jnp.concatenate([going[:, None], appended], axis=1),
        )
        # Aligned to the right, so that the last column is the newest token of every row.
        aligned, real, further = align_right(unread)
        # `align_right` counts from 0; the first of these stands one before the reply.
        further += position[:, None] - 1
        first = position + appended.sum(axis=1)
        rows = rows._replace(
            tokens=put(rows.tokens, places, appended, reply.tokens),
            segment_ids=put(rows.segment_ids | new_columns(rows), places, appended, appended),
        )
        rows, hidden = parts.extend(rows, aligned, real, further)
        rows = rows._replace(
            start=end + appended.sum(axis=1),
            first=first,
            uniforms=uniforms(keys, first, settings),
            new=jnp.zeros_like(rows.new),
            stop=jnp.zeros_like(rows.stop),
            finished=~going,
        )
        return _Talks(
            rows=rows,
            hidden=hidden,
            going=going,
            finished=stays(reply.done & uncut, talks.finished),
            mask=put(talks.mask, columns, said, said),
            logprobs=put(talks.logprobs, columns, said, logprobs),
            sampling_logprobs=put(talks.sampling_logprobs, columns, said, sampling_logprobs),
            rewards=put(
                talks.rewards, end[:, None] - 1, talks.going[:, None], reply.reward[:, None]
            ),
            turns=talks.turns + talks.going,
            states=jax.tree.map(stays, reply.state, talks.states),
        )

    active = jnp.ones(number, bool)
    zeros = jnp.zeros((number, width), jnp.float32)
    rows, hidden = parts.prefill(prompts, keys)
    talks = _Talks(
        rows=parts.widen(rows, width),
        hidden=hidden,
        going=active,
        finished=~active,
        mask=zeros.astype(bool),
        logprobs=zeros,
        sampling_logprobs=zeros,
        rewards=zeros,
        turns=jnp.zeros(number, int),
        states=states,
    )
    if early_end:
        # A while loop ends with the last conversation; under vmap a loop of fixed length is faster.
        more = lambda carry: (carry[0] < max_turns) & carry[1].going.any()
        _, talks = jax.lax.while_loop(more, lambda carry: (carry[0] + 1, turn(*carry)), (0, talks))
    else:
        talks = jax.lax.fori_loop(0, max_turns, turn, talks)
    real = talks.rows.segment_ids != 0
    rollout = Rollout(
        tokens=talks.rows.tokens,
        mask=talks.mask,
        positions=jnp.where(real, jnp.cumsum(real, axis=1) - 1, 0).astype(jnp.int32),
        segment_ids=talks.rows.segment_ids,
        logprobs=talks.logprobs,
        sampling_logprobs=talks.sampling_logprobs,
        finished=talks.finished,
        temperature=jnp.asarray(sampler.temperature, jnp.float32),
        inputs=repeat(prompts.inputs, settings.num_samples),
    )
    return Simulated(rollout, talks.rewards, talks.turns, talks.states)


def _reply_size(step: Callable, states: Any, most: int) -> int:
    """O, the width of a reply; raises where the step returns something else."""
    number = jax.tree.leaves(states)[0].shape[0] if jax.tree.leaves(states) else 1
    said = (
        jax.ShapeDtypeStruct((number, most), jnp.int32),
        jax.ShapeDtypeStruct((number, most), jnp.bool_),
    )
    reply = jax.eval_shape(jax.vmap(step), states, *said)
    if not isinstance(reply, Reply):
        raise TypeError(f"step must return a Reply, but returned {type(reply).__name__}")
    if (
        reply.tokens.ndim != 2
        or reply.tokens.shape != reply.mask.shape
        or reply.mask.dtype != jnp.bool_
    ):
        raise ValueError(
            f"a reply's tokens {list(reply.tokens.shape[1:])} and mask {reply.mask.dtype} "
            f"{list(reply.mask.shape[1:])} must "
            "both be [O], the mask bool"
        )
    return reply.tokens.shape[1]
