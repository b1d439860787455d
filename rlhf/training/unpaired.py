"""What recipes on completions with a label share: rows as arrays, and their log-probs under policy
and reference.
"""

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
from rlhf.rollouts import Batch
from rlhf.training import datasets
from rlhf.training.loading import Loaded
from rlhf.training.policy import Policy

Array = Any  # of JAX, or of NumPy on its way to the device


@documented
class Unpaired(NamedTuple):
    """Completions with a label: `[:, 0]` is a prompt with its completion, `[:, 1]`, for KTO, the
    prompt with another's.

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


def lay_out(
    tokenizer, rows: list[Row], length: int, say: Callable, *, mismatched: bool = False
) -> Unpaired:
    """Rows with a label as arrays, those of preferences and steps taken apart; what is cut or left
    out is said.
    """

    # A pair is two rows, its chosen completion labelled true and its rejected one false.
    def labelled(row: Row) -> list[Row]:
        return [row] if data.type_of(row) == data.UNPAIRED_PREFERENCE else data.unpaired(row)

    of_rows = data.each(rows, labelled)
    all_rows = (new for several in of_rows for new in several)
    number = len(rows)
    rows = list(data.checked(all_rows, data.UNPAIRED_PREFERENCE))
    if len(rows) != number:
        say(f"{number} rows were taken apart into {len(rows)} completions with a label")
    fitting = datasets.truncated(data.tokenize_completions(tokenizer, rows), length=length, say=say)
    # KTO's KL takes a row's prompt with the completion of the next row, which must be of another
    # prompt.
    order = prompts_in_turn(fitting.sides[0])
    rows_of_pairs = [fitting.sides[0][i] for i in order]
    sides = (
        (rows_of_pairs, *data.truncate(data.mismatched(rows_of_pairs), length=length).sides)
        if mismatched
        else (rows_of_pairs,)
    )
    # A row's sequences lie side by side, `[R * K, T]`, until they are `[R, K, T]` below.
    arrays = data.batch([sequence for row in zip(*sides, strict=True) for sequence in row])

    def in_rows(x):
        return x.reshape(len(rows_of_pairs), len(sides), -1)

    desirable = np.array([rows[i]["label"] for i in fitting.remaining[order]])
    return Unpaired(
        tokens=in_rows(arrays.tokens),
        mask=in_rows(arrays.mask),
        positions=in_rows(arrays.positions),
        segment_ids=in_rows(arrays.segment_ids),
        desirable=desirable,
    )


def prompts_in_turn(rows: list[data.Tokenized]) -> list[int]:
    """An order of the rows: first of every prompt one row, then of every prompt a second, …

    So that the next row completes another prompt, also where a prompt's completions stand side by
    side.
    """
    counts: Counter[tuple[int, ...]] = Counter()
    turns = []
    for row in rows:
        prompt = tuple(row.tokens[: row.mask.index(True)])
        turns.append(counts[prompt])
        counts[prompt] += 1
    # `sorted` is stable: within a turn rows stay in their order.
    return sorted(range(len(rows)), key=turns.__getitem__)


def sequence_logprobs(lm: LM, params, rows: Unpaired):
    """`[R, K]`: the log-probs of whole completions; gradients flow through the row's own, `[:,
    0]`.
    """

    def of_column(k, params):
        batch = Batch(
            tokens=rows.tokens[:, k],
            mask=rows.mask[:, k],
            positions=rows.positions[:, k],
            segment_ids=rows.segment_ids[:, k],
        )
        logprobs = rollouts.score_batch(lm, params, batch).logprobs
        return losses.segment_sum(logprobs, batch.mask, batch.segment_ids)

    # The KL is where the loss is measured from, not a term that is trained  (arXiv:2402.01306).
    fixed = jax.lax.stop_gradient(params)
    others = [of_column(k, fixed) for k in range(1, rows.tokens.shape[1])]
    return jnp.stack([of_column(0, params), *others], axis=-1)


def make_scores(policy: Policy) -> Callable:
    """The `scores_fn` of `rlhf.coupled_train_step`: log-probs of whole completions."""

    def scores_fn(params, context, rows, key):
        return sequence_logprobs(policy.lm, policy.full_params(params, context, key), rows)

    return scores_fn


def with_reference(loaded: Loaded, rows: Unpaired, size: int) -> Unpaired:
    """The same with log-probs of the model as it is now, computed once, `size` rows at a time."""
    policy = loaded.policy
    context = loaded.reference_context()

    @jax.jit
    def ref_logprobs(context, part):
        return sequence_logprobs(policy.lm, policy.reference_params(context), part)

    found = datasets.in_parts(ref_logprobs, rows, size, loaded.mesh, context)
    return rows._replace(ref_logprobs=found)


def check(objective: Callable, context: Any = ()) -> None:
    """Raises what an objective of `scores` raises of its options, before data and a model are
    there.
    """
    # Traced on shapes: options are checked, and nothing is computed.
    one = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    label = jax.ShapeDtypeStruct((1,), bool)
    jax.eval_shape(objective, one, context, Unpaired(one, one, one, one, label, one))


def reward_metrics(rewards, desirable) -> dict[str, Array]:
    """The mean rewards of rows labelled true and of those labelled false, and their difference."""

    def mean(mask):
        # A batch may have labels of one kind alone: the mean of none is 0 rather than NaN.
        return jnp.sum(jnp.where(mask, rewards, 0.0)) / jnp.maximum(mask.sum(), 1)

    chosen = mean(desirable)
    rejected = mean(~desirable)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
    }
