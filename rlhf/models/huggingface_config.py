"""Hugging Face's configs and ours: read, described, compared."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.lm import LM
from rlhf.models import language_part, mxfp4
from rlhf.models.config import Config, EncoderDecoderConfig, LayerKind, TransformerConfig
from rlhf.models.encoder_decoder import encoder_decoder
from rlhf.models.families import FAMILIES, Family, schema
from rlhf.models.families.table import pattern
from rlhf.models.json_files import read_object
from rlhf.models.transformer import transformer

CONFIG = "config.json"
GENERATION = "generation_config.json"
LIMIT = 16_000_000  # bytes of either
OF_LAYERS = ("gemma4_text",)  # families whose layers have fields of their own
# Of transformers' config: those may be read of the model too.
OF_MODEL = "allow_global_per_layer_attribute_access"
COMPUTATION = ("dtype", "param_dtype", "kernel", "remat")  # fields that no file holds


def lm_of(config: Config) -> LM:
    """The model of a config."""
    return transformer(config) if isinstance(config, TransformerConfig) else encoder_decoder(config)


def config_of(lm: LM) -> Config:
    """The config of a model of `transformer`, `encoder_decoder` or `load`.

    Raises: TypeError for other models, which have none.
    """
    # `init` of these models is a `Bound` method, whose first argument is the Flax module.
    config = getattr(getattr(lm.init, "args", (None,))[0], "config", None)
    if not isinstance(config, TransformerConfig | EncoderDecoderConfig):
        raise TypeError(
            "this LM has no config: it was not made by `transformer`, `encoder_decoder` or `load`"
        )
    return config


def read(folder: Path) -> tuple[Any, Config]:
    """config.json as transformers' object, defaults filled in and older keys turned into today's;
    and as our config.  Of a model that reads images or sounds too: its language model's.

    Every field that counts is held against its kind and range first, so that no array, list or loop
    is made of one that cannot be.

    Raises: FileNotFoundError where there is no config.json; ValueError naming the file and the
    field.
    """
    # Imported here: it takes seconds, and models made from a config do not need it.
    from transformers import AutoConfig

    file = folder / CONFIG
    if not file.exists():
        hint = ""
        if (folder / "adapter_config.json").exists():
            hint = "; it holds an adapter alone, and adapter_config.json names its base model"
        raise FileNotFoundError(f"{folder} has no {CONFIG}{hint}")
    raw = _raw(folder)
    if (method := quantised_by(raw)) not in (None, mxfp4.METHOD):
        raise ValueError(
            f"{folder} holds quantised weights ({method}), not supported; known: {mxfp4.METHOD}"
        )
    try:
        family_of(raw.get("model_type"))
        # Before transformers sees them: its classes make lists and loops of some sizes at once.
        schema.check(raw, raw["model_type"])
        _check_names(raw)
        hf = AutoConfig.for_model(**raw)
        if raw["model_type"] in OF_LAYERS:
            setattr(hf, OF_MODEL, True)
        schema.check_ids(raw, hf.vocab_size)
        # Before our config is made, whose error would not name the fields of this file.
        schema.check_heads(raw, hf)
        config = ours(hf)
        schema.check_consistency(hf, config)
    except ValueError as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from error
    except Exception as error:
        # Whatever transformers' classes raise of fields that we do not read.
        raise ValueError(
            f"{file}: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    return hf, config


def _raw(folder: Path) -> dict[str, Any]:
    return language_part.config(read_object(folder / CONFIG, LIMIT))


def senses(folder: Path) -> list[str]:
    """What the model of a folder reads beside text: vision, audio."""
    return language_part.senses(read_object(folder / CONFIG, LIMIT))


def quantised_by(config: Any) -> str | None:
    """The method by which a config says that the files' matrices are held in few bits."""
    fields = config if isinstance(config, Mapping) else vars(config)
    found = fields.get("quantization_config")
    return found.get("quant_method", "of no known kind") if isinstance(found, Mapping) else found


def transformers_config(folder: Path):
    """config.json as an object of transformers' class.

    Raises: FileNotFoundError where there is no config.json; ValueError naming the file and the
    field that cannot be.
    """
    return read(folder)[0]


def generation(folder: Path, vocab_size: int) -> dict[str, Any]:
    """What generation_config.json says; {} where there is none.

    Raises: ValueError where it is not JSON, or an id of its tokens is no id of a vocabulary of
    `vocab_size`.
    """
    file = folder / GENERATION
    if not file.exists():
        return {}
    raw = read_object(file, LIMIT)
    try:
        schema.check_ids(raw, vocab_size)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return raw


def end_ids(folder: Path) -> set[int]:
    """The tokens that end a completion, as generation_config.json and config.json name them:
    models have come with a list in either.

    Raises: ValueError where one of the files, or an id, cannot be.
    """
    said = generation(folder, read(folder)[0].vocab_size), _raw(folder)
    return set().union(*(ids(fields.get("eos_token_id")) for fields in said))


def ids(value: int | list[int] | None) -> set[int]:
    """Of a field that holds a token, several, or none."""
    return {*(value if isinstance(value, list) else [value])} - {None}


def _check_names(raw: Mapping[str, Any]) -> None:
    """transformers sets every field that it does not know as an attribute: none may stand in a
    method's place.
    """
    from transformers import PreTrainedConfig

    if wrong := [
        name
        for name in raw
        if callable(getattr(PreTrainedConfig, name, None))
        or (name == "per_layer_config" and raw["model_type"] not in OF_LAYERS)
    ]:
        raise ValueError(f"{wrong[0]!r} is no field of a config that is supported; leave it out")


