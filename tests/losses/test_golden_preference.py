"""Objectives on pairs, and on single completions with a label, against published values.

Each family is compiled once for all its losses: which of them count, and how much, is an array.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from golden_cases import CASES, check, completion, each_case, shifted, value_and_gradient

from rlhf import losses
from rlhf.losses import divergence, moments, online, preference, reference_free, unpaired, weights


def parts(config, kinds):
    """The weight of each kind of loss, by name, 0 for those that are left out."""
    asked = config["loss_type"] if isinstance(config["loss_type"], list) else [config["loss_type"]]
    assert set(asked) <= set(kinds)
    amounts = config.get("loss_weights") or [1.0] * len(asked)
    return {kind: 0.0 for kind in kinds} | dict(zip(asked, amounts, strict=True))


def mixture(per_pair, amounts):
    return sum(amounts[kind] * x for kind, x in per_pair.items())


def of_pairs(chosen, rejected):
    """TRL's names of what is logged of rewards."""
    ours = losses.metrics.of_pairs(
        chosen, rejected, weights=jnp.full(chosen.shape, 1 / chosen.size)
    )
    names = {
        "chosen": "chosen",
        "rejected": "rejected",
        "margin": "margins",
        "accuracy": "accuracies",
    }
    return {f"rewards/{names[name]}": x for name, x in ours.items()}


def mean_logprobs(chosen, rejected):
    return {"logps/chosen": chosen.mean(), "logps/rejected": rejected.mean()}


def halves(x):
    return jnp.split(x, 2)


def nll(logprobs, mask):
    """The token mean."""
    return losses.weighted_sum(losses.cross_entropy(logprobs, mask), weights.token_mean(mask))


# ---- DPO --------------------------------------------------------------------------------------------------------------

DIVERGENCES = {
    "reverse_kl": lambda alpha: divergence.reverse_kl,
    "forward_kl": lambda alpha: divergence.forward_kl,
    "js_divergence": lambda alpha: divergence.js,
    "alpha_divergence": lambda alpha: functools.partial(divergence.alpha, alpha=alpha),
}
SCORED = {"sigmoid": preference.sigmoid, "hinge": preference.hinge}
BY_THE_TOKEN = {"sigmoid_norm": preference.sigmoid_norm, "ipo": preference.ipo}
SORTED = {"aot": preference.aot, "aot_unpaired": preference.aot_unpaired}
PLAIN = {
    "nca_pair": preference.nca,
    "bco_pair": preference.bco_pair,
    "sppo_hard": preference.sppo,
    "apo_zero": preference.apo_zero,
    "apo_down": preference.apo_down,
}
DPO = (*SCORED, *BY_THE_TOKEN, *SORTED, *PLAIN, "robust", "exo_pair", "discopop", "sft")


def dpo_objectives(pair, lengths, knobs, score):
    beta, smooth = {"beta": knobs["beta"]}, {"label_smoothing": knobs["label_smoothing"]}
    above_zero = {
        "label_smoothing": jnp.maximum(knobs["label_smoothing"], 1e-3)
    }  # where EXO is left out, it is finite
    lengths = dict(zip(("chosen_length", "rejected_length"), lengths, strict=True))
    return (
        {kind: fn(*pair, **beta, divergence=score) for kind, fn in SCORED.items()}
        | {
            kind: fn(*pair, **beta, **lengths, divergence=score)
            for kind, fn in BY_THE_TOKEN.items()
        }
        | {kind: fn(*pair, **beta, **smooth) for kind, fn in SORTED.items()}
        | {kind: fn(*pair, **beta) for kind, fn in PLAIN.items()}
        | {
            "robust": preference.robust(*pair, **beta, **smooth, divergence=score),
            "exo_pair": preference.exo(*pair, **beta, **above_zero, divergence=score),
            "discopop": preference.discopop(*pair, **beta, tau=knobs["tau"], divergence=score),
        }
    )


