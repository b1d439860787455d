"""What a leaf is in its checkpoint's file, a matrix or a vector, whatever it is stacked over here."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax
import numpy as np

STACKS = ("layers", "expert")  # logical axes over which leaves are stacked that a file has one by one


def rank(names: Sequence[str], x: Any) -> int:
    """Axes that a leaf has in the file: without those of layers and experts.

    Args:
      names: the keys above the leaf and its own, `["layers", "q"]`.  What is under a key `layers` is stacked over them, unless
        the next key is a number; `expert_…` over experts too.
      x: anything with a rank.

    >>> rank(["layers", "attention_norm"], np.ones((2, 4))), rank(["layers", "expert_up"], np.ones((2, 3, 4, 8)))
    (1, 2)
    """
    stacked = any(name == "layers" and not after.isdigit() for name, after in pairwise(names))
    return np.ndim(x) - stacked - any(name.startswith("expert_") for name in names)


def matrices(params: Any, axes: Any = None) -> Any:
    """Which leaves are matrices in the checkpoint's file: those that weight decay is for, as transformers has it.

    Scales of norms, biases and DoRA's magnitudes are none, though they are stacked here, `[layers, D]`; embeddings, tables of
    positions, adapters and the weights of heads are.  A `scalar_head`'s weight `[D]` is `[1, D]` in the file.

    Args:
      params: parameters, or a part of them such as adapters.
      axes: `lm.axes()`, for a model of your own that names its stacks "layers" and "expert"; None: by the names of the leaves.

    Returns: a pytree of bools like `params`: the `mask` of `optax.adamw`.

    Raises: ValueError where `axes` are not those of `params`.

    >>> matrices({"layers": {"q": np.ones((2, 4, 4)), "mlp_norm": np.ones((2, 4))}, "embedding": np.ones((8, 4))})
    {'embedding': True, 'layers': {'mlp_norm': False, 'q': True}}
    >>> matrices({"blocks": np.ones((2, 4))}, {"blocks": ("layers", "embed")})
    {'blocks': False}
    """
    if axes is not None:
        is_names = lambda x: x is None or isinstance(x, tuple)
        in_file = lambda names, x: np.ndim(x) - sum(name in STACKS for name in names or ()) > 1
        return jax.tree.map(in_file, axes, params, is_leaf=is_names)
    ranks = {jax.tree_util.keystr(path): np.ndim(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}

    def one(path, x):
        names = [jax.tree_util.keystr((key,), simple=True) for key in path]
        if names and names[-1].endswith("bias"):
            return False
        sibling = (*path[:-1], jax.tree_util.DictKey("bias"))
        of_scalar_head = names[-1:] == ["weight"] and ranks.get(jax.tree_util.keystr(sibling)) == 0
        return rank(names, x) > 1 or of_scalar_head

    return jax.tree_util.tree_map_with_path(one, params)
