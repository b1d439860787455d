"""What recipes on preference pairs share: rows as pairs, and objectives by name, alone or mixed."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf import data
from rlhf.data import Tokenized
from rlhf.data.types import Row
from rlhf.losses import preference
from rlhf.rollouts import Pairs
from rlhf.shared_prefix import SharedPrefix
from rlhf.training import datasets

COLUMNS = ("chosen", "rejected")
LENGTHS = ("chosen_length", "rejected_length")


def lay_out(
    tokenizer: Any,
    rows: list[Row],
    packing: str,
    length: int,
    say: Callable,
    columns: tuple[str, ...] = COLUMNS,
    *,
    seq2seq: data.Seq2Seq | None = None,
    imitated: bool = True,
) -> Pairs:
    """Preference rows as pairs; what is cut or left out is said.  A third column makes triples, K =
    3, which are not packed.

    Args:
      tokenizer: of `transformers`.
      rows: of preferences.
      packing: "none", or "bfd" for several pairs a row.
      length: the most tokens of a prompt with its completion.
      say: `(text)`, called where something is cut or left out.
      columns: of the completions.
      seq2seq: how an encoder-decoder reads them; None: the model is none.
      imitated: whether a model learns to write the completions; False for a reward model: nobody is
        warned that their end token is missing.
    """
    if seq2seq is not None and packing != "none":
        raise ValueError(
            f"packing {packing}: an encoder-decoder takes one prompt with its completion a row; "
            "leave it out"
        )
    kind = data.TRIPLE if "reference" in columns else data.IMPLICIT_PREFERENCE

    # Completions that begin with their prompt are split from it: only what differs is compared.
    def with_prompt(row: Row) -> Row:
        has_prompt = "prompt" in row and not data.repeats_prompt(row)
        return row if has_prompt else data.extract_prompt(row)

    rows = list(data.each(data.checked(rows, kind), with_prompt))
    sides = (
        data.tokenize_completions(tokenizer, rows, column=column, imitated=imitated)
        for column in columns
    )
    fitting = datasets.truncated(*sides, length=length, say=say)
    if packing == "bfd":
        # Both sides of a pair lie in one row, of which each may have `length` tokens.
        return data.best_fit_pairs(*fitting.sides, length=2 * length)
    # Row by row: chosen, rejected, chosen, …  Neighbours have the prompt in common.
    of_pairs = [side for row in zip(*fitting.sides, strict=True) for side in row]
    if seq2seq is not None:
        arrays = seq2seq.batch(of_pairs)
    else:
        arrays = (data.aligned if _aligned_is_narrower(of_pairs, len(columns)) else data.batch)(
            of_pairs
        )

    def in_rows(x):
        return x.reshape(-1, len(columns), x.shape[-1])

    fields = ("tokens", "mask", "positions", "segment_ids", "inputs")
    return Pairs(**{name: jax.tree.map(in_rows, getattr(arrays, name)) for name in fields})


def lay_out_encoder_pairs(
    tokenizer, rows: list[Row], packing: str, length: int, say: Callable
) -> Pairs:
    """Preference rows as an encoder reads them; what is cut is said."""
    rows = list(data.checked(rows, data.IMPLICIT_PREFERENCE))

    # An encoder reads prompt and completion as one text; a prompt that the completion repeats would
    # be read twice.
    def without_repeated_prompt(row: Row) -> Row:
        return {**row, "prompt": None} if data.repeats_prompt(row) else row

    rows = list(data.each(rows, without_repeated_prompt))
    tokenized = [data.tokenize_joined(tokenizer, rows, column=column) for column in COLUMNS]
    sides = [[data.fitted(row, length) for row in side] for side in tokenized]
    lost = [
        len(row.tokens) - length for side in tokenized for row in side if len(row.tokens) > length
    ]
    if lost:
        say(f"{len(lost)} sequences lost {sum(lost)} tokens beyond {length}, after their first")
    return (
        data.best_fit_pairs(*sides, length=2 * length) if packing == "bfd" else data.pairs(*sides)
    )


def _aligned_is_narrower(rows: list[Tokenized], in_rows: int) -> bool:
    """Whether fewer columns are read, those in common once, where prompts end together than where
    rows begin together.
    """
    prompts, lengths = (
        np.array(x)
        for x in zip(*((row.mask.index(True), len(row.tokens)) for row in rows), strict=True)
    )
    # Prompts that end together: the widest prompt once, then every row's widest completion.  Rows
    # that begin together: every row in full, less the columns that all prompts fill, once a group.
    aligned = prompts.max() + in_rows * (lengths - prompts).max()
    return bool(aligned < in_rows * lengths.max() - (in_rows - 1) * prompts.min())


def shared_prefix(*several: Pairs | None) -> SharedPrefix | None:
    """The columns that the rows of every pair have in common, for `score` to read once.

    Args:
      several: pairs of NumPy with the same K, such as those to train on and the held-out ones.

    Returns: None where there are none, as in packed rows.
    """
    # One suffix for all, so that training and evaluation share a program.
    given = [pairs for pairs in several if pairs is not None]
    suffix = max(pairs.tokens.shape[2] - _common(pairs) for pairs in given)
    rows = given[0].tokens.shape[1]
    return (
        SharedPrefix(rows, suffix)
        if rows > 1 and 0 < suffix < min(pairs.tokens.shape[2] for pairs in given)
        else None
    )


def _common(pairs: Pairs) -> int:
    """The first columns that are the same in all rows of each pair."""
    # Equal tokens are not enough: hidden states depend on position and segment too.
    arrays = (pairs.tokens, pairs.positions, pairs.segment_ids)
    same = np.all([(x == x[:, :1]).all((0, 1)) for x in arrays], axis=0)
    # Ones up to the first column that differs, zeros after it.
    return int(np.cumprod(same).sum())


def segments(*several: Pairs | None) -> int:
    """The most sequences of a row."""
    return max(int(pairs.segment_ids.max()) for pairs in several if pairs is not None)


def sft(chosen, rejected, ref_chosen, ref_rejected, *, chosen_length, rejected_length):
    """`-log π_c / |c|`: cross-entropy of the chosen completion, a term for mixtures (RPO, MPO)."""
    # `0.0 -` and no sign: the negative of 0 would be -0.
    return 0.0 - preference.averages(chosen, rejected, chosen_length, rejected_length)[0]


LOSSES = {
    fn.__name__: fn
    for fn in (
        preference.sigmoid,
        preference.sigmoid_norm,
        preference.hinge,
        preference.ipo,
        preference.exo,
        preference.robust,
        preference.discopop,
        preference.nca,
        preference.bco_pair,
        preference.sppo,
        preference.apo_zero,
        preference.apo_down,
        preference.aot,
        preference.aot_unpaired,
        sft,
    )
}
# These sort over the mini-batch, so that micro-batches need `coupled_train_step`.
COUPLED = ("aot", "aot_unpaired")


def without_reference(loss: Callable) -> Callable:
    """A loss on pairs, `(chosen, rejected)`, of one that takes the reference's log-probs too: all
    0.
    """

    # `wraps`: the signature tells which options a loss takes.
    @wraps(loss)
    def free(chosen, rejected, **options):
        return loss(chosen, rejected, jnp.zeros_like(chosen), jnp.zeros_like(rejected), **options)

    return free


def check(loss: Callable, *, references: int = 2, **options) -> None:
    """Raises what a loss on pairs raises of its options, before a model is there."""
    one = jax.ShapeDtypeStruct((1,), jnp.float32)
    taken = inspect.signature(loss).parameters
    # Traced on shapes: options are checked, and nothing is computed.
    jax.eval_shape(
        partial(loss, **options),
        *[one] * (2 + references),
        **{name: one for name in LENGTHS if name in taken},
    )


def mixture(names: Sequence[str], weights: Sequence[float], **options) -> Callable:
    """`Σ w_i loss_i`, each with those of the options that it takes.

    Raises: ValueError for a loss that is not known, unequal numbers, and an option that none of
      them
    takes.
    """
    unknown = [name for name in names if name not in LOSSES]
    if unknown:
        raise ValueError(f"loss {unknown[0]!r} is not known; known: {', '.join(LOSSES)}")
    if len(weights) != len(names):
        raise ValueError(f"{len(names)} losses but {len(weights)} loss_weights; give one each")
    parts = [LOSSES[name] for name in names]
    # Each loss gets only what it takes: only some divide by lengths or smooth labels.
    takes = [set(inspect.signature(part).parameters) for part in parts]
    if useless := set(options) - set().union(*takes):
        raise ValueError(
            f"{', '.join(sorted(useless))} means nothing to {', '.join(names)}; leave it out"
        )

    def loss(chosen, rejected, ref_chosen, ref_rejected, *, beta, chosen_length, rejected_length):
        given = {
            "beta": beta,
            "chosen_length": chosen_length,
            "rejected_length": rejected_length,
            **options,
        }

        def term(part, taken):
            options = {name: value for name, value in given.items() if name in taken}
            return part(chosen, rejected, ref_chosen, ref_rejected, **options)

        return sum(
            w * term(part, taken) for w, part, taken in zip(weights, parts, takes, strict=True)
        )

    return loss
