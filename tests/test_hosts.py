"""Several processes compute one run together: what they tell each other, whole runs through the command line, and how
they stop.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from logs import steady
from marks import exhaustive
from test_mesh_commands import COMMANDS, LORA, TRAIN, assert_equal_runs

from rlhf import cli, hosts
from rlhf.command_line import surroundings
from rlhf.tools import launch
from rlhf.training import loop, meshes

TESTS = Path(__file__).parent
# Four devices a process; the other flags of the tests, which compile faster, stay.
EACH = f"{os.environ.get('XLA_FLAGS', '')} {launch.DEVICES}"


def started(argv: list[str], number: int, of: int = 2, *, port: int, devices: int = 1):
    """A process of several, its output to be read."""
    place = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(of),
        "JAX_PROCESS_ID": str(number),
        "XLA_FLAGS": f"{EACH}={devices}",
    }
    return subprocess.Popen(
        [sys.executable, *argv],
        env={**os.environ, **place},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# --- what processes tell each other --------------------------------------------------------------


@pytest.fixture(scope="module")
def folder_of_pair(tmp_path_factory):
    return tmp_path_factory.mktemp("pair")


@pytest.fixture(scope="module")
def pair(folder_of_pair) -> list[dict]:
    """What two processes have found, each of two devices."""
    port = launch._free_port()
    script = [str(TESTS / "hosts_script.py"), str(folder_of_pair)]
    processes = [started(script, number, port=port, devices=2) for number in (0, 1)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    # No process is named that ends with the others.
    assert not any("\nrlhf: process" in said for _, said in outputs), outputs
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


def test_values_of_python_reach_all(pair):
    for one in pair:
        assert one["gathered"] == ["x", "xx"]
        assert one["broadcast"] == 0
    assert pair[0]["hosts"] == pair[1]["hosts"]
    assert len(set(pair[0]["hosts"])) == 2


def test_an_error_of_one_is_an_error_of_all_with_its_text(pair):
    for one in pair:
        assert one["of_first"] == "FileNotFoundError: no such file, says process 0"
        assert one["agreed"] == "FileNotFoundError: no such file, says process 1"


def test_each_row_is_judged_once_and_all_see_the_same_numbers(pair):
    # By chance: had both judged all rows, they would differ.
    assert pair[0]["shared"] == pair[1]["shared"]
    assert len(pair[0]["shared"]) == 5
    assert [one["calls"] for one in pair] == [[0, 1, 2], [3, 4]]


def test_arrays_are_put_over_hosts_and_fetched(pair):
    assert [one["held"] for one in pair] == [[[[0, 1]], [[2, 3]]], [[[4, 5]], [[6, 7]]]]
    for one in pair:
        assert one["fetched"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
        assert one["key"] == jax.random.key_data(jax.random.key(3)).tolist()


def test_one_process_writes_a_run_and_a_folder_must_be_shared(pair, folder_of_pair):
    assert [one["work"] for one in pair] == ["nothing"] * 2
    assert len((folder_of_pair / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    assert np.load(folder_of_pair / "run" / "batch.npz")["rows"].tolist() == [0, 1, 2, 3]
    host = f"process 1 ({hosts.this().name}, pid {pair[0]['hosts'][1]})"
    for one in pair:
        assert f"not seen by {host}; give an --output on a file system that all" in one["apart"]
    # Nothing is left of it.
    assert not (folder_of_pair / "0" / "run").exists()


def test_sigterm_to_one_stops_all_at_the_same_step(pair):
    assert pair[0]["stopped"] == pair[1]["stopped"]
    assert 5 < pair[0]["stopped"] < 999


def test_one_process_is_left_as_it_is(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "n1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    hosts.start()
    assert not hosts.several()
    rows = [1.0]
    assert hosts.fetch(rows) is rows
    assert hosts.gather(rows)[0] is rows


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, True),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"}, False),  # an allocation, and no srun
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1", "OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1", "OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ],
)  # fmt: skip
def test_what_launchers_set_is_known(environment, found):
    assert hosts._has_cluster(environment) is found


# --- the start -----------------------------------------------------------------------------------


def test_who_is_missing_is_named_by_all_who_have_come():
    port = launch._free_port()
    found: dict[int, str] = {}

    def join(number: int) -> None:
        try:
            hosts.start(f"127.0.0.1:{port}", 4, number, start_timeout=1)
        except ValueError as error:
            found[number] = str(error)

    threads = [threading.Thread(target=join, args=(number,)) for number in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    said = "processes 1, 3 of 4 did not start within 1 s; see whether it runs, and its own message"
    assert found == {0: said, 2: said}


def test_a_coordinator_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(hosts, "PATIENCE", 0)
    address = f"127.0.0.1:{launch._free_port()}"
    with pytest.raises(ValueError, match=f"process 0 did not answer at {address} within 1 s"):
        hosts.start(address, 2, 1, start_timeout=1)


FIRST = hosts.Host(0, "a", 7)
SECOND = hosts.Host(1, "b", 8)


def printed(capfd, text: str) -> str:
    """What stderr has as soon as a text is in it."""
    found = ""
    deadline = time.monotonic() + 20
    while text not in found:
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
        found += capfd.readouterr().err
    return found


def test_a_process_whose_connection_ends_is_named_to_all(capfd):
    first, far_first = socket.socketpair()
    second, far_second = socket.socketpair()
    with first, far_first, second:
        hosts._watch({FIRST: first, SECOND: second}, 60)
        far_second.close()
        said = printed(capfd, "is gone")
        assert "process 1 (b, pid 8) is gone: it died, or its machine or network did" in said
        assert "within 60 s; --resume goes on" in said
        # The other hears it, and nothing is said of the other.
        far_first.settimeout(20)
        assert b"process 1 (b, pid 8) is gone" in far_first.recv(1000)
        assert "process 0" not in said
        far_first.close()
        printed(capfd, "process 0 (a, pid 7) is gone")


def test_what_process_0_says_of_another_is_shown(capfd):
    near, far = socket.socketpair()
    with near, far:
        hosts._watch({FIRST: near}, 60)
        far.sendall(b"process 2 (c, pid 9) is gone\n")
        assert "\nrlhf: process 2 (c, pid 9) is gone\n" in printed(capfd, "is gone")
        # It is not sent back, or it would go round for ever.
        far.settimeout(0.2)
        with pytest.raises(TimeoutError):
            far.recv(1)
        far.close()
        printed(capfd, "process 0 (a, pid 7) is gone")


def test_a_process_that_ends_before_the_others_is_named_after_a_while(monkeypatch, capfd):
    monkeypatch.setattr(hosts, "APART", 0.1)
    near, far = socket.socketpair()
    with near:
        hosts._watch({FIRST: near}, 60)
        far.sendall(f"{hosts.ENDING}\n".encode())
        far.close()
        said = printed(capfd, "has ended")
        time.sleep(0.2)
        assert "is gone" not in said + capfd.readouterr().err


JOINED = (
    "import time; from rlhf import hosts; hosts.start(heartbeat_timeout=3); print(1, flush=True);"
    + "time.sleep(100)"
)


@pytest.mark.parametrize("number", exhaustive([1, 0], quick=[1]))
def test_a_process_that_is_killed_is_named_by_all_others(number):
    port = launch._free_port()
    all_three = [started(["-c", JOINED], other, 3, port=port) for other in range(3)]
    for process in all_three:
        assert process.stdout.readline()
    all_three[number].kill()
    said = {other: all_three[other].communicate(timeout=60)[1] for other in range(3)}
    del said[number]
    wanted = f"process {number} ({hosts.this().name}, pid {all_three[number].pid}) is gone"
    for other, text in said.items():
        assert wanted in text
        # JAX ends it.
        assert all_three[other].returncode == -signal.SIGABRT


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("h:1", 2, None), "several processes need all three .or JAX_COORDINATOR_ADDRESS"),
        ((None, 2, 0), "coordinator None, num_processes 2, process_id 0"),
        (("h:1", 2, 2), "process_id 2 but num_processes 2; processes count from 0"),
        (("h", 2, 1), "coordinator 'h' is no host:port, such as 10.0.0.1:8476"),
    ],
)
def test_a_place_that_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        hosts.start(*given)


def test_tools_run_in_one_process(capsys):
    with pytest.raises(ValueError, match="runs in one process; leave out --coordinator"):
        cli._join_hosts("plot", cli_surroundings("--process_id", "1"))


def cli_surroundings(*argv: str):
    return surroundings(argv)[1]


def test_options_of_every_command_are_taken_out_of_the_command_line():
    found = "--heartbeat-timeout", "9", "--process_id=1", "--steps", "2"
    rest, around = surroundings(found)
    assert (rest, around.heartbeat_timeout, around.process_id) == (["--steps", "2"], 9, 1)
    # After the mark they are those of the command that is launched.
    launching = ["--processes", "2", "--", "sft", *found]
    assert surroundings(launching) == (launching, surroundings([])[1])
    for words, message in (
        (["--num_processes", "0"], "--num_processes must be a whole number at least 1"),
        (["--coordinator", "--steps"], "--coordinator takes one value, but is given none"),
    ):
        with pytest.raises(ValueError, match=message):
            surroundings(words)


# --- the launcher --------------------------------------------------------------------------------

ENDLESS = "import time; time.sleep(60)"


def children(*programs: str) -> list[launch.Child]:
    return [
        launch.Child(number, subprocess.Popen([sys.executable, "-c", program]), None)
        for number, program in enumerate(programs)
    ]


def test_a_process_that_dies_is_named_and_the_others_are_ended(monkeypatch, capsys):
    monkeypatch.setattr(launch, "GRACE", 0.3)
    both = children(ENDLESS, ENDLESS)
    both[1].process.kill()
    start = time.monotonic()
    assert launch._watch(both, lambda: False) == 128 + signal.SIGKILL
    assert time.monotonic() - start < 10
    assert both[0].process.returncode == -signal.SIGKILL
    said = capsys.readouterr().err
    assert (
        f"process 1 ({hosts.this().name}, pid {both[1].process.pid}) was ended by SIGKILL" in said
    )


def test_processes_that_end_alike_are_not_reported(capsys):
    assert launch._watch(children("exit(2)", "exit(2)"), lambda: False) == 2
    assert launch._watch(children("", ""), lambda: False) == 0
    assert capsys.readouterr().err == ""


LAUNCHER = """
import os, sys, time
from rlhf.tools import launch
sys.executable = sys.argv[1]
print(launch._start(0, [], os.environ, None).process.pid, flush=True)
time.sleep(60)
"""


def is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the processes go on")
def test_processes_end_with_a_launcher_that_is_killed(tmp_path):
    endless = tmp_path / "python"
    endless.write_text("#!/bin/sh\nexec sleep 60\n")
    endless.chmod(0o755)
    argv = [sys.executable, "-c", LAUNCHER, str(endless)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as launcher:
        pid = int(launcher.stdout.readline())
        assert is_running(pid)
        launcher.kill()
    deadline = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_request_to_stop_is_passed_on():
    both = children(
        *[
            "import signal; signal.signal(15, lambda *_: exit(130)); print(1, flush=True); "
            + ENDLESS
        ]
        * 2
    )
    time.sleep(1)
    assert launch._watch(both, lambda: True) in (
        130,
        128 + signal.SIGTERM,
    )  # before the handler was there


def test_devices_are_dealt_out(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_x=1")
    assert launch._devices(1, 2, 4, []) == {"XLA_FLAGS": f"--xla_cpu_x=1 {launch.DEVICES}=4"}
    gpus = list("01234567")
    assert launch._devices(1, 2, None, gpus) == {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    assert launch._devices(1, 4, 1, gpus) == {"CUDA_VISIBLE_DEVICES": "1"}
    with pytest.raises(ValueError, match="4 processes of 3 GPUs, but there are 8"):
        launch._devices(0, 4, 3, gpus)


@pytest.mark.parametrize("command", [["plot", "run"], ["grp", "--steps", "1"]])
def test_only_recipes_are_launched(command, capsys):
    assert cli.main(["launch", "--processes", "3", "--", *command]) == 2
    assert f"{command[0]} is no recipe; write rlhf launch --processes 3" in capsys.readouterr().err


# --- whole runs ----------------------------------------------------------------------------------

JUDGE = """
import os

