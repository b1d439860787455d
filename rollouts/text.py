"""Text in, text out: the glue to a `transformers` tokenizer."""

import re
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from rlhf.rollouts.stopping import BYTES
from rlhf.rollouts.types import Prompts, Rollout

CHARACTERS = (
    16_000_000  # of one text; more than any model reads, and tokenizers take 40 bytes for each
)


def encode(
    tokenizer, texts: Sequence[str], *, length: int | None = None, add_special_tokens: bool = True
) -> Prompts:
    """Prompts `[P, L]` from P texts, padded on the left.

    Args:
      tokenizer: a `transformers` tokenizer.
      texts: one prompt each.
      length: columns; None: the longest prompt's.  One length for all batches means one
        compilation.
      add_special_tokens: whether the tokenizer adds its own, such as a start token; a text that
        begins with it has it once.

    Raises: ValueError where a prompt has no token, more than `length`, or a letter that the
    tokenizer lacks; it names the row.
    """
    read = framed(tokenizer) if add_special_tokens else encoder(tokenizer)
    rows = [in_row("prompt", i, read, text) for i, text in enumerate(texts)]
    empty = [i for i, row in enumerate(rows) if not row]
    if not rows or empty:
        raise ValueError(
            f"prompt {empty[0] if rows else 0} has no tokens; a model needs at least one to start "
            "from"
        )
    length = length or max(map(len, rows))
    long = [i for i, row in enumerate(rows) if len(row) > length]
    if long:
        raise ValueError(
            f"prompt {long[0]} has {len(rows[long[0]])} tokens but length is {length}; shorten it "
            "or raise length"
        )
    tokens = np.zeros((len(rows), length), np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :] = row
        mask[i, length - len(row) :] = True
    return Prompts(tokens, mask)


def completions(tokenizer, rollout: Rollout) -> list[str]:
    """The text that was sampled in each row of a rollout `[B, T]`, without special tokens: B
    strings.
    """
    return _decoded(tokenizer, rollout.tokens, rollout.mask)


def continuations(tokenizer, rollout: Rollout) -> list[str]:
    """The text after each row's prompt: what was sampled, and what an environment said in between:
    B strings.
    """
    after = np.asarray(rollout.segment_ids != 0) & _after_prompt(rollout)
    return _decoded(tokenizer, rollout.tokens, after)


def prompts(tokenizer, rollout: Rollout) -> list[str]:
    """The text of each row's prompt in a rollout `[B, T]`, or in what its encoder reads, without
    special tokens: B strings.
    """
    if rollout.inputs is not None and "tokens" in rollout.inputs:
        return _decoded(tokenizer, rollout.inputs["tokens"], rollout.inputs["segment_ids"] != 0)
    before = np.asarray(rollout.segment_ids != 0) & ~_after_prompt(rollout)
    return _decoded(tokenizer, rollout.tokens, before)


def _after_prompt(rollout: Rollout) -> np.ndarray:
    """Which columns are the first sampled token or after it.  `[B, T]` bool."""
    return np.maximum.accumulate(np.asarray(rollout.mask), axis=1)


def _decoded(tokenizer, tokens, keep) -> list[str]:
    return [
        tokenizer.decode(row[chosen], skip_special_tokens=True)
        for row, chosen in zip(np.asarray(tokens), np.asarray(keep), strict=True)
    ]


def in_row(what: str, number: int, fn: Callable, *args):
    """What a function returns; a ValueError of its own says of which row."""
    try:
        return fn(*args)
    except ValueError as error:
        raise ValueError(f"{what} {number}: {error}") from None


def encoder(tokenizer) -> Callable[[str], list[int]]:
    """`(text) -> tokens`, without special tokens of the tokenizer's own.

    Tokenizers without an unknown token leave a letter out that they lack, or fail: here it is
    refused.

    Args:
      tokenizer: a `transformers` tokenizer.

    Returns: a function, which raises ValueError for a text with a letter that no token has, and one
    of absurd length.

    >>> from rlhf.tasks import reviews
    >>> encoder(reviews.tokenizer())("the film")
    [83, 35]
    """
    read = _reader(tokenizer)
    return lambda text: read(text, False)["input_ids"]


def framed(tokenizer) -> Callable[[str], list[int]]:
    """`(text) -> tokens` with those that the tokenizer puts around a text.  A text that begins or
    ends with them by itself has them once.

    Args:
      tokenizer: a `transformers` tokenizer.

    Returns: a function, which raises ValueError for a text with a letter that no token has, and one
    of absurd length.

    >>> from rlhf.tasks import characters
    >>> read = framed(characters.tokenizer())
    >>> read("1+1"), read("<bos>1+1")
    ([1, 4, 39, 4], [1, 4, 39, 4])
    """
    return _framed(tokenizer, ())


