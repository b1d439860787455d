"""Texts as arrays at once, for short ones of which none may be cut.  Prompt and completion are
tokenised apart.
"""

from collections.abc import Sequence

from rlhf.data.tokenized import Tokenized, batch, pairs
from rlhf.rollouts import Batch, Pairs
from rlhf.rollouts.text import encoder, in_row, starting


def encode_rows(
    tokenizer, prompts: Sequence[str], completions: Sequence[str], length: int
) -> Batch:
    """Rows `start prompt completion end`, padded on the right; the completion and the end token are
    trained.

    Args:
      tokenizer: a `transformers` tokenizer with an end token.
      prompts, completions: as many of each; an empty prompt leaves the start token, if the
        tokenizer adds one.
      length: T.

    Returns: a `Batch` of NumPy arrays `[N, T]`.

    Raises: ValueError for a row without text, one longer than `length`, or a tokenizer without an
    end token.

    >>> from rlhf.tasks import reviews
    >>> encode_rows(reviews.tokenizer(), ["the film"], ["is great ."], 8).mask.tolist()
    [[False, False, False, True, True, True, True, False]]
    """
    return batch(_tokenized(tokenizer, prompts, completions), length=length)


def preference_pairs(
    tokenizer, prompts: Sequence[str], chosen: Sequence[str], rejected: Sequence[str], length: int
) -> Pairs:
    """Preference pairs as `Pairs` of NumPy arrays `[N, 2, T]`.

    Args:
      tokenizer: a `transformers` tokenizer with an end token.
      prompts, chosen, rejected: as many of each; prompts may be empty.
      length: T.

    Raises: ValueError for a row without text, one longer than `length`, or a tokenizer without an
    end token.

    >>> from rlhf.tasks import reviews
    >>> preference_pairs(reviews.tokenizer(), ["the film"], ["is great ."], ["is dull ."], 8).tokens.shape
    (1, 2, 8)
    """
    return pairs(
        *(_tokenized(tokenizer, prompts, side) for side in (chosen, rejected)), length=length
    )


def _tokenized(tokenizer, prompts: Sequence[str], completions: Sequence[str]) -> list[Tokenized]:
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token; set tokenizer.eos_token")
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions")
    rows = []
    encode_start = starting(tokenizer)
    encode = encoder(tokenizer)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        start = in_row("row", i, encode_start, prompt)
        rest = in_row("row", i, encode, completion)
        if not rest:
            raise ValueError(f"row {i} has no text to train on; remove it")
        # A completion may hold its end token already; a second one would be trained after the
        # first.
        if rest[-1] != tokenizer.eos_token_id:
            rest = [*rest, tokenizer.eos_token_id]
        rows.append(Tokenized(start + rest, [False] * len(start) + [True] * len(rest)))
    return rows
