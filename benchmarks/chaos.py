"""Runs killed (SIGKILL) at random moments and resumed until they end, held against one that nobody disturbed, bit for bit.

    python benchmarks/chaos.py [--processes 1 2] [--runs 40] [--json benchmarks/results/chaos.json]

Half of the runs are SFT, half GRPO, of a tiny model, with evaluations, the best state kept and an export every few steps.
Each is killed at a moment of every kind in its turn: at any time from the start of the process; while it sets up, within the
first moments of its folder; while a checkpoint is being written; while the model is being exported.  Then it is resumed (or
begun, where no folder was made yet), and killed again, `--kills` times, and at last left alone.  Compared are every line
of its metrics without times, every file of `model/`, and every array of its last checkpoint.

Runs of two processes are those of `rlhf launch`.  Killed is the launcher or one of the two, by chance; the run is resumed when
all have ended.  Reads /proc, so it needs Linux.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import report

MOMENTS = ("any time", "set-up", "checkpoint", "export")
ACTIVITIES = ("no folder yet", "set-up", "training", "saving", "exporting", "over")
LAUNCHER = "launcher"
PROCESS = "process"
STEPS = 12
TINY = ["--hidden_size", "16", "--num_heads", "2", "--num_layers", "1"]
OF_ALL = [
    *("--dataset", "task:reverse", "--dataset_size", "64", "--batch_size", "4"),
    *("--learning_rate", "1e-3", "--steps", str(STEPS), "--save_every", "3"),
    *("--eval_dataset", "task:reverse", "--eval_every", "4", "--keep_best", "--export_every", "2"),
]
RUNS = {
    "sft": ["--max_length", "32"],
    "grpo": ["--num_samples", "4", "--max_new_tokens", "4", "--kl_coef", "0.1"],
}
# Metrics of time and of the process: its caches decide what is compiled.
UNSTEADY = ("seconds", "per_second", "mfu", "compilations", "time/")


def command(name: str, work: Path, output: Path, processes: int) -> list[str]:
    run = [name, "--model", str(work / "base"), *OF_ALL, *RUNS[name]]
    launch = ["launch", "--processes", str(processes), "--"] if processes > 1 else []
    cache = ["--compilation_cache", str(work / "cache")]
    return [sys.executable, "-m", "rlhf", *launch, *run, *cache, "--output", str(output)]


def start(ask: list[str], output: Path, log: Path) -> subprocess.Popen:
    """Begins a run, or goes on with one whose folder was made."""
    resume = ["--resume"] if output.exists() else []
    with log.open("a") as file:
        return subprocess.Popen([*ask, *resume], stdout=file, stderr=subprocess.STDOUT)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def activity(output: Path) -> str:
    """What a run is doing, by its folder."""
    if is_saving(output):
        return "saving"
    if is_exporting(output):
        return "exporting"
    if not output.exists():
        return "no folder yet"
    logged = output / "metrics.jsonl"
    return "training" if logged.exists() and logged.stat().st_size else "set-up"


def is_saving(output: Path) -> bool:
    return any((output / "checkpoints").glob(".part.*"))


def is_exporting(output: Path) -> bool:
    return any(output.glob(".part.*.model"))


UNDER_WAY = {"checkpoint": is_saving, "export": is_exporting}


def wait(process: subprocess.Popen, seen: Callable[[], bool]) -> None:
    """Until something is seen, or the process has ended."""
    while process.poll() is None and not seen():
        time.sleep(0.0005)


def wait_for(
    process: subprocess.Popen, output: Path, moment: str, lasts: float, rng: random.Random
) -> None:
    """Until a random moment of this kind, or the end."""
    if moment == "any time":
        time.sleep(rng.uniform(0, lasts))
    if moment == "set-up":
        wait(process, (output / ".lock").exists)
        time.sleep(rng.uniform(0, 0.5))
    if moment in UNDER_WAY:
        is_under_way = UNDER_WAY[moment]
        # Not always the first one.
        for _ in range(rng.randint(1, 3)):
            wait(process, lambda: not is_under_way(output))
            wait(process, lambda: is_under_way(output))
            time.sleep(rng.uniform(0, 0.02))


def kill(
    process: subprocess.Popen, output: Path, several: bool, rng: random.Random
) -> tuple[str, ...]:
    """Kills a process of a run, or its launcher.  Returns: which, and what the run was doing."""
    if process.poll() is None:
        # Not `send_signal`, which would take note of an end that `waitid` waits for.
        os.kill(process.pid, signal.SIGSTOP)
        # Until it has stopped: a launcher starts no process that is not seen here.  Or has ended.
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    if process.poll() is not None:
        return ("over",)
    launched = children(process.pid) if several else []
    victim = rng.choice([process.pid, *launched])
    os.kill(victim, signal.SIGKILL)
    doing = activity(output)
    process.send_signal(signal.SIGCONT)
    # A launcher ends the others where it lives, and the kernel where it does not.
    process.wait()
    while any(is_running(pid) for pid in launched):
        time.sleep(0.01)
    is_launcher = several and victim == process.pid
    return LAUNCHER if is_launcher else PROCESS, doing


def finish(ask: list[str], output: Path, log: Path) -> None:
    process = start(ask, output, log)
    if process.wait():
        raise SystemExit(f"{output}: exit code {process.returncode}; see {log}")


def outcome(output: Path) -> dict[str, object]:
    """What a run comes to: its metrics without times, the files of its model, and its arrays."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    metrics = [
        {name: x for name, x in line.items() if not any(part in name for part in UNSTEADY)}
        for line in lines
    ]
    exported = {file.name: file.read_bytes() for file in (output / "model").iterdir()}
    saved = output / "checkpoints" / str(STEPS) / "state"
    checkpointer = ocp.PyTreeCheckpointer()
    # As NumPy: devices of other processes, to which they belong, are not here.
    in_memory = ocp.RestoreArgs(restore_type=np.ndarray)
    forms = checkpointer.metadata(saved).item_metadata.tree
    arrays = checkpointer.restore(saved, restore_args=jax.tree.map(lambda _: in_memory, forms))
    named = jax.tree_util.tree_leaves_with_path(arrays)
    state = {jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in named}
    return {"metrics": metrics, "model": exported, "state": state}


