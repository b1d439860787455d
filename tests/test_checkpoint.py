"""Checkpoints: written in the background, whole or passed over, of this model and this version or refused; keys and bits."""

import json
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import rlhf
from rlhf import checkpoint, files
from rlhf.checkpoint import Checkpoints
from rlhf.train import init_state

ADAM = optax.adam(0.1)
# Large enough that Orbax writes its bytes to a file of data, and not beside the names.
PARAMS = {"w": jnp.sin(jnp.arange(4096.0)).reshape(64, 64), "layers": [{"b": jnp.ones(2)}]}


def state_of(step, params=PARAMS, **context):
    """A state of its own arrays."""
    fresh = init_state(jax.tree.map(jnp.array, params), ADAM, jax.random.key(7), context)
    return fresh._replace(step=jnp.int32(step))


def saved(folder, *steps, **options):
    with Checkpoints(folder, **options) as checkpoints:
        for step in steps:
            checkpoints.save(state_of(step))
    return checkpoints


def numbers(state):
    """Every leaf as NumPy, keys as their data."""
    return [np.asarray(x) for x in jax.tree.leaves(checkpoint._keys_to_data(state))]


def assert_same(one, other):
    for x, y in zip(numbers(one), numbers(other), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype


def test_what_is_saved_is_the_state_although_the_next_step_takes_its_arrays(tmp_path):
    step = jax.jit(
        lambda state: jax.tree.map(lambda x: x + 1 if x.dtype == jnp.float32 else x, state),
        donate_argnums=0,
    )
    state = state_of(3, {"w": jnp.tile(PARAMS["w"], (16, 16))})
    before = numbers(state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state)
    for _ in range(3):
        state = step(state)
    jax.block_until_ready(state)
    assert not np.array_equal(numbers(state)[1], before[1])
    for x, y in zip(numbers(checkpoints.restore(state)), before, strict=True):
        np.testing.assert_array_equal(x, y)


def test_nothing_has_its_name_before_it_is_whole(tmp_path, monkeypatch):
    digests = checkpoint._digests

    def look(folder, *names):
        # Orbax is done, the digests are not: a process that is killed here leaves no checkpoint.
        assert sorted(entry.name for entry in tmp_path.iterdir()) == [".part.2", "1"]
        return digests(folder, *names)

    saved(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "_digests", look)
    saved(tmp_path, 2)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["1", "2"]


def test_the_last_ones_stay(tmp_path):
    assert saved(tmp_path, 1, 2, 5, 9, keep=2).latest() == 9
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["5", "9"]


def test_a_step_that_is_saved_again_replaces_itself(tmp_path):
    saved(tmp_path, 3)
    with Checkpoints(tmp_path) as again:
        again.save(state_of(3, {**PARAMS, "w": jnp.zeros((64, 64))}))
    assert not again.restore(state_of(0)).params["w"].any()


def kinds(folder):
    """A file of every kind that is in a checkpoint."""
    found = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    # Orbax names files of data by a digest: of those the largest, which holds the arrays.
    by_kind = {}
    for name in sorted(found, key=lambda name: (folder / name).stat().st_size):
        by_kind[name.rpartition("/")[0] if "/d/" in name else name] = name
    return sorted(by_kind.values())


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink], ids=["cut", "flip", "missing"])
def test_a_damaged_file_of_any_kind_is_named_and_an_earlier_one_taken(damage, tmp_path):
    saved(tmp_path / "whole", 1, 2)
    names = kinds(tmp_path / "whole" / "2")
    assert {"manifest.json", "state/_METADATA", "state/manifest.ocdbt"} < set(names)
    for name in names:
        folder = tmp_path / "run"
        shutil.copytree(tmp_path / "whole", folder)
        damage(folder / "2" / name)
        said = []
        restored = Checkpoints(folder, say=said.append).restore(state_of(0))
        assert_same(restored, state_of(1))
        (line,) = said
        assert f"the checkpoint of step 2 is not whole: {folder / '2' / name} is " in line
        assert "taken instead: the checkpoint of step 1" in line
        shutil.rmtree(folder)


def test_a_half_written_one_is_named(tmp_path):
    said = []
    saved(tmp_path, 1)
    (tmp_path / f"{files.PART}2" / "state").mkdir(parents=True)
    assert_same(Checkpoints(tmp_path, say=said.append).restore(state_of(0)), state_of(1))
    assert said == [
        f"{tmp_path}: the checkpoint of step 2 is not whole: half written; taken instead: the "
        "checkpoint of step 1"
    ]


def test_what_is_damaged_goes_when_the_next_one_is_whole_and_counts_for_none(tmp_path):
    saved(tmp_path, 1, 2, 3, keep=3)
    flip(tmp_path / "3" / "manifest.json")
    with Checkpoints(tmp_path, keep=2, say=lambda text: None) as checkpoints:
        checkpoints.restore(state_of(0))
        assert (tmp_path / "3").exists()
        checkpoints.save(state_of(4))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["2", "4"]


