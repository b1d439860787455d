"""A run's folder: what was requested, with which versions, what came of it.

config.yaml      every option, as resolved: `rlhf sft --config config.yaml` requests the same again
about.json       the command, versions, commit and machine
hosts.json       of several processes: the machine and process id of each
metrics.jsonl    one line a logged step
checkpoints/     the whole state, for --resume
samples/         what the model says at every evaluation, as Parquet
model/           the model at the end, at a stop and every --export_every steps, as Hugging Face
                 writes it; of adapters (adapter/) at the end alone
bad_batch.npz    a batch whose gradient was infinite or NaN, where that ended the run; of recipes that
                 sample with the rollout and its rewards
curves.png, README.md

Every file is written beside its place and renamed, so that a process that is killed leaves it whole
or not at all.  Of several processes the first alone decides and writes, and all are told.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from rlhf import files, hosts, yaml_files

PACKAGES = (
    "rlhf",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "datasets",
    "numpy",
)
# Columns of metrics.jsonl that are no metrics.
ABOUT_ROWS = ("phase", "step", "seconds")
# Held by the process that is at work in the folder.
LOCK = ".lock"
# The start of about.json, by which a file that was cut off is known as ours.
ABOUT = '{\n  "command": "rlhf'
# What a run writes before its first step: a folder with nothing else has lost nothing.
FIRST = {
    "config.yaml",
    "about.json",
    "hosts.json",
    "metrics.jsonl",
    "checkpoints",
    "tensorboard",
    "wandb",
    LOCK,
}
# Options that a resumed run may have otherwise: they change no number that is computed.
FREE = (
    "data",
    "fsdp",
    "tensor",
    "sequence",
    "expert",
    "output",
    "resume",
    "log_every",
    "save_every",
    "keep",
    "export_every",
    "max_skipped",
    "track",
    "reward_timeout",
    "max_reward_failures",
)


class RunFolder:
    """Where a run writes.

    Nothing is made before `at_work`, or the first line or file, so that a run that cannot begin
    leaves no folder.  A folder in which nothing is saved yet, such as that of a run that was killed
    at once, is used again.

    Args:
      path: of the folder.
      options: all arguments of the recipe, `resume` among them; `describe` writes them down; those
        of a run that goes on are compared with what it began with.

    Raises: ValueError where it is a file, or a folder that holds something and is not to be
    resumed, or resumed otherwise than
      it began, or where there is none to resume, or none can be made.
    """

    def __init__(self, path: str | Path, options: Mapping[str, Any] | None = None):
        self.path = Path(path)
        self.options = flat(options or {})
        self._start = time.monotonic()
        self.resumed = hosts.of_first(self._look)

    def _look(self) -> bool:
        """Decides whether the run begins or goes on: True."""
        used = f"{self.path}: already holds a run or other files; choose another --output"
        if not os.path.lexists(self.path):
            if self.options.get("resume"):
                raise ValueError(
                    f"{self.path}: no run there to resume; leave out --resume to begin one"
                )
            files.check_place(self.path)
            return False
        if not self.path.is_dir():
            raise ValueError(f"{used}, or move it away")
        resumed = False
        unused = self._unused()
        before = options_of(self.path)
        if before is None or not self.options.get("resume"):
            if not unused:
                cure = ", or move it away" if before is None else ", move it away, or --resume it"
                raise ValueError(f"{used}{cure}")
        elif unused and self._half_written("config.yaml"):
            # Its options were never written in full, so that nothing can be compared: it starts
            # anew.
            pass
        else:
            self._compare(before)
            resumed = True
        files.check_place(self.path / "config.yaml")
        return resumed

    def _compare(self, before: dict[str, Any]) -> None:
        changed = [
            f"{name} was {before.get(name)!r} and is {self.options.get(name)!r}"
            for name in sorted({*before, *self.options} - set(FREE))
            if before.get(name) != self.options.get(name)
        ]
        if changed:
            raise ValueError(
                f"{self.path}: a run goes on as it began, but {'; '.join(changed)}; give its own "
                "options"
            )

    def _unused(self) -> bool:
        """Whether all that is in the folder is of a run's first moments: no step logged or saved,
        and no file of others.
        """
        # Files that were being written when the process was killed are nobody's.
        names = {file.name for file in self.path.iterdir() if not file.name.startswith(files.PART)}
        if names - FIRST or self._rows("metrics.jsonl"):
            return False
        saved = self.path / "checkpoints"
        if saved.exists() and any(file.name.isdecimal() for file in saved.iterdir()):
            return False
        if "about.json" in names:
            return '"command": "rlhf' in _text(self.path / "about.json") or self._half_written(
                "about.json"
            )
        return "config.yaml" not in names or self._half_written("config.yaml")

    def _half_written(self, name: str) -> bool:
        """Whether a file is cut off, as versions before this one could leave it: what is there is
        how ours begins.
        """
        ours = self._config({**self.options, "resume": False}) if name == "config.yaml" else ABOUT
        return ours.startswith(text := _text(self.path / name)) and text != ours

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Makes the folder, describes the run in it, and holds it, so that no other process works
        there meanwhile.

        Where an error or a signal ends the run before anything is logged or saved, a folder made
        here is removed.

        Raises: ValueError where another process is at work in it, or not all processes see it.
        """
        with ExitStack() as stack:
            hosts.of_first(lambda: self._set_up(stack))
            if hosts.several():
                self._meet()
            yield

    def _set_up(self, stack: ExitStack) -> None:
        """Makes, holds and describes the folder, until the stack is closed."""
        is_new = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        stack.enter_context(_held(self.path))
        # Again, now that the lock is held: another process may have started here since `_look`.
        if not self.resumed and not self._unused():
            raise ValueError(
                f"{self.path}: another run began here meanwhile; choose another --output"
            )

        def remove_for_nothing(kind: type[BaseException] | None, *_: Any) -> None:
            # KeyboardInterrupt too: a folder made for nothing would make the next start ask for
            # --resume.
            if kind is not None and is_new and self._unused():
                shutil.rmtree(self.path, ignore_errors=True)

        stack.push(remove_for_nothing)
        self.describe()
        if not self.resumed:
            # At most half a line of a run that was killed: `_unused` found no full one.
            (self.path / "metrics.jsonl").unlink(missing_ok=True)

    def _meet(self) -> None:
        """Writes down who the processes are, so that one that dies can be named."""
        known = hosts.gather(hosts.this())
        listed = [host._asdict() for host in known]
        hosts.of_first(lambda: self.write("hosts.json", {"hosts": listed}))
        self.say(f"{len(known)} processes: {', '.join(map(str, known))}")
        # Each host saves its part of the state there.
        visible = hosts.gather((self.path / "hosts.json").exists())
        if not all(visible):
            others = [str(host) for host, sees in zip(known, visible, strict=True) if not sees]
            raise ValueError(
                f"{self.path}: not seen by {', '.join(others)}; give an --output on a file system "
                "that all hosts share"
            )

    def describe(self) -> None:
        """Writes `about.json` and then `config.yaml`, which says that the folder is a run's; those
        that are there stay.
        """
        # config.yaml last: a folder with it counts as a run's.
        if not self.resumed or not self._knows_about():
            self.write("about.json", about())
        if not self.resumed:
            files.write(self.path / "config.yaml", self._config(self.options))

    def _knows_about(self) -> bool:
        try:
            return "versions" in json.loads(_text(self.path / "about.json"))
        except ValueError:
            return False

    @staticmethod
    def _config(options: Mapping[str, Any]) -> str:
        return yaml.safe_dump(dict(options), sort_keys=False)

    def say(self, text: str) -> None:
        """A line for the user."""
        if hosts.is_first():
            print(text, file=sys.stderr)

    def log(self, phase: str, step: int, metrics: dict[str, float]) -> None:
        """Appends one line to `metrics.jsonl`."""
        if not hosts.is_first():
            return
        seconds = round(time.monotonic() - self._start, 3)
        self.append("metrics.jsonl", {"phase": phase, "step": step, "seconds": seconds, **metrics})

    def forget_after(self, step: int) -> None:
        """Leaves out the lines of `metrics.jsonl` beyond a step: a resumed run takes those steps
        again.
        """

        def write() -> None:
            lines = [
                json.dumps(row) + "\n" for row in self._rows("metrics.jsonl") if row["step"] <= step
            ]
            files.write(self.path / "metrics.jsonl", "".join(lines))

        hosts.of_first(write)

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Appends one JSON line to a file of the folder."""
        self.path.mkdir(parents=True, exist_ok=True)
        # Appended and not renamed into place: a line a step must be cheap, and readers skip half a
        # line.
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Writes a JSON file of the folder."""
        files.write(self.path / name, json.dumps(content, indent=2) + "\n")

    def read(self, name: str) -> list[dict[str, Any]]:
        """The rows of a JSON-lines file of the folder, none if it is missing; a last line that was
        cut off is left out.
        """
        return hosts.of_first(lambda: self._rows(name))

    def _rows(self, name: str) -> list[dict[str, Any]]:
        return _lines(self.path / name) if (self.path / name).exists() else []

    def samples(self, step: int, table: Mapping[str, list], phase: str = "eval") -> None:
        """Completions at a step: `samples/STEP.parquet`, those of training
        `samples/train_STEP.parquet`.
        """
        import pyarrow
        import pyarrow.parquet

        if not hosts.is_first():
            return
        prefix = "" if phase == "eval" else f"{phase}_"
        with files.replacing(self.path / "samples" / f"{prefix}{step:08d}.parquet") as part:
            pyarrow.parquet.write_table(pyarrow.table(dict(table)), part)

    def arrays(self, name: str, tree: Any) -> None:
        """The leaves of a tree as an npz file, each under its path: arrays, numbers and texts."""

        def plain_array(x: Any) -> np.ndarray:
            is_key = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
            array = np.asarray(hosts.fetch(jax.random.key_data(x) if is_key else x))
            # An object would be pickled, which is refused when the file is read.
            return np.asarray(str(x)) if array.dtype == object else array

        named = jax.tree_util.tree_leaves_with_path(tree)
        by_path: dict[str, Any] = {
            jax.tree_util.keystr(path, simple=True, separator=".") or "batch": plain_array(x)
            for path, x in named
        }

        def write() -> None:
            with files.replacing(self.path / name) as part:
                np.savez(part, **by_path)

        hosts.of_first(write)

    def plot(self, names: tuple[str, ...]) -> None:
        """`curves.png`: logged metrics by step."""
        hosts.of_first(lambda: plot([self.path], self.path / "curves.png", names))

    def last_metrics(self) -> dict[str, tuple[float, int]]:
        """The last value of every metric of `metrics.jsonl`, and its step."""
        return hosts.of_first(self._last_metrics)

    def _last_metrics(self) -> dict[str, tuple[float, int]]:
        rows = self._rows("metrics.jsonl")
        return {
            name: (value, row["step"])
            for row in rows
            for name, value in row.items()
            if name not in ABOUT_ROWS
        }

    def columns(self) -> dict[str, list]:
        """`metrics.jsonl` as columns, one entry a line; None where a line has no such metric."""
        rows = self.read("metrics.jsonl")
        return {
            name: [row.get(name) for row in rows]
            for name in dict.fromkeys(name for row in rows for name in row)
        }

    def card(self) -> None:
        """`README.md`, the model card."""
        hosts.of_first(self._write_card)

    def _write_card(self) -> None:
        known = json.loads((self.path / "about.json").read_text(encoding="utf-8"))
        options = yaml_files.load(self.path / "config.yaml")
        last = "\n".join(
            f"| {name} | {value:.4g} | {step} |"
            for name, (value, step) in self._last_metrics().items()
        )
        text = (
            f"---\nlibrary_name: transformers\nbase_model: {options.get('model')}\ntags: "
            "[rlhf]\n---\n\n"
            f"# {self.path.name}\n\nMade by `{known['command']}`.\n\n"
            f"| metric | last | step |\n|---|---|---|\n{last}\n\n"
            + "\n".join(f"- {name} {version}" for name, version in known["versions"].items())
            + "\n"
        )
        files.write(self.path / "README.md", text)


