"""Algorithms that learn from what they sample: the recipes' own updates, with what each is given.

Every one samples `prompts · samples` completions a step, and takes two optimizer steps on them.
"""

from functools import partial

import jax
import jax.numpy as jnp

from benchmarks.algorithms.runs import (
    UPDATES,
    Algorithm,
    bare,
    headless,
    of_samples,
    sample,
    trunk,
    with_reference,
)
from rlhf import rollouts
from rlhf.losses import presets, weights
from rlhf.losses.policy import clipped_surrogate
from rlhf.mixture import geometric_mixture
from rlhf.models import scalar_head
from rlhf.recipes import grpo, nash_md, online_dpo, ppo, rft, rloo, xpo
from rlhf.train import minibatches, reference, run_minibatches
from rlhf.training.policy import Policy

CLIPS = (0.2, 0.1)
BETAS = (0.1, 0.02)


# ---- how completions are sampled and paid ------------------------------------------------------


def _groups(setting, policy, state, behaviour, prompts, reward, key):
    params = trunk(behaviour)
    rollout = sample(setting.task, policy.lm, params, prompts, key, num_samples=setting.samples)
    return rollout, reward(rollout)


def _groups_beside_greedy(setting, policy, state, behaviour, prompts, reward, key):
    """One sample fewer, and the greedy completion, whose reward is the baseline."""
    params = trunk(behaviour)
    number = setting.samples - 1
    rollout = sample(setting.task, policy.lm, params, prompts, key, num_samples=number)
    greedy = sample(setting.task, policy.lm, params, prompts, key, sampler=rollouts.greedy())
    return rollout, reward(rollout) - jnp.repeat(reward(greedy), number)


def _against(opponent, setting, policy, state, behaviour, prompts, reward, key):
    """Half as many completions each of the policy and of an opponent, in turn."""
    policy_key, opponent_key = jax.random.split(key)
    number = setting.samples // 2
    repeated = jax.tree.map(lambda x: jnp.repeat(x, number, axis=0), prompts)
    params = trunk(behaviour)
    one = sample(setting.task, policy.lm, params, repeated, policy_key)
    lm, opponent_params = opponent(policy, params, state.context)
    other = sample(setting.task, lm, opponent_params, repeated, opponent_key)
    rollout = jax.tree.map(
        lambda a, b: jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:]) if a.ndim else a,
        one,
        other,
    )
    return rollout, reward(rollout)


def _reference_model(policy, params, context):
    return policy.lm, context["reference"]


def _mixture(policy, params, context):
    return geometric_mixture(policy.lm, mixture_coef=0.5), (params, context["reference"])


# ---- updates -----------------------------------------------------------------------------------


def _objective(algorithm, policy, optimizer, setting, knob):
    return grpo.make_update(
        policy,
        optimizer,
        num_samples=setting.samples,
        algorithm=algorithm(knob, setting),
        num_minibatches=UPDATES,
    )


def _remax(policy, optimizer, setting, knob):
    return grpo.make_update(
        policy,
        optimizer,
        num_samples=setting.samples - 1,
        algorithm=_reinforce(knob, setting),
        num_minibatches=UPDATES,
    )


def _reinforce(clip, setting):
    """Rewards are advantages as they are."""
    loss = partial(clipped_surrogate, clip_low=clip, clip_high=clip)
    return presets.objective(lambda rewards: rewards, loss, weights.token_mean)


def _reinforce_pp(clip, setting):
    algorithm = presets.reinforce_pp(clip_low=clip, clip_high=clip)

    def advantages(rewards, mask, segment_ids=None):
        return algorithm.advantages(rewards, mask, jnp.zeros(mask.shape), segment_ids)

    return algorithm._replace(advantages=advantages)


def _rloo(policy, optimizer, setting, knob):
    return rloo.make_update(
        policy,
        optimizer,
        num_samples=setting.samples,
        kl_coef=0.0,
        clip_low=knob,
        clip_high=knob,
        num_minibatches=UPDATES,
    )