def test_none_whole_is_an_error(tmp_path):
    saved(tmp_path, 1, 2)
    flip(tmp_path / "1" / "manifest.json")
    (tmp_path / "2" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="no checkpoint is whole: .*step 2.*missing; .*step 1"):
        Checkpoints(tmp_path).restore(state_of(0))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({**PARAMS, "w": jnp.ones((64, 32))}, r"params.w float32\[64,64\] there, float32\[64,32\]"),
        ({**PARAMS, "w": jnp.ones((64, 64), "bfloat16")}, r"float32\[64,64\] there, bfloat16\["),
        ({**PARAMS, "more": jnp.ones(1)}, r"params.more missing there, float32\[1\] here"),
        ({"w": PARAMS["w"]}, r"params.layers.0.b float32\[2\] there, missing here"),
    ],
)
def test_of_another_model(params, message, tmp_path):
    saved(tmp_path, 1)
    with pytest.raises(ValueError, match=message):
        Checkpoints(tmp_path).restore(state_of(0, params))


def test_of_a_newer_version(tmp_path, monkeypatch):
    monkeypatch.setattr(rlhf, "__version__", "0.10.0", raising=False)
    saved(tmp_path, 1)
    monkeypatch.setattr(rlhf, "__version__", "0.9.2")
    with pytest.raises(ValueError, match=r"by rlhf 0.10.0, and this is rlhf 0.9.2, which is older"):
        Checkpoints(tmp_path).restore(state_of(0))
    for version in ("0.10.0", "0.10.1", "unknown"):
        monkeypatch.setattr(rlhf, "__version__", version)
        assert_same(Checkpoints(tmp_path).restore(state_of(0)), state_of(1))


@pytest.mark.parametrize("where", ["save", "wait_until_finished"])
def test_a_full_disk_leaves_the_earlier_ones_whole(where, tmp_path, monkeypatch):
    saved(tmp_path, 1)
    checkpoints = Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        full = Mock(side_effect=ValueError("RESOURCE_EXHAUSTED: No space left on device"))
        patch.setattr(checkpoints._orbax, where, full)
        checkpoints.save(state_of(2))
        message = "2: the checkpoint could not be written; that of step 1 stays: .*No space left"
        with pytest.raises(OSError, match=message):
            checkpoints.wait()
    assert [entry.name for entry in tmp_path.iterdir()] == ["1"]
    assert_same(checkpoints.restore(state_of(0)), state_of(1))
    # With room again the same object writes again.
    checkpoints.save(state_of(3))
    assert_same(checkpoints.restore(state_of(0)), state_of(3))


def test_what_is_still_written_after_an_error_is_deleted_too(tmp_path, monkeypatch):
    """As Orbax's threads do, which stop one after another."""
    checkpoints = saved(tmp_path, 1)
    late = tmp_path / ".part.2" / "state" / "d"

    def write_on():
        for number in range(30):
            with suppress(OSError):
                late.mkdir(parents=True, exist_ok=True)
                (late / str(number)).touch()
            time.sleep(0.01)

    thread = threading.Thread(target=write_on)

    def fail(*_):
        thread.start()
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr(checkpoints._orbax, "save", fail)
    checkpoints.save(state_of(2))
    with pytest.raises(OSError, match="that of step 1 stays"):
        checkpoints.wait()
    thread.join()
    assert [entry.name for entry in tmp_path.iterdir()] == ["1"]


FULL = """
import resource, sys
import jax, jax.numpy as jnp, optax
from rlhf.checkpoint import Checkpoints
from rlhf.train import init_state

state = init_state({"w": jnp.sin(jnp.arange(4096.0))}, optax.adam(0.1), jax.random.key(0))
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(state._replace(step=jnp.int32(1)))
checkpoints.wait()
# Nothing beyond this size is written any more, as on a full disk.
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
checkpoints.save(state._replace(step=jnp.int32(2)))
try:
    checkpoints.wait()
except OSError as error:
    print(error)
print("whole:", int(checkpoints.restore(state).step))
"""


@pytest.mark.exhaustive
def test_a_disk_that_is_really_full(tmp_path):
    """In a process of its own: Orbax's threads go on for a moment, and complain on stderr."""
    command = [sys.executable, "-c", FULL, str(tmp_path / "checkpoints")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "2: the checkpoint could not be written; that of step 1 stays: " in out
    assert out.endswith("whole: 1\n")
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == ["1"]


def test_what_cannot_fit_is_not_tried(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 1)
    size = sum(x.nbytes for x in numbers(state_of(0)))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Mock(free=size // 2 - 1))
        checkpoints.save(state_of(2))
        message = "2: the checkpoint could not be written; that of step 1 stays: 0 MB, and 0 MB"
        with pytest.raises(OSError, match=message):
            checkpoints.wait()
        patch.setattr(shutil, "disk_usage", lambda path: Mock(free=size // 2))
        checkpoints.save(state_of(3))
    assert checkpoints.latest() == 3


def test_restored_onto_another_mesh(tmp_path):
    def placed(count, spec, state):
        mesh = jax.make_mesh((count,), ("fsdp",), devices=jax.devices()[:count])
        place = lambda x: NamedSharding(mesh, spec if x.ndim == 2 else PartitionSpec())
        return jax.device_put(state, jax.tree.map(place, state))

    rows, columns = PartitionSpec("fsdp"), PartitionSpec(None, "fsdp")
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(placed(8, rows, state_of(1)))
    like = placed(4, columns, state_of(0))
    restored = checkpoints.restore(like)
    assert_same(restored, state_of(1))
    assert restored.params["w"].sharding == like.params["w"].sharding


def test_the_manifest_says_what_it_is(tmp_path):
    saved(tmp_path, 1)
    manifest = json.loads((tmp_path / "1" / "manifest.json").read_text())
    assert manifest["step"] == 1
    assert manifest["leaves"]["key"] == "uint32[2]"
    assert manifest["leaves"]["opt_state.0.mu.w"] == "float32[64,64]"
