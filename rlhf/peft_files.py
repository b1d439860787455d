"""Adapters as PEFT writes them: adapter_config.json and adapter_model.safetensors.  Read and
written without torch.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf import hosts
from rlhf.adapters import LoRAWeight, dotted, is_adapter, no_target, split
from rlhf.lm import LM
from rlhf.models.families import Tensor
from rlhf.models.huggingface_config import config_of, family_of
from rlhf.models.json_files import read_object
from rlhf.models.mapping import joined, listed, parts_of, places
from rlhf.models.patterns import matches
from rlhf.models.safetensors_files import FLOATS, Stored, header
from rlhf.ranges import above, at_least, between, check

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# PEFT's, before every name of transformers.
PREFIX = "base_model.model."
# Bytes of adapter_config.json: it comes from others, and is read in full.
LIMIT = 16_000_000
# Fields that change what is computed, without a tensor that would show it -> what they may be.
ONLY: Mapping[str, tuple] = {
    "peft_type": ("LORA",),
    # The other ways to start, such as PiSSA, alter the base too, which is not in the file.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "layer_replication": (None,),
    "bias": ("none",),
    "lora_bias": (False, None),
    "target_parameters": (None, []),
    **dict.fromkeys(("modules_to_save", "trainable_token_indices"), (None, [], {})),
    **dict.fromkeys(
        ("arrow_config", "kasa_config", "velora_config", "monteclora_config"), (None, {})
    ),
}
# PEFT's: a file may leave out what has its default.
DEFAULTS = {"r": 8, "lora_alpha": 8}
Rank = Annotated[int, between(1, 100_000)]
Names = str | list[str] | None
FIELDS: Mapping[str, Any] = {
    "r": Rank,
    "lora_alpha": Annotated[float, above(0)],
    **dict.fromkeys(("use_dora", "use_rslora"), bool | None),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), Names),
    "layers_to_transform": Annotated[int, at_least(0)] | list[Annotated[int, at_least(0)]] | None,
}
PATTERNS = {"rank_pattern": Rank, "alpha_pattern": Annotated[float, above(0)]}


def save(folder, lm: LM, params: Any, family: str, *, base: str | None = None) -> None:
    """Writes a folder that `load`, PEFT and vLLM read; adapter_config.json comes last, so that a
    folder with it is whole.

    Adapters of matrices that a family keeps as one (GPT-2's queries, keys and values) go there side
    by side: PEFT's A is ours in a row, its B ours along a diagonal, and its rank the sum of ours.
    What is 0 in A and in B computes nothing and is never trained, as in an adapter that `load`
    found in some layers only or of several ranks: it is left out.

    Args:
      folder: a new folder, or one without an adapter_config.json.
      lm: the model, of `transformer`, `encoder_decoder` or `load`.
      params: with adapters, what `adapters.join` returns.
      family: a model type of `FAMILIES`: it knows the names.
      base: path or Hub name of the base model, which PEFT loads when it is given the folder alone.

    Raises: FileExistsError where the folder holds an adapter; ValueError where there is none to
    save, or the family has no name
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
    leaves = _leaves(params)
    rows = list(_matrices(lm, family, leaves))
    adapted = {leaf for leaf, w in leaves.items() if is_adapter(w)}
    named = {leaf for _, names, _ in rows for leaf in names}
    # An adapter that the file cannot name would be lost without a word.
    if not adapted or adapted - named:
        raise ValueError(
            f"params have adapters at {sorted(adapted) or 'no leaf'}, but a {family} file can name "
            f"{sorted(named)}"
        )

    tensors: dict[str, np.ndarray] = {}
    modules: dict[str, tuple[int, float]] = {}
    ends = set()
    left_out = []
    transposed = True
    for row, names, of_row in rows:
        if not adapted.intersection(names):
            continue
        on_host = [_fetched(leaves[name]) for name in names]
        # GPT-2's Conv1D holds `[in, out]`, as ours; PEFT must know, and has one flag for all.
        transposed &= row.transpose
        for module, at in of_row.items():
            parts = [jax.tree.map(lambda x, at=at: x[at], w) for w in on_host]
            w = _alive(_side_by_side(parts, row))
            if w is None:
                left_out.append(module)
                continue
            # Of experts with the number: in other layers an MLP may end alike.
            ends.add(re.sub(r"^.*?\.\d+\." if len(at) > 1 else r"^.*\.\d+\.", "", module))
            matrices = {
                "lora_A.weight": w.a.T,
                "lora_B.weight": w.b.T,
                "lora_magnitude_vector": w.magnitude,
            }
            tensors |= {
                # safetensors writes the buffer as it lies: a transposed view would be saved
                # untransposed.
                f"{PREFIX}{module}.{end}": np.ascontiguousarray(x)
                for end, x in matrices.items()
                if x is not None
            }
            rank = w.a.shape[-1]
            # `lora_alpha` is a whole number in almost every file: one that gives the same float32
            # scale is written as such, so that what was loaded is saved with the same text.
            exact_alpha = float(w.scale) * rank
            rounded_alpha = round(exact_alpha)
            is_same = np.float32(rounded_alpha / rank) == w.scale
            modules[module] = (rank, rounded_alpha if is_same else exact_alpha)
    if not modules:
        raise ValueError("the adapters are 0 everywhere, A and B alike; there is nothing to save")
    # The most frequent pair is the default; other modules go into the patterns, often none.
    rank, alpha = Counter(modules.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if lm.encode is None else "SEQ_2_SEQ_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, (value, _) in modules.items() if value != rank},
        "alpha_pattern": {name: value for name, (_, value) in modules.items() if value != alpha},
        # Ends of names fit every layer; where some layers are left out, full names say which have
        # one.
        "target_modules": sorted(modules if left_out else ends),
        "use_dora": any(name.endswith("lora_magnitude_vector") for name in tensors),
        # Whatever gave the scale: `lora_alpha` is written so that it is lora_alpha / r.
        "use_rslora": False,
        "fan_in_fan_out": not transposed,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        # Last: a folder with it is complete.
        (folder / CONFIG).write_text(json.dumps(config, indent=2))

    # All processes have fetched the adapters, whose parts lie with each; one writes.
    hosts.of_first(write)


def load(folder, lm: LM, params: Any, family: str) -> tuple[Any, Any]:
    """An adapter that PEFT or `save` wrote, on the parameters of its base model.

    Where a family keeps several matrices as one, each of ours gets B's columns for it and an A of
    its own: the same function, with more to train.  Layers are stacked: those of a smaller rank are
    filled up with zeros, those without an adapter are zero, and stay so while they are trained.

    Args:
      folder: with adapter_config.json and adapter_model.safetensors.
      lm, params: the base model; plain arrays.
      family: a model type of `FAMILIES`.

    Returns: `(trainable, frozen)`, as `adapters.add` does; what is trained is in at least float32.

    Raises: FileNotFoundError where a file is missing; ValueError where the adapter is of a kind
    that we lack, or its tensors do
      not fit `params`: missing, left over or of another shape, all of them are named; where a field
      of adapter_config.json cannot be, or a pattern of it takes too long to match.
    """
    folder = Path(folder)
    config = _config(folder)
    tensors = dict(header(folder / WEIGHTS))
    leaves = _leaves(params)
    known = [
        part
        for part in _matrices(lm, family, leaves)
        if not any(no_target(name, leaves[name]) for name in part[1])
    ]
    of = _Chosen(
        config,
        [module for _, _, modules in known for module in modules],
        _outputs(family, lm),
        folder,
    )
    wanted: dict[str, tuple] = {}
    rows = []
    for row, names, modules in known:
        adapted = [module for module in modules if module in of.targets]
        if not adapted:
            continue
        inputs = leaves[names[0]].shape[-2]
        sizes = [leaves[name].shape[-1] for name in names]
        for module in adapted:
            rank = of.rank(module)
            wanted[f"{PREFIX}{module}.lora_A.weight"] = rank, inputs
            wanted[f"{PREFIX}{module}.lora_B.weight"] = sum(sizes), rank
            if config.get("use_dora"):
                wanted[f"{PREFIX}{module}.lora_magnitude_vector"] = (sum(sizes),)
        if config.get("use_dora") and len(adapted) < len(modules):
            raise ValueError(
                f"{folder}: use_dora in some layers alone is not supported: {adapted[0]} has it, "
                "others not"
            )
        rows.append((row, names, sizes, modules))
    # All names and shapes before any tensor is read: one message names all that is wrong.
    _check(wanted, tensors, folder)

    found = {}
    for row, names, sizes, modules in rows:
        parts = [
            _read_layer(tensors, module, of, leaves[names[0]].shape[-2], sum(sizes), modules)
            for module in modules
        ]
        # A and the scale are the same for all matrices of a row; B and the magnitude are split by
        # their outputs, as the base's columns are.
        first, *rest = (
            np.stack(arrays).reshape((*leaves[names[0]].shape[:-2], *np.shape(arrays[0])))
            for arrays in zip(*parts, strict=True)
        )
        share, *rest = rest
        split_up = [parts_of(x, row._replace(transpose=False), sizes) for x in rest]
        for name, *columns in zip(names, *split_up, strict=True):
            b, *magnitude = map(jnp.array, columns)
            found[name] = LoRAWeight(
                leaves[name], jnp.array(first), b, jnp.array(share), *magnitude
            )
    return split(
        jax.tree_util.tree_map_with_path(lambda path, w: found.get(dotted(path), w), params)
    )


def _config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, its fields held against their kinds and ranges, PEFT's defaults filled
    in.
    """
    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).exists()]:
        pickled = "; adapter_model.bin is a pickle: load it with PEFT and save_pretrained it again"
        hint = pickled if (folder / "adapter_model.bin").exists() else ""
        raise FileNotFoundError(f"{folder} has no {' and no '.join(missing)}{hint}")
    config = DEFAULTS | read_object(folder / CONFIG, LIMIT)
    for field, allowed in ONLY.items():
        if config.get(field, allowed[0]) not in allowed:
            cure = (
                "; merge it with PEFT (merge_and_unload) and load the model"
                if field in ("bias", "modules_to_save")
                else ""
            )
            raise ValueError(
                f"{folder}: {field} = {config[field]!r:.80} is not supported; known: "
                f"{allowed}{cure}"
            )
    try:
        check(FIELDS, config)
        for field, kind in PATTERNS.items():
            entries = config.get(field) or {}
            if not isinstance(entries, dict):
                raise ValueError(
                    f"{field} must be an object of patterns and numbers, but is {entries!r:.80}"
                )
            check(
                {f"{field}.{name}": kind for name in entries},
                {f"{field}.{name}": x for name, x in entries.items()},
            )
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    return config


class _Chosen:
    """Which modules have an adapter, of what rank and share, by PEFT's rules."""

    def __init__(
        self, config: Mapping[str, Any], modules: list[str], outputs: set[str], folder: Path
    ):
        self.config = config
        targets = config.get("target_modules")
        # PEFT matches such a pattern with the end of a module's name, after a dot.
        ends = [rf"(.*\.)?({pattern})" for field in PATTERNS for pattern in config.get(field) or {}]
        listed = [
            field
            for field in ("target_modules", "exclude_modules")
            if isinstance(config.get(field), str)
        ]
        # PEFT's word for all linear layers but the output's.
        every = isinstance(targets, str) and targets.lower() == "all-linear"
        full_names: list[str] = [
            config[field] for field in listed if not (every and field == "target_modules")
        ]
        layers = config.get("layers_to_transform")
        stacks = config.get("layers_pattern") or r"[^.]*"
        of_layers = [
            rf"(?:.*?\.)?{stack}\.\d+\..*"
            for stack in ([stacks] if isinstance(stacks, str) else stacks)
        ]
        using = layers not in (None, []) and not isinstance(targets, str)
        patterns: list[str] = [*ends, *full_names, *(of_layers if using else [])]
        try:
            # All patterns at once and within a time limit: a file's expression may take for ever.
            self.matched = matches(patterns, modules)
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG}: {error}") from error

        # A text is a pattern of the full name; a list holds names, which a module ends with.
        def named(given: str | list[str] | None, module: str) -> bool:
            if isinstance(given, str):
                return module in self.matched[given]
            return any(module == name or module.endswith(f".{name}") for name in given or ())

        chosen = [
            module
            for module in modules
            if (module not in outputs if every else named(targets, module))
        ]
        if using:
            numbers = layers if isinstance(layers, list) else [layers]
            inside = {module for pattern in of_layers for module in self.matched[pattern]}
            chosen = [
                module for module in chosen if module in inside and _number(module) in numbers
            ]
        self.targets = {
            module for module in chosen if not named(config.get("exclude_modules"), module)
        }

    def rank(self, module: str) -> int:
        return self._of("rank_pattern", "r", module)

    def share(self, module: str) -> float:
        rank = self.rank(module)
        return self._of("alpha_pattern", "lora_alpha", module) / (
            rank**0.5 if self.config.get("use_rslora") else rank
        )

    def _of(self, patterns: str, default: str, module: str):
        """A module's rank or alpha, by the first pattern that its name ends with."""
        entries = (self.config.get(patterns) or {}).items()
        of_module = (x for pattern, x in entries if module in self.matched[rf"(.*\.)?({pattern})"])
        return next(of_module, self.config[default])


def _number(module: str) -> int | None:
    """The layer of a module: the first number in its name."""
    found = re.search(r"\.(\d+)\.", module)
    return int(found[1]) if found else None


def _outputs(family: str, lm: LM) -> set[str]:
    rows = family_of(family).rows(config_of(lm))
    return {row.name.removesuffix(".weight") for row in rows if row.leaves == "unembedding"}


def _read_layer(
    tensors: Mapping[str, Stored],
    module: str,
    of: _Chosen,
    inputs: int,
    outputs: int,
    modules: Mapping[str, Any],
) -> tuple:
    """A module's A, share, B and, for DoRA, magnitude, with zeros up to the largest rank; zeros
    alone without an adapter.

    What is 0 in A and in B stays so: neither has a gradient.
    """
    # Layers are one stacked array: the largest rank is that of all, and zeros fill the others.
    largest = max(of.rank(other) for other in modules if other in of.targets)
    if module not in of.targets:
        return (
            np.zeros((inputs, largest), np.float32),
            np.float32(1),
            np.zeros((largest, outputs), np.float32),
        )

    # PyTorch's linear layers hold `[out, in]`, ours `[in, out]`.
    def read(name: str) -> np.ndarray:
        return tensors[f"{PREFIX}{module}.{name}"].read().T

    rank = of.rank(module)
    a = np.pad(read("lora_A.weight"), ((0, 0), (0, largest - rank)))
    b = np.pad(read("lora_B.weight"), ((0, largest - rank), (0, 0)))
    magnitude = [read("lora_magnitude_vector")] if of.config.get("use_dora") else []
    a, b, *magnitude = (
        x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (a, b, *magnitude)
    )
    return a, np.float32(of.share(module)), b, *magnitude


def _alive(w: LoRAWeight) -> LoRAWeight | None:
    """An adapter without what is 0 in A and in B; None where that is all of it."""
    is_used = np.any(np.asarray(w.a) != 0, axis=0) | np.any(np.asarray(w.b) != 0, axis=1)
    if w.magnitude is not None:
        # A magnitude computes something even where A and B are 0; PEFT needs a rank of at least 1.
        is_used[0] = True
    return w._replace(a=w.a[:, is_used], b=w.b[is_used]) if is_used.any() else None


def _leaves(params: Any) -> dict[str, Any]:
    return {
        dotted(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_adapter)
    }


def _matrices(
    lm: LM, family: str, leaves: Mapping[str, Any]
) -> Iterator[tuple[Tensor, list[str], dict[str, tuple[int, ...]]]]:
    """The family's rows of matrices that `leaves` has: the row, our leaves' names, and where in
    them each of PEFT's modules lies.

    Experts that a file has in one tensor are no modules to PEFT, and left out.
    """
    config = config_of(lm)
    shapes = {
        tuple(name.split(".")): (w.base if is_adapter(w) else w).shape for name, w in leaves.items()
    }
    rows = [row for row in family_of(family).rows(config) if row.name.endswith(".weight")]
    for row in rows:
        modules = {
            name.removesuffix(".weight"): place.at
            for name, place in places([row], shapes, config).items()
            if len(shapes[place.leaves[0]]) == len(place.at) + 2
        }
        if modules:
            yield row, row.leaves.split(), modules


def _fetched(w: Any) -> Any:
    """An adapter without its base, which is large and is not written, on the host; or a plain
    matrix as it is.
    """
    return jax.device_get(hosts.fetch(w._replace(base=None))) if is_adapter(w) else w


def _side_by_side(parts: list, row: Tensor) -> LoRAWeight:
    """One adapter of several matrices that are one in the file, of which some may have none."""
    if len(parts) == 1:
        return parts[0]
    adapted = [w for w in parts if is_adapter(w)]

    # `transpose=False`: these are columns of ours already, not of the file.
    def join_columns(columns):
        return joined(columns, row._replace(transpose=False))

    # A of all parts stands in a row, so that B must be block diagonal: a part's columns are 0 but
    # in the rows of its own A.  The file has one scale: the others' goes into their B.
    a = np.concatenate([w.a for w in adapted], axis=-1)
    columns = []
    start = 0
    for w in parts:
        b = np.zeros((a.shape[-1], (w.b if is_adapter(w) else w).shape[-1]), a.dtype)
        if is_adapter(w):
            b[start : start + len(w.b)] = w.b * (w.scale / adapted[0].scale)
            start += len(w.b)
        columns.append(b)
    merged = adapted[0]._replace(a=a, b=join_columns(columns))
    if merged.magnitude is None:
        return merged
    # The norm of a matrix without an adapter is the magnitude that changes nothing of it.
    norms = [
        w.magnitude if is_adapter(w) else np.linalg.norm(np.asarray(w, np.float32), axis=0)
        for w in parts
    ]
    return merged._replace(magnitude=join_columns(norms))


def _check(wanted: Mapping[str, tuple], tensors: Mapping[str, Stored], folder: Path) -> None:
    # Shapes are read from the file's header, before any tensor.
    other = [name for name in wanted.keys() & tensors.keys() if tensors[name].shape != wanted[name]]
    problems = {
        "missing": sorted(wanted.keys() - tensors.keys()),
        "left over": sorted(tensors.keys() - wanted.keys()),
        "not of floats": sorted(name for name in tensors if tensors[name].dtype not in FLOATS),
        "of another shape": [
            f"{name} {list(tensors[name].shape)} but {list(wanted[name])}" for name in sorted(other)
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{what}: {listed(names)}" for what, names in problems.items() if names)
        raise ValueError(f"the adapter in {folder} does not fit the model: {found}")
