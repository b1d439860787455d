"""Environments on the host: conversations of several turns between a policy and Python code, as one
rollout.

An environment is two functions, `reset(row) -> state` and
`step(state, completion_ids, completion_text) -> Turn`; either may be `async def`.  Conversations
are token ids from end to end: what was sampled is never decoded and encoded again.
"""

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf.fields import documented
from rlhf.lm import LM, Params
from rlhf.rollouts.calls import Outcome, attempt_all, event_loop
from rlhf.rollouts.generate import generate as _generate
from rlhf.rollouts.samplers import Sampler
from rlhf.rollouts.types import Array, Prompts, Rollout


class EnvironmentFailed(RuntimeError):
    """No conversation can start."""


@documented
class Turn(NamedTuple):
    """What an environment returns for a completion.

    Attributes:
      state: of this conversation, for its next step; a step that fails leaves the old one in place.
      observation: text or token ids that the policy reads before its next turn.
      reward: of this turn; None: it could not be scored.
      done: the conversation is over; its observation is not read.
      error: what went wrong, for `Played.errors`.
    """

    state: Any
    observation: str | Sequence[int] | None = None
    reward: float | None = 0.0
    done: bool = False
    error: str | None = None


@documented
class Environment(NamedTuple):
    """What a policy talks to.  Rows run side by side: a plain function in a thread, an async one on
    one event loop.

    Attributes:
      reset: (row) -> state, for every sample of a prompt.
      step: (state, completion_ids: list[int], completion_text: str) -> Turn.
    """

    reset: Callable
    step: Callable


@documented
class Played(NamedTuple):
    """Conversations as a `Rollout`, and what the environment made of them.

    Attributes:
      rollout: [B, T], observations are outside the mask; finished: the environment was done, and no
        limit had cut.
      rewards: [B, T] float32, each turn's on its last sampled token; NaN: could not be scored, and
        so is the row's sum.
      turns: [B] int32, turns that were sampled.
      states: B states, the last of each conversation.
      errors: B lists of what went wrong, and in which turn.
      failures: [B] int32, turns whose step raised, took too long or returned no `Turn`; an `error`
        that the environment itself tells of, such as a call that cannot be read, is none.
    """

    rollout: Rollout
    rewards: Array
    turns: Array
    states: list
    errors: list[list[str]]
    failures: Array


