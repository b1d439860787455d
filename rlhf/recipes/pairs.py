"""What recipes on preference pairs share: rows as pairs, and objectives by name, alone or mixed."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial, wraps

import jax
import jax.numpy as jnp
import numpy as np

from rlhf import data, losses, rollouts
from rlhf.data import Tokenized
from rlhf.data.types import Row
from rlhf.lm import SharedPrefix
from rlhf.losses import preference
from rlhf.recipes import setup
from rlhf.rollouts import Pairs

COLUMNS = ("chosen", "rejected")
LENGTHS = ("chosen_length", "rejected_length")


def lay_out(
    tokenizer, rows: list[Row], packing: str, length: int, say: Callable, columns: tuple[str, ...] = COLUMNS, *,
    seq2seq: data.Seq2Seq | None = None, imitated: bool = True,
) -> Pairs:  # fmt: skip
    """Preference rows as pairs; what is cut or left out is said.  A third column makes triples, K = 3, which are not packed.

    Args:
      seq2seq: how an encoder-decoder reads them; None: the model is none.
      imitated: as in `data.tokenize_completions`.
    """
    if seq2seq is not None and packing != "none":
        raise ValueError(f"packing {packing}: an encoder-decoder takes one prompt with its answer a row; leave it out")
    kind = data.TRIPLE if "reference" in columns else data.IMPLICIT_PREFERENCE
    apart = lambda row: data.extract_prompt(row) if "prompt" not in row or data.repeats_prompt(row) else row
    rows = list(data.each(data.checked(rows, kind), apart))
    sides = (data.tokenize_completions(tokenizer, rows, column=column, imitated=imitated) for column in columns)
    kept = setup.truncated(*sides, length=length, say=say)
    if packing == "bfd":
        return data.best_fit_pairs(*kept.sides, length=2 * length)
    of_pairs = [side for row in zip(*kept.sides, strict=True) for side in row]
    if seq2seq is not None:
        arrays = seq2seq.batch(of_pairs)
    else:
        arrays = (data.aligned if _aligned_is_narrower(of_pairs, len(columns)) else data.batch)(of_pairs)
    together = lambda x: x.reshape(-1, len(columns), x.shape[-1])
    fields = ("tokens", "mask", "positions", "segment_ids", "inputs")
    return Pairs(**{name: jax.tree.map(together, getattr(arrays, name)) for name in fields})


def lay_out_whole(tokenizer, rows: list[Row], packing: str, length: int, say: Callable) -> Pairs:
    """Preference rows as an encoder reads them; what is cut is said."""
    rows = list(data.checked(rows, data.IMPLICIT_PREFERENCE))
    apart = lambda row: {**row, "prompt": None} if data.repeats_prompt(row) else row
    rows = list(data.each(rows, apart))
    whole = [data.tokenize_whole(tokenizer, rows, column=column) for column in COLUMNS]
    sides = [[data.fitted(row, length) for row in side] for side in whole]
    lost = [len(row.tokens) - length for side in whole for row in side if len(row.tokens) > length]
    if lost:
        say(f"{len(lost)} sequences lost {sum(lost)} tokens beyond {length}, after their first")
    return data.best_fit_pairs(*sides, length=2 * length) if packing == "bfd" else data.pairs(*sides)


def _aligned_is_narrower(rows: list[Tokenized], together: int) -> bool:
    """Whether fewer columns are read, those in common once, where prompts end together than where rows begin together."""
    prompts, lengths = (np.array(x) for x in zip(*((row.mask.index(True), len(row.tokens)) for row in rows), strict=True))
    aligned = prompts.max() + together * (lengths - prompts).max()
    return bool(aligned < together * lengths.max() - (together - 1) * prompts.min())


def shared_prefix(*several: Pairs | None) -> SharedPrefix | None:
    """The columns that the rows of every pair have in common, for `score` to read once.

    Args:
      several: pairs of NumPy with the same K, such as those to train on and to judge by.

    Returns: None where there are none, as in packed rows.
    """
    given = [pairs for pairs in several if pairs is not None]
    own = max(pairs.tokens.shape[2] - _common(pairs) for pairs in given)
    rows = given[0].tokens.shape[1]
    return SharedPrefix(rows, own) if rows > 1 and 0 < own < min(pairs.tokens.shape[2] for pairs in given) else None


def _common(pairs: Pairs) -> int:
    """The first columns that are the same in all rows of each pair."""
    arrays = (pairs.tokens, pairs.positions, pairs.segment_ids)
    same = np.all([(x == x[:, :1]).all((0, 1)) for x in arrays], axis=0)
    return int(np.cumprod(same).sum())


def sums(per_token, pairs: Pairs, mask=None, *, max_segments: int = 1):
    """Sums over the trained tokens of each completion, chosen and rejected: `[R * K, T]` -> `[R, N, 2]`; of triples 3.

    Args:
      mask: `[R * K, T]` bool, where other tokens count.
    """
    rows = rollouts.pair_rows(pairs)
    of_sequences = losses.segment_sum(
        per_token, rows.mask if mask is None else mask, rows.segment_ids, max_segments=max_segments
    )
    return of_sequences.reshape(pairs.tokens.shape[0], -1, max(pairs.tokens.shape[1], 2))


def lengths(pairs: Pairs, *, max_segments: int = 1):
    """`[R, N, 2]` float32: the trained tokens of each completion."""
    return sums(rollouts.pair_rows(pairs).mask.astype(jnp.float32), pairs, max_segments=max_segments)


def segments(*several: Pairs | None) -> int:
    """The most sequences of a row."""
    return max(int(pairs.segment_ids.max()) for pairs in several if pairs is not None)


def sft(chosen, rejected, ref_chosen, ref_rejected, *, chosen_length, rejected_length):
    """`-log π_c / |c|`: cross-entropy of the chosen completion, a term for mixtures (RPO, MPO)."""
    return 0.0 - preference.averages(chosen, rejected, chosen_length, rejected_length)[0]


LOSSES = {
    fn.__name__: fn
    for fn in (
        preference.sigmoid, preference.sigmoid_norm, preference.hinge, preference.ipo, preference.exo, preference.robust,
        preference.discopop, preference.nca, preference.bco_pair, preference.sppo, preference.apo_zero,
        preference.apo_down, preference.aot, preference.aot_unpaired, sft,
    )
}  # fmt: skip
COUPLED = ("aot", "aot_unpaired")  # they sort over the mini-batch


def without_reference(loss: Callable) -> Callable:
    """A loss on pairs, `(chosen, rejected)`, of one that takes the reference's log-probs too: all 0."""

    @wraps(loss)
    def free(chosen, rejected, **knobs):
        return loss(chosen, rejected, jnp.zeros_like(chosen), jnp.zeros_like(rejected), **knobs)

    return free


