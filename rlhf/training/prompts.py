"""Prompts of data sets: tokenised, checked, and handed out step by step."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf import data, tasks
from rlhf.data.types import Row
from rlhf.fields import documented
from rlhf.rollouts import Prompts
from rlhf.training import datasets, programs
from rlhf.training.options import PromptOptions


@documented
class PromptBatch(NamedTuple):
    """The prompts of a step.

    Attributes:
      prompts: tokenised, [P, L].
      columns: of the rows: their prompt as it was written, and what they have beside.
      key: of what is sampled.
    """

    prompts: Prompts
    columns: dict[str, list]
    key: Any


@documented
class PromptSet(NamedTuple):
    """Rows of prompts, tokenised.

    Attributes:
      prompts: [N, L].
      rows: all with the same columns.
    """

    prompts: Prompts
    rows: Sequence[Row]

    def take(self, seed: int, number: int, size: int, *, narrow: bool = True) -> PromptBatch:
        """The prompts of step `number`, from 0: a pure function of seed and number."""
        chosen = data.batch_indices(seed, number, len(self.rows), size)
        # Folded from the seed by number: a resumed run samples what the first would have.
        key = jax.random.fold_in(jax.random.key(seed), number)
        return self.select(chosen, key, narrow=narrow)

    def select(self, chosen: Any, key: Any, *, narrow: bool = True) -> PromptBatch:
        """These prompts, by their numbers; `narrow` cuts the padding that all of them have, to one
        of few widths, since a program is compiled for each.
        """
        # A row's completion is none of the model's: reward functions must not take it for one.
        rows = [self.rows[i] for i in chosen]
        columns = {
            name: [row.get(name) for row in rows] for name in rows[0] if name != "completion"
        }
        prompts = datasets.select(self.prompts, np.asarray(chosen))
        # Programs that are made ahead are those of the widest prompts.
        narrow = narrow and not programs.is_planned()
        return PromptBatch(_narrowed(prompts) if narrow else prompts, columns, key)


def _narrowed(prompts: Prompts) -> Prompts:
    """The last columns of prompts, as many as the longest needs; a whole, a half, a quarter … of
    all.

    >>> _narrowed(Prompts(np.ones((1, 80)), np.arange(80)[None] >= 55)).tokens.shape
    (1, 40)
    """
    # An encoder has its own columns, and the decoder's are few.
    if prompts.inputs is not None:
        return prompts
    longest = int(np.asarray(prompts.mask).sum(-1).max())
    width = prompts.tokens.shape[1]
    # 32: below that another program costs more than its padding.
    while width // 2 >= max(longest, 32):
        width //= 2
    return prompts._replace(tokens=prompts.tokens[:, -width:], mask=prompts.mask[:, -width:])


def tokenize(
    tokenizer: Any,
    rows: list[Row],
    seq2seq: data.Seq2Seq | None = None,
    *,
    max_prompt_length: int | None = None,
    say: Callable | None = None,
) -> PromptSet:
    """Checks and tokenises rows with a `prompt`.

    Args:
      tokenizer: of `transformers`.
      rows: with `prompt`.
      seq2seq: how an encoder-decoder reads them; None: the model is none.
      max_prompt_length: rows with more tokens are left out, and how many is said; None: none are,
        and prompts that make others far wider than they are is said.
      say: `(text)`; None: nothing is said.

    Raises: ValueError for a row without a prompt or with one that cannot be tokenised, and where no
    row is left.
    """
    lay_out = data.prompts if seq2seq is None else seq2seq.prompts
    prompts = data.tokenize_prompts(tokenizer, rows)
    lengths = np.array([len(prompt) for prompt in prompts])
    if max_prompt_length is None:
        wide = lengths.max()
        # "lower": a length that a prompt really has, and not one between the widest and the next.
        usual = int(np.percentile(lengths, 99, method="lower"))
        # 64 at least: among short prompts one of 100 tokens costs nothing worth a message.
        if say and wide > 4 * max(usual, 64):
            say(
                f"the longest prompt, row {lengths.argmax()}, has {wide} tokens, 99 of 100 have at "
                f"most {usual}, and steps with it are that wide; --max_prompt_length {usual} leaves "
                "such rows out"
            )
        return PromptSet(lay_out(prompts), data.filled(rows))
    fitting = np.flatnonzero(lengths <= max_prompt_length)
    if not fitting.size:
        raise ValueError(
            f"all {len(rows)} prompts have more than max_prompt_length {max_prompt_length} tokens, "
            "the shortest "
            f"{lengths.min()}; raise it"
        )
    left_out = len(rows) - len(fitting)
    if say and left_out:
        say(
            f"{left_out} of {len(rows)} rows were left out: their prompts have more than "
            "max_prompt_length "
            f"{max_prompt_length} tokens"
        )
    return PromptSet(
        lay_out([prompts[i] for i in fitting]), data.filled([rows[i] for i in fitting])
    )


def load(
    options: PromptOptions, tokenizer: Any, seq2seq: data.Seq2Seq | None, *, say: Callable
) -> tuple[PromptSet, PromptSet | None]:
    """Prompts to train on, and held-out prompts; None for the second where none were requested."""
    train, held_out = datasets.load_rows(options, tasks.prompts)
    limits: dict[str, Any] = dict(max_prompt_length=options.max_prompt_length, say=say)
    held_out_prompts = tokenize(tokenizer, held_out, seq2seq, **limits) if held_out else None
    return tokenize(tokenizer, train, seq2seq, **limits), held_out_prompts
