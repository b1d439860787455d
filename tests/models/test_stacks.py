"""What is a matrix in the file, and only that, decays, is quantised and gets adapters: leaves are stacked here, not there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_goldens import CHECKPOINTS, names
from marks import exhaustive

from rlhf import adapters
from rlhf.from_flax import from_linen
from rlhf.models import (
    Transformer,
    TransformerConfig,
    huggingface,
    mapping,
    matrices,
    quantized,
    scalar_head,
    transformer,
)
from rlhf.models import huggingface_config as configs
from rlhf.models.families import FAMILIES
from rlhf.training.optimizers import make_optimizer
from rlhf.training.options import TrainingOptions
from rlhf.training.q_heads import heads_of

TINY = TransformerConfig(
    vocab_size=8, hidden_size=4, num_layers=3, num_heads=1, mlp_size=8, qkv_bias=True
)
EVERY = names("causal", "seq2seq", "seqcls", "tokcls", "encoder_seqcls")
DECAY = TrainingOptions(weight_decay=0.1, learning_rate=0.1, schedule="constant")


def ones(part, size=None):
    """Parameters without the time that `init` takes to compile; with a size every axis that is no stack has it: few shapes."""

    def one(path, x):
        stacks = ("layers" in [key.key for key in path]) + path[-1].key.startswith("expert_")
        return np.ones(
            x.shape if size is None else (*x.shape[:stacks], *[size] * len(x.shape[stacks:])),
            np.float32,
        )

    return jax.tree_util.tree_map_with_path(one, jax.eval_shape(part.init, jax.random.key(0)))


def after_no_gradient(params):
    """Parameters after a step on a gradient of zero: weight decay alone has moved them."""
    optimizer = make_optimizer(DECAY, 10)
    updates, _ = optimizer.update(
        jax.tree.map(np.zeros_like, params), optimizer.init(params), params
    )
    return jax.tree.map(lambda x, u: np.asarray(x + u), params, updates)


def file_tensors(rows, params, config):
    """The tensors of a file by name, as they are written."""
    flat = mapping.flat(params)
    where = mapping.places(rows, {path: x.shape for path, x in flat.items()}, config)
    return {name: make() for name, make in mapping.write(where, flat)}


@pytest.mark.parametrize("name", exhaustive(EVERY, quick=EVERY[::4]))
def test_the_matrices_of_a_file_decay_and_nothing_else(name):
    config = huggingface.read_config(CHECKPOINTS / name)
    family = FAMILIES[huggingface.model_type(CHECKPOINTS / name)]
    params = ones(configs.lm_of(config), size=4)
    tensors = file_tensors(family.rows(config), after_no_gradient(params), config)
    assert len(tensors) > 8
    for tensor, x in tensors.items():
        # BART's bias of logits is [1, V], and Kimi's rates are [1, 1, H, 1].
        matrix = x.ndim > 1 and not tensor.endswith(("bias", "A_log"))
        assert (x != 1).any() == (x != 1).all() == matrix, tensor


@pytest.mark.parametrize("name", ["qwen3_moe", "t5"])
def test_axes_say_the_same_as_names(name):
    lm = configs.lm_of(huggingface.read_config(CHECKPOINTS / name))
    params = ones(lm)
    assert matrices(params, lm.axes()) == matrices(params)


def test_every_family_is_there():
    assert {huggingface.model_type(CHECKPOINTS / name) for name in EVERY} >= FAMILIES.keys() - {
        "xlm-roberta"
    }


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_decay_and_their_magnitudes_do_not(dora):
    lm = transformer(TINY)
    trained, _ = adapters.add(
        jax.tree.map(jnp.asarray, ones(lm)), jax.random.key(0), rank=2, dora=dora
    )
    before = jax.tree.map(lambda x: np.ones(x.shape, np.float32), trained)
    for path, x in jax.tree_util.tree_leaves_with_path(after_no_gradient(before)):
        assert (x != 1).all() == (path[-1].key in ("a", "b")), path


@pytest.mark.parametrize(
    "params", [{"lm": ones(transformer(TINY))}, ones(transformer(TINY))], ids=["beside", "alone"]
)
@pytest.mark.parametrize("name", ["value", "q"])
def test_weights_of_heads_decay_and_biases_do_not(name, params):
    """A value head's weight is [1, D] in TRL's file; those of Q are stacked by two."""
    head = (
        ones(scalar_head(4))
        if name == "value"
        else jax.tree.map(np.asarray, heads_of(4, 8).init(jax.random.key(0)))
    )
    moved = matrices({**params, name: head})
    for path, x in jax.tree_util.tree_leaves_with_path(moved[name]):
        assert x == path[-1].key.endswith(("weight", "inner")), path


def test_layers_one_by_one_and_names_of_ones_own():
    layer = {"w": np.ones((2, 2)), "norm": np.ones(2)}
    assert matrices({"layers": {"0": layer}}) == {"layers": {"0": {"w": True, "norm": False}}}
    assert matrices({"layers": [layer]}) == {"layers": [{"w": True, "norm": False}]}
    lm = from_linen(Transformer(TINY))
    axes = {"blocks": lm.axes()["layers"]}
    assert matrices({"blocks": ones(lm)["layers"]}, axes)["blocks"] == matrices(ones(lm))["layers"]


def test_vectors_of_layers_are_not_quantised_and_experts_are_one_by_one():
    pytest.importorskip("qwix")
    params = {
        "layers": {
            "q_bias": jnp.ones((64, 128)),
            "expert_up": jax.random.normal(jax.random.key(0), (2, 3, 64, 8)),
        }
    }
    with pytest.raises(ValueError, match="q_bias .64, 128., which are no matrices"):
        quantized.quantize(params, "int8", targets=r"layers\.q_bias")
    held = quantized.quantize(params, "int8", targets=r"layers\.expert_up")["layers"]["expert_up"]
    np.testing.assert_allclose(held.astype(jnp.float32), params["layers"]["expert_up"], atol=0.03)
    alone = quantized.quantize({"w": params["layers"]["expert_up"][1, 2]}, "int8", targets="w")["w"]
    np.testing.assert_array_equal(held.astype(jnp.float32)[1, 2], alone.astype(jnp.float32))
