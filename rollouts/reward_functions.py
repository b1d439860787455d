"""A catalogue of reward functions, for `rewards.score_texts` and `rewards.combine`; the last ones
ask a reward model.

`solution` is a column of texts or numbers, of which the final answer counts (`answers.final`); a
row without one is not scorable.  Completions are texts, or lists of messages, whose contents count.
`completion_ids` (the sampled tokens of each row) and `finished` are those of
`rewards.token_columns`.
"""

import importlib
import inspect
import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from rlhf.bound import Bound
from rlhf.lm import LM, Head
from rlhf.ranges import Length, between, checked
from rlhf.rollouts import answers
from rlhf.rollouts.rewards import RewardFunction, call, missing
from rlhf.rollouts.score import classify
from rlhf.rollouts.types import Array, Rollout, unpacked_rows


def exact_accuracy(prompts, completions, *, solution, **columns) -> list[float | None]:
    """`1[answer = solution]`, as texts, but for case, spacing, quotes and a full stop.

    >>> exact_accuracy(["Capital of France?"] * 2, ["#### paris.", "Lyon"], solution=["Paris", "Paris"])
    [1.0, 0.0]
    """
    true = [answers.normalised(answers.solution(s)) for s in solution]
    pairs = zip(map(answers.normalised, _texts(completions)), true, strict=True)
    return [float(answer == true) if true else None for answer, true in pairs]


def numeric_accuracy(
    prompts, completions, *, solution, tolerance: float = 0.0, **columns
) -> list[float | None]:
    """`1[|answer - solution| ≤ tolerance · max(|answer|, |solution|)]` of exact numbers, as
    `answers.number` reads them.

    A completion without a number gets 0.  None where the solution or the answer is an expression
    that is not understood, unless both are the same text; `math_accuracy` understands more.  For
    another tolerance: `functools.partial(numeric_accuracy, tolerance=1e-3)`.

    >>> numeric_accuracy([""] * 3, ["so $18.00", "about 17", "?"], solution=["9 * 2 = 18 #### 18"] * 2 + ["none"])
    [1.0, 0.0, None]
    >>> written = [r"\\boxed{2\\sqrt{3}}", r"\\boxed{\\sqrt{12}}", r"\\boxed{2x}"]
    >>> numeric_accuracy([""] * 3, written, solution=[r"2\\sqrt{3}"] * 3)
    [1.0, 1.0, None]
    """

    def one(completion, true):
        # The same text is right even where it is no number that is understood.
        if true and answers.alike(completion, true):
            return 1.0
        right = answers.number(true)
        if right is None:
            return None
        answer = answers.number(completion)
        if answer is None:
            return None if answers.is_mathematical(completion) else 0.0
        equal = answers.same(answer, right, tolerance=tolerance)
        return None if equal is None else float(equal)

    return [
        one(*row) for row in zip(_texts(completions), map(answers.solution, solution), strict=True)
    ]


def math_accuracy() -> RewardFunction:
    """`1[answer ≡ solution]` of mathematical expressions, parsed and compared by `math-verify`.

    Its own time limits rest on signals, which threads do not get, and are off: an expression may
    take for ever.  The command line's `--reward math` runs it in a process of its own; so does
    `workers.in_worker(math_accuracy(), timeout=…)`.

    Returns: `math_verified`.

    Raises: ImportError where `math-verify` is not installed.
    """
    try:
        importlib.import_module("math_verify")
    except ImportError as error:
        raise ImportError(
            "math_accuracy needs `pip install math-verify`; numeric_accuracy compares numbers "
            "without"
        ) from error
    return math_verified


def math_verified(prompts, completions, *, solution, **columns) -> list[float | None]:
    """What `math_accuracy` returns: None where the solution cannot be parsed, 0 where the
    completion cannot.

    Raises: ImportError where `math-verify` is not installed.
    """
    # Imported where it is used, since it is an optional dependency.
    import math_verify

    parse = partial(math_verify.parse, parsing_timeout=None)

    def one(completion, true):
        gold = parse(f"\\boxed{{{answers.final(true)}}}") if true else None
        return (
            float(math_verify.verify(gold, parse(completion), timeout_seconds=None))
            if gold
            else None
        )

    return [
        one(*row) for row in zip(_texts(completions), map(answers.solution, solution), strict=True)
    ]


