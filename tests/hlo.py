"""What compiled programs move between devices inside their loops, and how loops of chunks look, read from XLA's text."""

import re

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from rlhf.models.delta import delta_rule
from rlhf.planning import hlo


def in_loops(text: str) -> list[tuple[str, int]]:
    """`(kind, elements)` of the collectives inside loops, and of what those call."""
    found = []
    for one in hlo.collectives(text):
        if one.depth:
            sizes = re.findall(r"\w+\[([\d,]*)\]", one.shape)
            number = max(hlo.product(size) for size in sizes)
            found.append((one.kind, number))
    return found


def check_delta_rule(device, channels: int) -> None:
    """Value and gradient of 512 tokens for a device: loops of a turn a chunk, and no array [T, T]."""
    length, chunk, width = 512, 64, 128
    where = SingleDeviceSharding(device)
    shape = lambda *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct(sizes, dtype, sharding=where)
    rows = 1, 2, length
    qkv = [shape(*rows, width)] * 3
    ids = shape(1, length, dtype=jnp.int32)

    def loss(q, k, v, decay, beta, ids):
        return jnp.sin(delta_rule(q, k, v, decay, beta, ids, chunk=chunk)[0]).sum()

    graded = jax.jit(jax.value_and_grad(loss, argnums=range(5)))
    text = graded.lower(*qkv, shape(*rows, channels), shape(*rows), ids).compile().as_text()
    assert text is not None
    assert not hlo.squares(text, length, length)
    assert hlo.squares(text, chunk, chunk)
    turns = list(hlo.turns(text).values())
    # Of the value and of the gradient.
    assert turns == [length // chunk] * 2
