"""Scoring: what models say of tokens that are already there, in one pass through the trunk."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

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
    rows = Batch(tokens, mask, positions, segment_ids, temperature, inputs=inputs)
    options = {"chunk_size": chunk_size, "max_segments": max_segments}
    return _run(lm, params, rows, None, heads=heads, shared=shared, **options)[1]


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


def score_loss(
    lm: LM, params: Params, batch: Batch, fn: Callable, **options
) -> tuple[Array, Scored]:
    """`Σ w fn(logprobs, entropy, batch)`, a loss that treats each token by itself, and what
    `score_batch` says of the tokens, in one pass.

    `score_batch` has to make all logits again for the gradient; here the gradient of a chunk of
    columns is taken while its logits are there (`losses.chunked_sum`).  Losses that look at whole
    sequences, as GSPO's, need `score_batch`.

    Args:
      lm, params: a language model.
      batch: rows with their weights w, and all that `fn` reads of them.
      fn: `(logprobs [B, C], entropy [B, C], batch) -> [B, C]`, of any C columns: the batch has those
        of its `[B, T]` fields, and neither temperature nor inputs.  Static: what is not jitted
        compiles again for another function.  Gradients flow through log-probs and entropy.
      options: `heads`, `shared`, `chunk_size` and `max_segments` of `score`.  Of a shared prefix no
        token is trained: a row whose mask is True there gets NaN.

    Returns: the loss, a scalar, through which gradients flow to `params`; and `Scored`, whose
    log-probs and entropies have no gradient.

    Raises: as `score`; ValueError where the batch has no weights, or `fn` does not return `[B, C]`.

    >>> from rlhf.models import TransformerConfig, transformer
    >>> from rlhf.rollouts import unpacked_rows
    >>> lm = transformer(TransformerConfig(vocab_size=8, hidden_size=4, num_layers=1, num_heads=1, mlp_size=8))
    >>> batch = unpacked_rows(jnp.array([[5, 6, 7]]), jnp.ones((1, 3), bool), jnp.array([[False, False, True]]))
    >>> batch = batch._replace(weights=losses.weights.token_mean(batch.mask))
    >>> nll = lambda logprobs, entropy, batch: losses.cross_entropy(logprobs, batch.mask)
    >>> loss, scored = score_loss(lm, lm.init(jax.random.key(0)), batch, nll)
    >>> jnp.allclose(loss, -scored.logprobs[0, 2]).item()
    True
    """
    return _run(lm, params, batch, fn, **options)


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
    more, (tokens, positions, segment_ids) = _widened(inputs, (tokens, positions, segment_ids))
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


def _run(
    lm: LM,
    params: Params,
    batch: Batch,
    fn: Callable | None,
    *,
    heads: dict[str, tuple[Head, Params]] | None = None,
    shared: SharedPrefix | None = None,
    chunk_size: int = 64,
    max_segments: int = 1,
) -> tuple[Array | None, Scored]:
    """`score_loss`, or without `fn` `score`, whose loss is None; a batch without a mask is requested
    in full.
    """
    # One form for "nothing is shared", since it is a static argument: two would compile twice.
    shared = None if shared == NOT_SHARED else shared
    heads = heads or {}
    if fn is not None and batch.weights is None:
        raise ValueError("weights is None; set them in the batch: batch._replace(weights=...)")
    rows = batch._replace(temperature=None, inputs=None)
    _check(**{name: x for name, x in rows._asdict().items() if x is not None})
    _check_shared(shared, rows.tokens)
    if isinstance(rows.tokens, np.ndarray):
        check_ids(lm, rows.tokens, rows.segment_ids, rows.positions)
    length = rows.tokens.shape[1]
    more, rows = _widened(batch.inputs, rows)
    loss, scored = _score(
        lm,
        tuple(heads),
        # Static parts of the heads apart from their parameters, which are traced.
        tuple(head.apply for head, _ in heads.values()),
        shared and shared._replace(suffix=shared.suffix + more),
        chunk_size,
        max_segments,
        fn,
        params,
        tuple(head_params for _, head_params in heads.values()),
        rows,
        jnp.asarray(batch.temperature, jnp.float32),
        batch.inputs,
    )
    if not more:
        return loss, scored
    return loss, scored._replace(
        logprobs=scored.logprobs[:, :length],
        entropy=scored.entropy[:, :length],
        values={name: x[:, :length] for name, x in scored.values.items()},
    )


@partial(jax.jit, static_argnums=range(7))
def _score(
    lm,
    names,
    applies,
    shared,
    chunk_size,
    max_segments,
    fn,
    params,
    head_params,
    rows,
    temperature,
    inputs,
):
    tokens, segment_ids = rows.tokens, rows.segment_ids
    hidden, aux = _hidden(lm, params, tokens, rows.positions, segment_ids, inputs, shared)
    # True where the token before belongs to the same sequence: a first token has no prediction.
    follows = (segment_ids != 0) & ~losses.segments.starts(segment_ids)
    requested = follows if rows.mask is None else follows & rows.mask

    prefix = 0 if shared is None else tokens.shape[1] - shared.suffix
    if fn is not None:
        # NaN, since a traced comparison cannot raise.
        misplaced = requested[:, :prefix].any(1)
        hidden = jnp.where(misplaced[:, None, None], jnp.nan, hidden)

    # Hidden states at t predict token t + 1: shifted right by a column, column t speaks of token t.
    def before(x):
        return jnp.pad(x[:, :-1], ((0, 0), (1, 0)) + ((0, 0),) * (x.ndim - 2))

    def of_logits(logits, tokens, requested):
        logits = logits / temperature.astype(logits.dtype)
        scores = losses.logits.token_logprob_and_entropy(logits, tokens)
        return tuple(jnp.where(requested, x, 0.0) for x in scores)

    def with_loss(logits, tokens, requested, rows):
        scores = of_logits(logits, tokens, requested)
        return fn(*scores, rows), scores

    # Each chunk reads and writes the gradient of all of the output matrix, and with `tensor` gathers
    # the matrix too: as few chunks as fit are fewer bytes.
    if ways("embed") > 1:
        chunk_size = max(chunk_size, CHUNK_TOKENS * ways("batch") // tokens.shape[0])

    devices = ways("batch") * ways("sequence")

    def of_columns(part):
        # Whether a chunk has any that is needed is a question to all devices; one of completions
        # nearly always has.
        needed = requested[:, part] if devices == 1 or part.stop else None

        def of_rows(params, hidden, tokens, requested, rows, needed):
            unembed = partial(lm.unembed, params)
            options = {"chunk_size": chunk_size, "needed": needed, "parts": ways("sequence")}
            if fn is None:
                return None, losses.chunked(
                    of_logits, hidden, unembed, tokens, requested, **options
                )
            loss, scores = losses.chunked_sum(
                with_loss, hidden, unembed, rows.weights, tokens, requested, rows, **options
            )
            # A row of each group of devices, which are added below.
            return loss[None], scores

        arrays = before(hidden), tokens, requested, rows if fn else None
        return by_rows(
            of_rows, params, lm.axes(), *jax.tree.map(lambda x: x[:, part], arrays), needed
        )

    # Cut where prompts end, so that chunks of prompts alone are skipped, and none holds both.  Not
    # where devices have a part of the columns each: the cut would move them.
    start = 0 if ways("sequence") > 1 else prefix
    suffix = of_columns(slice(start, None))
    if not start:
        loss, scores = suffix
    elif fn is None:
        loss, scores = jax.tree.map(
            lambda *x: jnp.concatenate(x, axis=1), of_columns(slice(start)), suffix
        )
    else:
        # Nothing of a prefix is trained.
        loss, scores = suffix[0], [jnp.pad(x, ((0, 0), (start, 0))) for x in suffix[1]]
    logprobs, entropy = scores
    # A head's value of state s_t is read before token t, like its prediction.
    outputs = {
        name: apply(p, hidden) for name, apply, p in zip(names, applies, head_params, strict=True)
    }
    last = losses.segments.last_columns(segment_ids, max_segments=max_segments)  # [B, S]
    return None if loss is None else loss.sum(), Scored(
        logprobs=logprobs,
        entropy=entropy,
        values={name: jnp.where(follows, before(x), 0.0) for name, x in outputs.items()},
        last_value={
            name: jnp.take_along_axis(x, last, axis=1).reshape(-1) for name, x in outputs.items()
        },
        aux=aux,
    )


def _widened(inputs, arrays: Any) -> tuple[int, Any]:
    """How many columns of padding `[B, T]` need so that the mesh's axis `sequence` divides them, and
    the arrays with these.
    """
    length = jax.tree.leaves(arrays)[0].shape[1]
    # Of what a model is conditioned on some have the tokens' columns: left as they are, and whole.
    more = 0 if inputs else -length % ways("sequence")
    if not more:
        return 0, arrays
    return more, jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, more))), arrays)


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
