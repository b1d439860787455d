"""Adapters as PEFT writes them: adapter_config.json and adapter_model.safetensors.  Read and written without torch."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf.adapters import LoRAWeight, dotted, is_adapter, split
from rlhf.lm import LM
from rlhf.models.families import Tensor
from rlhf.models.huggingface_config import config_of, decoder_of, family_of
from rlhf.models.mapping import joined, parts_of, places

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's, before every name of transformers
ONLY: Mapping[str, tuple] = {  # fields that change what is computed without a tensor that would show it -> what they may be
    "peft_type": ("LORA",),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # the others alter the base
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "layer_replication": (None,),
}


def save(folder, lm: LM, params: Any, family: str, *, base: str | None = None) -> None:
    """Writes a folder that `load`, PEFT and vLLM read; adapter_config.json comes last, so that a folder with it is whole.

    Adapters of matrices that a family keeps as one (GPT-2's queries, keys and values) go there side by side: PEFT's A is ours
    in a row, its B ours along a diagonal, and its rank the sum of ours.

    Args:
      folder: a new folder, or one without an adapter_config.json.
      lm: the model, of `transformer`, `encoder_decoder` or `load`.
      params: with adapters, what `adapters.join` returns.
      family: a model type of `FAMILIES`: it knows the names.
      base: path or Hub name of the base model, which PEFT loads when it is given the folder alone.

    Raises: FileExistsError where the folder holds an adapter; ValueError where there is none to save, or the family has no name
      for its place.

    >>> import tempfile
    >>> from rlhf import adapters
    >>> from rlhf.models import TransformerConfig, transformer
    >>> lm = transformer(TransformerConfig(vocab_size=8, hidden_size=4, num_layers=1, num_heads=1, mlp_size=8))
    >>> params = lm.init(jax.random.key(0))
    >>> trainable, frozen = adapters.add(params, jax.random.key(1), rank=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, lm, adapters.join(trainable, frozen), "llama")
    ...     same, _ = load(folder, lm, params, "llama")
    >>> bool((same["layers"]["q"]["a"] == trainable["layers"]["q"]["a"]).all())
    True
    """
    from safetensors.numpy import save_file

    folder = Path(folder)
    if (folder / CONFIG).exists():
        raise FileExistsError(f"{folder} holds an adapter already ({CONFIG}); give a new folder")
    leaves, heads = _leaves(params), decoder_of(config_of(lm)).kv_heads
    rows = list(_matrices(lm, family, leaves))
    adapted, named = {leaf for leaf, w in leaves.items() if is_adapter(w)}, {leaf for _, names, _ in rows for leaf in names}
    if not adapted or adapted - named:
        raise ValueError(
            f"params have adapters at {sorted(adapted) or 'no leaf'}, but a {family} file can name {sorted(named)}"
        )

    tensors: dict[str, np.ndarray] = {}
    modules, transposed = {}, True
    for row, names, of_row in rows:
        if not adapted.intersection(names):
            continue
        transposed &= row.transpose
        for i, module in enumerate(of_row):
            w = _side_by_side([_layer(leaves[name], i if "{}" in row.name else None) for name in names], row, heads)
            ends = {"lora_A.weight": w.a.T, "lora_B.weight": w.b.T, "lora_magnitude_vector": w.magnitude}
            tensors |= {f"{PREFIX}{module}.{end}": np.ascontiguousarray(x) for end, x in ends.items() if x is not None}
            rank = w.a.shape[-1]
            whole, exact = round(float(w.scale) * rank), float(w.scale) * rank
            modules[module] = rank, whole if np.float32(whole / rank) == w.scale else exact
    rank, alpha = Counter(modules.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if lm.encode is None else "SEQ_2_SEQ_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: own for module, (own, _) in modules.items() if own != rank},
        "alpha_pattern": {module: own for module, (_, own) in modules.items() if own != alpha},
        "target_modules": sorted({re.sub(r"^.*\.\d+\.", "", module) for module in modules}),
        "use_dora": any(name.endswith("lora_magnitude_vector") for name in tensors),
        "use_rslora": False,  # whatever gave the scale, it is lora_alpha / r
        "fan_in_fan_out": not transposed,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2))


def load(folder, lm: LM, params: Any, family: str) -> tuple[Any, Any]:
    """An adapter that PEFT or `save` wrote, on the parameters of its base model.

    Where a family keeps several matrices as one, each of ours gets B's columns for it and an A of its own: the same function,
    with more to train.

    Args:
      folder: with adapter_config.json and adapter_model.safetensors.
      lm, params: the base model; plain arrays.
      family: a model type of `FAMILIES`.

    Returns: `(trainable, frozen)`, as `adapters.add` does; what is trained is in at least float32.

    Raises: FileNotFoundError where a file is missing; ValueError where the adapter is of a kind that we lack, or its tensors do
      not fit `params`: missing, left over or of another shape, all of them are named.
    """
    from safetensors.numpy import load_file

    folder = Path(folder)
    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).exists()]:
        raise FileNotFoundError(f"{folder} has no {' and no '.join(missing)}")
    config = json.loads((folder / CONFIG).read_text())
    for field, allowed in ONLY.items():
        if config.get(field, allowed[0]) not in allowed:
            raise ValueError(f"{folder}: {field} = {config[field]!r} is not supported; known: {allowed}")
    tensors, leaves, heads = load_file(folder / WEIGHTS), _leaves(params), decoder_of(config_of(lm)).kv_heads
    wanted: dict[str, tuple] = {}
    rows = []
    for row, names, modules in _matrices(lm, family, leaves):
        if not any(f"{PREFIX}{module}.lora_A.weight" in tensors for module in modules):
            continue
        ranks = [_of(config, "rank_pattern", "r", module) for module in modules]
        alphas = [_of(config, "alpha_pattern", "lora_alpha", module) for module in modules]
        sizes = [leaves[name].shape[-1] for name in names]
        shapes: dict[str, tuple] = {"lora_A.weight": (ranks[0], leaves[names[0]].shape[-2])}
        shapes["lora_B.weight"] = (sum(sizes), ranks[0])
        if config.get("use_dora"):
            shapes["lora_magnitude_vector"] = (sum(sizes),)
        wanted |= {f"{PREFIX}{module}.{end}": shape for module in modules for end, shape in shapes.items()}
        scale = [alpha / (r**0.5 if config.get("use_rslora") else r) for alpha, r in zip(alphas, ranks, strict=True)]
        rows.append((row, names, sizes, modules, list(shapes), np.array(scale, np.float32)))
    _check(wanted, tensors, folder)

    found = {}
    for row, names, sizes, modules, ends, scales in rows:
        read = lambda end, modules=modules: np.stack([tensors[f"{PREFIX}{module}.{end}"].T for module in modules])
        arrays = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (*map(read, ends), scales)]
        first, *rest, share = arrays if "{}" in row.name else [x[0] for x in arrays]
        split_up = [parts_of(x, row._replace(transpose=False), sizes, heads) for x in rest]
        for name, *columns in zip(names, *split_up, strict=True):
            b, *magnitude = map(jnp.array, columns)
            found[name] = LoRAWeight(leaves[name], jnp.array(first), b, jnp.array(share), *magnitude)
    return split(jax.tree_util.tree_map_with_path(lambda path, w: found.get(dotted(path), w), params))


def _leaves(params: Any) -> dict[str, Any]:
    return {dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_adapter)}


def _matrices(lm: LM, family: str, leaves: Mapping[str, Any]) -> Iterator[tuple[Tensor, list[str], list[str]]]:
    """The family's rows of matrices that `leaves` has: the row, our leaves' names, PEFT's names of the modules by layer."""
    config = config_of(lm)
    shapes = {tuple(name.split(".")): (w.base if is_adapter(w) else w).shape for name, w in leaves.items()}
    rows = [row for row in family_of(family).rows(config) if row.name.endswith(".weight") and row.name.count("{}") < 2]
    for row in rows:
        if modules := [name.removesuffix(".weight") for name in places([row], shapes, config)]:
            yield row, row.leaves.split(), modules


def _layer(w: Any, layer: int | None) -> Any:
    """One layer's adapter, without its base, on the host; or one layer's plain matrix."""
    w = jax.device_get(w._replace(base=None)) if is_adapter(w) else w
    return w if layer is None else jax.tree.map(lambda x: x[layer], w)


def _side_by_side(parts: list, row: Tensor, heads: int) -> LoRAWeight:
    """One adapter of several matrices that are one in the file, of which some may have none."""
    if len(parts) == 1:
        return parts[0]
    adapted = [w for w in parts if is_adapter(w)]
    together = lambda columns: joined(columns, row._replace(transpose=False), heads)
    a = np.concatenate([w.a for w in adapted], axis=-1)
    columns, start = [], 0
    for w in parts:
        own = np.zeros((a.shape[-1], (w.b if is_adapter(w) else w).shape[-1]), a.dtype)
        if is_adapter(w):
            own[start : start + len(w.b)] = w.b * (w.scale / adapted[0].scale)
            start += len(w.b)
        columns.append(own)
    whole = adapted[0]._replace(a=a, b=together(columns))
    if whole.magnitude is None:
        return whole
    norms = [w.magnitude if is_adapter(w) else np.linalg.norm(np.asarray(w, np.float32), axis=0) for w in parts]
    return whole._replace(magnitude=together(norms))


def _of(config: Mapping[str, Any], patterns: str, default: str, module: str):
    """A module's rank or alpha, by the first pattern that its name ends with  (PEFT's rule)."""
    own = (x for pattern, x in (config.get(patterns) or {}).items() if re.fullmatch(rf"(.*\.)?({pattern})", module))
    return next(own, config[default])


def _check(wanted: Mapping[str, tuple], tensors: Mapping[str, np.ndarray], folder: Path) -> None:
    other = [name for name in wanted.keys() & tensors.keys() if tensors[name].shape != wanted[name]]
    problems = {
        "missing": sorted(wanted.keys() - tensors.keys()),
        "left over": sorted(tensors.keys() - wanted.keys()),
        "of another shape": [f"{name} {list(tensors[name].shape)} but {list(wanted[name])}" for name in sorted(other)],
    }
    if any(problems.values()):
        found = "; ".join(f"{what}: {', '.join(names)}" for what, names in problems.items() if names)
        raise ValueError(f"the adapter in {folder} does not fit the model: {found}")
