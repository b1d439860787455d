"""Kills runs at random moments and resumes them: every run must end bit for bit as one that nobody killed.

    python tests/chaos.py FOLDER --kills 20

For SFT and for GRPO: as many runs are killed (SIGKILL) within the first second of their work, and one run is killed as many
times during it.  The first second is that of writing: it begins when the run's folder is made.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from logs import steady

TINY = ["--hidden_size", "16", "--num_heads", "2", "--num_layers", "1"]
RUNS = {
    "sft": [
        "--dataset_size",
        "64",
        "--max_length",
        "32",
        "--eval_dataset",
        "task:reverse",
        "--eval_every",
        "20",
    ],
    "grpo": [
        "--dataset_size",
        "64",
        "--num_samples",
        "4",
        "--max_new_tokens",
        "4",
        "--kl_coef",
        "0.1",
    ],
}
OF_ALL = [
    "--dataset",
    "task:reverse",
    "--batch_size",
    "4",
    "--learning_rate",
    "1e-3",
    "--save_every",
    "5",
]


def command(name: str, base: Path, output: Path, steps: int) -> list[str]:
    ask = [
        sys.executable,
        "-m",
        "rlhf",
        name,
        "--model",
        str(base),
        *OF_ALL,
        *RUNS[name],
        "--steps",
        str(steps),
    ]
    return [*ask, "--output", str(output)]


def begun(output: Path) -> list[str]:
    """`--resume` where the run's folder was made before it was killed; before that there is nothing to resume."""
    return ["--resume"] if output.exists() else []


def killed(ask: list[str], output: Path, seconds: float, from_folder: bool) -> bool:
    """Starts a command and kills it after so many seconds, from its start or from its folder's; whether it was at work yet."""
    with subprocess.Popen(
        [*ask, *begun(output)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while from_folder and process.poll() is None and not output.exists():
            time.sleep(0.002)
        time.sleep(seconds)
        alive = process.poll() is None
        process.kill()
    return alive


def finished(ask: list[str], output: Path) -> None:
    """Runs a command to its end.  Raises: SystemExit where it fails."""
    ran = subprocess.run([*ask, *begun(output)], capture_output=True, text=True)
    if ran.returncode:
        left = sorted(os.listdir(output)) if output.exists() else "no folder"
        raise SystemExit(f"{output}: exit code {ran.returncode}\n{ran.stderr}\n{left}")


def outcome(output: Path) -> tuple[list[dict], bytes]:
    """What a run comes to: its metrics, without times, and its weights."""
    return steady(output), (output / "model" / "model.safetensors").read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", nargs="+", default=list(RUNS))
    parser.add_argument("--moments", nargs="+", default=["first", "during"])
    args = parser.parse_args()
    rng = random.Random(args.seed)
    args.folder.mkdir(parents=True)
    base = args.folder / "base"
    subprocess.run([sys.executable, "-m", "rlhf", "new", str(base), *TINY], check=True)
    for name in args.runs:
        whole = args.folder / f"{name}-whole"
        started = time.monotonic()
        finished(command(name, base, whole, args.steps), whole)
        lasts = time.monotonic() - started
        expected = outcome(whole)

        left: dict[str, int] = {}
        for number in range(args.kills if "first" in args.moments else 0):  # one run each
            output = args.folder / f"{name}-first"
            ask = command(name, base, output, args.steps)
            killed(ask, output, rng.random(), from_folder=number % 4 != 0)
            what = ", ".join(sorted(os.listdir(output))) if output.exists() else "no folder"
            left[what] = left.get(what, 0) + 1
            finished(ask, output)
            if outcome(output) != expected:
                raise SystemExit(f"{output}: not as the whole run, after kill {number}")
            shutil.rmtree(output)
        if left:
            print(
                f"{name}: {args.kills} kills in the first second, all resumed bit for bit; what was left:",
                flush=True,
            )
        for what, times in left.items():
            print(f"  {times} times {what}")

        if "during" not in args.moments:
            continue
        output = args.folder / f"{name}-during"  # one run, killed over and over
        ask, hit = command(name, base, output, args.steps), 0
        while hit < args.kills:
            hit += killed(ask, output, rng.uniform(0.3, lasts), from_folder=False)
            if output.exists() and (output / "metrics.jsonl").exists() and hit < args.kills:
                rows = (output / "metrics.jsonl").read_text().splitlines()
                if (
                    len(rows) >= len(expected[0]) and (output / "README.md").exists()
                ):  # over already: another
                    finished(ask, output)
                    if outcome(output) != expected:
                        raise SystemExit(f"{output}: not as the whole run, after {hit} kills")
                    shutil.rmtree(output)
        finished(ask, output)
        if outcome(output) != expected:
            raise SystemExit(f"{output}: not as the whole run, after {hit} kills")
        print(
            f"{name}: {hit} kills during runs of {lasts:.1f} s, all resumed bit for bit", flush=True
        )


if __name__ == "__main__":
    main()
