"""Distillation: divergences between a student and a teacher, per position, and advantages from a
teacher's log-probs.

The divergences take logits `[..., V]` and treat each position by itself, so that `chunked` applies
them without `[B, T, V]`.  A temperature divides both logits first.  For a teacher of whom only the
likeliest tokens are known, restrict both to a support:

>>> student, teacher = jnp.array([[0., 1., 2., 3.]]), jnp.array([[3., 2., 1., 0.]])
>>> jsd(*with_tail(student, teacher, top_k(teacher, k=2))).shape
(1,)
"""

import jax
import jax.numpy as jnp

from rlhf.losses import kl, segments
from rlhf.losses._common import Array, check_shapes, clean, constant, widen
from rlhf.losses.advantages import returns
from rlhf.losses.ratios import token_log_ratio


def forward_kl(logits, teacher_logits) -> Array:
    """`KL(T ‖ S) = Σ_v T_v (log T_v - log S_v)`: the student covers what the teacher says  (Hinton
    et al., arXiv:1503.02531).

    Args:
      logits: `[..., V]` of the student; the only argument gradients flow through.
      teacher_logits: `[..., V]`; minus infinity is a probability of 0, which costs nothing.

    Returns: `[...]` nats, at least 0.

    Raises: ValueError on unequal shapes.

    >>> forward_kl(jnp.zeros((1, 2)), jnp.log(jnp.array([[0.25, 0.75]]))).tolist()
    [0.131]
    """
    check_shapes(teacher_logits=teacher_logits, logits=logits)
    return kl.full(jax.lax.stop_gradient(teacher_logits), logits)


def reverse_kl(logits, teacher_logits) -> Array:
    """`KL(S ‖ T) = Σ_v S_v (log S_v - log T_v)`: the student says what the teacher would  (MiniLLM,
    arXiv:2306.08543).

    The teacher must allow what the student allows.

    Args:
      logits: `[..., V]` of the student; the only argument gradients flow through.
      teacher_logits: `[..., V]`; minus infinity is a probability of 0.

    Returns: `[...]` nats, at least 0.

    Raises: ValueError on unequal shapes.

    >>> reverse_kl(jnp.zeros((1, 2)), jnp.log(jnp.array([[0.25, 0.75]]))).tolist()
    [0.144]
    """
    check_shapes(teacher_logits=teacher_logits, logits=logits)
    return kl.full(logits, jax.lax.stop_gradient(teacher_logits))


def jsd(logits, teacher_logits, *, beta=0.5) -> Array:
    """`β KL(T ‖ M) + (1 - β) KL(S ‖ M)`, `M = β T + (1 - β) S`  (generalised JSD: GKD,
    arXiv:2306.13649, eq. 1).

    Args:
      logits: `[..., V]` of the student; the only argument gradients flow through.
      teacher_logits: `[..., V]`; minus infinity is a probability of 0.
      beta: β in [0, 1]; at 0 it is `forward_kl`, at 1 `reverse_kl`, the limits of the divergence
        over β (1 - β).

    Returns: `[...]` nats, at least 0.

    Raises: ValueError on unequal shapes.

    >>> jsd(jnp.zeros((1, 2)), jnp.log(jnp.array([[0.25, 0.75]]))).tolist()
    [0.034]
    """
    if isinstance(beta, int | float) and not 0 <= beta <= 1:
        raise ValueError(f"beta is the teacher's share of the mixture, in [0, 1], but is {beta}")
    forward = forward_kl(logits, teacher_logits)
    reverse = reverse_kl(logits, teacher_logits)
    # At β = 0 and 1 the mixture would take log 0, and its NaN would reach the gradient even where
    # `jnp.where` does not choose it. There ½ stands in, and the limits are taken below.
    share = jnp.where((beta == 0) | (beta == 1), 0.5, beta)
    mixture = _mixture(logits, teacher_logits, share)
    between = share * kl.full(jax.lax.stop_gradient(teacher_logits), mixture) + (
        1 - share
    ) * kl.full(logits, mixture)
    return jnp.where(beta == 0, forward, jnp.where(beta == 1, reverse, between))


