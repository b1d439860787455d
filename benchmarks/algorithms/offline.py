"""Algorithms that learn from logged completions of a weak policy, of which half are right.

A step has as many completions as one of those that sample; each is new.
"""

from functools import partial

import jax.numpy as jnp

from benchmarks.algorithms.runs import NONE, Algorithm, bare, headless, logged, rows, with_reference
from rlhf import losses, tasks
from rlhf.losses import preference, reference_free
from rlhf.recipes import cpo, dpo, ilql, kto, sft
from rlhf.recipes.ilql import Trajectories
from rlhf.rollouts import Pairs
from rlhf.tasks.characters import VOCABULARY
from rlhf.train import reference
from rlhf.training import preference as pair_losses
from rlhf.training import q_heads, unpaired
from rlhf.training.unpaired import Unpaired

BETAS = (0.1, 0.02, 0.5)


def _reads(make_update, make_batch):
    """`Algorithm.make_step` of an update on batches of logged completions."""

    def make_step(policy, optimizer, setting, knob, reward):
        update = make_update(policy, optimizer, setting, knob)

        def step(state, behaviour, key):
            batch = make_batch(setting, policy, state, key)
            state, _ = update(state, batch)
            return state, jnp.zeros((), jnp.int32)

        return step

    return make_step


# ---- batches -----------------------------------------------------------------------------------


def _number(setting):
    return setting.prompts * setting.samples


def _right(setting, policy, state, key):
    return rows(*logged(setting, key, _number(setting) // 2, 1.0))


def _pairs(setting, policy, state, key):
    """A right and a wrong completion of each prompt, which depends on the key alone."""
    sides = [
        rows(*logged(setting, key, _number(setting) // 2, accuracy)) for accuracy in (1.0, 0.0)
    ]
    chosen, rejected = (side[:4] for side in sides)
    return Pairs(*(jnp.stack(both, axis=1) for both in zip(chosen, rejected, strict=True)))


def _pairs_with_reference(setting, policy, state, key):
    pairs = _pairs(setting, policy, state, key)
    return pair_losses.with_reference(policy, state.context, pairs)


def _labelled(setting, policy, state, key):
    """Completions with a label, and each prompt with the completion of the next."""
    prompts, completions = logged(setting, key, _number(setting), 0.5)
    of_rows = rows(prompts, completions)[:4]
    others = rows(prompts, jnp.roll(completions, 1, axis=0))[:4]
    desirable = setting.task.exact(tasks.as_rollout(prompts, completions)) == 1
    both = (jnp.stack(pair, axis=1) for pair in zip(of_rows, others, strict=True))
    batch = Unpaired(*both, desirable=desirable)
    reference = policy.reference_params(state.context)
    return batch._replace(ref_logprobs=unpaired.sequence_logprobs(policy.lm, reference, batch))


def _trajectories(setting, policy, state, key):
    """Completions with their scores, of mean 0 and deviation 1, on the last token."""
    rollout = tasks.as_rollout(*logged(setting, key, _number(setting), 0.5))
    scores = setting.task.score(rollout)
    centred = (scores - scores.mean()) / (scores.std() + 1e-6)
    last = losses.segments.last_trained(rollout.mask, rollout.segment_ids)
    return Trajectories(*rollout[:4], rewards=last * centred[:, None])


# ---- updates -----------------------------------------------------------------------------------


def _sft(policy, optimizer, setting, knob):
    return sft.make_update(policy, optimizer)


def _dpo(loss, policy, optimizer, setting, knob):
    return dpo.make_update(policy, optimizer, loss=loss, beta=knob)


def _simpo(policy, optimizer, setting, knob):
    return cpo.make_update(
        policy, optimizer, loss=partial(reference_free.simpo, beta=knob), nll_coef=0.0
    )


def _kto(policy, optimizer, setting, knob):
    return kto.make_update(policy, optimizer, beta=knob)


def _heads(setting):
    return q_heads.heads_of(setting.hidden_size, len(VOCABULARY))


def _ilql(policy, optimizer, setting, knob):
    return ilql.make_update(policy, optimizer, heads=_heads(setting), tau=knob, target_rate=0.1)


def _with_heads(policy, params, key):
    heads = q_heads.heads_of(params["embedding"].shape[1], len(VOCABULARY))
    fresh = heads.init(key)
    return {"lm": params, **fresh}, {"target": reference(fresh["q"])}


def _lean(setting, state):
    return (q_heads.shift(_heads(setting), state.params | state.context, beta=4.0),)


OFFLINE = {
    "SFT": Algorithm(_reads(_sft, _right), NONE, (0.0,), headless, bare),
    "DPO": Algorithm(
        _reads(partial(_dpo, preference.sigmoid), _pairs_with_reference),
        "beta", BETAS, headless, with_reference,
    ),
    "IPO": Algorithm(
        _reads(partial(_dpo, preference.ipo), _pairs_with_reference),
        "beta", BETAS, headless, with_reference,
    ),
    "KTO": Algorithm(_reads(_kto, _labelled), "beta", BETAS, headless, with_reference),
    "SimPO": Algorithm(_reads(_simpo, _pairs), "beta", (2.0, 1.0, 5.0), headless, bare),
    "ILQL": Algorithm(
        _reads(_ilql, _trajectories), "tau", (0.7, 0.5, 0.9), headless, _with_heads, _lean
    ),
}  # fmt: skip
