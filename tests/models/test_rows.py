"""What a row gives depends on its tokens alone, in every family: not on other rows, nor on where padding lies."""

import numpy as np
import pytest
from checkpoint_goldens import golden, load, names, outputs
from marks import exhaustive

CAUSAL = names("causal")
FEW = [name for name in ("gemma4_text", "lfm2", "phi3_longrope", "qwen3_next") if name in CAUSAL]
WIDTH = 24
LENGTHS = (9, 7, 5)


def sequences(name):
    tokens = golden(name).input_ids[golden(name).attention_mask == 1]
    starts = np.cumsum((0, *LENGTHS))[:-1]
    return [tokens[start : start + length] for start, length in zip(starts, LENGTHS, strict=True)]


def row(*parts):
    """`(tokens, positions, segment ids)` of sequences at these columns, each its first column and its gaps."""
    out = np.full(WIDTH, 3), np.zeros(WIDTH, int), np.zeros(WIDTH, int)
    for number, (tokens, columns) in enumerate(parts, 1):
        for x, values in zip(out, (tokens, np.arange(len(tokens)), number), strict=True):
            x[columns] = values
    return out


def of_sequences(name, rows, where):
    """The logits of each sequence at `where`, its row and its columns."""
    lm, _, params, _ = load(name)
    arrays = (np.stack(x).astype(np.int32) for x in zip(*rows, strict=True))
    logits = np.asarray(outputs(lm, params, *arrays)[1])
    return [logits[i, columns] for i, columns in where]


@pytest.mark.parametrize("name", exhaustive(CAUSAL, quick=FEW))
def test_rows_and_padding_change_nothing(name):
    """Alone on either side of its padding, in another order, packed, and with padding between its tokens."""
    one, two, three = every = sequences(name)
    left = [WIDTH - length + np.arange(length) for length in LENGTHS]
    right = [np.arange(length) for length in LENGTHS]
    packed = np.split(np.arange(sum(LENGTHS)), np.cumsum(LENGTHS)[:-1])
    # As where turns of unequal length were read one after another.
    apart = np.array([0, 1, 2, 5, 6, 7, 8, 12, 13]), 14 + np.array([0, 2, 3, 4, 7, 8, 9])
    rows = [row(part) for part in zip(every, left, strict=True)]
    rows += [row((two, right[1])), row((three, right[2])), row((one, right[0]))]
    rows += [row(*zip(every, packed, strict=True)), row()]
    expected = of_sequences(name, rows, [*enumerate(left)])
    elsewhere = [(5, right[0]), (3, right[1]), (4, right[2])]
    together = [(6, columns) for columns in packed]
    found = of_sequences(name, rows, [*elsewhere, *together])
    rows[7] = row((one, apart[0]), (two, apart[1]))
    found += of_sequences(name, rows, [(7, columns) for columns in apart])
    for a, b in zip(found, [*expected, *expected, *expected[:2]], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=golden(name).tolerance)
