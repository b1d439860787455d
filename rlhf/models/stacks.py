"""What a leaf is in its checkpoint's file, a matrix or a vector, however it is stacked here."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax
import numpy as np

# Logical axes over which leaves are stacked that a file has one by one.
STACKS = ("layers", "expert")


def rank(names: Sequence[str], x: Any) -> int:
    """Axes that a leaf has in the file: without those of layers and experts.

    Args:
      names: the keys down to the leaf, `["layers", "q"]`.  What is under a key `layers`
        is stacked over them, unless the next key is a number; `expert_…` over experts too.
      x: anything with a rank.

    >>> rank(["layers", "attention_norm"], np.ones((2, 4))), rank(["layers", "expert_up"], np.ones((2, 3, 4, 8)))
    (1, 2)
    """
    # A number follows where layers were cut from their stack, `("layers", "0", "q")`.
    stacked = any(name == "layers" and not after.isdigit() for name, after in pairwise(names))
    return np.ndim(x) - stacked - any(name.startswith("expert_") for name in names)


def matrices(params: Any, axes: Any = None) -> Any:
    """Which leaves are matrices in the checkpoint's file: those that weight decay is for, as
    transformers has it.

    Scales of norms, biases and DoRA's magnitudes are none, though they are stacked here,
    `[layers, D]`; embeddings, tables of positions, adapters and the weights of heads are.  A
    `scalar_head`'s weight `[D]` is `[1, D]` in the file.

    Args:
      params: parameters, or a part of them such as adapters.
      axes: `lm.axes()`, for a model of your own that names its stacks "layers" and "expert"; None:
        by the names of the leaves.

    Returns: a pytree of bools like `params`: the `mask` of `optax.adamw`.

    Raises: ValueError where `axes` are not those of `params`.

    >>> matrices({"layers": {"q": np.ones((2, 4, 4)), "mlp_norm": np.ones((2, 4))}, "embedding": np.ones((8, 4))})
    {'embedding': True, 'layers': {'mlp_norm': False, 'q': True}}
    >>> matrices({"blocks": np.ones((2, 4))}, {"blocks": ("layers", "embed")})
    {'blocks': False}
    """
    if axes is not None:
        # A tuple of names is itself a pytree, so that it must be said to be a leaf.
        def is_names(x):
            return x is None or isinstance(x, tuple)

        def is_matrix(names, x):
            return np.ndim(x) - sum(name in STACKS for name in names or ()) > 1

        return jax.tree.map(is_matrix, axes, params, is_leaf=is_names)
    ranks = {
        jax.tree_util.keystr(path): np.ndim(x)
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }

    def one(path, x):
        names = [jax.tree_util.keystr((key,), simple=True) for key in path]
        if names and names[-1].endswith("bias"):
            return False
        # A scalar head is known by its bias, which is a number: no other `weight` has such a one.
        sibling = (*path[:-1], jax.tree_util.DictKey("bias"))
        of_scalar_head = names[-1:] == ["weight"] and ranks.get(jax.tree_util.keystr(sibling)) == 0
        return rank(names, x) > 1 or of_scalar_head

    return jax.tree_util.tree_map_with_path(one, params)
