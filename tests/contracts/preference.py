"""Pairs, and single completions with a label."""

import numpy as np

from contracts.case import COLUMNS, ROWS, SAMPLES, Case, also, masked, normal, pairs, vector
from rlhf.losses import unpaired

PAIR = ("chosen", "rejected")
BETA = ({"beta": 0.0}, "beta must be above 0")
GAMMA = {"beta": 0.5, "gamma": 0.3}
SMOOTHING = (
    {"label_smoothing": 0.5},
    r"label_smoothing .* in \[0, 0.5\), but is 0.5; .* swap chosen and rejected",
)
SMOOTH = {"beta": 0.5, "label_smoothing": 0.1}
lengths = lambda rng: rng.integers(1, 9, size=ROWS).astype(np.int32)
labels = lambda rng: np.arange(ROWS) % 2 == 0
several_masks = lambda rng: {
    name: rng.random((ROWS, COLUMNS)) < 0.7 for name in ("chosen_mask", "rejected_mask")
}
with_lengths = lambda inputs: also(inputs, chosen_length=lengths, rejected_length=lengths)
alone = normal("chosen", "rejected", shape=(ROWS,))
probable = lambda *names: lambda rng: {name: -rng.uniform(0.1, 9, size=ROWS) for name in names}
singles = also(normal("logprobs", "ref_logprobs", shape=(ROWS,)), desirable=labels)
one_number = lambda rng: rng.uniform(0.1, 0.9, size=1)


def pair(knobs=None, **more):
    return Case(
        **(
            {
                "inputs": pairs,
                "flow": PAIR,
                "per": "row",
                "knobs": knobs or {"beta": 0.5},
                "refuses": (BETA,),
            }
            | more
        )
    )


