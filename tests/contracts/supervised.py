"""Per-token and per-position objectives on given data, and reward models."""

import numpy as np

from contracts.case import (
    COLUMNS,
    ROWS,
    VOCABULARY,
    Case,
    also,
    chunked_logprob,
    chunked_nll,
    logit_array,
    masked,
    normal,
    token_ids,
)

logits_and_tokens = lambda rng: {"logits": logit_array(rng), "tokens": token_ids(rng)}

hidden_and_matrix = lambda rng: {
    "hidden": rng.normal(size=(ROWS, COLUMNS, 5)),
    "weight": rng.normal(size=(5, VOCABULARY)),
    "tokens": token_ids(rng),
}

CASES = {
    "chunks.chunked": Case(
        hidden_and_matrix, flow=("hidden", "weight"), fn=chunked_logprob, apart=("weight",)
    ),
    "chunks.chunked_sum": Case(
        hidden_and_matrix,
        flow=("hidden", "weight"),
        fn=chunked_nll,
        per="batch",
        apart=("weight",),
    ),
    "logits.token_logprob": Case(logits_and_tokens, flow=("logits",)),
    "logits.entropy": Case(lambda rng: {"logits": logit_array(rng)}, flow=("logits",)),
    "logits.token_logprob_and_entropy": Case(logits_and_tokens, flow=("logits",)),
    "logits.log_sum_squared_probs": Case(
        lambda rng: {"logits": logit_array(rng)}, flow=("logits",)
    ),
    "logits.smoothed_cross_entropy": Case(
        logits_and_tokens,
        flow=("logits",),
        knobs={"label_smoothing": 0.1, "z_loss": 0.01},
        refuses=(
            ({"label_smoothing": 1.0}, "label_smoothing"),
            ({"label_smoothing": -0.1}, "label_smoothing"),
        ),
    ),
    "logits.is_top1": Case(logits_and_tokens),
    "reward_model.bradley_terry": Case(
        normal("chosen", "rejected", "margin", shape=(ROWS,)),
        flow=("chosen", "rejected"),
        knobs={"center_coef": 0.01},
        per="row",
    ),
    "reward_model.process_reward": Case(
        also(
            masked(),
            logits=lambda rng: rng.normal(size=(ROWS, COLUMNS, 2)),
            labels=lambda rng: token_ids(rng) % np.int32(2),
        ),
        flow=("logits",),
        apart=("logits",),
    ),
    "reward_model.regression": Case(
        normal("rewards", "targets", shape=(ROWS,)), flow=("rewards",), per="row"
    ),
    "supervised.cross_entropy": Case(masked("logprobs"), flow=("logprobs",)),
    "supervised.dft": Case(masked("logprobs"), flow=("logprobs",)),
}
