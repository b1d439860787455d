"""Advantages, KL penalties and importance weights, against published values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from golden_cases import check, completion, each_case, jit, value_and_gradient

from rlhf import losses
from rlhf.losses import (
    advantages,
    controllers,
    groups,
    importance,
    kl,
    masks,
    policy,
    ratios,
    segments,
    weights,
)

# ---- TRL: groups, and the sampler's importance weights ---------------------------------------------------------------

NORMALISERS = {"group": losses.group_relative, "batch": groups.lite_ppo, "none": groups.dr_grpo}


@functools.cache
def grouped(aggregation, scale, size):
    def advantages(rewards, reward_weights):
        if aggregation == "normalize_then_sum":
            return groups.gdpo(groups.split(rewards, size=size), reward_weights).reshape(-1)
        combined = groups.split(groups.weighted_rewards(rewards, reward_weights), size=size)
        return NORMALISERS[scale](combined).reshape(-1)

    return jit(advantages)


def old_and_ref(logits, ref_logits, tokens, mask, temperature):
    one = lambda x: losses.logits.token_logprob(completion(x, tokens) / temperature, tokens)
    return tuple(jnp.where(mask, one(x), 0.0) for x in (logits, ref_logits))


jitted_old_and_ref = jit(old_and_ref)


@functools.cache
def importance_ratio(level, kind):
    log_ratio = {"token": ratios.token_log_ratio, "sequence": ratios.product_log_ratio}[level]
    bound = {"truncate": importance.truncated, "mask": importance.masked}[kind]

    def ratio(old, sampling, mask, low, high):
        weights = bound(
            importance.weights(old, sampling, mask, log_ratio=log_ratio),
            min_weight=low,
            max_weight=high,
        )
        return jnp.where(mask, weights, 1.0)  # the reference has 1 outside the mask

    return jit(ratio)


def grpo_adv(x, config, name):
    if name == "grpo_adv/mask_truncated":
        size = config["num_generations"]
        out = {
            "advantages": grouped("sum_then_normalize", "group", size)(
                x["rewards"], np.ones(1, x["rewards"].dtype)
            )
        }
        last = np.take_along_axis(
            x["completion_ids"], x["completion_mask"].sum(-1, keepdims=True) - 1, 1
        )[:, 0]
        finished = (last == config["eos_token_id"]) | (last == config["pad_token_id"])
        kept = masks.finished_only(x["completion_mask"] == 1, finished)
        return out | {"completion_mask_out": np.asarray(kept).astype(x["completion_mask"].dtype)}
    if "is-" in name:
        tokens, mask = x["completion_ids"], x["completion_mask"] == 1
        old, ref = jitted_old_and_ref(
            x["logits"], x["ref_logits"], tokens, mask, config.get("temperature", 1.0)
        )
        trained = mask & (x["tool_mask"] == 1) if "tool_mask" in x else mask
        level, kind = config["mode"].split("_")
        low, high = config["clip_min"] or 0.0, config["clip_max"]
        ratio = importance_ratio(level, kind)(old, x["sampling_logps"], trained, low, high)
        if (
            level == "sequence"
        ):  # one number a row: that of a trained token, or the weight of nothing
            ratio = jnp.where(
                trained.any(-1), (ratio * trained).sum(-1) / jnp.maximum(trained.sum(-1), 1), 1.0
            )[:, None]
        return {"is_ratio": ratio, "old_logps": old, "ref_logps": ref}
    reward_weights = np.asarray(
        config["reward_weights"] or np.ones(x["rewards"].shape[-1]), x["rewards"].dtype
    )
    size = config["num_generations_eval" if config["mode"] == "eval" else "num_generations"]
    fn = grouped(config["multi_objective_aggregation"], config["scale_rewards"], size)
    return {"advantages": fn(x["rewards"], reward_weights)}


@functools.cache
def rloo_advantages(size, normalized):
    def run(
        logits, ref_logits, tokens, mask, rewards, reward_weights, low, high, beta, temperature
    ):
        old, ref = old_and_ref(logits, ref_logits, tokens, mask, temperature)
        penalty = losses.segment_sum(beta * kl.k1(old, ref, mask), mask)
        combined = jnp.clip(groups.weighted_rewards(rewards, reward_weights), low, high) - penalty
        scored = groups.split(combined, size=size)
        out = groups.rloo(scored)
        if normalized:  # over every row with a score
            out = groups.group_relative(jnp.where(jnp.isnan(scored), jnp.nan, out).reshape(1, -1))
        return {
            "advantages": jnp.where(jnp.isnan(combined), 0.0, out.reshape(-1)),
            "old_logps": losses.segment_sum(old, mask),
        }

    return jit(run)


@value_and_gradient
def rloo_loss(logits, *, tokens, mask, old, advantages, low, high, temperature):
    logprobs = losses.logits.token_logprob(completion(logits, tokens) / temperature, tokens)
    given = segments.spread(old, mask)  # the sequence's sum
    level = lambda new, old, mask: segments.total(new, mask) - old
    loss = policy.clipped_surrogate(
        logprobs, given, advantages, mask, clip_low=low, clip_high=high, log_ratio=level
    )
    return losses.weighted_sum(
        loss, segments.last_trained(mask) / weights.number_of_sequences(mask)
    )


def rloo(x, config, name):
    tokens, mask = x["completion_ids"], x["completion_mask"] == 1
    temperature = config.get("temperature", 1.0)
    if name.startswith("rloo/loss"):
        return rloo_loss(
            x["logits"], tokens=tokens, mask=mask, old=x["old_logps"],
            advantages=np.broadcast_to(x["advantages"][:, None], mask.shape),
            low=config["epsilon_low"], high=config["epsilon_high"], temperature=temperature,
        )  # fmt: skip
    reward_weights = np.asarray(
        config["reward_weights"] or np.ones(x["rewards"].shape[-1]), x["rewards"].dtype
    )
    low, high = config["reward_clip_range"] or (-np.inf, np.inf)
    run = rloo_advantages(config["num_generations"], config["normalize_advantages"])
    return run(
        x["logits"],
        x["ref_logits"],
        tokens,
        mask,
        x["rewards"],
        reward_weights,
        low,
        high,
        config["beta"],
        temperature,
    )


# ---- verl: advantages -------------------------------------------------------------------------------------------------


@jit
def gae_and_whiten(rewards, values, mask, gamma, lam):
    bootstrap = jnp.zeros_like(rewards[:, 0])
    advantages, returns = losses.gae(
        rewards, values, mask, bootstrap=bootstrap, discount=gamma, lam=lam
    )
    return {"advantages": losses.whiten(advantages, mask), "returns": returns}


@jit
def reinforce_plus_plus(rewards, mask, gamma):
    # The reference starts anew after every gap: each run of trained tokens is a segment.
    gaps = jnp.cumsum(jnp.pad(~mask[:, :-1] & mask[:, 1:], ((0, 0), (1, 0))), axis=-1)
    returns = advantages.returns(
        rewards, mask, segment_ids=jnp.where(mask, 1 + gaps, 0), discount=gamma
    )
    return {"advantages": losses.whiten(returns, mask), "returns": returns}


@jit
def remax(rewards, greedy_scores, mask):
    return {
        "advantages": advantages.remax(rewards, greedy_scores, mask),
        "returns": advantages.returns(rewards, mask),
    }


def floored_std(eps):
    """The reference's vectorised form has a floor under the variance."""
    return lambda rewards: jnp.sqrt(jnp.maximum(groups.group_std(rewards) ** 2, eps))


