"""Supervised fine-tuning: the mean cross-entropy of the trained tokens."""

from collections.abc import Callable
from functools import partial
from typing import Literal

from rlhf import data, losses, rollouts, tasks
from rlhf.data.types import Row
from rlhf.lm import LM
from rlhf.loop import Training, fit
from rlhf.ranges import Length, checked
from rlhf.recipes import setup
from rlhf.rollouts import Batch
from rlhf.runs import RunFolder


def prepare(batch: Batch) -> Batch:
    """The optimizer mini-batch with its weights; a sequence's first token has nothing before it and is not trained."""
    mask = batch.mask & ~losses.segments.starts(batch.segment_ids)
    return batch._replace(mask=mask, weights=losses.weights.token_mean(mask, batch.segment_ids))


def objective(lm: LM) -> Callable:
    """The `loss_fn` of a prepared `Batch`; `params` are the model's."""

    def loss_fn(params, context, batch, key):
        s = rollouts.score_batch(lm, params, batch)
        per_token = losses.cross_entropy(s.logprobs, batch.mask)
        return losses.weighted_sum(per_token, batch.weights), {"entropy": losses.weighted_sum(s.entropy, batch.weights)}

    return loss_fn


def tokenize(tokenizer, rows: list[Row], assistant_only: bool, completion_only: bool) -> list[data.Tokenized]:
    """Rows of language modelling, or of prompt and completion."""
    if data.type_of(rows[0]).texts[0] == "prompt":
        return data.tokenize_completions(tokenizer, rows, assistant_only=assistant_only, completion_only=completion_only)
    return data.tokenize_texts(tokenizer, rows, assistant_only=assistant_only)


def lay_out(
    rows: list[data.Tokenized], packing: str, length: int, say: Callable, *, seq2seq: data.Seq2Seq | None = None
) -> Batch:
    """Sequences as rows of `length` columns; what is cut or left out is said.

    With `seq2seq` prompts are an encoder's inputs.
    """
    if seq2seq is not None:
        if packing != "none":
            raise ValueError(f"packing {packing}: an encoder-decoder takes one prompt with its answer a row; leave it out")
        return seq2seq.batch(setup.truncated(rows, length=length, say=say).sides[0])
    if packing == "wrapped":
        return data.wrapped(rows, length=length)
    if packing == "split":
        return data.best_fit(data.split(rows, length=length), length=length)
    kept = setup.truncated(rows, length=length, say=say)
    return data.best_fit(kept.sides[0], length=length) if packing == "bfd" else data.batch(kept.sides[0])


@checked
def main(
    model: setup.Model, source: setup.Data, training: Training, output: str, *, max_length: Length = 1024,
    packing: Literal["none", "bfd", "split", "wrapped"] = "none", assistant_only: bool = False, completion_only: bool = True,
    resume: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Supervised fine-tuning: teaches a model to write what the rows of a data set say.

    Rows have `text` or `messages`, or `prompt` and `completion`.

    Args:
      output: a new folder for the run.
      max_length: tokens of a row; longer texts are cut, unless the packing splits or wraps them.
      packing: several texts in a row: bfd (best fit), split (best fit, long texts go on elsewhere), wrapped (end to end).
      assistant_only: train on what assistants say in messages; the chat template must mark it.
      completion_only: of rows with a prompt, train on the completion alone.
      resume: go on with the run in the folder.
    """
    run = RunFolder(output, options=locals())
    tokenizer = model.tokenizer()
    seq2seq = model.seq2seq(tokenizer)
    if seq2seq is not None and not completion_only:
        raise ValueError(f"completion_only false, but {model.model} is an encoder-decoder, which only reads prompts")

    def laid_out(rows):
        tokenized = tokenize(tokenizer, rows, assistant_only, completion_only)
        return lay_out(tokenized, packing, max_length, run.say, seq2seq=seq2seq)

    train, test = source.laid_out(tasks.demonstrations, laid_out)
    total = training.total_steps(len(train.tokens), judged=test is not None)
    model.check(tokenizer, train, test)
    policy = setup.policy(model, training.seed)
    loss_fn = policy.of_whole(objective(policy.lm))

    _, figures = fit(
        run, training, setup.offline_step(loss_fn, prepare, training), policy.params,
        lambda number, size: setup.take(train, training.seed, number, size),
        total=total, fixed=policy.context(),
        evaluate=setup.evaluation(loss_fn, test and prepare(test), training.batch_size),
        export=partial(policy.export, run.path, tokenizer),
    )  # fmt: skip
    return figures