def flat(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's arguments as options: the fields of dataclasses side by side with the others.

    >>> Size = dataclasses.make_dataclass("Size", ["rows"])
    >>> flat({"size": Size(3), "output": "runs/a"})
    {'rows': 3, 'output': 'runs/a'}
    """
    options: dict[str, Any] = {}
    for name, value in arguments.items():
        # Functions that watch a run: nothing that a file could hold, and others may watch the rest.
        if name == "callbacks":
            continue
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            options |= {
                field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)
            }
        else:
            options[name] = plain(value)
    return options


def plain(value: Any) -> Any:
    """An option as config.yaml has it: an object from Python in a few words, which tell it from
    others.

    >>> plain(0.1), plain([{"prompt": "1+1="}]), plain([len])
    (0.1, '1 rows in memory, c97f9642', ['builtins.len'])
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    if callable(value):
        return f"{getattr(value, '__module__', None)}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    # Parameters are counted, not hashed: fetching billions of them would take longer than the check
    # is worth.
    if isinstance(value, tuple):
        leaves = [x for x in jax.tree.leaves(value) if hasattr(x, "shape")]
        return f"a model in memory, {sum(x.size for x in leaves):,} parameters"
    if isinstance(value, list) and not any(isinstance(entry, dict) for entry in value):
        return [plain(entry) for entry in value]
    # A digest tells other rows from the same on resuming, without the rows in config.yaml.
    rows = [dict(row) for row in value]
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()
    return f"{len(rows)} rows in memory, {digest[:8]}"


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
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def plot(folders: list[Path], target: Path, names: tuple[str, ...]) -> None:
    """Logged metrics by step, one panel a metric and one line a run.

    Raises: ValueError where a folder has no metrics, or none of them a metric of these names.
    """
    # `Figure` and not pyplot, which would look for a display and hold every figure in memory.
    from matplotlib.figure import Figure

    runs = {folder.name: metrics_of(folder) for folder in folders}
    shown = [name for name in names if any(name in row for rows in runs.values() for row in rows)]
    if not shown:
        known = sorted(
            {name for rows in runs.values() for row in rows for name in row} - set(ABOUT_ROWS)
        )
        raise ValueError(f"no run has {', '.join(names)}; they have {', '.join(known)}")
    figure = Figure(figsize=(4 * len(shown), 2.8), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for run, rows in runs.items():
            points = [(row["step"], row[name]) for row in rows if name in row]
            axis.plot(*zip(*points, strict=True), label=run) if points else None
        axis.set(title=name.replace("_", " "), xlabel="step")
    if len(runs) > 1:
        figure.axes[0].legend(fontsize=7)
    with files.replacing(target) as part:
        figure.savefig(part, dpi=120)


def model_of(name: str) -> str:
    """The model of a run's folder; of another folder, or a name on the Hub, itself.

    Raises: ValueError for a run that has not written its model yet.
    """
    inside = Path(name) / "model"
    # `os.path.exists` is False for a name too long for a path, where `Path.exists` would raise.
    if os.path.exists(inside / "config.json"):
        return str(inside)
    if os.path.exists(Path(name) / "config.yaml"):
        raise ValueError(
            f"{name}: a run without a model yet (of adapters it comes last); --resume it, or give "
            "a model"
        )
    return name


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """What a run has logged.  Raises: ValueError where the folder is no run's, or nothing is logged
    yet.
    """
    try:
        rows = _lines(folder / "metrics.jsonl")
    except OSError:
        raise ValueError(f"{folder}: no metrics.jsonl, so no run; give a run's folder") from None
    if not rows:
        raise ValueError(f"{folder}: metrics.jsonl is empty; the run has logged nothing yet")
    return rows


def _lines(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a last line that was cut off is left out."""
    rows = []
    # A full line ends in a newline: what follows the last one is empty, or was cut off.
    for number, line in enumerate(
        file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], start=1
    ):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(
                f"{file}, line {number}: {error}; mend the line or take it out"
            ) from None
    return rows


def options_of(folder: Path) -> dict[str, Any] | None:
    """What config.yaml of a run's folder says; None where there is none, or it is no mapping."""
    try:
        return yaml_files.load(folder / "config.yaml")
    except (OSError, ValueError):
        return None


def _text(file: Path) -> str:
    """A file's text, "" where it is missing."""
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """A folder that no other process of this machine holds; it is let go when this one ends,
    however it does.

    Raises: ValueError where another holds it.
    """
    lock = folder / LOCK
    with lock.open("w") as file:
        try:
            # The system lets go of the lock when the process ends, also where it is killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(
                f"{folder}: another process is at work in it; wait for it, or choose another "
                "--output"
            ) from None
        except OSError:
            # A file system without locks, as some of a cluster's: the run goes on without one.
            pass
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
