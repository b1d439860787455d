"""Log-probs, supervised objectives and reward models, against published values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from golden_cases import check, each_case, jit, shifted, value_and_gradient

from rlhf import losses


@jit
def logprob_and_entropy(logits, tokens, mask, w_logp, w_entropy, scale, cap, temperature):
    def scalar(logits):
        logits = logits * scale if cap is None else cap * jnp.tanh(logits * scale / cap)
        logits /= temperature
        logprobs = jnp.where(mask, losses.logits.token_logprob(logits, tokens), 0.0)
        entropy = jnp.where(mask, losses.logits.entropy(logits), 0.0)
        return (w_logp * logprobs + w_entropy * entropy).sum(), (logprobs, entropy)

    gradient, (logprobs, entropy) = jax.grad(scalar, has_aux=True)(logits)
    loss = losses.weighted_sum(losses.cross_entropy(logprobs, mask), losses.weights.token_mean(mask))
    return {"log_probs": logprobs, "entropy": entropy, "loss": loss, "grad_logits": gradient}


def logprob(x, config, name):
    if name == "logprob/selective":
        logits = x["logits"] / np.asarray(config["temperature"], x["logits"].dtype)
        return {"selected": token_logprob(logits, x["index"]), "entropy_rows": entropy(x["logits"])}
    mask = x["labels"][:, 1:] != -100
    scale, cap = config["logit_scale"] or 1.0, config["final_logit_softcapping"]
    out = logprob_and_entropy(
        x["logits"][:, :-1], x["input_ids"][:, 1:], mask, x["w_logp"], x["w_entropy"], scale, cap, config["temperature"]
    )
    return out | {"grad_logits": jnp.pad(out["grad_logits"], ((0, 0), (0, 1), (0, 0)))}


@value_and_gradient
def sft_loss(logits, *, tokens, mask, items):
    nll = losses.cross_entropy(shifted(logits, tokens), mask)
    return losses.weighted_sum(nll, losses.weights.token_mean(mask)) * jnp.maximum(mask.sum(), 1) / items


def sft(x, config, name):
    mask = x["labels"][:, 1:] != -100
    items = config["num_items_in_batch"] or max(mask.sum(), 1)
    return sft_loss(x["logits"], tokens=np.maximum(x["labels"], 0), mask=mask, items=items)


# ---- rewards and preferences ------------------------------------------------------------------------------------------


@functools.partial(value_and_gradient, name="rewards")
def reward_loss(rewards, *, margin, center_coef):
    chosen, rejected = jnp.split(rewards, 2)
    return losses.bradley_terry(chosen, rejected, margin, center_coef=center_coef).mean()


def reward(x, config, name):
    return reward_loss(x["rewards"], margin=x.get("margin"), center_coef=config["center_rewards_coefficient"] or 0.0)


@each_case("supervised")
def test_golden(name, precision):
    check(globals()[name.split("/")[0]], name, precision)
