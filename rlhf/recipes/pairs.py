"""What recipes on preference pairs share: rows as pairs, and objectives by name, alone or mixed."""

import inspect
from collections.abc import Callable, Sequence

from rlhf import data
from rlhf.data.types import Row
from rlhf.losses import preference
from rlhf.rollouts import Pairs


def lay_out(tokenizer, rows: list[Row], packing: str, length: int, say: Callable) -> Pairs:
    """Preference rows as pairs; what is cut or left out is said."""
    rows = [data.extract_prompt(row) if "prompt" not in row else row for row in data.checked(rows, data.IMPLICIT_PREFERENCE)]
    sides = (data.tokenize_completions(tokenizer, rows, column=column) for column in ("chosen", "rejected"))
    kept = data.truncate(*sides, length=length)
    if kept.rows_cut or kept.rows_removed:
        cut = f"{kept.rows_cut} sequences lost {kept.tokens_cut} tokens beyond {length}"
        say(f"{cut}; {kept.rows_removed} pairs with a side that has nothing to train on were left out")
    return data.best_fit_pairs(*kept.sides, length=2 * length) if packing == "bfd" else data.pairs(*kept.sides)


def segments(pairs: Pairs) -> int:
    """The most sequences of a row."""
    return int(pairs.segment_ids.max())


def sft(chosen, rejected, ref_chosen, ref_rejected, *, chosen_length, rejected_length):
    """`-log π_c / |c|`: cross-entropy of the chosen completion, a term for mixtures (RPO, MPO)."""
    return 0.0 - preference.averages(chosen, rejected, chosen_length, rejected_length)[0]


LOSSES = {
    fn.__name__: fn
    for fn in (
        preference.sigmoid, preference.sigmoid_norm, preference.hinge, preference.ipo, preference.exo, preference.robust,
        preference.discopop, preference.nca, preference.bco_pair, preference.sppo, preference.apo_zero,
        preference.apo_down, sft,
    )
}  # fmt: skip


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
