"""What an SFT step moves between eight CPU devices."""

import collections
import functools
import importlib
from typing import Any

import jax
import numpy as np
import pytest

from rlhf import rollouts, sharding
from rlhf.models import TransformerConfig, transformer
from rlhf.planning import hlo

VOCABULARY, HIDDEN = 40, 32
ROWS, COLUMNS = 8, 12
MATRIX = VOCABULARY * HIDDEN * 4  # bytes


def lm_of(tied: bool):
    sizes: Any = dict(vocab_size=VOCABULARY, num_layers=1, num_heads=2, mlp_size=64)
    return transformer(TransformerConfig(**sizes, hidden_size=HIDDEN, tied=tied))


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCABULARY, (ROWS, COLUMNS)).astype(np.int32)
    positions = np.broadcast_to(np.arange(COLUMNS, dtype=np.int32), tokens.shape)
    return dict(tokens=tokens, positions=positions, segment_ids=np.ones_like(tokens))


def loss_of(lm, params, batch):
    scored = rollouts.score(lm, params, **batch, chunk_size=4)
    return (0.1 * scored.entropy - scored.logprobs).mean()


@pytest.fixture
def large_model(monkeypatch):
    """Three chunks of the loss, and three pieces of the output matrix, as a large one has."""
    monkeypatch.setattr(importlib.import_module("rlhf.rollouts.score"), "CHUNK_TOKENS", 4)
    monkeypatch.setattr(sharding, "PIECE", 1)
    monkeypatch.setattr(sharding, "LANES", 16)


def gradient_on(mesh, tied: bool):
    """The program of value and gradient on a mesh, and what it computes."""
    lm = lm_of(tied)
    params = sharding.create(lm.init, lm.axes(), mesh, jax.random.key(0))
    rows = sharding.shard_batch(batch(), mesh)
    where = jax.tree.map(lambda x: x.sharding, params)
    with jax.set_mesh(mesh):
        gradient = jax.value_and_grad(functools.partial(loss_of, lm))
        program = jax.jit(gradient, out_shardings=(None, where)).lower(params, rows).compile()
        return program.as_text(), jax.device_get(program(params, rows))


@functools.cache
def of_one_device(tied: bool):
    lm = lm_of(tied)
    gradient = jax.value_and_grad(functools.partial(loss_of, lm))
    return jax.device_get(jax.jit(gradient)(lm.init(jax.random.key(0)), batch()))


@pytest.mark.mesh
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sizes", [dict(fsdp=8), dict(data=2, fsdp=4)])
def test_the_output_matrix_is_gathered_once_and_its_gradient_scattered_once(
    tied, sizes, large_model
):
    mesh = sharding.make_mesh(**sizes)
    text, found = gradient_on(mesh, tied)
    moved = hlo.collectives(text)
    # Over `data` the sums that a device has of its columns follow, beside those of all other arrays.
    of_matrix = [
        one
        for one in moved
        if "shard_map" in one.op_name and hlo.axes_of(one.devices, mesh.shape) == ("fsdp",)
    ]
    part = MATRIX * (sizes["fsdp"] - 1) // sizes["fsdp"]
    total = collections.Counter()
    for one in of_matrix:
        total[one.kind] += one.total
    assert total == {"all-gather": part, "reduce-scatter": part}
    # The loop of the chunks moves nothing; that of the only layer is none.
    assert not [one for one in moved if one.depth]
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(of_one_device(tied)),
        jax.tree.leaves(found),
        strict=True,
    ):
        bound = 1e-5 * np.abs(x).max()
        np.testing.assert_allclose(y, x, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path))


@pytest.mark.mesh
def test_an_embedding_s_gradient_is_summed_where_its_columns_are():
    """Not all of it on every device: with `data` each sums the columns that it has."""
    text, _ = gradient_on(sharding.make_mesh(data=2, fsdp=4), tied=False)
    moved = [one for one in hlo.collectives(text) if f"[{VOCABULARY},{HIDDEN}]" in one.shape]
    assert [one.kind for one in moved] == []
