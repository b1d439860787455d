"""The language model within a model that reads images or sounds too, as its folder has it."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

# Text models whose positions have three axes, which are equal for text: then they are these.
PLAIN = {
    **dict.fromkeys(("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"), "qwen2"),
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
# What the text's config leaves to the one around it.
COMMON = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
SENSES = ("vision", "audio")
THREE_AXES = ("mrope_section", "mrope_interleaved")
ROPE = ("rope_parameters", "rope_scaling")
TRUNK = re.compile(r"^(model\.)?(language_model|text_model)\.(model\.)?")
OUTPUT = re.compile(r"^(model\.)?(language_model\.)?lm_head\.")


def senses(raw: Mapping[str, Any]) -> list[str]:
    """What a config.json describes beside text.

    >>> senses({"text_config": {}, "vision_config": {"depth": 2}, "audio_config": None})
    ['vision']
    """
    return [sense for sense in SENSES if raw.get(f"{sense}_config")]


def config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's fields of a config.json; of one for text alone all.

    >>> config({"model_type": "gemma3", "vision_config": {"depth": 2}, "eos_token_id": [1, 106],
    ...         "text_config": {"model_type": "gemma3_text"}})
    {'model_type': 'gemma3_text', 'eos_token_id': [1, 106]}
    """
    text = raw.get("text_config")
    if not isinstance(text, Mapping):
        if not senses(raw):
            return dict(raw)
        # Older files have the text's fields beside the part for images.
        text = {name: value for name, value in raw.items() if not name.endswith("_config")}
    fields = {**text, **{name: raw[name] for name in COMMON if raw.get(name) is not None}}
    kind = fields.get("model_type")
    if isinstance(kind, str) and kind in PLAIN:
        fields["model_type"] = PLAIN[kind]
        fields |= {name: _one_axis(fields[name]) for name in ROPE if name in fields}
    return fields


def _one_axis(rope: Any) -> Any:
    if not isinstance(rope, Mapping):
        return rope
    left = {name: value for name, value in rope.items() if name not in THREE_AXES}
    return {
        name: "default" if value == "mrope" and name in ("type", "rope_type") else value
        for name, value in left.items()
    }


def names(stored: Iterable[str]) -> dict[str, str]:
    """The language model's tensors by the names that they have in a file of it alone.

    >>> names(["model.visual.norm.weight", "model.language_model.norm.weight", "lm_head.weight"])
    {'model.language_model.norm.weight': 'model.norm.weight', 'lm_head.weight': 'lm_head.weight'}
    >>> names(["visual.norm.weight", "model.norm.weight"])
    {'model.norm.weight': 'model.norm.weight'}
    """
    stored = list(stored)
    apart = any(TRUNK.match(name) for name in stored)
    found = {}
    for name in stored:
        if OUTPUT.match(name):
            found[name] = OUTPUT.sub("lm_head.", name)
        elif TRUNK.match(name):
            found[name] = TRUNK.sub("model.", name)
        elif not apart and name.startswith("model."):
            found[name] = name
    return found
