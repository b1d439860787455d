"""Algorithms that learn from what they sample: what each is, of the recipes' own updates."""

from functools import partial

import jax
import jax.numpy as jnp

from benchmarks.algorithms.runs import Online, sample
from rlhf.losses import presets
from rlhf.recipes import grpo, online_dpo, ppo, rloo
from rlhf.models import scalar_head
from rlhf.train import reference
from rlhf.training.policy import Policy


def _trunk(lm, setting):
    return Policy(lm)


def _alone(params, key, setting):
    return params, {}


def _with_reference(params, key, setting):
    return params, {"reference": reference(params)}


def _groups(setting, policy, state, behaviour, prompts, key):
    params = policy.lm_params(behaviour, state.context)
    return sample(setting, policy.lm, params, prompts, key, num_samples=setting.samples)


def _grpo(objective, policy, optimizer, setting, knob):
    return grpo.make_update(
        policy, optimizer, num_samples=setting.samples, algorithm=objective(knob, setting),
        num_minibatches=2, max_new_tokens=setting.task.max_new_tokens,
    )  # fmt: skip


def _of_grpo(objective, knob, knobs):
    return Online(partial(_grpo, objective), knob, knobs, _alone, _trunk, _groups)


CLIPS = (0.2, 0.1, 0.4)
ONLINE = {
    "GRPO": _of_grpo(lambda clip, _: presets.grpo(clip_low=clip, clip_high=clip), "clip", CLIPS),
    "Dr. GRPO": _of_grpo(
        lambda clip, s: presets.dr_grpo(
            length=s.task.max_new_tokens, clip_low=clip, clip_high=clip
        ),
        "clip", CLIPS,
    ),
    "DAPO": _of_grpo(lambda clip, _: presets.dapo(clip_high=clip), "clip_high", (0.28, 0.2, 0.5)),
    "GSPO": _of_grpo(lambda clip, _: presets.gspo(clip_low=clip, clip_high=clip), "clip", (0.02, 0.005, 0.1)),
    "CISPO": _of_grpo(lambda ratio, _: presets.cispo(max_ratio=ratio), "max_ratio", (5.0, 1.5, 20.0)),
    "SAPO": _of_grpo(lambda tau, _: presets.sapo(tau_neg=tau), "tau_neg", (1.05, 1.0, 2.0)),
}  # fmt: skip
