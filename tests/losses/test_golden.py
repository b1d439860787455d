"""Values and gradients of published implementations, reproduced by compositions of public functions (`tests/golden`).

One composition per family, jitted once and shared by its cases: what differs between cases is an array.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf import losses

# Most of the time is compilation: LLVM's optimisations are left out.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "index.json").read_text())["cases"]
BY_NAME = {case["name"]: case for case in CASES}


@functools.cache
def arrays(file):
    with np.load(GOLDEN / file) as data:
        return {key: data[key] for key in data.files}


token_logprob, entropy = jit(losses.logits.token_logprob), jit(losses.logits.entropy)
group_relative, whiten = jit(losses.group_relative), jit(losses.whiten)
token_mean, sequence_mean = jit(losses.weights.token_mean), jit(losses.weights.sequence_mean)


def shifted(logits, tokens):
    """Log-probs of `tokens[:, 1:]`, which `logits[:, :-1]` predict."""
    return losses.logits.token_logprob(logits[:, :-1], tokens[:, 1:])


def value_and_gradient(fn, name="logits"):
    """`{"loss": …, "grad_logits": …}` of a jitted `fn(x, **inputs) -> scalar`."""
    differentiate = jit(jax.value_and_grad(fn))

    def run(x, **inputs):
        value, gradient = differentiate(x, **inputs)
        return {"loss": value, f"grad_{name}": gradient}

    return run


# ---- log-probs and supervised -----------------------------------------------------------------------------------------


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


# ---- clipped surrogates -----------------------------------------------------------------------------------------------


def completion(logits, tokens):
    """Logits of the completion tokens, which stand at the end."""
    length = tokens.shape[1]
    return logits[:, -length - 1 : -1]


@value_and_gradient
def grpo_loss(logits, *, tokens, mask, old, ref, advantages, is_ratio, weights, sequence_level, on_policy, knobs):
    logits = completion(logits, tokens) / knobs["temperature"]
    logprobs = losses.logits.token_logprob(logits, tokens)
    old = jnp.where(on_policy, jax.lax.stop_gradient(logprobs), old)
    mean = lambda x: jnp.broadcast_to(
        losses.segment_sum(x * losses.weights.token_share(mask), mask)[:, None], mask.shape
    )  # GSPO: the sequence's mean log-prob in place of the token's
    new, old = (jnp.where(sequence_level, mean(x), x) for x in (logprobs, old))
    policy = losses.clipped_surrogate(new, old, advantages, mask, clip_low=knobs["low"], clip_high=knobs["high"])
    per_token = policy * is_ratio + knobs["kl"] * losses.kl.k3(logprobs, ref, mask)
    entropy = losses.weighted_sum(losses.logits.entropy(logits), losses.weights.token_mean(mask))
    return losses.weighted_sum(per_token, weights) - knobs["entropy"] * entropy


GRPO_WEIGHTS = {
    "grpo": sequence_mean,
    "bnpo": token_mean,
    "dapo": token_mean,
    "dr_grpo": jit(functools.partial(losses.weights.constant, length=11)),
}


def grpo(x, config, name):
    tokens = x["completion_ids"]
    mask = x["completion_mask"] == 1
    if name.startswith("grpo/logps"):
        logits = completion(x["logits"], tokens) / np.asarray(config.get("temperature", 1.0), x["logits"].dtype)
        out = {"per_token_logps": token_logprob(logits, tokens), "entropies": entropy(logits)}
        return {role: np.where(mask, value, 0) for role, value in out.items()}
    if "tool_mask" in x:
        mask &= x["tool_mask"] == 1
    advantages = x["advantages"] if x["advantages"].ndim == 2 else x["advantages"][:, None]
    zeros = np.zeros_like(x["logits"], shape=mask.shape)
    named = {"low": "epsilon_low", "high": "epsilon_high", "kl": "beta", "entropy": "entropy_coef"}
    named["temperature"] = "temperature"
    return grpo_loss(
        x["logits"],
        tokens=tokens,
        mask=mask,
        old=x.get("old_logps", zeros),
        ref=x.get("ref_logps", zeros),
        advantages=np.broadcast_to(advantages, mask.shape),
        is_ratio=np.broadcast_to(x.get("is_ratio", zeros + 1), mask.shape),
        weights=GRPO_WEIGHTS[config["loss_type"]](mask),
        sequence_level=config["importance_sampling_level"] == "sequence",
        on_policy="old_logps" not in x,
        knobs={knob: config[key] for knob, key in named.items()},
    )


VERL_WEIGHTS = {
    "token-mean": token_mean,
    "seq-mean-token-sum": jit(losses.weights.sequence_sum),
    "seq-mean-token-mean": sequence_mean,
    # verl divides by the padded length alone, not by the number of sequences
    "seq-mean-token-sum-norm": jit(
        lambda mask: losses.weights.constant(mask, length=mask.shape[1]) * losses.weights.number_of_sequences(mask)
    ),
}


@functools.partial(value_and_gradient, name="log_prob")
def verl_policy_loss(logprobs, *, old, advantages, mask, weights, low, high):
    per_token = losses.clipped_surrogate(logprobs, old, advantages, mask, clip_low=low, clip_high=high)
    return losses.weighted_sum(per_token, weights)


def verl_policy(x, config, name):
    mask = x["response_mask"] == 1
    return verl_policy_loss(
        x["log_prob"],
        old=x["old_log_prob"],
        advantages=x["advantages"],
        mask=mask,
        weights=VERL_WEIGHTS[config["loss_agg_mode"]](mask),
        low=config["clip_ratio_low"],
        high=config["clip_ratio_high"],
    )


# ---- advantages -------------------------------------------------------------------------------------------------------


def grpo_adv(x, config, name):
    scored = ~np.isnan(x["rewards"]).all(-1)  # a function that gives no score adds nothing; a row without any is unscored
    weights = np.asarray(config["reward_weights"] or np.ones(x["rewards"].shape[-1]), x["rewards"].dtype)
    rewards = np.where(scored, np.nansum(x["rewards"] * weights, -1), np.nan)
    size = config["num_generations_eval" if config["mode"] == "eval" else "num_generations"]
    return {"advantages": group_relative(rewards.reshape(-1, size)).reshape(-1)}


@jit
def gae_and_whiten(rewards, values, gae_mask, mask, gamma, lam):
    bootstrap = jnp.zeros_like(rewards[:, 0])
    advantages, returns = losses.gae(rewards, values, gae_mask, bootstrap=bootstrap, discount=gamma, lam=lam)
    return {"advantages": losses.whiten(advantages, mask), "returns": returns}


def verl_advantage(x, config, name):
    mask = x["response_mask"] == 1
    if "index" not in x:
        return gae_and_whiten(x["token_level_rewards"], x["values"], mask, mask, config["gamma"], config["lam"])
    # Groups of unequal size: one row of rewards per prompt, NaN where there is no sample.
    rewards, groups = x["token_level_rewards"].sum(-1), x["index"]
    member = np.arange(groups.max() + 1)[:, None] == groups
    advantages = group_relative(np.where(member, rewards, np.nan), eps=config["epsilon"]).sum(0)
    per_token = jnp.where(mask & (member.sum(-1)[groups] > 1)[:, None], advantages[:, None], 0.0)
    return {"advantages": per_token, "returns": per_token}


# ---- PPO --------------------------------------------------------------------------------------------------------------


def ppo_classic(x, config, name):
    mask = x["mask"] == 1
    kind = name.split("/")[1]
    if kind == "masked_whiten":
        return {"whitened": whiten(x["x"], mask)}
    if kind.startswith("rewards"):
        return ppo_classic_rewards(x["scores"], x["logprobs"], x["ref_logprobs"], mask, config["kl_coef"])[kind]
    if kind.startswith("gae"):
        rewards, values = np.where(mask, x["token_rewards"], 0), np.where(mask, x["values"], 0)
        everywhere = np.ones_like(mask)  # it runs over gaps too, as if they were tokens of value and reward 0
        return gae_and_whiten(rewards, values, everywhere, mask, config["gamma"], config["lam"])
    pg, vf, gradients = ppo_classic_loss(x["logits"], x["vpreds"], x, mask, config)
    return {"pg_loss": pg, "vf_loss": vf, "grad_logits": gradients[0], "grad_vpreds": gradients[1]}


@jit
def ppo_classic_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    k1, k2 = (kl(logprobs, ref_logprobs, mask) for kl in (losses.kl.k1, losses.kl.k2))
    return {
        f"rewards-{name}": {
            "kls": kls,
            "non_score_reward": -kl_coef * kls,
            "rewards": losses.token_rewards(scores, kl_coef * kls, mask),
        }
        for name, kls in {"kl": k1, "abs": jnp.abs(k1), "mse": k2}.items()
    }


def ppo_classic_loss(logits, vpreds, x, mask, config):
    def loss(logits, vpreds):
        logprobs = losses.logits.token_logprob(logits, x["token_ids"])
        clip = config["cliprange"]
        pg = losses.clipped_surrogate(logprobs, x["old_logprobs"], x["adv"], mask, clip_low=clip, clip_high=clip)
        vf = losses.clipped_value_loss(vpreds, x["values"], x["ret"], mask, clip=config["cliprange_value"])
        weights = losses.weights.token_mean(mask)
        pg, vf = losses.weighted_sum(pg, weights), config["vf_coef"] * losses.weighted_sum(vf, weights)
        return pg + vf, (pg, vf)

    gradients, (pg, vf) = jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(logits, vpreds)
    return pg, vf, gradients


@jit
def ppo_experience(logprobs, ref_logprobs, values, scores, kept, paid, k3, whiten_rewards, kl_coef, gamma, lam):
    """`kept`: the response; `paid`: one column more, where the reference puts the score."""
    kl = jnp.where(k3, losses.kl.k3(logprobs, ref_logprobs, kept), losses.kl.k1(logprobs, ref_logprobs, kept))
    rewards = losses.token_rewards(scores, kl_coef * kl, paid)
    mean = losses.weighted_sum(rewards, losses.weights.token_mean(paid))  # the reference's whitening keeps the mean
    rewards = jnp.where(whiten_rewards & paid, losses.whiten(rewards, paid) + mean, rewards)
    bootstrap = jnp.zeros_like(scores)
    advantages, returns = losses.gae(rewards, values, paid, bootstrap=bootstrap, discount=gamma, lam=lam)
    return {"kl": kl, "rewards": rewards, "advantages": losses.whiten(advantages, kept), "returns": returns}


@jit
def ppo_update(logits, values, tokens, x, kept, paid, temperature, clip, value_clip, vf_coef):
    def loss(logits, values):
        logprobs = losses.logits.token_logprob(completion(logits, tokens) / temperature, tokens)
        pg = losses.clipped_surrogate(logprobs, x["logprobs"], x["advantages"], kept, clip_low=clip, clip_high=clip)
        new = values[:, -tokens.shape[1] - 1 : -1]
        vf = losses.clipped_value_loss(new, x["values"], x["returns"], paid, clip=value_clip)
        pg = losses.weighted_sum(pg, losses.weights.token_mean(kept))
        vf = losses.weighted_sum(vf, losses.weights.token_mean(paid))
        return pg + vf_coef * vf, (pg, vf)

    (total, (pg, vf)), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(logits, values)
    return {"loss": total, "pg_loss": pg, "vf_loss": vf, "grad_logits": gradients[0], "grad_values": gradients[1]}


def ppo(x, config, name):
    kept, paid = ~x["padding_mask"], ~x["padding_mask_p1"]
    # The reference pays after the last kept token, so the last column is paid even where nothing follows.
    experience = ppo_experience(
        x["logprobs"], x["ref_logprobs"], x["values"], x["scores"], kept, paid,
        config["kl_estimator"] == "k3", config["whiten_rewards"], config["kl_coef"], config["gamma"], config["lam"],
    )  # fmt: skip
    given = {"logprobs": x["logprobs"], "values": x["values"], **experience}
    update = ppo_update(
        x["logits"], x["new_values"], x["responses"], given, kept, paid,
        config["temperature"] + 1e-7, config["cliprange"], config["cliprange_value"], config["vf_coef"],
    )  # fmt: skip
    return experience | update


# ---- verl's parts -----------------------------------------------------------------------------------------------------


VERL_KL = {
    "k1": losses.kl.k1,
    "k2": losses.kl.k2,
    "k3": lambda *x: jnp.clip(losses.kl.k3(*x), -10, 10),  # as verl does
    "abs": lambda *x: jnp.abs(losses.kl.k1(*x)),
}
VERL_KL |= {"kl": VERL_KL["k1"], "mse": VERL_KL["k2"], "low_var_kl": VERL_KL["k3"]}


@functools.cache
def verl_kl(estimator):
    def loss(logprob, ref_logprob, weight, mask):
        penalty = estimator(logprob, ref_logprob, mask)
        return jnp.sum(penalty * weight), penalty

    return jit(jax.grad(loss, has_aux=True))


@functools.partial(value_and_gradient, name="loss_mat")
def verl_agg(loss_mat, *, weights):
    return losses.weighted_sum(loss_mat, weights)


@functools.partial(value_and_gradient, name="vpreds")
def verl_value(vpreds, *, values, returns, mask, weights, clip):
    return losses.weighted_sum(losses.clipped_value_loss(vpreds, values, returns, mask, clip=clip), weights)


@value_and_gradient
def verl_entropy(logits, *, weights):
    return losses.weighted_sum(losses.logits.entropy(logits), weights)


def verl_misc(x, config, name):
    part = name.split("/")[1].split("-")[0]
    if part == "kl":
        within = np.abs(x["logprob"] - x["ref_logprob"]) <= 20  # verl bounds the log-ratio of k3 alone
        gradient, penalty = verl_kl(VERL_KL[config["kl_penalty"]])(x["logprob"], x["ref_logprob"], x["weight"], within)
        return {"penalty": penalty, "grad_logprob": gradient}
    mask = x["mask"] == 1
    if part == "masked_whiten":
        return {"whitened": whiten(x["x"], mask)}
    weights = VERL_WEIGHTS[config["loss_agg_mode"]](mask)
    if part == "agg":
        return verl_agg(x["loss_mat"], weights=weights)
    if part == "entropy":
        return verl_entropy(x["logits"], weights=weights)
    old = {role: x[role] for role in ("values", "returns")}
    return verl_value(x["vpreds"], mask=mask, weights=weights, clip=config["cliprange_value"], **old)


# ---- the comparison ---------------------------------------------------------------------------------------------------

FAMILIES = {
    fn.__name__: fn
    for fn in (logprob, sft, reward, dpo, grpo, grpo_adv, ppo, ppo_classic, verl_advantage, verl_misc, verl_policy)
}


def counts(case, x):
    """Where the reference's per-token numbers are compared: elsewhere ours are 0 and theirs are anything."""
    family, kind = case["name"].split("/")
    if family == "ppo":
        kept, paid = ~x["padding_mask"], ~x["padding_mask_p1"]
        return {"returns": paid, "rewards": paid, "kl": kept, "advantages": kept}
    if family == "ppo_classic" and kind != "loss":
        return dict.fromkeys(("kls", "non_score_reward", "rewards", "advantages", "whitened"), x["mask"] == 1)
    if family == "verl_advantage":
        mask = x["response_mask"] == 1
        if "index" in x:  # a group of one: verl keeps its raw score, ours is 0
            mask &= (np.bincount(x["index"])[x["index"]] > 1)[:, None]
        return {"advantages": mask, "returns": mask}
    if case["name"] == "verl_misc/masked_whiten":
        return {"whitened": x["mask"] == 1}
    if family == "verl_misc" and kind.startswith("kl"):
        within = np.abs(x["logprob"] - x["ref_logprob"]) <= 20
        return {"penalty": within, "grad_logprob": within}
    return {}