def play(
    lm: LM,
    params: Params,
    tokenizer,
    environment: Environment,
    prompts: Prompts | Sequence[Sequence[int]],
    key: Array,
    *,
    max_turns: int,
    max_new_tokens: int,
    max_tokens: int,
    rows: Sequence | None = None,
    num_samples: int = 1,
    sampler: Sampler = Sampler(),
    eos_ids: tuple[int, ...] = (),
    pad_id: int = 0,
    render: Callable[[str], str | Sequence[int]] = str,
    turn_timeout: float = 60.0,
    max_characters: int = 8_000,
    buckets: Sequence[int] | None = None,
    generate: Callable = _generate,
) -> Played:
    """Samples a turn of every conversation that goes on, asks the environment, appends its
    observation; and again.

    One failed row never stops the others.  A step that raises, takes too long or returns no `Turn`
    is answered by an observation that says so, and the conversation goes on from its old state; a
    row whose reset fails has no turn and no score.  A thread that hangs is left behind and does not
    keep the process alive; an async function must not block.

    Every turn has as many rows as the first and a length out of `buckets`, so that few programs are
    compiled.  A row's random numbers depend on its own key, the turn and the position alone.  `key`
    is consumed.

    Args:
      lm, params: the policy.
      tokenizer: of `transformers`; it encodes text observations once, without special tokens of its
        own.
      environment: what the policy talks to.
      prompts: `[P, L]`, padded anywhere, or P lists of token ids (L: the longest).
      max_turns: the most turns of a conversation.
      max_new_tokens: the most tokens sampled a turn.  A turn that is cut there goes to the
        environment as it is.
      max_tokens: columns T of the result: the prompts' L, then turns and observations.  An
        observation that does not fit is not appended, and ends the conversation.
      rows: P objects for `environment.reset`, such as rows of a data set; None: the prompts' texts.
      num_samples: conversations a prompt.
      sampler, eos_ids, pad_id: as in `generate`; a turn's end token stays in the conversation.
      render: puts a text observation into the words of a chat template,
        `(text) -> text or token ids`; for ChatML
        `lambda text: f"\\n<|im_start|>user\\n{text}<|im_end|>\\n<|im_start|>assistant\\n"`.  One
          that returns ids can encode the text itself with `split_special_tokens=True`, so that no
          tool can write the template's own tokens.
      turn_timeout: seconds that a reset, or a step, has.
      max_characters: of a text observation, before `render`; the rest is left out, and the text
        says so.
      buckets: lengths that conversations are padded to on their way to `generate`, max_tokens
        beyond the largest; None: powers of two.
      generate: `rollouts.generate`, or an engine with its signature; what its mask holds was
        sampled.

    Returns: `Played` of `B = P * num_samples` rows, NumPy arrays; row `p * num_samples + g` is
    sample g of prompt p.

    Raises: ValueError on limits that are not above 0, a prompt without tokens, prompts that leave
    no room in `max_tokens`, and
      unequal numbers of prompts and rows; EnvironmentFailed where `reset` failed on every row.

    >>> from rlhf.models import TransformerConfig, transformer
    >>> from rlhf.tasks import reviews
    >>> step = lambda n, ids, text: Turn(n + 1, observation="the film", reward=n, done=n == 2)
    >>> lm = transformer(TransformerConfig(200, 4, num_layers=1, num_heads=1, mlp_size=8))
    >>> played = play(
    ...     lm, lm.init(jax.random.key(0)), reviews.tokenizer(), Environment(lambda row: 1, step), [[1, 5]], jax.random.key(1),
    ...     max_turns=9, max_new_tokens=2, max_tokens=9, buckets=[8],
    ... )
    >>> played.rollout.mask[0].astype(int).tolist(), played.rewards[0].astype(int).tolist()
    ([0, 0, 1, 1, 0, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0, 0, 2, 0])
    """
    starts, inputs = _starts(prompts)
    width = (
        prompts.tokens.shape[1]
        if isinstance(prompts, Prompts)
        else max(map(len, starts), default=0)
    )
    rows = (
        [tokenizer.decode(ids, skip_special_tokens=True) for ids in starts]
        if rows is None
        else rows
    )
    limits = dict(
        max_turns=max_turns,
        max_new_tokens=max_new_tokens,
        num_samples=num_samples,
        turn_timeout=turn_timeout,
    )
    _check(starts, rows, width, max_tokens, eos_ids, **limits)
    each = lambda items: [item for item in items for _ in range(num_samples)]
    inputs = inputs and {name: np.repeat(x, num_samples, axis=0) for name, x in inputs.items()}
    played = _empty(each(starts), width, max_tokens, pad_id, sampler, inputs)
    settings = dict(
        max_new_tokens=max_new_tokens,
        num_samples=1,
        sampler=sampler,
        eos_ids=tuple(eos_ids),
        pad_id=pad_id,
    )
    encode = partial(_encode, tokenizer, render, max_characters)

    with event_loop() as loop:
        alive = _start(
            played,
            attempt_all(loop, environment.reset, [(row,) for row in each(rows)], turn_timeout),
        )
        for turn in range(1, max_turns + 1):
            if not alive.any():
                break
            # All rows go to `generate` every turn, since another number would be another program.
            batch = _batch(played.rollout, alive, pad_id, buckets)
            sampled = jax.device_get(
                generate(lm, params, batch, jax.random.fold_in(key, turn), **settings)
            )
            said = {
                b: ids
                for b in np.flatnonzero(alive).tolist()
                if (ids := _write_turn(played, b, sampled, eos_ids))
            }
            steps = [
                (played.states[b], ids, tokenizer.decode(ids, skip_special_tokens=True))
                for b, ids in said.items()
            ]
            # Only the rows whose step comes back below go on.
            alive[:] = False
            for b, outcome in zip(
                said, attempt_all(loop, environment.step, steps, turn_timeout), strict=True
            ):
                alive[b] = _write_reply(played, b, outcome, encode, turn, max_turns)
    return played


def shorten(text: str, most: int) -> str:
    """The first `most` characters of a text, which then says how many are left out.

    >>> shorten("a long story", 6)
    'a long\\n[6 of 12 characters left out]'
    """
    # A lone surrogate, which a tool may return, cannot be encoded: it becomes a question mark.
    text = text.encode(errors="replace").decode()
    return (
        text
        if len(text) <= most
        else f"{text[:most]}\n[{len(text) - most} of {len(text)} characters left out]"
    )


