"""Objectives on pairs, and on single completions with a label, against published values."""

import functools

import jax.numpy as jnp
import numpy as np
from golden_cases import check, each_case, shifted, value_and_gradient

from rlhf import losses


@functools.cache
def dpo_loss(kind):
    def loss(logits, *, tokens, mask, reference, beta):
        logprobs = shifted(logits, tokens)
        if kind == "sft":
            chosen = len(logits) // 2
            nll = losses.cross_entropy(logprobs[:chosen], mask[:chosen])
            return losses.weighted_sum(nll, losses.weights.token_mean(mask[:chosen]))
        share = losses.weights.token_share(mask) if kind == "sigmoid_norm" else 1.0
        chosen, rejected = jnp.split(losses.segment_sum(logprobs * share, mask), 2)
        ref_chosen, ref_rejected = jnp.split(losses.segment_sum(reference * share, mask), 2)
        per_pair = losses.preference.aot if kind == "aot" else losses.preference.sigmoid
        return per_pair(chosen, rejected, ref_chosen, ref_rejected, beta=beta).mean()

    return value_and_gradient(loss)


def dpo(x, config, name):
    mask = x["completion_mask"][:, 1:] == 1
    if "ref_logits" in x:
        reference = token_logprob(x["ref_logits"][:, :-1], x["input_ids"][:, 1:])
    else:  # sums are given: put them on each row's first trained token
        sums = np.concatenate([x["ref_chosen_logps"], x["ref_rejected_logps"]])
        first = mask & (mask.cumsum(-1) == 1)
        reference = np.where(first, sums[:, None], 0.0).astype(x["logits"].dtype)
    (kind,) = config["loss_type"]
    return dpo_loss(kind)(x["logits"], tokens=x["input_ids"], mask=mask, reference=reference, beta=config["beta"])


@each_case("preference")
def test_golden(name, precision):
    check(globals()[name.split("/")[0]], name, precision)
