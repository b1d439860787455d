"""What is known of a model before its weights are read: its tokenizer, its config, and whether rows
fit it.
"""

import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf import data
from rlhf.models import huggingface
from rlhf.models.config import Config, EncoderDecoderConfig
from rlhf.models.huggingface_config import config_of, decoder_of
from rlhf.rollouts import Batch, Prompts
from rlhf.training.options import ModelOptions


def name_of(options: ModelOptions) -> str:
    """What messages call the model."""
    return options.model if isinstance(options.model, str) else "the model"


def load_tokenizer(options: ModelOptions) -> Any:
    """The model's tokenizer.

    Raises: ValueError where there is no tokenizer, or it lacks the end or padding token that is
    given; FileNotFoundError where the folder or name has none.
    """
    if isinstance(options.model, str):
        tokenizer = huggingface.load_tokenizer(options.model, eos_token=options.eos_token)
    else:
        _, _, tokenizer = options.model
        if tokenizer is None:
            raise ValueError(
                "model has no tokenizer; give (lm, params, tokenizer) with one of transformers'"
            )
        if options.eos_token is not None:
            tokenizer.eos_token = _known_token(tokenizer, "eos_token", options.eos_token)
    if options.pad_token is not None:
        tokenizer.pad_token = _known_token(tokenizer, "pad_token", options.pad_token)
    if options.chat_template is not None:
        # `os.path.isfile` is False for a template too long to be a name, where `Path` would raise.
        is_file = os.path.isfile(options.chat_template)
        tokenizer.chat_template = (
            Path(options.chat_template).read_text() if is_file else options.chat_template
        )
    return tokenizer


def _known_token(tokenizer: Any, option: str, token: str) -> str:
    if token not in tokenizer.get_vocab():
        raise ValueError(
            f"{option} {token!r} is no token of the tokenizer; add it there, or give another"
        )
    return token


def read_config(options: ModelOptions) -> Config | None:
    """The model's config, without loading it; None for a model of your own, which has none."""
    if isinstance(options.model, str):
        return huggingface.read_config(options.model)
    try:
        return config_of(options.model[0])
    except TypeError:
        return None


def encoder_length(options: ModelOptions, length: int) -> int | None:
    """Of an encoder the most tokens that it reads, at most `length`; None for others.

    Raises: ValueError for an encoder-decoder, which is no classifier here.
    """
    config = read_config(options)
    if isinstance(config, EncoderDecoderConfig):
        raise ValueError(
            f"{name_of(options)} is an encoder-decoder, which cannot be a reward model or "
            "classifier here; take a decoder "
            "(Llama, Qwen, …) or an encoder (BERT, RoBERTa, DistilBERT)"
        )
    # `max_positions` is None where positions are computed and not learned: no limit.
    return None if config is None or config.causal else min(length, config.max_positions or length)


def check_decoder(options: ModelOptions) -> None:
    """Raises ValueError for an encoder and an encoder-decoder: in recipes for decoders alone,
    before they read data.
    """
    if isinstance(_generative_config(options), EncoderDecoderConfig):
        raise ValueError(
            f"{name_of(options)} is an encoder-decoder, whose encoder reads prompts; this command "
            "trains decoders alone.  "
            "sft, dpo, cpo, orpo, grpo, rloo, ppo, online_dpo, xpo and rft take both"
        )


def load_seq2seq(options: ModelOptions, tokenizer: Any) -> data.Seq2Seq | None:
    """How an encoder-decoder reads rows; None for other models.

    Raises: ValueError for an encoder, which generates nothing, and where config.json does not say
    what its decoder starts with.
    """
    config = _generative_config(options)
    if not isinstance(config, EncoderDecoderConfig):
        return None
    if not isinstance(options.model, str):
        raise ValueError(
            "model is an encoder-decoder in memory, whose start token is not known; save it, and "
            "give its folder"
        )
    start = huggingface.decoder_start(options.model)
    if start is None:
        raise ValueError(
            f"{options.model}: config.json has no decoder_start_token_id for its decoder to start "
            "from; set it"
        )
    return data.Seq2Seq.of(tokenizer, start)