VERL_GROUPS = {
    "grpo": lambda r, n, norm, eps: groups.group_relative(
        r, std=groups.group_std if norm else None, eps=eps
    ),
    "grpo_vectorized": lambda r, n, norm, eps: groups.group_relative(
        r, std=floored_std(eps) if norm else None, eps=eps
    ),
    "grpo_passk": lambda r, n, norm, eps: groups.pass_at_k(
        r, std=groups.group_std if norm else None, eps=eps
    ),
    "reinforce_plus_plus_baseline": lambda r, n, norm, eps: groups.dr_grpo(r),
    "rloo": lambda r, n, norm, eps: groups.rloo(r),
    "rloo_vectorized": lambda r, n, norm, eps: groups.rloo(r),
    "opo": lambda r, n, norm, eps: groups.opo(r, n),
    "gpg": lambda r, n, norm, eps: groups.gpg(r),
}


@functools.cache
def verl_group(kind, norm):
    return jit(lambda rewards, lengths, eps: VERL_GROUPS[kind](rewards, lengths, norm, eps))


@jit
def optimal_baseline(rewards, logprobs, squares, importance, mask, member):
    """Groups of unequal size: each is filled up with empty rows."""
    groups_, batch = member.shape
    fill = lambda x: (member[:, :, None] * x[None]).reshape(groups_ * batch, -1).astype(x.dtype)
    arrays = map(fill, (rewards, logprobs, squares, mask))
    got = groups.optimal_token_baseline(*arrays, num_samples=batch, importance=fill(importance))
    return got.reshape(groups_, batch, -1).sum(0)


