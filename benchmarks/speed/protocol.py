"""What all sides of a comparison have in common: a process that answers each line of JSON with one.

It runs under every side's own Python, so it imports the standard library alone.

    python -m benchmarks.speed.SIDE JOB FOLDER

The folder has `spec.json` (sizes and hyper-parameters), a checkpoint with its tokenizer, and the rows of every job.  A line
`{"rest": seconds}` takes one step; its reply has the step's seconds and loss, and what the process needed so far.
"""

import json
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def spec(folder: str | Path) -> SimpleNamespace:
    return SimpleNamespace(**json.loads((Path(folder) / "spec.json").read_text()))


def rows(folder: str | Path, job: str) -> list[dict[str, Any]]:
    lines = (Path(folder) / f"{job}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def reward(completion: Any) -> float:
    """The number of even tokens: near half of all on every side, whatever is sampled.

    A whole number, since Tunix's PPO cuts others.
    """
    return float(sum(1 - int(token) % 2 for token in completion))


def peak_mib() -> float:
    """The most memory that this process has held.  Not `ru_maxrss`, which a child takes over from
    the parent that it was forked from.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return int(peak) / 1024


class Turns:
    """Steps that wait for their turn."""

    def __init__(self, memory: Callable[[], float] = peak_mib):
        # What libraries print must not come between the replies.
        self.replies = sys.stdout
        sys.stdout = sys.stderr
        self.memory = memory
        self.parts: dict[str, float] = {}
        self.started = 0.0
        self.seconds = 0.0

    @contextmanager
    def part(self, name: str):
        """Seconds of what is done before the first step; every reply has them."""
        started = time.perf_counter()
        yield
        self.parts[name] = time.perf_counter() - started

    def wait(self) -> None:
        """Waits for the next line, and rests until the other sides' threads have come to rest too.

        Raises: SystemExit where there are no more lines.
        """
        line = sys.stdin.readline()
        if not line:
            raise SystemExit
        time.sleep(json.loads(line)["rest"])
        self.started = time.perf_counter()

    def stop(self) -> None:
        """The end of what is timed."""
        self.seconds = time.perf_counter() - self.started

    def reply(self, **metrics: float) -> None:
        line = {
            "seconds": self.seconds,
            **metrics,
            "memory_mib": self.memory(),
            "parts": self.parts,
        }
        self.write(line)

    def write(self, line: dict[str, Any]) -> None:
        self.replies.write(json.dumps(line) + "\n")
        self.replies.flush()


def run(program: Callable[[str, str, Turns], None], turns: Turns) -> None:
    """A side's program on the command line's job and folder; an error becomes a reply."""
    try:
        program(sys.argv[1], sys.argv[2], turns)
    except Exception as error:
        traceback.print_exc()
        first_line = str(error).strip().splitlines()[:1]
        turns.write({"error": f"{type(error).__name__}: {''.join(first_line)}"})
        # Until nobody writes to this process any more.
        sys.stdin.read()