@functools.cache
def dpo_loss(kind):
    def loss(logits, *, tokens, mask, reference, amounts, knobs):
        logprobs = shifted(logits, tokens)
        share = jnp.concatenate(preference.ld_weights(*halves(mask), alpha=knobs["ld_alpha"]))
        pair = (
            *halves(losses.segment_sum(logprobs * share, mask)),
            *halves(losses.segment_sum(reference * share, mask)),
        )
        per_pair = dpo_objectives(
            pair, halves(mask.sum(-1)), knobs, DIVERGENCES[kind](knobs["alpha"])
        )
        squares = losses.logits.log_sum_squared_probs(logits[:, :-1])
        likely = jnp.where(
            knobs["use_weighting"], preference.wpo_weights(logprobs, squares, mask), 1.0
        )
        total = (mixture(per_pair, amounts) * jnp.prod(jnp.stack(halves(likely)), axis=0)).mean()
        total += amounts["sft"] * nll(halves(logprobs)[0], halves(mask)[0])
        rewards = (knobs["beta"] * x for x in preference.log_ratios(*pair))
        return total, {"metrics": of_pairs(*rewards) | mean_logprobs(*pair[:2])}

    return value_and_gradient(loss)


def dpo(x, config, name):
    mask = x["completion_mask"][:, 1:] == 1
    if "ref_logits" in x:
        reference = shifted(x["ref_logits"], x["input_ids"])
    else:  # sums are given: put them on each row's first trained token
        sums = np.concatenate([x["ref_chosen_logps"], x["ref_rejected_logps"]])
        first = mask & (mask.cumsum(-1) == 1)
        reference = jnp.asarray(np.where(first, sums[:, None], 0.0).astype(x["logits"].dtype))
    knobs = {
        "beta": config["beta"],
        "label_smoothing": config["label_smoothing"],
        "alpha": config["f_alpha_divergence_coef"],
        "tau": config["discopop_tau"],
        "ld_alpha": 1.0 if config["ld_alpha"] is None else config["ld_alpha"],
        "use_weighting": config["use_weighting"],
    }
    fn = dpo_loss(config["f_divergence_type"])
    return fn(
        x["logits"],
        tokens=x["input_ids"],
        mask=mask,
        reference=reference,
        amounts=parts(config, DPO),
        knobs=knobs,
    )


# ---- without a reference ----------------------------------------------------------------------------------------------


def without_reference(fn, chosen, rejected, **knobs):
    return fn(chosen, rejected, jnp.zeros_like(chosen), jnp.zeros_like(rejected), **knobs)


CPO = ("sigmoid", "hinge", "ipo", "simpo", "alphapo")


@value_and_gradient
def cpo_loss(logits, *, tokens, mask, amounts, means, knobs):
    logprobs = shifted(logits, tokens)
    pair, lengths = halves(losses.segment_sum(logprobs, mask)), halves(mask.sum(-1))
    beta, smooth, ones = (
        {"beta": knobs["beta"]},
        {"label_smoothing": knobs["label_smoothing"]},
        jnp.ones(len(pair[0])),
    )
    by_token = preference.averages(*pair, *lengths)
    rewards = [
        reference_free.power_reward(jnp.where(means, *x), alpha=knobs["alpha"])
        for x in zip(by_token, pair, strict=True)
    ]
    per_pair = {
        "sigmoid": reference_free.cpo(*rewards, **beta, **smooth),
        "hinge": without_reference(preference.hinge, *rewards, **beta),
        "ipo": without_reference(
            preference.ipo, *rewards, chosen_length=ones, rejected_length=ones, **beta
        ),
        "simpo": reference_free.simpo(*pair, *lengths, **beta, **smooth, gamma=knobs["gamma"]),
        "alphapo": reference_free.alphapo(
            *pair, *lengths, **beta, **smooth, gamma=knobs["gamma"], alpha=knobs["alpha"]
        ),
    }
    chosen_nll = nll(halves(logprobs)[0], halves(mask)[0])
    seen = of_pairs(*(knobs["beta"] * x for x in rewards))
    seen |= {"nll_loss": jnp.where(knobs["nll"] != 0, chosen_nll, 0.0)}
    seen |= mean_logprobs(*(jnp.where(means, *x) for x in zip(by_token, pair, strict=True)))
    return mixture(per_pair, amounts).mean() + knobs["nll"] * chosen_nll, {"metrics": seen}


def cpo(x, config, name):
    kind = "alphapo" if config["loss_type"] == "simpo" and config["alpha"] else config["loss_type"]
    knobs = {key: config[key] for key in ("beta", "label_smoothing", "alpha")}
    knobs |= {"gamma": config["simpo_gamma"], "nll": config["cpo_alpha"]}
    means = config["loss_type"] in ("ipo", "simpo")
    return cpo_loss(
        x["logits"],
        tokens=x["input_ids"],
        mask=x["completion_mask"][:, 1:] == 1,
        amounts=parts({"loss_type": kind}, CPO),
        means=means,
        knobs=knobs,
    )


