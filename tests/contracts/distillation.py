"""Distillation, and learning from logged data."""

from contracts.case import Case

CASES: dict[str, Case] = {}
