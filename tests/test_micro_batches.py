"""`--micro_batches auto`: the fewest with which the update fits a device, in runs and plans alike."""

import json

import jax
import pytest
import yaml
from logs import steady

from rlhf import cli
from rlhf.planning import topologies
from rlhf.recipes import grpo, sft
from rlhf.training import micro_batches, programs
from rlhf.training.micro_batches import GIB
from rlhf.training.options import TrainingOptions

SFT = {"dataset": "task:reverse", "dataset_size": 32, "max_length": 64, "batch_size": 12}
RUN = ["--steps", "2", "--save_every", "1"]


def words(options) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def needed(base):
    """Bytes that the update needs with so many micro-batches; a larger model's would differ more."""

    def of(number):
        training = TrainingOptions(batch_size=12, micro_batches=number)
        options = {name: value for name, value in SFT.items() if name != "batch_size"}
        return micro_batches._needed(
            sft.main, {"model": base, "training": training, **options}, jax.devices()[:1]
        )

    return {number: of(number) for number in (1, 2, 4)}


def config(folder) -> dict:
    return yaml.safe_load((folder / "config.yaml").read_text())


def run(base, folder, *more, code=0):
    argv = ["sft", "--model", base, *words(SFT), *RUN, "--output", str(folder), *more]
    assert cli.main(argv) == code


def test_more_parts_need_less(needed):
    assert needed[1] > needed[2] > needed[4]


def test_a_run_takes_the_fewest_that_fit_and_keeps_them(
    base, needed, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(micro_batches, "memory_of", lambda devices: needed[2])
    run(base, tmp_path / "auto", "--micro_batches", "auto")
    size = f"{needed[2] / GIB:.3g}"
    said = (
        f"micro_batches auto is 2: the update needs {size} GiB of a device, which has {size} GiB\n"
    )
    assert said in capsys.readouterr().err
    assert config(tmp_path / "auto")["micro_batches"] == 2
    # Resumed where there is more memory, it is the run that it was.
    monkeypatch.setattr(micro_batches, "memory_of", lambda devices: 1 << 60)
    monkeypatch.setattr(micro_batches, "found", None)
    (tmp_path / "auto" / "checkpoints" / "2" / "manifest.json").unlink()
    run(base, tmp_path / "auto", "--micro_batches", "auto", "--resume")
    assert config(tmp_path / "auto")["micro_batches"] == 2
    run(base, tmp_path / "two", "--micro_batches", "2")
    assert steady(tmp_path / "auto") == steady(tmp_path / "two")


def test_where_nothing_fits_it_is_the_most_that_rows_can_be_cut_into(base, monkeypatch):
    said: list[str] = []
    compiled = []

    def needed(main, arguments, devices):
        compiled.append(arguments["training"].micro_batches)
        return 3 * GIB

    monkeypatch.setattr(micro_batches, "_needed", needed)
    arguments = {"training": TrainingOptions(batch_size=12, micro_batches="auto")}
    found = micro_batches.found(sft.main, arguments, devices=[], memory=2 * GIB, say=said.append)
    # Eight parts of twelve rows there are not.
    assert found["training"].micro_batches == 4
    assert compiled == [1, 2, 4]
    assert said == [
        "micro_batches auto is 4: the update needs 3 GiB of a device, which has 2 GiB; more parts "
        "cannot be made, try --remat full or more devices"
    ]


def test_what_xla_refuses_to_compile_does_not_fit(base, monkeypatch):
    def refuse(self, *given, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory")

    said: list[str] = []
    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    options = {name: value for name, value in SFT.items() if name != "batch_size"}
    training = TrainingOptions(batch_size=2, micro_batches="auto")
    arguments = {"model": base, "training": training, **options}
    found = micro_batches.found(
        sft.main, arguments, devices=jax.devices()[:1], memory=1 << 60, say=said.append
    )
    assert found["training"].micro_batches == 2
    assert "the update needs more than XLA compiles of a device" in said[0]


def test_devices_that_cannot_share_more_parts_end_the_search(monkeypatch):
    def needed(main, arguments, devices):
        if arguments["training"].micro_batches == 4:
            raise ValueError("rows cannot be shared by 4 devices")
        return 3 * GIB

    monkeypatch.setattr(micro_batches, "_needed", needed)
    arguments = {"training": TrainingOptions(batch_size=32, micro_batches="auto")}
    found = micro_batches.found(sft.main, arguments, devices=[], memory=1, say=print)
    assert found["training"].micro_batches == 2


def test_a_cpu_does_not_say_its_memory(base, tmp_path, capsys):
    run(base, tmp_path / "run", "--micro_batches", "auto")
    assert "micro_batches auto is 1: cpu does not say its memory\n" in capsys.readouterr().err
    assert config(tmp_path / "run")["micro_batches"] == 1


class Device:
    process_index = 0

    def __init__(self, stats):
        self.memory_stats = lambda: stats


def test_the_smallest_device_counts():
    large, small = Device({"bytes_limit": 9}), Device({"bytes_limit": 5})
    assert micro_batches.memory_of([large, small]) == 5
    assert micro_batches.memory_of([large, Device(None)]) is None
    assert micro_batches.memory_of([large, Device({"bytes_in_use": 1})]) is None


def test_mistakes_come_before_anything_is_compiled(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(micro_batches, "memory_of", lambda devices: 1)
    monkeypatch.setattr(micro_batches, "_needed", None)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    run(base, tmp_path / "used", "--micro_batches", "auto", code=2)
    assert "already holds a run or other files" in capsys.readouterr().err
    run(base, tmp_path / "no", "--micro_batches", "fast", code=2)
    assert "65,536, or one of auto, but is 'fast'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="micro_batches auto is for a run or `rlhf plan`"):
        programs.of(sft.main, model=base, micro_batches="auto", **SFT)


def test_a_plan_takes_the_chip_s_memory(base, tmp_path, monkeypatch, capsys):
    options = {"dataset": "task:reverse", "dataset_size": 16, "max_new_tokens": 8, "num_samples": 4}
    tiny = topologies.find("cpu:1")
    training = TrainingOptions(batch_size=8, micro_batches=4)
    sizes = micro_batches._needed(
        grpo.main, {"model": base, "training": training, **options}, tiny.devices
    )
    chip = tiny.chip._replace(memory=float(sizes))
    monkeypatch.setattr(topologies, "find", lambda name: tiny._replace(chip=chip))
    argv = ["plan", "grpo", "--topology", "cpu:1", "--model", base, *words(options)]
    argv += ["--batch_size", "8", "--micro_batches", "auto", "--json", str(tmp_path / "plan.json")]
    assert cli.main(argv) == 0
    assert "micro_batches auto is 4" in capsys.readouterr().out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["micro_batches"] == 4
    (update,) = (row for row in plan["rows"] if row["program"] == "update")
    assert update["needed"] == sizes == update["memory"]
