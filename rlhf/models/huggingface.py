"""Folders as Hugging Face writes them: config.json, safetensors, tokenizer.  Read and written
without torch.
"""

import json
import math
import os
import re
import shutil
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlhf import hosts
from rlhf.lm import LM, Head, Params
from rlhf.models import huggingface_config as configs
from rlhf.models import language_part, mapping, mxfp4
from rlhf.models.config import Config, TransformerConfig
from rlhf.models.families import Family, Tensor
from rlhf.models.families.table import numberless
from rlhf.models.heads import classifier_head, scalar_head
from rlhf.models.safetensors_files import DTYPES, FLOATS, INDEX, WEIGHTS, find, has_weights
from rlhf.models.tokenizer_files import BESIDE, FAST, OLDER
from rlhf.models.tokenizer_files import read as _tokenizer
from rlhf.sharding import shardings

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
TOKENIZER = (FAST, *BESIDE, *OLDER)
# TRL's names.
VALUE_HEAD = (
    Tensor("v_head.summary.weight", "weight", ones=(0,)),
    Tensor("v_head.summary.bias", "bias", ones=(0,)),
)
# Of files from before PyTorch's names, such as bert-base-uncased's.
OLD_NORMS = {"gamma": "weight", "beta": "bias"}
SHARD = 5_000_000_000  # bytes of a file when a model is written
# What is downloaded of a name on the Hub: no pickles, which are large and are not read.
READ = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


def load(
    path_or_name,
    *,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    say: Callable | None = None,
    shapes_only: bool = False,
    text_only: bool = False,
    **fields,
) -> tuple[LM, Params, Any]:
    """A language model, its parameters and its tokenizer, from a folder or a name of the Hugging
    Face Hub.

    Tensors go one at a time from the files to the devices; the host holds little more than they do.

    Args:
      path_or_name: a folder with config.json and model.safetensors, or several files and
        model.safetensors.index.json; or a name like `Qwen/Qwen2.5-0.5B`, which is downloaded once
        (or found in the Hub's cache).
      dtype: of the computation, and of the parameters.
      mesh: every parameter is born where its axes say on this mesh; None: on the default device.
      say: as in `rlhf.sharding.shardings`, for sizes that the mesh does not divide.
      shapes_only: shapes with their places instead of parameters; of the weights only the files'
        headers are read, and config.json alone will do where there are none.
      text_only: of a model that reads images or sounds too, the language model alone.
      fields: of `TransformerConfig`, in place of what the folder says: `remat="full"`;
        `param_dtype=jnp.float32` keeps float32 master copies beside a computation in bfloat16.

    Returns: `(lm, params, tokenizer)`.  Layers are stacked, `[num_layers, ...]`; the tokenizer is
    that of `load_tokenizer`, and None where the folder has none.

    Raises: ValueError where a file is broken, a field of the config cannot be, the family is not
      known, the config asks for what `TransformerConfig` does not span, or tensors are missing,
      left over, of another shape or cut off: the file and the field or the tensors are named,
      before any array is made.  FileNotFoundError where a file is missing.

    >>> import tempfile
    >>> from rlhf.models import TransformerConfig, transformer
    >>> lm = transformer(TransformerConfig(vocab_size=8, hidden_size=4, num_layers=2, num_heads=1, mlp_size=8))
    >>> params = lm.init(jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, lm, params)
    ...     again, same, tokenizer = load(folder)
    >>> again == lm, bool((same["layers"]["q"] == params["layers"]["q"]).all()), tokenizer
    (True, True, None)
    """
    folder, _, family, config, tensors = _found(
        path_or_name,
        {"dtype": dtype, "param_dtype": dtype, **fields},
        shapes_only,
        text_only,
    )
    lm = configs.lm_of(config)
    parts = {"lm": (lm, family.rows(config, tensors))}
    params = _read(folder, family, config, tensors, parts, mesh, say, shapes_only)
    return lm, params["lm"], _tokenizer(folder)


