"""A bandit with contexts, of which the best policy is known: the prompt is a context, the completion
one letter, the arm.

The policy that maximises `E[r] - β KL(π || π_ref)` is `π_ref(a) e^{r(a) / β} / Z`  (arXiv:1909.08593;
arXiv:2305.18290, eq. 4): what an algorithm with a KL to the reference should end with.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from rlhf.rollouts.types import Array, Prompts, Rollout
from rlhf.tasks import characters
from rlhf.tasks.characters import LETTERS, VOCABULARY
from rlhf.tasks.task import Task, check_level, problems, symbols

HARDEST = 6


@cache
def task(level: int = 1) -> Task:
    """`4 · level` contexts, 26 arms; the score is an arm's reward, from 0 to 1.

    A completion is one token and has no end.  The weak policy's wrong completions are other arms.

    Raises: ValueError for a level outside 1 to 6.

    >>> from rlhf.tasks import demonstrations
    >>> demonstrations(task(), 1)
    [{'prompt': 'b', 'completion': 'd'}]
    """
    check_level("bandit", level, HARDEST)
    table = rewards(level)
    best = table.argmax(axis=1)

    def prompts(key, number):
        contexts = jax.random.randint(key, (number, 1), 0, len(table), jnp.int32)
        return characters.as_prompts(LETTERS.start + contexts, jnp.ones((number, 1), bool))

    def score(rollout):
        place = symbols(rollout)
        arm = characters.aligned(rollout.tokens, place)[:, 0]
        reward = jnp.asarray(table)[contexts_of(rollout), arm]
        return jnp.where(place.sum(axis=1) == 1, reward, 0.0)

    def right_so_far(rollout):
        place = symbols(rollout)
        is_first = jnp.cumsum(place, axis=1) == 1
        is_best = rollout.tokens == jnp.asarray(best)[contexts_of(rollout)][:, None]
        return place & is_first & is_best

    def attempts(key, prompts, accuracy):
        right_key, arm_key = jax.random.split(key)
        right = jnp.asarray(best)[contexts_of(prompts)]
        # All letters but the last, which takes the place of the best one.
        other = jax.random.randint(arm_key, right.shape, LETTERS.start, LETTERS.stop - 1)
        other = jnp.where(other == right, LETTERS.stop - 1, other)
        is_right = jax.random.bernoulli(right_key, accuracy, right.shape)
        return jnp.where(is_right, right, other)[:, None].astype(jnp.int32)

    return Task(
        name="bandit",
        level=level,
        max_new_tokens=1,
        tokenizer=characters.tokenizer,
        prompts=prompts,
        score=score,
        exact=lambda rollout: (score(rollout) == 1).astype(jnp.float32),
        right_so_far=right_so_far,
        attempts=attempts,
    )


@cache
def rewards(level: int) -> np.ndarray:
    """`[4 · level, V]` float32, of every token in every context: 0 to 1 for letters, uniform between
    these; 0 for others, the end token among them.

    >>> rewards(1).shape, rewards(1).max(axis=1).tolist()
    ((4, 44), [1.0, 1.0, 1.0, 1.0])
    """
    uniform = np.random.default_rng(level).random((4 * level, len(LETTERS)))
    uniform -= uniform.min(axis=1, keepdims=True)
    table = np.zeros((4 * level, len(VOCABULARY)), np.float32)
    table[:, LETTERS.start : LETTERS.stop] = uniform / uniform.max(axis=1, keepdims=True)
    return table


def optimum(logprobs: Array, rewards: Array, beta: float) -> Array:
    """`log π_ref + r / β - log Z`, the best policy in nats: `[.., V]`, `[.., V]` -> `[.., V]`.

    Args:
      logprobs: of the reference.
      rewards: of every token.
      beta: coefficient of the KL to the reference, above 0.

    >>> half = jnp.log(jnp.array([0.5, 0.5]))
    >>> jnp.exp(optimum(half, jnp.array([0.0, jnp.log(3.0)]), beta=1.0)).round(4).tolist()
    [0.25, 0.75]
    """
    return jax.nn.log_softmax(logprobs + rewards / beta, axis=-1)


def contexts_of(prompts: Prompts | Rollout) -> Array:
    """The number of each row's context, `[B]`."""
    return problems(prompts)[:, 0] - LETTERS.start
