"""A run's folder: whatever a process leaves when it is killed can be gone on with or used again; nothing else is touched."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from unittest.mock import Mock

import pytest
from jax.experimental import multihost_utils

from rlhf import cli, files, hosts
from rlhf.command_line import options_of
from rlhf.training import datasets, loading, loop, runs
from rlhf.training.interrupts import stop_requests

OPTIONS = {"model": "base", "steps": 2, "output": "o", "resume": False}


def begun(folder: Path, **options) -> runs.RunFolder:
    return runs.RunFolder(folder, {**OPTIONS, **options})


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def moments(tmp_path: Path) -> dict[str, dict[str, str]]:
    """What the folder may hold at each moment before a step is logged or saved, of this version's files and of earlier ones."""
    run = begun(tmp_path / "whole")
    run.describe()
    about, config = (
        (tmp_path / "whole" / name).read_text() for name in ("about.json", "config.yaml")
    )
    return {
        "nothing": {},
        "a part": {".part.about.json": about[:20]},
        "about": {"about.json": about},
        "about and a part": {"about.json": about, ".part.config.yaml": config[:9]},
        "both": {"about.json": about, "config.yaml": config},
        "both, held by a process that is gone": {"about.json": about, "config.yaml": config, ".lock": ""},
        "metrics": {"about.json": about, "config.yaml": config, "metrics.jsonl": ""},
        "half a line": {"about.json": about, "config.yaml": config, "metrics.jsonl": '{"phase": "tr'},
        "half a config": {"config.yaml": config[:17]},
        "an empty config": {"config.yaml": ""},
        "half an about": {"config.yaml": config, "about.json": about[:15]},
        "an empty about": {"config.yaml": config, "about.json": ""},
        "a checkpoint begun": {
            "about.json": about, "config.yaml": config, "checkpoints/2.orbax-checkpoint-tmp/x": "", "metrics.jsonl": "",
        },
    }  # fmt: skip


NAMES = (
    "nothing", "a part", "about", "about and a part", "both", "both, held by a process that is gone", "metrics", "half a line",
    "half a config", "an empty config", "half an about", "an empty about", "a checkpoint begun",
)  # fmt: skip


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("moment", NAMES)
def test_a_run_killed_before_its_first_step_can_be_resumed_and_used_again(moment, resume, tmp_path):
    known = moments(tmp_path)
    assert tuple(known) == NAMES
    folder = tmp_path / "run"
    folder.mkdir()
    for name, text in known[moment].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    run = begun(folder, resume=resume)
    with run.at_work():
        run.forget_after(0)
        run.log("train", 1, {"loss": 0.5})
    assert json.loads((folder / "about.json").read_text())["versions"]
    again = begun(folder, resume=True)
    assert again.resumed
    assert again.last_metrics()["loss"] == (0.5, 1)
    with pytest.raises(ValueError, match="already holds a run or other files"):
        begun(folder)


THEIRS = {
    "a file of theirs": {"notes.txt": "dear diary"},
    "a config of theirs": {"config.yaml": "learning_rate: 0.1\n"},
    "a config of theirs beside one of ours": {
        "config.yaml": "learning_rate: 0.1\n",
        "metrics.jsonl": "",
    },
    "an about of theirs": {"about.json": '{"me": 1}'},
    "metrics": {"metrics.jsonl": '{"phase": "train", "step": 1}\n'},
    "a checkpoint": {"checkpoints/3/x": ""},
    "a model": {"config.json": "{}", "model.safetensors": "x"},
}


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("kind", THEIRS)
def test_what_others_wrote_is_never_taken_for_a_run(kind, resume, tmp_path):
    for name, text in THEIRS[kind].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    before = snapshot(tmp_path)
    with pytest.raises(
        ValueError, match="already holds a run or other files|a run goes on as it began"
    ):
        begun(tmp_path, resume=resume)
    assert snapshot(tmp_path) == before


def test_a_run_that_is_not_there_cannot_be_resumed(base, tmp_path, capsys):
    ask = [
        "sft",
        "--model",
        base,
        "--dataset",
        "task:reverse",
        "--output",
        str(tmp_path / "mistyped"),
        "--resume",
    ]
    assert cli.main(ask) == 2
    assert (
        "mistyped: no run there to resume; leave out --resume to begin one"
        in capsys.readouterr().err
    )
    assert not any(tmp_path.iterdir())


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    files.write(file, "first")

    def killed(part):
        part.write_text("half of the sec")
        raise RuntimeError

    with pytest.raises(RuntimeError), files.replacing(file) as part:
        killed(part)
    assert snapshot(tmp_path) == {"a.json": b"first"}
    run = runs.RunFolder(tmp_path / "run", OPTIONS)
    run.describe()
    run.log("train", 1, {"loss": 0.5})
    whole, write_text = snapshot(tmp_path / "run"), Path.write_text
    monkeypatch.setattr(
        Path, "write_text", lambda self, text, **how: write_text(self, text[:3]) and 1 / 0
    )
    for write in (run.describe, run.card, lambda: run.forget_after(1)):
        with pytest.raises(ZeroDivisionError):
            write()
        assert snapshot(tmp_path / "run") == whole