def family_of(model_type) -> Family:
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"model_type {model_type!r:.80} is not known; known: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def ours(hf) -> Config:
    family = family_of(hf.model_type)
    for field, allowed in family.only.items():
        if getattr(hf, field, allowed[0]) not in allowed:
            raise ValueError(
                f"{hf.model_type} with {field} = {getattr(hf, field)!r} is not supported; known: "
                f"{allowed}"
            )
    config = family.read(hf)
    return _shortest(config) if isinstance(config, TransformerConfig) else config


def replaced(config: Config, **fields) -> Config:
    """A config with other fields; of an encoder-decoder, computation in both halves and the rest in
    the decoder.
    """
    if isinstance(config, TransformerConfig):
        return dataclasses.replace(config, **fields)
    common = {name: value for name, value in fields.items() if name in COMPUTATION}
    return EncoderDecoderConfig(
        dataclasses.replace(config.encoder, **common), dataclasses.replace(config.decoder, **fields)
    )


def decoder_of(config: Config) -> TransformerConfig:
    return config if isinstance(config, TransformerConfig) else config.decoder


def with_vocabulary(config: Config, size: int) -> Config:
    """A config with so many tokens; of an encoder-decoder, in both halves."""
    if isinstance(config, EncoderDecoderConfig):
        return EncoderDecoderConfig(
            dataclasses.replace(config.encoder, vocab_size=size),
            dataclasses.replace(config.decoder, vocab_size=size),
        )
    return dataclasses.replace(config, vocab_size=size)


def described(config: Config, family: str | None, fields: Mapping[str, Any]):
    """transformers' config for ours, written by a family; None: the first that can express it.

    Raises: ValueError naming the fields that the family cannot have.
    """
    family = family_for(config) if family is None else family
    hf = _written(config, family, fields)
    # Read back and compared: a field that the family has no place for is an error, not a loss.
    if lost := differences(config, ours(hf)):
        raise ValueError(f"a {family} model cannot have {', '.join(lost)}")
    return hf


def _written(config: Config, family: str, fields: Mapping[str, Any]):
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    known = family_of(family)
    if known.write is None or not isinstance(config, TransformerConfig):
        raise ValueError(f"a {family} model is saved beside its original; give like=")
    try:
        return AutoConfig.for_model(
            family, **{**known.write(config), "architectures": [known.architecture], **fields}
        )
    except StrictDataclassError as error:
        raise ValueError(f"a {family} model cannot have this config: {error}") from error


def described_as(original: Path, config: Config, fields: Mapping[str, Any]):
    """The config of the original, with other fields, if the model is of that form."""
    hf, theirs = read(original)
    if decoder_of(theirs).tied and not decoder_of(config).tied:
        # The original stores its tied matrix twice, and the two differ (see `_found`).
        theirs = replaced(theirs, tied=False)
        hf.tie_word_embeddings = False
    # Tokens were added, by `resized`.
    if decoder_of(config).vocab_size > decoder_of(theirs).vocab_size:
        hf.vocab_size = decoder_of(config).vocab_size
        theirs = with_vocabulary(theirs, hf.vocab_size)
    if not decoder_of(config).unembeds:
        theirs = replaced(theirs, unembeds=False)
    if lost := differences(config, theirs):
        raise ValueError(f"{original} has another config: {', '.join(lost)}")
    if hasattr(hf, "quantization_config"):
        # What is written is plain.
        del hf.quantization_config
    # Of a language model that was part of another the file has no class.
    hf.architectures = hf.architectures or [family_of(hf.model_type).architecture]
    hf.update(dict(fields))
    vars(hf).pop(OF_MODEL, None)
    return hf


def differences(config: Config, other: Config) -> list[str]:
    """What the first has, where the second has something else."""
    a = _resolved(config)
    b = _resolved(other)
    return [
        f"{field} = {a.get(field)!r} (but {b.get(field)!r})"
        for field in {**a, **b}
        if a.get(field) != b.get(field)
    ]


def _resolved(c: Config) -> dict:
    """What a config computes, defaults written out; without the fields that no file holds."""
    if isinstance(c, EncoderDecoderConfig):
        return {
            f"{half}.{k}": v
            for half in ("encoder", "decoder")
            for k, v in _resolved(getattr(c, half)).items()
        }
    fields = {
        **vars(c),
        "num_kv_heads": c.kv_heads,
        "head_dim": c.width,
        "attention_scale": c.scale,
        "kinds": _kinds(c),
    }
    return {field: value for field, value in fields.items() if field not in COMPUTATION}


def _shortest(c: TransformerConfig) -> TransformerConfig:
    """The same config with None for every default, so that it equals the one that was saved."""
    return dataclasses.replace(
        c,
        num_kv_heads=None if c.kv_heads == c.num_heads else c.kv_heads,
        head_dim=None if c.width * c.num_heads == c.hidden_size else c.width,
        attention_scale=None if c.scale == c.width**-0.5 else c.scale,
        kinds=_kinds(c),
    )


def _kinds(c: TransformerConfig) -> tuple[LayerKind, ...]:
    return pattern(tuple(c.kind(i) for i in range(c.num_layers)))


def family_for(config: Config) -> str:
    lost = {}
    # All that can write are tried in turn: which one fits depends on a dozen fields at once.
    for name in (name for name, family in FAMILIES.items() if family.write):
        try:
            lost[name] = differences(config, ours(_written(config, name, {})))
        except ValueError as error:
            lost[name] = [str(error)]
        if not lost[name]:
            return name
    nearest = min(lost, key=lambda name: len(lost[name]))
    raise ValueError(
        f"no family can express this config; the nearest, {nearest}, cannot have "
        f"{', '.join(lost[nearest])}"
    )
