"""Rows for encoder-decoders: the encoder reads the prompt, the decoder writes the completion behind
its start tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlhf.data.tokenized import Tokenized, batch, prompts
from rlhf.fields import documented
from rlhf.rollouts import Batch, Prompts


@documented
class Seq2Seq(NamedTuple):
    """The special tokens around a prompt and a completion, as transformers' encoder-decoders were
    trained with them.

    Attributes:
      start: before a completion: the decoder's start token, and the start token that a tokenizer
        adds (BART).
      closing: behind a prompt: the end token that a tokenizer adds.
    """

    start: tuple[int, ...]
    closing: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer, decoder_start: int) -> "Seq2Seq":
        """What a tokenizer adds around a text.

        Args:
          tokenizer: of `transformers`.
          decoder_start: `decoder_start_token_id` of config.json.
        """
        # Read off a sample: tokenizers have no attribute that says what they add.
        ids = tokenizer("a")["input_ids"]
        begins = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
        ends = tokenizer.eos_token_id is not None and ids[-1:] == [tokenizer.eos_token_id]
        start = (decoder_start, tokenizer.bos_token_id) if begins else (decoder_start,)
        return cls(start, (tokenizer.eos_token_id,) if ends else ())

    def batch(self, rows: Sequence[Tokenized], *, length: int | None = None) -> Batch:
        """A `Batch` of NumPy arrays `[N, T]`, the decoder's, with the encoder's `inputs` `[N, S]`.

        Args:
          rows: N prompts with their completions, the first trained token beginning the completion.
          length: T and S, special tokens included; None: of the longest.

        Raises: ValueError, naming the row, where one has no prompt, no trained token, or more
        tokens than `length`.

        >>> rows = Seq2Seq((0,), (1,)).batch([Tokenized([5, 6, 7], [False, False, True])])
        >>> rows.tokens.tolist(), rows.inputs["tokens"].tolist()
        ([[0, 7]], [[5, 6, 1]])
        """
        # The first trained token divides prompt and completion; True behind stands for "none".
        cut = [[*row.mask, True].index(True) for row in rows]
        for number, (row, first) in enumerate(zip(rows, cut, strict=True)):
            if not 0 < first < len(row.tokens):
                what = "completion" if first else "prompt"
                raise ValueError(
                    f"row {number} has no {what}; an encoder reads prompts, and a decoder writes "
                    "completions"
                )
        sources = [row.tokens[:first] for row, first in zip(rows, cut, strict=True)]
        untrained = [False] * len(self.start)
        targets = [
            Tokenized([*self.start, *row.tokens[first:]], [*untrained, *row.mask[first:]])
            for row, first in zip(rows, cut, strict=True)
        ]
        return batch(targets, length=length)._replace(inputs=self.inputs(sources, length=length))

    def prompts(self, rows: Sequence[Sequence[int]]) -> Prompts:
        """`Prompts` to sample from: the decoder's start tokens, and the prompts as the encoder's
        `inputs`.

        Args:
          rows: P lists of tokens.

        Raises: ValueError where there are no prompts, or one has no tokens.

        >>> Seq2Seq((0,), (1,)).prompts([[5, 6]]).tokens.tolist()
        [[0]]
        """
        return prompts([self.start] * len(rows))._replace(inputs=self.inputs(rows))

    def inputs(
        self, rows: Sequence[Sequence[int]], *, length: int | None = None
    ) -> dict[str, np.ndarray]:
        """The encoder's `tokens`, `positions` and `segment_ids` `[N, S]`, padded on the right."""
        closed = [[*row, *self.closing] for row in rows]
        arrays = batch([Tokenized(row, [True] * len(row)) for row in closed], length=length)
        return {name: getattr(arrays, name) for name in ("tokens", "positions", "segment_ids")}
