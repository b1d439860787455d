"""Distillation and optimal values, against published values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from golden_cases import CASES, check, completion, each_case, jit, value_and_gradient

from rlhf import losses
from rlhf.losses import advantages, distillation, metrics, offline, policy, weights

# ---- divergences ------------------------------------------------------------------------------------------------------


@functools.cache
def divergence(support, k, tail):
    """The per-position loss of (student, teacher, β), on the whole vocabulary or on the likeliest tokens."""

    def loss(student, teacher, beta):
        if support == "whole":
            return distillation.jsd(student, teacher, beta=beta)
        top = {
            "student": distillation.top_k(student, k=k),
            "teacher": distillation.top_k(teacher, k=k),
        }
        chosen = top["student"] | top["teacher"] if support == "both" else top[support]
        restrict = distillation.with_tail if tail else distillation.on_support
        return distillation.jsd(*restrict(student, teacher, chosen), beta=beta)

    return loss


@functools.cache
def mean_divergence(support, k, tail):
    def loss(logits, *, teacher, mask, beta, temperature, items):
        per_token = divergence(support, k, tail)(logits / temperature, teacher / temperature, beta)
        total = losses.weighted_sum(per_token, weights.token_mean(mask)) * mask.sum() / items
        return total, {"metrics": {"loss": total}}

    return value_and_gradient(loss)


@functools.cache
def summed_divergence(support, k, tail):
    def loss(logits, *, teacher, beta):
        per_token = divergence(support, k, tail)(logits, teacher, beta)
        return per_token.sum(), {"per_token": per_token}

    return value_and_gradient(loss)


@value_and_gradient
def sampled(logits, *, teacher, tokens):
    logprobs, teacher_logprobs = (losses.logits.token_logprob(x, tokens) for x in (logits, teacher))
    mask = jnp.ones_like(logprobs, bool)
    per_token = policy.reinforce(
        logprobs, distillation.advantages(logprobs, teacher_logprobs, mask), mask
    )
    return per_token.sum(), {"per_token": per_token}


@value_and_gradient
def iw_opd(logits, *, teacher, tokens, rollout_logprobs, mask, gamma, temperature, items):
    logprobs, teacher_logprobs = (
        losses.logits.token_logprob(x / temperature, tokens) for x in (logits, teacher)
    )
    better = distillation.advantages(rollout_logprobs, teacher_logprobs, mask)
    factors = distillation.prefix_weights(better, mask, gamma=gamma)
    weight = weights.token_mean(mask)
    seen = {
        "iw_opd/mean_advantage": losses.weighted_sum(better * factors, weight),
        "iw_opd/mean_abs_advantage": losses.weighted_sum(jnp.abs(better), weight),
        "iw_opd/mean_weight": losses.weighted_sum(factors, weight),
    }
    per_token = policy.reinforce(logprobs, better * factors, mask)
    return losses.weighted_sum(per_token, weight) * mask.sum() / items, {"metrics": seen}


def distill(x, config, name):
    kind = name.split("/")[1]
    if kind == "self_sampled":
        got = sampled(x["logits"], teacher=x["teacher_logits"], tokens=x["input_ids"])
        return {role: got[role] for role in ("per_token", "grad_logits")}
    if kind.startswith("self"):
        support = "student" if "topk" in kind else "whole"
        fn = summed_divergence(support, config.get("topk"), config.get("add_tail"))
        got = fn(x["logits"], teacher=x["teacher_logits"], beta=config["alpha"])
        return {role: got[role] for role in ("per_token", "grad_logits")}
    mask = x["labels"] != -100
    items = config.get("num_items_in_batch") or mask.sum()
    if kind.startswith("iw_opd"):
        return iw_opd(
            x["logits"], teacher=x["teacher_logits"], tokens=np.maximum(x["labels"], 0), mask=mask,
            rollout_logprobs=x["rollout_logps"], gamma=config["gamma"], temperature=config["temperature"], items=items,
        )  # fmt: skip
    if kind.startswith("gkd_trainer"):
        mask = np.pad(mask[:, 1:], ((0, 0), (0, 1)))
        items = mask.sum()
    support, k = "whole", None
    if "topk" in kind:
        support, k = {0.0: "teacher", 1.0: "student"}.get(config["beta"], "both"), config["top_k"]
    items = {"sum": 1, "mean": mask.sum() * x["logits"].shape[-1]}.get(
        config.get("reduction"), items
    )
    got = mean_divergence(support, k, config.get("add_tail"))(
        x["logits"], teacher=x["teacher_logits"], mask=mask, beta=config["beta"],
        temperature=config.get("temperature", 1.0), items=items,
    )  # fmt: skip
    return got if "loss" in CASES[name]["metrics"] else got | {"metrics": {}}


# ---- MiniLLM ----------------------------------------------------------------------------------------------------------


@functools.cache
def minillm_loss(single_step, reverse_kl_advantage, length_normalization):
    """The reference counts padding as tokens of the teacher's game, and lets the gradient through its advantage."""

    def loss(logits, *, teacher, tokens, mask, old, rewards, kd_temperature, gamma, clip):
        logits = completion(logits, tokens)
        student, teacher = logits / kd_temperature, completion(teacher, tokens) / kd_temperature
        everywhere = jnp.ones_like(mask)
        advantage = jnp.broadcast_to(rewards[:, None], mask.shape)
        if reverse_kl_advantage:
            warm, teacher_logprobs = (
                losses.logits.token_logprob(x, tokens) for x in (student, teacher)
            )
            game = functools.partial(game_advantages, everywhere, gamma, length_normalization)
            added = game(teacher_logprobs) - game(warm)  # linear in the log-probs
            advantage += added
        logprobs = losses.logits.token_logprob(logits, tokens)
        arrays = (logprobs, old, advantage, mask)
        per_token = policy.clipped_surrogate(*arrays, clip_low=clip, clip_high=clip)
        if reverse_kl_advantage:  # the surrogate is linear in the advantage, up to its sign
            slope = jax.lax.stop_gradient(per_token / advantage)
            per_token += slope * (added - jax.lax.stop_gradient(added))
        weight = weights.token_mean(mask)
        shares = metrics.of_policy(*arrays, weights=weight, clip_low=clip, clip_high=clip)
        seen = {f"clip_ratio/{end}_mean": shares[f"clip_{end}"] for end in ("low", "high")}
        seen["entropy"] = losses.weighted_sum(losses.logits.entropy(logits), weight)
        total = losses.weighted_sum(per_token, weights.sequence_mean(mask))
        if single_step:
            total += distillation.reverse_kl(student, teacher).mean()
        return total, {"metrics": seen}

    return value_and_gradient(loss)


