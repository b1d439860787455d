"""Stop strings: an automaton over the vocabulary, so that text ends a row inside the compiled program."""

import re
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from rlhf.rollouts.types import Array

_PRINTED = (*range(33, 127), *range(161, 173), *range(174, 256))  # bytes that byte-level tokenizers write as themselves
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]
BYTES = {chr(byte): byte for byte in _PRINTED} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}


def stop_strings(tokenizer, strings: Sequence[str]) -> Array:
    """The automaton that sees any of `strings` in the text of sampled tokens, however the tokens cut it.

    It is Knuth, Morris and Pratt's for all strings at once (Aho and Corasick, 1975), over bytes, with a column for every prefix
    of a string: one look-up a token.

    Args:
      tokenizer: a `transformers` tokenizer.  strings: texts that end a row; the row keeps the token that completes one.

    Returns: `[V, S]` int32: the state after a token in a state; S - 1 is "seen", 0 the start.  For `generate`'s `stop`.

    Raises: ValueError where there is no string, or an empty one.

    >>> from rlhf.tasks import reverse
    >>> tokenizer = reverse.task().tokenizer()
    >>> table = stop_strings(tokenizer, ["ab"])
    >>> a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    >>> table.shape[1] - 1, table[b, table[a, 0]].item()  # "a" and then "b": seen
    (2, 2)
    """
    if isinstance(strings, str) or not strings or not all(strings):
        raise ValueError(f"stop strings must be a list of texts that are not empty, but are {strings!r}")
    bytewise = _automaton([string.encode() for string in strings])  # [S, 256]
    states, seen = np.arange(len(bytewise)), len(bytewise) - 1
    texts = token_bytes(tokenizer)
    table = np.empty((len(texts), len(states)), np.int32)
    for token, text in enumerate(texts):
        state = states
        for byte in text:
            state = bytewise[state, byte]
        table[token] = state
    assert (table[:, seen] == seen).all()
    return jnp.asarray(table)


def _automaton(words: list[bytes]) -> np.ndarray:
    """`[S, 256]`: the state after a byte; the last state, in which a word was seen, is never left."""
    prefixes = sorted({word[:i] for word in words for i in range(len(word))}, key=len)  # state 0 is the empty one
    number = {prefix: i for i, prefix in enumerate(prefixes)}
    seen = len(prefixes)
    table = np.full((seen + 1, 256), seen, np.int32)
    for prefix, state in number.items():
        for byte in range(256):
            text = prefix + bytes([byte])
            if not any(word in text for word in words):
                table[state, byte] = number[next(text[i:] for i in range(len(text) + 1) if text[i:] in number)]
    return table


def token_bytes(tokenizer) -> list[bytes]:
    """What each token of the vocabulary adds to a text, in bytes; b"" for special tokens, which texts leave out."""
    special = set(tokenizer.all_special_ids)
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    anchor = next(piece for i, piece in enumerate(pieces) if i not in special)  # a first token loses its space
    bytewise = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)

    def text(piece: str) -> bytes:
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        if bytewise:
            return bytes(BYTES[c] for c in piece) if all(c in BYTES for c in piece) else piece.encode()
        start = len(tokenizer.convert_tokens_to_string([anchor]))
        return tokenizer.convert_tokens_to_string([anchor, piece])[start:].encode()

    return [b"" if i in special else text(piece) for i, piece in enumerate(pieces)]
