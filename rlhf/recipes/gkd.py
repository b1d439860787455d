"""Generalised knowledge distillation: a student near its teacher's distribution, on data and on its
own completions.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf import data, hosts, losses, rollouts, tasks
from rlhf.data.types import Row
from rlhf.fields import documented
from rlhf.lm import LM
from rlhf.models import huggingface
from rlhf.models.huggingface_config import decoder_of
from rlhf.ranges import Length, Share, Temperature
from rlhf.rollouts import Batch, Prompts
from rlhf.train import train_step
from rlhf.training import collecting, datasets, evaluation, loading, meshes, model_info, offline
from rlhf.training import prompts as prompt_sets
from rlhf.training.loading import load_policy
from rlhf.training.loop import fit
from rlhf.training.model_info import load_tokenizer
from rlhf.training.optimizers import make_optimizer
from rlhf.training.options import (
    Callbacks,
    DatasetOptions,
    MeshOptions,
    ModelOptions,
    SamplingOptions,
    TrainingOptions,
)
from rlhf.training.policy import Policy
from rlhf.training.programs import Step
from rlhf.training.recipe import recipe
from rlhf.training.runs import RunFolder, model_of
from rlhf.training.sampling import make_sampler, policy_sampler, stop_criteria, trimmed
from rlhf.training.supervised import with_weights
from rlhf.training.trained import Trained, result
from rlhf.typing import StepFn


def make_loss(
    policy: Policy,
    teacher: LM,
    *,
    vocab_size: int | None = None,
    beta: float = 0.5,
    loss_temperature: float = 1.0,
) -> Callable:
    """The `loss_fn` of a batch with weights: the generalised Jensen-Shannon divergence of teacher
    and student, a token's mean.

    Both models' logits exist for a chunk of columns at a time, in value and gradient.

    Args:
      policy: the student; the teacher's parameters are `context["teacher"]`.
      teacher: the teacher's language model.
      vocab_size: tokens that both know, the first ones of each; None: all.
      beta: of `losses.distillation.jsd`; 0 is KL(teacher ‖ student), 1 KL(student ‖ teacher).
      loss_temperature: divides both models' logits.
    """

    def per_position(params, teacher_params, hidden, teacher_hidden):
        # Embeddings may be padded to different sizes: only tokens that both have are compared.
        logits = policy.lm.unembed(params, hidden)[..., :vocab_size] / loss_temperature
        teacher_logits = (
            teacher.unembed(teacher_params, teacher_hidden)[..., :vocab_size] / loss_temperature
        )
        agrees = losses.logits.is_top1(logits, jnp.argmax(teacher_logits, axis=-1))
        divergence = losses.distillation.jsd(logits, teacher_logits, beta=beta)
        return divergence, agrees.astype(jnp.float32)

    def hidden_before(lm, params, batch):
        hidden, _, _ = lm.hidden(
            params, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids
        )
        # Shifted by one: the state at position t - 1 predicts tokens[:, t], whose mask it meets.
        return jnp.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))

    def loss_fn(params, context, batch, key):
        full = policy.full_params(params, context, key)
        hidden = hidden_before(policy.lm, full, batch)
        teacher_hidden = hidden_before(teacher, context["teacher"], batch)
        # A chunk of columns at a time: logits `[B, T, V]` of two models at once would be most of
        # the memory.  No gradient flows to the teacher.
        divergence, agrees = losses.chunked(
            partial(per_position, full, context["teacher"]),
            hidden,
            lambda hidden: hidden,
            jax.lax.stop_gradient(teacher_hidden),
            needed=batch.mask,
        )
        metrics = {"agreement": losses.weighted_sum(agrees, batch.weights)}
        return losses.weighted_sum(divergence, batch.weights), metrics

    return loss_fn


def make_update(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    teacher: LM,
    vocab_size: int | None = None,
    beta: float = 0.5,
    loss_temperature: float = 1.0,
    micro_batches: int = 1,
) -> StepFn:
    """GKD: a student near its teacher's distribution over every next token, on rows or on samples
    (arXiv:2306.13649).

    Defaults are TRL 1.16's, which samples at 0.9 but leaves the loss at a temperature of 1.

    Args:
      policy: the student; the teacher's parameters are `context["teacher"]`.
      optimizer: any optax transformation.
      teacher: the teacher's language model.
      vocab_size: tokens that both know, the first ones of each; None: all.
      beta: between the two directions of the divergence: 0 is KL(teacher ‖ student), 1 KL(student ‖
        teacher).
      loss_temperature: divides both models' logits.
      micro_batches: parts of a step, taken one after the other; the result is the same.

    Returns: `update(state, batch) -> (state, metrics)`, pure.  The batch needs no weights.
    """
    loss_fn = make_loss(
        policy, teacher, vocab_size=vocab_size, beta=beta, loss_temperature=loss_temperature
    )
    step = train_step(loss_fn, optimizer, micro_batches=micro_batches)

    def update(state, batch):
        return step(state, with_weights(batch))

    return update


def common_vocabulary(tokenizer: Any, model: ModelOptions, teacher: str) -> int:
    """Tokens that student and teacher both have logits for: embeddings may end in rows that no
    token uses.

    Raises: ValueError where their tokenizers differ, or a model has fewer logits than tokens.
    """
    vocabulary = tokenizer.get_vocab()
    theirs = huggingface.load_tokenizer(teacher).get_vocab()
    name = model_info.name_of(model)
    configs = [model_info.read_config(model), huggingface.read_config(teacher)]
    size = min(decoder_of(config).vocab_size for config in configs if config is not None)
    if differ := sorted(
        token
        for token in vocabulary.keys() | theirs.keys()
        if vocabulary.get(token) != theirs.get(token)
    ):
        raise ValueError(
            f"{teacher} has another vocabulary than {name}: {len(theirs)} tokens and {len(vocabulary)}, "
            f"and {len(differ)} differ, "
            f"{differ[0]!r} first; a teacher and its student must share a tokenizer"
        )
    if max(vocabulary.values()) >= size:
        raise ValueError(
            f"{len(vocabulary)} tokens, but {name} or {teacher} has logits for {size}; take one that has "
            "them all"
        )
    return size


@documented
class DistillationBatch(NamedTuple):
    """The rows of a step.

    Attributes:
      batch: the rows' own completions.
      prompts: of the rows alone.
      on_policy: the student samples the completions.
      key: of what is sampled.
    """

    batch: Batch
    prompts: Prompts
    on_policy: bool
    key: Any


def lay_out(tokenizer, rows: list[Row], length: int, say: Callable) -> tuple[Batch, Prompts]:
    """Rows of prompt and completion, and their prompts alone; what is cut or left out is said."""
    fitting = datasets.truncated(data.tokenize_completions(tokenizer, rows), length=length, say=say)
    return data.batch(fitting.sides[0]), prompt_sets.tokenize(
        tokenizer, [rows[i] for i in fitting.remaining]
    ).prompts


def take(
    rows: tuple[Batch, Prompts], seed: int, number: int, size: int, lmbda: float
) -> DistillationBatch:
    """The rows of a step, a pure function of seed and number: with probability `lmbda` the student
    samples.
    """
    # On the host, and apart from the key: it decides which program runs.
    on_policy = bool(np.random.default_rng([seed, number, 1]).random() < lmbda)
    batch, prompts = datasets.take(rows, seed, number, size)
    key = jax.random.fold_in(jax.random.key(seed), number)
    return DistillationBatch(batch, prompts, on_policy, key)


@recipe
def main(
    model: ModelOptions,
    dataset: DatasetOptions,
    *,
    training: TrainingOptions = TrainingOptions(learning_rate=2e-5),
    mesh: MeshOptions,
    output: str,
    teacher: str,
    beta: Share = 0.5,
    lmbda: Share = 0.5,
    seq_kd: bool = False,
    temperature: Temperature = 0.9,
    max_new_tokens: Length = 128,
    loss_temperature: Temperature = 1.0,
    max_length: Length = 1024,
    resume: bool = False,
    callbacks: Callbacks = (),
) -> Trained:
    """Generalised knowledge distillation: a student learns its teacher's distribution over every
    next token.

    Rows have `prompt` and `completion`.  The learning rate is TRL 1.16's.

    Args:
      output: a new folder for the run.
      teacher: a model with the same tokenizer: a run's folder, a model's, or a name on the Hugging
        Face Hub.
      beta: between the two directions of the divergence: 0 is KL(teacher ‖ student), 1 KL(student ‖
        teacher).
      lmbda: the share of steps on completions that the student samples itself; the others are on
        the rows' completions.
      seq_kd: the others are on completions that the teacher samples.
      temperature: of sampling.
      max_new_tokens: the most tokens of a sampled completion.
      loss_temperature: divides both models' logits in the loss.
      max_length: tokens of a prompt with its completion; longer ones are cut.
      resume: go on with the run in the folder.
      callbacks: `(step, metrics)` functions, called with every line of the log.
    """
    # 1. Everything that can be wrong is found before the model loads.
    run = RunFolder(output, options=locals())
    model_info.check_decoder(model)
    teacher = model_of(teacher)
    devices = meshes.make(mesh, rows=training.batch_size, micro_batches=training.micro_batches)
    tokenizer = load_tokenizer(model)
    vocab_size = common_vocabulary(tokenizer, model, teacher)
    settings = SamplingOptions(max_new_tokens=max_new_tokens, temperature=temperature)
    stop = stop_criteria(model, settings, tokenizer)
    rows, held_out_rows = datasets.load_rows(dataset, tasks.demonstrations)
    train = lay_out(tokenizer, rows, max_length, run.say)
    held_out = lay_out(tokenizer, held_out_rows, max_length, run.say)[0] if held_out_rows else None
    total = training.total_steps(len(train[0].tokens), has_held_out=held_out is not None)
    model_info.check_tokens(model, tokenizer, train[0], held_out)
    model_info.check_tokens(model, tokenizer, train[1], max_new_tokens=max_new_tokens)

    # 2. The student with its optimizer state, and the teacher, born sharded.
    loaded = load_policy(model, training.seed, devices, say=run.say)
    policy = loaded.policy
    # `lora_rank=1`: as under adapters nothing of it is trained, so that it needs no float32
    # masters.
    teacher_options = ModelOptions(teacher, dtype=model.dtype, lora_rank=1)
    teacher_lm, teacher_params, _ = huggingface.load(
        teacher,
        mesh=devices,
        say=run.say,
        **loading.reading(teacher_options),
    )
    optimizer = make_optimizer(training, total)
    context = {**loaded.context(), "teacher": teacher_params}
    state = loaded.init_state(optimizer, training.seed, context, axes=teacher_lm.axes())

    # 3. The step: sample where it is the student's or the teacher's turn, update.
    options: dict[str, Any] = {
        "vocab_size": vocab_size,
        "beta": beta,
        "loss_temperature": loss_temperature,
    }
    update = offline.make_step(
        make_update(
            policy, optimizer, teacher=teacher_lm, micro_batches=training.micro_batches, **options
        ),
        devices,
        state,
    )
    of_student = policy_sampler(loaded, settings, stop)
    # The teacher's parameters come from the state, which has them sharded.
    of_teacher = make_sampler(teacher_lm, lambda state: state.context["teacher"], settings, stop)

    def step(state, rows: DistillationBatch):
        batch = rows.batch
        # Sampling is its own program; the update is the same for both kinds of rows.
        if rows.on_policy or seq_kd:
            sample = of_student if rows.on_policy else of_teacher
            rollout = hosts.fetch(sample(state, meshes.place(rows.prompts, devices), rows.key))
            batch = rollouts.token_rows(trimmed(rollout, max_new_tokens))
        state, metrics = update(state, meshes.place(batch, devices))
        return state, {**metrics, "on_policy": float(rows.on_policy)}

    def trace(state, rows: DistillationBatch):
        found = update.trace(state, meshes.place(rows.batch, devices))
        if lmbda:
            found["sample"] = collecting.trace_sample(
                of_student, devices, state, rows.prompts, rows.key
            )
        return found

    loss_fn = make_loss(policy, teacher_lm, **options)
    weighted = held_out and with_weights(held_out)
    evaluate = evaluation.of_loss(loss_fn, weighted, training.batch_size, devices)

    # 4. The shared loop: metrics, evaluations, checkpoints, export.
    state = fit(
        run,
        training,
        state,
        Step(step, trace),
        lambda number: take(train, training.seed, number, training.batch_size, lmbda),
        total=total,
        # The teacher is loaded again on resuming, and in no checkpoint.
        fixed=("frozen", "teacher"),
        callbacks=callbacks,
        shown=("loss", "agreement"),
        evaluate=evaluate,
        export=partial(loaded.export, run.path, tokenizer),
        mesh=devices,
    )
    return result(run, model, loaded, tokenizer, state)