def load_classifier(
    path_or_name,
    *,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    say: Callable | None = None,
    **fields,
):
    """A reward model, process reward model or classifier: a trunk and a `Head`.

    Args:
      path_or_name: a folder with config.json and safetensors, or a name on the Hugging Face Hub.
      dtype: of the computation, and of the parameters.
      mesh: every parameter is created where its axes say on this mesh; None: on the default device.
      say: called with a line for every size that the mesh does not divide.
      fields: of `TransformerConfig`, in place of what the folder says.

    Returns: `(lm, head, params, tokenizer)`, params being `{"lm": …, "head": …}`.
    `rollouts.classify` reads texts with them.

    Raises: ValueError for an encoder-decoder, and where a file is broken, the family is not known
    or tensors do not fit the config; FileNotFoundError where a file is missing.
    """
    folder, hf, family, config, tensors = _trunk(path_or_name, dtype, fields)
    of_tokens = _of_tokens(hf)
    lm = configs.lm_of(config)
    head = _head(config, family, hf.num_labels, of_tokens)
    parts = {"lm": (lm, family.rows(config, tensors)), "head": (head, family.head_rows(of_tokens))}
    return lm, head, _read(folder, family, config, tensors, parts, mesh, say), _tokenizer(folder)


def load_for_classification(
    path_or_name,
    labels: int,
    *,
    of_tokens: bool = False,
    key: Any = None,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    say: Callable | None = None,
    shapes_only: bool = False,
    text_only: bool = False,
    **fields,
):
    """A trunk and a `Head` to train: of the head what the files have is taken, and the rest is new.

    So transformers does it: a language model gets a new head, an encoder keeps the pooler that it
    was pre-trained with, and a classifier continues from its head.  New labels start at 0, an inner
    layer at random.  An output matrix is left out.

    Args:
      path_or_name: a decoder (Llama, Qwen, …) or an encoder (BERT, RoBERTa, DistilBERT), with a
        head or without.
      labels: numbers a text; 1 for a reward.
      of_tokens: a classifier of every token, such as a process reward model, rather than of full
        texts.
      key: of what is random; None: `jax.random.key(0)`.
      dtype: of the computation, and of the parameters.
      mesh: every parameter is created where its axes say on this mesh; None: on the default device.
      say: called with a line for every size that the mesh does not divide.
      text_only: as in `load`.
      fields: of `TransformerConfig`, in place of what the folder says.

    Returns: `(lm, head, params, tokenizer)`, params being `{"lm": …, "head": …}`.

    Raises: ValueError for an encoder-decoder, a classifier of another kind or with other labels,
    and where a file is broken or tensors do not fit; FileNotFoundError where a file is missing.
    """
    folder, hf, family, config, tensors = _trunk(
        path_or_name, dtype, fields, shapes_only, text_only
    )
    rows = family.head_rows(of_tokens)
    # A stored head that does not fit is refused: to replace it silently would lose its training.
    found = next(
        (
            row.name
            for row in (*family.head, *rows)
            if row.leaves == "weight" and row.name in tensors
        ),
        None,
    )
    if found and _of_tokens(hf) != of_tokens:
        kinds = {True: "tokens", False: "whole texts"}
        raise ValueError(
            f"{folder} is a classifier of {kinds[not of_tokens]} ({found}), but one of "
            f"{kinds[of_tokens]} is wanted; give the "
            "model that it was made from"
        )
    if found and (had := tensors[found].shape[0]) != labels:
        raise ValueError(
            f"{folder} is a classifier with {had} labels ({found}), but {labels} "
            f"{'is' if labels == 1 else 'are'} wanted; "
            f"give the model that it was made from, or a classifier with {labels}"
        )
    lm = configs.lm_of(config)
    head = _head(config, family, labels, of_tokens)
    # Of the head those rows alone that the files have; the rest comes from `head.init` below.
    stored = tuple(row for row in rows if row.name in tensors)
    outputs = {row.name for row in family.rows(config) if row.leaves.startswith("unembedding")}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in outputs}
    params = _read(
        folder,
        family,
        config,
        tensors,
        {"lm": (lm, family.rows(config, tensors)), "head": (head, stored)},
        mesh,
        say,
        shapes_only,
    )
    fresh = head.init(jax.random.key(0) if key is None else key)
    # Zeros: all labels start equally likely, and rewards at 0, whatever the key.
    fresh["weight"] = jnp.zeros_like(fresh["weight"])
    return lm, head, params | {"head": fresh | params["head"]}, _tokenizer(folder)


