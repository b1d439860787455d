"""Nemotron: layer norms that multiply by 1 + w, an MLP of squared ReLU without a gate."""

from rlhf.models.config import TransformerConfig
from rlhf.models.families.apertus import UNGATED
from rlhf.models.families.llama import NORMS, read_llama, tensors
from rlhf.models.families.table import Family


def _read(hf) -> TransformerConfig:
    return read_llama(hf, norm="layer", norm_offset=1.0, norm_eps=hf.norm_eps, gated=False)


FAMILIES = {"nemotron": Family("NemotronForCausalLM", "model.", tensors(NORMS, UNGATED), _read)}
