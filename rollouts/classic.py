"""Conveniences: text in and text out, the best of n, pass@k, lengths at random, and batches of
prompts of like length.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf.fields import documented
from rlhf.lm import LM, Params
from rlhf.rollouts import text
from rlhf.rollouts.filtering import concatenate, group_scores, take_groups, take_samples
from rlhf.rollouts.generate import generate as _generate
from rlhf.rollouts.types import Array, Prompts, Rollout

BUCKETS = tuple(64 * 2**i for i in range(12))  # tokens, up to 131,072
PER_TOKEN = ("tokens", "mask", "positions", "segment_ids", "logprobs", "sampling_logprobs")


@documented
class Best(NamedTuple):
    """What `best_of_n` returns.

    Attributes:
      rollout: [P * keep, T], each prompt's best first.
      scores: [P, keep] float32, NaN where fewer samples could be scored.
    """

    rollout: Rollout
    scores: Array


def sample_length(key: Array, low: int, high: int) -> Array:
    """A length sampled evenly from `low … high - 1`, as classic TRL's `LengthSampler(low, high)`.

    `generate` compiles once for each `max_new_tokens`, so keep the range short.

    Args:
      key: consumed.
      low, high: tokens.

    Returns: `[]` int32; `int(…)` of it is a `max_new_tokens`.

    Raises: ValueError unless 1 <= low < high.

    >>> sample_length(jax.random.key(0), 4, 5).item()
    4
    """
    if not 1 <= low < high:
        raise ValueError(
            f"lengths are sampled from low … high - 1, 1 <= low < high, but low is {low} and high "
            f"{high}"
        )
    return jax.random.randint(key, (), low, high)


def respond(
    lm: LM,
    params: Params,
    tokenizer,
    texts: Sequence[str],
    key: Array,
    *,
    max_new_tokens: int,
    num_samples: int = 1,
    eos_ids: tuple[int, ...] | None = None,
    buckets: Sequence[int] = BUCKETS,
    add_special_tokens: bool = True,
    generate: Callable = _generate,
    **settings,
) -> list:
    """Text in, text out: what the model says after each text.

    Args:
      lm, params: the policy.
      tokenizer: a `transformers` tokenizer.
      texts: P prompts.
      key: consumed.
      max_new_tokens, num_samples, settings: for `generate`, such as `sampler=rollouts.greedy()`.
      eos_ids: tokens that end a text; None: the tokenizer's end token.
      buckets: widths that prompts are padded to, so that few programs compile.
      add_special_tokens: whether the tokenizer adds its own; False for text from a chat template,
        which has them.
      generate: `rollouts.generate`, or an engine with its signature.

    Returns: P texts without special tokens; P lists of `num_samples` texts where that is above 1.

    Raises: TypeError where `texts` is one string, ValueError where one has no tokens or more than
    the largest bucket.

    >>> from rlhf.tasks import reviews
    >>> echo = lambda lm, params, prompts, key, **settings: Rollout(prompts.tokens, prompts.mask, *[None] * 6)
    >>> respond(None, None, reviews.tokenizer(), ["the film", "the plot"], None, max_new_tokens=2, generate=echo)
    ['the film', 'the plot']
    """
    if isinstance(texts, str):
        raise TypeError(f"texts must be a list of texts, but is one: write [{texts[:20]!r}]")
    prompts = text.encode(tokenizer, texts, add_special_tokens=add_special_tokens)
    # Columns of padding on the left that bring the prompts to a bucket.
    more = bucket(prompts.tokens.shape[1], buckets) - prompts.tokens.shape[1]
    pad = lambda x: np.pad(x, ((0, 0), (more, 0)))
    prompts = Prompts(pad(prompts.tokens), pad(prompts.mask))
    if eos_ids is None:
        eos_ids = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    settings = (
        dict(max_new_tokens=max_new_tokens, num_samples=num_samples, eos_ids=eos_ids) | settings
    )
    said = text.completions(tokenizer, generate(lm, params, prompts, key, **settings))
    return (
        said
        if num_samples == 1
        else [said[i : i + num_samples] for i in range(0, len(said), num_samples)]
    )


def best_of_n(
    lm: LM,
    params: Params,
    prompts: Prompts,
    key: Array,
    *,
    n: int,
    score: Callable,
    keep: int = 1,
    generate: Callable = _generate,
    **settings,
) -> Best:
    """Samples n completions a prompt and keeps the `keep` with the highest scores  (best of n,
    arXiv:2009.01325).

    Args:
      lm, params: the policy.
      prompts: `[P, L]`.
      key: consumed.
      n: samples a prompt.
      score: `(Rollout) -> [P * n]` scores, or a list of them; NaN or None: not scorable, which
        comes last.
      keep: samples a prompt that are returned.
      generate: `rollouts.generate`, or an engine with its signature.
      settings: for `generate`; `max_new_tokens` is one that it needs.

    Returns: `Best(rollout, scores)`, a prompt's samples from the best down, the first of equals.

    Raises: ValueError where keep is not in 1 … n, or there is not one score a row.

    >>> sampled = Rollout(*[np.arange(4)[:, None]] * 6, finished=None, temperature=None)  # of an engine: 2 prompts, 2 samples
    >>> score, engine = lambda rollout: [9.0, 1.0, None, 2.0], lambda *arguments, **settings: sampled
    >>> best = best_of_n(None, None, None, None, n=2, score=score, generate=engine)
    >>> best.rollout.tokens.tolist(), best.scores.tolist()
    ([[0], [3]], [[9.0], [2.0]])
    """
    if not 1 <= keep <= n:
        raise ValueError(f"best_of_n keeps {keep} of {n} samples; keep must be in 1 … n")
    rollout = generate(lm, params, prompts, key, num_samples=n, **settings)
    scores = group_scores(score(rollout), rollout, n)
    # JAX sorts are stable, and put NaN last: of equals the first comes first.
    best = jnp.argsort(-scores, axis=-1)[:, :keep]
    return Best(take_samples(rollout, best, n), jnp.take_along_axis(scores, best, axis=-1))


def pass_at_k(correct, k: int, *, n: int | None = None) -> Array:
    """`1 - C(n - c, k) / C(n, k)`: the chance that one of k samples passes, without bias
    (arXiv:2107.03374, eq. 1).

    The quotient is `Π_{j < k} (1 - c / (n - j))`, summed as logarithms.

    Args:
      correct: `[P, n]` bool, or 1 and 0, NaN where a sample could not be scored, which is left out;
        or, with `n`, the counts c `[P]`.
      k: samples that one has; static.
      n: samples a prompt, where `correct` are counts.

    Returns: `[P]` float32, NaN where fewer than k samples are scored.  Not to be mixed up with
    `losses.groups.pass_at_k`, the advantages that train for it.

    Raises: ValueError where k is not in 1 … n, shapes are wrong, or a count is not in 0 … n.

    >>> pass_at_k(jnp.array([[True, False, False, False], [True, True, True, False]]), 2).tolist()
    [0.5, 1.0]
    """
    correct = jnp.asarray(correct, float)
    if correct.ndim != (2 if n is None else 1):
        raise ValueError(
            f"correct must be [P, n], or with n the counts [P], but is {list(correct.shape)} and n "
            f"is {n}"
        )
    most = correct.shape[1] if n is None else n
    if not 1 <= k <= most:
        raise ValueError(f"k is {k} but there are {most} samples a prompt; k must be in 1 … n")
    if n is None:
        scored = ~jnp.isnan(correct)
        passed = jnp.where(scored, correct, 0.0).sum(-1)
        number = scored.sum(-1)
    else:
        passed = correct
        number = jnp.full(correct.shape, n)
        if not isinstance(correct, jax.core.Tracer) and not bool(
            ((correct >= 0) & (correct <= n)).all()
        ):
            raise ValueError(
                f"correct has counts {correct.min():g} … {correct.max():g} but there are {n} "
                "samples a prompt"
            )
    # n - j for j < k, of each prompt; at least 1 where too few samples are scored, whose result is
    # NaN anyway.
    left = jnp.maximum(number[:, None] - jnp.arange(k)[None, :], 1)
    # c / (n - j) above 1 means that fewer than k failed: some sample passes for certain.
    failing = jnp.log1p(-jnp.minimum(passed[:, None] / left, 1.0)).sum(-1)
    # -expm1(x) is 1 - exp(x) without its cancellation.
    return jnp.where(number >= k, -jnp.expm1(failing), jnp.nan)


def bucket(length: int, buckets: Sequence[int] = BUCKETS) -> int:
    """The smallest of `buckets` that is at least `length`: shapes out of a short list compile few
    programs.

    Args:
      length: tokens.
      buckets: widths in tokens, in any order.

    Returns: a width.

    Raises: ValueError where the length is below 1 or above all buckets.

    >>> bucket(65), bucket(64), bucket(3, (4, 8))
    (128, 64, 4)
    """
    fitting = [size for size in buckets if size >= length]
    if length < 1 or not fitting:
        raise ValueError(
            f"a length of {length} tokens but buckets of {list(buckets)}; shorten it or add a "
            "larger bucket"
        )
    return min(fitting)


def by_length(
    prompts: Prompts | Sequence[Sequence[int]],
    buckets: Sequence[int] = BUCKETS,
    *,
    rows: int | None = None,
) -> list[tuple[np.ndarray, Prompts]]:
    """Prompts in batches of like length, each padded on the left to a bucket.

    With a key for every prompt, a prompt samples the same in whatever batch it is:
    `in_order([(i,
    generate(lm, params, batch, keys[i], …)) for i, batch in by_length(prompts, rows=32)])`.

    Args:
      prompts: `[N, L]`, padded anywhere, or N lists of token ids.
      buckets: widths, in tokens.
      rows: of every batch, so that a bucket compiles one program; the last batch of a bucket
        repeats its last prompt.  None: a bucket is one batch, of as many rows as it has.

    Returns: batches from the shortest to the longest, as (indices of the prompts, `Prompts`).

    Raises: ValueError on no prompts, rows below 1, and a prompt without tokens or longer than all
    buckets; it names the prompt.
      TypeError for texts, which are tokenised first.

    >>> [(i.tolist(), batch.tokens.tolist()) for i, batch in by_length([[7, 8, 9], [5], [6]], (1, 4))]
    [([1, 2], [[5], [6]]), ([0], [[0, 7, 8, 9]])]
    """
    ids, inputs = _ids(prompts)
    if not ids or (rows is not None and rows < 1):
        raise ValueError(
            f"by_length needs at least 1 prompt and batches of at least 1 row, but has {len(ids)} "
            f"and rows={rows}"
        )
    for i, prompt in enumerate(ids):
        if not 1 <= len(prompt) <= max(buckets):
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens but buckets hold 1 … {max(buckets)}; shorten "
                "it or add a bucket"
            )
    sizes = np.array([bucket(len(prompt), buckets) for prompt in ids])
    batches = []
    for size in np.unique(sizes).tolist():
        members = np.flatnonzero(sizes == size)
        each = rows or len(members)
        for start in range(0, len(members), each):
            index = members[start : start + each]
            # The last batch repeats its last prompt, so that the bucket needs one program alone.
            index = np.pad(index, (0, each - len(index)), mode="edge")
            batches.append(
                (
                    index,
                    _pack(
                        [ids[i] for i in index], size, jax.tree.map(lambda x, i=index: x[i], inputs)
                    ),
                )
            )
    return batches


def in_order(parts: Sequence[tuple[np.ndarray, Rollout]]) -> Rollout:
    """One rollout of the rollouts of `by_length`'s batches, in the order of the prompts.

    Args:
      parts: (indices of prompts, rollout of `len(indices) * G` rows); all prompts 0 … N - 1 are
        there, and of repeated ones the first counts.

    Returns: `[N * G, T]`, T of the widest; the others get more padding on the left.

    Raises: ValueError where a prompt is missing, or the rollouts differ in their samples a prompt.

    >>> part = lambda tokens: Rollout(*[jnp.array(tokens)] * 6, finished=None, temperature=None)
    >>> in_order([(np.array([1]), part([[5]])), (np.array([0]), part([[7, 8]]))]).tokens.tolist()
    [[7, 8], [0, 5]]
    """
    index = np.concatenate([indices for indices, _ in parts])
    # Repeated prompts, which fill up batches, count the first time.
    found, first = np.unique(index, return_index=True)
    samples = {len(rollout.tokens) / len(indices) for indices, rollout in parts}
    if len(samples) != 1 or min(samples) % 1 or found.tolist() != list(range(len(found))):
        raise ValueError(
            f"parts have the prompts {found.tolist()} with {sorted(samples)} samples each; give "
            "every prompt from 0 on, with "
            "equally many samples"
        )
    width = max(rollout.tokens.shape[1] for _, rollout in parts)
    return take_groups(
        concatenate([_pad_left(rollout, width) for _, rollout in parts]), first, int(samples.pop())
    )


def _pad_left(rollout: Rollout, width: int) -> Rollout:
    pad = lambda x: jnp.pad(x, ((0, 0), (width - x.shape[1], 0)))
    fields: dict[str, Any] = {name: pad(getattr(rollout, name)) for name in PER_TOKEN}
    return rollout._replace(**fields)


def _ids(prompts) -> tuple[list[list[int]], dict | None]:
    """The tokens of every prompt, and what they are conditioned on."""
    if not isinstance(prompts, Prompts):
        if isinstance(prompts, str) or any(isinstance(ids, str) for ids in prompts):
            raise TypeError(
                "prompts must be lists of token ids, but are texts; give tokenizer(text).input_ids "
                "of each"
            )
        return [list(ids) for ids in prompts], None
    tokens = np.asarray(prompts.tokens)
    mask = np.asarray(prompts.mask)
    return [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)], prompts.inputs


def _pack(ids: list[list[int]], width: int, inputs: dict | None) -> Prompts:
    lengths = np.array([len(row) for row in ids])
    # Assigning through a mask goes row by row, as the concatenated rows do.
    mask = np.arange(width)[None, :] >= width - lengths[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate(ids)
    return Prompts(tokens, mask, inputs)