@value_and_gradient
def orpo_loss(logits, *, tokens, mask, whole, beta):
    logprobs = shifted(logits, tokens)
    pair, lengths = halves(losses.segment_sum(logprobs, mask)), halves(mask.sum(-1))
    chosen_nll = nll(halves(logprobs)[0], halves(whole)[0])
    per_pair = reference_free.orpo(*pair, *lengths, beta=beta)
    by_token = preference.averages(*pair, *lengths)
    chosen_odds, rejected_odds = map(reference_free.log_odds, by_token)
    seen = of_pairs(*(beta * x for x in by_token)) | mean_logprobs(*by_token)
    seen |= {
        "nll_loss": chosen_nll,
        "log_odds_chosen": (chosen_odds - rejected_odds).mean(),
        "log_odds_ratio": -per_pair.mean() / beta,
    }
    return chosen_nll + per_pair.mean(), {"metrics": seen}


def orpo(x, config, name):
    mask, whole = (x[key][:, 1:] == 1 for key in ("completion_mask", "attention_mask"))
    return orpo_loss(
        x["logits"], tokens=x["input_ids"], mask=mask, whole=whole, beta=config["beta"]
    )


TPO = ("sigmoid", "hinge", "ipo", "tpo-l")


@value_and_gradient
def tpo_loss(logits, *, tokens, mask, amounts, means, knobs):
    logprobs = shifted(logits, tokens)
    rows = 4  # pairs; the gold completions, where there are some, come last
    pair = jnp.split(losses.segment_sum(logprobs[: 2 * rows], mask[: 2 * rows]), 2)
    lengths = halves(mask[: 2 * rows].sum(-1))
    beta, smooth = {"beta": knobs["beta"]}, {"label_smoothing": knobs["label_smoothing"]}
    in_tokens = dict(zip(("chosen_length", "rejected_length"), lengths, strict=True))
    per_pair = {
        "sigmoid": reference_free.tpo(*pair, **beta, **smooth),
        "hinge": without_reference(preference.hinge, *pair, **beta),
        "ipo": without_reference(preference.ipo, *pair, **in_tokens, **beta),
        "tpo-l": reference_free.tpo_l(*pair, *lengths, **beta, **smooth, gamma=knobs["gamma"]),
    }
    total = mixture(per_pair, amounts).mean()
    if len(logits) == 3 * rows:
        total += knobs["nll"] * nll(logprobs[2 * rows :], mask[2 * rows :])
    seen = [
        jnp.where(means, *x) for x in zip(preference.averages(*pair, *lengths), pair, strict=True)
    ]
    return total, {"metrics": of_pairs(*(knobs["beta"] * x for x in seen)) | mean_logprobs(*seen)}


def tpo(x, config, name):
    knobs = {key: config[key] for key in ("beta", "label_smoothing")}
    return tpo_loss(
        x["logits"],
        tokens=x["input_ids"],
        mask=x["completion_mask"][:, 1:] == 1,
        amounts=parts(config, TPO),
        means=config["loss_type"] in ("ipo", "tpo-l"),
        knobs=knobs | {"gamma": config["tpo_l_gamma"], "nll": config["tpo_alpha"]},
    )


# ---- single completions -----------------------------------------------------------------------------------------------


def sequence_logprobs(logits, tokens, mask):
    return losses.segment_sum(shifted(logits, tokens), mask)


def by_label(name, values, desirable):
    """Sums over the rows of each label."""
    return {
        f"{name}/chosen": jnp.where(desirable, values, 0).sum(),
        f"{name}/rejected": jnp.where(desirable, 0, values).sum(),
    }


KTO = ("kto", "apo_zero_unpaired")