def _trunk(
    path_or_name,
    dtype: Any,
    fields: Mapping[str, Any],
    shapes_only: bool = False,
    text_only: bool = False,
):
    """What `_found` returns, of a model without an output matrix."""
    config = read_config(path_or_name)
    if not isinstance(config, TransformerConfig):
        raise ValueError(
            f"{path_or_name} is an encoder-decoder ({model_type(path_or_name)}), which cannot be a "
            "classifier here; take a "
            "decoder (Llama, Qwen, …) or an encoder (BERT, RoBERTa, DistilBERT)"
        )
    fields = {"dtype": dtype, "param_dtype": dtype, **fields, "unembeds": False}
    return _found(path_or_name, fields, shapes_only, text_only)


def _head(trunk: TransformerConfig, family: Family, labels: int, of_tokens: bool) -> Head:
    # Encoders, which are not causal, are read at their first token, and their heads have biases.
    return classifier_head(
        trunk.hidden_size,
        labels,
        bias=of_tokens or not trunk.causal,
        inner=None if of_tokens else family.head_inner,
        reads="every" if of_tokens else "last" if trunk.causal else "first",
        dtype=trunk.param_dtype,
    )


def _of_tokens(hf) -> bool:
    return any(name.endswith("ForTokenClassification") for name in hf.architectures or ())


def load_with_value(
    path_or_name,
    *,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    say: Callable | None = None,
    **fields,
):
    """A language model with a value head: TRL's `AutoModelForCausalLMWithValueHead` and its Seq2Seq
    twin.

    The head is the files' `v_head.summary`; where they have none it is new, and zero.

    Args:
      path_or_name: a folder with config.json and safetensors, or a name on the Hugging Face Hub.
      dtype: of the computation, and of the parameters.
      mesh: every parameter is created where its axes say on this mesh; None: on the default device.
      say: called with a line for every size that the mesh does not divide.
      fields: of `TransformerConfig`, in place of what the folder says.

    Returns: `(lm, head, params, tokenizer)`, params being `{"lm": …, "head": …}`; `head` is a
    `scalar_head`.

    Raises: ValueError where a file is broken, the family is not known or tensors do not fit the
    config; FileNotFoundError where a file is missing.
    """
    folder, _, family, config, tensors = _found(
        path_or_name, {"dtype": dtype, "param_dtype": dtype, **fields}
    )
    lm = configs.lm_of(config)
    last = configs.decoder_of(config)
    head = scalar_head(last.embed_size or last.hidden_size, dtype=last.param_dtype)
    parts: dict[str, tuple[Any, Any]] = {"lm": (lm, family.rows(config, tensors))}
    if any(name.startswith("v_head.") for name in tensors):
        parts["head"] = head, VALUE_HEAD
    params = _read(folder, family, config, tensors, parts, mesh, say)
    return lm, head, {"head": head.init(jax.random.key(0)), **params}, _tokenizer(folder)


def read_config(path_or_name, **fields) -> Config:
    """What config.json says, in today's keys or those of transformers 4, with `fields` of
    `TransformerConfig` put in place.

    Raises: ValueError where config.json is broken, the family is not known or a field cannot be;
    FileNotFoundError where it is missing.

    >>> import tempfile
    >>> from rlhf.models import TransformerConfig, transformer
    >>> lm = transformer(TransformerConfig(vocab_size=8, hidden_size=4, num_layers=1, num_heads=1, mlp_size=8))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, lm, lm.init(jax.random.key(0)))
    ...     read_config(folder, dtype=jnp.bfloat16).dtype.__name__
    'bfloat16'
    """
    return configs.replaced(configs.read(_folder(path_or_name))[1], **fields)


