"""What the tasks of characters share: a vocabulary with its tokenizer, and texts as rows of token
ids.
"""

import jax
import jax.numpy as jnp

from rlhf.rollouts.types import Array, Prompts

PAD, BOS, EOS = 0, 1, 2  # of every task, reviews too
VOCABULARY = ("<pad>", "<bos>", "<eos>", *"0123456789abcdefghijklmnopqrstuvwxyz+-=:\n")
IDS = {character: i for i, character in enumerate(VOCABULARY)}
DIGITS = range(IDS["0"], IDS["9"] + 1)
LETTERS = range(IDS["a"], IDS["z"] + 1)


def tokenizer():
    """A `transformers` tokenizer of one token a character, with a start token before and an end
    token to train on.

    A character that the vocabulary lacks raises, instead of getting lost.

    >>> tokenizer().convert_ids_to_tokens(tokenizer().encode("3-14="))
    ['<bos>', '3', '-', '1', '4', '=']
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    # `WordLevel` without an unknown token: what it lacks raises.
    characters = Tokenizer(models.WordLevel(IDS))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    start = VOCABULARY[BOS]
    characters.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token=VOCABULARY[PAD],
        bos_token=start,
        eos_token=VOCABULARY[EOS],
        # Decoding must give back what was encoded, character by character.
        clean_up_tokenization_spaces=False,
    )


def aligned(tokens: Array, keep: Array) -> Array:
    """The tokens that `keep` marks, in their order, from column 0 on.

    Args:
      tokens: `[B, T]` int32.
      keep: `[B, T]` bool.

    Returns: `[B, T]` int32, PAD after those marked.

    >>> aligned(jnp.array([[7, 8, 9]]), jnp.array([[False, True, True]])).tolist()
    [[8, 9, 0]]
    """
    # A stable sort by one bit moves gaps behind, without a loop and with shapes that stay.
    order = jnp.argsort(~keep, axis=-1, stable=True)
    return jnp.take_along_axis(jnp.where(keep, tokens, PAD), order, axis=-1)


def as_prompts(tokens: Array, keep: Array) -> Prompts:
    """Prompts `[P, 1 + W]`, padded on the left: a start token, then the tokens `[P, W]` that
    `keep` marks.

    >>> as_prompts(jnp.array([[7, 8, 9]]), jnp.array([[False, True, True]])).tokens.tolist()
    [[0, 1, 8, 9]]
    """
    tokens = jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=BOS)
    keep = jnp.pad(keep, ((0, 0), (1, 0)), constant_values=True)
    # False sorts before True: gaps move to the left, where prompts are padded.
    order = jnp.argsort(keep, axis=-1, stable=True)
    tokens = jnp.take_along_axis(jnp.where(keep, tokens, PAD), order, axis=-1)
    return Prompts(tokens, jnp.take_along_axis(keep, order, axis=-1))


def words(key: Array, number: int, symbols: range, longest: int) -> tuple[Array, Array]:
    """Random words: lengths from 2 to `longest`, and symbols, are equally likely.  `key` is
    consumed.

    Args:
      symbols: ids of the alphabet.

    Returns: tokens `[number, longest]` int32, and which of them are the word's.

    >>> tokens, keep = words(jax.random.key(0), 3, LETTERS, 4)
    >>> tokens.shape, bool((keep.sum(1) >= 2).all())
    ((3, 4), True)
    """
    length_key, symbol_key = jax.random.split(key)
    length = jax.random.randint(length_key, (number, 1), 2, longest + 1)
    tokens = jax.random.randint(
        symbol_key, (number, longest), symbols.start, symbols.stop, jnp.int32
    )
    return tokens, jnp.arange(longest)[None] < length


def after(tokens: Array, keep: Array, character: str) -> tuple[Array, Array]:
    """Tokens `[B, W]` and which of them count, with one more column: a character that ends them
    all.

    >>> after(jnp.array([[3]]), jnp.array([[True]]), "=")[0].tolist()
    [[3, 41]]
    """
    one_more = ((0, 0), (0, 1))
    tokens = jnp.pad(tokens, one_more, constant_values=IDS[character])
    return tokens, jnp.pad(keep, one_more, constant_values=True)


def decimals(numbers: Array, width: int) -> tuple[Array, Array]:
    """Whole numbers in decimal notation.

    Args:
      numbers: `[...]` int32, of at most `width` digits.

    Returns: tokens `[..., 1 + width]` int32, a minus sign and all digits; and which of them are
    written: no leading zeros.

    >>> tokens, keep = decimals(jnp.array([-40]), 3)
    >>> "".join(VOCABULARY[i] for i in tokens[0][keep[0]].tolist())
    '-40'
    """
    # All digits are computed, leading zeros too: which of them are written is the second result.
    powers = 10 ** jnp.arange(width)[::-1]
    powers = powers.reshape((1,) * numbers.ndim + (width,))
    size = jnp.abs(numbers)[..., None]
    sign = jnp.full((*numbers.shape, 1), IDS["-"], jnp.int32)
    tokens = jnp.concatenate(
        [sign, (DIGITS.start + size // powers % 10).astype(jnp.int32)], axis=-1
    )
    return tokens, jnp.concatenate(
        [numbers[..., None] < 0, (size >= powers) | (powers == 1)], axis=-1
    )
