"""Whole PPO updates, against published values."""

import functools

import jax
import jax.numpy as jnp
from golden_cases import check, completion, each_case, jit

from rlhf import losses
from rlhf.losses import advantages, controllers, kl, metrics, moments, weights

# ---- TRL's classic PPO ------------------------------------------------------------------------------------------------

ESTIMATORS = {"kl": kl.k1, "abs": kl.absolute, "mse": kl.k2}


@functools.cache
def classic_rewards(kind):
    """Of `full`, the KL over the vocabulary comes from the whole distributions."""

    def run(scores, logprobs, ref_logprobs, mask, kl_coef):
        kls = (
            kl.full(logprobs, ref_logprobs)
            if kind == "full"
            else ESTIMATORS[kind](logprobs, ref_logprobs, mask)
        )
        rewards = losses.token_rewards(scores, kl_coef * kls, mask)
        return {"kls": kls, "non_score_reward": -kl_coef * kls, "rewards": rewards}

    return jit(run)


@jit
def classic_gae(rewards, values, mask, gamma, lam, whitened):
    """The reference runs over gaps and padding too, as tokens of value and reward 0, and pays whitened zeros there."""
    everywhere, rewards, values = (
        jnp.ones_like(mask),
        jnp.where(mask, rewards, 0.0),
        jnp.where(mask, values, 0.0),
    )
    mean = losses.weighted_sum(rewards, weights.token_mean(mask))
    scale = jax.lax.rsqrt(
        jnp.sum(jnp.where(mask, rewards - mean, 0.0) ** 2) / (mask.sum() - 1) + 1e-8
    )
    paid = jnp.where(mask, advantages.whiten_rewards(rewards, mask), mean - mean * scale)
    rewards = jnp.where(whitened, paid, rewards)
    bootstrap = jnp.zeros_like(rewards[:, 0])
    got, returns = losses.gae(
        rewards, values, everywhere, bootstrap=bootstrap, discount=gamma, lam=lam
    )
    return {"advantages": losses.whiten(got, mask), "returns": returns, "values_out": values}


@jit
def classic_update(logits, vpreds, x, mask, clip, value_clip, vf_coef, ratio_threshold):
    def loss(logits, vpreds):
        logprobs = losses.logits.token_logprob(logits, x["token_ids"])
        arrays, weight = (logprobs, x["old_logprobs"], x["adv"], mask), weights.token_mean(mask)
        pg = losses.clipped_surrogate(*arrays, clip_low=clip, clip_high=clip)
        vf = losses.clipped_value_loss(vpreds, x["values"], x["ret"], mask, clip=value_clip)
        pg, vf = losses.weighted_sum(pg, weight), vf_coef * losses.weighted_sum(vf, weight)
        seen = metrics.of_policy(*arrays, weights=weight, clip_low=clip, clip_high=clip)
        pg, vf = (jnp.where(seen["ratio"] > ratio_threshold, 0.0, x) for x in (pg, vf))
        named = {
            "loss/policy": pg,
            "loss/value": vf / vf_coef,
            "policy/clipfrac": seen["clip_low"] + seen["clip_high"],
            "policy/policykl": seen["approx_kl"],
            "policy/approxkl": losses.weighted_sum(
                kl.k2(logprobs, x["old_logprobs"], mask), weight
            ),
        }
        return pg + vf, {"pg_loss": pg, "vf_loss": vf, "metrics": named}

    gradients, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(logits, vpreds)
    return out | {"grad_logits": gradients[0], "grad_vpreds": gradients[1]}


@jit
def running_moments(batches):
    running = moments.running()
    state, states = running.init(), []
    for batch in batches:
        state = running.update(state, batch)
        states.append(state)
    each = [running.update(running.init(), batch) for batch in batches]
    return {
        "means": jnp.stack([s.mean for s in states]),
        "stds": jnp.sqrt(jnp.stack([s.variance for s in states])),
        "counts": jnp.stack([s.number for s in states]),
        "batch_stats": jnp.stack([jnp.stack([s.mean, jnp.sqrt(s.variance)]) for s in each]),
    }


def ppo_classic(x, config, name):
    kind = name.split("/")[1]
    if kind == "running_moments":
        return running_moments([x[f"batch_{i}"] for i in range(3)])
    if kind == "adaptive_kl":
        controller = controllers.adaptive_kl(
            target=config["target"], horizon=config["horizon"], init_coef=config["init_kl_coef"]
        )
        step = lambda state, value: (controller.update(state, value, config["n_steps"]),) * 2
        return {
            "coefs": jit(lambda values: jax.lax.scan(step, controller.init(), values)[1].coef)(
                x["kl_values"]
            )
        }
    mask = x["mask"] == 1
    if kind == "masked_whiten":
        return {
            "whitened": jit(losses.whiten)(x["x"], mask),
            "whitened_no_shift": jit(advantages.whiten_rewards)(x["x"], mask),
        }
    if kind.startswith("rewards"):
        pair = [
            x[role + "_full" if kind.endswith("full") else role]
            for role in ("logprobs", "ref_logprobs")
        ]
        return classic_rewards(kind.removeprefix("rewards-"))(
            x["scores"], *pair, mask, config["kl_coef"]
        )
    if kind.startswith("gae"):
        knobs = config["gamma"], config["lam"], config["whiten_rewards"]
        return classic_gae(x["token_rewards"], x["values"], mask, *knobs)
    given = {role: x[role] for role in ("token_ids", "old_logprobs", "values", "adv", "ret")}
    knobs = (
        config["cliprange"],
        config["cliprange_value"],
        config["vf_coef"],
        config["ratio_threshold"],
    )
    return classic_update(x["logits"], x["vpreds"], given, mask, *knobs)


