"""Log-probs, supervised objectives and reward models, against published values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from golden_cases import check, each_case, jit, shifted, value_and_gradient

from rlhf import losses
from rlhf.losses import logits as of_logits
from rlhf.losses import metrics, reward_model, supervised, weights


@jit
def logprob_and_entropy(logits, tokens, mask, w_logp, w_entropy, scale, cap, temperature):
    def scalar(logits):
        logits = logits * scale if cap is None else cap * jnp.tanh(logits * scale / cap)
        logits /= temperature
        logprobs, entropy, squares = (
            jnp.where(mask, x, 0.0)
            for x in (
                of_logits.token_logprob(logits, tokens),
                of_logits.entropy(logits),
                of_logits.log_sum_squared_probs(logits),
            )
        )
        seen = {
            "mean_logits": jnp.where(mask, logits.mean(-1), 0.0),
            "is_top1": of_logits.is_top1(logits, tokens),
        }
        seen |= {"log_probs": logprobs, "entropy": entropy, "log_sum_sq_probs": squares}
        return (w_logp * logprobs + w_entropy * entropy).sum(), seen

    gradient, seen = jax.grad(scalar, has_aux=True)(logits)
    loss = losses.weighted_sum(
        losses.cross_entropy(seen["log_probs"], mask), weights.token_mean(mask)
    )
    return seen | {"loss": loss, "grad_logits": gradient}


def logprob(x, config, name):
    if name == "logprob/selective":
        logits = x["logits"] / np.asarray(config["temperature"], x["logits"].dtype)
        return {
            "selected": jit(of_logits.token_logprob)(logits, x["index"]),
            "entropy_rows": jit(of_logits.entropy)(x["logits"]),
        }
    mask = x["labels"][:, 1:] != -100
    scale, cap = config["logit_scale"] or 1.0, config["final_logit_softcapping"]
    out = logprob_and_entropy(
        x["logits"][:, :-1],
        x["input_ids"][:, 1:],
        mask,
        x["w_logp"],
        x["w_entropy"],
        scale,
        cap,
        config["temperature"],
    )
    return out | {"grad_logits": jnp.pad(out["grad_logits"], ((0, 0), (0, 1), (0, 0)))}


@functools.cache
def sft_loss(kind):
    def loss(logits, *, tokens, mask, items, label_smoothing):
        logprobs = shifted(logits, tokens)
        if kind == "dft":
            per_token = supervised.dft(logprobs, mask)
        elif label_smoothing is None:
            per_token = losses.cross_entropy(logprobs, mask)
        else:
            per_token = of_logits.smoothed_cross_entropy(
                logits[:, :-1], tokens[:, 1:], label_smoothing=label_smoothing
            )
        weight, right = weights.token_mean(mask), of_logits.is_top1(logits[:, :-1], tokens[:, 1:])
        seen = {
            "entropy": losses.weighted_sum(of_logits.entropy(logits[:, :-1]), weight),
            "mean_token_accuracy": losses.weighted_sum(right, weight),
        }
        return losses.weighted_sum(per_token, weight) * jnp.maximum(mask.sum(), 1) / items, {
            "metrics": seen
        }

    return value_and_gradient(loss)


def sft(x, config, name):
    mask = x["labels"][:, 1:] != -100
    items = config["num_items_in_batch"] or max(mask.sum(), 1)
    smoothing = config.get("label_smoothing_factor") or None
    got = sft_loss(config["loss_type"])(
        x["logits"],
        tokens=np.maximum(x["labels"], 0),
        mask=mask,
        items=items,
        label_smoothing=smoothing,
    )
    return got if mask.any() else got | {"metrics": {}}  # the reference divides by 0 there


@functools.partial(value_and_gradient, name="rewards")
def reward_loss(rewards, *, margin, center_coef):
    chosen, rejected = jnp.split(rewards, 2)
    weight = jnp.full_like(chosen, 1 / len(chosen))
    seen = metrics.of_pairs(chosen, rejected, weights=weight)
    named = {
        "accuracy": seen["accuracy"],
        "margin": seen["margin"],
        "mean_reward": (seen["chosen"] + seen["rejected"]) / 2,
    }
    per_pair = losses.bradley_terry(chosen, rejected, margin, center_coef=center_coef)
    return losses.weighted_sum(per_pair, weight), {"metrics": named}


def reward(x, config, name):
    return reward_loss(
        x["rewards"],
        margin=x.get("margin"),
        center_coef=config["center_rewards_coefficient"] or 0.0,
    )


@value_and_gradient
def prm_loss(logits, *, labels, mask, items):
    per_step = reward_model.process_reward(logits, labels, mask)
    right = losses.weighted_sum(of_logits.is_top1(logits, labels), weights.token_mean(mask))
    return losses.weighted_sum(per_step, weights.token_mean(mask)) * mask.sum() / items, {
        "metrics": {"accuracy": right}
    }


def prm(x, config, name):
    mask = x["labels"] != -100
    items = config["num_items_in_batch"] or mask.sum()
    return prm_loss(x["logits"], labels=np.maximum(x["labels"], 0), mask=mask, items=items)


@each_case("supervised")
def test_golden(name, precision):
    where = (
        (lambda x: {"is_top1": x["labels"][:, 1:] != -100})
        if name.startswith("logprob/") and "sel" not in name
        else None
    )
    check(globals()[name.split("/")[0]], name, precision, where=where)
