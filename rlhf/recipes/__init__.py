"""Algorithms put together from the parts, one a file: an objective, and what prepares its batch."""

import importlib

# Imported on first use: `rlhf --help` and `import rlhf` load none of them.
_MODULES = (
    "bco",
    "cpo",
    "dpo",
    "gkd",
    "grpo",
    "ilql",
    "kto",
    "nash_md",
    "online_dpo",
    "orpo",
    "ppo",
    "prm",
    "reward",
    "rft",
    "rloo",
    "sft",
    "xpo",
)
__all__ = [*_MODULES]


def __getattr__(name):
    if name in _MODULES:
        return importlib.import_module(f"rlhf.recipes.{name}")
    raise AttributeError(f"module 'rlhf.recipes' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