def length(completions, **columns):
    with open(__file__ + ".judged", "a") as file:
        file.writelines(f"{os.getppid()}\\n" for _ in completions)
    return [float(len(completion)) for completion in completions]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "base"
    sizes = ["--hidden_size", "32", "--num_heads", "4", "--num_layers", "1"]
    assert cli.main(["new", str(folder), *sizes, "--task", "task:reverse"]) == 0
    return str(folder)


def command(name: str, model: str, output: Path, *more: str) -> list[str]:
    return [name, "--model", model, *TRAIN, *COMMANDS.get(name, []), *more, "--output", str(output)]


def launched(argv: list[str]) -> subprocess.CompletedProcess:
    """`rlhf launch` of two processes with four devices each."""
    ask = [sys.executable, "-m", "rlhf", "launch", "--processes", "2", "--devices", "4", "--"]
    return subprocess.run([*ask, *argv], capture_output=True, text=True, timeout=400)


def on_eight_devices(argv: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "local_devices", jax.devices)
        assert cli.main(argv) == 0


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """`(folder of one process, of two, what the two said, the file of the judge)` of the same command."""
    folder = tmp_path_factory.mktemp("hosts")
    judge = folder / "judge.py"
    judge.write_text(JUDGE)
    more = ["--reward", f"{judge}:length", "--save_every", "2"]
    ran = launched(command("grpo", model, folder / "two", *more))
    assert ran.returncode == 0, ran.stderr
    judged = Path(f"{judge}.judged").read_text().splitlines()
    on_eight_devices(command("grpo", model, folder / "one", *more))
    return folder / "one", folder / "two", ran.stderr, judged


