"""The host's side of a run: a folder that is never overwritten, metrics on disk, progress with time left."""

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class RunFolder:
    """Where a run writes.

    Args:
      path: made where missing.

    Raises: ValueError where it is a file, or a folder that holds something.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ValueError(f"{self.path}: already holds a run or other files; choose another --output, or move it away")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be made ({error.strerror}); choose another --output") from None
        self._start = time.monotonic()

    def log(self, phase: str, step: int, metrics: dict[str, float]) -> None:
        """Appends one line to `metrics.jsonl`."""
        seconds = round(time.monotonic() - self._start, 3)
        self.append("metrics.jsonl", {"phase": phase, "step": step, "seconds": seconds, **metrics})

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Appends one JSON line to a file of the folder."""
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Writes a JSON file of the folder."""
        (self.path / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def read(self, name: str) -> list[dict[str, Any]]:
        """The rows of a JSON-lines file of the folder."""
        return [json.loads(line) for line in (self.path / name).read_text(encoding="utf-8").splitlines()]


def run(
    phase: str,
    step: Callable,
    state: Any,
    inputs: Iterable[tuple],
    total: int,
    *,
    log: Callable[[str, int, dict[str, float]], None],
    console: Console,
    shown: tuple[str, ...] = ("loss",),
    every: int = 1,
) -> Any:
    """Takes `total` steps, `state, metrics = step(state, *next(inputs))`, under a progress bar.

    Args:
      log: called with the phase, the step's number from 1, and its metrics as floats, every `every` steps and at the end.
      shown: metrics that stand beside the bar.

    Returns: the last state.
    """
    columns = (
        TextColumn("{task.description:<24}"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(phase, total=total, figures="")
        for number, arguments in zip(range(1, total + 1), inputs, strict=False):
            state, metrics = step(state, *arguments)
            if number % every == 0 or number == total:
                figures = {name: float(value) for name, value in jax.device_get(metrics).items()}
                log(phase, number, figures)
                progress.update(task, figures="  ".join(f"{name} {figures[name]:.3f}" for name in shown))
            progress.advance(task)
    return state
