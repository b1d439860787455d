"""PPO as classic TRL had it: you sample and score as you like, and
`step(state, queries, responses, scores)` learns from it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf import data, losses, rollouts
from rlhf.lm import LM, Head
from rlhf.losses.controllers import Controller
from rlhf.recipes import ppo
from rlhf.rollouts import Rollout
from rlhf.train import TrainState, init_state, reference
from rlhf.training.policy import Policy

ADAPTIVE = losses.controllers.adaptive_kl()


def start(params: Any, optimizer, key, *, controller: Controller = ADAPTIVE) -> TrainState:
    """The state of `ppo_step`: `params` is `{"lm": …, "head": …}`, and a copy of the model as it is
    becomes the reference.
    """
    context = {"reference": reference(params["lm"]), **ppo.initial_context(controller)}
    return init_state(params, optimizer, key, context)


def ppo_step(
    lm: LM,
    head: Head,
    optimizer,
    *,
    length: int,
    controller: Controller = ADAPTIVE,
    scale_scores: bool = False,
    score_clip: float | None = None,
    target_kl: float | None = None,
    epochs: int = 4,
    mini_batches: int = 1,
    micro_batches: int = 1,
    discount: float = 1.0,
    lam: float = 0.95,
    seq2seq: data.Seq2Seq | None = None,
    **options,
) -> Callable:
    """`step(state, queries, responses, scores) -> (state, metrics)`: PPO on completions that you
    have sampled from `state.params`.

    Queries and responses are lists of lists of tokens, scores numbers, one each (NaN: could not be
    scored).  The KL to the reference is paid per token, with a coefficient that the controller
    moves by the KL of each batch.

    Args:
      lm, head: the policy and its value head.
      optimizer: any optax transformation.
      length: columns of a row; one compiled program serves all that fit.
      controller: of the KL coefficient, such as `losses.controllers.fixed(0.2)`.
      scale_scores: less the mean of all so far, divided by their deviation.
      score_clip: scores beyond ± this are cut, after scaling.
      target_kl: nats a token by which the policy may move on one batch; beyond it the other
        optimizer steps are left out.
      epochs, mini_batches, micro_batches: passes over the completions, the optimizer steps of each,
        and the parts of a step.
      discount, lam: of generalised advantages.
      seq2seq: of an encoder-decoder, whose encoder reads queries: `data.Seq2Seq((0,), (1,))` for
        T5.
      options: of `ppo.make_update`: clip, value_clip, value_coef, whiten_rewards.

    Raises: from `step`, ValueError for unequal numbers of queries, responses and scores, for one
    without tokens, for a token
      that the model has not, and for more tokens than `length`; TypeError for texts, which are
      tokenised first.
    """
    if (lm.encode is not None) != (seq2seq is not None):
        has = "an encoder" if lm.encode else "no encoder"
        raise ValueError(
            f"the model has {has}, but seq2seq is {seq2seq}; give both or neither, as "
            "`data.Seq2Seq.of` makes it"
        )
    policy = Policy(lm, head)
    update_rollout = ppo.make_update(
        policy,
        optimizer,
        kl_coef=controller,
        discount=discount,
        lam=lam,
        scale_scores=scale_scores,
        score_clip=score_clip,
        target_kl=target_kl,
        epochs=epochs,
        num_minibatches=mini_batches,
        micro_batches=micro_batches,
        **options,
    )

    # Donated: the new state is written over the old one's memory.
    @partial(jax.jit, donate_argnums=0)
    def update(state, rows, scores, key):
        # Responses come without log-probs; the parameters are still those that sampled them.
        logprobs = rollouts.score_batch(lm, state.params["lm"], rows).logprobs
        rollout = Rollout(
            tokens=rows.tokens,
            mask=rows.mask,
            positions=rows.positions,
            segment_ids=rows.segment_ids,
            logprobs=logprobs,
            sampling_logprobs=logprobs,
            # A score stands for a finished response; NaN says where there is none.
            finished=jnp.ones(len(scores), bool),
            temperature=jnp.float32(1.0),
            inputs=rows.inputs,
        )
        return update_rollout(state, rollout, scores, key)

    def step(
        state, queries: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], scores
    ) -> tuple[TrainState, dict]:
        rows = rows_of(queries, responses, length, seq2seq)
        # Inside a program a token beyond the embedding would read another row in silence.
        rollouts.check_ids(lm, rows.tokens, rows.segment_ids)
        scores = jnp.asarray(scores, jnp.float32)
        if scores.shape != (len(queries),):
            raise ValueError(
                f"{len(queries)} queries but scores {list(scores.shape)}; give one number each"
            )
        # Folded by the step, so that every batch is cut otherwise and a resumed run as it was.
        return update(state, rows, scores, jax.random.fold_in(state.key, state.step))

    return step


def rows_of(
    queries: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    length: int,
    seq2seq: data.Seq2Seq | None = None,
):
    """Queries with their responses as a `Batch` of `length` columns, responses trained.  Raises: as
    `ppo_step`'s step.

    With `seq2seq` both encoder and decoder have `length` columns.
    """
    if len(queries) != len(responses):
        raise ValueError(f"{len(queries)} queries but {len(responses)} responses; give one each")
    for name, several in (("query", queries), ("response", responses)):
        for i, tokens in enumerate(several):
            _check_tokens(f"{name} {i}", tokens)
    sequences = [
        data.Tokenized(
            [*map(int, query), *map(int, response)], [False] * len(query) + [True] * len(response)
        )
        for query, response in zip(queries, responses, strict=True)
    ]
    # One length for all batches: each other one would compile the program again.
    longest = int(np.max([len(row.tokens) for row in sequences]))
    if longest > length:
        raise ValueError(
            f"a query with its response has {longest} tokens, but length is {length}; raise it, or "
            "sample fewer"
        )
    rows = (
        data.batch(sequences, length=length)
        if seq2seq is None
        else seq2seq.batch(sequences, length=length)
    )
    return jax.tree.map(jnp.asarray, rows)


def _check_tokens(name: str, tokens: Any) -> None:
    # A text is a sequence too, of letters: it would pass as a list and fail far from here.
    if isinstance(tokens, str) or np.asarray(tokens).dtype.kind in "UO":
        raise TypeError(
            f"{name} is text, but must be a list of token ids; give tokenizer(text).input_ids"
        )
    if np.ndim(tokens) != 1:
        raise TypeError(
            f"{name} has shape {list(np.shape(tokens))}, but must be a list of token ids; give one "
            "list each"
        )
    if not len(tokens):
        raise ValueError(f"{name} has no tokens; give at least one")
    if np.asarray(tokens).dtype.kind not in "iu":
        raise TypeError(
            f"{name} holds {np.asarray(tokens).dtype}, but must be a list of token ids, whole "
            "numbers"
        )