@value_and_gradient
def kto_loss(logits, *, ref_logits, tokens, mask, desirable, mismatched, amounts, beta, lambdas):
    logprobs, reference = (sequence_logprobs(x, tokens, mask) for x in (logits, ref_logits))
    kl = unpaired.kto_kl(*(sequence_logprobs(x, *mismatched[2:]) for x in mismatched[:2]))
    knobs = {"beta": beta} | lambdas
    per_row = {
        "kto": unpaired.kto(logprobs, reference, desirable, kl, **knobs),
        "apo_zero_unpaired": unpaired.apo_zero(logprobs, reference, desirable, **knobs),
    }
    number = by_label("number", jnp.ones(logprobs.shape), desirable)
    seen = by_label("rewards", beta * (logprobs - reference), desirable) | by_label(
        "logps", logprobs, desirable
    )
    seen = {key: x / number[f"number/{key.split('/')[1]}"] for key, x in seen.items()}
    seen |= {
        "rewards/margins": seen["rewards/chosen"] - seen["rewards/rejected"],
        "kl": kl * (amounts["kto"] != 0),
    }
    return mixture(per_row, amounts).mean(), {"metrics": seen}


def kto(x, config, name):
    if "kl_logits" in x:
        mismatched = (
            x["kl_logits"],
            x["ref_kl_logits"],
            x["KL_input_ids"],
            x["KL_completion_mask"][:, 1:] == 1,
        )
    else:  # no matter which
        width = x["logits"].shape[1] - 2  # that of the others
        mask = np.zeros((len(x["logits"]), width - 1), bool)
        mismatched = (
            x["logits"][:, :width],
            x["ref_logits"][:, :width],
            x["input_ids"][:, :width],
            mask,
        )
    out = kto_loss(
        x["logits"],
        ref_logits=x["ref_logits"],
        tokens=x["input_ids"],
        mask=x["completion_mask"][:, 1:] == 1,
        desirable=x["label"],
        mismatched=mismatched,
        amounts=parts(config, KTO),
        beta=config["beta"],
        lambdas={key: config[key] for key in ("desirable_weight", "undesirable_weight")},
    )
    seen = {
        key: value for key, value in out["metrics"].items() if key in CASES[name]["metrics"]
    }  # none of an absent label
    return out | {"metrics": seen}


@value_and_gradient
def bco_loss(
    logits,
    *,
    ref_logits,
    tokens,
    mask,
    desirable,
    previous_logits,
    previous,
    probability,
    weighted,
    knobs,
):
    beta = knobs["beta"]
    logprobs, reference, before = (
        sequence_logprobs(x, tokens, mask) for x in (logits, ref_logits, previous_logits)
    )
    seen_rewards = moments.running()
    state = seen_rewards.update(
        seen_rewards.init(), beta * (before - reference), jnp.full(before.shape, previous)
    )
    state = seen_rewards.update(state, beta * (logprobs - reference))
    per_row = unpaired.bco(logprobs, reference, desirable, state.mean, beta=beta)
    bounds = {key: knobs[key] for key in ("min_ratio", "max_ratio")}
    per_row *= jnp.where(weighted, unpaired.density_ratio(probability, desirable, **bounds), 1.0)
    seen = by_label("rewards", beta * (logprobs - reference), desirable) | by_label(
        "logps", logprobs, desirable
    )
    return per_row.mean(), {
        "metrics": {f"{key}_sum": x for key, x in seen.items()} | {"delta": state.mean}
    }


def bco(x, config, name):
    bounds = {
        "min_ratio": config.get("min_density_ratio", 0.5),
        "max_ratio": config.get("max_density_ratio", 10.0),
    }
    return bco_loss(
        x["logits"],
        ref_logits=x["ref_logits"],
        tokens=x["input_ids"],
        mask=x["labels"][:, 1:] != -100,
        desirable=x["label"],
        previous_logits=x.get("previous_logits", x["logits"]),
        previous="previous_logits" in x,
        probability=x.get("prob_desirable", np.full(x["label"].shape, 0.5, x["logits"].dtype)),
        weighted="prob_desirable" in x,
        knobs={"beta": config["beta"]} | bounds,
    )


# ---- online -----------------------------------------------------------------------------------------------------------

EOS = 1
SAMPLED = ("sigmoid", "ipo")


def of_completion(logits, tokens, mask):
    return losses.segment_sum(losses.logits.token_logprob(completion(logits, tokens), tokens), mask)


def from_sums(pair, beta):
    """The two losses of sampled pairs; IPO's with sums, not means over tokens."""
    ones = jnp.ones(pair[0].shape)
    ipo = functools.partial(preference.ipo, beta=beta, chosen_length=ones, rejected_length=ones)
    return {"sigmoid": functools.partial(preference.sigmoid, beta=beta), "ipo": ipo}