def skew_kl(logits, teacher_logits, *, skew=0.1) -> Array:
    """`KL(T ‖ α T + (1 - α) S)`: `forward_kl` with a bounded gradient  (DistiLLM, arXiv:2402.03898,
    eq. 4).

    Args:
      logits: `[..., V]` of the student; the only argument gradients flow through.
      teacher_logits: `[..., V]`; minus infinity is a probability of 0.
      skew: α in [0, 1).

    Returns: `[...]` nats, at least 0.

    Raises: ValueError on unequal shapes.

    >>> skew_kl(jnp.zeros((1, 2)), jnp.log(jnp.array([[0.25, 0.75]]))).tolist()
    [0.107]
    """
    _check_skew(skew)
    return kl.full(jax.lax.stop_gradient(teacher_logits), _mixture(logits, teacher_logits, skew))


def skew_reverse_kl(logits, teacher_logits, *, skew=0.1) -> Array:
    """`KL(S ‖ (1 - α) T + α S)`: `reverse_kl` with a bounded gradient  (DistiLLM,
    arXiv:2402.03898).

    Args:
      logits: `[..., V]` of the student; the only argument gradients flow through.
      teacher_logits: `[..., V]`; minus infinity is a probability of 0.
      skew: α in [0, 1).

    Returns: `[...]` nats, at least 0.

    Raises: ValueError on unequal shapes.

    >>> skew_reverse_kl(jnp.zeros((1, 2)), jnp.log(jnp.array([[0.25, 0.75]]))).tolist()
    [0.114]
    """
    _check_skew(skew)
    return kl.full(logits, _mixture(logits, teacher_logits, 1.0 - skew))


def top_k(logits, *, k: int) -> Array:
    """The support of the k largest logits.  `[..., V]` -> `[..., V]` bool; of equal ones the first
    counts; no gradient.

    Raises: ValueError where k is not in [1, V].

    >>> top_k(jnp.array([0., 3., 2.]), k=2).tolist()
    [False, True, True]
    """
    size = jnp.shape(logits)[-1]
    if not 1 <= k <= size:
        raise ValueError(f"k must be in [1, V] with V = {size}, but is {k}")
    # The second sort makes ranks of the order: exactly k are below k, even among equal logits.
    return jnp.argsort(jnp.argsort(-logits, axis=-1), axis=-1) < k


def on_support(logits, teacher_logits, support) -> tuple[Array, Array]:
    """Both distributions, renormalised on a support: what is outside has probability 0.

    Args:
      logits, teacher_logits: `[..., V]`; gradients flow through both.
      support: `[..., V]` bool, with at least one True; for example `top_k(teacher_logits, k=8)`, or
        two of them joined by `|`.

    Returns: log-probs of student and teacher, `[..., V]`, minus infinity outside; for the
    divergences above.

    Raises: ValueError on unequal shapes.

    >>> x, support = jnp.array([[0., 0., 0.]]), jnp.array([[True, True, False]])
    >>> on_support(x, x, support)[0].tolist()
    [[-0.693, -0.693, -inf]]
    """
    check_shapes(logits=logits, teacher_logits=teacher_logits, support=support)
    one = lambda x: jax.nn.log_softmax(jnp.where(support, widen(x), -jnp.inf), axis=-1)
    return one(logits), one(teacher_logits)


def with_tail(logits, teacher_logits, support) -> tuple[Array, Array]:
    """Both distributions on a support, and one bucket more for all that is outside.

    Args:
      logits, teacher_logits: `[..., V]`; gradients flow through both.
      support: `[..., V]` bool, with at least one True; for example `top_k(teacher_logits, k=8)`.

    Returns: log-probs of student and teacher, `[..., V + 1]`, the last the bucket's, which is at
    least 1e-7.

    Raises: ValueError on unequal shapes.

    >>> x, support = jnp.array([[0., 0., 0.]]), jnp.array([[True, True, False]])
    >>> with_tail(x, x, support)[0].tolist()
    [[-1.099, -1.099, -inf, -1.099]]
    """
    check_shapes(logits=logits, teacher_logits=teacher_logits, support=support)

    def one(x):
        # Normalised before the support is cut out: what is missing from 1 is the tail.
        inside = jnp.where(support, jax.nn.log_softmax(widen(x), axis=-1), -jnp.inf)
        # At most -1e-7: a support that holds all of the mass would leave log 0 for the tail.
        captured = jnp.minimum(jax.nn.logsumexp(inside, axis=-1, keepdims=True), -1e-7)
        # expm1 keeps the digits that 1 - exp(x) would lose near x = 0.
        return jnp.concatenate([inside, jnp.log(-jnp.expm1(captured))], axis=-1)

    return one(logits), one(teacher_logits)


