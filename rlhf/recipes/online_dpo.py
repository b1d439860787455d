"""Online DPO: completions are sampled as training goes, and the best of a prompt's is preferred to
the worst.

The objective compares log-probs at temperature 1, whatever temperature completions are sampled at.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import optax

from rlhf.losses import preference
from rlhf.ranges import Count, Strength
from rlhf.shared_prefix import SharedPrefix
from rlhf.train import minibatches, run_minibatches, train_step
from rlhf.training import collecting, online
from rlhf.training import pairs as pair_rows
from rlhf.training import preference as pair_losses
from rlhf.training.loading import load_policy
from rlhf.training.optimizers import make_optimizer
from rlhf.training.options import (
    Callbacks,
    MeshOptions,
    ModelOptions,
    NumSamples,
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

LOSSES: dict[str, Callable] = {"sigmoid": preference.sigmoid, "ipo": preference.ipo}


def make_update(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    num_samples: int = 2,
    loss: Callable = preference.sigmoid,
    beta: float = 0.1,
    num_minibatches: int = 1,
    micro_batches: int = 1,
    max_new_tokens: int | None = None,
) -> UpdateFn:
    """Online DPO: the best completion of a prompt is preferred to its worst  (arXiv:2402.04792).

    Defaults are TRL 1.16's.

    Args:
      policy: what is trained; its reference is in the state's context.
      optimizer: any optax transformation.
      num_samples: completions of a prompt, contiguous rows of the rollout.
      loss: a preference objective.
      beta: strength of the pull towards the reference, per nat.
      num_minibatches: optimizer steps on the pairs.
      micro_batches: parts of a step, taken one after the other; the result is the same.
      max_new_tokens: last columns of the rollout, in which a prompt's samples differ: what comes
        before is read once; None: rows are read by themselves.

    Returns: `update(state, rollout, rewards, key) -> (state, metrics)`, pure.  `rewards` is `[B]`,
    NaN where there is none.
    """
    # Groups of 2, whatever `num_samples` is: of each prompt a pair is left.
    shared = None if max_new_tokens is None else SharedPrefix(2, max_new_tokens)
    loss_fn = pair_losses.make_loss(policy, loss=loss, beta=beta, shared=shared)
    step = train_step(loss_fn, optimizer, micro_batches=micro_batches)

    def minibatch_step(state, pairs):
        # Weights are of an optimizer mini-batch: made here, before it is cut into micro-batches.
        return step(state, pair_losses.with_weights(pairs))

    def update(state, rollout, rewards, key):
        pairs, _, of_pairs = pair_losses.best_and_worst(rollout, rewards, num_samples=num_samples)
        # After the choice: the reference reads two completions a prompt and not all of them.
        pairs = pair_losses.with_reference(policy, state.context, pairs, shared=shared)
        batches = minibatches(key, pairs, num_minibatches)
        state, metrics = run_minibatches(minibatch_step, state, batches)
        return state, {**metrics, **rollout_metrics(rollout, rewards), **of_pairs}

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
    num_samples: NumSamples = 2,
    loss: Literal["sigmoid", "ipo"] = "sigmoid",
    beta: Strength = 0.1,
    mini_batches: Count = 1,
    resume: bool = False,
    callbacks: Callbacks = (),
) -> Trained:
    """Online DPO: samples several completions, and learns to prefer the best of them to the worst.

    Rows have `prompt`, and the columns that the reward functions read.  Learning rate and sampling
    are TRL 1.16's.

    Args:
      output: a new folder for the run.
      num_samples: completions of a prompt, at least 2.
      loss: DPO's own, or IPO's on means over tokens.
      beta: strength of the pull towards the reference, per nat.
      mini_batches: optimizer steps on the pairs of a step.
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
        # Pairs, one a prompt: that is what mini-batches cut.
        rows=training.batch_size,
        num_minibatches=mini_batches,
    )

    # 2. The policy, its reference and its optimizer state, born sharded.
    loaded = load_policy(model, training.seed, inputs.mesh, say=run.say)
    optimizer = make_optimizer(training, inputs.total * mini_batches)
    state = loaded.init_state(optimizer, training.seed, loaded.context(with_reference=True))

    # 3. The step: sample, score, update.
    sample = policy_sampler(loaded, sampling, inputs.stop, num_samples)
    update_for = partial(
        make_update,
        loaded.policy,
        optimizer,
        num_samples=num_samples,
        loss=LOSSES[loss],
        beta=beta,
        num_minibatches=mini_batches,
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
        updates=mini_batches,
        callbacks=callbacks,
        shown=("reward", "rewards/accuracies"),
        export=partial(loaded.export, run.path, inputs.tokenizer),
    )
    return result(run, model, loaded, inputs.tokenizer, state)
