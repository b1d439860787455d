"""Surrogates, KL penalties, importance weights, masks, value losses, metrics."""

import functools

import jax
import jax.numpy as jnp

from contracts.case import ROWS, Case, also, logit_array, masked, normal, vector
from rlhf import losses
from rlhf.losses import covariance, masks, policy, presets

surrogate = masked("logprobs", "old_logprobs", "advantages")
estimate = masked("logprobs", "ref_logprobs")
probable = lambda rng: {
    key: x if key == "mask" else -abs(x)
    for key, x in masked("logprobs", "old_logprobs")(rng).items()
}
BOTH = ("logprobs", "ref_logprobs")
CLIP = {"clip_low": 0.2, "clip_high": 0.28}
HALF_WIDTHS = (
    ({"clip_low": 0.0}, "0 < clip_low < 1"),
    ({"clip_low": 1.0}, "0 < clip_low < 1"),
    ({"clip_high": 0.0}, "0 < clip_high < 1"),
    ({"clip_high": 1.28}, "0 < clip_high < 1.*absolute bound b give b - 1"),
)
ABSOLUTE = (
    {"max_ratio": 0.2},
    r"absolute bound on r, above 1, but is 0.2; for a half-width ε give 1 \+ ε",
)


def policy_case(**more):
    return Case(surrogate, flow=("logprobs",), **more)


def positive(name):
    return ({name: 0.0}, f"{name} must be above 0")


def whole(preset, *penalties):
    """A preset from rewards to weighted losses, in groups of 4; rows without a trained token have no reward."""

    def per_token(logprobs, old_logprobs, mask, rewards, **knobs):
        objective = preset(**knobs)
        rewards = jnp.where(mask.any(-1), rewards, jnp.nan).reshape(-1, 4)
        paid = [0.1 * losses.kl.k1(old_logprobs, jnp.zeros_like(old_logprobs), mask)] * len(
            penalties
        )
        advantages = objective.advantages(rewards, mask, *paid)
        return objective.loss(logprobs, old_logprobs, advantages, mask) * objective.weights(mask)

    return per_token


def preset_case(preset, *penalties, **knobs):
    inputs = also(masked("logprobs", "old_logprobs"), rewards=vector)
    fn = whole(preset, *penalties)
    return Case(
        inputs, flow=("logprobs",), knobs=knobs, couples=True, apart=("rewards", "mask"), fn=fn
    )


def ppo(logprobs, old_logprobs, rewards, values, mask, bootstrap, **knobs):
    objective = presets.ppo(**knobs)
    advantages, _ = objective.advantages(rewards, values, mask, bootstrap=bootstrap)
    return objective.loss(logprobs, old_logprobs, advantages, mask)


def mine(**knobs):
    return presets.objective(
        losses.groups.dr_grpo, policy.clipped_surrogate, losses.weights.token_mean, **knobs
    )


def replaced(**knobs):
    return presets.replaced(presets.gspo(**knobs), advantages=losses.groups.dr_grpo)