def advantages(logprobs, teacher_logprobs, mask) -> Array:
    """`sg(log T - log S)` of sampled tokens: on-policy distillation as policy gradients  (MiniLLM,
    arXiv:2306.08543).

    With `policy.reinforce` its expected gradient on policy is `reverse_kl`'s.

    Args:
      logprobs: `[..., T]` log S of the tokens that the student sampled, in nats.
      teacher_logprobs: `[..., T]` the same tokens under the teacher.
      mask: `[..., T]` bool, True on sampled tokens.

    Returns: `[..., T]` nats, within ±20, 0 where `mask` is False.  No gradient.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> advantages(jnp.array([-1.0]), jnp.array([-0.5]), jnp.array([True])).tolist()
    [0.5]
    """
    check_shapes(logprobs=logprobs, teacher_logprobs=teacher_logprobs, mask=mask)
    return token_log_ratio(constant(teacher_logprobs, mask), logprobs, mask)


def minillm(logprobs, teacher_logprobs, mask, *, discount=0.0, segment_ids=None) -> Array:
    """`A_t = Σ_{u ≥ t} γ^(u-t) a_u / Σ_{u ≥ t} γ^(u-t)`, a the `advantages`: a mean of what follows
    (MiniLLM, arXiv:2306.08543).

    Args:
      logprobs: `[B, T]` log S of the tokens that the student sampled, in nats.
      teacher_logprobs: `[B, T]` the same tokens under the teacher.
      mask: `[B, T]` bool, True on sampled tokens.
      discount: γ, per trained token; 0 is `advantages`, 1 the plain mean.
      segment_ids: `[B, T]` int32 for packed rows.

    Returns: `[B, T]` nats, within ±20, 0 where `mask` is False.  No gradient.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> minillm(jnp.array([[-1.0, -1.0]]), jnp.array([[-0.5, -2.0]]), jnp.array([[True, True]]), discount=1.0).tolist()
    [[-0.25, -1.0]]
    """
    togo = lambda x: returns(x, mask, segment_ids=segment_ids, discount=discount)
    # The reward-to-go of ones is the sum of the weights γ^(u - t).
    return togo(advantages(logprobs, teacher_logprobs, mask)) / jnp.maximum(
        togo(jnp.ones(jnp.shape(mask))), 1.0
    )


def prefix_weights(advantages, mask, *, gamma=0.5, segment_ids=None) -> Array:
    """`1 + γ (1 - Σ_{u < t} |a_u| / Σ_u |a_u|)`: early tokens, which the rest depends on, weigh
    more  (IW-OPD, TRL).

    Args:
      advantages: `[B, T]`, usually this module's.
      mask: `[B, T]` bool, True on sampled tokens.
      gamma: γ, how much more the first token weighs.
      segment_ids: `[B, T]` int32 for packed rows.

    Returns: `[B, T]` factors of the advantages, 0 where `mask` is False.  No gradient.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> prefix_weights(jnp.array([[1.0, -3.0]]), jnp.array([[True, True]])).tolist()
    [[1.5, 1.375]]
    """
    check_shapes(advantages=advantages, mask=mask)
    size = jnp.abs(constant(advantages, mask))
    before = jnp.cumsum(size, axis=-1) - size
    # The cumulative sum runs over all of a packed row. Its value at the start of a sequence, the
    # smallest there, is taken off again.
    before += segments.largest(-before, mask, segment_ids)
    total = segments.total(size, mask, segment_ids)
    return clean(1.0 + gamma * (1.0 - before / jnp.maximum(total, 1e-8)), mask)


def _mixture(logits, teacher_logits, share) -> Array:
    """`log(share · T + (1 - share) · S)`, with the student's gradient."""
    check_shapes(teacher_logits=teacher_logits, logits=logits)
    # A floor, because the gradient of logaddexp is NaN where both are minus infinity.
    logprobs = lambda x: jnp.maximum(jax.nn.log_softmax(widen(x), axis=-1), -1e30)
    student = logprobs(logits)
    teacher = logprobs(jax.lax.stop_gradient(teacher_logits))
    return jnp.logaddexp(student + jnp.log1p(-share), teacher + jnp.log(share))


def _check_skew(skew) -> None:
    if isinstance(skew, int | float) and not 0 <= skew < 1:
        raise ValueError(
            f"skew is the first distribution's share of the mixture, in [0, 1), but is {skew}"
        )
