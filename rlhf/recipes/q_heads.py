"""Q and V on a language model's hidden states: what ILQL trains, samples with, and writes beside the model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from rlhf import files, rollouts
from rlhf.fields import documented
from rlhf.lm import Bound, Head
from rlhf.models import mapping
from rlhf.models.heads import q_head
from rlhf.recipes import setup
from rlhf.recipes.online import Sampling
from rlhf.rollouts import Prompts, Rollout
from rlhf.rollouts.types import Array
from rlhf.train import TrainState

FILE = "heads.safetensors"


@documented
class Heads(NamedTuple):
    """Two Qs of every token, and V; parameters `{"q": …, "v": …}`, those of the Qs stacked, `[2, …]`.

    Attributes:
      q: two Qs of every token.
      v: V of every state.
    """

    q: Head
    v: Head

    def init(self, key: Array) -> dict[str, Any]:
        """Fresh parameters; `key` is consumed."""
        q_key, v_key = jax.random.split(key)
        return {"q": jax.vmap(self.q.init)(jax.random.split(q_key)), "v": self.v.init(v_key)}

    def both(self, q_params: Any, hidden: Array) -> Array:
        """Both Qs, `[..., D]` -> `[..., 2, V]`."""
        return jnp.moveaxis(jax.vmap(self.q.apply, (0, None))(q_params, hidden), 0, -2)


def heads_of(hidden_size: int, vocab_size: int) -> Heads:
    """Heads on hidden states `[..., hidden_size]`.

    >>> heads = heads_of(4, 96)
    >>> heads.both(heads.init(jax.random.key(0))["q"], jnp.ones((3, 4))).shape
    (3, 2, 96)
    """
    return Heads(q_head(hidden_size, vocab_size), q_head(hidden_size, 1))


def shift(heads: Heads, params: dict[str, Any], beta: float | Array) -> Partial:
    """`logits + β (min Q_target - V)`, a transform for `rollouts.sampler`  (ILQL, arXiv:2206.11871).

    Args:
      heads, params: of `load`, or a train state's; of the params `target` and `v` are read.
      beta: β, per deviation of the logged rewards; 0 is the model itself.  A temperature divides the sum.

    Returns: a transform of logits `[B, V]`; another β, or other parameters, compile nothing.
    """
    return Partial(Bound(_shift, (heads,)), params={name: params[name] for name in ("target", "v")}, beta=beta)


def player(policy: setup.Policy, heads: Heads, sampling: Sampling, eos_ids: tuple[int, ...], beta: float) -> Callable:
    """`(state, prompts, key) -> Rollout` of answers that lean to what is valued; `state` is ILQL's."""

    def sample(state: TrainState, prompts: Prompts, key) -> Rollout:
        temperature, filters = sampling.sampler()
        lean = shift(heads, state.params | state.context, beta)
        return rollouts.generate(
            policy.lm, policy.whole(state.params["lm"], state.context), prompts, key, max_new_tokens=sampling.max_new_tokens,
            num_samples=sampling.num_samples, eos_ids=eos_ids, sampler=rollouts.Sampler(temperature, (lean, *filters)),
        )  # fmt: skip

    return sample


def save(file: Path, params: dict[str, Any]) -> None:
    """Writes `{"q": …, "v": …, "target": …}` as a safetensors file, in the place of an earlier one."""
    from safetensors.numpy import save_file

    with files.replacing(file) as part:
        save_file({"/".join(path): np.ascontiguousarray(leaf) for path, leaf in mapping.flat(params).items()}, part)


def load(file: Path) -> tuple[Heads, dict[str, Any]]:
    """What `save` wrote, and the heads whose parameters they are.

    Raises: FileNotFoundError.
    """
    from safetensors.numpy import load_file

    params = mapping.nested({tuple(name.split("/")): jnp.asarray(leaf) for name, leaf in load_file(file).items()})
    return heads_of(params["q"]["inner"].shape[1], params["q"]["weight"].shape[-1]), params


def _shift(heads, logits, step, *, params, beta):
    advantages = heads.both(params["target"], step.hidden).min(-2) - heads.v.apply(params["v"], step.hidden)[:, None]
    return logits + (beta * advantages / step.temperature).astype(logits.dtype)