def verl_advantage(x, config, name):
    kind = name.split("/")[1].split("-")[0]
    mask, rewards = x["response_mask"] == 1, x["token_level_rewards"]
    if kind == "gae":
        return gae_and_whiten(rewards, x["values"], mask, config["gamma"], config["lam"])
    if kind == "reinforce_plus_plus":
        return reinforce_plus_plus(rewards, mask, config["gamma"])
    if kind == "remax":
        return remax(rewards, x["reward_baselines"], mask)
    index = x["index"]
    member = np.arange(index.max() + 1)[:, None] == index
    if kind.endswith("optimal_token_baseline"):
        return optimal_token_baseline(x, config, kind, rewards, mask, member)
    # Groups of unequal size: one row of rewards per prompt, NaN where there is no sample.
    scores = np.where(member, rewards.sum(-1), np.nan)
    lengths = np.where(member, mask.sum(-1), 0.0).astype(rewards.dtype)
    got = verl_group(kind, config.get("norm_adv_by_std_in_grpo"))(
        scores, lengths, config.get("epsilon", 0.0)
    )
    per_token = groups.to_tokens(got.sum(0)[:, None], mask)
    if kind == "reinforce_plus_plus_baseline":
        # The reference keeps the raw reward of a group of one, and whitens that too.
        lonely = member.sum(-1)[index] == 1
        per_token = losses.whiten(
            jnp.where(lonely[:, None] & mask, rewards.sum(-1)[:, None], per_token), mask
        )
    return {"advantages": per_token, "returns": per_token}


def optimal_token_baseline(x, config, kind, rewards, mask, member):
    columns = np.broadcast_to(np.arange(mask.shape[1]), mask.shape)
    if kind.startswith("tir"):  # trained tokens are moved together first, and back again
        columns = np.argsort(~mask, axis=-1, kind="stable")
    put = lambda a: np.take_along_axis(a, columns, axis=-1)
    squares = np.log(np.where(mask, x["sum_pi_squared"], 1.0)).astype(rewards.dtype)
    is_weights = x.get("rollout_is_weights", np.ones_like(rewards))
    got = optimal_baseline(
        *(put(a) for a in (rewards, x["old_log_probs"], squares, is_weights, mask)), member
    )
    advantages_ = np.zeros_like(rewards)
    np.put_along_axis(advantages_, columns, np.asarray(got), axis=-1)
    returns = advantages.returns(rewards, mask)
    if config["handle_zero_tail"]:  # the longest of a group goes on without a baseline
        lengths = np.where(member, mask.sum(-1), 0)
        second = np.sort(lengths, axis=-1)[:, -2]
        tail = (lengths == lengths.max(-1, keepdims=True)) & (lengths > second[:, None])
        starts = np.where(tail, second[:, None], mask.shape[1]).min(0)  # of each row
        place = mask.cumsum(-1) - 1 if kind.startswith("tir") else np.arange(mask.shape[1])
        advantages_ = np.where(mask & (place >= starts[:, None]), returns, advantages_)
    return {"advantages": advantages_, "returns": returns}


# ---- verl: parts ------------------------------------------------------------------------------------------------------

bounded_k3 = lambda *x: jnp.clip(kl.k3(*x), -10, 10)  # as verl does
ESTIMATORS = {
    "k1": kl.k1,
    "kl": kl.k1,
    "k2": kl.k2,
    "mse": kl.k2,
    "k3": bounded_k3,
    "low_var_kl": bounded_k3,
    "abs": kl.absolute,
}


@functools.cache
def verl_kl(kind):
    estimator = ESTIMATORS[kind.removesuffix("+")]
    if kind.endswith("+"):
        estimator = functools.partial(kl.straight_through, estimator=estimator)

    def loss(logprob, ref_logprob, weight, mask):
        penalty = estimator(logprob, ref_logprob, mask)
        return jnp.sum(penalty * weight), penalty

    return jit(jax.grad(loss, has_aux=True))


@functools.partial(value_and_gradient, name="loss_mat")
def verl_agg(loss_mat, *, weights):
    return losses.weighted_sum(loss_mat, weights)


