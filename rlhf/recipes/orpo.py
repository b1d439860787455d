"""Odds ratio preference optimisation: imitates the chosen answer and keeps the odds of the rejected one below its own."""

from functools import partial
from typing import Literal

from rlhf import tasks
from rlhf.loop import Training, fit
from rlhf.losses import reference_free
from rlhf.ranges import Length, Strength, checked
from rlhf.recipes import cpo, setup
from rlhf.recipes import pairs as pairs_of
from rlhf.runs import RunFolder


@checked
def main(
    model: setup.Model, source: setup.Data, training: Training, output: str, *, beta: Strength = 0.1, max_length: Length = 1024,
    packing: Literal["none", "bfd"] = "none", resume: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Preference pairs and imitation in one, without a reference: ORPO.

    Rows have `prompt`, `chosen` and `rejected`, or `chosen` and `rejected` that both begin with the prompt.  The prompt with
    its chosen answer is imitated.

    Args:
      output: a new folder for the run.
      beta: weight of the odds beside the negative log-likelihood, the paper's lambda.
      max_length: tokens of a prompt with its answer; longer ones are cut.
      packing: several pairs in a row: bfd (best fit).
      resume: go on with the run in the folder.
    """
    run = RunFolder(output, options=locals())
    loss = partial(reference_free.orpo, beta=beta)
    pairs_of.check(loss, references=0)
    tokenizer = model.tokenizer()
    lay_out = partial(pairs_of.lay_out, tokenizer, seq2seq=model.seq2seq(tokenizer))
    train, test = source.laid_out(tasks.preferences, lambda rows: lay_out(rows, packing, max_length, run.say))
    total = training.total_steps(len(train.tokens), judged=test is not None)
    model.check(tokenizer, train, test)
    most, shared = pairs_of.segments(train, test), pairs_of.shared_prefix(train, test)
    prepare = partial(cpo.prepare, whole=True, max_segments=most)
    policy = setup.policy(model, training.seed)
    loss_fn = policy.of_whole(cpo.objective(policy.lm, loss=loss, whole=True, max_segments=most, shared=shared))

    _, figures = fit(
        run, training, setup.offline_step(loss_fn, prepare, training), policy.params,
        lambda number, size: setup.take(train, training.seed, number, size),
        total=total, fixed=policy.context(), shown=("loss", "nll", "accuracy"),
        evaluate=setup.evaluation(loss_fn, test and prepare(test), training.batch_size),
        export=partial(policy.export, run.path, tokenizer),
    )  # fmt: skip
    return figures
