"""Advantages, returns and what makes them: groups, moments, controllers."""

import jax.numpy as jnp
import numpy as np

from contracts.case import ROWS, SAMPLES, Case, also, grouped, masked, normal, vector
from rlhf import losses

POSITIVE_ALPHA = ({"alpha": 0.0}, "alpha must be above 0")
LEVELS = ("group_mean", "leave_one_out_mean", "group_std", "batch_std", "leave_one_out_std")
some_zero = lambda rng: {"rewards": np.round(grouped("rewards")(rng)["rewards"])}
log_of_probabilities = ("logprobs", "log_sum_sq_probs")
baseline_inputs = lambda rng: {
    key: -abs(x) if key in log_of_probabilities else x
    for key, x in masked("rewards", "logprobs", "log_sum_sq_probs", "importance")(rng).items()
}
components = lambda rng: {
    **grouped("rewards", shape=(ROWS, SAMPLES, 3))(rng),
    "weights": rng.normal(size=3),
}


def moments(values, mask):
    state = losses.moments.running().update(losses.moments.running().init(), 2.0 + values, mask)
    return state.number, state.mean, jnp.where(state.number > 1, state.variance, 0.0)


def controlled(make, *more):
    """The coefficients after one update, by what was observed."""

    def update(observed, **knobs):
        controller = make(**knobs)
        state = controller.update(controller.init(), observed, *more)
        return state.coef * (1.0 + 0.0 * observed), state.pushed * (1.0 + 0.0 * observed)

    return update


CASES = {
    "advantages.gae": Case(
        also(masked("rewards", "values"), bootstrap=vector),
        knobs={"discount": 0.97, "lam": 0.9},
        per_sequence=("bootstrap",),
    ),
    "advantages.decoupled_gae": Case(
        also(masked("rewards", "values"), bootstrap=vector),
        knobs={"discount": 0.97, "policy_lam": 0.9, "value_lam": 0.95},
        per_sequence=("bootstrap",),
    ),
    "advantages.length_adaptive_lam": Case(
        masked(), knobs={"alpha": 0.3}, refuses=(POSITIVE_ALPHA,)
    ),
    "advantages.returns": Case(
        also(masked("rewards"), bootstrap=vector),
        knobs={"discount": 0.9},
        per_sequence=("bootstrap",),
    ),
    "advantages.remax": Case(
        also(masked("rewards"), greedy_scores=vector), per_sequence=("greedy_scores",)
    ),
    "advantages.token_rewards": Case(
        also(masked("penalties"), scores=vector), per_sequence=("scores",)
    ),
    "advantages.whiten": Case(masked("values"), knobs={"eps": 1e-8}, couples=True),
    "advantages.whiten_rewards": Case(masked("rewards"), knobs={"eps": 1e-8}, couples=True),
    "groups.group_relative": Case(grouped("rewards"), knobs={"eps": 1e-4}),
    "groups.dr_grpo": Case(grouped("rewards")),
    "groups.lite_ppo": Case(grouped("rewards"), knobs={"eps": 1e-4}, couples=True),
    "groups.rloo": Case(grouped("rewards")),
    "groups.leave_one_out": Case(grouped("rewards"), knobs={"eps": 1e-6}),
    "groups.max_rl": Case(grouped("rewards"), knobs={"eps": 1e-4}),
    **{f"groups.{name}": Case(grouped("rewards"), couples=name == "batch_std") for name in LEVELS},
    "groups.opo": Case(grouped("rewards", "lengths")),
    "groups.gpg": Case(some_zero, couples=True),
    "groups.pass_at_k": Case(grouped("rewards"), knobs={"eps": 1e-4}),
    "groups.weighted_rewards": Case(
        also(grouped("rewards"), weights=lambda rng: rng.normal(size=SAMPLES)),
        apart=("weights",),
        per="row",
    ),
    "groups.gdpo": Case(components, knobs={"eps": 1e-4}, couples=True, apart=("weights",)),
    "groups.optimal_token_baseline": Case(baseline_inputs, static={"num_samples": 2}, couples=True),
    "groups.split": Case(
        normal("values"),
        flow=("values",),
        static={"size": 2},
        couples=True,
        per="batch",
        moves=True,
    ),
    "groups.to_tokens": Case(
        also(masked(), advantages=vector),
        flow=("advantages",),
        apart=("advantages",),
        fn=lambda advantages, mask, segment_ids=None: losses.groups.to_tokens(
            advantages[:, None], mask, segment_ids
        ),
    ),
    "moments.running": Case(masked("values"), couples=True, per="batch", fn=moments),
    "controllers.fixed": Case(
        normal("observed", shape=(ROWS,)),
        knobs={"coef": 0.1},
        per="row",
        fn=controlled(losses.controllers.fixed),
    ),
    "controllers.adaptive_kl": Case(
        normal("observed", shape=(ROWS,)),
        knobs={"target": 0.5, "horizon": 100.0, "init_coef": 0.2},
        per="row",
        fn=controlled(losses.controllers.adaptive_kl, 8),
    ),
    "controllers.adaptive_entropy": Case(
        normal("observed", shape=(ROWS,)),
        knobs={"target": 0.5, "delta": 0.1, "min_coef": 0.0, "max_coef": 1.0, "init_coef": 0.3},
        per="row",
        fn=controlled(losses.controllers.adaptive_entropy),
    ),
}