def test_two_processes_give_what_one_gives(runs):
    one, two, *_ = runs
    assert_equal_runs(two, one)
    assert {row["phase"] for row in steady(two)} == {"train", "eval"}


def test_two_processes_write_what_one_writes(runs):
    one, two, *_ = runs
    names = [{file.name for file in folder.iterdir()} for folder in (one, two)]
    assert names[1] - names[0] == {"hosts.json"}
    assert not names[0] - names[1]
    saved = [sorted(file.name for file in (run / "checkpoints").iterdir()) for run in (one, two)]
    assert saved[0] == saved[1]


def test_the_processes_are_written_down_and_shown(runs):
    _, two, said, _ = runs
    listed = json.loads((two / "hosts.json").read_text())["hosts"]
    assert [host["process"] for host in listed] == [0, 1]
    for host in listed:
        assert f"process {host['process']} ({host['name']}, pid {host['pid']})" in said
    assert said.count("the model is in") == 1


def test_completions_are_judged_once_by_one_of_the_hosts(runs):
    _, two, _, judged = runs
    pids = [str(host["pid"]) for host in json.loads((two / "hosts.json").read_text())["hosts"]]
    # 3 steps of 8 prompts with 4 completions, and an evaluation of as many.
    assert [judged.count(pid) for pid in pids] == [4 * 8 * 4 // 2] * 2
    assert len(judged) == 4 * 8 * 4


def test_a_folder_that_is_refused_is_refused_by_all_in_the_same_words(runs, model):
    _, two, *_ = runs
    port = launch._free_port()
    argv = ["-m", "rlhf", *command("sft", model, two)]
    processes = [started(argv, number, port=port) for number in (0, 1)]
    said = [process.communicate(timeout=120)[1].splitlines()[-1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert said[0] == said[1]
    assert "two: already holds a run or other files" in said[0]


# The others were compared once in this way; these are one of each kind of step and export.
OTHERS = {
    "lora": ("grpo", [*LORA, "--curriculum", "learnability", "--replay_groups", "8"]),
    # Of two steps: in the third all rewards are equal, and NaN is compared with NaN.
    "rounds": ("grpo", ["--dynamic_sampling", "2", "--steps", "2"]),
    "ppo": ("ppo", []),
    "rft": ("rft", ["--max_new_tokens", "4", "--reward", "length"]),
    "gkd": ("gkd", ["--teacher", "MODEL", "--max_new_tokens", "4"]),
    "nash_md": ("nash_md", ["--max_new_tokens", "4", "--reward", "length"]),
    "ilql": ("ilql", []),
    "kto": ("kto", ["--average", "ema"]),
    "sft": ("sft", ["--tensor", "4", "--fsdp", "2", "--keep_best", "--eval_every", "1"]),
}


@pytest.mark.parametrize("name", exhaustive(OTHERS, quick=[]))
def test_other_recipes_on_two_processes(name, model, tmp_path):
    recipe, options = OTHERS[name]
    options = [model if word == "MODEL" else word for word in options]
    ran = launched(command(recipe, model, tmp_path / "two", *options))
    assert ran.returncode == 0, ran.stderr
    on_eight_devices(command(recipe, model, tmp_path / "one", *options))
    assert_equal_runs(tmp_path / "two", tmp_path / "one")


@pytest.mark.exhaustive
def test_an_environment_is_refused(model, tmp_path):
    file = tmp_path / "talk.py"
    file.write_text("def make(): raise AssertionError")
    argv = command("grpo", model, tmp_path / "run", "--environment", f"{file}:make")
    ran = launched([word for word in argv if word not in ("--reward", "length")])
    assert ran.returncode == 2
    assert "is talked to by one process, but this run has several" in ran.stderr


# --- how they stop -------------------------------------------------------------------------------

AT_EXIT = """
import atexit, gc, sys
atexit.register(lambda: print(gc.get_freeze_count(), flush=True))
from rlhf import cli
sys.argv[1:] = ["help", "trl"]
cli.main()
"""


def test_python_does_not_look_at_every_object_when_a_command_ends():
    # With JAX loaded that takes seconds, of the few that a scheduler gives.
    ran = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True)
    assert int(ran.stdout.splitlines()[-1]) > 10_000, ran


def started_run(argv: list[str], output: Path):
    """A launched run of many steps, once it has taken two more; the pids of its processes."""
    ask = [sys.executable, "-m", "rlhf", "launch", "--processes", "2", "--devices", "4", "--"]
    run = subprocess.Popen([*ask, *argv], stderr=subprocess.PIPE, text=True)
    log = output / "metrics.jsonl"
    await_lines(log, lines_of(log) + 2, run)
    listed = json.loads((output / "hosts.json").read_text())["hosts"]
    return run, [host["pid"] for host in listed]


def lines_of(file: Path) -> int:
    return file.read_text().count("\n") if file.exists() else 0


@pytest.mark.exhaustive
def test_a_run_goes_on_on_other_hosts(model, tmp_path):
    """Begun in one process of eight devices, stopped in two of four, ended in one of one."""
    output = tmp_path / "run"
    steps = ["--steps", "40", "--save_every", "2"]
    argv = command("grpo", model, output, *steps)
    on_eight_devices(command("grpo", model, tmp_path / "wanted", *steps))

    class Killed(Exception):
        """The run ends here, with a checkpoint behind it."""

    original = loop.Checkpoints.save

    def save_and_end(self, state):
        original(self, state)
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Checkpoints, "save", save_and_end)
        with pytest.raises(Killed):
            on_eight_devices(argv)
    run, pids = started_run([*argv, "--resume"], output)
    os.kill(pids[1], signal.SIGTERM)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 130, said
    assert "stopped after step" in said
    last = steady(output, "train")[-1]["step"]
    # Its line is written when the step is over; saving, the export and the plot come after.  10 s on
    # a machine of its own, of which other tests may leave a part.
    written = (output / "metrics.jsonl").stat().st_mtime
    assert time.time() - written < 30
    assert last < 40
    assert (output / "checkpoints" / str(2 * last)).is_dir()
    assert cli.main([*argv, "--resume"]) == 0
    assert_equal_runs(output, tmp_path / "wanted")


def await_lines(log: Path, number: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while lines_of(log) < number:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.exhaustive
def test_sigterm_to_one_process_stops_both_after_the_same_step_saved(model, tmp_path):
    output = tmp_path / "run"
    argv = ["-m", "rlhf", *command("sft", model, output, "--steps", "4000")]
    port = launch._free_port()
    both = [started(argv, number, port=port, devices=4) for number in (0, 1)]
    await_lines(output / "metrics.jsonl", 2, both[0])
    both[1].terminate()
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [130, 130], said
    last = steady(output, "train")[-1]["step"]
    for text in said:
        assert f"run: stopped after step {last} of 4000; go on with --resume" in text
        assert "is gone" not in text
    assert (output / "checkpoints" / str(last)).is_dir()
    assert (output / "model").is_dir()


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", [0, 1])
def test_a_dead_process_is_named_and_the_other_ends(number, model, tmp_path):
    argv = command("sft", model, tmp_path / "run", "--steps", "4000")
    run, pids = started_run(argv, tmp_path / "run")
    os.kill(pids[number], signal.SIGKILL)
    start = time.monotonic()
    _, said = run.communicate(timeout=60)
    assert time.monotonic() - start < launch.GRACE + 10
    assert run.returncode == 128 + signal.SIGKILL
    assert (
        f"process {number} ({hosts.this().name}, pid {pids[number]}) was ended by SIGKILL" in said
    )
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
