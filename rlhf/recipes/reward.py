"""Reward modelling: Bradley–Terry on preference pairs, a head on the hidden state of the last token."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from rlhf import losses, rollouts
from rlhf.lm import LM, Head
from rlhf.rollouts import Batch, Pairs, Rollout


def prepare(pairs: Pairs, *, max_segments: int = 1) -> Pairs:
    """The optimizer mini-batch with weights: every pair the same, none for a place in a packed row that holds no pair."""
    rows = rollouts.pair_rows(pairs)
    trained = losses.segment_sum(rows.mask, rows.mask, rows.segment_ids, max_segments=max_segments) > 0
    valid = trained.reshape(pairs.tokens.shape[0], -1, 2).all(-1)
    return pairs._replace(weights=valid / jnp.maximum(valid.sum(), 1).astype(jnp.float32))


def scores(lm: LM, head: Head, params, batch: Batch | Rollout, *, max_segments: int = 1):
    """The reward of every sequence, `[B * max_segments]`; `params` is `{"lm": …, "head": …}`."""
    where: dict[str, Any] = dict(positions=batch.positions, segment_ids=batch.segment_ids, max_segments=max_segments)
    s = rollouts.score(lm, params["lm"], batch.tokens, heads={"reward": (head, params["head"])}, **where)
    return s.last_value["reward"]


def objective(lm: LM, head: Head, *, center_coef: float = 0.0, max_segments: int = 1) -> Callable:
    """The `loss_fn` of prepared `Pairs`; `params` is `{"lm": …, "head": …}`."""

    def loss_fn(params, context, pairs, key):
        r = scores(lm, head, params, rollouts.pair_rows(pairs), max_segments=max_segments)
        chosen, rejected = jnp.moveaxis(r.reshape(*pairs.weights.shape, 2), -1, 0)
        per_pair = losses.bradley_terry(chosen, rejected, center_coef=center_coef)
        metrics = {"accuracy": losses.weighted_sum(chosen > rejected, pairs.weights)}
        return losses.weighted_sum(per_pair, pairs.weights), metrics

    return loss_fn
