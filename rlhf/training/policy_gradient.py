"""Policy-gradient steps on a batch with advantages: what GRPO, RLOO and their kin share."""

import inspect
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax

from rlhf import losses
from rlhf.losses import groups, presets
from rlhf.losses import policy as policy_losses
from rlhf.losses.presets import Objective
from rlhf.metrics import Ratio
from rlhf.rollouts import Batch
from rlhf.shared_prefix import NOT_SHARED, SharedPrefix
from rlhf.train import minibatches, run_minibatches, train_step
from rlhf.training import datasets
from rlhf.training.policy import Policy


def make_loss(
    policy: Policy,
    algorithm: Objective,
    *,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    shared: SharedPrefix | None = None,
) -> Callable:
    """The `loss_fn` of a mini-batch with its weights, for `rlhf.train_step`.

    `Σ w (L(logprobs, old_logprobs, advantages) · π/μ + kl_coef · k3 - entropy_coef · H)`; gradients
    flow through the policy's log-probs and entropy alone.

    Args:
      policy: what is trained.
      algorithm: whose per-token loss L is taken.
      kl_coef: of the KL to the reference, in nats a token; 0: it is not computed, and the batch
        needs no `ref_logprobs`.
      entropy_coef: of the entropy, which is rewarded.
      shared: what the rows of a micro-batch have in common.
    """

    def per_token(logprobs, entropy, batch):
        loss = algorithm.loss(logprobs, batch.old_logprobs, batch.advantages, batch.mask)
        # Importance weights are of what was sampled.  The KL is a property of the policy itself,
        # and gets none.
        if batch.importance is not None:
            loss = loss * batch.importance
        if kl_coef:
            loss = loss + kl_coef * losses.kl.k3(logprobs, batch.ref_logprobs, batch.mask)
        return loss - entropy_coef * entropy if entropy_coef else loss

    def loss_fn(params, context, batch, key):
        if algorithm.is_token_level:
            loss, scored = policy.score_loss(
                params, context, batch, per_token, shared=shared, key=key
            )
        else:
            scored = policy.score(params, context, batch, shared=shared, key=key)
            loss = losses.weighted_sum(
                per_token(scored.logprobs, scored.entropy, batch), batch.weights
            )
        metrics = {
            "entropy": losses.weighted_sum(scored.entropy, batch.weights),
            **clip_metrics(algorithm, scored.logprobs, batch),
        }
        if kl_coef:
            kl = losses.kl.k3(scored.logprobs, batch.ref_logprobs, batch.mask)
            metrics["kl"] = losses.weighted_sum(kl, batch.weights)
        return loss, metrics

    return loss_fn


def clip_metrics(algorithm: Objective, logprobs, batch: Batch) -> dict:
    """The share of tokens that train nothing because their ratio is clipped: where advantages are
    negative, positive, and both.

    Whatever the algorithm, those are the tokens with an advantage on which its loss has no slope.
    """
    # The slope is found by differentiating the loss again, for any algorithm: its clipping rule
    # need not be known here.  It is elementwise, and costs nothing beside the model.
    fixed = jax.lax.stop_gradient(logprobs)
    slope = jax.grad(
        lambda x: jnp.sum(algorithm.loss(x, batch.old_logprobs, batch.advantages, batch.mask))
    )(fixed)
    # An advantage of 0 has no slope either, and is not clipped: the parts below leave it out.
    is_clipped = batch.mask & (slope == 0)
    number = batch.mask.sum().astype(jnp.float32)
    advantages = jnp.asarray(batch.advantages)
    parts = {
        "clip_ratio/low_mean": is_clipped & (advantages < 0),
        "clip_ratio/high_mean": is_clipped & (advantages > 0),
        "clip_ratio/region_mean": is_clipped & (advantages != 0),
    }
    # A ratio of sums: tokens are not spread evenly over micro-batches.
    return {name: Ratio(part.sum().astype(jnp.float32), number) for name, part in parts.items()}


