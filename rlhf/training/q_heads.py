"""Q and V on a language model's hidden states: what ILQL trains, samples with, and writes beside
the model.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from rlhf import files, hosts, rollouts
from rlhf.bound import Bound
from rlhf.fields import documented
from rlhf.lm import Head
from rlhf.models import mapping
from rlhf.models.heads import q_head
from rlhf.rollouts import Prompts, Rollout
from rlhf.rollouts.types import Array
from rlhf.train import TrainState
from rlhf.training.loading import Loaded
from rlhf.training.options import GroupSamplingOptions
from rlhf.training.sampling import StopCriteria

FILE = "heads.safetensors"


@documented
class Heads(NamedTuple):
    """Two Qs of every token, and V; parameters `{"q": …, "v": …}`, those of the Qs stacked,
    `[2, …]`.

    Attributes:
      q: two Qs of every token.
      v: V of every state.
    """

    q: Head
    v: Head

    def init(self, key: Array) -> dict[str, Any]:
        """Fresh parameters; `key` is consumed."""
        # Two Qs of different keys: their minimum undoes the optimism of a maximum over noisy
        # values.
        q_key, v_key = jax.random.split(key)
        return {"q": jax.vmap(self.q.init)(jax.random.split(q_key)), "v": self.v.init(v_key)}

    def axes(self) -> dict[str, Any]:
        """Logical axes of the parameters."""
        q_axes = jax.tree.map(
            lambda names: (None, *names), self.q.axes(), is_leaf=lambda x: isinstance(x, tuple)
        )
        return {"q": q_axes, "v": self.v.axes()}

    def both(self, q_params: Any, hidden: Array) -> Array:
        """Both Qs, `[..., D]` -> `[..., 2, V]`."""
        # The Qs are stacked on axis 0, and stand beside V's place in the result: `[2, …, V]` ->
        # `[…, 2, V]`.
        return jnp.moveaxis(jax.vmap(self.q.apply, (0, None))(q_params, hidden), 0, -2)


def heads_of(hidden_size: int, vocab_size: int) -> Heads:
    """Heads on hidden states `[..., hidden_size]`.

    >>> heads = heads_of(4, 96)
    >>> heads.both(heads.init(jax.random.key(0))["q"], jnp.ones((3, 4))).shape
    (3, 2, 96)
    """
    return Heads(q_head(hidden_size, vocab_size), q_head(hidden_size, 1))


def shift(heads: Heads, params: dict[str, Any], beta: float | Array) -> Partial:
    """`logits + β (min Q_target - V)`, a transform for `rollouts.sampler`  (ILQL,
    arXiv:2206.11871).

    Args:
      heads, params: of `load`, or a train state's; of the params `target` and `v` are read.
      beta: β, per deviation of the logged rewards; 0 is the model itself.  A temperature divides
        the sum.

    Returns: a transform of logits `[B, V]`; another β, or other parameters, compile nothing.
    """
    # A pytree whose function compares equal: generation is jitted with the transforms as arguments.
    return Partial(
        Bound(_shift, (heads,)), params={name: params[name] for name in ("target", "v")}, beta=beta
    )


def make_sampler(
    loaded: Loaded, heads: Heads, sampling: GroupSamplingOptions, stop: StopCriteria, beta: float
) -> Callable:
    """`(state, prompts, key) -> Rollout` of completions that lean to what is valued; `state` is
    ILQL's.
    """

    def sample(state: TrainState, prompts: Prompts, key) -> Rollout:
        temperature, filters = sampling.sampler(stop.eos_ids)
        lean = shift(heads, state.params | state.context, beta)
        params = loaded.policy.full_params(state.params["lm"], state.context)
        return rollouts.generate(
            loaded.lm,
            params,
            prompts,
            key,
            max_new_tokens=sampling.max_new_tokens,
            num_samples=sampling.num_samples,
            eos_ids=stop.eos_ids,
            stop=stop.strings,
            # The shift comes first: filters choose among the shifted logits.
            sampler=rollouts.Sampler(temperature, (lean, *filters)),
        )

    return sample


def save(file: Path, params: dict[str, Any]) -> None:
    """Writes `{"q": …, "v": …, "target": …}` as a safetensors file, in the place of an earlier
    one.
    """
    from safetensors.numpy import save_file

    tensors = {
        "/".join(path): np.ascontiguousarray(leaf)
        for path, leaf in mapping.flat(hosts.fetch(params)).items()
    }

    def write() -> None:
        with files.replacing(file) as part:
            save_file(tensors, part)

    hosts.of_first(write)


def load(file: Path) -> tuple[Heads, dict[str, Any]]:
    """What `save` wrote, and the heads whose parameters they are.

    Raises: FileNotFoundError.
    """
    from safetensors.numpy import load_file

    params = mapping.nested(
        {tuple(name.split("/")): jnp.asarray(leaf) for name, leaf in load_file(file).items()}
    )
    # Sizes are read off the arrays: the file holds no config.  Axis 0 is that of the two Qs.
    return heads_of(params["q"]["inner"].shape[1], params["q"]["weight"].shape[-1]), params


def _shift(heads, logits, step, *, params, beta):
    advantages = (
        heads.both(params["target"], step.hidden).min(-2)
        - heads.v.apply(params["v"], step.hidden)[:, None]
    )
    # Transforms get logits that are divided by the temperature already; the shift is divided too.
    return logits + (beta * advantages / step.temperature).astype(logits.dtype)
