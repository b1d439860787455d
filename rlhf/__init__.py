"""Post-train language models in JAX with pure functions."""

import importlib
from typing import TYPE_CHECKING

# For editors and type checkers, which cannot follow `__getattr__`.
if TYPE_CHECKING:
    from rlhf.from_flax import from_linen as from_linen
    from rlhf.from_flax import from_nnx as from_nnx
    from rlhf.lm import LM as LM
    from rlhf.lm import Head as Head
    from rlhf.models.huggingface import load as load
    from rlhf.models.huggingface import load_classifier as load_classifier
    from rlhf.models.huggingface import load_with_value as load_with_value
    from rlhf.models.huggingface import save as save
    from rlhf.models.vocabulary import resized as resized
    from rlhf.train import TrainState as TrainState
    from rlhf.train import coupled_train_step as coupled_train_step
    from rlhf.train import init_state as init_state
    from rlhf.train import minibatches as minibatches
    from rlhf.train import reference as reference
    from rlhf.train import train_step as train_step
    from rlhf.training import guards as guards
    from rlhf.training.policy import Policy as Policy

# Names are imported on first use: `import rlhf` alone must not wait for JAX, Flax and transformers.
_EXPORTS = {
    "LM": "rlhf.lm",
    "Head": "rlhf.lm",
    "from_linen": "rlhf.from_flax",
    "from_nnx": "rlhf.from_flax",
    "load": "rlhf.models.huggingface",
    "load_classifier": "rlhf.models.huggingface",
    "load_with_value": "rlhf.models.huggingface",
    "save": "rlhf.models.huggingface",
    "resized": "rlhf.models.vocabulary",
    "TrainState": "rlhf.train",
    "init_state": "rlhf.train",
    "train_step": "rlhf.train",
    "coupled_train_step": "rlhf.train",
    "minibatches": "rlhf.train",
    "reference": "rlhf.train",
    "Policy": "rlhf.training.policy",
}
_MODULES = (
    "losses",
    "rollouts",
    "models",
    "sharding",
    "hosts",
    "checkpoint",
    "metrics",
    "train",
    "planning",
    "training",
    "lm",
    "bound",
    "from_flax",
    "mixture",
    "shared_prefix",
    "data",
    "tasks",
    "typing",
    "adapters",
    "peft_files",
    "recipes",
    "classic",
    "ranges",
)
# Modules that stand deeper than their short names.
_SHORT = {"guards": "rlhf.training.guards"}
__all__ = [*_EXPORTS, *_MODULES, *_SHORT, "__version__"]


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"rlhf.{name}")
    if name in _SHORT:
        return importlib.import_module(_SHORT[name])
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("rlhf")
        # A checkout that is on the path and not installed.
        except metadata.PackageNotFoundError:
            return "unknown"
    raise AttributeError(f"module 'rlhf' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
