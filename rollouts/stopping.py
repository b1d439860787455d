"""Stop strings: an automaton over the vocabulary, so that text ends a row inside the compiled
program.
"""

import re
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from rlhf.rollouts.types import Array

# Byte-level tokenizers (GPT-2's table) write these bytes as themselves, and all others as letters
# from code point 256 on.
_PRINTED = (
    *range(33, 127),
    *range(161, 173),
    *range(174, 256),
)
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]
BYTES = {chr(byte): byte for byte in _PRINTED} | {
    chr(256 + i): byte for i, byte in enumerate(_OTHERS)
}


def stop_strings(tokenizer, strings: Sequence[str]) -> Array:
    """The automaton that sees any of `strings` in the text of sampled tokens, however the tokens
    cut it.

    It is Knuth, Morris and Pratt's for all strings at once (Aho and Corasick, 1975), over bytes,
    with a column for every prefix of a string: one look-up a token.

    Args:
      tokenizer: a `transformers` tokenizer.
      strings: texts that end a row; the row keeps the token that completes one.  Texts leave
        special tokens out, and so does the automaton, but for those that a string itself has, such
        as `<|im_end|>`.

    Returns: `[V, S]` int32: the state after a token in a state; S - 1 is "found", 0 the start.  For
    `generate`'s `stop`.

    Raises: ValueError where there is no string, or an empty one, and for tokenizers whose tokens
    change beside others.

    >>> from rlhf.tasks import reverse
    >>> tokenizer = reverse.task().tokenizer()
    >>> table = stop_strings(tokenizer, ["ab"])
    >>> a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    >>> table.shape[1] - 1, table[b, table[a, 0]].item()  # "a" and then "b": found
    (2, 2)
    """
    if isinstance(strings, str) or not strings or not all(strings):
        raise ValueError(
            f"stop strings must be a list of texts that are not empty, but are {strings!r}"
        )
    bytewise = _automaton([string.encode() for string in strings])  # [S, 256]
    states = np.arange(len(bytewise))
    found = len(bytewise) - 1
    texts = token_bytes(tokenizer, shown=strings)
    _check(tokenizer, texts)
    table = np.empty((len(texts), len(states)), np.int32)
    # A token is a walk over its bytes, from all states at once.
    for token, text in enumerate(texts):
        state = states
        for byte in text:
            state = bytewise[state, byte]
        table[token] = state
    # A string that was found stays found, so that a row cannot leave its end again.
    assert (table[:, found] == found).all()
    return jnp.asarray(table)


def _check(tokenizer, texts: list[bytes], samples: int = 200) -> None:
    """Holds the bytes of tokens against what the tokenizer makes of some of them in a row."""
    special = special_tokens(tokenizer)
    known = tokenizer.convert_ids_to_tokens(range(len(texts)))
    ids = [i for i, piece in enumerate(known) if i not in special and piece is not None]
    anchor, start = _anchor(tokenizer, known, special)
    # A sample, no proof: a tokenizer that changes tokens beside others does so in most places.
    rng = np.random.default_rng(0)
    for sequence in rng.choice(ids, (samples, 4)).tolist():
        said = tokenizer.convert_tokens_to_string([*anchor, *(known[i] for i in sequence)])[start:]
        read = b"".join(texts[i] for i in sequence).decode(errors="replace")
        # "\ufffd" stands for half a letter, which no single token can be held to.
        if said != read and "\ufffd" not in said:
            raise ValueError(
                "stop strings need a tokenizer whose tokens say what they always say, but this "
                f"one makes {said!r:.40} of "
                f"those that say {read!r:.40}; end rows by tokens, eos_ids"
            )


def _anchor(tokenizer, pieces: Sequence[str | None], special) -> tuple[list[str], int]:
    """A token to stand before others, since a first one loses its space, and the length of its own
    text.
    """
    plain = (piece for i, piece in enumerate(pieces) if i not in special and piece is not None)
    anchor = [next(piece for piece in plain if not re.fullmatch("<0x[0-9A-F]{2}>", piece))]
    return anchor, len(tokenizer.convert_tokens_to_string(anchor))


def _automaton(words: list[bytes]) -> np.ndarray:
    """`[S, 256]`: the state after a byte; the last state, in which a word was found, is never left."""
    # A state for each proper prefix of a word; the empty one comes first, as state 0.
    prefixes = sorted({word[:i] for word in words for i in range(len(word))}, key=len)
    number = {prefix: i for i, prefix in enumerate(prefixes)}
    found = len(prefixes)
    table = np.full((found + 1, 256), found, np.int32)
    for prefix, state in number.items():
        for byte in range(256):
            # The next state is the longest suffix of the text that is a prefix of some word.
            text = prefix + bytes([byte])
            if not any(word in text for word in words):
                table[state, byte] = number[
                    next(text[i:] for i in range(len(text) + 1) if text[i:] in number)
                ]
    return table


def special_tokens(tokenizer) -> dict[int, str]:
    """The tokens that texts leave out.

    >>> from rlhf.tasks import reverse
    >>> special_tokens(reverse.task().tokenizer())
    {0: '<pad>', 1: '<bos>', 2: '<eos>'}
    """
    added = {
        token: piece.content
        for token, piece in tokenizer.added_tokens_decoder.items()
        if piece.special
    }
    pieces = tokenizer.convert_ids_to_tokens(sorted(tokenizer.all_special_ids))
    named = dict(zip(sorted(tokenizer.all_special_ids), pieces, strict=True))
    return dict(sorted((named | added).items()))


def token_bytes(tokenizer, *, shown: Sequence[str] = ()) -> list[bytes]:
    """What each token of the vocabulary adds to a text, in bytes; b"" for special tokens, which
    texts leave out.

    Args:
      tokenizer: a `transformers` tokenizer.
      shown: texts; a special token that one of them has counts as what it is written as.
    """
    backend = tokenizer.backend_tokenizer
    special = special_tokens(tokenizer)
    # Ids may have gaps, whose piece is None.
    pieces = tokenizer.convert_ids_to_tokens(range(1 + max(tokenizer.get_vocab().values())))
    decoder = str(backend.decoder)
    fallback = "ByteFallback" in decoder
    bytewise = "ByteLevel" in decoder
    anchor, start = _anchor(tokenizer, pieces, special)

    def text(piece: str) -> bytes:
        if fallback and re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        if bytewise:
            return (
                bytes(BYTES[c] for c in piece) if all(c in BYTES for c in piece) else piece.encode()
            )
        return tokenizer.convert_tokens_to_string([*anchor, piece])[start:].encode()

    def added(token: int, piece: str | None) -> bytes:
        if piece is None:
            return b""
        if token in special:
            return (
                special[token].encode()
                if any(special[token] in string for string in shown)
                else b""
            )
        return text(piece)

    return [added(token, piece) for token, piece in enumerate(pieces)]