def load_tokenizer(path_or_name, *, eos_token: str | None = None) -> Any:
    """The tokenizer of a folder or a name: tokenizer.json as it stands, or what transformers
    makes of vocab.json and merges.txt, vocab.txt or a sentencepiece model.

    Args:
      path_or_name: of the model.
      eos_token: the end token in place of the one that its files name; None: theirs.

    Raises: ValueError where there is none, it has no such end token, or a file of it or the
    config.json beside it cannot be;
      FileNotFoundError where the folder is missing.
    """
    folder = _folder(path_or_name)
    # The model of this folder is loaded next: what is wrong with its config is reported before a
    # data set is read and tokenised.
    if (folder / configs.CONFIG).exists():
        configs.read(folder)
    tokenizer = _tokenizer(folder)
    if tokenizer is None:
        if not (folder / configs.CONFIG).exists():
            raise FileNotFoundError(
                f"{path_or_name} has no config.json and no tokenizer.json; it holds no model"
            )
        raise ValueError(
            f"{path_or_name}: no tokenizer.json; put the tokenizer's files beside the model"
        )
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            near = [token for token in tokenizer.added_tokens_encoder if token][:20]
            raise ValueError(
                f"eos_token {eos_token!r} is no token of {path_or_name}, whose added tokens are "
                f"{', '.join(near) or 'none'}"
            )
        tokenizer.eos_token = eos_token
    return tokenizer