def _ppo(policy, optimizer, setting, knob):
    return ppo.make_update(
        policy, optimizer, kl_coef=0.0, lam=knob, epochs=1, num_minibatches=UPDATES
    )


def _online_dpo(policy, optimizer, setting, knob):
    return online_dpo.make_update(
        policy, optimizer, num_samples=setting.samples, beta=knob, num_minibatches=UPDATES
    )


def _of_pairs(make_update, policy, optimizer, setting, knob):
    """A recipe's update, which takes one optimizer step, on mini-batches of pairs."""
    update = make_update(policy, optimizer, beta=knob)

    def step(state, batch):
        (rollout, rewards), key = batch
        return update(state, rollout, rewards, key)

    def of_minibatches(state, rollout, rewards, key):
        order_key, step_key = jax.random.split(key)
        batches = minibatches(order_key, (rollout, rewards), UPDATES, group_size=2)
        return run_minibatches(step, state, (batches, jax.random.split(step_key, UPDATES)))

    return of_minibatches


def _rft(policy, optimizer, setting, knob):
    step = rft.make_update(policy, optimizer)

    def update(state, rollout, rewards, key):
        chosen = rft.selected(rewards.reshape(-1, setting.samples), knob).reshape(-1, 1)
        batch = rollouts.types.token_rows(rollout._replace(mask=rollout.mask & chosen))
        return run_minibatches(step, state, minibatches(key, batch, UPDATES))

    return update


def _with_critic(lm, setting):
    return Policy(lm, scalar_head(setting.hidden_size))


def _with_value_head(policy, params, key):
    return {"lm": params, "head": policy.head.init(key)}, {"reference": reference(params)}


def _of_groups(algorithm, knob="clip", knobs=CLIPS):
    make_step = of_samples(partial(_objective, algorithm), _groups)
    return Algorithm(make_step, knob, knobs, headless, bare)


ONLINE = {
    "REINFORCE": _of_groups(_reinforce),
    "REINFORCE++": _of_groups(_reinforce_pp),
    "ReMax": Algorithm(of_samples(_remax, _groups_beside_greedy), "clip", CLIPS, headless, bare),
    "RLOO": Algorithm(of_samples(_rloo, _groups), "clip", CLIPS, headless, with_reference),
    "GRPO": _of_groups(lambda clip, setting: presets.grpo(clip_low=clip, clip_high=clip)),
    "Dr. GRPO": _of_groups(
        lambda clip, setting: presets.dr_grpo(
            length=setting.task.max_new_tokens, clip_low=clip, clip_high=clip
        )
    ),
    "DAPO": _of_groups(
        lambda clip, setting: presets.dapo(clip_high=clip), "clip_high", (0.28, 0.2)
    ),
    "GSPO": _of_groups(
        lambda clip, setting: presets.gspo(clip_low=clip, clip_high=clip), "clip", (0.02, 5e-4)
    ),
    "CISPO": _of_groups(
        lambda ratio, setting: presets.cispo(max_ratio=ratio), "max_ratio", (5.0, 1.5)
    ),
    "SAPO": _of_groups(lambda tau, setting: presets.sapo(tau_neg=tau), "tau_neg", (1.05, 1.0)),
    "PPO": Algorithm(of_samples(_ppo, _groups), "lam", (1.0, 0.95), _with_critic, _with_value_head),
    "online DPO": Algorithm(
        of_samples(_online_dpo, _groups), "beta", BETAS, headless, with_reference
    ),
    "XPO": Algorithm(
        of_samples(partial(_of_pairs, xpo.make_update), partial(_against, _reference_model)),
        "beta",
        BETAS,
        headless,
        with_reference,
    ),
    "Nash-MD": Algorithm(
        of_samples(partial(_of_pairs, nash_md.make_update), partial(_against, _mixture)),
        "beta",
        (0.01, 0.1),
        headless,
        with_reference,
    ),
    "RFT": Algorithm(of_samples(_rft, _groups), "percentile", (0.7, 0.9), headless, bare),
}
