"""Nash mirror descent: the policy plays against a mixture of itself and the reference, and learns
to be preferred.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf import losses, rollouts
from rlhf.fields import documented
from rlhf.metrics import Ratio
from rlhf.mixture import geometric_mixture
from rlhf.ranges import Share, Strength
from rlhf.rollouts import Batch, Rollout
from rlhf.train import minibatches, run_minibatches, train_step
from rlhf.training import collecting, datasets, model_info, online
from rlhf.training import sampling as sample_of
from rlhf.training.importance import ImportanceOptions, Weigh, weighted
from rlhf.training.loading import load_policy
from rlhf.training.optimizers import make_optimizer
from rlhf.training.options import (
    Callbacks,
    MeshOptions,
    ModelOptions,
    PromptOptions,
    RewardOptions,
    SamplingOptions,
    TrainingOptions,
)
from rlhf.training.policy import Policy
from rlhf.training.recipe import recipe
from rlhf.training.runs import RunFolder
from rlhf.training.sampling import policy_sampler, rollout_metrics
from rlhf.training.trained import Trained, result
from rlhf.typing import UpdateFn


@documented
class Games(NamedTuple):
    """Completions of the policy, and how they did.

    Attributes:
      batch: the policy's completions.
      preferred: [B] float32, the probability that a completion is preferred to its opponent's.
    """

    batch: Batch
    preferred: Any


def make_loss(policy: Policy, *, beta: float = 0.1) -> Callable:
    """The `loss_fn` of `Games` with weights.  Its value means nothing, its gradient is that of the
    regularised game.

    Args:
      policy: what is trained.
      beta: strength of the pull towards the reference, per nat.
    """

    def loss_fn(params, context, games, key):
        batch = games.batch
        scored = policy.score(params, context, batch, key=key)
        per_token = losses.online.nash_md(
            scored.logprobs, batch.ref_logprobs, batch.mask, preferred=games.preferred, beta=beta
        )
        if batch.importance is not None:
            per_token = per_token * batch.importance
        # Weights below sum to more than 1 (sums over sequences): entropy is a ratio of its own.
        number = batch.mask.sum().astype(jnp.float32)
        metrics = {"entropy": Ratio(jnp.sum(scored.entropy * batch.mask), number)}
        return losses.weighted_sum(per_token, batch.weights), metrics

    return loss_fn


def play(policy: Policy, context: Any, rollout: Rollout, rewards) -> tuple[Games, dict]:
    """The games of a rollout, of which row 2p is the policy's completion of prompt p, row 2p + 1
    the opponent's.

    Args:
      policy: what is trained.
      context: of the state, with the reference.
      rollout: `[2P, T]`.
      rewards: `[2P]`; a completion is preferred with the probability σ(its reward - the
        opponent's).  Where either has no reward (NaN), nothing is trained.

    Returns: the games, and metrics.
    """
    of_policy: Rollout = datasets.select(rollout, slice(0, None, 2))
    # Rows alternate: the policy's completion, then the opponent's.
    margin = rewards[::2] - rewards[1::2]
    has_rewards = ~jnp.isnan(margin)
    # NaN times a mask of 0 would still be NaN: a row without rewards gets a number here.
    preferred = jax.nn.sigmoid(jnp.where(has_rewards, margin, 0.0))
    ref_logprobs = policy.reference_logprobs(context, of_policy)
    batch = rollouts.batch_of(
        of_policy, mask=of_policy.mask & has_rewards[:, None], ref_logprobs=ref_logprobs
    )
    metrics = {
        **sample_of.pair_metrics(rollout, rewards),
        "preferred": preferred.mean(),
        "objective/kl": rollout_metrics(of_policy, rewards[::2], ref_logprobs)["objective/kl"],
    }
    return Games(batch, preferred), metrics


def make_update(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    beta: float = 0.1,
    micro_batches: int = 1,
    importance: Weigh | None = None,
) -> UpdateFn:
    """Nash-MD: the policy plays against a geometric mixture of itself and the reference
    (arXiv:2312.00886).

    The default beta is that of TRL 1.13, the last with this trainer.

    Args:
      policy: what is trained; its reference is in the state's context.
      optimizer: any optax transformation.
      beta: strength of the pull towards the reference, per nat.
      micro_batches: parts of a step, taken one after the other; the result is the same.
      importance: of `ImportanceOptions.weigh`, where the sampler's filters make it another than the
        policy; None: no weights.

    Returns: `update(state, rollout, rewards, key) -> (state, metrics)`, pure; rollout and rewards
    are those of `play`.
    """
    step = train_step(make_loss(policy, beta=beta), optimizer, micro_batches=micro_batches)

    def minibatch_step(state, games):
        # Whole completions: the preference is one of sequences, and longer ones are not made to
        # count less.
        weights = losses.weights.sequence_sum(games.batch.mask, games.batch.segment_ids)
        return step(state, games._replace(batch=games.batch._replace(weights=weights)))

    def update(state, rollout, rewards, key):
        games, metrics = play(policy, state.context, rollout, rewards)
        batch, mismatch = weighted(
            importance, games.batch, datasets.select(rollout, slice(0, None, 2))
        )
        games = games._replace(batch=batch)
        state, of_steps = run_minibatches(minibatch_step, state, minibatches(key, games, 1))
        return state, {**of_steps, **metrics, **mismatch}

    return update


@recipe
def main(
    model: ModelOptions,
    dataset: PromptOptions,
    *,
    training: TrainingOptions = TrainingOptions(learning_rate=5e-7),
    mesh: MeshOptions,
    sampling: SamplingOptions = SamplingOptions(max_new_tokens=64, temperature=0.9),
    reward: RewardOptions,
    importance: ImportanceOptions,
    output: str,
    beta: Strength = 0.1,
    mixture_coef: Share = 0.5,
    resume: bool = False,
    callbacks: Callbacks = (),
) -> Trained:
    """Nash learning from human feedback: the policy's completions against those of a mixture of it
    and the reference.

    Rows have `prompt`, and the columns that the reward functions read.  Learning rate and sampling
    are TRL 1.13's, the last with this trainer.

    Args:
      output: a new folder for the run.
      beta: strength of the pull towards the reference, per nat.
      mixture_coef: the reference's share in the opponent, a geometric mixture.
      resume: go on with the run in the folder.
      callbacks: `(step, metrics)` functions, called with every line of the log.
    """
    # 1. Everything that can be wrong is found before the model loads.
    run = RunFolder(output, options=locals())
    model_info.check_decoder(model)
    inputs = online.load_inputs(
        run,
        model,
        dataset,
        training,
        sampling,
        reward,
        mesh,
        rows=training.batch_size,
    )

    # 2. The policy, its reference and its optimizer state, born sharded.
    loaded = load_policy(model, training.seed, inputs.mesh, say=run.say)
    optimizer = make_optimizer(training, inputs.total)
    state = loaded.init_state(optimizer, training.seed, loaded.context(with_reference=True))

    # 3. The step: sample from the policy and from the mixture, score, update.
    policy = loaded.policy

    def both_params(state):
        return policy.lm_params(state.params, state.context), policy.reference_params(state.context)

    # Two models as one `LM`, whose parameters are a pair: any sampler can use it.
    mixture = geometric_mixture(policy.lm, mixture_coef=mixture_coef)
    of_policy = policy_sampler(loaded, sampling, inputs.stop)
    opponent = sample_of.make_sampler(mixture, both_params, sampling, inputs.stop)
    sample = sample_of.pair_sampler(of_policy, opponent)
    weigh = importance.weigh(sampling.sampler(inputs.stop.eos_ids))
    update = make_update(
        policy, optimizer, beta=beta, micro_batches=training.micro_batches, importance=weigh
    )

    collector = collecting.sampled(sample, inputs.reward_fn, inputs.mesh)

    # 4. The shared loop: metrics, evaluations, checkpoints, export.
    state = online.train(
        run,
        dataset,
        training,
        inputs,
        state,
        collector,
        # Rows are read by themselves, however many columns their completions have.
        lambda max_new_tokens: update,
        # The opponent is a device of training: evaluations are of the policy alone.
        evaluated=collecting.sampled(of_policy, inputs.reward_fn, inputs.mesh),
        callbacks=callbacks,
        shown=("reward", "opponent_reward"),
        export=partial(loaded.export, run.path, inputs.tokenizer),
    )
    return result(run, model, loaded, inputs.tokenizer, state)