def _starts(prompts: Prompts | Sequence[Sequence[int]]) -> tuple[list[list[int]], dict | None]:
    if not isinstance(prompts, Prompts):
        return [list(ids) for ids in prompts], None
    tokens = np.asarray(prompts.tokens)
    mask = np.asarray(prompts.mask)
    if mask.shape != tokens.shape or mask.dtype != bool:
        raise ValueError(
            f"prompts.mask {mask.dtype} {list(mask.shape)} but prompts.tokens "
            f"{list(tokens.shape)}; bool, [P, L]"
        )
    return [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)], prompts.inputs


def _check(starts, rows, width, max_tokens, eos_ids, **limits) -> None:
    for name, value in limits.items():
        if not value > 0:
            raise ValueError(f"{name} must be above 0, but is {value}")
    if isinstance(eos_ids, int):
        raise TypeError(f"eos_ids must be a tuple of tokens, but is {eos_ids}; write ({eos_ids},)")
    if not all(starts) or not starts:
        raise ValueError(
            f"prompt {starts.index([]) if starts else 0} has no tokens; a model needs at least one "
            "to start from"
        )
    if len(rows) != len(starts):
        raise ValueError(
            f"{len(rows)} rows but {len(starts)} prompts; environment.reset takes one row a prompt"
        )
    if max_tokens <= width:
        raise ValueError(
            f"max_tokens {max_tokens} but prompts of {width} columns, which count too; raise it"
        )


def _empty(starts, width, length, pad_id, sampler, inputs) -> Played:
    """Prompts without turns; everything else here writes into these arrays."""
    number = len(starts)
    zeros = lambda dtype: np.zeros((number, length), dtype)
    rollout = Rollout(
        tokens=zeros(np.int32) + np.int32(pad_id),
        mask=zeros(bool),
        positions=zeros(np.int32),
        segment_ids=zeros(np.int32),
        logprobs=zeros(np.float32),
        sampling_logprobs=zeros(np.float32),
        finished=np.zeros(number, bool),
        temperature=np.asarray(sampler.temperature, np.float32),
        inputs=inputs,
    )
    for b, ids in enumerate(starts):
        _write(rollout, b, ids, width - len(ids))
    return Played(
        rollout=rollout,
        rewards=zeros(np.float32),
        turns=np.zeros(number, np.int32),
        states=[None] * number,
        errors=[[] for _ in starts],
        failures=np.zeros(number, np.int32),
    )


def _write(rollout: Rollout, b: int, ids: Sequence[int], start: int) -> slice:
    """Tokens from column `start` on, as the next ones of row b."""
    columns = slice(start, start + len(ids))
    held = (rollout.segment_ids[b] != 0).sum()
    rollout.tokens[b, columns] = ids
    rollout.positions[b, columns] = held + np.arange(len(ids))
    rollout.segment_ids[b, columns] = 1
    return columns


def _end(rollout: Rollout, b: int) -> int:
    """The first free column of a row."""
    return int(np.flatnonzero(rollout.segment_ids[b])[-1]) + 1


def _start(played: Played, outcomes: list[Outcome]) -> np.ndarray:
    """Takes the states of `reset`, and tells which rows have one: `[B]` bool."""
    for b, (state, error) in enumerate(outcomes):
        played.states[b] = state
        if error is not None:
            _no_score(played, b, f"reset: {error}")
    # Where no row can start the environment itself is at fault: that is no data to train on.
    if all(played.errors):
        raise EnvironmentFailed(
            f"environment.reset failed on all {len(outcomes)} rows; row 0: {outcomes[0][1]}"
        )
    return np.array([error is None for _, error in outcomes])


def _no_score(played: Played, b: int, error: str) -> None:
    played.errors[b].append(error)
    # The NaN is under no mask, so no loss reads it, but the sum of the row's rewards has it.
    played.rewards[b, _end(played.rollout, b) - 1] = np.nan