def check(loss: Callable, *, references: int = 2, **knobs) -> None:
    """Raises what a loss on pairs raises of its knobs, before a model is there."""
    one = jax.ShapeDtypeStruct((1,), jnp.float32)
    taken = inspect.signature(loss).parameters
    jax.eval_shape(partial(loss, **knobs), *[one] * (2 + references), **{name: one for name in LENGTHS if name in taken})


def mixture(names: Sequence[str], weights: Sequence[float], **knobs) -> Callable:
    """`Σ w_i loss_i`, each with those of the knobs that it takes.

    Raises: ValueError for a loss that is not known, unequal numbers, and a knob that none of them takes.
    """
    unknown = [name for name in names if name not in LOSSES]
    if unknown or len(weights) != len(names):
        raise ValueError(
            f"loss {unknown[0]!r} is not known; known: {', '.join(LOSSES)}" if unknown
            else f"{len(names)} losses but {len(weights)} loss_weights; give one each"
        )  # fmt: skip
    parts = [LOSSES[name] for name in names]
    takes = [set(inspect.signature(part).parameters) for part in parts]
    if useless := set(knobs) - set().union(*takes):
        raise ValueError(f"{', '.join(sorted(useless))} means nothing to {', '.join(names)}; leave it out")

    def loss(chosen, rejected, ref_chosen, ref_rejected, *, beta, chosen_length, rejected_length):
        given = {"beta": beta, "chosen_length": chosen_length, "rejected_length": rejected_length, **knobs}
        of = lambda part, taken: part(chosen, rejected, ref_chosen, ref_rejected, **{k: given[k] for k in given if k in taken})
        return sum(w * of(part, taken) for w, part, taken in zip(weights, parts, takes, strict=True))

    return loss
