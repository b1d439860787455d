"""Binary classifier optimisation: is an answer good?  The reward says, measured from the mean of all rewards so far."""

from collections.abc import Callable
from functools import partial

from rlhf import losses, tasks
from rlhf.loop import Training, fit
from rlhf.losses import moments
from rlhf.losses.moments import MomentsState
from rlhf.ranges import Length, Strength, checked
from rlhf.recipes import coupled, setup, unpaired
from rlhf.runs import RunFolder


def objective(*, beta: float = 0.1, moving: bool = True) -> Callable:
    """The `objective` of `rlhf.coupled_train_step` on `unpaired.scores` of the whole mini-batch.

    `context["rewards"]` holds the moments of all rewards so far; `moving` ones count those of the mini-batch first.
    """

    def classify(scores, context, answers):
        logprobs, ref_logprobs = scores[:, 0], answers.ref_logprobs[:, 0]
        rewards = beta * (logprobs - ref_logprobs)
        seen = moments.running().update(context["rewards"], rewards) if moving else context["rewards"]
        per_row = losses.unpaired.bco(logprobs, ref_logprobs, answers.desirable, seen.mean, beta=beta)
        metrics = {"delta": seen.mean, "rewards_seen": seen.number, "rewards_variance": seen.variance}
        return per_row.mean(), metrics | unpaired.figures(rewards, answers.desirable)

    return classify


def move(context, params, metrics):
    """The `update_context` that keeps the moments of the rewards."""
    seen = MomentsState(metrics["rewards_seen"], metrics["delta"], metrics["rewards_variance"])
    return context | {"rewards": seen}


@checked
def main(
    model: setup.Model, source: setup.Data, training: Training, output: str, *, beta: Strength = 0.1, max_length: Length = 1024,
    resume: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Answers with a verdict, good or bad, told apart by a classifier that is the policy itself: BCO.

    Rows have `prompt`, `completion` and `label`; preference rows are taken apart.

    Args:
      output: a new folder for the run.
      beta: strength of the pull towards the reference, per nat.
      max_length: tokens of a prompt with its answer; longer ones are cut.
      resume: go on with the run in the folder.
    """
    run = RunFolder(output, options=locals())
    model.check_decoder()
    begun = {"rewards": moments.running().init()}
    unpaired.check(objective(beta=beta), begun)
    tokenizer = model.tokenizer()
    train, test = source.laid_out(tasks.unpaired, lambda rows: unpaired.lay_out(tokenizer, rows, max_length, run.say))
    total = training.total_steps(len(train.tokens), judged=test is not None)
    model.check(tokenizer, train, test)
    policy = setup.policy(model, training.seed)
    with_reference = lambda answers: unpaired.with_reference(policy, answers, training.batch_size)
    train, test = with_reference(train), test and with_reference(test)
    scores_fn = policy.of_whole(unpaired.scores(policy.lm))

    _, figures = fit(
        run, training, coupled.step(scores_fn, objective(beta=beta), training, update_context=move), policy.params,
        lambda number, size: setup.take(train, training.seed, number, size),
        total=total, fixed=policy.context(), context=begun, shown=("loss", "margin", "delta"),
        evaluate=coupled.evaluation(scores_fn, objective(beta=beta, moving=False), test, training.batch_size),
        export=partial(policy.export, run.path, tokenizer),
    )  # fmt: skip
    return figures
