"""The order of batches as a pure function of seed and step, so that resuming needs no iterator
state.
"""

import numpy as np


def batch_indices(
    seed: int, step: int, rows: int, batch: int, *, process_index: int = 0, process_count: int = 1
) -> np.ndarray:
    """Which rows make up the batch of a step: a new permutation every epoch, the rest of an epoch
    left out.

    Args:
      seed, step: any integers from 0.
      rows: how many there are.
      batch: how many a step takes, over all hosts.
      process_index, process_count: which host asks, of how many, as `jax.process_index()` and
        `jax.process_count()` say: the hosts' shares, one after the other, are the batch that a
        single host would take.  This is the order in which `jax.make_array_from_process_local_data`
        joins them.

    Returns: `[batch / process_count]` indices.

    Raises: ValueError where a batch is larger than the data, does not split evenly, or there is no
    such host.

    >>> a, b = batch_indices(0, 0, 4, 2), batch_indices(0, 1, 4, 2)
    >>> sorted([*a, *b]) == [0, 1, 2, 3]
    True
    >>> batch_indices(0, 0, 4, 2, process_index=1, process_count=2).tolist() == [a[1]]
    True
    """
    per_epoch = rows // batch if batch > 0 else 0
    if per_epoch == 0:
        raise ValueError(
            f"a batch of {batch} rows cannot be made of {rows}; use a smaller batch or more data"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index {process_index} but process_count {process_count}; hosts count from 0"
        )
    if batch % process_count:
        raise ValueError(
            f"a batch of {batch} rows does not split evenly over {process_count} hosts; use a "
            "multiple"
        )
    # Every host permutes all rows by the same seed: they agree without a word between them.
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    share = batch // process_count
    start = place * batch + process_index * share
    return order[start : start + share]
