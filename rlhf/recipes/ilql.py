"""Implicit Q-learning for language: values of logged completions, and sampling that leans to what
they value.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf import data, losses, tasks
from rlhf.data.types import Row
from rlhf.fields import documented
from rlhf.losses import offline
from rlhf.ranges import Coefficient, Length, Share, Steps, between
from rlhf.rollouts.types import Array
from rlhf.train import train_step
from rlhf.training import (
    collecting,
    datasets,
    evaluation,
    loading,
    meshes,
    model_info,
    prompts,
    q_heads,
)
from rlhf.training import offline as offline_steps
from rlhf.training import rewards as reward_functions
from rlhf.training.loading import load_policy
from rlhf.training.loop import fit
from rlhf.training.model_info import load_tokenizer
from rlhf.training.optimizers import make_optimizer
from rlhf.training.options import (
    Callbacks,
    DatasetOptions,
    GroupSamplingOptions,
    MeshOptions,
    ModelOptions,
    RewardOptions,
    TrainingOptions,
)
from rlhf.training.policy import Policy
from rlhf.training.q_heads import Heads
from rlhf.training.recipe import recipe
from rlhf.training.runs import RunFolder
from rlhf.training.sampling import stop_criteria
from rlhf.training.trained import Trained, result
from rlhf.typing import StepFn


@documented
class Trajectories(NamedTuple):
    """Logged completions and their rewards.

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


def with_weights(batch: Trajectories) -> Trajectories:
    """An optimizer mini-batch with its weights; a sequence's first token has nothing before it and
    is no action.
    """
    mask = batch.mask & ~losses.segments.starts(batch.segment_ids)
    return batch._replace(mask=mask, weights=losses.weights.token_mean(mask, batch.segment_ids))


def make_loss(
    policy: Policy,
    heads: Heads,
    *,
    tau: float = 0.7,
    discount: float = 0.99,
    cql_coef: float = 0.1,
    awac_coef: float = 1.0,
    awac_beta: float = 0.0,
) -> Callable:
    """The `loss_fn` of `Trajectories` with weights: losses of Q and V, CQL, and the cross-entropy
    of logged completions.

    Neither logits nor Q of all positions exist at once, in value or gradient.

    Args:
      policy: what is trained; `params` is `{"lm": …, "q": …, "v": …}`, `context["target"]` the slow
        Qs.
      heads: two Qs, and V.
      tau: τ of the expectile that V is of Q; 0.5 is the mean, towards 1 the maximum.
      discount: of what follows, per token.
      cql_coef: of the term that keeps Q low for tokens that nobody chose.
      awac_coef: of the cross-entropy of the logged completions.
      awac_beta: how much it leans to better tokens; 0: not at all.
    """

    def per_position(params, target, hidden, token):
        def chosen(q):
            return jnp.take_along_axis(q, token[..., None, None], axis=-1, mode="fill")[..., 0]

        # `[…, 2, V]`: two Qs of every token; the slow ones make the target that V follows.
        q = heads.both(params["q"], hidden)
        slow_q = heads.both(target, hidden)
        cql = offline.cql(q, jnp.broadcast_to(token[..., None], q.shape[:-1])).sum(-1)
        logprobs = losses.logits.token_logprob(policy.lm.unembed(params["lm"], hidden), token)
        values = heads.v.apply(params["v"], hidden)
        return logprobs, values, chosen(q), chosen(slow_q).min(-1), cql

    def loss_fn(params, context, batch, key):
        full = {**params, "lm": policy.full_params(params["lm"], context, key)}
        hidden, _, _ = policy.lm.hidden(
            full["lm"], batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids
        )
        # Position t acts by choosing tokens[:, t + 1]; the last one has no action, and is masked.
        next_tokens = jnp.pad(batch.tokens[:, 1:], ((0, 0), (0, 1)))
        piece = partial(per_position, full, context["target"])
        # A chunk of columns at a time: logits and four Qs `[B, T, V]` would not fit at once.
        found = losses.chunked(piece, hidden, lambda hidden: hidden, next_tokens)
        # What position t - 1 says of tokens[:, t].  Column 0, which the last one rolls into, is in
        # no mask.
        logprobs, values, q, target_q, cql = (jnp.roll(x, 1, axis=1) for x in found)
        td_targets = offline.td_targets(
            batch.rewards, values, batch.mask, discount=discount, segment_ids=batch.segment_ids
        )
        # Both Qs get the same target and differ by their start: their minimum below is cautious.
        first_loss = offline.q_loss(q[..., 0], td_targets, batch.mask)
        second_loss = offline.q_loss(q[..., 1], td_targets, batch.mask)
        per_token = {
            "q_loss": first_loss + second_loss,
            "value_loss": offline.expectile_value_loss(values, target_q, batch.mask, tau=tau),
            "cql": cql_coef * cql,
            "awac": awac_coef
            * offline.awac(logprobs, target_q, values, batch.mask, beta=awac_beta),
        }
        terms = {name: losses.weighted_sum(x, batch.weights) for name, x in per_token.items()}
        metrics = {
            "q": losses.weighted_sum(target_q, batch.weights),
            "value": losses.weighted_sum(values, batch.weights),
        }
        return sum(terms.values()), {**terms, **metrics}

    return loss_fn


