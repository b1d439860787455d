"""What a language model is: a tuple of pure functions, as optax does it for optimizers.

Nothing in `rlhf.losses` or `rlhf.rollouts` knows more of a model than this page.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from rlhf.fields import documented

Params = Any
# A key of `inputs` and of `aux`: the experts that tokens go to, [B, T, sparse layers, k] int32.
EXPERTS = "experts"


@documented
class LM(NamedTuple):
    """A language model.  Two models built alike compare and hash equal, so that they share their
    compilations.

    Attributes:
      init: (key) -> params, plain arrays.
      axes: () -> pytree like params; a leaf is a tuple of logical axis names, or None.
      hidden: (params, tokens [B, T], *, positions, segment_ids, cache=None, inputs=None) -> ([B, T,
        D], cache, aux).  A mixture reports `aux[EXPERTS]`, and takes `inputs[EXPERTS]` in place of
        its routers' choice.
      unembed: (params, hidden [..., D]) -> logits [..., V], at least float32.
      init_cache: (batch, length) -> cache; batch on axis 0 of every leaf; a longer one begins as a
        shorter one.
      encode: encoder-decoders: (params, inputs) -> the encoded form of inputs.
      unstack: (params) -> params in the form that `hidden` with a cache reads fastest, again and
        again.
      shares: whether `hidden` takes `shared`, a `SharedPrefix`, and reads it once.
    """

    init: Callable
    axes: Callable
    hidden: Callable
    unembed: Callable
    init_cache: Callable
    encode: Callable | None = None
    unstack: Callable | None = None
    shares: bool = False


@documented
class Head(NamedTuple):
    """A value head, a reward head: numbers from hidden states.

    Attributes:
      init: (key) -> params.
      axes: () -> pytree like params.
      apply: (params, hidden [..., D]) -> [...], or [..., K] for K labels.
      reads: the token whose hidden state scores a text: "last", "first" (encoders), or "every" one
        by itself.
    """

    init: Callable
    axes: Callable
    apply: Callable
    reads: str = "last"
