"""Distillation, and learning from logged data."""

import jax.numpy as jnp

from contracts.case import ROWS, Case, grouped, logit_array, masked, normal, token_ids
from rlhf import losses

both = lambda rng: {"logits": logit_array(rng), "teacher_logits": logit_array(rng)}
with_support = lambda rng: both(rng) | {"support": rng.random((logit_array(rng)).shape) < 0.6}
on_policy = masked("logprobs", "teacher_logprobs")


def divergence_case(**more):
    return Case(both, flow=("logits",), **more)


def out_of(knob, *values):
    return tuple(({knob: value}, knob) for value in values)


def supported(restrict):
    """Minus infinity, which stands for nothing, as 0; a support is never empty."""

    def finite(logits, teacher_logits, support):
        if support.shape == logits.shape:
            support = support | (jnp.arange(support.shape[-1]) == 0)[(None,) * (support.ndim - 1)]
        return tuple(
            jnp.where(jnp.isinf(x), 0.0, x) for x in restrict(logits, teacher_logits, support)
        )

    return finite


def followed(target, online, **knobs):
    return losses.offline.polyak({"w": target}, {"w": online}, **knobs)["w"]


CASES = {
    "distillation.forward_kl": divergence_case(),
    "distillation.reverse_kl": divergence_case(),
    "distillation.jsd": divergence_case(knobs={"beta": 0.3}, refuses=out_of("beta", -0.1, 1.1)),
    "distillation.skew_kl": divergence_case(knobs={"skew": 0.1}, refuses=out_of("skew", -0.1, 1.0)),
    "distillation.skew_reverse_kl": divergence_case(
        knobs={"skew": 0.1}, refuses=out_of("skew", -0.1, 1.0)
    ),
    "distillation.top_k": Case(
        lambda rng: {"logits": logit_array(rng)},
        static={"k": 3},
        refuses=(({"k": 0}, "k must be in"), ({"k": 8}, "V = 7")),
    ),
    "distillation.on_support": Case(
        with_support,
        flow=("logits", "teacher_logits"),
        fn=supported(losses.distillation.on_support),
    ),
    "distillation.with_tail": Case(
        with_support, flow=("logits", "teacher_logits"), fn=supported(losses.distillation.with_tail)
    ),
    "distillation.advantages": Case(on_policy),
    "distillation.minillm": Case(on_policy, knobs={"discount": 0.8}),
    "distillation.prefix_weights": Case(masked("advantages"), knobs={"gamma": 0.5}),
    "offline.td_targets": Case(masked("rewards", "values"), knobs={"discount": 0.9}),
    "offline.q_loss": Case(masked("q_values", "targets"), flow=("q_values",)),
    "offline.expectile_value_loss": Case(
        masked("values", "targets"),
        flow=("values",),
        knobs={"tau": 0.7},
        refuses=out_of("tau", 0.0, 1.0),
    ),
    "offline.cql": Case(
        lambda rng: {"logits": logit_array(rng), "tokens": token_ids(rng)}, flow=("logits",)
    ),
    "offline.awac": Case(
        masked("logprobs", "q_values", "values"), flow=("logprobs",), knobs={"beta": 0.5}
    ),
    "offline.polyak": Case(
        normal("target", "online"),
        knobs={"rate": 0.1},
        moves=True,
        fn=followed,
        refuses=out_of("rate", -0.1, 1.1),
    ),
    "offline.rft": Case(
        grouped("rewards"), knobs={"percentile": 0.7}, refuses=out_of("percentile", -0.1, 1.1)
    ),
    "offline.best_of_n": Case(grouped("rewards"), per="row"),
    "offline.optimal_value": Case(
        grouped("rewards"),
        knobs={"beta": 0.5},
        per="row",
        refuses=(({"beta": 0.0}, "beta must be above 0"),),
    ),
    "offline.a_star": Case(
        normal("logprobs", "ref_logprobs", "rewards", "values", shape=(ROWS,)),
        flow=("logprobs",),
        knobs={"beta": 0.3},
        per="row",
        refuses=(({"beta": 0.0}, "beta must be above 0"),),
    ),
}
