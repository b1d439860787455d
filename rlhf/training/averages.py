"""Parameters that follow the trained ones: averages over a run, which are often better than its
last step, and references.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf.fields import documented
from rlhf.losses.offline import polyak
from rlhf.ranges import Share, Steps, Strength, between, checked
from rlhf.train import TrainState, reference
from rlhf.training.options import TrainingOptions


@documented
class Average(NamedTuple):
    """An average in the making: `init(params) -> state`, `update(state, params) -> state`,
    `value(state, params) -> params`.

    Attributes:
      init: (params) -> state.
      update: (state, params) -> state, after a step.
      value: (state, params) -> the averaged parameters.
    """

    init: Callable
    update: Callable
    value: Callable


@checked
def ema(*, decay: Share = 0.99) -> Average:
    """`EMA ← decay · EMA + (1 - decay) θ`, from the first parameters on.

    Args:
      decay: in [0, 1]; an average over about `1 / (1 - decay)` steps.

    Raises: ValueError for a decay outside [0, 1].

    >>> average = ema(decay=0.75)
    >>> average.update(average.init(jnp.array(0.0)), jnp.array(1.0)).item()
    0.25
    """
    return Average(reference, partial(polyak, rate=1 - decay), lambda state, params: state)


@documented
class BemaState(NamedTuple):
    """What BEMA keeps.

    Attributes:
      updates: [] int32, how many.
      start: θ_0.
      ema: like params, the exponential moving average.
    """

    updates: jax.Array
    start: Any
    ema: Any


@checked
def bema(
    *,
    ema_power: Annotated[float, between(0, 100)] = 0.5,
    bias_power: Annotated[float, between(0, 100)] = 0.2,
    lag: Annotated[float, between(1, 1_000_000)] = 10.0,
    multiplier: Strength = 1.0,
) -> Average:
    """`α_t (θ_t - θ_0) + EMA_t` with `EMA_t = (1 - β_t) EMA_{t-1} + β_t θ_t`: an average without
    its lag  (arXiv:2508.00180).

    Args:
      ema_power: κ in `β_t = (ρ + γ t)^-κ`.
      bias_power: η in `α_t = (ρ + γ t)^-η`.
      lag: ρ, at least 1.
      multiplier: γ, above 0.

    Raises: ValueError for a lag below 1, a multiplier that is not above 0, or a power below 0.

    >>> average = bema(lag=3.0, ema_power=0.5, bias_power=0.5)
    >>> state = average.update(average.init(jnp.array(0.0)), jnp.array(1.0))
    >>> average.value(state, jnp.array(1.0)).item()  # 1/2 · 1 + 1/2
    1.0
    """
    # β_t and α_t fall with the same base `ρ + γ t`; ρ >= 1 keeps both at most 1 from the first step
    # on.
    falling = lambda updates, power: (lag + multiplier * updates.astype(jnp.float32)) ** -power

    def init(params):
        # Two copies: the state is donated at every update, and one buffer cannot be freed twice.
        return BemaState(jnp.zeros((), jnp.int32), reference(params), reference(params))

    def update(state, params):
        updates = state.updates + 1
        return BemaState(
            updates, state.start, polyak(state.ema, params, rate=falling(updates, ema_power))
        )

    def value(state, params):
        alpha = falling(state.updates, bias_power)
        # The averaged parameters keep their dtype: α is float32, and would raise bfloat16 ones.
        ahead = lambda theta, start, ema: (alpha * (theta - start) + ema).astype(ema.dtype)
        return jax.tree.map(ahead, params, state.start, state.ema)

    return Average(init, update, value)


# Functions of the options rather than averages: only the chosen one is made, and jitted.
AVERAGES: dict[str, Callable[[TrainingOptions], Average | None]] = {
    "none": lambda training: None,
    "ema": lambda training: _jitted(ema(decay=training.average_decay)),
    "bema": lambda training: _jitted(bema()),
}


def _jitted(average: Average) -> Average:
    """The same, its update in one program that takes the place of the average before."""
    return average._replace(update=jax.jit(average.update, donate_argnums=0))


@checked
def following(
    every: Steps,
    share: Annotated[float, between(0, 1, above=True)],
    *,
    name: str = "reference",
    of: Callable[[Any], Any] = lambda params: params,
) -> Callable[[int, TrainState], TrainState]:
    """A hook of `rlhf.training.loop.fit`: every so many steps the reference moves towards the
    policy.

    TR-DPO (arXiv:2404.09656): `θ_ref ← (1 - share) θ_ref + share θ`; a share of 1 copies the
    policy.

    Args:
      every: steps.
      share: in (0, 1].
      name: of the context's entry that moves.
      of: which of the parameters it moves towards.

    Raises: ValueError for less than one step, or a share outside (0, 1].
    """
    # The old reference is donated: a third copy of the model would not fit where two just do.
    move = jax.jit(partial(polyak, rate=share), donate_argnums=0)

    def hook(number: int, state: TrainState) -> TrainState:
        if number % every:
            return state
        moved = move(state.context[name], of(state.params))
        return state._replace(context=state.context | {name: moved})

    return hook
