"""Nash mirror descent: the policy plays against a mixture of itself and the reference, and learns to be preferred."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf import losses, rollouts
from rlhf.fields import documented
from rlhf.lm import LM, geometric_mixture
from rlhf.loop import Training
from rlhf.metrics import Ratio
from rlhf.ranges import Share, Strength, checked
from rlhf.recipes import grpo, online, online_steps, setup
from rlhf.recipes.importance import Importance, Weigh
from rlhf.recipes.online import Drawing, Scoring
from rlhf.rollouts import Batch, Rollout
from rlhf.runs import RunFolder


@documented
class Games(NamedTuple):
    """Answers of the policy, and how they did.

    Attributes:
      batch: the policy's answers.
      preferred: [B] float32, the probability that an answer is preferred to its opponent's.
    """

    batch: Batch
    preferred: Any


def prepare(games: Games) -> Games:
    """The optimizer mini-batch with its weights: sums over an answer's tokens."""
    return games._replace(batch=grpo.prepare(games.batch, losses.weights.sequence_sum))


def objective(lm: LM, *, beta: float = 0.1) -> Callable:
    """The `loss_fn` of prepared `Games`; `params` are the policy's.  The loss means nothing by itself, its gradient does."""

    def loss_fn(params, context, games, key):
        batch = games.batch
        s = rollouts.score_batch(lm, params, batch)
        per_token = losses.online.nash_md(s.logprobs, batch.ref_logprobs, batch.mask, preferred=games.preferred, beta=beta)
        if batch.importance is not None:
            per_token = per_token * batch.importance
        entropy = Ratio(jnp.sum(s.entropy * batch.mask), batch.mask.sum().astype(jnp.float32))
        return losses.weighted_sum(per_token, batch.weights), {"entropy": entropy}

    return loss_fn


def experience(lm: LM, ref_params, rollout: Rollout, rewards, *, weigh: Weigh | None = None) -> tuple[Games, dict]:
    """The games of a rollout of `online.two_players`, the policy first; where a side has no score, nothing is trained.

    Args:
      rewards: `[B]`; an answer is preferred with the probability σ(its reward - the opponent's).
      weigh: importance weights of the policy's answers, where its sampler filters.
    """
    own: Rollout = setup.select(rollout, slice(0, None, 2))
    margin = rewards[::2] - rewards[1::2]
    scored = ~jnp.isnan(margin)
    preferred = jax.nn.sigmoid(jnp.where(scored, margin, 0.0))
    ref_logprobs = online.logprobs(lm, ref_params, own)
    batch = rollouts.batch_of(own, mask=own.mask & scored[:, None], ref_logprobs=ref_logprobs)
    seen: dict[str, Any] = {}
    if weigh is not None:
        importance, seen = weigh(own)
        batch = batch._replace(importance=importance)
    kl = online.rollout_metrics(own, rewards[::2], ref_logprobs)["kl_to_reference"]
    return Games(batch, preferred), {
        **online.duel_figures(rollout, rewards),
        "preferred": preferred.mean(),
        "kl_to_reference": kl,
        **seen,
    }


@checked
def main(
    model: setup.Model, source: online.Asking, training: Training, scoring: Scoring, drawing: Drawing,
    importance: Importance, output: str, *,
    beta: Strength = 0.1, mixture_coef: Share = 0.5, resume: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Nash learning from human feedback: an answer of the policy against one of a mixture of it and the model as it was.

    Rows have `prompt`, and the columns that the reward functions read.

    Args:
      output: a new folder for the run.
      beta: strength of the pull towards the reference, per nat.
      mixture_coef: the reference's share in the opponent, a geometric mixture.
      resume: go on with the run in the folder.
    """
    run = RunFolder(output, options=locals())
    model.check_decoder()
    begin = online_steps.start(run, model, source, training, scoring, drawing, rows=training.batch_size)
    policy = setup.policy(model, training.seed)
    params_of = online.params_of(policy)
    both = lambda state: (params_of(state), policy.reference(state.context))
    player = online.player(policy.lm, params_of, drawing, begin.eos_ids)
    opponent = online.player(geometric_mixture(policy.lm, mixture_coef=mixture_coef), both, drawing, begin.eos_ids)

    weigh = importance.weigh(drawing.sampler())

    def played(state, rollout, rewards):
        return state, *experience(policy.lm, policy.reference(state.context), rollout, rewards, weigh=weigh)

    _, figures = online_steps.learn(
        begin, policy, online.two_players(player, opponent), played, prepare, policy.of_whole(objective(policy.lm, beta=beta)),
        fixed=policy.context(with_reference=True), answer=player, shown=("reward", "opponent_reward"),
    )  # fmt: skip
    return figures
