"""Coefficients that follow what a run shows: pairs `(init, update)` of pure functions over a state
of arrays.

The state belongs in `TrainState.context`; `update` is called once per optimizer step, and never
retraces.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf.fields import documented
from rlhf.losses._common import Array, check_positive


@documented
class CoefficientState(NamedTuple):
    """The current coefficient.

    Attributes:
      coef: [] float32, what the loss or the reward multiplies by.
      pushed: [] float32, what the next step pushes; entropy's is `coef` while the entropy is too
        low, and 0 otherwise.
    """

    coef: Array
    pushed: Array


@documented
class Controller(NamedTuple):
    """`init() -> state` and `update(state, observed) -> state`; no gradient flows through either.

    Attributes:
      init: () -> state.
      update: (state, observed) -> state.
    """

    init: Callable[[], CoefficientState]
    update: Callable[..., CoefficientState]


def fixed(coef) -> Controller:
    """`β ← β`: a coefficient that stays.

    Args:
      coef: β, a number or `[]`.

    Returns: a controller; `update(state, …)` takes anything and gives back the state, coefficients
    `[]` float32.

    >>> controller = fixed(0.1)
    >>> controller.update(controller.init(), 9.0).coef.item()
    0.1
    """
    # `*observed` lets it stand where any other controller does.
    return Controller(lambda: _state(coef, coef), lambda state, *observed: state)


def adaptive_kl(*, target=6.0, horizon=10_000, init_coef=0.2) -> Controller:
    """`β ← β (1 + clip(KL / target - 1, ±0.2) · n / horizon)`  (arXiv:1909.08593, §2.2; TRL's
    classic PPO, verl).

    Args:
      target: the KL to hold, nats a sequence.
      horizon: sequences in which a full error changes β by 20%.
      init_coef: β at the start.

    Returns: a controller; `update(state, kl, sequences)` takes the observed KL, a number or `[]`,
    and the number n of sequences it comes from; the state's coefficients are `[]` float32.

    Raises: ValueError where target, horizon or init_coef is not above 0.

    >>> controller = adaptive_kl(horizon=100)
    >>> controller.update(controller.init(), 9.0, 50).coef.item()
    0.22
    """
    check_positive(target=target, horizon=horizon, init_coef=init_coef)

    def update(state: CoefficientState, kl, sequences) -> CoefficientState:
        # The error is clipped, so that one odd batch cannot throw the coefficient far off.
        error = jnp.clip(jax.lax.stop_gradient(kl) / target - 1.0, -0.2, 0.2)
        coef = state.coef * (1.0 + error * sequences / horizon)
        return _state(coef, coef)

    return Controller(lambda: _state(init_coef, init_coef), update)


def adaptive_entropy(
    *, target=0.2, delta=0.005, min_coef=0.0, max_coef=1.0, init_coef=0.0
) -> Controller:
    """`α ← clip(α ± Δ, α_min, α_max)`, up while the entropy is at most the target, down above
    (Skywork-OR1, arXiv:2505.22312).

    The bonus is `state.pushed`: α where the last entropy was at most the target, and 0 otherwise
    and before the first update.

    Args:
      target: nats a token.
      delta: Δ, the change per step.
      min_coef, max_coef, init_coef: α's bounds, and α at the start.

    Returns: a controller; `update(state, entropy)` takes the mean entropy of the step, a number or
    `[]`; the state's coefficients are `[]` float32.

    Raises: ValueError where delta is not above 0.

    >>> controller = adaptive_entropy()
    >>> controller.update(controller.init(), 0.1).pushed.item()
    0.005
    """
    check_positive(delta=delta)

    def update(state: CoefficientState, entropy) -> CoefficientState:
        # The bonus is pushed only while the entropy is low; α goes on from where it was.
        low = entropy <= target
        coef = jnp.clip(state.coef + jnp.where(low, delta, -delta), min_coef, max_coef)
        return _state(coef, jnp.where(low, coef, 0.0))

    return Controller(lambda: _state(init_coef, 0.0), update)


def _state(coef, pushed) -> CoefficientState:
    # Arrays of one dtype from the start: Python numbers are weakly typed, and the second step would
    # be compiled again.
    return CoefficientState(jnp.asarray(coef, float), jnp.asarray(pushed, float))
