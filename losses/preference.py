"""Preference objectives, per pair, from sequence log-probs (sums over a completion's tokens, in nats)."""

import jax
import jax.numpy as jnp

from rlhf.losses._common import Array, check_positive, check_shapes, widen


def sigmoid(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1) -> Array:
    """DPO, `-log σ(β [(log π_c - log ref_c) - (log π_r - log ref_r)])`  (arXiv:2305.18290, eq. 7).

    Args:
      chosen, rejected: `[...]` sequence log-probs under the policy; gradients flow through both.
      ref_chosen, ref_rejected: `[...]` the same under the reference; no gradient.
      beta: strength of the pull towards the reference, per nat.

    Returns: `[...]` loss; ln 2 where policy and reference agree.

    Raises: ValueError on unequal shapes or a beta not above 0.

    >>> lp = jnp.array([-7.0])
    >>> sigmoid(lp, lp, lp, lp).tolist()
    [0.6931]
    """
    check_positive(beta=beta)
    chosen_ratio, rejected_ratio = log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    return -jax.nn.log_sigmoid(beta * (chosen_ratio - rejected_ratio))


def aot(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1) -> Array:
    """Couples rows: DPO's loss on differences that are sorted over the batch  (AOT, arXiv:2406.05882, paired form).

    `-log σ(β d)` with `d = sort(log π_c - log π_r) - sort(log ref_c - log ref_r)`.  The whole mini-batch must be given
    at once: use `rlhf.coupled_train_step`.

    Args:
      chosen, rejected: `[N]` sequence log-probs under the policy; gradients flow through both.
      ref_chosen, ref_rejected: `[N]` the same under the reference; no gradient.
      beta: strength, per nat.

    Returns: `[N]` loss, in sorted order.

    Raises: ValueError on unequal shapes or a beta not above 0.

    >>> lp = jnp.array([-7.0, -3.0])
    >>> aot(lp, lp, lp, lp).tolist()
    [0.6931, 0.6931]
    """
    check_positive(beta=beta)
    check_shapes(rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected, chosen=chosen)
    policy = widen(chosen) - widen(rejected)
    reference = jax.lax.stop_gradient(widen(ref_chosen) - widen(ref_rejected))
    return -jax.nn.log_sigmoid(beta * (jnp.sort(policy) - jnp.sort(reference)))


def log_ratios(chosen, rejected, ref_chosen, ref_rejected) -> tuple[Array, Array]:
    """`(log π_c - log ref_c, log π_r - log ref_r)`, each `[...]` nats; β times these are DPO's implicit rewards."""
    check_shapes(rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected, chosen=chosen)
    ref_chosen, ref_rejected = jax.lax.stop_gradient((widen(ref_chosen), widen(ref_rejected)))
    return widen(chosen) - ref_chosen, widen(rejected) - ref_rejected