def end_ids(path_or_name, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a completion: the tokenizer's end token, and those that
    generation_config.json and config.json name (some models have several).

    Raises: ValueError where generation_config.json or config.json cannot be, or an id is beyond the
    vocabulary.
    """
    named = configs.end_ids(_folder(path_or_name))
    return tuple(sorted(named | configs.ids(tokenizer.eos_token_id)))


def decoder_start(path_or_name) -> int | None:
    """The token from which an encoder-decoder's decoder starts, `decoder_start_token_id` of
    config.json.
    """
    return getattr(
        configs.transformers_config(_folder(path_or_name)), "decoder_start_token_id", None
    )


def trained_positions(path_or_name) -> int | None:
    """`max_position_embeddings` of config.json, the most tokens that the model was made for; None
    where it names no number.
    """
    return getattr(
        configs.transformers_config(_folder(path_or_name)), "max_position_embeddings", None
    )


def model_type(path_or_name) -> str:
    """The family that config.json names, a key of `FAMILIES`."""
    return configs.transformers_config(_folder(path_or_name)).model_type


def save(
    folder,
    lm: LM,
    params: Params,
    *,
    head: Params | None = None,
    value_head: Params | None = None,
    like=None,
    tokenizer=None,
    family: str | None = None,
    dtype: Any = None,
    shard_bytes: int = SHARD,
    **fields,
) -> None:
    """Writes a folder that `load`, transformers and vLLM read; config.json comes last, so that a
    folder with it is complete.

    Args:
      folder: a new folder, or one without a model's config.json and weights.
      lm, params: of `transformer`, `encoder_decoder` or `load`.
      head: parameters of a `classifier_head`, or of a `scalar_head` with bias 0: a reward model or
        classifier is written, and no output matrix.  Its config gets the tokenizer's padding, by
        which transformers finds where texts of a batch end; where there is none the end token is
        it, in the tokenizer too.
      value_head: parameters of a `scalar_head`, written beside the language model as TRL has it.
      like: the folder or name that the model was loaded from: its config.json,
        generation_config.json and tokenizer are written again, so that nothing of them is lost.
      tokenizer: saved beside the model; without `like`, its ids of start, end and padding go into
        the config.  Its end token is among those of generation_config.json, so that transformers
        stops where `end_ids` says.
      family: a model type of `FAMILIES`, without `like`; None: the first that can express the
        config, "llama" for Llama's.
      dtype: of the tensors in the files, and in config.json; None: the one that the parameters
        have.  `stored_dtype(like)` keeps the original's, where the parameters are masters in
        float32.
      shard_bytes: the most bytes of a file; larger models are written as several files and an
        index.
      fields: of config.json, for what `TransformerConfig` does not hold:
        `max_position_embeddings=…`, `eos_token_id=[…]`.

    Raises: FileExistsError where the folder holds a model; ValueError where the family cannot
    express the config, or `like` has
      another one, naming the fields, or `params` are not the model's.

    >>> import tempfile
    >>> from rlhf.models import TransformerConfig, transformer
    >>> lm = transformer(TransformerConfig(vocab_size=8, hidden_size=4, num_layers=1, num_heads=1, mlp_size=8))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, lm, lm.init(jax.random.key(0)), max_position_embeddings=512)
    ...     sorted(file.name for file in Path(folder).iterdir())
    ['config.json', 'generation_config.json', 'model.safetensors']
    """
    folder = Path(folder)
    config = configs.config_of(lm)
    hosts.of_first(lambda: _check_free(folder))
    fields = {"dtype": str(jnp.dtype(dtype or jax.tree.leaves(params)[0].dtype)), **fields}
    original = None if like is None else _folder(like)
    if original is None:
        hf = configs.described(
            config, family, {**{name: getattr(tokenizer, name, None) for name in IDS}, **fields}
        )
    else:
        hf = configs.described_as(original, config, fields)
    # The trunk of a classifier has no output matrix, in its files as in transformers.
    if head is not None and isinstance(config, TransformerConfig):
        config = configs.replaced(config, unembeds=False)
        params = {name: x for name, x in params.items() if not name.startswith("unembedding")}
    known = configs.family_of(hf.model_type)
    flat = mapping.flat(params)
    shapes = _shapes(configs.lm_of(config))
    if wrong := _misfits(flat, shapes):
        raise ValueError(f"params are not the config's: {'; '.join(wrong)}")
    # The experts' tensors as the original has them.
    names = _stored(original) if original is not None and has_weights(original) else ()
    rows = known.rows(config, names)
    tensors = list(mapping.write(mapping.places(rows, shapes, config), flat))
    if head is not None:
        leaves = mapping.flat(_with_labels(head))
        # Of the heads that `_head` makes, those of tokens alone have a bias and no inner layer.
        of_tokens = ("bias",) in leaves and ("inner",) not in leaves
        rows = known.head_rows(of_tokens)
        tensors += mapping.write(
            mapping.places(rows, {k: v.shape for k, v in leaves.items()}, config), leaves
        )
        hf.update(_of_classifier(hf, known, leaves, of_tokens))
        # transformers finds a decoder's last token by its padding; encoders are read at their
        # first.
        if tokenizer is not None and configs.decoder_of(config).causal:
            hf.pad_token_id = _padding(tokenizer)
    if value_head is not None:
        leaves = mapping.flat(value_head)
        tensors += mapping.write(
            mapping.places(VALUE_HEAD, {k: v.shape for k, v in leaves.items()}, config),
            leaves,
        )

    def size(leaf):
        return leaf.size * jnp.dtype(dtype or leaf.dtype).itemsize

    _write_files(folder, _in_dtype(tensors, dtype), sum(map(size, flat.values())), shard_bytes)

    def write_rest() -> None:
        _write_companions(folder, hf, tokenizer, original, padded=head is not None)
        # Last: a folder whose writing was interrupted has no config.json, and nobody takes it for a
        # model.
        hf.save_pretrained(folder)

    hosts.of_first(write_rest)


def _check_free(folder: Path) -> None:
    if held := [
        file.name
        for name in ("config.json", "model*.safetensors", INDEX)
        for file in sorted(folder.glob(name))
    ]:
        raise FileExistsError(f"{folder} holds a model already ({held[0]}); give a new folder")


def stored_dtype(path_or_name) -> Any:
    """The dtype that most of a model's numbers have in its files.

    Raises: ValueError where a file is broken; FileNotFoundError where one is missing.

    >>> import tempfile
    >>> from rlhf.models import TransformerConfig, transformer
    >>> lm = transformer(TransformerConfig(vocab_size=8, hidden_size=4, num_layers=1, num_heads=1, mlp_size=8))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, lm, lm.init(jax.random.key(0)), dtype=jnp.bfloat16)
    ...     str(stored_dtype(folder))
    'bfloat16'
    """
    # By numbers rather than tensors: some files hold norms, many small vectors, in float32.
    numbers: Counter = Counter()
    for stored in find(_folder(path_or_name)).values():
        if stored.dtype in FLOATS:
            numbers[stored.dtype] += math.prod(stored.shape)
    return jnp.dtype(DTYPES[numbers.most_common(1)[0][0]]) if numbers else jnp.dtype(jnp.float32)


def _folder(path_or_name) -> Path:
    """The folder itself, or a name's in the Hub's cache, downloaded if it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    # `os.path.isdir` is False for paths that no system call takes, where `Path.is_dir` raises.
    if os.path.isdir(path_or_name):
        return Path(path_or_name)
    # What is there but no folder must not become a name to download.
    if os.path.lexists(path_or_name):
        loop = os.path.islink(path_or_name) and not os.path.exists(path_or_name)
        what = "a link to nothing" if loop else "a file"
        raise FileNotFoundError(
            f"{path_or_name} is {what}, but a model is a folder with config.json and "
            "model.safetensors"
        )
    nowhere = (
        f"{str(path_or_name)[:200]} is no folder, and no name that the Hub or its cache on this "
        "machine has; to download it by "
        "hand: hf download NAME --local-dir FOLDER"
    )
    try:
        return Path(snapshot_download(str(path_or_name), allow_patterns=READ))
    except HFValidationError as error:
        raise FileNotFoundError(nowhere) from error
    except Exception as error:
        # Of the Hub, the network and the disk, as many kinds as there are versions.
        why = textwrap.shorten(str(error), 200, placeholder=" …")
        raise FileNotFoundError(f"{nowhere} ({type(error).__name__}: {why})") from error


