"""Folders as Hugging Face writes them: config.json, safetensors, tokenizer.  Read and written without torch."""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf.lm import LM, Params
from rlhf.models.decoder import DecoderConfig, LayerKind, decoder
from rlhf.models.families import FAMILIES, Family, pattern

FLOATS = ("F64", "F32", "F16", "BF16")
NO_IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def load(folder, *, dtype: Any = jnp.float32, **fields) -> tuple[LM, Params, Any]:
    """A language model, its parameters and its tokenizer, from a folder on disk.

    Args:
      folder: with config.json and model.safetensors, or several files and model.safetensors.index.json.
      dtype: of the computation.
      fields: of `DecoderConfig`, in place of what the folder says; `param_dtype` is the parameters' (float32 if not given).

    Returns: `(lm, params, tokenizer)`.  Layers are stacked, `[num_layers, ...]`; the tokenizer follows tokenizer.json, and is
    None where the folder has none.

    Raises: ValueError where the family is not known, the config asks for what `DecoderConfig` does not span, or tensors are
      missing, left over or of another shape: all of them are named.  FileNotFoundError where a file is missing.

    >>> import tempfile
    >>> config = DecoderConfig(vocab_size=8, hidden_size=4, num_layers=2, num_heads=1, mlp_size=8)
    >>> params = decoder(config).init(jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, config, params)
    ...     lm, same, tokenizer = load(folder)
    >>> lm == decoder(config), bool((same["layers"]["q"] == params["layers"]["q"]).all()), tokenizer
    (True, True, None)
    """
    folder = Path(folder)
    hf = _transformers_config(folder)
    family, config = FAMILIES[hf.model_type], dataclasses.replace(_ours(hf), dtype=dtype, **fields)
    with _open(folder) as tensors:
        tensors = {_full_name(name, family): tensor for name, tensor in tensors.items()}
        if config.tied and _differ(tensors.get("lm_head.weight"), tensors.get(_name_of("embedding", family))):
            config = dataclasses.replace(config, tied=False)  # as transformers has it
        stored = _stored(family, config)
        _check(stored, tensors, family, config.tied, folder)
        params = _params(stored, tensors, config)
    return decoder(config), params, _tokenizer(folder)


def read_config(folder, **fields) -> DecoderConfig:
    """What config.json says, in today's keys or those of transformers 4, with `fields` of `DecoderConfig` put in place.

    Raises: as `load`.

    >>> import tempfile
    >>> config = DecoderConfig(vocab_size=8, hidden_size=4, num_layers=1, num_heads=1, mlp_size=8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, config, decoder(config).init(jax.random.key(0)))
    ...     read_config(folder, remat=True) == dataclasses.replace(config, remat=True)
    True
    """
    return dataclasses.replace(_ours(_transformers_config(Path(folder))), **fields)


def save(folder, config: DecoderConfig, params: Params, *, tokenizer=None, family: str | None = None, **fields) -> None:
    """Writes a folder that `load`, transformers and vLLM read; config.json comes last, so that a folder with it is whole.

    Args:
      folder: a new folder, or one without a config.json.
      config, params: of `decoder`; the parameters are stored in the dtype they have.
      tokenizer: saved beside the model; its ids of begin, end and padding go into the config, which has none without it.
      family: a model type of `FAMILIES`; None: the first that can express the config, "llama" for Llama's.
      fields: of config.json, for what `DecoderConfig` does not hold: `max_position_embeddings=…`, `eos_token_id=[…]`.

    Raises: FileExistsError where the folder holds a model; ValueError where the family cannot express the config, naming the
      fields, or `params` are not the config's.

    >>> import tempfile
    >>> config = DecoderConfig(vocab_size=8, hidden_size=4, num_layers=1, num_heads=1, mlp_size=8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, config, decoder(config).init(jax.random.key(0)), max_position_embeddings=512)
    ...     sorted(file.name for file in Path(folder).iterdir())
    ['config.json', 'generation_config.json', 'model.safetensors']
    """
    import transformers
    from safetensors.numpy import save_file

    folder = Path(folder)
    if (folder / "config.json").exists():
        raise FileExistsError(f"{folder} holds a model already (config.json); give a new folder")
    family = _family_for(config) if family is None else family
    ids = {name: getattr(tokenizer, name, None) for name in NO_IDS}
    fields = {"dtype": str(jax.tree.leaves(params)[0].dtype), **ids, **fields}
    described = _described(config, family, fields)
    if lost := _lost(config, described):
        raise ValueError(f"a {family} model cannot have {', '.join(lost)}")
    tensors = _tensors(_stored(FAMILIES[family], config), config, params)

    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    transformers.GenerationConfig.from_model_config(described).save_pretrained(folder)
    described.save_pretrained(folder)