def make_update(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    heads: Heads,
    tau: float = 0.7,
    discount: float = 0.99,
    cql_coef: float = 0.1,
    awac_coef: float = 1.0,
    awac_beta: float = 0.0,
    target_rate: float = 0.001,
    target_every: int = 5,
    micro_batches: int = 1,
) -> StepFn:
    """ILQL: which tokens lead to a higher reward, from logged completions of any quality
    (arXiv:2206.11871).

    Defaults are those of trlX.

    Args:
      policy: what is trained; `params` is `{"lm": …, "q": …, "v": …}`, `context["target"]` the slow
        Qs.
      optimizer: any optax transformation.
      heads: two Qs, and V.
      tau: τ of the expectile that V is of Q; 0.5 is the mean, towards 1 the maximum.
      discount: of what follows, per token.
      cql_coef: of the term that keeps Q low for tokens that nobody chose.
      awac_coef: of the cross-entropy of the logged completions.
      awac_beta: how much it leans to better tokens; 0: not at all.
      target_rate: by which the slow Qs follow.
      target_every: steps between their moves.
      micro_batches: parts of a step, taken one after the other; the result is the same.

    Returns: `update(state, batch) -> (state, metrics)`, pure.  The batch needs no weights.
    """
    loss_fn = make_loss(
        policy,
        heads,
        tau=tau,
        discount=discount,
        cql_coef=cql_coef,
        awac_coef=awac_coef,
        awac_beta=awac_beta,
    )
    step = train_step(loss_fn, optimizer, micro_batches=micro_batches)

    def update(state, batch):
        state, metrics = step(state, with_weights(batch))
        target = state.context["target"]
        moved = offline.polyak(target, state.params["q"], rate=target_rate)
        is_due = state.step % target_every == 0
        # Chosen inside the program: a branch on the host would wait for the device.
        target = jax.tree.map(lambda new, old: jnp.where(is_due, new, old), moved, target)
        return state._replace(context=state.context | {"target": target}), metrics

    return update


def lay_out(tokenizer, rows: list[Row], length: int, say: Callable) -> Trajectories:
    """Rows of prompt, completion and reward as arrays, rewards with mean 0 and deviation 1; what is
    cut is said.

    Raises: ValueError for a reward that is no number, and where all are equal.
    """
    for number, row in enumerate(rows):
        reward = row.get("reward")
        if not isinstance(reward, int | float) or not np.isfinite(reward):
            raise ValueError(f"row {number}: reward must be a number, but is {reward!r}")
    fitting = datasets.truncated(data.tokenize_completions(tokenizer, rows), length=length, say=say)
    # Of the remaining rows alone: those that were left out are not trained on.
    rewards = np.array([row["reward"] for row in rows], np.float32)[fitting.remaining]
    centered = np.asarray(losses.whiten(rewards, np.ones(len(rewards), bool)))
    if not centered.any():
        raise ValueError(
            f"the reward is {rewards[0]} in all {len(rewards)} rows, so that there is nothing to "
            "learn; check it"
        )
    batch = data.batch(fitting.sides[0])
    # The reward comes with the last action; tokens before it get theirs by the discounted return.
    last = np.asarray(losses.segments.last_trained(batch.mask, batch.segment_ids))
    return Trajectories(
        tokens=batch.tokens,
        mask=batch.mask,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        rewards=last * (centered / centered.std())[:, None],
    )