def _found(
    path_or_name, fields: Mapping[str, Any], shapes_only: bool = False, text_only: bool = False
):
    """`(folder, transformers' config, family, our config, tensors)`; tensors by their full names,
    and nothing of them read.  `shapes_only` needs none.
    """
    folder = _folder(path_or_name)
    hf, config = configs.read(folder)
    if (senses := configs.senses(folder)) and not text_only:
        raise ValueError(
            f"{path_or_name} has parts beside its language model ({', '.join(senses)}), which are "
            "not loaded here; rlhf.load(…, text_only=True), or --text_only of a recipe, leaves "
            "them out"
        )
    configs.generation(folder, hf.vocab_size)
    family = configs.family_of(hf.model_type)
    config = configs.replaced(config, **fields)
    stored_tensors: Mapping[str, Any] = {}
    if not shapes_only or has_weights(folder):
        stored_tensors = _stored(folder)
    if configs.quantised_by(hf) == mxfp4.METHOD:
        stored_tensors = mxfp4.unpacked(stored_tensors)
    tensors = {_full_name(name, family, config): stored for name, stored in stored_tensors.items()}
    # Some files store an output matrix of its own beside a config that ties it: the files are
    # right, as transformers has it.
    if configs.decoder_of(config).tied and _differ(tensors, family.rows(config)):
        config = configs.replaced(config, tied=False)
    return folder, hf, family, config, tensors


def _stored(folder: Path) -> Mapping[str, Any]:
    """The tensors of a folder; of a model that reads images or sounds too its language model's, by
    the names that they have in a file of it alone.
    """
    stored = find(folder)
    if not configs.senses(folder):
        return stored
    return {name: stored[there] for there, name in language_part.names(stored).items()}


def _with_labels(head: Params) -> Params:
    """A head's parameters, with an axis for the labels."""
    if jnp.ndim(head["weight"]) == 2:
        return head
    if float(head["bias"]) != 0.0:
        raise ValueError(
            f"Hugging Face's reward heads have no bias, but this one is {float(head['bias'])}; "
            "subtract it from the rewards"
        )
    return {"weight": head["weight"][:, None]}


def _of_classifier(hf, family: Family, leaves: Mapping, of_tokens: bool) -> dict:
    """Fields of a config that say what kind of classifier a model is, where they do not yet."""
    task = "Token" if of_tokens else "Sequence"
    labels = leaves[("weight",)].shape[-1]
    if any(name.endswith(f"For{task}Classification") for name in hf.architectures or ()):
        return {}
    stem = re.sub("(ForCausalLM|LMHeadModel|Model)$", "", family.architecture)
    return {"architectures": [f"{stem}For{task}Classification"], "num_labels": labels}