@functools.partial(value_and_gradient, name="vpreds")
def verl_value(vpreds, *, values, returns, mask, weights, clip):
    return losses.weighted_sum(
        losses.clipped_value_loss(vpreds, values, returns, mask, clip=clip), weights
    )


@value_and_gradient
def verl_entropy(logits, *, weights):
    return losses.weighted_sum(losses.logits.entropy(logits), weights)


VERL_WEIGHTS = {
    "token-mean": jit(weights.token_mean),
    "seq-mean-token-sum": jit(weights.sequence_sum),
    "seq-mean-token-mean": jit(weights.sequence_mean),
    # verl divides by the padded length alone, not by the number of sequences
    "seq-mean-token-sum-norm": jit(
        lambda mask: (
            weights.constant(mask, length=mask.shape[1]) * weights.number_of_sequences(mask)
        )
    ),
}


def verl_weights(config, mask):
    """With the counts of a larger batch, if there are, put in by hand: ours are made of the whole mini-batch."""
    mode, ours = config["loss_agg_mode"], VERL_WEIGHTS[config["loss_agg_mode"]](mask)
    if "dp_size" not in config:
        return ours
    rows = mask.any(-1).sum()
    scale = {
        "token-mean": mask.sum() / config["batch_num_tokens"] * config["dp_size"],
        "seq-mean-token-sum-norm": mask.shape[1] / config["loss_scale_factor"],
    }
    return ours * scale.get(mode, rows / config["global_batch_size"] * config["dp_size"])


@functools.cache
def rewards_of_kl(kind):
    def run(scores, old, ref, mask, coef):
        # Scores come by the token here; a sum of one number a sequence would go through `token_rewards`.
        penalty = ESTIMATORS[kind](old, ref, mask)
        mean = losses.weighted_sum(penalty, weights.sequence_mean(mask))
        return scores - coef * penalty, mean

    return jit(run)


def kl_reward(x, config):
    mask, old, ref = x["mask"] == 1, x["old_log_probs"], x["ref_logprob"]
    if not config["adaptive"]:
        rewards, mean = rewards_of_kl(config["kl_penalty"])(
            x["token_level_scores"], old, ref, mask, config["kl_coef"]
        )
        return {
            "token_level_rewards": rewards,
            "metrics": {"actor/reward_kl_penalty": mean, "coef_after": config["kl_coef"]},
        }
    controller = controllers.adaptive_kl(
        target=config["target_kl"], horizon=config["horizon"], init_coef=config["init_kl_coef"]
    )
    state = controller.init()
    rewards, mean = rewards_of_kl(config["kl_penalty"])(
        x["token_level_scores"], old, ref, mask, state.coef
    )
    after = controller.update(state, mean, len(mask))
    return {
        "token_level_rewards": rewards,
        "metrics": {"actor/reward_kl_penalty": mean, "coef_after": after.coef},
    }


def adaptive_kl(x, config, target="target_kl"):
    controller = controllers.adaptive_kl(
        target=config[target], horizon=config["horizon"], init_coef=config["init_kl_coef"]
    )
    update = jit(controller.update)
    state, coefs = controller.init(), []
    for value in x["kl_values"]:
        state = update(state, value, config["n_steps"])
        coefs.append(state.coef)
    return {"coefs": jnp.stack(coefs)}


@functools.cache
def is_weights(level, normalized):
    log_ratio = {"token": ratios.token_log_ratio, "sequence": ratios.product_log_ratio}[level]

    def run(old, sampled, mask, threshold):
        rho = importance.weights(old, sampled, mask, log_ratio=log_ratio)
        capped = importance.truncated(rho, max_weight=threshold)
        if not normalized:
            return capped
        if level == "token":
            return importance.batch_normalized(capped, mask)
        mean = losses.weighted_sum(
            capped, weights.sequence_mean(mask)
        )  # one weight a sequence: each counts once
        return jnp.where(mask, capped / mean, 0.0)

    return jit(run)


POOLS = {
    "token": None,
    "seq_sum": segments.total,
    "seq_mean": segments.mean,
    "seq_max": segments.largest,
}


@functools.cache
def rejection(option):
    pool, estimator = option.rsplit("_", 1)

    def run(old, sampled, mask, low, high):
        # The reference's k1 is log μ - log π_old, tested against the logarithms of its bounds.
        statistic = (
            kl.k1(sampled, old, mask)
            if estimator == "k1"
            else {"k2": kl.k2, "k3": kl.k3}[estimator](sampled, old, mask)
        )
        return masks.within(statistic, mask, low=low, high=high, pool=POOLS[pool])

    return jit(run)


