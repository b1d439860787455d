"""Policy-gradient surrogates, against published values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from golden_cases import CASES, check, completion, each_case, jit, value_and_gradient

from rlhf import losses
from rlhf.losses import controllers, covariance, kl, masks, metrics, policy, ratios, weights

# ---- TRL --------------------------------------------------------------------------------------------------------------

CLIPPED = {"grpo", "bnpo", "dapo", "dr_grpo", "luspo"}
LEVELS = {
    "token": ratios.token_log_ratio,
    "sequence": ratios.sequence_log_ratio,
    "sequence_token": ratios.sequence_token_log_ratio,
}


def surrogate(kind, level, two_sided, arrays, knobs):
    """The per-token loss, without the sampler's importance weights; VESPO takes those itself."""
    clip = {"clip_low": knobs["low"], "clip_high": knobs["high"]}
    if kind == "gmpo":
        high = knobs[
            "high_entropy"
        ]  # the exponent's mean is over these tokens; a sequence without any has the ratio 1
        loss = losses.segment_sum(
            policy.gmpo(*arrays[:3], high, **clip) * losses.weights.token_share(high), high
        )
        loss = jnp.where(high.any(-1), loss, -arrays[2][:, 0])
        return jnp.broadcast_to(loss[:, None], high.shape)
    if kind == "cispo":
        return policy.cispo(*arrays, max_ratio=knobs["high"], log_ratio=level)
    if kind == "sapo":
        return policy.sapo(
            *arrays, tau_pos=knobs["tau_pos"], tau_neg=knobs["tau_neg"], log_ratio=level
        )
    if kind == "vespo":
        names = ("k_pos", "lam_pos", "k_neg", "lam_neg")
        return policy.vespo(
            *arrays,
            **{name: knobs[name] for name in names},
            log_importance=jnp.log(knobs["importance"]),
        )
    if two_sided:
        return policy.two_sided_surrogate(
            *arrays, **clip, max_ratio=knobs["delta"], log_ratio=level
        )
    return policy.clipped_surrogate(*arrays, **clip, log_ratio=level)


@functools.cache
def trl_loss(kind, level_name, two_sided, off_policy, corrected):
    level = LEVELS[level_name]

    def loss(
        logits,
        *,
        tokens,
        mask,
        old,
        ref,
        sampled,
        advantages,
        importance,
        weights,
        on_policy,
        knobs,
    ):
        logits = completion(logits, tokens) / knobs["temperature"]
        logprobs = losses.logits.token_logprob(logits, tokens)
        entropy = losses.logits.entropy(logits)
        old = jnp.where(on_policy, jax.lax.stop_gradient(logprobs), old)
        arrays = (logprobs, old, advantages, mask)
        high_entropy = masks.top_entropy(entropy, mask, share=knobs["top_entropy"])
        more = {"importance": importance, "high_entropy": high_entropy}
        per_token = surrogate(kind, level, two_sided, arrays, knobs | more)
        if kind != "vespo":
            per_token *= importance
        kept = mask
        if off_policy:
            sampled = jnp.where(knobs["sampled"], sampled, old)
            kept &= masks.on_policy_enough(
                logprobs, sampled, advantages, mask, threshold=knobs["threshold"]
            )
        per_token = jnp.where(kept if kind == "gmpo" else kept & high_entropy, per_token, 0.0)
        if kind == "gmpo":  # one k3 a sequence
            penalty = losses.segments.mean(kl.k3(logprobs, ref, mask), mask)
        elif corrected:
            penalty = kl.bias_corrected(logprobs, ref, old, mask, log_ratio=level)
        else:
            penalty = kl.k3(logprobs, ref, mask)
        bonus = losses.weighted_sum(entropy, losses.weights.token_mean(high_entropy))
        total = (
            losses.weighted_sum(per_token + knobs["kl"] * penalty, weights)
            - knobs["entropy"] * bonus
        )
        clip = {"clip_low": knobs["low"], "clip_high": knobs["high"]}
        seen = {
            name: fn(*arrays, **{name_: clip[name_]}, log_ratio=level) for name, fn, name_ in SHARES
        }
        share = losses.weights.token_mean(mask)
        if level_name == "sequence":  # rows without a trained token count
            share = losses.weights.token_share(mask) / len(mask)
        seen = {name: losses.weighted_sum(x, share) for name, x in seen.items()}
        seen["entropy"] = losses.weighted_sum(entropy, losses.weights.token_mean(mask))
        seen["kl"] = losses.weighted_sum(penalty, losses.weights.token_mean(mask))
        return total, {"metrics": seen}

    return value_and_gradient(loss)


