"""The order of batches as a pure function of seed and step, so that resuming needs no iterator state."""

import numpy as np


def batch_indices(seed: int, step: int, rows: int, batch: int) -> np.ndarray:
    """Which rows make up the batch of a step: a new permutation every epoch, the rest of an epoch left out.

    Args:
      seed, step: any integers from 0.
      rows: how many there are.
      batch: how many a step takes.

    Returns: `[batch]` indices.

    Raises: ValueError where a batch is larger than the data.

    >>> a, b = batch_indices(0, 0, 4, 2), batch_indices(0, 1, 4, 2)
    >>> sorted([*a, *b]) == [0, 1, 2, 3]
    True
    """
    per_epoch = rows // batch if batch > 0 else 0
    if per_epoch == 0:
        raise ValueError(f"a batch of {batch} rows cannot be made of {rows}; use a smaller batch or more data")
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    return order[place * batch : (place + 1) * batch]