# --- configs -----------------------------------------------------------------------------------------------------------


def _transformers_config(folder: Path):
    """config.json as an object of transformers' class: defaults filled in, older keys turned into today's."""
    from transformers import AutoConfig

    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"{folder} has no config.json; a model of the Hub is downloaded first: hf download NAME --local-dir FOLDER"
        )
    raw = json.loads((folder / "config.json").read_text())
    if "quantization_config" in raw:
        raise ValueError(f"{folder} holds quantised weights ({raw['quantization_config'].get('quant_method')}), not supported")
    _known(raw.get("model_type"))
    return AutoConfig.for_model(**raw)


def _known(model_type) -> Family:
    if model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not known; known: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def _ours(hf) -> DecoderConfig:
    family = _known(hf.model_type)
    for field, allowed in family.only.items():
        if getattr(hf, field, allowed[0]) not in allowed:
            raise ValueError(f"{hf.model_type} with {field} = {getattr(hf, field)!r} is not supported; known: {allowed}")
    return _shortest(DecoderConfig(**family.read(hf)))


def _described(config: DecoderConfig, family: str, fields: Mapping[str, Any]):
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    known = _known(family)
    try:
        return AutoConfig.for_model(family, **{**known.write(config), "architectures": [known.architecture], **fields})
    except StrictDataclassError as error:
        raise ValueError(f"a {family} model cannot have this config: {error}") from error


def _lost(config: DecoderConfig, hf) -> list[str]:
    """What a config loses when a family writes it and reads it again."""
    ours, theirs = _resolved(config), _resolved(_ours(hf))
    return [f"{field} = {ours[field]!r} (but {theirs[field]!r})" for field in ours if ours[field] != theirs[field]]


def _resolved(c: DecoderConfig) -> dict:
    """What a config computes, defaults written out; without dtypes and remat."""
    fields = {**vars(c), "num_kv_heads": c.kv_heads, "head_dim": c.width, "attention_scale": _scale(c), "kinds": _kinds(c)}
    return {field: value for field, value in fields.items() if field not in ("dtype", "param_dtype", "remat")}


def _shortest(c: DecoderConfig) -> DecoderConfig:
    """The same config with None for every default, so that it equals the one that was saved."""
    return dataclasses.replace(
        c,
        num_kv_heads=None if c.kv_heads == c.num_heads else c.kv_heads,
        head_dim=None if c.width * c.num_heads == c.hidden_size else c.width,
        attention_scale=None if _scale(c) == c.width**-0.5 else _scale(c),
        kinds=_kinds(c),
    )


def _scale(c: DecoderConfig) -> float:
    return c.width**-0.5 if c.attention_scale is None else c.attention_scale


def _kinds(c: DecoderConfig) -> tuple[LayerKind, ...]:
    return pattern(tuple(c.kinds[i % len(c.kinds)] for i in range(c.num_layers)))


def _family_for(config: DecoderConfig) -> str:
    lost = {}
    for name in FAMILIES:
        try:
            lost[name] = _lost(config, _described(config, name, NO_IDS))
        except ValueError as error:
            lost[name] = [str(error)]
        if not lost[name]:
            return name
    nearest = min(lost, key=lambda name: len(lost[name]))
    raise ValueError(f"no family can express this config; the nearest, {nearest}, cannot have {', '.join(lost[nearest])}")


# --- tensors -----------------------------------------------------------------------------------------------------------


class _Stored(NamedTuple):
    """A tensor of the file and where its parts go."""

    shape: tuple[int, ...]  # in the file
    leaves: tuple[tuple[str, ...], ...]  # paths of our leaves
    sizes: tuple[int, ...]  # of the parts along our last axis
    layer: int | None  # index into stacked leaves
    transpose: bool


def _stored(family: Family, config: DecoderConfig) -> dict[str, _Stored]:
    """Every tensor that a file of this family and config has, by name."""
    shapes = {path: leaf.shape for path, leaf in _flat(_shapes(config)).items()}
    out = {}
    for row in family.tensors:
        leaves = tuple(tuple(leaf.split(".")) for leaf in row.leaves.split())
        if leaves[0] not in shapes:
            continue
        stacked = "{}" in row.name
        parts = [shapes[leaf][1:] if stacked else shapes[leaf] for leaf in leaves]
        sizes = tuple(part[-1] for part in parts)
        shape = (*parts[0][:-1], sum(sizes))
        shape = shape[::-1] if row.transpose else shape
        for layer in range(config.num_layers) if stacked else (None,):
            out[row.name.format(layer)] = _Stored(shape, leaves, sizes, layer, row.transpose)
    return out