# verl adds 1e-8 to the number of tokens that a sequence's sum is divided by.
TOLERANCE = {case["name"]: 2e-8 for case in CASES if case["config"].get("loss_agg_mode") == "seq-mean-token-mean"}
GIVEN = {
    "ppo": ("padding_mask", "padding_mask_p1", "logprobs", "ref_logprobs", "values", "scores")
}  # outputs that we start from


def test_every_family_is_run():
    assert {case["name"].split("/")[0] for case in CASES} == set(FAMILIES)
    assert len(BY_NAME) == len(CASES)


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("name", BY_NAME)
def test_golden(name, precision):
    case, family = BY_NAME[name], name.split("/")[0]
    data = arrays(case["file"])
    given = GIVEN.get(family, ())
    inputs = {role: data[key] for role, key in case["inputs"].items()}
    inputs |= {role: data[case["outputs"][role]] for role in given}
    expected = {role: data[key] for role, key in case["outputs"].items() if role not in given}
    cast = lambda x: x.astype(precision) if x.dtype == np.float64 else x
    inputs = {role: cast(x) for role, x in inputs.items()}
    with jax.enable_x64(precision == "float64"):
        got = jax.tree.map(np.asarray, FAMILIES[family](inputs, case["config"], name))
    tolerance = TOLERANCE.get(name, 1e-9) if precision == "float64" else max(1e-5, case["float32_deviation"])
    mask = counts(case, inputs)
    assert got.keys() == expected.keys()
    for role, want in expected.items():
        assert got[role].dtype == precision, role
        assert got[role].shape == want.shape, role
        ours, theirs = (np.where(mask.get(role, True), x, 0.0) for x in (got[role], want))
        error = np.abs(ours - theirs).max()
        assert error <= tolerance * np.abs(theirs).max(), (
            f"{role}: off by {error:.1e}, largest entry {np.abs(theirs).max():.1e}"
        )
