"""Scoring: what models say of tokens that are already there, in one pass through the trunk."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf import losses
from rlhf.fields import documented
from rlhf.lm import LM, Head, Params
from rlhf.rollouts.types import Array, Batch, Rollout, check_ids
from rlhf.sharding import by_rows, ways
from rlhf.shared_prefix import NOT_SHARED, SharedPrefix

# Of one device, whose logits exist at a time where the output matrix is gathered for them.
CHUNK_TOKENS = 4096


@documented
class Scored(NamedTuple):
    """What `score` returns; column `t` speaks of `tokens[:, t]`.

    Attributes:
      logprobs: [B, T] float32, log p(token | its sequence so far); 0 where not requested, at starts
        and at padding.
      entropy: [B, T] float32, nats, of the distribution the token was sampled from; 0 where logprobs
        is.
      values: per head [B, T] float32: its output before the token was read; 0 at starts and at
        padding.
      last_value: per head [B * max_segments] float32: its output after a sequence's last token.
      aux: what the model reports of itself.
    """

    logprobs: Array
    entropy: Array
    values: dict[str, Array]
    last_value: dict[str, Array]
    aux: dict[str, Array]


def score(
    lm: LM,
    params: Params,
    tokens: Array,
    *,
    positions: Array,
    segment_ids: Array,
    mask: Array | None = None,
    temperature=1.0,
    heads: dict[str, tuple[Head, Params]] | None = None,
    inputs: dict | None = None,
    shared: SharedPrefix | None = None,
    chunk_size: int = 64,
    max_segments: int = 1,
) -> Scored:
    """Log-probs and entropies of tokens under softmax(logits / temperature), and heads on the same
    hidden states.

    Never makes `[B, T, V]`: it rests on `losses.chunked`, and makes no logits of columns where no
    row has a token that is requested, such as those of prompts.  Gradients flow through `params`
    and the heads' parameters.

    Args:
      lm, params: a language model.
      tokens, positions, segment_ids: `[B, T]` int32; segment 0 is padding, and positions grow along
        a segment.
      mask: `[B, T]` bool, the tokens whose log-probs and entropies are requested; those of others
        are 0.  None: all.
      temperature: divides the logits; a number or `[]`.
      heads: name -> (head, its params).  A value head's `values` are V(s_t); a reward head's
        `last_value` is the reward.
      inputs: what the tokens are conditioned on, `[B, ...]`.
      shared: rows in groups with a common prefix, such as a prompt's samples: models that can
        (`lm.shares`) read it once, and the results are the same to rounding, but for `aux`, which
        counts it once.  A group whose rows do not share what they ought to gets NaN.
      chunk_size: the most columns whose logits exist at a time; where a mesh splits the output matrix
        by `fsdp`, at least those of 4,096 tokens of a device.
      max_segments: the most sequences in a packed row; static.

    Returns: `Scored`.

    Raises: ValueError on unequal shapes, tokens or positions of NumPy that the model has not (on a
    device they give NaN), rows
      that are no groups of `shared.group_size`, or a `shared.suffix` that leaves no prefix.
    """
    # One form for "nothing is shared", since it is a static argument: two would compile twice.
    shared = None if shared == NOT_SHARED else shared
    heads = heads or {}
    _check(
        tokens,
        positions=positions,
        segment_ids=segment_ids,
        **({} if mask is None else {"mask": mask}),
    )
    _check_shared(shared, tokens)
    if isinstance(tokens, np.ndarray):
        check_ids(lm, tokens, segment_ids, positions)
    names = tuple(heads)
    # Static parts of the heads apart from their parameters, which are traced.
    applies = tuple(heads[name][0].apply for name in names)
    length = tokens.shape[1]
    more, (tokens, positions, segment_ids, mask) = _widened(
        inputs, tokens, positions, segment_ids, mask
    )
    shared = shared and shared._replace(suffix=shared.suffix + more)
    scored = _score(
        lm,
        names,
        applies,
        shared,
        chunk_size,
        max_segments,
        params,
        tuple(heads[name][1] for name in names),
        tokens,
        positions,
        segment_ids,
        mask,
        jnp.asarray(temperature, jnp.float32),
        inputs,
    )
    if not more:
        return scored
    return scored._replace(
        logprobs=scored.logprobs[:, :length],
        entropy=scored.entropy[:, :length],
        values={name: x[:, :length] for name, x in scored.values.items()},
    )


def score_batch(lm: LM, params: Params, batch: Batch | Rollout, **options) -> Scored:
    """`score` of the trained tokens of a batch, or the sampled ones of a rollout, at its
    temperature.

    Args:
      lm, params: a language model.
      batch: log-probs and entropies are those of tokens where its `mask` is True, and 0 elsewhere;
        values are of all.
      options: `heads`, `shared`, `chunk_size` and `max_segments` of `score`.

    >>> from rlhf.models import TransformerConfig, transformer
    >>> from rlhf.rollouts import unpacked_rows
    >>> lm = transformer(TransformerConfig(vocab_size=8, hidden_size=4, num_layers=1, num_heads=1, mlp_size=8))
    >>> batch = unpacked_rows(jnp.array([[5, 6, 7]]), jnp.ones((1, 3), bool), jnp.array([[False, False, True]]))
    >>> score_batch(lm, lm.init(jax.random.key(0)), batch).logprobs.astype(bool).tolist()
    [[False, False, True]]
    """
    return score(
        lm,
        params,
        batch.tokens,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        mask=batch.mask,
        temperature=batch.temperature,
        inputs=batch.inputs,
        **options,
    )


def token_logprobs(
    lm: LM, params: Params, tokens: Array, *, positions, segment_ids, temperature=1.0, **kwargs
) -> Array:
    """`log p(tokens[:, t] | its sequence so far)`, `[B, T]`: the short form of `score`, with its
    arguments.
    """
    return score(
        lm,
        params,
        tokens,
        positions=positions,
        segment_ids=segment_ids,
        temperature=temperature,
        **kwargs,
    ).logprobs


def classify(
    lm: LM,
    head: Head,
    params: Params,
    tokens: Array,
    *,
    positions,
    segment_ids,
    inputs: dict | None = None,
    shared: SharedPrefix | None = None,
    max_segments: int = 1,
) -> Array:
    """What a head says of every text: a reward, the scores of labels, or a step's score at every
    token.

    Runs the trunk and the head alone; no logits over the vocabulary.  Gradients flow through
    `params`.

    Args:
      lm, head: a trunk and a head, for example of `models.huggingface.load_classifier`.
      params: `{"lm": …, "head": …}`.
      tokens, positions, segment_ids: `[B, T]` int32; segment 0 is padding.
      inputs: what the tokens are conditioned on, `[B, ...]`.
      shared: as in `score`.
      max_segments: the most sequences in a packed row; static.

    Returns: `[B * max_segments]`, or `[B * max_segments, K]` for K labels, read where `head.reads`
    says: at a sequence's last token, or its first (in rows of one sequence column 0, as
    transformers has it).  Heads that read every token: `[B, T]` or `[B, T, K]`.

    Raises: ValueError on unequal shapes, and for `shared` as `score`.
    """
    _check(tokens, positions=positions, segment_ids=segment_ids)
    _check_shared(shared, tokens)
    if isinstance(tokens, np.ndarray):
        check_ids(lm, tokens, segment_ids, positions)
    length = tokens.shape[1]
    more, (tokens, positions, segment_ids) = _widened(inputs, tokens, positions, segment_ids)
    shared = shared and shared._replace(suffix=shared.suffix + more)
    hidden, _ = _hidden(lm, params["lm"], tokens, positions, segment_ids, inputs, shared)
    if head.reads == "every":
        return head.apply(params["head"], hidden)[:, :length]
    last = losses.segments.last_columns(segment_ids, max_segments=max_segments)
    # A sequence starts one column after the end of the one before. For sequences that a row does
    # not have, the last column stands in.
    after = jnp.minimum(last[:, :-1] + 1, tokens.shape[1] - 1)
    first = jnp.pad(after, ((0, 0), (1, 0)))
    read = jnp.take_along_axis(
        hidden, (first if head.reads == "first" else last)[:, :, None], axis=1
    )
    return head.apply(params["head"], read.reshape(-1, hidden.shape[-1]))


@partial(jax.jit, static_argnums=range(6))
def _score(
    lm,
    names,
    applies,
    shared,
    chunk_size,
    max_segments,
    params,
    head_params,
    tokens,
    positions,
    segment_ids,
    mask,
    temperature,
    inputs,
):
    hidden, aux = _hidden(lm, params, tokens, positions, segment_ids, inputs, shared)
    # True where the token before belongs to the same sequence: a first token has no prediction.
    follows = (segment_ids != 0) & ~losses.segments.starts(segment_ids)
    requested = follows if mask is None else follows & mask

    # Hidden states at t predict token t + 1: shifted right by a column, column t speaks of token t.
    def before(x):
        return jnp.pad(x[:, :-1], ((0, 0), (1, 0)) + ((0, 0),) * (x.ndim - 2))

    def per_position(logits, token):
        logits = logits / temperature.astype(logits.dtype)
        return losses.logits.token_logprob(logits, token), losses.logits.entropy(logits)

    # Each chunk reads and writes the gradient of all of the output matrix, and with `tensor` gathers
    # the matrix too: as few chunks as fit are fewer bytes.
    if ways("embed") > 1:
        chunk_size = max(chunk_size, CHUNK_TOKENS * ways("batch") // tokens.shape[0])

    devices = ways("batch") * ways("sequence")

    def of_columns(part):
        # Whether a chunk has any that is needed is a question to all devices; one of completions
        # nearly always has.
        needed = requested[:, part] if devices == 1 or part.stop else None

        def of_rows(params, hidden, tokens, needed):
            return losses.chunked(
                per_position,
                hidden,
                partial(lm.unembed, params),
                tokens,
                chunk_size=chunk_size,
                needed=needed,
                parts=ways("sequence"),
            )

        return by_rows(of_rows, params, lm.axes(), before(hidden)[:, part], tokens[:, part], needed)

    # Cut where prompts end, so that chunks of prompts alone are skipped, and none holds both.  Not
    # where devices have a part of the columns each: the cut would move them.
    start = 0 if shared is None or ways("sequence") > 1 else tokens.shape[1] - shared.suffix
    parts = [of_columns(part) for part in ([slice(start)] if start else []) + [slice(start, None)]]
    logprobs, entropy = (jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True))
    # A head's value of state s_t is read before token t, like its prediction.
    outputs = {
        name: apply(p, hidden) for name, apply, p in zip(names, applies, head_params, strict=True)
    }
    last = losses.segments.last_columns(segment_ids, max_segments=max_segments)  # [B, S]
    return Scored(
        logprobs=jnp.where(requested, logprobs, 0.0),
        entropy=jnp.where(requested, entropy, 0.0),
        values={name: jnp.where(follows, before(x), 0.0) for name, x in outputs.items()},
        last_value={
            name: jnp.take_along_axis(x, last, axis=1).reshape(-1) for name, x in outputs.items()
        },
        aux=aux,
    )


def _widened(inputs, tokens: Array, *others: Array | None) -> tuple[int, list]:
    """How many columns of padding `[B, T]` need so that the mesh's axis `sequence` divides them, and
    the arrays with these.
    """
    # Of what a model is conditioned on some have the tokens' columns: left as they are, and whole.
    more = 0 if inputs else -tokens.shape[1] % ways("sequence")
    per_token = (tokens, *others)
    if not more:
        return 0, list(per_token)
    return more, [None if x is None else jnp.pad(x, ((0, 0), (0, more))) for x in per_token]


def _hidden(
    lm, params, tokens, positions, segment_ids, inputs, shared: SharedPrefix | None
) -> tuple[Array, dict]:
    """Hidden states `[B, T, D]`, NaN in groups whose rows do not share what they ought to; and what
    the model reports.
    """
    sharing = {"shared": shared} if shared and lm.shares else {}
    hidden, _, aux = lm.hidden(
        params, tokens, positions=positions, segment_ids=segment_ids, inputs=inputs, **sharing
    )
    if shared is not None:
        same = jnp.stack(
            [
                (x == shared.expand(shared.deduplicate(x))).all(1)
                for x in (tokens, positions, segment_ids)
            ]
        ).all(0)
        # NaN, since a traced comparison cannot raise: wrong groups must not train quietly.
        hidden = jnp.where(same[:, None, None], hidden, jnp.nan)
    return hidden, aux


def _check_shared(shared: SharedPrefix | None, tokens) -> None:
    rows, columns = tokens.shape
    if shared and (min(shared) < 1 or rows % shared.group_size or shared.suffix >= columns):
        raise ValueError(
            f"tokens {[rows, columns]} are not groups of {shared.group_size} rows that share all "
            "but the last "
            f"{shared.suffix} columns; "
            f"give rows that divide {rows}, and 1 to {columns - 1} columns of their own"
        )


def _check(tokens, **others) -> None:
    for name, x in others.items():
        if x.shape != tokens.shape or tokens.ndim != 2:
            raise ValueError(
                f"{name} {list(x.shape)} but tokens {list(tokens.shape)}; both must be [B, T]"
            )
