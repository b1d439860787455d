"""The Hugging Face families that `TransformerConfig` spans; a new one is a file with a table and a
function, named here.
"""

from collections.abc import Mapping

from rlhf.models.families import (
    apertus,
    bart,
    bert,
    bloom,
    cohere,
    deepseek,
    falcon,
    gemma,
    glm,
    gpt2,
    gpt_neo,
    gpt_neox,
    gpt_oss,
    gptj,
    granite,
    kimi,
    lfm,
    llama,
    llama4,
    mixtral,
    nemotron,
    olmo,
    opt,
    phi,
    qwen,
    qwen_next,
    t5,
)
from rlhf.models.families.table import Family as Family
from rlhf.models.families.table import Tensor as Tensor

_FILES = (
    llama,
    qwen,
    gemma,
    gpt2,
    mixtral,
    phi,
    gptj,
    gpt_neo,
    gpt_neox,
    opt,
    bloom,
    falcon,
    t5,
    bart,
    bert,
    olmo,
    granite,
    glm,
    deepseek,
    cohere,
    apertus,
    nemotron,
    llama4,
    qwen_next,
    kimi,
    lfm,
    gpt_oss,
)

# By model_type.  The order counts: the first that can express a config is the one it is saved as.
FAMILIES: Mapping[str, Family] = {
    name: family for file in _FILES for name, family in file.FAMILIES.items()
}
