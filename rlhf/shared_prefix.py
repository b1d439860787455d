"""Prefixes that rows have in common, which a model then reads once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf.fields import documented


@documented
class SharedPrefix(NamedTuple):
    """Rows in groups that have their first columns in common: a prompt's samples, the two
    completions of a pair.

    Attributes:
      group_size: rows of a group, one after another; 1: every row by itself.
      suffix: the number of last columns, in which the rows of a group differ.

    >>> shared = SharedPrefix(group_size=2, suffix=1)
    >>> x = jnp.array([[5, 6, 7], [5, 6, 8]])
    >>> shared.deduplicate(x).tolist()
    [[5, 6, 7, 8]]
    >>> shared.expand(shared.deduplicate(x)).tolist()
    [[5, 6, 7], [5, 6, 8]]
    """

    group_size: int = 1
    suffix: int = 0

    def fitting(self, rows: int, parts: int) -> "SharedPrefix":
        """The same with the largest groups that stay together where `rows` are cut into `parts`; at
        worst of one row.

        >>> [SharedPrefix(8, 64).fitting(32, parts).group_size for parts in (1, 4, 8, 16, 32)]
        [8, 8, 4, 2, 1]
        """

        # A smaller group must divide the larger one, and parts must consist of full groups.
        def divides(n: int) -> bool:
            return self.group_size % n == 0 and rows // n % parts == 0

        fit = [n for n in range(1, self.group_size + 1) if divides(n)]
        return self._replace(group_size=max(fit, default=1))

    def deduplicate(self, x: jax.Array) -> jax.Array:
        """`[B, T, ...]` -> `[B / G, T - S + G * S, ...]`: a group's prefix once, then each row's
        suffix of S columns.
        """
        if self.group_size == 1:
            return x
        x = x.reshape(-1, self.group_size, *x.shape[1:])
        start = x.shape[2] - self.suffix
        # The first row speaks for its group: these columns are the same in all.
        prefix = x[:, 0, :start]
        suffixes = x[:, :, start:].reshape(len(x), -1, *x.shape[3:])
        return jnp.concatenate([prefix, suffixes], axis=1)

    def expand(self, x: jax.Array) -> jax.Array:
        """The inverse of `deduplicate`."""
        if self.group_size == 1:
            return x
        start = x.shape[1] - self.group_size * self.suffix
        prefixes = jnp.repeat(x[:, :start], self.group_size, axis=0)
        suffixes = x[:, start:].reshape(-1, self.suffix, *x.shape[2:])
        return jnp.concatenate([prefixes, suffixes], axis=1)


# Every row by itself.
NOT_SHARED = SharedPrefix()