def reasoning_accuracy(
    accuracy: RewardFunction = numeric_accuracy, *, delimiter: str = "</think>"
) -> RewardFunction:
    """`accuracy` of what follows the last `delimiter` alone; 0 where the reasoning does not end.

    Args:
      accuracy: the reward function of the answer.
      delimiter: what ends the reasoning.

    >>> completions = ["<think>9 * 2</think>18", "<think>it is 18"]
    >>> reasoning_accuracy()([""] * 2, completions, solution=["18", "18"])
    [1.0, 0.0]
    """

    def after_reasoning(prompts, completions, **columns):
        texts = _texts(completions)
        ended = [delimiter in text for text in texts]
        answered = [
            text.rpartition(delimiter)[2] if e else "" for text, e in zip(texts, ended, strict=True)
        ]
        # Through `call`, since the inner function may take fewer columns than there are.
        scores = call(accuracy, {**columns, "prompts": prompts, "completions": answered})
        return _then(
            scores,
            lambda scores: [
                s if e or s is None else 0.0 for s, e in zip(scores, ended, strict=True)
            ],
        )

    return _needs(after_reasoning, accuracy)


def think_format(prompts, completions, **columns) -> list[float]:
    """1 where a completion starts with `<think>…</think>` and holds no other such tag, else 0.

    >>> think_format([""] * 3, ["<think>so</think>18", "18", "<think>a</think><think>b</think>18"])
    [1.0, 0.0, 0.0]
    """

    def well_formed(c: str) -> bool:
        return c.startswith("<think>") and c.count("<think>") == c.count("</think>") == 1

    return [float(well_formed(c)) for c in _texts(completions)]


def regex_format(pattern: str) -> RewardFunction:
    """1 where a whole completion matches a regular expression, in which a dot matches line ends
    too, else 0.

    Raises: re.error on a malformed pattern.

    >>> regex_format(r".*#### -?\\d+")([""] * 2, ["6 * 3\\n#### 18", "18"])
    [1.0, 0.0]
    """
    compiled = re.compile(pattern, re.DOTALL)
    return lambda prompts, completions, **columns: [
        float(compiled.fullmatch(c) is not None) for c in _texts(completions)
    ]


@checked
def cosine_scaled(
    correctness: RewardFunction,
    max_length: Length,
    *,
    correct: tuple[float, float] = (1.0, 0.5),
    wrong: tuple[float, float] = (-1.0, -0.5),
) -> RewardFunction:
    """`end + (start - end) (1 + cos(π · min(length / max_length, 1))) / 2`: correct ones the better
    the shorter, wrong ones the better the longer  (arXiv:2502.03373).

    Args:
      correctness: a reward function; at least 0.5 is correct, None stays None.
      max_length: tokens.
      correct, wrong: `(start, end)`, the rewards at lengths 0 and `max_length`.

    Returns: a reward function, which reads `completion_ids`.

    Raises: ValueError where `max_length` is below 1.

    >>> reward = cosine_scaled(numeric_accuracy, 4)
    >>> reward([""] * 3, ["7", "7", "8"], solution=["7"] * 3, completion_ids=[[], [1] * 4, [1] * 2])
    [1.0, 0.5, -0.75]
    """

    def one(score, ids):
        if score is None:
            return None
        start, end = correct if score >= 0.5 else wrong
        return end + (start - end) * (1 + math.cos(math.pi * min(len(ids) / max_length, 1))) / 2

    def scaled(prompts, completions, *, completion_ids, **columns):
        given = {
            **columns,
            "prompts": prompts,
            "completions": completions,
            "completion_ids": completion_ids,
        }
        scores = call(correctness, given)
        return _then(
            scores, lambda scores: [one(*row) for row in zip(scores, completion_ids, strict=True)]
        )

    return _needs(scaled, correctness)