def _batch(
    rollout: Rollout, alive: np.ndarray, pad_id: int, buckets: Sequence[int] | None
) -> Prompts:
    """The conversations so far, padded on the left; rows that are over stand in for others, so that
    none delays the end.
    """
    rows = np.where(alive, np.arange(len(alive)), np.resize(np.flatnonzero(alive), len(alive)))
    used = rollout.segment_ids[rows] != 0
    longest = int(used.sum(1).max())
    # Powers of two, or the given buckets: a program is compiled for each width.
    fitting = (
        [1 << (longest - 1).bit_length()]
        if buckets is None
        else [n for n in sorted(buckets) if n >= longest]
    )
    length = fitting[0] if fitting else rollout.tokens.shape[1]
    mask = np.arange(length)[None, :] >= length - used.sum(1, keepdims=True)
    tokens = np.full(mask.shape, pad_id, np.int32)
    # Both masks go row by row and have as many True in each row: right-aligned copies.
    tokens[mask] = rollout.tokens[rows][used]
    return Prompts(
        tokens, mask, rollout.inputs and {name: x[rows] for name, x in rollout.inputs.items()}
    )


def _write_turn(played: Played, b: int, sampled: Rollout, eos_ids: Sequence[int]) -> list[int]:
    """Appends what was sampled, as far as it fits."""
    rollout = played.rollout
    start = _end(played.rollout, b)
    every = np.flatnonzero(sampled.mask[b])
    # A turn that does not fit is cut at the last column.
    keep = every[: rollout.tokens.shape[1] - start]
    if not keep.size:
        _no_score(played, b, f"turn {played.turns[b] + 1}: generate returned no sampled token")
        return []
    columns = _write(rollout, b, sampled.tokens[b, keep], start)
    rollout.mask[b, columns] = True
    rollout.logprobs[b, columns] = sampled.logprobs[b, keep]
    rollout.sampling_logprobs[b, columns] = sampled.sampling_logprobs[b, keep]
    # True where the turn fits and ended by itself. Without end tokens no turn can tell.
    rollout.finished[b] = keep.size == every.size and (not eos_ids or sampled.finished[b])
    played.turns[b] += 1
    return rollout.tokens[b, columns].tolist()


def _write_reply(
    played: Played, b: int, outcome: Outcome, encode: Callable, turn: int, max_turns: int
) -> bool:
    """Takes what a step returned, and tells whether the conversation goes on."""
    rollout = played.rollout
    end = _end(played.rollout, b)
    reply, observed, failed = _reply(outcome, played.states[b], encode)
    played.failures[b] += failed
    played.states[b] = reply.state
    played.rewards[b, end - 1] = reply.reward
    if reply.error is not None:
        played.errors[b].append(f"turn {turn}: {reply.error}")
    # Finished needs both: the turn was not cut, and the environment is done.
    rollout.finished[b] &= reply.done
    # An observation that leaves no column for a next token ends the conversation.
    goes_on = not reply.done and turn < max_turns and end + len(observed) < rollout.tokens.shape[1]
    if goes_on:
        _write(rollout, b, observed, end)
    return goes_on


def _reply(outcome: Outcome, state: Any, encode: Callable) -> tuple[Turn, list[int], bool]:
    """The turn of a step with its observation's tokens, and whether the step failed; then the
    observation says so.
    """
    turn, error = outcome
    if error is None:
        try:
            if not isinstance(turn, Turn):
                raise TypeError(
                    f"environment.step must return a Turn, but returned {type(turn).__name__}"
                )
            turn = turn._replace(
                reward=np.nan if turn.reward is None else float(turn.reward), done=bool(turn.done)
            )
            return turn, [] if turn.done else encode(turn.observation), False
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
    return Turn(state, error=error), _encoded_or_nothing(encode, f"error: {error}"), True


def _encoded_or_nothing(encode: Callable, text: str) -> list[int]:
    try:
        return encode(text)
    # A toy tokenizer has no words for a message, and `render` is code of a user's.
    except Exception:
        return []


def _encode(
    tokenizer, render: Callable, most: int, observation: str | Sequence[int] | None
) -> list[int]:
    if isinstance(observation, str):
        observation = render(shorten(observation, most))
    if isinstance(observation, str):
        return tokenizer.encode(observation, add_special_tokens=False)
    # operator.index refuses floats, which int() would round.
    ids = [operator.index(token) for token in observation or ()]
    wrong = [token for token in ids if not 0 <= token < len(tokenizer)]
    if wrong:
        raise ValueError(
            f"observation has token {wrong[0]}, but the tokenizer has {len(tokenizer)} tokens"
        )
    return ids
