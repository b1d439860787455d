"""Exploratory preference optimisation: the policy's answer against the reference's, with optimism about what is new."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from rlhf import losses
from rlhf.fields import documented
from rlhf.lm import LM, SharedPrefix
from rlhf.loop import Training
from rlhf.losses import preference
from rlhf.ranges import Coefficient, Strength, checked
from rlhf.recipes import dpo, online, online_dpo, online_steps, setup
from rlhf.recipes import pairs as pairs_of
from rlhf.recipes.online import Drawing, Scoring
from rlhf.rollouts import Pairs
from rlhf.runs import RunFolder


@documented
class Duels(NamedTuple):
    """Pairs of an answer of the policy and one of the reference.

    Attributes:
      pairs: the two answers to each prompt.
      reference_won: [R] bool, whether the chosen one is the reference's.
    """

    pairs: Pairs
    reference_won: Any


def prepare(duels: Duels) -> Duels:
    """The optimizer mini-batch with its weights."""
    return duels._replace(pairs=online_dpo.prepare(duels.pairs))


def objective(
    lm: LM, *, alpha: float = 1e-5, beta: float = 0.1, loss: Callable = preference.sigmoid, shared: SharedPrefix | None = None
) -> Callable:
    """The `loss_fn` of prepared `Duels`; `params` are the policy's, `loss` a preference objective."""

    def loss_fn(params, context, duels, key):
        logprobs = dpo.sequence_logprobs(lm, params, duels.pairs, shared=shared)
        of_reference = jnp.where(duels.reference_won, logprobs[:, 0, 0], logprobs[:, 0, 1])

        @wraps(loss)
        def optimistic(*logprobs, **knobs):
            return losses.online.xpo(*logprobs, from_reference=of_reference, alpha=alpha, loss=partial(loss, **knobs))

        return dpo.comparison(beta=beta, loss=optimistic)(logprobs, context, duels.pairs)

    return loss_fn


@checked
def main(
    model: setup.Model, source: online.Asking, training: Training, scoring: Scoring, drawing: Drawing, output: str, *,
    alpha: Coefficient = 1e-5, loss: Literal["sigmoid", "ipo"] = "sigmoid", beta: Strength = 0.1, resume: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Exploratory preference optimisation: the policy's answers against those of the model as it was, the better preferred.

    Rows have `prompt`, and the columns that the reward functions read.

    Args:
      output: a new folder for the run.
      alpha: weight of the optimism, which makes the reference's answers less likely.
      loss: DPO's own, or IPO's on means over tokens.
      beta: strength of the pull towards the reference, per nat.
      resume: go on with the run in the folder.
    """
    run = RunFolder(output, options=locals())
    pairs_of.check(online_dpo.LOSSES[loss], beta=beta)
    begin = online_steps.start(run, model, source, training, scoring, drawing, rows=training.batch_size)
    policy = setup.policy(model, training.seed)
    player = online.player(policy.lm, online.params_of(policy), drawing, begin.eos_ids)
    opponent = online.player(policy.lm, lambda state: policy.reference(state.context), drawing, begin.eos_ids)
    shared = SharedPrefix(2, drawing.max_new_tokens)
    loss_fn = policy.of_whole(objective(policy.lm, alpha=alpha, beta=beta, loss=online_dpo.LOSSES[loss], shared=shared))

    def preferred(state, rollout, rewards):
        pairs, picked, seen = online_dpo.experience(rollout, rewards, num_samples=2)
        pairs = dpo.prepare(policy.lm, policy.reference(state.context), pairs, shared=shared)
        return state, Duels(pairs, picked[:, 0] == 1), {**seen, **online.duel_figures(rollout, rewards)}

    _, figures = online_steps.learn(
        begin, policy, online.two_players(player, opponent), preferred, prepare, loss_fn,
        fixed=policy.context(with_reference=True), answer=player, shown=("reward", "opponent_reward"),
    )  # fmt: skip
    return figures