CASES = {
    "divergence.reverse_kl": Case(
        normal("log_ratio", shape=(ROWS,)), flow=("log_ratio",), per="row"
    ),
    "divergence.forward_kl": Case(
        normal("log_ratio", shape=(ROWS,)), flow=("log_ratio",), per="row"
    ),
    "divergence.js": Case(normal("log_ratio", shape=(ROWS,)), flow=("log_ratio",), per="row"),
    "divergence.alpha": Case(
        normal("log_ratio", shape=(ROWS,)), flow=("log_ratio",), knobs={"alpha": 0.6}, per="row"
    ),
    "preference.sigmoid": pair(SMOOTH, refuses=(BETA, SMOOTHING)),
    "preference.sigmoid_norm": pair(SMOOTH, inputs=with_lengths(pairs), refuses=(BETA, SMOOTHING)),
    "preference.hinge": pair(),
    "preference.ipo": pair(inputs=with_lengths(pairs)),
    "preference.exo": pair(
        SMOOTH,
        refuses=(
            BETA,
            SMOOTHING,
            ({"label_smoothing": 0.0}, "label_smoothing must be above 0, as 1e-3"),
        ),
    ),
    "preference.robust": pair(SMOOTH, refuses=(BETA, SMOOTHING)),
    "preference.discopop": pair(
        {"beta": 0.5, "tau": 0.7}, refuses=(BETA, ({"tau": 0.0}, "tau must be above 0"))
    ),
    "preference.nca": pair(),
    "preference.bco_pair": pair(),
    "preference.sppo": pair(),
    "preference.apo_zero": pair(),
    "preference.apo_down": pair(),
    "preference.aot": pair(SMOOTH, couples=True, refuses=(BETA, SMOOTHING)),
    "preference.aot_unpaired": pair(SMOOTH, couples=True, refuses=(BETA, SMOOTHING)),
    "preference.logistic": Case(
        normal("margin", shape=(ROWS,)),
        flow=("margin",),
        knobs={"label_smoothing": 0.1},
        per="row",
        refuses=(SMOOTHING,),
    ),
    "preference.log_ratios": Case(pairs, flow=PAIR, per="row"),
    "preference.averages": Case(with_lengths(alone), flow=PAIR, per="row"),
    "preference.ld_weights": Case(
        several_masks,
        knobs={"alpha": 0.4},
        refuses=(({"alpha": 1.1}, r"alpha is a weight in \[0, 1\]"),),
    ),
    "preference.wpo_weights": Case(
        masked("logprobs", "log_sum_squared_probs"), static={"max_segments": 1}, per="row"
    ),
    "reference_free.cpo": pair(SMOOTH, inputs=alone, refuses=(BETA, SMOOTHING)),
    "reference_free.simpo": pair(
        SMOOTH | GAMMA, inputs=with_lengths(alone), refuses=(BETA, SMOOTHING)
    ),
    "reference_free.alphapo": pair(
        SMOOTH | GAMMA | {"alpha": 0.3}, inputs=with_lengths(alone), refuses=(BETA, SMOOTHING)
    ),
    "reference_free.power_reward": Case(
        normal("logprobs", shape=(ROWS,)), flow=("logprobs",), knobs={"alpha": 0.3}, per="row"
    ),
    "reference_free.orpo": pair(inputs=with_lengths(probable(*PAIR))),
    "reference_free.log_odds": Case(probable("logprobs"), flow=("logprobs",), per="row"),
    "reference_free.tpo": pair(SMOOTH, inputs=alone, refuses=(BETA, SMOOTHING)),
    "reference_free.tpo_l": pair(
        SMOOTH | GAMMA, inputs=with_lengths(alone), refuses=(BETA, SMOOTHING)
    ),
    "online.pairs_by_score": Case(normal("scores", shape=(ROWS, SAMPLES)), per="row"),
    "online.xpo": pair(
        {"alpha": 0.1},
        inputs=also(pairs, from_reference=vector),
        flow=(*PAIR, "from_reference"),
        refuses=(),
    ),
    "online.nash_md": Case(
        also(masked("logprobs", "ref_logprobs"), preferred=vector),
        flow=("logprobs",),
        knobs={"beta": 0.5},
        per_sequence=("preferred",),
        refuses=(BETA,),
    ),
    "unpaired.kto": Case(
        also(singles, kl=one_number),
        flow=("logprobs",),
        knobs={"beta": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.7},
        per="row",
        apart=("kl",),
        refuses=(
            BETA,
            ({"desirable_weight": 0.0}, "desirable_weight must be above 0"),
            ({"undesirable_weight": -1.0}, "undesirable_weight must be above 0"),
            ({}, r"kl must be one number for the batch, \[\], but is \[1\]"),
        ),
        fn=lambda kl, **more: unpaired.kto(**more, kl=kl[0]),
    ),
    "unpaired.kto_kl": Case(masked("logprobs", "ref_logprobs"), couples=True, per="batch"),
    "unpaired.apo_zero": Case(
        singles,
        flow=("logprobs",),
        knobs={"beta": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.7},
        per="row",
        refuses=(BETA, ({"desirable_weight": 0.0}, "desirable_weight must be above 0")),
    ),
    "unpaired.bco": Case(
        also(singles, shift=one_number),
        flow=("logprobs",),
        knobs={"beta": 0.5},
        per="row",
        apart=("shift",),
        refuses=(BETA, ({}, r"shift must be one number for the batch, \[\], but is \[1\]")),
        fn=lambda shift, **more: unpaired.bco(**more, shift=shift[0]),
    ),
    "unpaired.density_ratio": Case(
        also(lambda rng: {"probability": rng.uniform(0.1, 0.9, size=ROWS)}, desirable=labels),
        knobs={"min_ratio": 0.5, "max_ratio": 3.0},
        per="row",
        refuses=(
            ({"min_ratio": 0.0}, "min_ratio must be above 0"),
            ({"min_ratio": 4.0}, "min_ratio 4.0 is above max_ratio 3.0: swap them"),
        ),
    ),
}
