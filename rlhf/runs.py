"""A run's folder: what was asked for, with which versions, what came of it.

config.yaml      every option, as resolved: `rlhf sft --config config.yaml` asks for the same again
about.json       the command, versions, commit and machine
metrics.jsonl    one line a logged step
checkpoints/     the whole state, for --resume
samples/         what the model says at every evaluation, as Parquet
model/           the model at the newest checkpoint, as Hugging Face writes it; of adapters (adapter/) at the end
curves.png, README.md
"""

import dataclasses
import json
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from rlhf import yaml_files

PACKAGES = ("rlhf", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "numpy")
ABOUT_ROWS = ("phase", "step", "seconds")  # of metrics.jsonl; the rest are figures
FREE = (  # options that a resumed run may have otherwise
    "output", "resume", "log_every", "save_every", "keep", "track", "reward_timeout", "max_reward_failures",
)  # fmt: skip


class RunFolder:
    """Where a run writes.

    Args:
      path: made where missing.
      options: all arguments of the recipe, `resume` among them; `describe` writes them down; those of a run that goes on
        are compared with what it began with.

    Raises: ValueError where it is a file, or a folder that holds something and is not to be resumed, or resumed otherwise than
      it began.
    """

    def __init__(self, path: str | Path, options: Mapping[str, Any] | None = None):
        self.path = Path(path)
        self.options = flat(options or {})
        self.resumed = False
        self._start = time.monotonic()
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            self._resume()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be made ({error.strerror}); choose another --output") from None

    def _resume(self) -> None:
        used, config = f"{self.path}: already holds a run or other files", self.path / "config.yaml"
        if not config.exists():
            raise ValueError(f"{used}; choose another --output, or move it away")
        if not self.options.get("resume"):
            raise ValueError(f"{used}; choose another --output, move it away, or --resume it")
        before = yaml_files.load(config)
        changed = [
            f"{name} was {before.get(name)!r} and is {self.options.get(name)!r}"
            for name in sorted({*before, *self.options} - set(FREE))
            if before.get(name) != self.options.get(name)
        ]
        if changed:
            raise ValueError(f"{self.path}: a run goes on as it began, but {'; '.join(changed)}; give its own options")
        self.resumed = True

    def describe(self) -> None:
        """Writes `config.yaml` and `about.json`, unless the run goes on."""
        if not self.resumed:
            (self.path / "config.yaml").write_text(yaml.safe_dump(self.options, sort_keys=False), encoding="utf-8")
            self.write("about.json", about())

    def withdraw(self) -> None:
        """Takes away what a run has written that ends before its first step, so that the folder can be used again."""
        if not self.resumed:
            for name in ("config.yaml", "about.json", "metrics.jsonl"):
                (self.path / name).unlink(missing_ok=True)
            for name in ("checkpoints", "tensorboard"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            with suppress(OSError):
                self.path.rmdir()

    def say(self, text: str) -> None:
        """A line for the user."""
        print(text, file=sys.stderr)

    def log(self, phase: str, step: int, metrics: dict[str, float]) -> None:
        """Appends one line to `metrics.jsonl`."""
        seconds = round(time.monotonic() - self._start, 3)
        self.append("metrics.jsonl", {"phase": phase, "step": step, "seconds": seconds, **metrics})

    def forget_after(self, step: int) -> None:
        """Leaves out the lines of `metrics.jsonl` beyond a step: a resumed run takes those steps again."""
        kept = [json.dumps(row) + "\n" for row in self.read("metrics.jsonl") if row["step"] <= step]
        (self.path / "metrics.jsonl").write_text("".join(kept), encoding="utf-8")

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Appends one JSON line to a file of the folder."""
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Writes a JSON file of the folder."""
        (self.path / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def read(self, name: str) -> list[dict[str, Any]]:
        """The rows of a JSON-lines file of the folder, none if it is missing; a last line that was cut off is left out."""
        return _lines(self.path / name) if (self.path / name).exists() else []

    def samples(self, step: int, table: Mapping[str, list]) -> None:
        """What the model says at a step: `samples/STEP.parquet`."""
        import pyarrow
        import pyarrow.parquet

        (self.path / "samples").mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table(dict(table)), self.path / "samples" / f"{step:08d}.parquet")

    def plot(self, names: tuple[str, ...]) -> None:
        """`curves.png`: logged figures by step."""
        plot([self.path], self.path / "curves.png", names)

    def figures(self) -> dict[str, tuple[float, int]]:
        """The last value of every figure of `metrics.jsonl`, and its step."""
        rows = self.read("metrics.jsonl")
        return {name: (value, row["step"]) for row in rows for name, value in row.items() if name not in ABOUT_ROWS}

    def card(self) -> None:
        """`README.md`, the model card."""
        known = json.loads((self.path / "about.json").read_text(encoding="utf-8"))
        options = yaml_files.load(self.path / "config.yaml")
        last = "\n".join(f"| {name} | {value:.4g} | {step} |" for name, (value, step) in self.figures().items())
        text = (
            f"---\nlibrary_name: transformers\nbase_model: {options.get('model')}\ntags: [rlhf]\n---\n\n"
            f"# {self.path.name}\n\nMade by `{known['command']}`.\n\n"
            f"| figure | last | step |\n|---|---|---|\n{last}\n\n"
            + "\n".join(f"- {name} {version}" for name, version in known["versions"].items())
            + "\n"
        )
        (self.path / "README.md").write_text(text, encoding="utf-8")


def flat(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's arguments as options: the fields of dataclasses side by side with the others.

    >>> Size = dataclasses.make_dataclass("Size", ["rows"])
    >>> flat({"size": Size(3), "output": "runs/a"})
    {'rows': 3, 'output': 'runs/a'}
    """
    parts = (
        dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else {name: value}
        for name, value in arguments.items()
    )
    return {name: value for part in parts for name, value in part.items()}


def about() -> dict[str, Any]:
    """The command, the versions and the machine of this process."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "command": shlex.join(["rlhf", *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), **versions},
        "commit": _commit(),
        "machine": platform.platform(),
    }


def _commit() -> str | None:
    """Of the checkout that the package runs from, if it is one."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def plot(folders: list[Path], target: Path, names: tuple[str, ...]) -> None:
    """Logged figures by step, one panel a figure and one line a run.

    Raises: ValueError where a folder has no metrics, or none of them a figure of these names.
    """
    from matplotlib.figure import Figure

    runs = {folder.name: metrics_of(folder) for folder in folders}
    shown = [name for name in names if any(name in row for rows in runs.values() for row in rows)]
    if not shown:
        known = sorted({name for rows in runs.values() for row in rows for name in row} - set(ABOUT_ROWS))
        raise ValueError(f"no run has {', '.join(names)}; they have {', '.join(known)}")
    figure = Figure(figsize=(4 * len(shown), 2.8), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for run, rows in runs.items():
            points = [(row["step"], row[name]) for row in rows if name in row]
            axis.plot(*zip(*points, strict=True), label=run) if points else None
        axis.set(title=name.replace("_", " "), xlabel="step")
    if len(runs) > 1:
        figure.axes[0].legend(fontsize=7)
    figure.savefig(target, dpi=120)


@contextmanager
def renewed(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `folder` when it is whole."""
    new, old = (folder.with_name(f"{folder.name}.{which}") for which in ("new", "old"))
    for left in (new, old):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    yield new
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def model_of(name: str) -> str:
    """The model of a run's folder; of another folder, or a name on the Hub, itself.

    Raises: ValueError for a run that has not written its model yet.
    """
    inside = Path(name) / "model"
    if (inside / "config.json").exists():
        return str(inside)
    if (Path(name) / "config.yaml").exists():
        raise ValueError(f"{name}: a run without a model yet (of adapters it comes last); --resume it, or give a model")
    return name


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """What a run has logged.  Raises: ValueError where the folder is no run's, or nothing is logged yet."""
    try:
        rows = _lines(folder / "metrics.jsonl")
    except OSError:
        raise ValueError(f"{folder}: no metrics.jsonl, so no run; give a run's folder") from None
    if not rows:
        raise ValueError(f"{folder}: metrics.jsonl is empty; the run has logged nothing yet")
    return rows


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