def make_steps(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    algorithm: Objective,
    *,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    epochs: int = 1,
    num_minibatches: int = 1,
    micro_batches: int = 1,
    prompt: SharedPrefix = NOT_SHARED,
) -> Callable:
    """Optimizer steps on a batch that has its advantages.

    Args:
      policy: what is trained.
      optimizer: any optax transformation.
      algorithm: whose loss and weights are taken.
      kl_coef: of the KL to the reference, in nats a token; 0: the batch needs no `ref_logprobs`.
      entropy_coef: of the entropy, which is rewarded.
      epochs: passes over the batch, each in a new order.
      num_minibatches: optimizer steps of a pass.
      micro_batches: parts of a step, taken one after the other; the result is the same.
      prompt: what rows have in common; groups are made smaller where mini-batches and micro-batches
        cut them.

    Returns: `steps(state, batch, key) -> (state, metrics)`, pure.
    """

    def steps(state, batch, key):
        # The number of rows is known only here; mini-batches and micro-batches may cut a group,
        # whose prompt is then read once a part.
        shared = prompt.fitting(len(batch.tokens), num_minibatches * micro_batches)
        loss_fn = make_loss(
            policy, algorithm, kl_coef=kl_coef, entropy_coef=entropy_coef, shared=shared
        )
        step = train_step(
            loss_fn, optimizer, micro_batches=micro_batches, group_size=shared.group_size
        )

        # Weights are of the whole optimizer mini-batch: made here, before the step cuts it into
        # micro-batches.
        def minibatch_step(state, minibatch):
            weights = algorithm.weights(minibatch.mask, minibatch.segment_ids)
            return step(state, minibatch._replace(weights=weights))

        batches = minibatches(key, batch, num_minibatches, epochs, group_size=shared.group_size)
        return run_minibatches(minibatch_step, state, batches)

    return steps


ALGORITHMS = {
    "grpo": presets.grpo,
    "dr_grpo": presets.dr_grpo,
    "dapo": presets.dapo,
    "lite_ppo": presets.lite_ppo,
    "gspo": presets.gspo,
    "luspo": presets.luspo,
    "gmpo": presets.gmpo,
    "cispo": presets.cispo,
    "sapo": presets.sapo,
    "vespo": presets.vespo,
    "dppo": presets.dppo,
    "max_rl": presets.max_rl,
}


# What divides `reward - mean of the group`.
SCALES = {"group": None, "batch": groups.lite_ppo, "none": groups.dr_grpo}
# Algorithms with the clipped surrogate, whose ratio a max_ratio can cap where A < 0.
TWO_SIDED = ("grpo", "dr_grpo", "dapo", "lite_ppo", "max_rl")


def named(
    name: str, length: int, *, scale_rewards: str | None = None, **options: float | None
) -> Objective:
    """An algorithm of `ALGORITHMS` with those options that are given; `length` is what Dr. GRPO
    divides by.

    Args:
      name: of the algorithm.
      length: the most tokens of a completion.
      scale_rewards: what divides rewards less their group's mean: their deviation in the group, in
        the batch, or nothing; None: the algorithm's own.
      options: of the algorithm, None where they are not given; `max_ratio` also caps the losses of
        `TWO_SIDED`.

    Raises: ValueError for one that is not known, or has no such option, and for what its loss
    raises of them.
    """
    preset = datasets.named(name, ALGORITHMS, "loss")
    known = inspect.signature(preset).parameters
    given = {option: value for option, value in options.items() if value is not None}
    # For cispo max_ratio is an option of the preset itself; here it replaces the loss.
    max_ratio = given.pop("max_ratio", None) if name in TWO_SIDED else None
    if useless := [option for option in given if option not in known]:
        raise ValueError(
            f"{', '.join(useless)} means nothing to {name}, whose options are {', '.join(known)}; "
            "leave it out"
        )
    objective = preset(**given, **({"length": length} if "length" in known else {}))
    if max_ratio is not None:
        clips = {side: given.get(side, known[side].default) for side in ("clip_low", "clip_high")}
        objective = presets.replaced(
            objective, loss=partial(policy_losses.two_sided_surrogate, max_ratio=max_ratio, **clips)
        )
    if scale_rewards not in (None, "group"):
        objective = presets.replaced(objective, advantages=SCALES[scale_rewards])
    # A preset with `eps` divides by the group's deviation already.
    elif scale_rewards == "group" and "eps" not in known:
        objective = presets.replaced(objective, advantages=groups.group_relative)
    # Losses check their options when called: on one masked token, before a model loads.
    one = jnp.zeros((1, 1))
    objective.loss(one, one, one, one == 0)
    return objective