@value_and_gradient
def online_dpo_loss(logits, *, ref_logits, tokens, mask, rewards, penalty, amounts, beta):
    rewards = rewards - penalty * ~(tokens == EOS).any(-1)
    of_prompts = lambda x: jnp.stack(halves(x), axis=1)  # [P, 2]
    chosen, rejected, margin = online.pairs_by_score(of_prompts(rewards))
    sums = [of_prompts(of_completion(x, tokens, mask)) for x in (logits, ref_logits)]
    pick = lambda x, index: jnp.take_along_axis(x, index[:, None], axis=1)[:, 0]
    pair = [pick(x, index) for x in sums for index in (chosen, rejected)]
    total = mixture({kind: fn(*pair) for kind, fn in from_sums(pair, beta).items()}, amounts).mean()
    seen = of_pairs(*(beta * x for x in preference.log_ratios(*pair))) | mean_logprobs(*pair[:2])
    return total, {"metrics": seen | {"objective/scores_margin": margin.mean()}}


def online_dpo(x, config, name):
    return online_dpo_loss(
        x["logits"],
        ref_logits=x["ref_logits"],
        tokens=x["completion_ids"],
        mask=x["completion_mask"] == 1,
        rewards=x["rewards"],
        penalty=config["missing_eos_penalty"] or 0.0,
        amounts=parts(config, SAMPLED),
        beta=config["beta"],
    )


@value_and_gradient
def xpo_loss(logits, *, ref_logits, tokens, masks, scores, amounts, beta, alpha):
    policy, reference = (
        [of_completion(*x) for x in zip(both, tokens, masks, strict=True)]
        for both in (logits, ref_logits)
    )
    first = (
        online.pairs_by_score(jnp.stack(scores, axis=1))[0] == 0
    )  # the policy's own sample is the better one
    pair = [jnp.where(first, *x) for sums in (policy, reference) for x in (sums, sums[::-1])]
    per_pair = {
        kind: online.xpo(*pair, from_reference=policy[1], alpha=alpha, loss=fn)
        for kind, fn in from_sums(pair, beta).items()
    }
    seen = of_pairs(*(beta * x for x in preference.log_ratios(*pair))) | {
        "loss/xpo": alpha * policy[1].mean()
    }
    total = mixture(per_pair, amounts).mean()
    return total, {"metrics": seen | {"loss/dpo": total - seen["loss/xpo"]}}


def xpo(x, config, name):
    both = lambda key, other: (x[key], x[other])
    out = xpo_loss(
        both("logits", "logits_ref_data"),
        ref_logits=both("ref_logits", "ref_logits_ref_data"),
        tokens=both("completion_ids", "ref_completion_ids"),
        masks=tuple(mask == 1 for mask in both("completion_mask", "ref_completion_mask")),
        scores=both("scores", "ref_scores"),
        amounts=parts(config, SAMPLED),
        beta=config["beta"],
        alpha=config["alpha"],
    )
    of_policy, of_reference = out["grad_logits"]
    return out | {"grad_logits": of_policy, "grad_logits_ref_data": of_reference}


@value_and_gradient
def nash_md_loss(logits, *, ref_logits, tokens, mask, preferred, beta):
    logprobs, reference = (
        losses.logits.token_logprob(completion(x, tokens), tokens) for x in (logits, ref_logits)
    )
    per_token = online.nash_md(logprobs, reference, mask, preferred=preferred, beta=beta)
    by_sequence = weights.sequence_sum(mask)
    seen = {"loss/kl": losses.weighted_sum(losses.kl.k1(logprobs, reference, mask), by_sequence)}
    return losses.weighted_sum(per_token, by_sequence), {"metrics": seen}


def nash_md(x, config, name):
    preferred = jax.nn.sigmoid(x["scores"] - x["mixture_scores"])
    mask = x["completion_mask"] == 1
    inputs = {
        "ref_logits": x["ref_logits"],
        "tokens": x["completion_ids"],
        "mask": mask,
        "preferred": preferred,
    }
    return nash_md_loss(x["logits"], **inputs, beta=config["beta"])


@each_case("preference")
def test_golden(name, precision):
    check(globals()[name.split("/")[0]], name, precision)
