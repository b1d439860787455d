"""Per-token and per-position objectives on given data, and reward models."""

from contracts.case import COLUMNS, ROWS, VOCABULARY, Case, chunked_logprob, logit_array, masked, normal, token_ids

CASES = {
    "chunks.chunked": Case(
        lambda rng: {
            "hidden": rng.normal(size=(ROWS, COLUMNS, 5)),
            "weight": rng.normal(size=(5, VOCABULARY)),
            "tokens": token_ids(rng),
        },
        flow=("hidden", "weight"),
        fn=chunked_logprob,
        apart=("weight",),
    ),
    "logits.token_logprob": Case(lambda rng: {"logits": logit_array(rng), "tokens": token_ids(rng)}, flow=("logits",)),
    "logits.entropy": Case(lambda rng: {"logits": logit_array(rng)}, flow=("logits",)),
    "reward_model.bradley_terry": Case(
        normal("chosen", "rejected", "margin", shape=(ROWS,)),
        flow=("chosen", "rejected"),
        knobs={"center_coef": 0.01},
        per="row",
    ),
    "supervised.cross_entropy": Case(masked("logprobs"), flow=("logprobs",)),
}
