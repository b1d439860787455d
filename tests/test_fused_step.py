"""The composed GRPO step costs what the one by hand costs, and does the same."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import fused_step
from rlhf.models import TransformerConfig, transformer
from rlhf.planning import flops

SIZES = {"samples": 4, "new": 8}


@pytest.fixture(scope="module")
def both():
    """Jaxprs, compiled programs and results of either step."""
    lm = transformer(
        TransformerConfig(
            vocab_size=128, hidden_size=16, num_layers=2, num_heads=2, mlp_size=32, tied=True
        )
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
    arguments = fused_step.inputs(lm, 128, optimizer, (4, 4, 4, 8))
    # Rewards that differ within every group, and a policy that has moved on.
    arguments = (
        arguments[0],
        arguments[1]._replace(logprobs=arguments[1].logprobs - 0.3 * arguments[1].mask),
        jnp.arange(16.0) ** 2,
    )
    found = {}
    for name, make in (("composed", fused_step.composed), ("by hand", fused_step.by_hand)):
        traced = jax.jit(make(lm, optimizer, **SIZES)).trace(*arguments)
        compiled = traced.lower().compile()
        found[name] = traced.jaxpr, compiled, compiled(*arguments)
    return found


def test_both_do_the_same(both):
    (_, _, (state, metrics)), (_, _, (by_hand, its)) = both["composed"], both["by hand"]
    for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(by_hand.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], its["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["entropy"], its["entropy"], rtol=1e-5)
    assert metrics["clip_ratio/high_mean"] > 0


def test_at_the_same_cost(both):
    count = {name: flops.counted(jaxpr).work.flops for name, (jaxpr, _, _) in both.items()}
    assert count["by hand"] <= count["composed"] <= 1.05 * count["by hand"]
