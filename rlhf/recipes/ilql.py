"""Implicit Q-learning for language: values of logged answers, and sampling that leans to what they value."""

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf import averages, data, losses, tasks
from rlhf.data.types import Row
from rlhf.fields import documented
from rlhf.lm import LM
from rlhf.loop import Training, fit
from rlhf.losses import offline
from rlhf.models import huggingface
from rlhf.models.huggingface_config import decoder_of
from rlhf.ranges import Coefficient, Length, Share, Steps, between, checked
from rlhf.recipes import online, q_heads, setup
from rlhf.recipes.online import Sampling, Scoring
from rlhf.recipes.q_heads import Heads
from rlhf.rollouts.types import Array
from rlhf.runs import RunFolder
from rlhf.train import reference


@documented
class Trajectories(NamedTuple):
    """Logged answers and what they were worth.

    Attributes:
      tokens: [B, T] int32.
      mask: [B, T] bool, True on actions.
      positions: [B, T] int32.
      segment_ids: [B, T] int32, 0 = padding.
      rewards: [B, T] float32.
      weights: [B, T] float32, of the whole optimizer mini-batch.
    """

    tokens: Array
    mask: Array
    positions: Array
    segment_ids: Array
    rewards: Array
    weights: Array | None = None


def prepare(batch: Trajectories) -> Trajectories:
    """The optimizer mini-batch with its weights; a sequence's first token has nothing before it and is no action."""
    mask = batch.mask & ~losses.segments.starts(batch.segment_ids)
    return batch._replace(mask=mask, weights=losses.weights.token_mean(mask, batch.segment_ids))


def objective(
    lm: LM, heads: Heads, *, tau: float = 0.7, discount: float = 0.99, cql_coef: float = 0.1, awac_coef: float = 1.0,
    awac_beta: float = 0.0,
) -> Callable:  # fmt: skip
    """The `loss_fn` of prepared `Trajectories`; `params` is `{"lm": …, "q": …, "v": …}`, `context["target"]` the slow Qs.

    Neither logits nor Q of all positions exist at once, in value or gradient.
    """

    def per_position(params, target, hidden, token):
        chosen = lambda q: jnp.take_along_axis(q, token[..., None, None], axis=-1, mode="fill")[..., 0]
        q, slow = heads.both(params["q"], hidden), heads.both(target, hidden)
        cql = offline.cql(q, jnp.broadcast_to(token[..., None], q.shape[:-1])).sum(-1)
        logprobs = losses.logits.token_logprob(lm.unembed(params["lm"], hidden), token)
        return logprobs, heads.v.apply(params["v"], hidden), chosen(q), chosen(slow).min(-1), cql

    def loss_fn(params, context, batch, key):
        hidden, _, _ = lm.hidden(params["lm"], batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)
        following = jnp.pad(batch.tokens[:, 1:], ((0, 0), (0, 1)))
        piece = partial(per_position, params, context["target"])
        found = losses.chunked(piece, hidden, lambda hidden: hidden, following)
        here = lambda x: jnp.roll(x, 1, axis=1)  # what position t - 1 says of tokens[:, t]; prepared masks lack column 0
        logprobs, values, q, target, cql = map(here, found)
        aims = offline.td_targets(batch.rewards, values, batch.mask, discount=discount, segment_ids=batch.segment_ids)
        parts = {
            "q_loss": offline.q_loss(q[..., 0], aims, batch.mask) + offline.q_loss(q[..., 1], aims, batch.mask),
            "value_loss": offline.expectile_value_loss(values, target, batch.mask, tau=tau),
            "cql": cql_coef * cql,
            "awac": awac_coef * offline.awac(logprobs, target, values, batch.mask, beta=awac_beta),
        }
        parts = {name: losses.weighted_sum(x, batch.weights) for name, x in parts.items()}
        figures = {"q": losses.weighted_sum(target, batch.weights), "value": losses.weighted_sum(values, batch.weights)}
        return sum(parts.values()), {**parts, **figures}

    return loss_fn


