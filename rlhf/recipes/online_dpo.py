"""Online DPO: answers are drawn as training goes, and the best of a prompt's is preferred to the worst.

The objective compares log-probs at temperature 1, whatever temperature the answers are drawn at.
"""

from collections.abc import Callable
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from rlhf import losses
from rlhf.lm import SharedPrefix
from rlhf.loop import Training
from rlhf.losses import preference
from rlhf.ranges import Count, Strength, between, checked
from rlhf.recipes import dpo, online, online_steps, reward, setup
from rlhf.recipes import pairs as pairs_of
from rlhf.recipes.online import Drawing, Scoring
from rlhf.rollouts import Pairs, Rollout
from rlhf.runs import RunFolder

LOSSES: dict[str, Callable] = {"sigmoid": preference.sigmoid, "ipo": preference.ipo}
objective = dpo.objective  # the `loss_fn` of prepared `Pairs`
prepare = reward.prepare  # the optimizer mini-batch with its weights: pairs in which there is something to prefer


def experience(rollout: Rollout, rewards, *, num_samples: int) -> tuple[Pairs, jax.Array, dict]:
    """The best and the worst answer of each prompt as `Pairs`; where none is better, neither is trained.

    Args:
      rewards: `[B]`, NaN where a completion could not be scored.
      num_samples: completions a prompt, contiguous.

    Returns: the pairs; `[P, 2]` int32, which of a prompt's answers they are; and figures.
    """
    chosen, rejected, margin = losses.online.pairs_by_score(rewards.reshape(-1, num_samples))
    picked = jnp.stack([chosen, rejected], axis=1)

    def sides(x):
        return jnp.take_along_axis(x.reshape(-1, num_samples, x.shape[-1]), picked[:, :, None], axis=1)

    mask = sides(rollout.mask) & (margin > 0)[:, None, None]
    pairs = Pairs(
        sides(rollout.tokens),
        mask,
        sides(rollout.positions),
        sides(rollout.segment_ids),
        inputs=jax.tree.map(sides, rollout.inputs),
    )
    return pairs, picked, {"reward_margin": margin.mean(), "preferred": (margin > 0).mean()}


@checked
def main(
    model: setup.Model,
    source: online.Asking,
    training: Training,
    scoring: Scoring,
    drawing: Drawing,
    output: str,
    *,
    num_samples: Annotated[int, between(2, 65_536)] = 2,
    loss: Literal["sigmoid", "ipo"] = "sigmoid",
    beta: Strength = 0.1,
    mini_batches: Count = 1,
    resume: bool = False,
) -> dict[str, float]:
    """Online DPO: samples several answers, and learns to prefer the best of them to the worst.

    Rows have `prompt`, and the columns that the reward functions read.

    Args:
      output: a new folder for the run.
      num_samples: answers a prompt, at least 2.
      loss: DPO's own, or IPO's on means over tokens.
      beta: strength of the pull towards the reference, per nat.
      mini_batches: optimizer steps on the pairs of a step.
      resume: go on with the run in the folder.
    """
    run = RunFolder(output, options=locals())
    pairs_of.check(LOSSES[loss], beta=beta)
    begin = online_steps.start(
        run, model, source, training, scoring, drawing, rows=training.batch_size, mini_batches=mini_batches
    )  # fmt: skip
    policy = setup.policy(model, training.seed)
    sample = online.player(policy.lm, online.params_of(policy), drawing, begin.eos_ids, num_samples)
    shared = SharedPrefix(2, drawing.max_new_tokens)
    loss_fn = policy.of_whole(objective(policy.lm, beta=beta, loss=LOSSES[loss], shared=shared))

    def preferred(state, rollout, rewards):
        pairs, _, seen = experience(rollout, rewards, num_samples=num_samples)
        return state, dpo.prepare(policy.lm, policy.reference(state.context), pairs, shared=shared), seen

    _, figures = online_steps.learn(
        begin, policy, sample, preferred, prepare, loss_fn,
        fixed=policy.context(with_reference=True), shown=("reward", "accuracy"),
    )  # fmt: skip
    return figures
