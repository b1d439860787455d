"""Generalised knowledge distillation: a student near its teacher's distribution, on data and on its own answers."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf import data, losses, rollouts, tasks
from rlhf.data.types import Row
from rlhf.fields import documented
from rlhf.lm import LM
from rlhf.loop import Training, fit
from rlhf.models import huggingface
from rlhf.models.huggingface_config import decoder_of
from rlhf.ranges import Length, Share, Temperature, checked
from rlhf.recipes import online, setup, sft
from rlhf.recipes.online import Sampling
from rlhf.rollouts import Batch, Prompts
from rlhf.runs import RunFolder, model_of


def objective(lm: LM, teacher: LM, *, vocab_size: int | None = None, beta: float = 0.5, temperature: float = 1.0) -> Callable:
    """The `loss_fn` of a `Batch` that `sft.prepare` has prepared; `params` are the student's, `context` the teacher's.

    Both models' logits exist for a chunk of columns at a time, in value and gradient.

    Args:
      vocab_size: tokens that both know, the first ones of each; None: all.
      beta: of `losses.distillation.jsd`; 0 is KL(teacher ‖ student), 1 KL(student ‖ teacher).
      temperature: divides both models' logits.
    """

    def per_position(params, taught_by, hidden, taught):
        both = lm.unembed(params, hidden), teacher.unembed(taught_by, taught)
        logits, theirs = (x[..., :vocab_size] / temperature for x in both)
        agree = losses.logits.is_top1(logits, jnp.argmax(theirs, axis=-1))
        return losses.distillation.jsd(logits, theirs, beta=beta), agree.astype(jnp.float32)

    def loss_fn(params, context, batch, key):
        where = dict(positions=batch.positions, segment_ids=batch.segment_ids)
        before = lambda x: jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))  # position t - 1 speaks of tokens[:, t]
        hidden, taught = (before(of.hidden(p, batch.tokens, **where)[0]) for of, p in ((lm, params), (teacher, context)))
        compare = partial(per_position, params, context)
        found = losses.chunked(compare, hidden, lambda h: h, jax.lax.stop_gradient(taught), needed=batch.mask)
        divergence, agree = (losses.weighted_sum(x, batch.weights) for x in found)
        return divergence, {"agreement": agree}

    return loss_fn


def common_vocabulary(tokenizer: Any, model: str, teacher: str) -> int:
    """Tokens that student and teacher both have logits for: embeddings may end in rows that no token uses.

    Raises: ValueError where their tokenizers differ, or a model has fewer logits than tokens.
    """
    mine, theirs = tokenizer.get_vocab(), huggingface.load_tokenizer(teacher).get_vocab()
    size = min(decoder_of(huggingface.read_config(name)).vocab_size for name in (model, teacher))
    if differ := sorted(token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token)):
        raise ValueError(
            f"{teacher} has another vocabulary than {model}: {len(theirs)} tokens and {len(mine)}, and {len(differ)} differ, "
            f"{differ[0]!r} first; a teacher and its student must share a tokenizer"
        )
    if max(mine.values()) >= size:
        raise ValueError(f"{len(mine)} tokens, but {model} or {teacher} has logits for {size}; take one that has them all")
    return size


@documented
class Lesson(NamedTuple):
    """What a step is of.

    Attributes:
      batch: the rows' own completions.
      prompts: of the rows alone.
      own: the student answers.
      key: of what is drawn.
    """

    batch: Batch
    prompts: Prompts
    own: bool
    key: Any


def lay_out(tokenizer, rows: list[Row], length: int, say: Callable) -> tuple[Batch, Prompts]:
    """Rows of prompt and completion, and their prompts alone; what is cut or left out is said."""
    kept = setup.truncated(data.tokenize_completions(tokenizer, rows), length=length, say=say)
    return data.batch(kept.sides[0]), online.Questions.of(tokenizer, [rows[i] for i in kept.kept]).prompts


def lesson(rows: tuple[Batch, Prompts], seed: int, number: int, size: int, lmbda: float) -> Lesson:
    """What a step is of, a pure function of seed and number: with probability `lmbda` the student answers."""
    own = bool(np.random.default_rng([seed, number, 1]).random() < lmbda)
    batch, prompts = setup.take(rows, seed, number, size)
    return Lesson(batch, prompts, own, jax.random.fold_in(jax.random.key(seed), number))


@checked
def main(
    model: setup.Model, source: setup.Data, training: Training, output: str, *, teacher: str, beta: Share = 0.5,
    lmbda: Share = 0.5, seq_kd: bool = False, temperature: Temperature = 0.9, max_new_tokens: Length = 128,
    loss_temperature: Temperature = 1.0, max_length: Length = 1024, resume: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Generalised knowledge distillation: a student learns its teacher's distribution over every next token.

    Rows have `prompt` and `completion`.

    Args:
      output: a new folder for the run.
      teacher: a model with the same tokenizer: a run's folder, a model's, or a name on the Hugging Face Hub.
      beta: between the two directions of the divergence: 0 is KL(teacher ‖ student), 1 KL(student ‖ teacher).
      lmbda: the share of steps on answers that the student draws itself; the others are on the rows' completions.
      seq_kd: the others are on answers that the teacher draws.
      temperature: of the answers drawn.
      max_new_tokens: the most tokens of an answer drawn.
      loss_temperature: divides both models' logits in the loss.
      max_length: tokens of a prompt with its completion; longer ones are cut.
      resume: go on with the run in the folder.
    """
    run = RunFolder(output, options=locals())
    model.check_decoder()
    teacher = model_of(teacher)
    sampling = Sampling(num_samples=1, max_new_tokens=max_new_tokens, temperature=temperature)
    tokenizer = model.tokenizer()
    size, eos_ids = common_vocabulary(tokenizer, model.model, teacher), online.ends(model.model, tokenizer)
    rows, held_out = source.rows(tasks.demonstrations)
    laid_out = lambda rows: lay_out(tokenizer, rows, max_length, run.say)
    train, test = laid_out(rows), laid_out(held_out)[0] if held_out else None
    total = training.total_steps(len(train[0].tokens), judged=test is not None)
    model.check(tokenizer, train[0], test)
    model.check(tokenizer, train[1], more=sampling.max_new_tokens)
    policy = setup.policy(model, training.seed)
    taught_by, taught, _ = huggingface.load(teacher, dtype=jnp.dtype(model.dtype))
    distil = objective(policy.lm, taught_by, vocab_size=size, beta=beta, temperature=loss_temperature)
    draw = partial(rollouts.generate, max_new_tokens=max_new_tokens, sampler=sampling.sampler(), eos_ids=eos_ids)

    loss_fn = lambda params, context, batch, key: distil(policy.whole(params, context), context["teacher"], batch, key)

    def make_step(optimizer):
        update = setup.offline_step(loss_fn, sft.prepare, training)(optimizer)

        def iterate(state, asked: Lesson):
            batch, whole = asked.batch, policy.whole(state.params, state.context)
            if asked.own or seq_kd:
                answers = (policy.lm, whole) if asked.own else (taught_by, state.context["teacher"])
                batch = Batch(*draw(*answers, asked.prompts, asked.key)[:4])
            state, metrics = update(state, batch)
            return state, {**metrics, "own": float(asked.own)}

        return iterate

    _, figures = fit(
        run, training, make_step, policy.params,
        lambda number, size: lesson(train, training.seed, number, size, lmbda),
        total=total, fixed={**policy.context(), "teacher": taught}, shown=("loss", "agreement"),
        evaluate=setup.evaluation(loss_fn, test and sft.prepare(test), training.batch_size),
        export=partial(policy.export, run.path, tokenizer),
    )  # fmt: skip
    return figures