def _params(stored: Mapping[str, _Stored], tensors: Mapping[str, Any], config: DecoderConfig) -> Params:
    """Our pytree from a file's tensors, one at a time."""
    flat = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in _flat(_shapes(config)).items()}
    for name, where in stored.items():
        x = tensors[name][:]
        parts = np.split(x.T if where.transpose else x, np.cumsum(where.sizes)[:-1], axis=-1)
        for path, part in zip(where.leaves, parts, strict=True):
            flat[path][... if where.layer is None else where.layer] = part
    return _nest({path: jnp.asarray(leaf) for path, leaf in flat.items()})


def _tensors(stored: Mapping[str, _Stored], config: DecoderConfig, params: Params) -> dict[str, np.ndarray]:
    """A file's tensors from our pytree."""
    flat, wanted = _flat(params), _flat(_shapes(config))
    wrong = [
        f"{'.'.join(path)} {list(flat[path].shape) if path in flat else 'missing'} but the config has "
        f"{list(wanted[path].shape) if path in wanted else 'no such leaf'}"
        for path in sorted(flat.keys() | wanted.keys())
        if path not in flat or path not in wanted or flat[path].shape != wanted[path].shape
    ]
    if wrong:
        raise ValueError(f"params are not the config's: {'; '.join(wrong)}")
    flat = {path: np.asarray(leaf) for path, leaf in flat.items()}
    out = {}
    for name, where in stored.items():
        x = np.concatenate([flat[path][... if where.layer is None else where.layer] for path in where.leaves], axis=-1)
        out[name] = np.ascontiguousarray(x.T if where.transpose else x)
    return out


@contextlib.contextmanager
def _open(folder: Path) -> Iterator[dict[str, Any]]:
    """Handles on a folder's tensors by name; nothing is read until a handle is indexed."""
    from safetensors import safe_open

    if (folder / WEIGHTS).exists():
        files = [WEIGHTS]
    elif (folder / INDEX).exists():
        files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    elif any(folder.glob("*.bin")):
        raise ValueError(
            f"{folder} holds pickled weights (.bin), which can run code when read; with torch installed, turn them into "
            f"safetensors once: AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(new_folder)"
        )
    else:
        raise FileNotFoundError(f"{folder} has no {WEIGHTS} and no {INDEX}")
    if missing := [file for file in files if not (folder / file).exists()]:
        raise FileNotFoundError(f"{folder}: {INDEX} names files that are not there: {', '.join(missing)}")
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(safe_open(folder / file, framework="np")) for file in files]
        yield {name: file.get_slice(name) for file in opened for name in file.keys()}  # noqa: SIM118 - not a mapping


def _check(stored: Mapping[str, _Stored], tensors: Mapping[str, Any], family: Family, tied: bool, folder: Path) -> None:
    ignored = lambda name: re.search(family.buffers, name) or (tied and name == "lm_head.weight")
    shape = lambda name: list(tensors[name].get_shape())
    both = sorted(stored.keys() & tensors.keys())
    problems = {
        "missing": sorted(stored.keys() - tensors.keys()),
        "left over": sorted(name for name in tensors.keys() - stored.keys() if not ignored(name)),
        "of another shape": [
            f"{name} {shape(name)} but the config says {list(stored[name].shape)}"
            for name in both
            if shape(name) != list(stored[name].shape)
        ],
        "not of floats": [f"{name} {tensors[name].get_dtype()}" for name in both if tensors[name].get_dtype() not in FLOATS],
    }
    if any(problems.values()):
        found = "; ".join(f"{what}: {', '.join(names)}" for what, names in problems.items() if names)
        raise ValueError(f"the tensors of {folder} do not fit its config: {found}")


def _full_name(name: str, family: Family) -> str:
    """A tensor's name with the trunk's prefix, which files of the trunk alone leave out."""
    names = {row.name for row in family.tensors}
    pattern = re.sub(r"\.\d+\.", ".{}.", family.prefix + name, count=1)
    return family.prefix + name if pattern in names else name


def _name_of(leaf: str, family: Family) -> str:
    return next(row.name for row in family.tensors if row.leaves == leaf)


def _differ(a, b) -> bool:
    return a is not None and b is not None and not np.array_equal(a[:], b[:])


# --- trees and tokenizers ----------------------------------------------------------------------------------------------


def _shapes(config: DecoderConfig) -> Params:
    return jax.eval_shape(decoder(config).init, jax.random.key(0))


def _flat(tree) -> dict[tuple[str, ...], Any]:
    return {tuple(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _nest(flat: Mapping[tuple[str, ...], Any]) -> Params:
    tree: dict = {}
    for (*above, last), leaf in flat.items():
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def _tokenizer(folder: Path):
    """tokenizer.json as it stands.  AutoTokenizer puts some families' own pre-tokenizer in its place: other ids."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder) if (folder / "tokenizer.json").exists() else None