def rejected(old, sampled, mask, options, thresholds):
    kept = mask
    for option, bound in zip(options.split(","), thresholds.split(","), strict=True):
        bounds = [float(b) for b in bound.split("_")]
        low, high = np.log(bounds) if option.endswith("k1") else (-np.inf, bounds[0])
        kept = kept & np.asarray(rejection(option)(old, sampled, mask, low, high))
    return kept


def verl_misc(x, config, name):
    part = name.split("/")[1].split("-")[0]
    if part == "kl":
        within = (
            np.abs(x["logprob"] - x["ref_logprob"]) <= 20
        )  # verl bounds the log-ratio of k3 alone
        gradient, penalty = verl_kl(config["kl_penalty"])(
            x["logprob"], x["ref_logprob"], x["weight"], within
        )
        return {"penalty": penalty, "grad_logprob": gradient}
    if part == "adaptive_kl":
        return adaptive_kl(x, config)
    if part == "kl_reward":
        return kl_reward(x, config)
    if part == "compute_rewards":
        everywhere = np.ones(x["ref_logprob"].shape, bool)
        rewards, _ = rewards_of_kl("k1")(
            x["token_level_scores"],
            x["old_log_probs"],
            x["ref_logprob"],
            everywhere,
            config["kl_ratio"],
        )
        return {"token_level_rewards": rewards}
    mask = x["mask"] == 1
    if part == "masked_whiten":
        return {
            "whitened": jit(losses.whiten)(x["x"], mask),
            "whitened_no_shift": jit(advantages.whiten_rewards)(x["x"], mask),
        }
    if part in ("is", "reject", "mismatch_metrics"):
        old, sampled = x["old_log_probs"], x["rollout_log_probs"]
    if part == "is":
        fn = is_weights(config["rollout_is"], config["rollout_is_batch_normalize"])
        return {"is_weights": fn(old, sampled, mask, config["rollout_is_threshold"])}
    if part == "reject":
        kept = rejected(old, sampled, mask, config["rollout_rs"], config["rollout_rs_threshold"])
        return {"rejection_mask": kept.astype(x["mask"].dtype)}
    if part == "mismatch_metrics":
        seen = jit(importance.mismatch)(old, sampled, mask)
        named = {
            "kl": "kl",
            "k3": "k3_kl",
            "perplexity_ratio": "ppl_ratio",
            "chi2_token": "chi2_token",
            "chi2_sequence": "chi2_seq",
        }
        return {"metrics": {theirs: seen[ours] for ours, theirs in named.items()}}
    if part == "agg":
        return verl_agg(x["loss_mat"], weights=verl_weights(config, mask))
    weight = verl_weights(config, mask)
    if part == "entropy":
        return verl_entropy(x["logits"], weights=weight)
    old = {role: x[role] for role in ("values", "returns")}
    return verl_value(x["vpreds"], mask=mask, weights=weight, clip=config["cliprange_value"], **old)


def where(name):
    """Where the reference's per-token numbers are compared: elsewhere ours are 0 and theirs are anything."""
    family, kind = name.split("/")

    def of(x):
        if family == "verl_advantage":
            mask = x["response_mask"] == 1
            if "index" in x and not kind.startswith(
                "reinforce"
            ):  # a group of one: verl keeps its raw score
                mask &= (np.bincount(x["index"])[x["index"]] > 1)[:, None]
            return {"advantages": mask, "returns": mask}
        if kind.startswith("kl_reward"):
            return {"token_level_rewards": x["mask"] == 1}
        if kind == "masked_whiten":
            return {"whitened": x["mask"] == 1, "whitened_no_shift": x["mask"] == 1}
        if kind.startswith("kl-"):
            within = np.abs(x["logprob"] - x["ref_logprob"]) <= 20
            return {"penalty": within, "grad_logprob": within}
        return {}

    return of


@each_case("advantages")
def test_golden(name, precision):
    # verl adds 1e-8 to the number of tokens that a sequence's sum is divided by.
    tolerance = 2e-8 if "seq-mean-token-mean" in name or "is-sequence-normalized" in name else 1e-9
    if precision == "float32" and name in ("rloo/loss", "rloo/loss-asymmetric"):
        tolerance = 5e-4  # terms of size 1 cancel to 2e-3 and 1e-2; the reference's own rounding is 6e-5 of that
    check(globals()[name.split("/")[0]], name, precision, where=where(name), tolerance=tolerance)
