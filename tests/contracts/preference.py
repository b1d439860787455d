"""Pairs, and single completions with a label."""

from contracts.case import Case, pairs

BETA = ({"beta": 0.0}, "beta must be above 0")
CASES = {
    "preference.sigmoid": Case(pairs, flow=("chosen", "rejected"), knobs={"beta": 0.5}, per="row", refuses=(BETA,)),
    "preference.aot": Case(pairs, flow=("chosen", "rejected"), knobs={"beta": 0.5}, per="row", couples=True, refuses=(BETA,)),
    "preference.log_ratios": Case(pairs, flow=("chosen", "rejected"), per="row"),
}