SHARES = (
    ("clip_ratio/low_mean", metrics.clipped_low, "clip_low"),
    ("clip_ratio/high_mean", metrics.clipped_high, "clip_high"),
)
sequence_mean, token_mean, sequence_sum = (
    jit(fn) for fn in (weights.sequence_mean, weights.token_mean, weights.sequence_sum)
)
of_length = jit(lambda mask, length: weights.constant(mask, length=length))


def trl_weights(config, name, mask):
    """TRL counts sequences without a trained token, and tokens of the whole generation batch: put in by hand."""
    kind, train = config["loss_type"], config.get("mode", "train") == "train"
    accumulation = config.get("gradient_accumulation_steps", 1) if train else 1
    if name.startswith("grpo/gmpo"):
        return sequence_mean(mask) * mask.any(-1).sum() / len(mask)
    if kind in ("dapo", "cispo", "vespo"):
        share = accumulation / config.get("steps_per_generation", 1) if train else 1.0
        return mask / (config["num_items_in_batch"] * share)
    if kind == "bnpo":
        return token_mean(mask) / accumulation
    if kind == "dr_grpo":
        ours = of_length(mask, config["max_completion_length"])
    else:
        ours = (
            sequence_sum(mask) if kind == "luspo" else sequence_mean(mask)
        )  # LUSPO: a sequence counts by its length
    return ours * mask.any(-1).sum() / len(mask) / accumulation


def entropy_coef(x, config, mask):
    """After the calls before this one, each of the same entropy."""
    if not config.get("use_adaptive_entropy"):
        return config["entropy_coef"]
    controller = controllers.adaptive_entropy(
        target=config["entropy_target"], delta=config["entropy_coef_delta"], init_coef=config["entropy_coef"],
        min_coef=config["entropy_coef_min"], max_coef=config["entropy_coef_max"],
    )  # fmt: skip
    entropy = losses.logits.entropy(
        completion(x["logits"], x["completion_ids"]) / config["temperature"]
    )
    mean, state = losses.weighted_sum(entropy, token_mean(mask)), controller.init()
    for _ in range(config["repeated_calls"] - 1):
        state = controller.update(state, mean)
    return state.pushed