CASES = {
    "kl.k1": Case(estimate, flow=BOTH),
    "kl.k2": Case(estimate, flow=BOTH),
    "kl.k3": Case(estimate, flow=BOTH),
    "kl.absolute": Case(estimate, flow=BOTH),
    "kl.full": Case(
        lambda rng: {"logits": logit_array(rng), "ref_logits": logit_array(rng)},
        flow=("logits", "ref_logits"),
    ),
    "kl.straight_through": Case(estimate, flow=BOTH),
    "kl.score_function": Case(estimate, flow=BOTH),
    "kl.bias_corrected": Case(masked(*BOTH, "old_logprobs"), flow=BOTH),
    "ratios.token_log_ratio": Case(masked("logprobs", "old_logprobs"), flow=("logprobs",)),
    "ratios.sequence_log_ratio": Case(masked("logprobs", "old_logprobs"), flow=("logprobs",)),
    "ratios.sequence_token_log_ratio": Case(masked("logprobs", "old_logprobs"), flow=("logprobs",)),
    "ratios.product_log_ratio": Case(masked("logprobs", "old_logprobs"), flow=("logprobs",)),
    "policy.reinforce": Case(masked("logprobs", "advantages"), flow=("logprobs",)),
    "policy.clipped_surrogate": policy_case(knobs=CLIP, refuses=HALF_WIDTHS),
    "policy.dual_clipped_surrogate": policy_case(
        knobs=CLIP | {"dual_clip": 1.4},
        refuses=(*HALF_WIDTHS, ({"dual_clip": 1.0}, "absolute bound")),
    ),
    "policy.two_sided_surrogate": policy_case(
        knobs=CLIP | {"max_ratio": 1.4}, refuses=(*HALF_WIDTHS, ABSOLUTE)
    ),
    "policy.gspo": policy_case(knobs=CLIP, refuses=HALF_WIDTHS),
    "policy.gspo_token": policy_case(knobs=CLIP, refuses=HALF_WIDTHS),
    "policy.luspo": policy_case(knobs=CLIP, refuses=HALF_WIDTHS),
    "policy.gmpo": policy_case(knobs=CLIP, refuses=(positive("clip_low"), positive("clip_high"))),
    "policy.cispo": policy_case(
        knobs={"max_ratio": 1.3, "min_ratio": 0.7},
        refuses=(ABSOLUTE, ({"min_ratio": 1.2}, "absolute bound on r in")),
    ),
    "policy.sapo": policy_case(
        knobs={"tau_pos": 1.0, "tau_neg": 1.05}, refuses=(positive("tau_pos"), positive("tau_neg"))
    ),
    "policy.vespo": Case(
        masked("logprobs", "old_logprobs", "advantages", "log_importance"),
        flow=("logprobs",),
        knobs={"k_pos": 2.0, "lam_pos": 3.0, "k_neg": 3.0, "lam_neg": 2.0},
        refuses=tuple(map(positive, ("k_pos", "lam_pos", "k_neg", "lam_neg"))),
    ),
    "kl.binary_tv": Case(probable),
    "kl.binary_kl": Case(probable),
    "policy.dppo": policy_case(
        knobs={"threshold_low": 0.2, "threshold_high": 0.3},
        refuses=(positive("threshold_low"), positive("threshold_high")),
    ),
    "policy.topr": policy_case(),
    "policy.m2po": policy_case(
        knobs={"threshold": 0.1}, couples=True, refuses=(positive("threshold"),)
    ),
    "covariance.covariance": Case(masked("logprobs", "advantages"), couples=True),
    "covariance.clip_cov": policy_case(
        knobs=CLIP | {"share": 0.2, "cov_low": 0.01, "cov_high": 5.0},
        couples=True,
        fn=functools.partial(covariance.clip_cov, key=jax.random.key(0)),
    ),
    "covariance.kl_cov": policy_case(knobs={"share": 0.2, "kl_coef": 0.7}, couples=True),
    "policy.decoupled_surrogate": Case(
        masked("logprobs", "proximal_logprobs", "advantages", "importance"),
        flow=("logprobs",),
        knobs=CLIP,
        refuses=HALF_WIDTHS,
    ),
    "masks.finished_only": Case(
        also(masked(), finished=lambda rng: rng.random(ROWS) < 0.5), per_sequence=("finished",)
    ),
    "masks.on_policy_enough": Case(
        masked("logprobs", "sampling_logprobs", "advantages"), knobs={"threshold": 0.1}
    ),
    "masks.top_entropy": Case(
        masked("entropy"),
        knobs={"share": 0.5},
        couples=True,
        refuses=(({"share": 0.0}, "share"), ({"share": 1.1}, "share")),
    ),
    "masks.second_moment": Case(
        masked("logprobs", "old_logprobs"),
        knobs={"threshold": 0.1},
        couples=True,
        refuses=(positive("threshold"),),
    ),
    "masks.within": Case(
        masked("values"),
        knobs={"low": -0.4, "high": 0.6},
        fn=functools.partial(masks.within, pool=losses.segments.mean),
    ),
    "masks.top": Case(masked("values"), knobs={"number": 20.0}, couples=True),
    "importance.weights": Case(masked("old_logprobs", "sampling_logprobs")),
    "importance.truncated": Case(
        normal("weights"),
        knobs={"max_weight": 1.2, "min_weight": 0.3},
        refuses=(positive("max_weight"),),
    ),
    "importance.masked": Case(
        normal("weights"),
        knobs={"max_weight": 1.2, "min_weight": 0.3},
        refuses=(positive("max_weight"),),
    ),
    "importance.icepop": Case(
        masked("old_logprobs", "sampling_logprobs"),
        knobs={"max_weight": 1.3, "min_weight": 0.7},
        refuses=(positive("max_weight"),),
    ),
    "importance.batch_normalized": Case(masked("weights"), couples=True),
    "importance.effective_sample_size": Case(masked("weights"), couples=True, per="batch"),
    "importance.mismatch": Case(
        masked("old_logprobs", "sampling_logprobs"), couples=True, per="batch"
    ),
    "routing.balance": Case(
        also(
            normal("probs", "choices", shape=(ROWS, 3)),
            tokens=lambda rng: rng.integers(1, 5, ROWS).astype(float),
        ),
        flow=("probs",),
        couples=True,
        per="batch",
        apart=("tokens",),
    ),
    "value.clipped_value_loss": Case(
        masked("values", "old_values", "returns"),
        flow=("values",),
        knobs={"clip": 0.2},
        refuses=(positive("clip"),),
    ),
    "value.huber_value_loss": Case(
        masked("values", "returns"),
        flow=("values",),
        knobs={"delta": 0.3},
        refuses=(positive("delta"),),
    ),
    "value.explained_variance": Case(masked("values", "returns"), couples=True, per="batch"),
    "metrics.clipped_low": Case(surrogate, knobs={"clip_low": 0.2}, refuses=HALF_WIDTHS[:2]),
    "metrics.clipped_high": Case(surrogate, knobs={"clip_high": 0.2}, refuses=HALF_WIDTHS[2:]),
    "metrics.of_policy": Case(
        masked("logprobs", "old_logprobs", "advantages", "weights", "entropy"),
        knobs=CLIP,
        per="batch",
        refuses=HALF_WIDTHS,
    ),
    "metrics.of_pairs": Case(
        normal("chosen_rewards", "rejected_rewards", "weights", shape=(ROWS,)), per="batch"
    ),
    "presets.objective": preset_case(mine, **CLIP),
    "presets.replaced": preset_case(replaced, **CLIP),
    "presets.ppo": Case(
        also(masked("logprobs", "old_logprobs", "rewards", "values"), bootstrap=vector),
        flow=("logprobs",),
        knobs=CLIP | {"discount": 0.97, "lam": 0.9},
        per_sequence=("bootstrap",),
        fn=ppo,
    ),
    "presets.reinforce_pp": preset_case(presets.reinforce_pp, "penalties", discount=0.9, **CLIP),
    "presets.reinforce_pp_baseline": preset_case(presets.reinforce_pp_baseline, **CLIP),
    "presets.rloo": preset_case(presets.rloo, "penalties", **CLIP),
    "presets.grpo": preset_case(presets.grpo, eps=1e-4, **CLIP),
    "presets.dr_grpo": preset_case(presets.dr_grpo, length=11.0, **CLIP),
    "presets.dapo": preset_case(presets.dapo, eps=1e-4, **CLIP),
    "presets.lite_ppo": preset_case(presets.lite_ppo, **CLIP),
    "presets.gspo": preset_case(presets.gspo, eps=1e-4, **CLIP),
    "presets.luspo": preset_case(presets.luspo, eps=1e-4, **CLIP),
    "presets.gmpo": preset_case(presets.gmpo, eps=1e-4, **CLIP),
    "presets.cispo": preset_case(presets.cispo, max_ratio=1.3, min_ratio=0.7, eps=1e-4),
    "presets.sapo": preset_case(presets.sapo, tau_pos=1.0, tau_neg=1.05, eps=1e-4),
    "presets.vespo": preset_case(
        presets.vespo, k_pos=2.0, lam_pos=3.0, k_neg=3.0, lam_neg=2.0, eps=1e-4
    ),
    "presets.dppo": preset_case(presets.dppo, threshold_low=0.2, threshold_high=0.3),
    "presets.max_rl": preset_case(presets.max_rl, **CLIP),
}
