"""Text in, text out: the glue to a `transformers` tokenizer."""

from collections.abc import Sequence

import numpy as np

from rlhf.rollouts.types import Prompts, Rollout


def encode(tokenizer, texts: Sequence[str], *, length: int | None = None, add_special_tokens: bool = True) -> Prompts:
    """Prompts `[P, L]` from P texts, padded on the left.

    Args:
      tokenizer: a `transformers` tokenizer.
      texts: one prompt each.
      length: columns; None: the longest prompt's.  One length for all batches means one compilation.
      add_special_tokens: whether the tokenizer adds its own, such as a start token.

    Raises: ValueError where a prompt has no token, or more than `length`; it names the row.
    """
    rows = [tokenizer.encode(text, add_special_tokens=add_special_tokens) for text in texts]
    empty = [i for i, row in enumerate(rows) if not row]
    if not rows or empty:
        raise ValueError(f"prompt {empty[0] if rows else 0} has no tokens; a model needs at least one to start from")
    length = length or max(map(len, rows))
    long = [i for i, row in enumerate(rows) if len(row) > length]
    if long:
        raise ValueError(f"prompt {long[0]} has {len(rows[long[0]])} tokens but length is {length}; shorten it or raise length")
    tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :] = row
        mask[i, length - len(row) :] = True
    return Prompts(tokens, mask)


def completions(tokenizer, rollout: Rollout) -> list[str]:
    """The text that was sampled in each row of a rollout `[B, T]`, without special tokens: B strings."""
    tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
    return [tokenizer.decode(row[keep], skip_special_tokens=True) for row, keep in zip(tokens, mask, strict=True)]


def prompts(tokenizer, rollout: Rollout) -> list[str]:
    """The text of each row's prompt in a rollout `[B, T]`, without special tokens: B strings."""
    tokens, keep = np.asarray(rollout.tokens), np.asarray((rollout.segment_ids != 0) & ~rollout.mask)
    return [tokenizer.decode(row[k], skip_special_tokens=True) for row, k in zip(tokens, keep, strict=True)]