def grpo(x, config, name):
    tokens = x["completion_ids"]
    mask = x["completion_mask"] == 1
    if name.startswith("grpo/logps"):
        logits = completion(x["logits"], tokens) / np.asarray(
            config.get("temperature", 1.0), x["logits"].dtype
        )
        out = {
            "per_token_logps": jit(losses.logits.token_logprob)(logits, tokens),
            "entropies": jit(losses.logits.entropy)(logits),
        }
        return {role: np.where(mask, value, 0) for role, value in out.items()}
    if "tool_mask" in x:
        mask &= x["tool_mask"] == 1
    advantages = x["advantages"] if x["advantages"].ndim == 2 else x["advantages"][:, None]
    zeros = np.zeros_like(x["logits"], shape=mask.shape)
    kind = "gmpo" if name.startswith("grpo/gmpo") else config["loss_type"]
    kind = "clipped" if kind in CLIPPED else kind
    level, two_sided = config["importance_sampling_level"], config["delta"] is not None
    off_policy = config.get("off_policy_mask_threshold") is not None
    importance = x.get("is_ratio", zeros + 1)
    if kind == "vespo" and importance.shape[1] == 1:  # one weight a sequence joins it once
        importance = np.maximum(importance, 1e-8) ** (
            1 / np.maximum(mask.sum(-1, keepdims=True), 1)
        )
    importance = np.broadcast_to(importance, mask.shape).astype(zeros.dtype)
    loss = trl_loss(kind, level, two_sided, off_policy, bool(config.get("use_bias_correction_kl")))
    knobs = {
        "low": config["epsilon_low"], "high": config["epsilon_high"], "delta": config["delta"] or 0.0,
        "kl": config["beta"], "temperature": config["temperature"],
        "entropy": entropy_coef(x, config, mask) / config.get("gradient_accumulation_steps", 1),
        "top_entropy": config.get("top_entropy_quantile", 1.0), "threshold": config.get("off_policy_mask_threshold") or 0.0,
        "sampled": "sampling_logps" in x,
        "tau_pos": config.get("sapo_temperature_pos", 1.0), "tau_neg": config.get("sapo_temperature_neg", 1.05),
        "k_pos": config.get("vespo_k_pos", 2.0), "lam_pos": config.get("vespo_lambda_pos", 3.0),
        "k_neg": config.get("vespo_k_neg", 3.0), "lam_neg": config.get("vespo_lambda_neg", 2.0),
    }  # fmt: skip
    got = loss(
        x["logits"],
        tokens=tokens,
        mask=mask,
        old=x.get("old_logps", zeros),
        ref=x.get("ref_logps", zeros),
        sampled=x.get("sampling_logps", zeros),
        advantages=np.broadcast_to(advantages, mask.shape),
        importance=importance,
        weights=np.asarray(trl_weights(config, name, mask)).astype(x["logits"].dtype),
        on_policy="old_logps" not in x,
        knobs=knobs,
    )
    reported = set(CASES[name]["metrics"]) - (
        {"kl", *(share[0] for share in SHARES)} if kind == "gmpo" else set()
    )
    return got | {
        "metrics": {key: value for key, value in got["metrics"].items() if key in reported}
    }


def gspo_token(x, config, name):
    return grpo(x, {"entropy_coef": 0.0, **config}, name)


# ---- verl -------------------------------------------------------------------------------------------------------------

VERL_LOSSES = {
    "vanilla": lambda x, c: policy.clipped_surrogate(*x, clip_low=c["low"], clip_high=c["high"]),
    "dual": lambda x, c: policy.dual_clipped_surrogate(*x, clip_low=c["low"], clip_high=c["high"], dual_clip=c["dual"]),
    "gspo": lambda x, c: policy.gspo_token(*x, clip_low=c["low"], clip_high=c["high"]),
    "geo_mean": lambda x, c: policy.gmpo(*x, clip_low=c["low"], clip_high=c["high"]),
    "sapo": lambda x, c: policy.sapo(*x, tau_pos=c["tau_pos"], tau_neg=c["tau_neg"]),
    "cispo": lambda x, c: policy.cispo(*x, max_ratio=1.0 + c["high"], min_ratio=1.0 - c["low"]),
    "gpg": lambda x, c: policy.reinforce(x[0], x[2], x[3]),
    "reinforce": lambda x, c: policy.reinforce(x[0], x[2], x[3]),
    "clip_cov": lambda x, c: covariance.clip_cov(
        *x, key=jax.random.key(0), share=c["share"], cov_low=c["cov_low"], cov_high=c["cov_high"],
        clip_low=c["low"], clip_high=c["high"],
    ),
    "kl_cov": lambda x, c: covariance.kl_cov(*x, share=c["share"], kl_coef=c["kl_coef"]),
}  # fmt: skip


@functools.cache
def verl_loss(kind):
    def loss(logprobs, *, old, advantages, mask, importance, weights, knobs):
        arrays = (logprobs, old, advantages, mask)
        per_token = VERL_LOSSES[kind](arrays, knobs) * importance
        seen = metrics.of_policy(
            *arrays,
            weights=losses.weights.token_mean(mask),
            clip_low=knobs["low"],
            clip_high=knobs["high"],
        )
        named = {
            "actor/pg_clipfrac": seen["clip_low"] + seen["clip_high"],
            "actor/ppo_kl": seen["approx_kl"],
        }
        return losses.weighted_sum(per_token, weights), {"metrics": named}

    return value_and_gradient(loss, name="log_prob")


