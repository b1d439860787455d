"""The files of `examples/launch/` are what their programs read, and their command lines are rlhf's."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from rlhf import cli, hosts
from rlhf.command_line import surroundings
from rlhf.training import meshes
from rlhf.training.options import MeshOptions

FOLDER = Path(__file__).parent.parent / "examples" / "launch"
FILES = sorted(file.name for file in FOLDER.iterdir())
# What the launchers set, and shells make of words in the files.
KNOWN = {
    '"$RESUME"': "true",
    '"$([ -e /runs/grpo/config.yaml ] && echo true || echo false)"': "false",
    '"$(echo "$SKYPILOT_NODE_IPS" | head -n1):8476"': "10.0.0.1:8476",
    '"$SKYPILOT_NUM_NODES"': "2",
    '"$SKYPILOT_NODE_RANK"': "1",
    "|| code=$?": "",
}
DEVICES = {"slurm.sh": 2 * 8, "jobset.yaml": 2 * 8, "skypilot.yaml": 2 * 8, "tpu.sh": 64}


def scripts(name: str) -> list[str]:
    """What of a file a shell runs."""
    text = (FOLDER / name).read_text()
    if name.endswith(".sh"):
        return [text]
    found = yaml.safe_load(text)
    if name == "skypilot.yaml":
        return [found["setup"], found["run"]]
    pod = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    shell, flag, script = pod["containers"][0]["command"]
    assert (shell, flag) == ("bash", "-c")
    return [script]


def argv_of(name: str) -> list[str]:
    """The words after `rlhf` of the one recipe that a file runs."""
    text = "\n".join(scripts(name)).replace("\\\n", " ")
    (line,) = re.findall(r"\brlhf (grpo .*)", text)
    for word, meaning in KNOWN.items():
        line = line.replace(word, meaning)
    # In tpu.sh the command is an argument of ssh, in quotes.
    line = line.removesuffix('"') if name == "tpu.sh" else line
    assert "$" not in line
    return shlex.split(line)


def test_there_is_one_for_each_launcher():
    assert set(FILES) == set(DEVICES)


@pytest.mark.parametrize("name", FILES)
def test_shells_can_read_it(name):
    for script in scripts(name):
        ran = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("name", FILES)
def test_its_command_is_accepted(name, capsys, monkeypatch):
    argv = argv_of(name)
    with pytest.raises(SystemExit) as end:
        cli.main([*argv, "--print_config"])
    assert end.value.code == 0
    options = yaml.safe_load(capsys.readouterr().out)
    # And the mesh fits its devices and rows.
    monkeypatch.setattr(meshes, "local_devices", lambda: range(DEVICES[name]))
    monkeypatch.setattr(meshes, "make_mesh", lambda devices, **sizes: sizes)
    sizes = {axis: options[axis] for axis in ("data", "fsdp", "tensor")}
    rows = options["batch_size"] * options["num_samples"]
    made = meshes.make(MeshOptions(**sizes), rows=rows)
    assert made["data"] * made["fsdp"] * made["tensor"] == DEVICES[name]


def test_each_says_where_the_processes_find_each_other(monkeypatch):
    places = {name: surroundings(argv_of(name))[1] for name in FILES}
    assert places["skypilot.yaml"][1:4] == ("10.0.0.1:8476", 2, 1)
    assert places["tpu.sh"].coordinator == "auto"
    # JAX knows Slurm by what srun sets; a JobSet sets the variables.
    assert places["slurm.sh"][1:4] == places["jobset.yaml"][1:4] == (None, None, None)
    job = yaml.safe_load((FOLDER / "jobset.yaml").read_text())["spec"]["replicatedJobs"][0]
    pods = job["template"]["spec"]
    container = pods["template"]["spec"]["containers"][0]
    given = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert given["JAX_NUM_PROCESSES"] == str(pods["completions"]) == str(pods["parallelism"])
    place = hosts._checked(given["JAX_COORDINATOR_ADDRESS"], 2, 1)
    # JOBSET-JOB-0-0.SUBDOMAIN, as the JobSet names its first pod.
    assert place.address == (f"grpo-{job['name']}-0-0.grpo", 8476)
    assert "JAX_PROCESS_ID" in given