def starting(tokenizer) -> Callable[[str], list[int]]:
    """As `framed`, without the end token that some tokenizers add: more may follow.

    Args:
      tokenizer: a `transformers` tokenizer.

    Returns: a function, which raises ValueError for a text with a letter that no token has, and one
    of absurd length.

    >>> from rlhf.tasks import reviews
    >>> starting(reviews.tokenizer())("the film")
    [1, 83, 35]
    """
    return _framed(tokenizer, (tokenizer.eos_token_id,))


def _framed(tokenizer, without: tuple) -> Callable[[str], list[int]]:
    read = _reader(tokenizer)

    def encode_framed(text: str) -> list[int]:
        encoding = read(text, True)
        # `sequence_ids` is None for tokens that the tokenizer put around the text.
        tokens = encoding["input_ids"]
        of_text = [i for i, of in enumerate(encoding.sequence_ids(0)) if of is not None]
        start, stop = (of_text[0], of_text[-1] + 1) if of_text else (len(tokens), len(tokens))
        before, after = (
            [t for t in side if t not in without] for side in (tokens[:start], tokens[stop:])
        )
        tokens = tokens[start:stop]
        # A chat template has written the start token already: it must not be there twice.
        tokens = tokens if before and tokens[: len(before)] == before else [*before, *tokens]
        return tokens if after and tokens[-len(after) :] == after else [*tokens, *after]

    return encode_framed


def _reader(tokenizer) -> Callable:
    """`(text, add_special_tokens) -> encoding`; it raises what `encoder` says."""
    lost = _lost_letter(tokenizer)

    def read(text: str, special: bool):
        if len(text) > CHARACTERS:
            raise ValueError(
                f"a text has {len(text):,} characters, but {CHARACTERS:,} are the most; cut it"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"{text[error.start]!r} at character {error.start}"
            raise ValueError(
                f"a text has half a letter, {half} (a surrogate without its other half); remove it"
            ) from None
        try:
            encoding = tokenizer(text, add_special_tokens=special)
        # Exception, since the backend has no kind of its own for a letter that it lacks.
        except Exception as error:
            letter = next(
                (letter for letter in dict.fromkeys(text) if _fails(tokenizer, letter)), None
            )
            raise ValueError(
                _lacking(text, letter) if letter else f"{error}, in {text!r:.60}"
            ) from None
        if letter := lost(text):
            raise ValueError(_lacking(text, letter))
        return encoding

    return read


def _fails(tokenizer, text: str) -> bool:
    try:
        tokenizer(text, add_special_tokens=False)
    except Exception:
        return True
    return False


def _lacking(text: str, letter: str) -> str:
    at = max(text.find(letter) - 20, 0)
    return (
        f"the tokenizer has no token for {letter!r} (U+{ord(letter):04X}), in "
        f"{text[at : at + 40]!r}, nor one for the unknown; "
        "remove the letter, or take a tokenizer whose model has an unk_token"
    )


def _lost_letter(tokenizer) -> Callable[[str], str | None]:
    """`(text) -> the first letter that byte-pair encoding leaves out without a word`, None where it
    leaves out none.
    """
    backend = tokenizer.backend_tokenizer
    model = backend.model
    normalizer = backend.normalizer
    splitter = backend.pre_tokenizer
    # Other models have an unknown token, or raise.
    if type(model).__name__ != "BPE" or model.unk_token is not None or model.byte_fallback:
        return lambda text: None
    vocabulary = tokenizer.get_vocab()
    # With all 256 bytes in the vocabulary nothing can be lost.
    if "ByteLevel" in str(splitter) and not set(BYTES) - set(vocabulary):
        return lambda text: None
    prefix = model.continuing_subword_prefix or ""
    suffix = model.end_of_word_suffix or ""
    added = re.compile(
        "|".join(
            map(
                re.escape,
                sorted(filter(None, tokenizer.added_tokens_encoder), key=len, reverse=True),
            )
        )
        or "(?!)"
    )

    @cache
    def known(letter: str) -> bool:
        text = letter if normalizer is None else normalizer.normalize_str(letter)
        pieces = (
            [text] if splitter is None else [piece for piece, _ in splitter.pre_tokenize_str(text)]
        )
        forms = lambda symbol: {symbol, prefix + symbol, symbol + suffix, prefix + symbol + suffix}
        return all(forms(symbol) & vocabulary.keys() for piece in pieces for symbol in piece)

    def lost(text: str) -> str | None:
        # The common case is a set of letters that were all looked up before.
        if all(map(known, set(text))):
            return None
        return next((letter for letter in added.sub("", text) if not known(letter)), None)

    return lost