def lay_out(tokenizer, rows: list[Row], length: int, say: Callable) -> Trajectories:
    """Rows of prompt, completion and reward as arrays, rewards with mean 0 and deviation 1; what is cut is said.

    Raises: ValueError for a reward that is no number, and where all are equal.
    """
    for number, row in enumerate(rows):
        reward = row.get("reward")
        if not isinstance(reward, int | float) or not np.isfinite(reward):
            raise ValueError(f"row {number}: reward must be a number, but is {reward!r}")
    kept = setup.truncated(data.tokenize_completions(tokenizer, rows), length=length, say=say)
    rewards = np.array([row["reward"] for row in rows], np.float32)[kept.kept]
    centered = np.asarray(losses.whiten(rewards, np.ones(len(rewards), bool)))
    if not centered.any():
        raise ValueError(f"the reward is {rewards[0]} in all {len(rewards)} rows, so that there is nothing to learn; check it")
    batch = data.batch(kept.sides[0])
    last = np.asarray(losses.segments.last_trained(batch.mask, batch.segment_ids))
    return Trajectories(*batch[:4], last * (centered / centered.std())[:, None])


@checked
def main(
    model: setup.Model,
    source: setup.Data,
    training: Training,
    scoring: Scoring,
    sampling: Sampling,
    output: str,
    *,
    tau: Annotated[float, between(0, 1, above=True, below=True)] = 0.7,
    discount: Share = 0.99,
    cql_coef: Coefficient = 0.1,
    awac_coef: Coefficient = 1.0,
    awac_beta: Coefficient = 0.0,
    target_rate: Annotated[float, between(0, 1, above=True)] = 0.001,
    target_every: Steps = 5,
    beta: Coefficient = 1.0,
    max_length: Length = 1024,
    resume: bool = False,
) -> dict[str, float]:
    """Implicit Q-learning for language: learns from logged answers of any quality which tokens lead to a higher reward.

    Rows have `prompt`, `completion` and `reward`.  Beside the model, the run's folder holds heads.safetensors: two Qs and V.

    Args:
      output: a new folder for the run.
      tau: of the expectile that V is of Q; 0.5 is the mean, towards 1 the maximum.
      discount: of what follows, per token.
      cql_coef: of the term that keeps Q low for tokens that nobody chose.
      awac_coef: of the cross-entropy of the logged answers.
      awac_beta: how much it leans to better tokens; 0: not at all.
      target_rate: by which the slow Qs follow, every `target_every` steps.
      target_every: steps.
      beta: how much sampling leans to what is valued, logits + beta (Q - V): of answers to --eval_dataset, and when `rlhf eval`
        and `rlhf chat` ask the run.
      max_length: tokens of a prompt with its completion; longer ones are cut.
      resume: go on with the run in the folder.
    """
    run = RunFolder(output, options=locals())
    model.check_decoder()
    follow = averages.following(target_every, target_rate, name="target", of=itemgetter("q"))
    tokenizer = model.tokenizer()
    eos_ids = online.ends(model.model, tokenizer)
    rows, held_out = source.rows(tasks.trajectories)
    train, test = lay_out(tokenizer, rows, max_length, run.say), online.Questions.of(tokenizer, held_out) if held_out else None
    total = training.total_steps(len(train.tokens), judged=test is not None)
    model.check(tokenizer, train)
    if test:
        model.check(tokenizer, test.prompts, more=sampling.max_new_tokens)
    judge = scoring.judge(source, tokenizer, held_out) if held_out else None
    policy = setup.policy(model, training.seed)
    size = setup.hidden_size(policy.lm, policy.whole(policy.params, policy.context()))
    heads = q_heads.heads_of(size, decoder_of(huggingface.read_config(model.model)).vocab_size)
    fresh = heads.init(jax.random.key(training.seed))
    loss = objective(policy.lm, heads, tau=tau, discount=discount, cql_coef=cql_coef, awac_coef=awac_coef, awac_beta=awac_beta)

    def loss_fn(params, context, batch, key):
        return loss({**params, "lm": policy.whole(params["lm"], context)}, context, batch, key)

    def export(state, over):
        learnt = {**{name: state.params[name] for name in fresh}, "target": state.context["target"]}
        q_heads.save(run.path / q_heads.FILE, learnt)  # first: a run with a model has heads
        policy.export(run.path, tokenizer, state._replace(params=state.params["lm"]), over)

    sample = q_heads.player(policy, heads, sampling, eos_ids, beta)
    _, figures = fit(
        run, training, setup.offline_step(loss_fn, prepare, training), {"lm": policy.params, **fresh},
        lambda number, size: setup.take(train, training.seed, number, size),
        total=total, fixed=policy.context(), context={"target": reference(fresh["q"])}, hooks=[follow],
        shown=("reward", "loss", "q_loss", "value_loss"),
        evaluate=online.evaluation(run, sample, judge, test, training, tokenizer) if judge and test else None, export=export,
    )  # fmt: skip
    return figures
