"""The frame of recipes that sample: what a run starts from, the optimizer steps on a batch of answers, and the loop."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf import rollouts, tasks
from rlhf.fields import documented
from rlhf.lm import LM, SharedPrefix
from rlhf.loop import Training, fit
from rlhf.losses import moments
from rlhf.losses.controllers import Controller
from rlhf.recipes import online, setup
from rlhf.recipes.importance import Importance, Weigh
from rlhf.rollouts import Prompts
from rlhf.runs import RunFolder
from rlhf.train import TrainState, minibatches, train_step

RUNNING = moments.running()


@documented
class Start(NamedTuple):
    """What a run has before its policy is loaded.

    Attributes:
      run: where everything goes.
      training: the options of training.
      tokenizer: of the policy.
      eos_ids: of the tokens that end an answer.
      train: questions to learn from.
      test: questions to judge by; None: there are none.
      total: steps.
      judge: what answers are worth.
      mini_batches: optimizer mini-batches of a pass.
      epochs: passes over the answers of a step.
    """

    run: RunFolder
    training: Training
    tokenizer: Any
    eos_ids: tuple[int, ...]
    train: online.Questions
    test: online.Questions | None
    total: int
    judge: online.Judge
    mini_batches: int
    epochs: int


def start(
    run: RunFolder, model: setup.Model, source: online.Asking, training: Training, scoring: online.Scoring,
    drawing: online.Drawing, *,
    rows: int, mini_batches: int = 1, epochs: int = 1,
) -> Start:  # fmt: skip
    """The questions and what judges the answers, all of it checked.

    Args:
      rows: of a step's batch: answers, or pairs of them.
      mini_batches: optimizer mini-batches that they are cut into.
      epochs: passes over them.

    Raises: ValueError for options, questions and rewards that cannot be.
    """
    if rows % (mini_batches * training.micro_batches):
        cut = f"{mini_batches} mini-batches of {training.micro_batches} equal parts, {epochs} times"
        raise ValueError(f"a step's {rows} rows cannot be taken in {cut}; change --mini_batches or --batch_size")
    tokenizer = model.tokenizer()
    seq2seq = model.seq2seq(tokenizer)
    eos_ids = online.ends(model.model, tokenizer)
    asked, held_out = source.rows(tasks.prompts)
    limits: dict[str, Any] = dict(most=source.max_prompt_length, say=run.say)
    train = online.Questions.of(tokenizer, asked, seq2seq, **limits)
    test = online.Questions.of(tokenizer, held_out, seq2seq, **limits) if held_out else None
    total = training.total_steps(len(train.rows), judged=test is not None)
    model.check(tokenizer, train.prompts, test and test.prompts, more=drawing.max_new_tokens)
    judge = scoring.judge(source, tokenizer, train.rows, test.rows if test else [])
    return Start(run, training, tokenizer, eos_ids, train, test, total, judge, mini_batches, epochs)


def learn(
    begin: Start,
    policy: setup.Policy,
    sample: Callable,
    experience: Callable,
    prepare: Callable,
    loss_fn: Callable,
    *,
    together: int = 1,
    fixed: dict[str, Any] | None = None,
    context: dict[str, Any] | None = None,
    hooks: Sequence[Callable] = (),
    answer: Callable | None = None,
    export: Callable | None = None,
    target_kl: float | None = None,
    weigh: Weigh | None = None,
    shown: tuple[str, ...] = ("reward", "completion_length"),
) -> tuple[TrainState, dict[str, float]]:
    """The loop: answers are drawn and judged, made a batch of, and learnt from.

    Args:
      policy: whose parameters are trained.
      sample: `(state, prompts, key) -> Rollout`, what is learnt from.
      experience: `(state, rollout, rewards [B]) -> (state, batch, figures)`; what of the state's context moves, moves here.
      prepare: `(mini-batch) -> mini-batch`, with its weights and all else that couples its rows.
      loss_fn: of the prepared mini-batch, for `train_step`.
      together: rows of the batch, one after another, that stay together in mini-batches and micro-batches.
      fixed, context, hooks: as in `rlhf.loop.fit`.
      answer: as `sample`, for evaluations; None: `sample`.
      export: as in `rlhf.loop.fit`; None: the policy's own.
      target_kl: as in `updates`.
      weigh: importance weights of the batch, of `Importance.weigh`; None: there are none.

    Returns: the last state and the last figures.
    """
    run, training = begin.run, begin.training
    group, prepare, loss_fn = in_groups(together, prepare, loss_fn)

    def make_step(optimizer):
        step = train_step(loss_fn, optimizer, micro_batches=training.micro_batches)

        @partial(jax.jit, donate_argnums=0)
        def update(state, rollout, rewards, key):
            state, batch, seen = experience(state, rollout, rewards)
            batch, mismatch = weighted(weigh, batch, rollout)
            batches = minibatches(key, group(batch), begin.mini_batches, begin.epochs)
            state, metrics = updates(step, prepare, state, batches, target_kl=target_kl)
            return state, {**metrics, **online.figures(rollout), **seen, **mismatch}

        def iterate(state, asked: online.Asked):
            rollout = sample(state, asked.prompts, asked.key)
            rewards, figures = begin.judge(rollout, asked.columns, len(rollout.tokens) // len(asked.prompts.tokens))
            state, metrics = update(state, rollout, rewards, jax.random.fold_in(asked.key, 1))
            return state, {**figures, **metrics}

        return iterate

    evaluate = begin.test and online.evaluation(run, answer or sample, begin.judge, begin.test, training, begin.tokenizer)
    return fit(
        run, training, make_step, policy.params, lambda number, size: begin.train.take(training.seed, number, size),
        total=begin.total, fixed=fixed, context=context, hooks=hooks, updates=begin.mini_batches * begin.epochs, shown=shown,
        evaluate=evaluate, export=export or partial(policy.export, run.path, begin.tokenizer),
    )  # fmt: skip


def updates(
    step: Callable, prepare: Callable, state: TrainState, batches: Any, *, target_kl: float | None = None
) -> tuple[TrainState, dict]:
    """Optimizer steps over mini-batches `[N, rows, ...]`; metrics are means over the steps that were taken.

    Where a step sees an `approx_kl` above `target_kl`, it is the last: the others are counted in `state.step`, and change
    nothing else.
    """
    taken = lambda state, batch: step(state, prepare(batch))
    if target_kl is None:
        state, metrics = jax.lax.scan(taken, state, batches)
        return state, jax.tree.map(jnp.mean, metrics)
    nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(taken, state, jax.tree.map(lambda x: x[0], batches))[1])

    def unless_far(carry, batch):
        state, far = carry
        passed = lambda state, batch: (state._replace(step=state.step + 1), nothing)
        new, metrics = jax.lax.cond(far, passed, taken, state, batch)
        return (new, far | (metrics["approx_kl"] > target_kl)), {**metrics, "updates": 1.0 - far}

    (state, _), metrics = jax.lax.scan(unless_far, (state, jnp.array(False)), batches)
    number = metrics.pop("updates").sum()
    return state, {**jax.tree.map(lambda x: x.sum() / number, metrics), "updates": number}


def weighted(weigh: Weigh | None, batch: Any, rollout: rollouts.Rollout) -> tuple[Any, dict[str, Any]]:
    """The batch with importance weights, and how far sampler and policy are apart."""
    if weigh is None:
        return batch, {}
    importance, mismatch = weigh(rollout)
    return batch._replace(importance=importance), mismatch


def in_groups(rows: int, prepare: Callable, loss_fn: Callable) -> tuple[Callable, Callable, Callable]:
    """`(group, prepare, loss_fn)`: batches with so many rows together, `[B / rows, rows, ...]`, and both functions for them."""
    group = lambda batch: jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]) if jnp.ndim(x) else x, batch)
    flat = lambda batch: jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]) if jnp.ndim(x) else x, batch)
    return (
        group,
        lambda batch: group(prepare(flat(batch))),
        lambda params, context, batch, key: loss_fn(params, context, flat(batch), key),
    )


def moving(controller: Controller) -> dict[str, Any]:
    """What `adapted` keeps in the context: the KL coefficient, and the moments of all scores."""
    return {"kl": controller.init(), "scores": RUNNING.init()}


def adapted(
    experience: Callable, context: Any, scores: Any, controller: Controller, *, scale_scores: bool = False,
    score_clip: float | None = None,
) -> tuple[Any, Any, dict]:  # fmt: skip
    """`(context, batch, figures)`: `experience(scores, kl_coef=…)` with what moves from batch to batch.

    Args:
      controller: of the KL coefficient, which moves by the KL seen.
      scale_scores: less the mean of all so far, divided by their deviation.
      score_clip: scores beyond ± this are cut, after scaling.
    """
    so_far, kl = RUNNING.update(context["scores"], scores), context["kl"]
    scaled = RUNNING.scale(so_far, scores) if scale_scores else scores
    scaled = scaled if score_clip is None else jnp.clip(scaled, -score_clip, score_clip)
    batch, seen = experience(scaled, kl_coef=kl.coef)
    moved = {"kl": controller.update(kl, seen["kl_to_reference"], len(scores)), "scores": so_far}
    return context | moved, batch, {**seen, "reward": jnp.nanmean(scores), "kl_coef": kl.coef}


def iteration(
    lm: LM,
    reward_fn: Callable,
    optimizer,
    experience: Callable,
    prepare: Callable,
    objective: Callable,
    *,
    max_new_tokens: int,
    num_samples: int = 1,
    sampler: rollouts.samplers.Sampler = rollouts.samplers.Sampler(),
    eos_ids: tuple[int, ...] = (),
    epochs: int = 1,
    mini_batches: int = 1,
    micro_batches: int = 1,
    early_end: bool = True,
    of_lm: Callable = lambda params: params,
    importance: Importance = Importance(),
) -> Callable:
    """One pure iteration, `(state, prompts, key) -> (state, metrics)`: sample, score, compare, and take the optimizer steps.

    Args:
      reward_fn: `(context, rollout, key) -> [B]`.
      experience, prepare: as in `learn`.
      objective: `(SharedPrefix) -> loss_fn` of what the rows of a micro-batch share.
      max_new_tokens, num_samples, sampler, eos_ids, early_end: of `rollouts.generate`.
      epochs, mini_batches: of `rlhf.train.minibatches`.  micro_batches: of `rlhf.train_step`.
      of_lm: the language model's parameters, of those that are trained.
      importance: how tokens are weighed where the sampler filters.
    """

    def iterate(state: TrainState, prompts: Prompts, key) -> tuple[TrainState, dict]:
        sample_key, reward_key, order_key = jax.random.split(key, 3)
        rollout = rollouts.generate(
            lm, of_lm(state.params), prompts, sample_key, max_new_tokens=max_new_tokens, num_samples=num_samples,
            sampler=sampler, eos_ids=eos_ids, early_end=early_end,
        )  # fmt: skip
        rewards = reward_fn(state.context, rollout, reward_key)
        state, batch, seen = experience(state, rollout, rewards)
        batch, mismatch = weighted(importance.weigh(sampler), batch, rollout)
        shared = SharedPrefix(num_samples, max_new_tokens).fitting(len(rollout.tokens), mini_batches * micro_batches)
        group, prepare_groups, loss_fn = in_groups(shared.rows, prepare, objective(shared))
        step = train_step(loss_fn, optimizer, micro_batches=micro_batches)
        state, metrics = updates(step, prepare_groups, state, minibatches(order_key, group(batch), mini_batches, epochs))
        return state, {**metrics, **seen, **mismatch}

    return iterate
