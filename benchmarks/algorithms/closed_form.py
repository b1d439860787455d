"""Algorithms with a KL to the reference, on a bandit whose best policy has a closed form.

The objective `E_π[r] - β KL(π ‖ π_ref)` has the optimum `π* = π_ref e^{r/β} / Z`.  Each algorithm
runs with its recipe's own update, on a policy whose logits are its parameters, and ends with the
total variation from π*, and from what theory says of its fixed point.

π(a) is the probability of an arm.  At a fixed point the expected gradient is 0 for each arm's
logit.  With a group's mean or a value as the baseline that of advantages A is
`π(a) (A(a) - E_π[A])`; that of the loss's `β KL(π ‖ π_ref)` is that of the reward
`-β log π/π_ref`; and that of `KL(π_ref ‖ π)` is `π(a) - π_ref(a)`.

- **KL in the reward** (RLOO, PPO).  The reward is `R = r - β log π/π_ref`, and the gradient is 0
  where R is the same for all arms: that is π*.  R has no variance there, so that the noise vanishes
  as well.
- **R divided by its deviation**.  PPO's whitening divides by that of the batch, the same for all
  arms.  In GRPO's groups the highest R has an advantage above 0 unless all are equal.  Either way π*
  is still the only fixed point.  But small differences are divided by their own deviation: the noise
  does not vanish, and the learning rate has to.
- **k3 in the loss** (GRPO, Dr. GRPO).  On policy `E_π[∇ k3] = E_π[(1 - π_ref/π) ∇ log π]`, which is
  `∇ KL(π_ref ‖ π)`.  From `π(a) (r(a) - E_π[r]) = β (π(a) - π_ref(a))` follows
  `π = β π_ref / (λ - r)`, where λ makes the sum 1: worse arms lose like 1/(λ - r), not like e^{r/β}.
- **Rewards divided by the group's deviation, the KL not** (GRPO).  In large groups that is σ(π), the
  deviation of r under π in this context: the coefficient is β σ(π), another one in each context.
- **k3 in the loss, with the gradient of the reverse KL**.  The expectation of `(π/π_old) k3`
  (`kl.bias_corrected`, TRL's `use_bias_correction_kl`) is KL(π ‖ π_ref) as a function of π, and
  `kl.straight_through` (verl's `k3+`) has the gradient `E_π[log(π/π_ref) ∇ log π]`, which is
  the same.  Dr. GRPO then ends at π*, GRPO where `π = π_ref e^{r / (β σ(π))} / Z`.
- **A group's mean that has the sample itself in it**.  Of G samples, the gradient of the reward is
  1 - 1/G times what it is with a leave-one-out mean.  A KL in the loss is not, so that its
  coefficient is β G / (G - 1).
- **Online DPO**.  Where completion 1 is preferred with probability `sigmoid(r_1 - r_2)`, the expected
  loss is a cross-entropy, least where `β (log π/π_ref (1) - log π/π_ref (2)) = r_1 - r_2`: that is π*,
  whatever policy samples the pairs.  Where the better one is always preferred the loss falls without
  end, and π ends on the best arm.

All this is of one optimizer step a rollout: ratios are 1, and nothing is clipped.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.algorithms.runs import sample, trunk
from rlhf import losses, rollouts, tasks
from rlhf.lm import LM
from rlhf.losses import kl, presets
from rlhf.models import scalar_head
from rlhf.recipes import grpo, online_dpo, ppo, rloo
from rlhf.tasks import bandit
from rlhf.tasks.characters import LETTERS, VOCABULARY
from rlhf.train import init_state, reference, train_step
from rlhf.training.policy import Policy

Array = jax.Array
LEVEL = 1  # of the task
BISECTIONS = 60
ITERATIONS = 200


class Setting(NamedTuple):
    """Of a run.

    Attributes:
      beta: coefficient of the KL, in units of reward per nat.
      learning_rate: at the start; a cosine takes it to 0.
      steps: of the optimizer, each on new completions.
      prompts: of a step.
      samples: completions of a prompt.
      evaluations: evenly spread, after the one at the start.
    """

    beta: float = 0.2
    learning_rate: float = 0.05
    steps: int = 400
    prompts: int = 16
    samples: int = 64
    evaluations: int = 10


class Algorithm(NamedTuple):
    """A recipe's update with a KL to the reference, and what it should end with.

    Attributes:
      kl: the estimator, and where it is.
      make_update: (policy, optimizer, setting) -> `update(state, rollout, rewards, key)`.
      optimum: (reference's log-probs [C, V], rewards [C, V], setting) -> [C, V], the log-probs of
        its fixed point.
      theory: "exact", or why its fixed point is not the closed form.
      rewards: (scores [B], rollout, ref_logprobs [B, T], setting, key) -> [B], of the update.
      critic: whether the policy has a value head.
      setting: of its runs.
    """

    kl: str
    make_update: Callable
    optimum: Callable
    theory: str
    rewards: Callable = lambda scores, rollout, ref_logprobs, setting, key: scores
    critic: bool = False
    setting: Setting = Setting()


# ---- fixed points ------------------------------------------------------------------------------


def closed_form(logprobs: Array, rewards: Array, setting: Setting) -> Array:
    """`log π*`: the optimum of the objective with the reverse KL."""
    return bandit.optimum(logprobs, rewards, setting.beta)


def forward_kl_optimum(logprobs: Array, rewards: Array, beta: Array | float) -> Array:
    """`log π` with `π = β π_ref / (λ - r)`: the optimum of `E[r] - β KL(π_ref ‖ π)`.

    Args:
      logprobs: `[..., V]` of the reference, in nats.
      rewards: `[..., V]`.
      beta: above 0; a number, or `[..., 1]`.

    Returns: `[..., V]` nats.

    >>> half = jnp.log(jnp.array([0.5, 0.5]))
    >>> jnp.exp(forward_kl_optimum(half, jnp.array([0.0, 1.0]), 0.5)).round(3).tolist()
    [0.191, 0.809]
    """
    top = rewards.max(axis=-1, keepdims=True)
    gap = top - rewards  # λ = top + x: x is found, which near 0 has more digits than λ

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        total = (beta * jnp.exp(logprobs) / (middle + gap)).sum(axis=-1, keepdims=True)
        # The sum falls with x.
        low = jnp.where(total > 1, middle, low)
        high = jnp.where(total > 1, high, middle)
        return low, high

    # At x = β no term is above π_ref, and the sum is at most 1.
    bounds = jnp.zeros_like(top), jnp.broadcast_to(jnp.asarray(beta, top.dtype), top.shape)
    low, high = jax.lax.fori_loop(0, BISECTIONS, halve, bounds)
    return jax.nn.log_softmax(logprobs - jnp.log((low + high) / 2 + gap), axis=-1)


def scaled_optimum(optimum: Callable, logprobs: Array, rewards: Array, beta: float) -> Array:
    """`log π` with `π = optimum(π_ref, r, β σ)`, where σ is the deviation of r under π itself.

    The iteration starts from the reference, as training does.

    Args:
      optimum: (logprobs, rewards, coefficient `[..., 1]`) -> log-probs.
      logprobs: `[..., V]` of the reference, in nats.
      rewards: `[..., V]`.
      beta: coefficient where σ is 1.
    """

    def closer(_, policy):
        return optimum(logprobs, rewards, beta * deviation(policy, rewards))

    return jax.lax.fori_loop(0, ITERATIONS, closer, logprobs)


def deviation(logprobs: Array, rewards: Array) -> Array:
    """`[..., 1]`: the standard deviation of rewards under a policy."""
    policy = jnp.exp(logprobs)
    mean = (policy * rewards).sum(axis=-1, keepdims=True)
    return jnp.sqrt((policy * (rewards - mean) ** 2).sum(axis=-1, keepdims=True))


def _of_loss(optimum, logprobs, rewards, setting):
    """With the KL in the loss and rewards less their group's mean."""
    return optimum(logprobs, rewards, _in_loss(setting))


def _of_scaled_loss(optimum, logprobs, rewards, setting):
    """The same, rewards divided by their group's deviation."""
    return scaled_optimum(optimum, logprobs, rewards, _in_loss(setting))


def _in_loss(setting):
    return setting.beta * setting.samples / (setting.samples - 1)


def _best_arm(logprobs, rewards, setting):
    return jnp.where(rewards == rewards.max(axis=-1, keepdims=True), 0.0, -jnp.inf)


# ---- rewards -----------------------------------------------------------------------------------


def _less_kl(scores, rollout, ref_logprobs, setting, key):
    """Scores less β k1."""
    penalties = kl.k1(rollout.logprobs, ref_logprobs, rollout.mask).sum(axis=1)
    return scores - setting.beta * penalties


def _labels(scores, rollout, ref_logprobs, setting, key):
    """1 for the preferred one of a pair and 0 for the other: sampled from Bradley-Terry's model."""
    first, second = scores.reshape(-1, 2).T
    is_first = jax.random.bernoulli(key, jax.nn.sigmoid(first - second))
    return jnp.stack([is_first, ~is_first], axis=1).astype(jnp.float32).reshape(-1)


# ---- updates -----------------------------------------------------------------------------------


def _rloo(policy, optimizer, setting):
    return rloo.make_update(policy, optimizer, num_samples=setting.samples, kl_coef=setting.beta)


def _ppo(policy, optimizer, setting, *, whiten_rewards=False):
    # The value head reads the logits: the value loss moves the policy too, until values are right.
    return ppo.make_update(
        policy, optimizer, kl_coef=setting.beta, epochs=1, whiten_rewards=whiten_rewards
    )


def _grpo(policy, optimizer, setting, *, algorithm):
    return grpo.make_update(
        policy,
        optimizer,
        num_samples=setting.samples,
        algorithm=algorithm,
        kl_coef=setting.beta,
    )


def _grpo_without_kl(policy, optimizer, setting):
    """Its rewards have the KL in them."""
    return grpo.make_update(policy, optimizer, num_samples=setting.samples)


def _grpo_with_estimator(policy, optimizer, setting, *, algorithm, estimator):
    """GRPO with another estimator in the loss, which the recipe has no option for: a user's loss,
    of the library's parts.
    """

    def loss_fn(params, context, batch, key):
        scored = policy.score(params, context, batch, key=key)
        per_token = algorithm.loss(
            scored.logprobs, batch.old_logprobs, batch.advantages, batch.mask
        )
        per_token += setting.beta * estimator(scored.logprobs, batch)
        return losses.weighted_sum(per_token, batch.weights), {}

    step = train_step(loss_fn, optimizer)

    def update(state, rollout, rewards, key):
        batch = rollouts.batch_of(
            rollout,
            advantages=algorithm.advantages(rewards.reshape(-1, setting.samples), rollout.mask),
            ref_logprobs=policy.reference_logprobs(state.context, rollout),
        )
        return step(state, batch._replace(weights=algorithm.weights(batch.mask)))

    return update


def _bias_corrected(logprobs, batch):
    return kl.bias_corrected(logprobs, batch.ref_logprobs, batch.old_logprobs, batch.mask)


def _straight_through(logprobs, batch):
    return kl.straight_through(logprobs, batch.ref_logprobs, batch.mask)


def _online_dpo(policy, optimizer, setting):
    return online_dpo.make_update(policy, optimizer, num_samples=2, beta=setting.beta)


GRPO = presets.grpo()
DR_GRPO = presets.dr_grpo(length=1)
# Rewards of deviation 1 weigh more against the KL than these, of deviation 0.2 to 0.4.
SCALED = Setting(beta=1.0)
# A label says little where rewards are close: of pairs there have to be many.
PAIRS = Setting(beta=0.5, learning_rate=0.02, steps=2000, prompts=1024, samples=2)
IN_REWARD = "k1 in the reward"
ALGORITHMS = {
    "RLOO": Algorithm(IN_REWARD, _rloo, closed_form, "exact"),
    "PPO": Algorithm(IN_REWARD, _ppo, closed_form, "exact", critic=True),
    "PPO, rewards whitened": Algorithm(
        IN_REWARD, partial(_ppo, whiten_rewards=True), closed_form, "exact", critic=True
    ),
    "GRPO, KL in the reward": Algorithm(
        IN_REWARD, _grpo_without_kl, closed_form, "exact", rewards=_less_kl
    ),
    "GRPO": Algorithm(
        "k3 in the loss",
        partial(_grpo, algorithm=GRPO),
        partial(_of_scaled_loss, forward_kl_optimum),
        "k3 has the forward KL's gradient, and the KL is not divided by the rewards' deviation",
        setting=SCALED,
    ),
    "Dr. GRPO": Algorithm(
        "k3 in the loss",
        partial(_grpo, algorithm=DR_GRPO),
        partial(_of_loss, forward_kl_optimum),
        "k3 has the forward KL's gradient",
    ),
    "GRPO, bias-corrected KL": Algorithm(
        "k3 in the loss, times the ratio",
        partial(_grpo_with_estimator, algorithm=GRPO, estimator=_bias_corrected),
        partial(_of_scaled_loss, bandit.optimum),
        "the KL is not divided by the rewards' deviation",
        setting=SCALED._replace(beta=2.0),
    ),
    "Dr. GRPO, bias-corrected KL": Algorithm(
        "k3 in the loss, times the ratio",
        partial(_grpo_with_estimator, algorithm=DR_GRPO, estimator=_bias_corrected),
        partial(_of_loss, bandit.optimum),
        "exact, of β G / (G - 1)",
    ),
    "Dr. GRPO, straight-through KL": Algorithm(
        "k3 in the loss, with k2's gradient",
        partial(_grpo_with_estimator, algorithm=DR_GRPO, estimator=_straight_through),
        partial(_of_loss, bandit.optimum),
        "exact, of β G / (G - 1)",
    ),
    "online DPO, labels sampled": Algorithm(
        "β of the loss", _online_dpo, closed_form, "exact", rewards=_labels, setting=PAIRS
    ),
    "online DPO": Algorithm(
        "β of the loss",
        _online_dpo,
        _best_arm,
        "the better one is always preferred: no finite optimum",
        setting=PAIRS._replace(learning_rate=0.05, steps=400),
    ),
}


# ---- runs --------------------------------------------------------------------------------------


def bigrams() -> LM:
    """A policy whose logits are its parameters: `[V, V]`, of the next token after each last one."""
    size = len(VOCABULARY)

    def hidden(params, tokens, *, positions, segment_ids, cache=None, inputs=None):
        return params["logits"][tokens], cache, {}

    return LM(
        init=lambda key: {"logits": jax.random.normal(key, (size, size))},
        axes=lambda: {"logits": ("vocab", None)},
        hidden=hidden,
        unembed=lambda params, hidden: hidden,
        init_cache=lambda batch, length: jnp.zeros(batch),
    )


def arm_logprobs(params: Any) -> Array:
    """`[C, V]`: of every token as the completion in every context, of `bigrams`' parameters."""
    letters = LETTERS.start + jnp.arange(len(bandit.rewards(LEVEL)))
    return jax.nn.log_softmax(params["logits"][letters], axis=-1)


def total_variation(logprobs: Array, other: Array) -> Array:
    """`½ Σ |π - π'|` of policies `[..., V]`, the mean over contexts: in [0, 1].

    >>> total_variation(jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.25, 0.75]]))).item()
    0.25
    """
    return jnp.abs(jnp.exp(logprobs) - jnp.exp(other)).sum(axis=-1).mean() / 2


def make_run(algorithm: Algorithm) -> Callable:
    """`run(key) -> curves`, pure: a run from random logits, which are the reference too.

    Args:
      algorithm: that learns.

    Returns: a function whose curves are arrays `[evaluations + 1]` of total variations, from the
    policy `to_closed_form` and `to_its_optimum`, the fixed point of the algorithm.
    """
    setting = algorithm.setting
    lm = bigrams()
    head = scalar_head(len(VOCABULARY)) if algorithm.critic else None
    policy = Policy(lm, head)
    task = tasks.find(f"task:bandit:{LEVEL}")
    schedule = optax.cosine_decay_schedule(setting.learning_rate, setting.steps)
    optimizer = optax.adam(schedule)
    update = algorithm.make_update(policy, optimizer, setting)
    rewards = jnp.asarray(bandit.rewards(LEVEL))
    every = setting.steps // setting.evaluations

    def step(state, key):
        prompt_key, sample_key, reward_key, update_key = jax.random.split(key, 4)
        prompts = task.prompts(prompt_key, setting.prompts)
        # Every token is an arm, the end token too.
        params = trunk(state.params)
        rollout = sample(task, lm, params, prompts, sample_key, num_samples=setting.samples)
        ref_logprobs = policy.reference_logprobs(state.context, rollout)
        scores = task.score(rollout)
        given = algorithm.rewards(scores, rollout, ref_logprobs, setting, reward_key)
        return update(state, rollout, given, update_key)[0], None

    def run(key):
        start_key, head_key, state_key, run_key = jax.random.split(key, 4)
        start = lm.init(start_key)
        params = {"lm": start, "head": head.init(head_key)} if head else start
        state = init_state(params, optimizer, state_key, {"reference": reference(start)})
        ref_logprobs = arm_logprobs(start)
        targets = {
            "to_closed_form": closed_form(ref_logprobs, rewards, setting),
            "to_its_optimum": algorithm.optimum(ref_logprobs, rewards, setting),
        }

        def evaluated(state):
            found = arm_logprobs(trunk(state.params))
            return {name: total_variation(found, best) for name, best in targets.items()}

        def part(state, keys):
            """The steps up to the next evaluation."""
            state, _ = jax.lax.scan(step, state, keys)
            return state, evaluated(state)

        keys = jax.random.split(run_key, (setting.evaluations, every))
        _, curves = jax.lax.scan(part, state, keys)
        return jax.tree.map(
            lambda first, rest: jnp.concatenate([first[None], rest]), evaluated(state), curves
        )

    return run


def distance(algorithm: Algorithm, *, seeds: int = 8) -> dict[str, np.ndarray]:
    """Curves `[seeds, evaluations + 1]` of `make_run`, all seeds in one program."""
    run = jax.jit(jax.vmap(make_run(algorithm)))
    return jax.tree.map(np.asarray, run(jax.random.split(jax.random.key(0), seeds)))


def line(name: str, *, seeds: int = 8) -> dict[str, str | float]:
    """Of an algorithm, by its name: total variations at the start and the end, and what theory says.

    Args:
      name: in `ALGORITHMS`.
      seeds: runs, with a reference each.
    """
    algorithm = ALGORITHMS[name]
    curves = distance(algorithm, seeds=seeds)
    to_closed_form = curves["to_closed_form"][:, -1]
    to_its_optimum = curves["to_its_optimum"][:, -1]
    return {
        "algorithm": name,
        "KL": algorithm.kl,
        "β": algorithm.setting.beta,
        "at the start": float(curves["to_closed_form"][:, 0].mean()),
        "to the closed form": float(to_closed_form.mean()),
        "to the closed form, at most": float(to_closed_form.max()),
        "to its own optimum": float(to_its_optimum.mean()),
        "to its own optimum, at most": float(to_its_optimum.max()),
        "theory": algorithm.theory,
    }
