"""Algorithms that learn from logged completions: those of the policy that training starts with.

A step has as many completions as one of those that sample from what they train, each is new, and
two optimizer steps are taken on them.
"""

from functools import partial

import jax.numpy as jnp

from benchmarks.algorithms.runs import (
    NONE,
    UPDATES,
    Algorithm,
    headless,
    of_samples,
    sample,
    with_reference,
)
from rlhf import losses, tasks
from rlhf.losses import preference, reference_free
from rlhf.recipes import cpo, dpo, ilql, kto, sft
from rlhf.recipes.ilql import Trajectories
from rlhf.rollouts import types
from rlhf.tasks.characters import VOCABULARY
from rlhf.train import minibatches, reference, run_minibatches
from rlhf.training import preference as pair_losses
from rlhf.training import q_heads, unpaired
from rlhf.training.unpaired import Unpaired

BETAS = (0.1, 0.02)


def _logged(setting, policy, state, behaviour, prompts, reward, key):
    """Completions of the reference."""
    params = state.context["reference"]
    rollout = sample(setting.task, policy.lm, params, prompts, key, num_samples=setting.samples)
    return rollout, reward(rollout)


def _reads(make_step, make_batch):
    """The update of an algorithm on batches that are made of logged completions and their scores."""

    def make_update(policy, optimizer, setting, knob):
        step = make_step(policy, optimizer, setting, knob)

        def update(state, rollout, rewards, key):
            batch = make_batch(setting, policy, state, rollout, rewards)
            return run_minibatches(step, state, minibatches(key, batch, UPDATES))

        return update

    return of_samples(make_update, _logged)


# ---- batches -----------------------------------------------------------------------------------


def _right(setting, policy, state, rollout, rewards):
    """Those with the highest score that there is."""
    return types.token_rows(rollout._replace(mask=rollout.mask & (rewards == 1.0)[:, None]))


def _pairs(setting, policy, state, rollout, rewards):
    return pair_losses.best_and_worst(rollout, rewards, num_samples=setting.samples)[0]


def _pairs_with_reference(setting, policy, state, rollout, rewards):
    pairs = _pairs(setting, policy, state, rollout, rewards)
    return pair_losses.with_reference(policy, state.context, pairs)


def _labelled(setting, policy, state, rollout, rewards):
    """Completions with a label, and each prompt with a completion of the next prompt."""
    start = rollout.tokens.shape[1] - setting.task.max_new_tokens
    others = jnp.roll(rollout.tokens[:, start:], setting.samples, axis=0)
    prompts = types.Prompts(rollout.tokens[:, :start], rollout.segment_ids[:, :start] != 0)
    both = (rollout, tasks.as_rollout(prompts, others))
    sides = (jnp.stack(pair, axis=1) for pair in zip(*(side[:4] for side in both), strict=True))
    batch = Unpaired(*sides, desirable=rewards == 1.0)
    params = state.context["reference"]
    return batch._replace(ref_logprobs=unpaired.sequence_logprobs(policy.lm, params, batch))


def _trajectories(setting, policy, state, rollout, rewards):
    """Scores, of mean 0 and deviation 1, on the last tokens."""
    centred = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    last = losses.segments.last_trained(rollout.mask, rollout.segment_ids)
    return Trajectories(*rollout[:4], rewards=last * centred[:, None])


# ---- steps -------------------------------------------------------------------------------------


def _sft(policy, optimizer, setting, knob):
    return sft.make_update(policy, optimizer)


def _dpo(loss, policy, optimizer, setting, knob):
    return dpo.make_update(policy, optimizer, loss=loss, beta=knob)


def _simpo(policy, optimizer, setting, knob):
    loss = partial(reference_free.simpo, beta=knob)
    return cpo.make_update(policy, optimizer, loss=loss, nll_coef=0.0)


def _kto(policy, optimizer, setting, knob):
    return kto.make_update(policy, optimizer, beta=knob)


def _heads(setting):
    return q_heads.heads_of(setting.hidden_size, len(VOCABULARY))


def _ilql(policy, optimizer, setting, knob):
    return ilql.make_update(policy, optimizer, heads=_heads(setting), tau=knob, target_rate=0.1)


def _with_heads(policy, params, key):
    heads = q_heads.heads_of(params["embedding"].shape[1], len(VOCABULARY))
    fresh = heads.init(key)
    context = {"reference": reference(params), "target": reference(fresh["q"])}
    return {"lm": params, **fresh}, context


def _lean(setting, state):
    return (q_heads.shift(_heads(setting), state.params | state.context, beta=4.0),)


def _of(make_step, make_batch, knob="beta", knobs=BETAS):
    return Algorithm(_reads(make_step, make_batch), knob, knobs, headless, with_reference)


OFFLINE = {
    "SFT": _of(_sft, _right, NONE, (0.0,)),
    "DPO": _of(partial(_dpo, preference.sigmoid), _pairs_with_reference),
    "IPO": _of(partial(_dpo, preference.ipo), _pairs_with_reference),
    "KTO": _of(_kto, _labelled),
    "SimPO": _of(_simpo, _pairs, knobs=(2.0, 1.0)),
    "ILQL": Algorithm(
        _reads(_ilql, _trajectories), "tau", (0.7, 0.5), headless, _with_heads, _lean
    ),
}
