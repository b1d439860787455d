"""Supervised fine-tuning: the mean cross-entropy of the trained tokens."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import optax

from rlhf import data, tasks
from rlhf.data.types import Row
from rlhf.ranges import Length
from rlhf.rollouts import Batch
from rlhf.train import train_step
from rlhf.training import datasets, evaluation, meshes, model_info, offline, supervised
from rlhf.training.loading import load_policy
from rlhf.training.loop import fit
from rlhf.training.model_info import load_seq2seq, load_tokenizer
from rlhf.training.optimizers import make_optimizer
from rlhf.training.options import (
    Callbacks,
    DatasetOptions,
    MeshOptions,
    ModelOptions,
    TrainingOptions,
)
from rlhf.training.policy import Policy
from rlhf.training.recipe import recipe
from rlhf.training.runs import RunFolder
from rlhf.training.trained import Trained, result
from rlhf.typing import StepFn


def make_update(
    policy: Policy, optimizer: optax.GradientTransformation, *, micro_batches: int = 1
) -> StepFn:
    """SFT: gradient descent on the mean cross-entropy of the trained tokens.

    Args:
      policy: what is trained.
      optimizer: any optax transformation.
      micro_batches: parts of a step, taken one after the other; the result is the same.

    Returns: `update(state, batch) -> (state, metrics)`, pure: jit, scan, vmap or shard it.  The
    batch needs no weights.
    """
    step = train_step(supervised.make_loss(policy), optimizer, micro_batches=micro_batches)

    def update(state, batch):
        # Weights are of the whole mini-batch: made before the step cuts it into micro-batches.
        return step(state, supervised.with_weights(batch))

    return update


def tokenize(
    tokenizer, rows: list[Row], assistant_only: bool, completion_only: bool
) -> list[data.Tokenized]:
    """Rows of language modelling, or of prompt and completion."""
    # One row tells: all of a data set have the same columns.
    if data.type_of(rows[0]).texts[0] == "prompt":
        return data.tokenize_completions(
            tokenizer, rows, assistant_only=assistant_only, completion_only=completion_only
        )
    return data.tokenize_texts(tokenizer, rows, assistant_only=assistant_only)


def lay_out(
    rows: list[data.Tokenized],
    packing: str,
    length: int,
    say: Callable,
    *,
    seq2seq: data.Seq2Seq | None = None,
) -> Batch:
    """Sequences as rows of `length` columns; what is cut or left out is said.

    With `seq2seq` prompts are an encoder's inputs.
    """
    if seq2seq is not None:
        if packing != "none":
            # Every token of a decoder attends to all of its encoder's inputs: those of one text.
            raise ValueError(
                f"packing {packing}: an encoder-decoder takes one prompt with its completion a "
                "row; leave it out"
            )
        return seq2seq.batch(datasets.truncated(rows, length=length, say=say).sides[0])
    # Nothing is cut here: long texts go on in the next row, so that there is nothing to report.
    if packing == "wrapped":
        return data.wrapped(rows, length=length)
    if packing == "split":
        return data.best_fit(data.split(rows, length=length), length=length)
    fitting = datasets.truncated(rows, length=length, say=say)
    return (
        data.best_fit(fitting.sides[0], length=length)
        if packing == "bfd"
        else data.batch(fitting.sides[0])
    )


@recipe
def main(
    model: ModelOptions,
    dataset: DatasetOptions,
    *,
    training: TrainingOptions = TrainingOptions(learning_rate=2e-5),
    mesh: MeshOptions,
    output: str,
    max_length: Length = 1024,
    packing: Literal["none", "bfd", "split", "wrapped"] = "none",
    assistant_only: bool = False,
    completion_only: bool = True,
    resume: bool = False,
    callbacks: Callbacks = (),
) -> Trained:
    """Supervised fine-tuning: teaches a model to write what the rows of a data set say.

    Rows have `text` or `messages`, or `prompt` and `completion`.  Defaults are TRL 1.16's, which
    trains on the completion alone too where rows have a prompt.

    Args:
      output: a new folder for the run.
      max_length: tokens of a row; longer texts are cut, unless the packing splits or wraps them.
      packing: several texts in a row: bfd (best fit), split (best fit, long texts go on elsewhere),
        wrapped (end to end).
      assistant_only: train on what assistants say in messages; the chat template must mark it.
      completion_only: of rows with a prompt, train on the completion alone.
      resume: go on with the run in the folder.
      callbacks: `(step, metrics)` functions, called with every line of the log.
    """
    # 1. Everything that can be wrong is found before the model loads.
    run = RunFolder(output, options=locals())
    devices = meshes.make(mesh, rows=training.batch_size, micro_batches=training.micro_batches)
    tokenizer = load_tokenizer(model)
    seq2seq = load_seq2seq(model, tokenizer)
    if seq2seq is not None and not completion_only:
        raise ValueError(
            f"completion_only false, but {model_info.name_of(model)} is an encoder-decoder, which "
            "only reads prompts"
        )

    def to_arrays(rows):
        tokenized = tokenize(tokenizer, rows, assistant_only, completion_only)
        return lay_out(tokenized, packing, max_length, run.say, seq2seq=seq2seq)

    train, held_out = datasets.load_arrays(dataset, tasks.demonstrations, to_arrays)
    total = training.total_steps(len(train.tokens), has_held_out=held_out is not None)
    model_info.check_tokens(model, tokenizer, train, held_out)

    # 2. The model and its optimizer state, born sharded.
    loaded = load_policy(model, training.seed, devices, say=run.say)
    optimizer = make_optimizer(training, total)
    state = loaded.init_state(optimizer, training.seed)

    # 3. The step, and the evaluation of the same loss.
    update = make_update(loaded.policy, optimizer, micro_batches=training.micro_batches)
    weighted = held_out and supervised.with_weights(held_out)
    evaluate = evaluation.of_loss(
        supervised.make_loss(loaded.policy), weighted, training.batch_size, devices
    )

    # 4. The shared loop: metrics, evaluations, checkpoints, export.
    state = fit(
        run,
        training,
        state,
        offline.make_step(update, devices, state),
        datasets.batches(train, training, devices),
        total=total,
        callbacks=callbacks,
        evaluate=evaluate,
        export=partial(loaded.export, run.path, tokenizer),
        mesh=devices,
    )
    return result(run, model, loaded, tokenizer, state)