# --- tensors ----------------------------------------------------------------------


def _read(
    folder: Path,
    family: Family,
    config: Config,
    tensors,
    parts: Mapping[str, tuple[Any, Any]],
    mesh,
    say,
    shapes_only: bool = False,
) -> dict[str, Params]:
    """The parameters of each part, `(LM or Head, rows)`, once all tensors are known to fit."""
    leaves = {name: _leaves(part) for name, (part, _) in parts.items()}
    if shapes_only and not tensors:
        return {
            name: mapping.nested(_shaped(leaves[name], part, mesh, say))
            for name, (part, _) in parts.items()
        }
    last = configs.decoder_of(config)
    # Counted before any name is made: a config could claim millions of layers or experts.
    if (least := mapping.least(config, parts["lm"][1])) > len(tensors):
        raise ValueError(
            f"{folder / configs.CONFIG} describes {last.num_layers} layers (num_hidden_layers) "
            f"with {last.experts.number if last.experts else 0} experts, so "
            f"at least {least:,} tensors, but the files have {len(tensors)}"
        )
    shapes = {name: {path: leaf.shape for path, leaf in leaves[name].items()} for name in parts}
    places = {name: mapping.places(rows, shapes[name], config) for name, (_, rows) in parts.items()}
    outputs = _outputs(family.rows(config))

    # A tied output matrix may be stored a second time; that it is the same was checked in `_found`.
    def unused(name):
        return re.search(family.ignored, name) or (last.tied and name in outputs)

    if found := mapping.problems([(places[name], shapes[name]) for name in parts], tensors, unused):
        hints = {
            "score.": "load_classifier reads models with a head",
            "classifier.": "load_classifier reads models with a head",
            "v_head.": "load_with_value reads models with a value head",
        }
        hint = next(
            (f"; {cure}" for name, cure in hints.items() if "head" not in parts and name in found),
            "",
        )
        if not hint and not last.tied and any(f"missing: {name}" in found for name in outputs):
            hint = (
                "; tie_word_embeddings is false, but the files have no output matrix; set it true"
            )
        raise ValueError(f"the tensors of {folder} do not fit its config: {found}{hint}")
    if mesh:
        _check_heads(last, mesh.shape.get("tensor", 1), say)
    out = {}
    for name, (part, _) in parts.items():
        shaped = _shaped(leaves[name], part, mesh, say)
        if shapes_only:
            out[name] = mapping.nested(shaped)
            continue

        # The default binds this part's shapes; a closure would see the last part's.
        def put(path, x, shaped=shaped):
            return _put(x, shaped[path].sharding)

        out[name] = mapping.nested(mapping.read(places[name], tensors, leaves[name], put))
    return out


def _check_heads(config: TransformerConfig, tensor: int, say: Callable | None) -> None:
    """Says, or without `say` raises, that a mesh does not divide the heads of attention."""
    heads = config.num_heads
    if heads % tensor == 0:
        return
    divide = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
    what = f"attention [{heads} heads]: tensor = {tensor} does not divide them"
    cure = f"take one of {divide}"
    if say is None:
        raise ValueError(f"{what}; {cure}")
    say(f"{what}: every device computes all of them; {cure}")


def _shaped(leaves: Mapping, part: LM | Head, mesh: Mesh | None, say: Callable | None) -> dict:
    """Path -> shape with its place on the mesh."""
    where = (
        mapping.flat(shardings(mapping.nested(leaves), part.axes(), mesh, say=say)) if mesh else {}
    )
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where.get(path))
        for path, leaf in leaves.items()
    }


def _put(x: np.ndarray, sharding) -> jax.Array:
    if sharding is None:
        return jax.device_put(x)
    # Each device is sent its slice alone.
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def _leaves(part: LM | Head) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    # Shapes alone: no parameter is computed.
    return mapping.flat(jax.eval_shape(part.init, jax.random.key(0)))


def _shapes(lm: LM) -> dict[tuple[str, ...], tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in _leaves(lm).items()}