@checked
def soft_overlong(max_length: Length, cache: Length) -> RewardFunction:
    """0 up to `max_length - cache` tokens, from there down to -1 at `max_length`, -1 beyond  (DAPO,
    arXiv:2503.14476).

    Returns: a reward function, which reads `completion_ids`.

    Raises: ValueError where `cache` is outside [1, max_length].

    >>> soft_overlong(10, 4)([""] * 4, [""] * 4, completion_ids=[[0] * n for n in (6, 7, 10, 11)])
    [0.0, -0.25, -1.0, -1.0]
    """
    if cache > max_length:
        raise ValueError(
            f"cache must be at least 1 and at most max_length = {max_length} tokens, but is {cache}"
        )
    penalty = lambda length: max(min((max_length - cache - length) / cache, 0.0), -1.0)
    return lambda prompts, completions, *, completion_ids, **columns: [
        penalty(len(ids)) for ids in completion_ids
    ]


@checked
def repetition_penalty(
    *, ngram: Length = 3, max_penalty: Annotated[float, between(-1000, 0)] = -1.0
) -> RewardFunction:
    """`max_penalty · (1 - distinct n-grams / n-grams)` of the sampled tokens  (arXiv:2502.03373).

    Args:
      ngram: tokens.
      max_penalty: the reward of endless repetition, at most 0.

    Returns: a reward function, which reads `completion_ids`; 0 where a completion is shorter than
    an n-gram.

    Raises: ValueError where `ngram` is below 1 or `max_penalty` above 0.

    >>> repetition_penalty(ngram=2)([""] * 2, [""] * 2, completion_ids=[[1, 2, 1, 2, 1], [7]])
    [-0.5, 0.0]
    """

    def one(ids):
        grams = list(zip(*(ids[i:] for i in range(ngram)), strict=False))
        return max_penalty * (1 - len(set(grams)) / len(grams)) if grams else 0.0

    return lambda prompts, completions, *, completion_ids, **columns: [
        one(ids) for ids in completion_ids
    ]


def length(prompts, completions, *, completion_ids, **columns) -> list[float]:
    """The number of sampled tokens.

    >>> length([""], [""], completion_ids=[[5, 6]])
    [2.0]
    """
    return [float(len(ids)) for ids in completion_ids]


@checked
def missing_end(penalty: Annotated[float, between(-1000, 1000)] = -1.0) -> RewardFunction:
    """`penalty` where a completion was cut before its end token, else 0  (arXiv:2403.17031).

    Returns: a reward function, which reads `finished`.

    >>> missing_end(-2.0)([""] * 2, [""] * 2, finished=[True, False])
    [0.0, -2.0]
    """
    return lambda prompts, completions, *, finished, **columns: [
        0.0 if done else penalty for done in finished
    ]


def model_reward(lm: LM, head: Head, params) -> Partial:
    """What a reward model says of a rollout: `Rollout -> [B]` float32, on the device; the model
    must share its tokens.

    Args:
      lm, head: a trunk and a head of one number.
      params: `{"lm": …, "head": …}`.

    Returns: a `jax.tree_util.Partial`, whose leaves are `params`: it can be an argument of a jitted
    function.  No gradient.

    Raises: ValueError where the head gives more than one number a row; where called.
    """
    return Partial(Bound(_of_rollout, (lm, head)), params)


