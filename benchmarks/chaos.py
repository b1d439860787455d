"""Runs killed (SIGKILL) at random moments and resumed until they end, held against one that nobody disturbed, bit for bit.

    python benchmarks/chaos.py [--runs 40] [--processes 2] [--json benchmarks/results/chaos.json]

Half of the runs are SFT, half GRPO, of a tiny model, with evaluations, the best state kept and an export every few steps.
Each is killed at a moment of every kind in its turn: at any time from the start of the process; while it sets up, within the
first moments of its folder; while a checkpoint is being written; while the model is being exported.  Then it is resumed (or
begun, where no folder was made yet), and killed again, `--kills` times, and at last left alone.  Compared are every line
of its metrics without times, every file of `model/`, and every array of its last checkpoint.  With `--processes` of more than
one a run is that many processes of `rlhf launch`, killed together.
"""

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import report

MOMENTS = ("any time", "set-up", "checkpoint", "export")
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
        # A group of its own: what it starts is killed with it.
        return subprocess.Popen(
            [*ask, *resume], stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def wait(process: subprocess.Popen, seen: Callable[[], bool], *, until: bool = True) -> None:
    """Until something is seen, or is no longer, or the process has ended."""
    while process.poll() is None and seen() != until:
        time.sleep(0.0005)


def kill(
    ask: list[str], output: Path, log: Path, moment: str, lasts: float, rng: random.Random
) -> str:
    """Starts a run, kills it at a moment of this kind, and says what it was doing then."""

    def is_saving() -> bool:
        return any((output / "checkpoints").glob(".part.*"))

    def is_exporting() -> bool:
        return any(output.glob(".part.*.model"))

    process = start(ask, output, log)
    if moment == "any time":
        time.sleep(rng.uniform(0, lasts))
    if moment == "set-up":
        wait(process, (output / ".lock").exists)
        time.sleep(rng.uniform(0, 0.5))
    for kind, is_under_way in (("checkpoint", is_saving), ("export", is_exporting)):
        # Not always the first one.
        for _ in range(rng.randint(1, 3) if moment == kind else 0):
            wait(process, is_under_way, until=False)
            wait(process, is_under_way)
            time.sleep(rng.uniform(0, 0.02))
    ended = process.poll() is not None
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if ended:
        return "over"
    for what, seen in (("saving", is_saving), ("exporting", is_exporting)):
        if seen():
            return what
    if not output.exists():
        return "no folder yet"
    logged = output / "metrics.jsonl"
    return "training" if logged.exists() and logged.stat().st_size else "set-up"


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
    arrays = ocp.StandardCheckpointer().restore(output / "checkpoints" / str(STEPS) / "state")
    named = jax.tree_util.tree_leaves_with_path(arrays)
    state = {jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in named}
    return {"metrics": metrics, "model": exported, "state": state}


def main() -> None:
    parser = report.arguments(__doc__)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--kills", type=int, default=1, help="of each run")
    parser.add_argument("--processes", type=int, default=1, help="of `rlhf launch`")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    work = Path(tempfile.mkdtemp(prefix="chaos-"))
    new = [sys.executable, "-m", "rlhf", "new", str(work / "base"), *TINY]
    subprocess.run(new, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    expected = {}
    lasts = {}
    for name in RUNS:
        # Twice: the second finds its programs compiled, as those that are killed do.
        for whole in (work / f"{name}-first", work / f"{name}-whole"):
            begun = time.monotonic()
            finish(command(name, work, whole, args.processes), whole, work / "log.txt")
            lasts[name] = time.monotonic() - begun
        expected[name] = outcome(whole)

    same = {name: 0 for name in RUNS}
    hit: dict[str, dict[str, int]] = {name: {} for name in RUNS}
    begun = time.monotonic()
    for number in range(args.runs):
        name = list(RUNS)[number % 2]
        output = work / f"{name}-{number}"
        log = work / f"{name}-{number}.txt"
        ask = command(name, work, output, args.processes)
        for again in range(args.kills):
            moment = MOMENTS[(number // 2 + again) % len(MOMENTS)]
            doing = kill(ask, output, log, moment, lasts[name], rng)
            hit[name][doing] = hit[name].get(doing, 0) + 1
        finish(ask, output, log)
        found = outcome(output)
        differ = [what for what, value in expected[name].items() if found[what] != value]
        if differ:
            print(f"{output}: {', '.join(differ)} differ; the folder stays, its log is {log}")
            continue
        same[name] += 1
        shutil.rmtree(output)
        print(f"{number + 1} of {args.runs}: {name}, the same bits", flush=True)
    rows: list[dict] = [
        {"run": name, "processes": args.processes, "runs": len(range(place, args.runs, len(RUNS))),
         "same bits": same[name], "kills": sum(hit[name].values()), "seconds of one": lasts[name],
         **{doing: hit[name].get(doing, 0)
            for doing in ("no folder yet", "set-up", "training", "saving", "exporting", "over")}}
        for place, name in enumerate(RUNS)
    ]  # fmt: skip
    minutes = (time.monotonic() - begun) / 60
    print(f"{minutes:.0f} minutes, {statistics.fmean(lasts.values()):.1f} s a run")
    report.show("runs killed at random moments and resumed", rows, args.json)
    if sum(same.values()) == args.runs:
        shutil.rmtree(work)
    else:
        raise SystemExit(f"{sum(same.values())} of {args.runs} runs end with the same bits")


if __name__ == "__main__":
    main()
