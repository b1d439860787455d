"""Plans of the tiny model on eight CPU devices, against what the same step needs when it runs."""

import dataclasses
import gc
import json
import shutil

import jax
import jax.numpy as jnp
import pytest
from marks import exhaustive

from rlhf import cli, sharding
from rlhf.models import huggingface
from rlhf.planning import cures, plan, roofline, topologies
from rlhf.recipes import grpo, sft
from rlhf.training import meshes
from rlhf.training.options import MeshOptions, ModelOptions, TrainingOptions

ROWS = {"dataset": "task:reverse", "dataset_size": 64, "batch_size": 16}
OPTIONS = {
    "sft": (sft.main, {**ROWS, "max_length": 64}),
    "grpo": (grpo.main, {**ROWS, "max_new_tokens": 8, "num_samples": 4}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model's folder, large enough that its arrays are more than the run's few numbers."""
    folder = str(tmp_path_factory.mktemp("models") / "base")
    sizes = ["--hidden_size", "64", "--num_heads", "4", "--num_layers", "2"]
    assert cli.main(["new", folder, *sizes]) == 0
    return folder


def here(arrays) -> int:
    """Bytes of arrays on the first device."""
    shards = [shard for x in arrays for shard in x.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == jax.devices()[0])


@pytest.mark.mesh
@pytest.mark.parametrize("name", exhaustive(OPTIONS, quick=["sft"]))
def test_a_plan_s_peak_is_that_of_the_run(name, model, tmp_path, monkeypatch):
    """What the run holds before its update, and what the update's program makes beside it."""
    main, options = OPTIONS[name]
    measured = []
    gc.collect()
    before = {id(x) for x in jax.live_arrays()}
    call = sharding.MeshStep.__call__

    def watched(self, state, *inputs):
        if not measured:
            gc.collect()
            living = [x for x in jax.live_arrays() if id(x) not in before and not _is_key(x)]
            memory = self.trace(state, *inputs).lower().compile().memory_analysis()
            results = memory.output_size_in_bytes - memory.alias_size_in_bytes
            measured.append(here(living) + memory.temp_size_in_bytes + results)
        return call(self, state, *inputs)

    monkeypatch.setattr(sharding.MeshStep, "__call__", watched)
    main(model=model, output=str(tmp_path / "run"), steps=1, fsdp=8, **options)
    (truth,) = measured
    found = plan.make(main, topologies.find("cpu:8"), model=model, fsdp=8, **options)
    update = next(row for row in found.rows if row.program == "update")
    assert update.needed == pytest.approx(truth, rel=0.15)
    assert update.fits


def _is_key(x) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


@pytest.mark.exhaustive
def test_a_plan_says_what_a_step_needs(model):
    main, options = OPTIONS["grpo"]
    found = plan.make(main, topologies.find("cpu:8"), model=model, fsdp=8, **options)
    assert {axis: size for axis, size in found.mesh.items() if size > 1} == {"fsdp": 8}
    rows = {row.program: row for row in found.rows}
    assert rows.keys() == {"sample", "update"}
    # Two moments of each parameter, which is float32.
    assert rows["update"].moments == pytest.approx(2 * rows["update"].weights, rel=0.01)
    assert rows["update"].weights >= 4 * found.parameters / 8
    assert found.rows_of_update == 64
    assert rows["sample"].token is not None
    assert rows["sample"].cache > 0
    assert rows["update"].collective_bytes > 0


def test_a_config_and_a_tokenizer_are_enough(model, tmp_path):
    """A folder without weights has the shapes of one with them."""
    ignored = shutil.ignore_patterns("*.safetensors")
    bare = shutil.copytree(model, tmp_path / "bare", ignore=ignored)
    mesh = sharding.make_mesh(fsdp=8)
    found, wanted = (
        huggingface.load(folder, mesh=mesh, shapes_only=True, say=print)[:2]
        for folder in (bare, model)
    )
    assert found == wanted
    with pytest.raises(FileNotFoundError, match="has no model.safetensors"):
        huggingface.load(bare)


def row(needed, **fields):
    times = roofline.Times(1.0, 1.0, 1.0)
    empty = dict.fromkeys(plan.Row._fields, 0)
    return plan.Row(**{**empty, "program": "update", "times": times, "needed": needed, **fields})


def test_cures_are_tried_in_their_order_up_to_the_first_that_fits(monkeypatch):
    mesh = {"data": 2, "fsdp": 4, "tensor": 1}
    options = {
        "training": TrainingOptions(batch_size=32),
        "model": ModelOptions("m"),
        "mesh": MeshOptions(),
    }
    made = []

    def make(main, topology, **options):
        made.append(options)
        fits = options["model"].lora_rank > 0
        return plan.Plan("cpu:8", mesh, 1, 32, (row(1 if fits else 9, memory=5),))

    monkeypatch.setattr(plan, "make", make)
    found = plan.Plan("cpu:8", mesh, 1, 32, (row(9, memory=5),))
    typed = [
        cure.options for cure in cures.tried(sft.main, topologies.find("cpu:8"), found, **options)
    ]
    both = "--micro_batches 4 --remat full"
    assert typed == [
        "--micro_batches 2",
        "--micro_batches 4",
        both,
        f"{both} --fsdp 8",
        f"{both} --fsdp 4 --tensor 2",
        f"{both} --fsdp 2 --tensor 4",
        f"{both} --tensor 8",
        f"{both} --lora_rank 16",
    ]
    assert made[-1]["training"].micro_batches == 4
    # A state that is too large by itself: the first two cannot help.
    typed = [
        cure.options
        for cure in cures.tried(
            sft.main,
            topologies.find("cpu:8"),
            found._replace(rows=(row(9, memory=5, weights=6),)),
            **options,
        )
    ]
    assert typed[0] == "--fsdp 8"


def test_weights_that_move_by_all_reduce_are_told_apart_from_gradients():
    of_weights = plan.hlo.Collective(
        "all-reduce", "bf16[4096,4096]", 32 * plan.MIB, 4, tuple(range(8)), 1, None, "jvp(f)/mlp"
    )
    of_gradients = of_weights._replace(op_name="transpose(jvp(f))/mlp")
    remat = of_weights._replace(op_name="transpose(jvp(f))/rematted_computation/mlp")
    of_vectors = of_weights._replace(bytes=1000)
    mesh = {"data": 1, "fsdp": 8}
    found = plan._weights_by_all_reduce([of_weights, of_gradients, remat, of_vectors], mesh)
    assert found == 2 * 4 * 32 * plan.MIB


class Core:
    def __init__(self, *coords, platform="tpu"):
        self.coords = coords
        self.platform = platform


def test_a_torus_is_split_by_default_into_parts_that_gather(monkeypatch):
    """Over half of its devices, and no more than 64."""
    cube = [Core(i, j, k) for k in range(4) for j in range(4) for i in range(4)]
    plane = [Core(i, j, 0) for j in range(16) for i in range(16)]
    row = [Core(i, 0, 0) for i in range(64)]
    gpus = [Core(host, gpu, 0, platform="cuda") for host in range(8) for gpu in range(8)]
    monkeypatch.setattr(meshes, "make_mesh", lambda **sizes: sizes)
    for devices, data in ((cube, 2), (plane, 4), (plane[:16], 1), (row, 1), (gpus, 1)):
        monkeypatch.setattr(meshes, "local_devices", lambda devices=devices: devices)
        found = meshes.make(MeshOptions())
        assert (found["data"], found["fsdp"]) == (data, len(devices) // data)
    monkeypatch.setattr(meshes, "local_devices", lambda: cube)
    assert meshes.make(dataclasses.replace(MeshOptions(), fsdp=64))["fsdp"] == 64


def test_the_command_prints_and_writes_a_plan(model, tmp_path, capsys):
    file = tmp_path / "plan.json"
    argv = ["plan", "sft", "--topology", "cpu:8", "--json", str(file), "--model", model]
    argv += ["--dataset", "task:reverse", "--dataset_size", "16", "--fsdp", "8"]
    assert cli.main(argv) == 0
    said = capsys.readouterr().out
    assert "rlhf sft on cpu:8: fsdp 8" in said
    assert "all-gather" in said
    text = json.loads(file.read_text())
    assert (text["fits"], text["mesh"]["fsdp"], text["tried"]) == (True, 8, [])
    # Of a file that is there nothing is lost.
    assert cli.main(argv) == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["chat", "--topology", "cpu:8"], "chat is no recipe to plan; there are sft"),
        (["sft", "--topology", "v9:2"], "'v9:2' is not known; there are"),
        (["sft"], "--topology is missing"),
        (
            ["sft", "--topology", "cpu:8", "--stepz", "1"],
            "--stepz is not known; did you mean --steps",
        ),
    ],
)
def test_mistakes_end_in_a_line(argv, message, capsys):
    rest = ["--model", "m", "--dataset", "task:reverse"] if "--topology" in argv else []
    assert cli.main(["plan", *argv, *rest]) == 2
    assert message in capsys.readouterr().err