def _misfits(flat: Mapping, wanted: Mapping) -> list[str]:
    return [
        f"{'.'.join(path)} {list(flat[path].shape) if path in flat else 'missing'} but the config "
        "has "
        f"{list(wanted[path]) if path in wanted else 'no such leaf'}"
        for path in sorted(flat.keys() | wanted.keys())
        if path not in flat or path not in wanted or flat[path].shape != wanted[path]
    ]


def _full_name(name: str, family: Family, config: Config) -> str:
    """A tensor's name with the trunk's prefix, which files of the trunk alone leave out."""
    names = {row.name for row in (*family.rows(config), *family.fused, *family.head)}
    name = re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", lambda old: OLD_NORMS[old[0]], name)
    # Family tables write {} for the numbers of layers and experts.
    numbered = numberless(family.prefix + name)
    return (
        family.prefix + name
        if numbered in names or re.search(family.ignored, family.prefix + name)
        else name
    )


def _outputs(rows) -> list[str]:
    return [row.name for row in rows if row.leaves == "unembedding"]


def _differ(tensors, rows) -> bool:
    """Whether a tied output matrix is stored too, and is another."""
    embedding = next(row.name for row in rows if row.leaves == "embedding")
    stored = [tensors[name] for name in _outputs(rows) if name in tensors]
    if not stored or embedding not in tensors:
        return False
    one = stored[0]
    other = tensors[embedding]
    if one.shape != other.shape or not {one.dtype, other.dtype} <= set(FLOATS):
        # As a tensor of its own it is checked, and what does not fit is reported; as a tied one it
        # would be ignored.
        return True
    return not np.array_equal(one.read(), other.read())


def _in_dtype(tensors, dtype):
    """The same tensors, cast where they are made."""
    if dtype is None:
        return tensors
    return [(name, lambda make=make: make().astype(dtype)) for name, make in tensors]


def _write_files(folder: Path, tensors, total: int, shard_bytes: int) -> None:
    """One file, or several and an index; what is in memory at a time is one file.

    Of several processes all make the tensors, whose parts lie with each of them, and the first
    writes.
    """
    from safetensors.numpy import save_file

    hosts.of_first(lambda: folder.mkdir(parents=True, exist_ok=True))

    number = max(1, -(-total // shard_bytes))
    files: dict[str, str] = {}
    shard: dict[str, np.ndarray] = {}
    done = 0

    def flush():
        file = WEIGHTS if number == 1 else f"model-{len(set(files.values())) + 1:05}.safetensors"
        # transformers refuses files whose metadata does not name a framework.
        hosts.of_first(lambda: save_file(shard, folder / file, metadata={"format": "pt"}))
        files.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, make in tensors:
        x = make()
        if shard and number > 1 and done + x.nbytes > shard_bytes:
            flush()
            done = 0
        shard[name] = x
        done += x.nbytes
    flush()
    if number > 1:
        index = {"metadata": {"total_size": total}, "weight_map": files}
        text = json.dumps(index, indent=2) + "\n"
        hosts.of_first(lambda: (folder / INDEX).write_text(text))


def _write_companions(folder: Path, hf, tokenizer, original: Path | None, *, padded: bool) -> None:
    """The tokenizer, `padded` if it must be able to pad, and the settings of generation."""
    import transformers

    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        if padded and tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
            _edit(folder / "tokenizer_config.json", pad_token=str(tokenizer.eos_token))
    for name in (
        ("generation_config.json", *(TOKENIZER if tokenizer is None else ())) if original else ()
    ):
        if (original / name).exists():
            shutil.copy(original / name, folder)
    file = folder / "generation_config.json"
    if not file.exists():
        transformers.GenerationConfig.from_model_config(hf).save_pretrained(folder)
    # transformers stops at the ids of this file alone, so those of `end_ids` join them.
    named = configs.ids(json.loads(file.read_text()).get("eos_token_id"))
    ends = named | configs.ids(getattr(tokenizer, "eos_token_id", None))
    ends |= configs.end_ids(original) if original else set()
    if ends > named:
        _edit(file, eos_token_id=sorted(ends) if len(ends) > 1 else ends.pop())


def _edit(file: Path, **fields) -> None:
    """Puts fields into a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}, indent=2) + "\n")


def _padding(tokenizer) -> int | None:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
