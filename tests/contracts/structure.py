"""Sequences in rows, and weights."""

import numpy as np

from contracts.case import ROWS, Case, also, masked, normal, packed_ids, some_weights, vector
from rlhf import losses

one_a_row = lambda rng: {
    "segment_ids": np.minimum(packed_ids(rng)["segment_ids"], 1)
}  # an id beyond is NaN: test_ids.py
CASES = {
    "segments.ids_or_ones": Case(
        masked(), empty=1.0, untrained=True, fn=lambda mask: losses.segments.ids_or_ones(mask, None)
    ),
    "segments.segment_sum": Case(
        masked("values"), flow=("values",), static={"max_segments": 1}, per="row"
    ),
    "segments.spread": Case(
        also(masked(), per_sequence=vector), flow=("per_sequence",), per_sequence=("per_sequence",)
    ),
    "segments.per_token": Case(
        also(one_a_row, per_sequence=vector),
        flow=("per_sequence",),
        apart=("per_sequence", "segment_ids"),
        moves=True,
    ),
    "segments.total": Case(masked("values"), flow=("values",)),
    "segments.mean": Case(masked("values"), flow=("values",)),
    "segments.largest": Case(masked("values")),
    "segments.count": Case(masked(), untrained=True),
    "segments.starts": Case(packed_ids),
    "segments.last_trained": Case(masked()),
    "segments.last_columns": Case(packed_ids, static={"max_segments": 2}, per="row"),
    "weights.weighted_sum": Case(
        also(normal("values"), weights=some_weights), flow=("values",), per="batch"
    ),
    "weights.token_mean": Case(masked(), couples=True),
    "weights.sequence_mean": Case(masked(), couples=True),
    "weights.sequence_sum": Case(masked(), couples=True),
    "weights.constant": Case(
        masked(),
        knobs={"length": 11.0},
        couples=True,
        refuses=(({"length": 0}, "length must be above 0"),),
    ),
    "weights.prompt_mean": Case(
        also(masked(), prompt_ids=lambda rng: (np.arange(ROWS) // 2).astype(np.int32)),
        couples=True,
        per_sequence=("prompt_ids",),
    ),
    "weights.token_share": Case(masked()),
    "weights.number_of_sequences": Case(masked(), couples=True, per="batch", empty=1.0),
}