@recipe
def main(
    model: ModelOptions,
    dataset: DatasetOptions,
    *,
    training: TrainingOptions = TrainingOptions(learning_rate=5e-5),
    mesh: MeshOptions,
    sampling: GroupSamplingOptions,
    reward: RewardOptions,
    output: str,
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
    callbacks: Callbacks = (),
) -> Trained:
    """Implicit Q-learning for language: learns from logged completions of any quality which tokens
    lead to a higher reward.

    Rows have `prompt`, `completion` and `reward`.  Beside the model, the run's folder holds
    heads.safetensors: two Qs and V.  The learning rate is trlX's.

    Args:
      output: a new folder for the run.
      tau: of the expectile that V is of Q; 0.5 is the mean, towards 1 the maximum.
      discount: of what follows, per token.
      cql_coef: of the term that keeps Q low for tokens that nobody chose.
      awac_coef: of the cross-entropy of the logged completions.
      awac_beta: how much it leans to better tokens; 0: not at all.
      target_rate: by which the slow Qs follow, every `target_every` steps.
      target_every: steps.
      beta: how much sampling leans to what is valued, logits + beta (Q - V): of completions of
        --eval_dataset, and when `rlhf eval` and `rlhf chat` use the run.
      max_length: tokens of a prompt with its completion; longer ones are cut.
      resume: go on with the run in the folder.
      callbacks: `(step, metrics)` functions, called with every line of the log.
    """
    # 1. Everything that can be wrong is found before the model loads.
    run = RunFolder(output, options=locals())
    model_info.check_decoder(model)
    devices = meshes.make(mesh, rows=training.batch_size, micro_batches=training.micro_batches)
    tokenizer = load_tokenizer(model)
    stop = stop_criteria(model, sampling, tokenizer)
    rows, held_out_rows = datasets.load_rows(dataset, tasks.trajectories)
    train = lay_out(tokenizer, rows, max_length, run.say)
    held_out = prompts.tokenize(tokenizer, held_out_rows) if held_out_rows else None
    total = training.total_steps(len(train.tokens), has_held_out=held_out is not None)
    model_info.check_tokens(model, tokenizer, train)
    if held_out:
        model_info.check_tokens(
            model, tokenizer, held_out.prompts, max_new_tokens=sampling.max_new_tokens
        )
    reward_fn = (
        reward_functions.load(reward, dataset, tokenizer, held_out_rows) if held_out_rows else None
    )

    # 2. The model with its heads, the slow Qs and the optimizer state, born sharded.
    loaded = load_policy(model, training.seed, devices, say=run.say)
    policy = loaded.policy
    lm_params = policy.lm_params(loaded.params, loaded.context())
    # From shapes: a model of your own has no config to read it from.
    vocab_size = jax.eval_shape(
        policy.lm.unembed,
        lm_params,
        jax.ShapeDtypeStruct((loading.hidden_size(policy.lm, lm_params),), jnp.float32),
    ).shape[-1]
    heads = q_heads.heads_of(loading.hidden_size(policy.lm, lm_params), vocab_size)
    fresh = loaded.place(heads.init(jax.random.key(training.seed)), heads.axes())
    optimizer = make_optimizer(training, total)
    # A copy: a donated state frees each array once.
    context = {**loaded.context(), "target": loading.copied(fresh["q"])}
    # Heads beside the model's parameters: one optimizer trains all, the slow Qs follow in the
    # context.
    with_heads = loaded._replace(params={"lm": loaded.params, **fresh})
    axes = {**heads.axes(), "target": heads.axes()["q"]}
    state = with_heads.init_state(optimizer, training.seed, context, axes=axes)

    # 3. The step, and an evaluation by what the model samples.
    update = make_update(
        policy,
        optimizer,
        heads=heads,
        tau=tau,
        discount=discount,
        cql_coef=cql_coef,
        awac_coef=awac_coef,
        awac_beta=awac_beta,
        target_rate=target_rate,
        target_every=target_every,
        micro_batches=training.micro_batches,
    )
    evaluate = None
    if reward_fn is not None:
        sample = q_heads.make_sampler(loaded, heads, sampling, stop, beta)
        evaluate = evaluation.of_completions(
            run,
            collecting.sampled(sample, reward_fn, devices),
            held_out,
            training,
            tokenizer,
        )

    def of_policy(state):
        return state._replace(params=state.params["lm"])

    def export(state, over):
        heads_params = {name: state.params[name] for name in fresh} | {
            "target": state.context["target"]
        }
        # Heads first: whoever finds a model in the folder finds its heads too.
        q_heads.save(run.path / q_heads.FILE, heads_params)
        loaded.export(run.path, tokenizer, of_policy(state), over)

    # 4. The shared loop: metrics, evaluations, checkpoints, export.
    state = fit(
        run,
        training,
        state,
        offline_steps.make_step(update, devices, state),
        datasets.batches(train, training, devices),
        total=total,
        callbacks=callbacks,
        shown=("reward", "loss", "q_loss", "value_loss"),
        evaluate=evaluate,
        export=export,
        mesh=devices,
    )
    return result(run, model, loaded, tokenizer, of_policy(state))