def bypass(x, config, mask):
    """Old log-probs are the sampler's: what has moved too far from them is left out of the mask, and of the mean."""
    low, high = (float(bound) for bound in config["rollout_rs_threshold"].split("_"))
    drift = kl.k1(x["old_log_prob"], x["log_prob"], mask)
    kept = np.asarray(masks.within(drift, mask, low=np.log(low), high=np.log(high)))
    if config["loss_type"] == "ppo_clip":
        return "vanilla", kept, np.ones_like(x["log_prob"])
    level = {"token": ratios.token_log_ratio, "sequence": ratios.product_log_ratio}[
        config["rollout_is"]
    ]
    rho = losses.importance.weights(x["log_prob"], x["old_log_prob"], mask, log_ratio=level)
    return (
        "reinforce",
        kept,
        losses.importance.truncated(rho, max_weight=config["rollout_is_threshold"]),
    )


def verl_weights(config, kind, mask):
    mode = "seq-mean-token-mean" if kind in ("gspo", "sapo") else config["loss_agg_mode"]
    rows = mask.any(-1).sum()
    if kind == "geo_mean":
        return (
            sequence_mean(mask) * rows / len(mask)
        )  # the mean counts rows without a trained token
    if mode == "seq-mean-token-sum-norm":  # divides by the length alone
        return mask / config.get("loss_scale_factor", mask.shape[1])
    counts = {
        "token-mean": (token_mean, mask.sum(), "batch_num_tokens"),
        "seq-mean-token-sum": (sequence_sum, rows, "global_batch_size"),
        "seq-mean-token-mean": (
            lambda mask: mask / (mask.sum(-1, keepdims=True) + 1e-8) / rows,
            rows,
            "global_batch_size",
        ),
    }
    fn, ours, theirs = counts[mode]
    scale = ours / config[theirs] * config["dp_size"] if "dp_size" in config else 1.0
    return fn(mask) * scale


def verl_policy(x, config, name):
    mask, kind = x["response_mask"] == 1, config["loss_mode"]
    importance = x.get("rollout_is_weights", np.ones_like(x["log_prob"]))
    if kind == "bypass_mode":
        kind, mask, importance = bypass(x, config, mask)
    if kind == "vanilla" and config.get("clip_ratio_c"):
        kind = "dual"
    if kind == "geo_mean":  # joined by their geometric mean
        importance = np.exp(losses.segments.mean(np.log(importance), mask))
    knobs = {
        "low": config.get("clip_ratio_low", 0.2), "high": config.get("clip_ratio_high", 0.2),
        "dual": config.get("clip_ratio_c"),
        "tau_pos": config.get("tau_pos"), "tau_neg": config.get("tau_neg"), "kl_coef": config.get("ppo_kl_coef"),
        "share": config.get("clip_cov_ratio", config.get("kl_cov_ratio")),
        "cov_low": config.get("clip_cov_lb"), "cov_high": config.get("clip_cov_ub"),
    }  # fmt: skip
    got = verl_loss(kind)(
        x["log_prob"],
        old=x["old_log_prob"],
        advantages=x["advantages"],
        mask=mask,
        importance=importance,
        weights=np.asarray(verl_weights(config, kind, mask)).astype(x["log_prob"].dtype),
        knobs={key: value for key, value in knobs.items() if value is not None},
    )
    seen = got["metrics"] if config["loss_mode"] == "vanilla" and "dual" not in name else {}
    return got | {"metrics": seen}


# Sums of terms of size 0.1 and more that cancel to 3e-4: in float32 the rounding of the terms stays.
CANCELS = {
    "grpo/dapo-token-kl_bias_corrected-tool-is_token": 5e-4,
    "verl_policy/geo_mean-empty_row": 5e-4,
}


@each_case("policy")
def test_golden(name, precision):
    tolerance = (
        1e-5 if "geo_mean" in name else 1e-9
    )  # verl adds 1e-8 to the number of tokens in the exponent
    if precision == "float32" and name in CANCELS:
        tolerance = CANCELS[name]
    check(globals()[name.split("/")[0]], name, precision, tolerance=tolerance)