def _generative_config(options: ModelOptions) -> Config | None:
    config = read_config(options)
    if config is not None and not decoder_of(config).causal:
        kind = (
            huggingface.model_type(options.model) if isinstance(options.model, str) else "in memory"
        )
        raise ValueError(
            f"{name_of(options)} is an encoder ({kind}), which writes no text; `rlhf reward` and "
            "`rlhf prm` take it, other "
            "commands a decoder (Llama, Qwen, …) or an encoder-decoder (T5, BART)"
        )
    return config


def eos_ids(options: ModelOptions, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a completion.  Raises: ValueError where the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end token, so that no completion would end; give --eos_token, or "
            "set eos_token in "
            "tokenizer_config.json"
        )
    if isinstance(options.model, str):
        return huggingface.end_ids(options.model, tokenizer)
    return (tokenizer.eos_token_id,)


def check_tokens(
    options: ModelOptions, tokenizer: Any, *rows: Any, max_new_tokens: int = 0
) -> None:
    """Raises where the model has no embedding for a token of the rows, or for their positions,
    before it is loaded.

    Args:
      options: of the model.
      tokenizer: of the model.
      rows: arrays such as `Batch`, `Pairs` or `Prompts`, however nested.
      max_new_tokens: tokens that follow a row's last: completions of prompts.
    """
    full_config = read_config(options)
    if full_config is None:
        return
    config = decoder_of(full_config)
    parts = [x for x in jax.tree.leaves(rows, is_leaf=_has_tokens) if _has_tokens(x)]
    # The encoder's inputs are tokens too, with positions of their own; nothing is sampled after
    # them.
    sources = [
        Batch(mask=None, **part.inputs)
        for part in parts
        if getattr(part, "inputs", None) is not None
    ]
    # An embedding may have more rows than the tokenizer has tokens: they are padded to multiples of
    # 64 or 128.
    number = max(config.vocab_size, len(tokenizer) if options.resize_embeddings else 0)
    following = [max_new_tokens] * len(parts) + [0] * len(sources)
    longest = 0
    for part, more in zip([*parts, *sources], following, strict=True):
        tokens = np.asarray(part.tokens)
        # Prompts have a mask of what is no padding; rows have segments, of which 0 is padding.
        real = np.asarray(part.mask if isinstance(part, Prompts) else part.segment_ids) != 0
        unknown = real & (tokens >= number)
        if unknown.any():
            token = int(tokens[unknown][0])
            raise ValueError(
                f"token {token}, {tokenizer.convert_ids_to_tokens(token)!r}, is in the rows, but "
                f"{name_of(options)} has "
                f"embeddings for {number} tokens alone, 0 to {number - 1}; give "
                "--resize_embeddings, or another tokenizer"
            )
        positions = (
            # Prompts are padded on the left: positions count from their first real token.
            real.cumsum(-1) - 1
            if isinstance(part, Prompts)
            else np.where(real, np.asarray(part.positions), 0)
        )
        length = int(positions.max()) + 1
        longest = max(longest, length + more)
        if config.max_positions and length + more > config.max_positions:
            of_both = f" and {more} more of a completion" if more else ""
            cure = "--max_new_tokens, or shorter prompts" if more else "--max_length"
            raise ValueError(
                f"a row has {length} tokens{of_both}, but {name_of(options)} has "
                f"{config.max_positions} learned positions; "
                f"give a smaller {cure}"
            )
    # Rotary positions go on without end, but what a model makes of later ones nobody has trained.
    most = huggingface.trained_positions(options.model) if isinstance(options.model, str) else None
    if most is not None and longest > most:
        print(
            f"rows have up to {longest} tokens with their completions, but {name_of(options)} was "
            f"made for {most} (max_position_embeddings of config.json): expect it to be worse "
            "beyond",
            file=sys.stderr,
        )


def _has_tokens(x: Any) -> bool:
    return isinstance(x, Prompts) or (hasattr(x, "tokens") and hasattr(x, "segment_ids"))