# ---- TRL's PPO --------------------------------------------------------------------------------------------------------


@jit
def ppo_experience(x, kept, paid, k3, whiten_rewards, kl_coef, gamma, lam, temperature):
    """`kept`: the response; `paid`: one column more, where the reference puts the score."""
    tokens = x["responses"]
    ref_logits = completion(x["ref_logits"], tokens) / temperature
    old, ref = (
        losses.logits.token_logprob(logits, tokens) for logits in (x["old_scores"], ref_logits)
    )
    penalty = jnp.where(k3, kl.k3(old, ref, kept), kl.k1(old, ref, kept))
    rewards = losses.token_rewards(x["scores"], kl_coef * penalty, paid)
    rewards = jnp.where(whiten_rewards, advantages.whiten_rewards(rewards, paid), rewards)
    values = jnp.where(paid, completion(x["old_values"], tokens), 0.0)
    got, returns = losses.gae(
        rewards, values, paid, bootstrap=jnp.zeros_like(x["scores"]), discount=gamma, lam=lam
    )
    experience = {
        "kl": penalty,
        "rewards": rewards,
        "advantages": losses.whiten(got, kept),
        "returns": returns,
    }
    return experience | {"logprobs": old, "ref_logprobs": ref, "values": values}


@jit
def ppo_update(logits, values, tokens, x, kept, paid, temperature, clip, value_clip, vf_coef):
    def loss(logits, values):
        logprobs = losses.logits.token_logprob(completion(logits, tokens) / temperature, tokens)
        arrays, weight = (logprobs, x["logprobs"], x["advantages"], kept), weights.token_mean(kept)
        pg = losses.clipped_surrogate(*arrays, clip_low=clip, clip_high=clip)
        vf = losses.clipped_value_loss(
            completion(values, tokens), x["values"], x["returns"], paid, clip=value_clip
        )
        pg, vf = losses.weighted_sum(pg, weight), losses.weighted_sum(vf, weights.token_mean(paid))
        seen = metrics.of_policy(*arrays, weights=weight, clip_low=clip, clip_high=clip)
        named = {
            "loss/policy_avg": pg,
            "loss/value_avg": vf,
            "policy/clipfrac_avg": seen["clip_low"] + seen["clip_high"],
        }
        return pg + vf_coef * vf, {"pg_loss": pg, "vf_loss": vf, "metrics": named}

    (total, out), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(logits, values)
    return out | {"loss": total, "grad_logits": gradients[0], "grad_values": gradients[1]}


def ppo(x, config, name):
    kept, paid = ~x["padding_mask"], ~x["padding_mask_p1"]
    # The reference pays after the last kept token, so the last column is paid even where nothing follows.
    experience = ppo_experience(
        {role: x[role] for role in ("responses", "ref_logits", "old_scores", "old_values", "scores")}, kept, paid,
        config["kl_estimator"] == "k3", config["whiten_rewards"], config["kl_coef"], config["gamma"], config["lam"],
        config["temperature"] + 1e-7,
    )  # fmt: skip
    update = ppo_update(
        x["logits"], x["new_values"], x["responses"], experience, kept, paid,
        config["temperature"] + 1e-7, config["cliprange"], config["cliprange_value"], config["vf_coef"],
    )  # fmt: skip
    return experience | update


def where(name):
    """Where the reference's per-token numbers are compared: elsewhere ours are 0 and theirs are anything."""
    family, kind = name.split("/")

    def of(x):
        if family == "ppo":
            kept, paid = ~x["padding_mask"], ~x["padding_mask_p1"]
            return dict.fromkeys(("returns", "rewards"), paid) | dict.fromkeys(
                ("kl", "advantages", "logprobs", "ref_logprobs"), kept
            )
        if kind.startswith(("loss", "running", "adaptive")):
            return {}
        mask = x["mask"] == 1
        roles = (
            "kls",
            "non_score_reward",
            "rewards",
            "advantages",
            "whitened",
            "whitened_no_shift",
        )
        return dict.fromkeys(roles, mask)

    return of


@each_case("ppo")
def test_golden(name, precision):
    given = (
        ("padding_mask", "padding_mask_p1", "scores", "sequence_lengths")
        if name.startswith("ppo/")
        else ()
    )
    check(globals()[name.split("/")[0]], name, precision, given=given, where=where(name))
