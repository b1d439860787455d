"""Programs of recipes from shapes alone: lowered and compiled for eight devices, and no weight is read."""

import jax
import numpy as np
import pytest
from marks import exhaustive

from rlhf.models import mapping
from rlhf.recipes import dpo, gkd, grpo, ilql, kto, ppo, reward, rft, sft
from rlhf.rollouts.environment import Environment, Turn
from rlhf.training import meshes, programs

OFFLINE = {"sft": sft, "dpo": dpo, "kto": kto, "reward": reward, "ilql": ilql}
ONLINE = {"grpo": grpo, "ppo": ppo, "rft": rft}
COMMON = {"dataset": "task:reverse", "dataset_size": 16, "batch_size": 8, "fsdp": 2, "data": 4}


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(mapping, "read", read)


def state_bytes(lowered) -> int:
    """Bytes of a program's arguments on one device, once it is compiled."""
    return lowered.compile().memory_analysis().argument_size_in_bytes


@pytest.mark.parametrize("name", exhaustive(OFFLINE, quick=["dpo"]))
def test_recipes_on_data_give_their_update(name, base):
    found = programs.of(OFFLINE[name].main, model=base, **COMMON)
    assert found.keys() == {"update"}
    assert state_bytes(found["update"]) > 0


@pytest.mark.parametrize("name", exhaustive(ONLINE, quick=["grpo"]))
def test_recipes_that_sample_give_both(name, base):
    found = programs.of(ONLINE[name].main, model=base, **COMMON, max_new_tokens=4)
    assert found.keys() == {"sample", "update"}


def test_a_selection_and_an_environment_give_both(base):
    environment = Environment(lambda row: row, lambda *turn: Turn(None, done=True))
    options = {"model": base, **COMMON, "max_new_tokens": 4, "max_conversation_tokens": 6}
    selected = {"dynamic_sampling": 2, "replay_groups": 8}
    for more in (selected, {"curriculum": "learnability", "environment": environment}):
        found = programs.of(grpo.main, **options, **more)
        assert found.keys() == {"sample", "update"}


def test_distillation_gives_both(base):
    found = programs.of(gkd.main, model=base, teacher=base, **COMMON, max_new_tokens=4)
    assert found.keys() == {"sample", "update"}


@pytest.mark.exhaustive
def test_adapters_and_a_mesh_make_the_state_smaller(base):
    sizes = {"data": 1, "fsdp": 1}
    alone = programs.of(sft.main, model=base, devices=jax.devices()[:1], **{**COMMON, **sizes})
    lora = programs.of(
        sft.main, model=base, devices=jax.devices()[:1], lora_rank=1, **{**COMMON, **sizes}
    )
    split = programs.of(sft.main, model=base, **{**COMMON, "data": 1, "fsdp": 8})
    # Two moments and the parameters of all, against those of the adapters and the frozen base.
    assert state_bytes(lora["update"]) < state_bytes(alone["update"])
    assert state_bytes(split["update"]) < 0.5 * state_bytes(alone["update"])


def test_a_run_goes_on_as_before_afterwards(base, tmp_path):
    with pytest.raises(ValueError, match="learning_rate must be"):
        programs.of(sft.main, model=base, **COMMON, learning_rate=-1.0)
    assert programs.devices() is None
    assert len(meshes.devices()) == 1
    assert not any(tmp_path.iterdir())


def test_shapes_have_places():
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2, 1), ("data", "fsdp", "tensor"))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    shape = programs.shaped({"x": np.ones((8, 2), np.float32)}, where)["x"]
    assert (shape.shape, shape.dtype, shape.sharding) == ((8, 2), np.float32, where)
