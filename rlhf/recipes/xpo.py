"""Exploratory preference optimisation: the policy's completion against the reference's, with
optimism about what is new.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import optax

from rlhf import losses
from rlhf.fields import documented
from rlhf.losses import preference
from rlhf.ranges import Coefficient, Strength
from rlhf.rollouts import Pairs
from rlhf.shared_prefix import SharedPrefix
from rlhf.train import minibatches, run_minibatches, train_step
from rlhf.training import collecting, online
from rlhf.training import pairs as pair_rows
from rlhf.training import preference as pair_losses
from rlhf.training import sampling as sample_of
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
from rlhf.training.sampling import policy_sampler
from rlhf.training.trained import Trained, result
from rlhf.typing import UpdateFn

LOSSES: dict[str, Callable] = {"sigmoid": preference.sigmoid, "ipo": preference.ipo}


@documented
class PolicyPairs(NamedTuple):
    """Pairs of a completion of the policy and one of the reference.

    Attributes:
      pairs: the two completions of each prompt.
      reference_won: [R] bool, whether the chosen one is the reference's.
    """

    pairs: Pairs
    reference_won: Any


def make_loss(
    policy: Policy,
    *,
    alpha: float = 1e-5,
    loss: Callable = preference.sigmoid,
    beta: float = 0.1,
    shared: SharedPrefix | None = None,
) -> Callable:
    """The `loss_fn` of `PolicyPairs` with weights: a preference loss, and `alpha` times the
    log-prob of the reference's completion.

    Args:
      policy: what is trained.
      alpha: weight of the optimism.
      loss: a preference objective.
      beta: strength of the pull towards the reference, per nat.
      shared: what the two completions have in common.
    """

    def loss_fn(params, context, policy_pairs, key):
        full = policy.full_params(params, context, key)
        logprobs = pair_losses.sequence_logprobs(policy.lm, full, policy_pairs.pairs, shared=shared)
        # Chosen or rejected, whichever side the reference wrote; one pair a row, so that N is 1.
        of_reference = jnp.where(policy_pairs.reference_won, logprobs[:, 0, 0], logprobs[:, 0, 1])

        # Made inside the loss: it closes over the log-probs of this pass, and gradients flow
        # through them.  `wraps`: `comparison` reads in the signature whether a loss takes lengths.
        @wraps(loss)
        def optimistic(*logprobs, **options):
            return losses.online.xpo(
                *logprobs, from_reference=of_reference, alpha=alpha, loss=partial(loss, **options)
            )

        compare = pair_losses.comparison(loss=optimistic, beta=beta)
        return compare(logprobs, context, policy_pairs.pairs)

    return loss_fn


def make_update(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    alpha: float = 1e-5,
    loss: Callable = preference.sigmoid,
    beta: float = 0.1,
    micro_batches: int = 1,
    max_new_tokens: int | None = None,
) -> UpdateFn:
    """XPO: a completion of the policy against one of the reference, with optimism about what is new
    (arXiv:2405.21046).

    Defaults are those of TRL 1.13, the last with this trainer.

    Args:
      policy: what is trained; its reference is in the state's context.
      optimizer: any optax transformation.
      alpha: weight of the optimism, which makes the reference's completions less likely.
      loss: a preference objective.
      beta: strength of the pull towards the reference, per nat.
      micro_batches: parts of a step, taken one after the other; the result is the same.
      max_new_tokens: last columns of the rollout, in which two completions differ: what comes
        before is read once; None: rows are read by themselves.

    Returns: `update(state, rollout, rewards, key) -> (state, metrics)`, pure.  Row 2p of the
    rollout is the policy's completion of prompt p, row 2p + 1 the reference's.
    """
    shared = None if max_new_tokens is None else SharedPrefix(2, max_new_tokens)
    step = train_step(
        make_loss(policy, alpha=alpha, loss=loss, beta=beta, shared=shared),
        optimizer,
        micro_batches=micro_batches,
    )

    def minibatch_step(state, policy_pairs):
        # Weights are of an optimizer mini-batch: made here, before it is cut into micro-batches.
        return step(
            state, policy_pairs._replace(pairs=pair_losses.with_weights(policy_pairs.pairs))
        )

    def update(state, rollout, rewards, key):
        pairs, picked, of_pairs = pair_losses.best_and_worst(rollout, rewards, num_samples=2)
        pairs = pair_losses.with_reference(policy, state.context, pairs, shared=shared)
        # Samples of a prompt are policy, then reference: number 1 is the reference's.
        policy_pairs = PolicyPairs(pairs, reference_won=picked[:, 0] == 1)
        state, metrics = run_minibatches(minibatch_step, state, minibatches(key, policy_pairs, 1))
        return state, {**metrics, **of_pairs, **sample_of.pair_metrics(rollout, rewards)}

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
    output: str,
    alpha: Coefficient = 1e-5,
    loss: Literal["sigmoid", "ipo"] = "sigmoid",
    beta: Strength = 0.1,
    resume: bool = False,
    callbacks: Callbacks = (),
) -> Trained:
    """Exploratory preference optimisation: the policy's completions against the reference's, the
    better preferred.

    Rows have `prompt`, and the columns that the reward functions read.  Learning rate and sampling
    are TRL 1.13's, the last with this trainer.

    Args:
      output: a new folder for the run.
      alpha: weight of the optimism, which makes the reference's completions less likely.
      loss: DPO's own, or IPO's on means over tokens.
      beta: strength of the pull towards the reference, per nat.
      resume: go on with the run in the folder.
      callbacks: `(step, metrics)` functions, called with every line of the log.
    """
    # 1. Everything that can be wrong is found before the model loads.
    run = RunFolder(output, options=locals())
    pair_rows.check(LOSSES[loss], beta=beta)
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

    # 3. The step: sample from the policy and from the reference, score, update.
    policy = loaded.policy
    of_policy = policy_sampler(loaded, sampling, inputs.stop)
    opponent = sample_of.make_sampler(
        policy.lm, lambda state: policy.reference_params(state.context), sampling, inputs.stop
    )
    sample = sample_of.pair_sampler(of_policy, opponent)
    update_for = partial(
        make_update,
        policy,
        optimizer,
        alpha=alpha,
        loss=LOSSES[loss],
        beta=beta,
        micro_batches=training.micro_batches,
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
        update_for,
        # The opponent is a device of training: evaluations are of the policy alone.
        evaluated=collecting.sampled(of_policy, inputs.reward_fn, inputs.mesh),
        callbacks=callbacks,
        shown=("reward", "opponent_reward"),
        export=partial(loaded.export, run.path, inputs.tokenizer),
    )
    return result(run, model, loaded, inputs.tokenizer, state)
