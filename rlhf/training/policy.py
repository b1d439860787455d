"""What is trained, as static facts: a language model, with a head or without, all its parameters or
adapters on them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from rlhf import adapters, rollouts
from rlhf.fields import documented
from rlhf.lm import LM, Head, Params
from rlhf.rollouts import Batch, Rollout, Scored
from rlhf.shared_prefix import SharedPrefix

HEAD = "head"  # name of the head's values in what `score` returns


@documented
class Policy(NamedTuple):
    """A model in training.  It holds no arrays, so that whatever is made of it compiles once.

    The trained parameters are `state.params`, all others lie in `state.context`: under "frozen"
    those that adapters sit on, under "reference" those of a reference model.

    Attributes:
      lm: the language model.
      head: of a critic or a reward model, whose params are `{"lm": …, "head": …}`; None: there is
        none.
      has_adapters: whether adapters on the language model are trained instead of itself.
      dropout: share of adapters' inputs that is dropped where a key is given.

    >>> from rlhf.models import TransformerConfig, transformer
    >>> lm = transformer(TransformerConfig(vocab_size=8, hidden_size=4, num_layers=1, num_heads=1, mlp_size=8))
    >>> params = lm.init(jax.random.key(0))
    >>> Policy(lm).full_params(params, {}) is params
    True
    """

    lm: LM
    head: Head | None = None
    has_adapters: bool = False
    dropout: float = 0.0

    def full_params(self, params: Params, context: Any, key: Any = None) -> Params:
        """Trainable and frozen parameters together, in the form that the model and its head take.

        Args:
          params: the trainable ones.
          context: of the train state.
          key: of the adapters' dropout; None: nothing is dropped, as in sampling and evaluations.
        """
        # Without adapters everything is trained, and there is nothing to join.
        if not self.has_adapters:
            return params
        lm_params = adapters.join(params if self.head is None else params["lm"], context["frozen"])
        if self.dropout and key is not None:
            lm_params = adapters.dropout(lm_params, key, self.dropout)
        return lm_params if self.head is None else params | {"lm": lm_params}

    def lm_params(self, params: Params, context: Any) -> Params:
        """The same of the language model alone."""
        full = self.full_params(params, context)
        return full if self.head is None else full["lm"]

    def reference_params(self, context: Any) -> Params:
        """The reference model's: those in the context, or under adapters the model without them."""
        # With adapters switched off the base is the model as it was: no second copy is needed.
        return context["reference"] if "reference" in context else adapters.off(context["frozen"])

    def score(
        self,
        params: Params,
        context: Any,
        batch: Batch | Rollout,
        *,
        shared: SharedPrefix | None = None,
        key: Any = None,
    ) -> Scored:
        """Log-probs and entropy of a batch's tokens at its temperature, with a head its values too,
        in one pass.

        Args:
          params: the trained ones; gradients flow to them.
          context: of the train state.
          batch: `[B, T]`.
          shared: what rows have in common, read once.
          key: of the adapters' dropout; None: nothing is dropped.

        Returns: `Scored`, with the head's values under "head".
        """
        lm_params, heads = self._parts(params, context, key)
        return rollouts.score_batch(self.lm, lm_params, batch, heads=heads, shared=shared)

    def score_loss(
        self,
        params: Params,
        context: Any,
        batch: Batch,
        fn: Callable,
        *,
        shared: SharedPrefix | None = None,
        key: Any = None,
    ) -> tuple[jax.Array, Scored]:
        """`rollouts.score_loss` of the policy: `Σ w fn(logprobs, entropy, batch)`, and what `score`
        says, in one pass; gradients flow through the loss and the head's values.

        Args:
          params, context, shared, key: as in `score`.
          batch: `[B, T]` with weights.
          fn: `(logprobs [B, C], entropy [B, C], batch) -> [B, C]`, each token by itself.
        """
        lm_params, heads = self._parts(params, context, key)
        return rollouts.score_loss(self.lm, lm_params, batch, fn, heads=heads, shared=shared)

    def _parts(self, params: Params, context: Any, key: Any) -> tuple[Params, dict]:
        """Parameters of the language model, and the heads that are read in the same pass."""
        full = self.full_params(params, context, key)
        if self.head is None:
            return full, {}
        # One pass for log-probs and values: the trunk's hidden states serve both.
        return full["lm"], {HEAD: (self.head, full["head"])}

    def reference_logprobs(
        self, context: Any, batch: Batch | Rollout, *, shared: SharedPrefix | None = None
    ) -> jax.Array:
        """`[B, T]`: log-probs of a batch's tokens under the reference, at the batch's temperature;
        no gradient.

        A mixture's reference chooses its experts itself, whatever the policy's were.
        """
        batch = rollouts.types.without_experts(batch)
        scored = rollouts.score_batch(self.lm, self.reference_params(context), batch, shared=shared)
        return jax.lax.stop_gradient(scored.logprobs)
