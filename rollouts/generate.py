"""Sampling completions: prompts are read once, then compiled loops run over new tokens.

`generate` gives every completion a row of its own; `generate_many` runs any number of them through
a fixed number of rows, each of which takes the next prompt once its completion has ended.  Row,
prompt and key decide what is sampled, and nothing else.
"""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp

from rlhf.lm import EXPERTS, LM, Params
from rlhf.rollouts import samplers
from rlhf.rollouts.decoding import (
    Rows,
    Settings,
    align_right,
    alive,
    checked,
    complete,
    decoder,
    logprobs_of,
    new_columns,
    repeat,
    row_keys,
)
from rlhf.rollouts.types import Array, Prompts, Rollout, check_ids

MAX_STAGES = 4  # loops that a long completion is decoded in
MIN_TOKENS = 16  # new tokens of a stage, at least


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
    record_experts: bool = False,
) -> Rollout:
    """Samples `num_samples` completions of every prompt, in one jitted program.

    A prompt is read once; its keys and values serve all its samples.  The cache grows in up to four
    stages, each a loop of 16 tokens or more, so that attention reads few columns that hold nothing
    yet.  A row's random numbers depend on its own key and position alone.  `key` is consumed.

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
      early_end: stop when all rows have ended.  False: a loop of fixed length, for runs that are
        vmapped.
      record_experts: of a mixture, put the experts of every token that was read into the rollout's
        `inputs["experts"]`, `[B, T, sparse layers, k]`: scored with them, the tokens go to the
        experts that they went to, though the router's own choice may differ by rounding or by
        another step of training (R3, arXiv:2510.11370).

    Returns: a `Rollout` of `B = P * num_samples` rows and `T = S + L + max_new_tokens` columns; row
    `p * num_samples + g` is sample g of prompt p.  No gradient flows.

    Raises: ValueError on wrong shapes or counts, a prompt without tokens, a token or an end token
    beyond the vocabulary, more
      tokens than a model has learned positions, or a prefix for prompts with inputs of their own;
      TypeError on a mask that is not bool.

    >>> from rlhf.models import TransformerConfig, transformer
    >>> lm = transformer(TransformerConfig(vocab_size=9, hidden_size=4, num_layers=1, num_heads=1, mlp_size=8))
    >>> prompts = Prompts(jnp.array([[1, 5], [0, 7]]), jnp.array([[True, True], [False, True]]))
    >>> rollout = generate(lm, lm.init(jax.random.key(0)), prompts, jax.random.key(1), max_new_tokens=3)
    >>> rollout.mask.astype(int).tolist(), rollout.positions.tolist()
    ([[0, 0, 1, 1, 1], [0, 0, 1, 1, 1]], [[0, 1, 2, 3, 4], [0, 0, 1, 2, 3]])
    """
    settings = checked(prompts, key, max_new_tokens, num_samples, eos_ids, pad_id, record_experts)
    _check_prefix(prefix, prompts, record_experts)
    _check_ids(lm, prompts, prefix, settings)
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
    record_experts: bool = False,
) -> Rollout:
    """As `generate`, with continuous batching: `slots` rows decode at a time, and rows that have
    ended take the next prompts.

    It gives what `generate` gives with the same key, whatever the number of slots (log-probs to
    rounding), and pays where the lengths of completions differ.

    Args:
      lm, params: the policy.
      prompts: `[P, L]`, padded anywhere; they are shifted to end in column L.
      key: one key, or `[P]` keys, one a prompt, which then samples the same in whatever company.
      slots: rows that decode at a time; at least `num_samples`, since a prompt's samples start
        together.
      max_new_tokens: the most tokens sampled a row; the end token counts.
      num_samples: completions a prompt.
      sampler: from `samplers.sampler` or `samplers.greedy`.
      eos_ids: tokens that end a row; the end token itself is saved and trained on.
      stop: of `stop_strings`, texts that end a row; None: none.
      prefix: `[S]` int32 tokens before every prompt, read once for all: a common system prompt.
      pad_id: what stands in `tokens` after the end.
      refill: prompts that are read together, once so many rows are free; None: an eighth of the
        slots.
      record_experts: as in `generate`.

    Returns: a `Rollout` of `B = P * num_samples` rows and `T = S + L + max_new_tokens` columns; row
    `p * num_samples + g` is sample g of prompt p.  No gradient flows.

    Raises: ValueError on wrong shapes or counts, a prompt without tokens, a token or an end token
    beyond the vocabulary, more tokens than a model has learned positions, a prefix for prompts with
    inputs of their own, or fewer slots than the samples of the prompts that are read together;
    TypeError on a mask that is not bool.

    >>> from rlhf.models import TransformerConfig, transformer
    >>> lm = transformer(TransformerConfig(vocab_size=9, hidden_size=4, num_layers=1, num_heads=1, mlp_size=8))
    >>> params, key = lm.init(jax.random.key(0)), jax.random.key(1)
    >>> prompts = Prompts(jnp.array([[5], [7], [8]]), jnp.ones((3, 1), bool))
    >>> few = generate_many(lm, params, prompts, key, slots=2, max_new_tokens=4)
    >>> bool((few.tokens == generate(lm, params, prompts, key, max_new_tokens=4).tokens).all())
    True
    """
    settings = checked(prompts, key, max_new_tokens, num_samples, eos_ids, pad_id, record_experts)
    _check_prefix(prefix, prompts, record_experts)
    _check_ids(lm, prompts, prefix, settings)
    # An eighth: reading a prompt pays off over several rows, and waiting rows do nothing.
    refill = max(1, slots // (8 * num_samples)) if refill is None else refill
    if refill < 1 or slots < refill * num_samples:
        raise ValueError(
            f"{slots} slots but {refill} prompts of {num_samples} samples are read together; give "
            "at least "
            f"{max(refill, 1) * num_samples} slots"
        )
    return _generate_many(lm, settings, slots, refill, params, prompts, key, sampler, stop, prefix)


@partial(jax.jit, static_argnums=range(3))
def _generate(lm, settings, early_end, params, prompts, key, sampler, stop, prefix):
    """Stage by stage, each a loop of its own: until a later one begins, attention reads none of its
    columns.
    """
    parts = decoder(lm, settings, params, sampler, stop, prefix, _width(prompts, settings))
    rows = parts.sample_next(*parts.prefill(prompts, row_keys(key, prompts, settings)))
    new = settings.max_new_tokens
    length = prompts.tokens.shape[1]
    # Short completions are one loop: a stage costs a compiled loop and a copy of the cache.
    stages = max(1, min(MAX_STAGES, new // MIN_TOKENS))
    for start, end in pairwise(new * i // stages for i in range(stages + 1)):
        rows = complete(
            parts.decode, parts.widen(rows, length + end), settings, early_end, max(1, start), end
        )
    return _rollout(rows, prompts, prefix, settings, sampler)


@partial(jax.jit, static_argnums=range(4))
def _generate_many(lm, settings, slots, refill, params, prompts, key, sampler, stop, prefix):
    """An outer loop that reads prompts, and an inner one that decodes until there is room for the
    next ones.
    """
    number = prompts.tokens.shape[0]
    samples = settings.num_samples
    refill_rows = refill * settings.num_samples
    total = number * samples
    width = _width(prompts, settings)
    parts = decoder(lm, settings, params, sampler, stop, prefix, width)
    keys = row_keys(key, prompts, settings)

    def start(next_prompt):
        """The next prompts' rows with their first tokens; rows beyond the last prompt are over
        before they begin.
        """
        of_prompts = next_prompt + jnp.arange(refill)
        of_rows = next_prompt * samples + jnp.arange(refill_rows)
        # Beyond the last prompt the last one is read again, since shapes stay; `beyond` ends its
        # rows.
        some = jax.tree.map(lambda x: jnp.take(x, of_prompts, axis=0, mode="clip"), prompts)
        rows = parts.widen(
            parts.sample_next(*parts.prefill(some, jnp.take(keys, of_rows, mode="clip"))), width
        )
        beyond = of_rows >= total
        return rows._replace(finished=rows.finished | beyond), jnp.where(beyond, total, of_rows)

    def fill(state):
        rows, of_row, done, next_prompt = state
        # Finished completions are saved before their slots are written over.
        done = _flush(done, rows, of_row)
        new, of_new = start(next_prompt)
        # False first: the rows that are over, in their order.
        free = jnp.argsort(alive(rows, settings), stable=True)[:refill_rows]
        rows, of_row = jax.tree.map(
            lambda old, new: old.at[free].set(new), (rows, of_row), (new, of_new)
        )

        def room(state):
            going = alive(state, settings)
            # Decoding stops for the next prompts only when all of their rows find a slot.
            waiting = (next_prompt + refill < number) & (slots - going.sum() >= refill_rows)
            return going.any() & ~waiting

        return jax.lax.while_loop(room, parts.decode, rows), of_row, done, next_prompt + refill

    # `eval_shape` runs nothing: the first refill happens inside the loop, like all others.
    shapes, _ = jax.eval_shape(start, jnp.int32(0))

    def empty(tree, rows: int):
        return jax.tree.map(
            lambda x: jnp.broadcast_to(jnp.zeros((), x.dtype), (rows, *x.shape[1:])), tree
        )

    rows = empty(shapes, slots)._replace(finished=jnp.ones(slots, bool))
    # The cache of a finished row is not needed, and would be as large as all prompts'.
    done = empty(shapes._replace(cache=None, inputs=None), total)
    state = rows, jnp.full(slots, total, jnp.int32), done, jnp.int32(0)
    rows, of_row, done, _ = jax.lax.while_loop(lambda state: state[-1] < number, fill, state)
    return _rollout(_flush(done, rows, of_row), prompts, prefix, settings, sampler)


def _width(prompts: Prompts, settings: Settings) -> int:
    return prompts.tokens.shape[1] + settings.max_new_tokens


def _flush(done: Rows, rows: Rows, of_row: Array) -> Rows:
    """Slots copied to the rows of the result that they hold; those that hold none are dropped."""
    rows = rows._replace(cache=None, inputs=None)
    return jax.tree.map(
        lambda all_rows, some: all_rows.at[of_row].set(some, mode="drop"), done, rows
    )


def _rollout(rows: Rows, prompts: Prompts, prefix, settings: Settings, sampler) -> Rollout:
    start = prompts.tokens.shape[1]
    tokens = rows.tokens
    segment_ids = rows.segment_ids | new_columns(rows)
    logprobs, sampling_logprobs = logprobs_of(rows)
    # The prefix moves up to its prompt: a rollout has its padding on the left, not between them.
    if prefix is not None:
        before = Prompts(
            jnp.concatenate(
                [jnp.broadcast_to(prefix, (tokens.shape[0], prefix.shape[0])), tokens[:, :start]],
                axis=1,
            ),
            jnp.pad(
                segment_ids[:, :start] != 0, ((0, 0), (prefix.shape[0], 0)), constant_values=True
            ),
        )
        start += prefix.shape[0]
        aligned, real, _ = align_right(before)
        tokens = jnp.concatenate([aligned, tokens[:, -settings.max_new_tokens :]], axis=1)
        segment_ids = jnp.concatenate([real, segment_ids[:, -settings.max_new_tokens :]], axis=1)
    columns = jnp.arange(tokens.shape[1])[None, :]
    sampled = (segment_ids != 0) & (columns >= start)
    # `first` is the position of column `start`, from which all others are counted.
    positions = jnp.where(segment_ids != 0, columns - (start - rows.first)[:, None], 0)
    widen = lambda x: jnp.pad(x, ((0, 0), (start, 0)))
    inputs = repeat(prompts.inputs, settings.num_samples)
    if rows.experts is not None:
        inputs = {**(inputs or {}), EXPERTS: rows.experts}
    return Rollout(
        tokens=tokens,
        mask=sampled,
        positions=positions.astype(jnp.int32),
        segment_ids=segment_ids,
        logprobs=widen(logprobs),
        sampling_logprobs=widen(sampling_logprobs),
        finished=rows.finished,
        temperature=jnp.asarray(sampler.temperature, jnp.float32),
        inputs=inputs,
    )


def _check_prefix(prefix, prompts: Prompts, record_experts: bool) -> None:
    if prefix is not None and record_experts:
        raise ValueError(
            "record_experts with a prefix, which is read once for all; write it before each prompt"
        )
    if prefix is not None and prefix.ndim != 1:
        raise ValueError(
            f"prefix {list(prefix.shape)} but it must be [S], the same tokens for every prompt"
        )
    if prefix is not None and prompts.inputs is not None:
        raise ValueError(
            "a prefix is read once for all, but these prompts have inputs of their own; write it "
            "before each"
        )


def _check_ids(lm: LM, prompts: Prompts, prefix, settings: Settings) -> None:
    ahead = 0 if prefix is None else prefix.shape[0]
    check_ids(lm, prompts.tokens, prompts.mask, more=ahead + settings.max_new_tokens)
    if prefix is not None:
        check_ids(lm, prefix[None], jnp.ones((1, ahead), bool))