def model_text_reward(lm: LM, head: Head, params, tokenizer, *, max_length: int) -> RewardFunction:
    """What a reward model with a tokenizer of its own says of `prompt + completion`, for rollouts
    in other tokens.

    Args:
      lm, head: a trunk and a head of one number.
      params: `{"lm": …, "head": …}`.
      tokenizer: the reward model's, of `transformers`.
      max_length: columns of the batch, in its tokens; a longer text is not scorable.

    Returns: a reward function.

    Raises: ValueError where the head gives more than one number a row; where called.
    """

    def reward(prompts, completions, **columns):
        texts = [tokenizer.encode(p + c) for p, c in zip(prompts, completions, strict=True)]
        fits = [0 < len(text) <= max_length for text in texts]
        tokens, real = np.zeros((2, len(texts), max_length), np.int32)
        # A row that is left out is one token of padding: a row without any has no last token.
        real[:, 0] = 1
        for row, text in enumerate(texts):
            if fits[row]:
                tokens[row, : len(text)] = text
                real[row, : len(text)] = 1
        batch = unpacked_rows(tokens, real.astype(bool))
        scores = np.asarray(
            _classify(lm, head, params, batch.tokens, batch.positions, batch.segment_ids, None)
        )
        return [float(s) if fit else None for s, fit in zip(scores, fits, strict=True)]

    return reward


def score_rows(
    lm: LM, head: Head, params, rows: Sequence[Sequence[int]], *, max_length: int | None = None
) -> np.ndarray:
    """What a reward model says of texts in its own tokens.

    Args:
      lm, head: a trunk and a head of one number.
      params: `{"lm": …, "head": …}`.
      rows: B lists of token ids; an empty one is not scorable.
      max_length: the most tokens it reads, such as its learned positions: of a longer text the
        first and the last ones; None: all.

    Returns: `[B]` float32, NaN for an empty row.

    Raises: ValueError where the head gives more than one number a row.
    """
    if max_length is not None:
        rows = [
            row if len(row) <= max_length else [row[0], *row[len(row) - max_length + 1 :]]
            for row in rows
        ]
    longest = max((len(row) for row in rows), default=1) or 1
    # Powers of two from 16 on: a program is compiled for each width.
    width = 1 << max(longest - 1, 15).bit_length()
    width = width if max_length is None else min(width, max_length)
    tokens, real = np.zeros((2, len(rows), width), np.int32)
    # An empty row is one token of padding: a row without any has no last token.
    real[:, 0] = 1
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
        real[number, : len(row)] = 1
    batch = unpacked_rows(tokens, real.astype(bool))
    scores = np.asarray(
        _classify(lm, head, params, batch.tokens, batch.positions, batch.segment_ids, None)
    )
    return np.where([len(row) > 0 for row in rows], scores, np.float32("nan"))


def _of_rollout(lm, head, params, rollout: Rollout) -> Array:
    return _classify(
        lm, head, params, rollout.tokens, rollout.positions, rollout.segment_ids, rollout.inputs
    )


@partial(jax.jit, static_argnums=(0, 1))
def _classify(lm, head, params, tokens, positions, segment_ids, inputs):
    scores = classify(
        lm, head, params, tokens, positions=positions, segment_ids=segment_ids, inputs=inputs
    )
    if scores.shape != tokens.shape[:1]:
        raise ValueError(
            f"the head gives {list(scores.shape)} for {tokens.shape[0]} rows; a reward is one "
            "number a row, [B]: "
            "read labels or steps with rollouts.classify"
        )
    return jax.lax.stop_gradient(scores.astype(jnp.float32))


def _texts(completions) -> list[str]:
    """Completions as texts: of lists of messages, what they say, one message a line."""
    return [
        c if isinstance(c, str) else "\n".join(message["content"] for message in c)
        for c in completions
    ]


def _needs(outer: RewardFunction, inner: RewardFunction) -> RewardFunction:
    """`outer`, whose signature says that it needs what `inner` needs, which it calls."""
    signature = inspect.signature(outer)
    # The columns that the inner function needs become parameters of the outer one, so that a
    # missing one is named before a run starts.
    names = [
        name for name in missing(inner, signature.parameters) if name not in signature.parameters
    ]
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    *first, columns = signature.parameters.values()
    outer.__signature__ = signature.replace(parameters=[*first, *more, columns])  # type: ignore[attr-defined]
    return outer


def _then(scores, change):
    """`change(scores)`, also where an async function has yet to give them."""
    if not inspect.isawaitable(scores):
        return change(scores)

    async def later():
        return change(await scores)

    return later()
