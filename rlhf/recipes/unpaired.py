"""What recipes on answers with a verdict share: rows as arrays, and their log-probs under policy and reference."""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf import data, losses, rollouts
from rlhf.data.types import Row
from rlhf.fields import documented
from rlhf.lm import LM
from rlhf.recipes import coupled, setup
from rlhf.rollouts import Batch

Array = Any  # of JAX, or of NumPy on its way to the device


@documented
class Answers(NamedTuple):
    """Answers with a verdict: `[:, 0]` is a prompt with its completion, `[:, 1]`, for KTO, the prompt with another's.

    Attributes:
      tokens: [R, K, T] int32.
      mask: [R, K, T] bool, True on completion tokens.
      positions: [R, K, T] int32.
      segment_ids: [R, K, T] int32, 0 = padding.
      desirable: [R] bool.
      ref_logprobs: [R, K] float32, sequence log-probs under the reference.
    """

    tokens: Array
    mask: Array
    positions: Array
    segment_ids: Array
    desirable: Array
    ref_logprobs: Array | None = None


def lay_out(tokenizer, rows: list[Row], length: int, say: Callable, *, mismatched: bool = False) -> Answers:
    """Rows with a label as arrays, those of preferences and steps taken apart; what is cut or left out is said."""
    apart = lambda row: [row] if data.type_of(row) == data.UNPAIRED_PREFERENCE else data.unpaired(row)
    rows = list(data.checked((new for several in data.each(rows, apart) for new in several), data.UNPAIRED_PREFERENCE))
    kept = setup.truncated(data.tokenize_completions(tokenizer, rows), length=length, say=say)
    order = prompts_in_turn(kept.sides[0])
    own = [kept.sides[0][i] for i in order]
    sides = (own, *data.truncate(data.mismatched(own), length=length).sides) if mismatched else (own,)
    arrays = data.batch([sequence for row in zip(*sides, strict=True) for sequence in row])
    apart = lambda x: x.reshape(len(own), len(sides), -1)
    desirable = np.array([rows[i]["label"] for i in kept.kept[order]])
    return Answers(apart(arrays.tokens), apart(arrays.mask), apart(arrays.positions), apart(arrays.segment_ids), desirable)


def prompts_in_turn(rows: list[data.Tokenized]) -> list[int]:
    """An order of the rows: first of every prompt one row, then of every prompt a second, …

    So that the next row answers another prompt, also where a prompt's answers stand side by side.
    """
    seen: Counter[tuple[int, ...]] = Counter()
    turns = []
    for row in rows:
        prompt = tuple(row.tokens[: row.mask.index(True)])
        turns.append(seen[prompt])
        seen[prompt] += 1
    return sorted(range(len(rows)), key=turns.__getitem__)


def sequence_logprobs(lm: LM, params, answers: Answers):
    """`[R, K]`: the sums of completion log-probs; gradients flow through the row's own, `[:, 0]`."""

    def of(k, params):
        batch = Batch(*(x[:, k] for x in answers[:4]))
        logprobs = rollouts.score_batch(lm, params, batch).logprobs
        return losses.segment_sum(logprobs, batch.mask, batch.segment_ids)

    others = [of(k, jax.lax.stop_gradient(params)) for k in range(1, answers.tokens.shape[1])]
    return jnp.stack([of(0, params), *others], axis=-1)


def scores(lm: LM) -> Callable:
    """The `scores_fn` of `Answers` for `rlhf.coupled_train_step`; `params` are the policy's."""
    return lambda params, context, answers, key: sequence_logprobs(lm, params, answers)


def with_reference(policy: setup.Policy, answers: Answers, size: int) -> Answers:
    """The same with the log-probs of the model as it is now, computed once, `size` rows at a time."""
    context = policy.context() or {"reference": policy.params}
    one = jax.jit(lambda context, part: sequence_logprobs(policy.lm, policy.reference(context), part))
    return answers._replace(ref_logprobs=coupled.in_parts(lambda part: one(context, part), answers, size))


def check(objective: Callable, context: Any = ()) -> None:
    """Raises what an objective of `scores` raises of its knobs, before data and a model are there."""
    one, label = jax.ShapeDtypeStruct((1, 1), jnp.float32), jax.ShapeDtypeStruct((1,), bool)
    jax.eval_shape(objective, one, context, Answers(one, one, one, one, label, one))


def figures(rewards, desirable) -> dict[str, Array]:
    """The mean rewards of either label, and what lies between them."""
    mean = lambda mask: jnp.sum(jnp.where(mask, rewards, 0.0)) / jnp.maximum(mask.sum(), 1)
    better, worse = mean(desirable), mean(~desirable)
    return {"reward_desirable": better, "reward_undesirable": worse, "margin": better - worse}
