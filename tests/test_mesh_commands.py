"""Recipes through the command line on eight devices: metrics, tokens and exported weights equal those of one device."""

import json
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet
import pytest
from logs import steady
from marks import exhaustive
from safetensors.numpy import load_file

from rlhf import cli, tasks
from rlhf.models import huggingface, transformer
from rlhf.sharding import SMALL
from rlhf.training import loop, meshes

TRAIN = [
    "--dataset", "task:reverse", "--dataset_size", "64", "--eval_split", "train", "--batch_size", "8", "--steps", "3",
    "--optimizer", "sgd", "--learning_rate", "0.1", "--schedule", "constant",
]  # fmt: skip
# Lengths differ: where all rewards are equal, PPO would whiten rounding noise, which no two meshes share.
SAMPLE = ["--max_new_tokens", "4", "--reward", "length"]
COMMANDS = {
    "sft": [],
    "reward": [],
    "dpo": [],
    "kto": [],
    "ppo": [*SAMPLE, "--updates_per_batch", "1", "--kl_coef", "0.1"],
    "grpo": [*SAMPLE, "--num_samples", "4", "--kl_coef", "0.1", "--mini_batches", "2"],
}
LORA = ["--lora_rank", "4", "--lora_alpha", "8"]
MESHES = {
    "data8": ["--data", "8"],
    "fsdp8": ["--fsdp", "8"],
    "fsdp2tensor4": ["--fsdp", "2", "--tensor", "4"],
    "fsdp4sequence2": ["--fsdp", "4", "--sequence", "2"],
    "expert4data2": ["--expert", "4", "--data", "2"],
}
# Of a mixture of experts; on the others it would test nothing new.
OF_EXPERTS = "expert4data2"
CASES = [
    (command, adapters, mesh)
    for command in COMMANDS
    for adapters in (False, True)
    for mesh in MESHES
    if mesh != OF_EXPERTS or not adapters
]
IDS = [f"{command}{'-lora' if adapters else ''}-{mesh}" for command, adapters, mesh in CASES]
QUICK = [("sft", False, "fsdp2tensor4")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model whose sizes divide by eight; its vocabulary of 51 does not."""
    folder = tmp_path_factory.mktemp("models") / "base"
    argv = [
        "new",
        str(folder),
        "--hidden_size",
        "32",
        "--num_heads",
        "4",
        "--num_layers",
        "1",
        "--task",
        "task:reverse",
    ]
    assert cli.main(argv) == 0
    return str(folder)


def run(command: str, model: str, adapters: bool, output: Path, *more: str) -> None:
    argv = [
        command,
        "--model",
        model,
        *TRAIN,
        *COMMANDS[command],
        *(LORA if adapters else []),
        *more,
    ]
    assert cli.main([*argv, "--output", str(output)]) == 0


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """The folder of a tiny mixture of four experts."""
    like, folder = (tmp_path_factory.mktemp("models") / name for name in ("like", "mixture"))
    tokenizer = tasks.find("task:reverse").tokenizer()
    config = {
        "model_type": "mixtral",
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    like.mkdir()
    (like / "config.json").write_text(json.dumps(config))
    lm = transformer(huggingface.read_config(like))
    huggingface.save(folder, lm, lm.init(jax.random.key(0)), like=like, tokenizer=tokenizer)
    return str(folder)


@pytest.fixture(scope="module")
def of_one_device(tmp_path_factory):
    """`(command, adapters, model) -> folder` of the run on one device, made once."""
    made: dict = {}

    def folder(command: str, adapters: bool, model: str) -> Path:
        if (command, adapters, model) not in made:
            output = tmp_path_factory.mktemp("one") / "run"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(meshes, "local_devices", lambda: jax.devices()[:1])
                run(command, model, adapters, output)
            made[command, adapters, model] = output
        return made[command, adapters, model]

    return folder


def assert_equal_runs(found: Path, wanted: Path) -> None:
    for row, golden in zip(steady(found), steady(wanted), strict=True):
        assert row.keys() == golden.keys()
        for name in golden.keys() - {"phase"}:
            assert row[name] == pytest.approx(golden[name], rel=1e-4, abs=2e-5), (
                f"step {golden['step']}, {name}"
            )
    for file in sorted((wanted / "samples").glob("*.parquet")):
        tables = [
            pyarrow.parquet.read_table(folder / "samples" / file.name) for folder in (found, wanted)
        ]
        assert tables[0]["completion"] == tables[1]["completion"]
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (found, wanted)]
    assert weights[0].keys() == weights[1].keys()
    for name, wanted_weight in weights[1].items():
        largest = np.abs(wanted_weight).max()
        np.testing.assert_allclose(
            weights[0][name], wanted_weight, rtol=0, atol=1e-5 * largest, err_msg=name
        )


@pytest.mark.mesh
@pytest.mark.parametrize(("command", "adapters", "mesh"), exhaustive(CASES, quick=QUICK), ids=IDS)
def test_a_mesh_gives_what_one_device_gives(
    command, adapters, mesh, model, mixture, of_one_device, tmp_path, monkeypatch
):
    model = mixture if mesh == OF_EXPERTS else model
    wanted = of_one_device(command, adapters, model)
    found: dict = {}
    original = loop.run_steps

    def watched(phase, step, state, *args, **kwargs):
        last = original(phase, step, state, *args, **kwargs)
        found["state"] = last
        return last

    monkeypatch.setattr(loop, "run_steps", watched)
    run(command, model, adapters, tmp_path / "run", *MESHES[mesh])
    assert_equal_runs(tmp_path / "run", wanted)
    ways = {"fsdp8": 8, "fsdp2tensor4": 2, "fsdp4sequence2": 4}.get(mesh, 1)
    for path, x in jax.tree_util.tree_leaves_with_path(found["state"]):
        assert len(x.sharding.device_set) == 8, jax.tree_util.keystr(path)
        if ways > 1 and x.size > SMALL:
            held = max(shard.data.size for shard in x.addressable_shards)
            assert held <= x.size // ways, (
                f"{jax.tree_util.keystr(path)} {x.shape}: {held} on one device"
            )


@pytest.mark.exhaustive
@pytest.mark.mesh
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_a_checkpoint_of_one_mesh_goes_on_on_another(
    adapters, model, of_one_device, tmp_path, monkeypatch
):
    class Killed(Exception):
        """The run ends here, with a checkpoint behind it."""

    original = loop.Checkpoints.save

    def save_and_end(self, state):
        original(self, state)
        raise Killed

    argv = [*MESHES["fsdp8"], "--save_every", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(loop.Checkpoints, "save", save_and_end)
        with pytest.raises(Killed):
            run("grpo", model, adapters, tmp_path / "run", *argv)
    run(
        "grpo",
        model,
        adapters,
        tmp_path / "run",
        *MESHES["fsdp2tensor4"],
        "--save_every",
        "2",
        "--resume",
    )
    assert_equal_runs(tmp_path / "run", of_one_device("grpo", adapters, model))


@pytest.mark.mesh
@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (["--data", "3"], "data 3 × fsdp 1 × tensor 1 = 3 but 8 devices"),
        (["--data", "3", "--fsdp", "-1"], "data 3 × tensor 1 = 3 does not divide 8 devices"),
        (["--sequence", "3"], "data 1 × fsdp 1 × tensor 1 × sequence 3 = 3 but 8 devices"),
        (["--expert", "3", "--fsdp", "-1"], "tensor 1 × expert 3 = 3 does not divide 8 devices"),
        (["--data", "-1", "--sequence", "-1"], "-1 (the rest) for one axis at most"),
        (["--data", "-1", "--fsdp", "-1"], "-1 (the rest) for one axis at most"),
        (
            ["--expert", "8", "--batch_size", "4"],
            "4 rows cannot be shared by data 1 × fsdp 1 × expert 8 = 8 devices; change --batch_size",
        ),
        (
            ["--batch_size", "4"],
            "4 rows cannot be shared by data 1 × fsdp 8 = 8 devices; change --batch_size",
        ),
        (
            ["--batch_size", "8", "--micro_batches", "2"],
            "8 rows in 2 micro-batches cannot be shared",
        ),
    ],
)
def test_a_mesh_that_cannot_be_is_told_before_the_model_loads(
    mesh, message, model, tmp_path, capsys
):
    argv = ["sft", "--model", model, "--dataset", "task:reverse", "--dataset_size", "16", *mesh]
    assert cli.main([*argv, "--output", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not any(tmp_path.iterdir())


@pytest.mark.exhaustive
@pytest.mark.mesh
def test_axes_that_do_not_divide_are_kept_whole_and_told_of_once(model, tmp_path, capsys):
    vocab_size = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    assert vocab_size % 8
    run("sft", model, False, tmp_path / "run", "--data", "1", "--tensor", "8")
    told = [line for line in capsys.readouterr().err.splitlines() if "kept whole" in line]
    assert sum("vocab" in line for line in told) == 1