def undisturbed(name: str, work: Path, processes: int) -> tuple[dict[str, object], float]:
    """What a run comes to that nobody kills, and how many seconds it takes."""
    # Twice: the second finds its programs compiled, as those that are killed do.
    for number in range(2):
        output = work / f"{name}-{processes}-undisturbed-{number}"
        begun = time.monotonic()
        finish(command(name, work, output, processes), output, work / "log.txt")
    return outcome(output), time.monotonic() - begun


def killed_runs(
    work: Path, processes: int, runs: int, kills: int, rng: random.Random
) -> list[dict]:
    """A row for each recipe: how many of its runs end with the same bits, and when they were killed."""
    expected = {}
    lasts = {}
    for name in RUNS:
        expected[name], lasts[name] = undisturbed(name, work, processes)
    same: Counter[str] = Counter()
    hit: Counter[tuple[str, str]] = Counter()
    for number in range(runs):
        name = list(RUNS)[number % 2]
        output = work / f"{name}-{processes}-{number}"
        log = output.with_suffix(".txt")
        ask = command(name, work, output, processes)
        seen: list[str] = []
        for again in range(kills):
            moment = MOMENTS[(number // 2 + again) % len(MOMENTS)]
            process = start(ask, output, log)
            wait_for(process, output, moment, lasts[name], rng)
            seen += kill(process, output, processes > 1, rng)
        hit.update((name, what) for what in seen)
        finish(ask, output, log)
        found = outcome(output)
        differ = [what for what, value in expected[name].items() if found[what] != value]
        killed = f"{number + 1} of {runs}: {name} of {processes}, killed: {', '.join(seen)}"
        if differ:
            print(
                f"{killed}; {', '.join(differ)} differ; {output} stays, its log is {log}",
                flush=True,
            )
            continue
        same[name] += 1
        shutil.rmtree(output)
        print(f"{killed}; the same bits", flush=True)
    return [
        {"run": name, "processes": processes, "runs": len(range(place, runs, len(RUNS))),
         "same bits": same[name], "seconds": lasts[name],
         **{what: hit[name, what] for what in (LAUNCHER, PROCESS, *ACTIVITIES)}}
        for place, name in enumerate(RUNS)
    ]  # fmt: skip


def main() -> None:
    parser = report.arguments(__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="of a run")
    parser.add_argument("--runs", type=int, default=40, help="for each number of processes")
    parser.add_argument("--kills", type=int, default=1, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="chaos-"))
    new = [sys.executable, "-m", "rlhf", "new", str(work / "base"), *TINY]
    subprocess.run(new, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rng = random.Random(args.seed)
    begun = time.monotonic()
    rows = [
        row
        for processes in args.processes
        for row in killed_runs(work, processes, args.runs, args.kills, rng)
    ]
    print(f"{(time.monotonic() - begun) / 60:.0f} minutes")
    report.show("runs killed at random moments and resumed", rows, args.json)
    differ = sum(row["runs"] - row["same bits"] for row in rows)
    if differ:
        raise SystemExit(f"{differ} runs end with other bits; see {work}")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
