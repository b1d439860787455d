"""Texts as rows of tokens."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from rlhf.rollouts import Batch, Pairs, whole_rows


def read_lines(path: str | Path) -> list[str]:
    """The lines of a UTF-8 text file, one row each, without surrounding blanks.

    Raises: ValueError, naming the file (and line) and the cure, where it is missing, unreadable or empty, or a row has no text.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; check the path") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; convert it, for example with iconv -t utf-8") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    if not any(line.strip() for line in lines):
        raise ValueError(f"{path}: the file is empty; it needs one text a line")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise ValueError(f"{path}, line {number}: a row without text; remove it")
    return [line.strip() for line in lines]


def encode_rows(tokenizer, prompts: Sequence[str], completions: Sequence[str], length: int) -> Batch:
    """Rows `start prompt completion end`, padded on the right; the completion and the end token are trained.

    Args:
      tokenizer: a `transformers` tokenizer with an end token.
      prompts, completions: as many of each; an empty prompt leaves the start token, if the tokenizer adds one.
      length: T.

    Returns: a `Batch` of NumPy arrays `[N, T]`.

    Raises: ValueError for a row without text, one longer than `length`, or a tokenizer without an end token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token; set tokenizer.eos_token")
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions")
    tokens = np.zeros((len(prompts), length), np.int32)
    real, trained = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        start = tokenizer.encode(prompt)
        rest = tokenizer.encode(completion, add_special_tokens=False)
        if not rest:
            raise ValueError(f"row {i} has no text to train on; remove it")
        row = [*start, *rest, tokenizer.eos_token_id]
        if len(row) > length:
            raise ValueError(f"row {i} has {len(row)} tokens but length is {length}; shorten it or raise length")
        tokens[i, : len(row)], real[i, : len(row)], trained[i, len(start) : len(row)] = row, True, True
    return jax.tree.map(np.asarray, whole_rows(tokens, real, trained))


def preference_pairs(tokenizer, prompts: Sequence[str], chosen: Sequence[str], rejected: Sequence[str], length: int) -> Pairs:
    """Preference pairs as `Pairs` of NumPy arrays `[N, 2, T]`.  Arguments and errors as `encode_rows`."""
    sides = [encode_rows(tokenizer, prompts, side, length) for side in (chosen, rejected)]
    stack = lambda name: np.stack([getattr(side, name) for side in sides], axis=1)
    return Pairs(stack("tokens"), stack("mask"), stack("positions"), stack("segment_ids"))