def game_advantages(mask, gamma, length_normalization, logprobs):
    """`minillm`'s mean of what follows, with a gradient; without its divisor the reference counts from the row's start."""
    columns = jnp.arange(mask.shape[1])
    if not length_normalization:
        return jnp.flip(jnp.cumsum(jnp.flip(logprobs * gamma ** columns[None], -1), -1), -1)
    powers = jnp.where(
        columns[None, :] >= columns[:, None],
        gamma ** jnp.abs(columns[None, :] - columns[:, None]),
        0.0,
    )
    return logprobs @ (powers / powers.sum(-1, keepdims=True)).T


def minillm(x, config, name):
    mask = x["completion_mask"] == 1
    loss = minillm_loss(
        config["single_step_decomposition"], config["rkl_advantage"], config["length_normalization"]
    )
    return loss(
        x["logits"], teacher=x["teacher_logits"], tokens=x["completion_ids"], mask=mask, old=x["old_logps"],
        rewards=x["advantages"], kd_temperature=config["kd_temperature"], gamma=config["gamma"], clip=config["epsilon"],
    )  # fmt: skip


def test_minillm_advantages_are_the_references():
    """Ours has no gradient; its value is that of the composition above."""
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 3, 5))
    mask = np.ones((3, 5), bool)
    with jax.enable_x64(True):
        for gamma in (0.0, 0.8):
            want = game_advantages(jnp.asarray(mask), gamma, True, jnp.asarray(teacher - student))
            got = jit(distillation.minillm)(student, teacher, mask, discount=gamma)
            np.testing.assert_allclose(got, want, rtol=1e-12)
        want = advantages.returns(teacher - student, mask, discount=0.8) * 0.8 ** np.arange(5)[None]
        got = game_advantages(jnp.asarray(mask), 0.8, False, jnp.asarray(teacher - student))
        np.testing.assert_allclose(got, want, rtol=1e-12)


# ---- A*-PO ------------------------------------------------------------------------------------------------------------


@value_and_gradient
def a2po_loss(logits, *, tokens, mask, ref, rewards, values, beta):
    logprobs = losses.segment_sum(
        losses.logits.token_logprob(completion(logits, tokens), tokens), mask
    )
    per_row = offline.a_star(logprobs, ref, rewards, values, beta=beta)
    seen = {
        "advantage": (rewards - values).mean(),
        "implicit_reward": (beta * (logprobs - ref)).mean(),
    }
    return per_row.mean(), {"metrics": seen}


def a2po(x, config, name):
    return a2po_loss(
        x["logits"], tokens=x["completion_ids"], mask=x["completion_mask"] == 1, ref=x["ref_logps"],
        rewards=x["rewards"], values=x["v_star"], beta=config["beta2"],
    )  # fmt: skip


@each_case("distillation")
def test_golden(name, precision):
    check(globals()[name.split("/")[0]], name, precision)
