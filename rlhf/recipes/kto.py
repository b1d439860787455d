"""Kahneman–Tversky optimisation: answers with a verdict, each held against how far the policy is from the reference."""

from collections.abc import Callable
from functools import partial
from typing import Literal

from rlhf import losses, tasks
from rlhf.loop import Training, fit
from rlhf.ranges import Length, Strength, checked
from rlhf.recipes import coupled, setup, unpaired
from rlhf.runs import RunFolder


def objective(*, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Callable:
    """The `objective` of `rlhf.coupled_train_step` on `unpaired.scores` of the whole mini-batch.

    The KL is that of the completions of other rows; without them, K = 1, it is 0, which is APO-zero.
    """
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}

    def compare(scores, context, answers):
        kl = losses.unpaired.kto_kl(scores[:, 1:], answers.ref_logprobs[:, 1:])
        logprobs, ref_logprobs = scores[:, 0], answers.ref_logprobs[:, 0]
        per_row = losses.unpaired.kto(logprobs, ref_logprobs, answers.desirable, kl, beta=beta, **weights)
        rewards = beta * (logprobs - ref_logprobs)
        return per_row.mean(), {"kl": kl, **unpaired.figures(rewards, answers.desirable)}

    return compare


def advice(desirable, desirable_weight: float, undesirable_weight: float) -> str | None:
    """What to tell of weights under which one label counts much more than the other: the first should count 1 to 4/3."""
    number, others = int(desirable.sum()), int((~desirable).sum())
    if not number or not others:
        return f"all {number + others} rows are {'desirable' if number else 'undesirable'}; KTO learns from both"
    ratio = number * desirable_weight / (others * undesirable_weight)
    if 1.0 <= round(ratio, 1) <= 1.3:
        return None
    best = others * undesirable_weight / number
    return (
        f"{number} desirable rows weigh {ratio:.2f} times the {others} undesirable ones, and 1 to 1.33 is best: "
        f"--desirable_weight {best:.3g} to {best * 4 / 3:.3g}"
    )


@checked
def main(
    model: setup.Model, source: setup.Data, training: Training, output: str, *, loss: Literal["kto", "apo_zero"] = "kto",
    beta: Strength = 0.1, desirable_weight: Strength = 1.0, undesirable_weight: Strength = 1.0, max_length: Length = 1024,
    resume: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Answers with a verdict, good or bad, without pairs: KTO, and APO-zero.

    Rows have `prompt`, `completion` and `label`; preference rows are taken apart.

    Args:
      output: a new folder for the run.
      loss: kto, or apo_zero, which measures no KL.
      beta: strength of the pull towards the reference, per nat.
      desirable_weight: of rows labelled true.
      undesirable_weight: of rows labelled false.
      max_length: tokens of a prompt with its answer; longer ones are cut.
      resume: go on with the run in the folder.
    """
    run = RunFolder(output, options=locals())
    model.check_decoder()
    compare = objective(beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    unpaired.check(compare)
    tokenizer = model.tokenizer()
    train, test = source.laid_out(
        tasks.unpaired, lambda rows: unpaired.lay_out(tokenizer, rows, max_length, run.say, mismatched=loss == "kto")
    )
    total = training.total_steps(len(train.tokens), judged=test is not None)
    model.check(tokenizer, train, test)
    if warning := advice(train.desirable, desirable_weight, undesirable_weight):
        run.say(warning)
    policy = setup.policy(model, training.seed)
    with_reference = lambda answers: unpaired.with_reference(policy, answers, training.batch_size)
    train, test = with_reference(train), test and with_reference(test)
    scores_fn = policy.of_whole(unpaired.scores(policy.lm))

    _, figures = fit(
        run, training, coupled.step(scores_fn, compare, training), policy.params,
        lambda number, size: setup.take(train, training.seed, number, size),
        total=total, fixed=policy.context(), shown=("loss", "margin", "kl"),
        evaluate=coupled.evaluation(scores_fn, compare, test, training.batch_size),
        export=partial(policy.export, run.path, tokenizer),
    )  # fmt: skip
    return figures
