"""Process reward modelling: the cross-entropy of right and wrong at the end of every step, on a two-class head."""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

from rlhf import data, losses, rollouts, tasks
from rlhf.data.types import Row
from rlhf.fields import documented
from rlhf.lm import LM, Head
from rlhf.loop import Training, fit
from rlhf.ranges import Length, checked
from rlhf.recipes import setup
from rlhf.rollouts.types import Array
from rlhf.runs import RunFolder


@documented
class Solutions(NamedTuple):
    """Answers in steps, with a verdict where a step ends.

    Attributes:
      tokens: [B, T] int32.
      mask: [B, T] bool, True on the last token of every step.
      positions: [B, T] int32.
      segment_ids: [B, T] int32, 0 = padding.
      labels: [B, T] int32, there 1 for a right step, 0 for a wrong one.
      weights: [B, T] float32, of the whole optimizer mini-batch.
    """

    tokens: Array
    mask: Array
    positions: Array
    segment_ids: Array
    labels: Array
    weights: Array | None = None


def prepare(batch: Solutions, *, last_step_only: bool = False) -> Solutions:
    """The optimizer mini-batch with its weights: every step counts the same, or of each solution the last alone."""
    mask = losses.segments.last_trained(batch.mask, batch.segment_ids) if last_step_only else batch.mask
    return batch._replace(mask=mask, weights=losses.weights.token_mean(mask, batch.segment_ids))


def objective(lm: LM, head: Head) -> Callable:
    """The `loss_fn` of prepared `Solutions`; `params` is `{"lm": …, "head": …}`.  Its `right` is the share of right labels."""

    def loss_fn(params, context, batch, key):
        where = dict(positions=batch.positions, segment_ids=batch.segment_ids)
        logits = rollouts.classify(lm, head, params, batch.tokens, **where)
        per_step = losses.reward_model.process_reward(logits, batch.labels, batch.mask)
        metrics = {
            "accuracy": losses.weighted_sum(losses.logits.is_top1(logits, batch.labels), batch.weights),
            "right": losses.weighted_sum(batch.labels, batch.weights),
        }
        return losses.weighted_sum(per_step, batch.weights), metrics

    return loss_fn


def lay_out(tokenizer, rows: list[Row], separator: str, packing: str, length: int, say: Callable) -> Solutions:
    """Stepwise rows as arrays; what is cut or left out is said."""
    kept = setup.truncated(data.tokenize_steps(tokenizer, rows, separator=separator), length=length, say=say)
    steps = kept.sides[0]
    arranged = partial(data.best_fit, length=length) if packing == "bfd" else data.batch
    labels = arranged([step._replace(tokens=step.labels) for step in steps]).tokens  # they lie as their tokens do
    arrays = arranged(steps)
    return Solutions(arrays.tokens, arrays.mask, arrays.positions, arrays.segment_ids, labels)


@checked
def main(
    model: setup.Model, source: setup.Data, training: Training, output: str, *, step_separator: str | None = None,
    last_step_only: bool = False, max_length: Length = 1024, packing: Literal["none", "bfd"] = "none", resume: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Process reward modelling: teaches a model to tell, after every step of an answer, whether it was right.

    Rows have `prompt`, `completions` and `labels`: a list of steps, and a list of true and false, one a step.

    Args:
      output: a new folder for the run.
      step_separator: ends a step, and the model judges at its last token; null: a new line, for a generated task its own.
      last_step_only: train on the last step of each answer alone.
      max_length: tokens of a prompt with its answer; longer ones are cut.
      packing: several answers in a row: bfd (best fit).
      resume: go on with the run in the folder.
    """
    run = RunFolder(output, options=locals())
    tokenizer = model.tokenizer()
    length = model.encoder(max_length) or max_length
    generated = source.dataset.startswith(tasks.PREFIX)
    if step_separator is None:
        step_separator = tasks.find(source.dataset).step_separator if generated else "\n"
    train, test = source.laid_out(
        tasks.stepwise, lambda rows: lay_out(tokenizer, rows, step_separator, packing, length, run.say)
    )
    total = training.total_steps(len(train.tokens), judged=test is not None)
    model.check(tokenizer, train, test)
    judge, head = setup.classifier(model, training.seed, 2, of_tokens=True)
    loss_fn, prepared = judge.of_whole(objective(judge.lm, head)), partial(prepare, last_step_only=last_step_only)

    _, figures = fit(
        run, training, setup.offline_step(loss_fn, prepared, training), judge.params,
        lambda number, size: setup.take(train, training.seed, number, size),
        total=total, fixed=judge.context(), shown=("loss", "accuracy"),
        evaluate=setup.evaluation(loss_fn, test and prepared(test), training.batch_size),
        export=partial(judge.export, run.path, tokenizer),
    )  # fmt: skip
    return figures