def test_two_processes_do_not_work_in_one_folder(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from rlhf.training import runs
with runs.RunFolder({str(tmp_path / "run")!r}, {OPTIONS}).at_work():
    print("working", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "working\n"
        run = begun(tmp_path / "run")  # nothing is saved there yet
        with pytest.raises(ValueError, match="another process is at work in it"), run.at_work():
            pass
        other.kill()
    with begun(tmp_path / "run").at_work():
        pass


@pytest.mark.parametrize("place", ["model", "first step"])
def test_a_failed_start_leaves_no_folder(place, base, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise MemoryError("RESOURCE_EXHAUSTED: out of memory")

    ask = [
        "sft",
        "--model",
        base,
        "--dataset",
        "task:reverse",
        "--dataset_size",
        "16",
        "--output",
        str(tmp_path / "run"),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(
            *((loading.huggingface, "load") if place == "model" else (loop, "run_steps")), fail
        )
        with pytest.raises(MemoryError):
            cli.main(ask)
    assert not any(tmp_path.iterdir())
    assert cli.main([*ask, "--reward", "nothing"]) == 2
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "place",
    [
        (datasets, "load_arrays"),
        (loading.huggingface, "load"),
        (loading, "init_state"),
        (loop, "Checkpoints"),
    ],
)
def test_asked_to_stop_while_setting_up(place, number, base, tmp_path, monkeypatch, capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(*place, lambda *_, **__: signal.raise_signal(number))
    ask = [
        "sft",
        "--model",
        base,
        "--dataset",
        "task:reverse",
        "--dataset_size",
        "16",
        "--output",
        str(tmp_path / "run"),
    ]
    try:
        assert cli.main(ask) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "rlhf sft: stopped\n"
    assert not any(tmp_path.iterdir())


def test_asked_to_stop_as_a_process_that_sets_up(base, tmp_path):
    """Libraries swallow what a signal raises while they load, or crash when they are taken down half-way."""
    ask = [
        sys.executable,
        "-m",
        "rlhf",
        "sft",
        "--model",
        base,
        "--dataset",
        "task:reverse",
        "--output",
        str(tmp_path / "run"),
    ]
    for seconds in (0.5, 0.9):
        with subprocess.Popen(ask, stderr=subprocess.PIPE, text=True) as process:
            time.sleep(seconds)
            process.terminate()
            said = process.communicate()[1]
        assert (process.returncode, said) in (
            (130, "rlhf sft: stopped\n"),
            (-signal.SIGTERM, ""),
        )  # or Python began
    assert not any(tmp_path.iterdir())


def test_ctrl_c_in_one_of_several_processes_asks_all_and_a_second_one_ends_it(monkeypatch, capfd):
    agreed_on = iter([False, False, True])
    monkeypatch.setattr(hosts, "several", lambda: True)
    monkeypatch.setattr(
        multihost_utils, "reached_preemption_sync_point", lambda step: next(agreed_on)
    )
    received = []
    # In place of JAX's own, which tells the other processes.
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    # Ignored where the tests themselves run in a shell's background.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with stop_requests() as stop_requested:
            assert not stop_requested()
            signal.raise_signal(signal.SIGINT)
            # Another thread of the process may be the one that the signal interrupts.
            deadline = time.monotonic() + 10
            while not received and time.monotonic() < deadline:
                time.sleep(0.01)
            assert received == [signal.SIGTERM]
            # At the step that all have agreed on, and from there on without asking again.
            assert [stop_requested() for _ in range(3)] == [False, True, True]
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)
    assert "stopping after this step, and saving" in capfd.readouterr().err


# --- outputs -------------------------------------------------------------------------------------------------------------

TASK = ["--dataset", "task:reverse", "--dataset_size", "4"]
RECIPES = [name for name, (module, _) in cli.COMMANDS.items() if ".recipes." in module]
ONLINE = {"grpo", "rloo", "ppo", "online_dpo", "xpo", "nash_md", "rft"}
NEEDS = {"gkd": ["--teacher", "BASE"]}
OUTPUTS = {  # command -> what it takes, all but its output
    "new": [],
    "eval": ["BASE", "--dataset", "DATA", "--reward", "exact"],
    "plot": ["RUN"],
    "export": ["RUN"],
    "demo": [],
    **{name: ["--model", "BASE", "--dataset", "DATA", *NEEDS.get(name, [])] for name in RECIPES},
}


def test_every_command_with_an_output_is_held_to_it():
    options = {
        name: options_of(import_module(module).main) for name, (module, _) in cli.COMMANDS.items()
    }
    assert {name for name in options if "output" in options[name]} == set(OUTPUTS)


@pytest.fixture(scope="module")
def world(base, tmp_path_factory):
    """A model, a data set, a run, and files and folders of others."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(base, folder / "base")
    (folder / "data.jsonl").write_text(
        '{"prompt": "abc=", "completion": "cba", "solution": "cba"}\n'
    )
    (folder / "other.jsonl").write_text("mine\n")
    (folder / "things").mkdir()
    (folder / "things" / "letter.txt").write_text("mine")
    run = begun(folder / "run")
    run.describe()
    run.log("train", 1, {"loss": 0.5})
    run.card()
    shutil.copytree(base, folder / "run" / "model")
    os.symlink(folder / "data.jsonl", folder / "link.jsonl")
    os.link(folder / "data.jsonl", folder / "hard.jsonl")
    os.symlink(folder / "nowhere", folder / "dangling")
    return folder


PLACES = (
    "data.jsonl", "other.jsonl", "things", "base", "base/config.json", "run", "run/model", "run/metrics.jsonl", "link.jsonl",
    "hard.jsonl", "dangling", "data.jsonl/inside",
)  # fmt: skip


def asked(command: str, world: Path, place: str) -> list[str]:
    words = {
        "BASE": str(world / "base"),
        "DATA": str(world / "data.jsonl"),
        "RUN": str(world / "run"),
    }
    return [
        command,
        *(words.get(word, word) for word in OUTPUTS[command]),
        "--output",
        str(world / place),
    ]


@pytest.mark.parametrize("command", OUTPUTS)
def test_nothing_that_exists_is_written_over(command, world, capsys):
    before = snapshot(world)
    for place in PLACES:
        assert cli.main(asked(command, world, place)) == 2, place
        said = capsys.readouterr().err.strip("\n")
        assert str(world / place) in said
        assert "\n" not in said
        assert snapshot(world) == before, place


@pytest.mark.parametrize("command", ["new", "eval", "plot", "export"])
def test_an_input_is_not_written_over_even_if_asked(command, world, capsys):
    before = snapshot(world)
    inputs = {
        "new": ("things", "data.jsonl", "link.jsonl", "run", "."),
        "eval": ("data.jsonl", "base", "base/config.json", "link.jsonl", "hard.jsonl", "things"),
        "plot": ("run", "run/metrics.jsonl", "run/model/config.json", "things"),
        "export": ("run", "run/model", "things", "data.jsonl"),
    }[command]
    for place in inputs:
        assert cli.main([*asked(command, world, place), "--overwrite"]) == 2, place
        assert snapshot(world) == before, place
        assert str(world / place) in capsys.readouterr().err


def test_what_was_asked_for_is_written_over(world, tmp_path):
    shutil.copytree(world / "base", tmp_path / "model")
    (tmp_path / "model" / "old.txt").touch()
    assert (
        cli.main([*asked("export", world, ""), "--output", str(tmp_path / "model"), "--overwrite"])
        == 0
    )
    assert (tmp_path / "model" / "README.md").exists()
    assert not (tmp_path / "model" / "old.txt").exists()
    small = ["--hidden_size", "8", "--num_heads", "1", "--num_layers", "1"]
    assert cli.main(["new", str(tmp_path / "model"), *small, "--overwrite"]) == 0
    assert not (tmp_path / "model" / "README.md").exists()
    (tmp_path / "curves.png").touch()
    assert (
        cli.main(
            ["plot", str(world / "run"), "--output", str(tmp_path / "curves.png"), "--overwrite"]
        )
        == 0
    )
    assert (tmp_path / "curves.png").stat().st_size > 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curves.png", "model"]


def test_a_push_that_fails_is_one_line_with_the_cure(world, monkeypatch, capsys):
    import huggingface_hub

    for error in (
        OSError("no route to host"),
        RuntimeError("Cannot send a request"),
        ValueError("bad name"),
    ):
        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", Mock(side_effect=error))
        assert cli.main(["export", str(world / "run"), "--push", "me/model"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert (
            f"rlhf export: me/model: not pushed ({type(error).__name__}: {error}); see to the network and `hf auth"
            in said
        )
