"""Saving and restoring whole runs, with Orbax: every leaf of the state, keys included, bit for bit.

A checkpoint is a folder, `folder/<step>`, that is renamed into place when it is whole:

state/           the arrays, as Orbax writes them
manifest.json   what the state is, by which version, and a digest of every file

Orbax's files hold no checksums of large arrays: without the digests a flipped bit would be trained
on.
"""

import hashlib
import json
import logging
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import rlhf
from rlhf import files, hosts

STATE = "state"
MANIFEST = "manifest.json"
# Leaves that a message names of those that differ: enough to see what is another.
NAMED = 3


class Checkpoints:
    """The checkpoints of one run; the last `keep` are kept.

    Written in the background: `save` returns when the state is copied to the host, and the next
    step may donate it.  The next `save`, `wait`, `latest` and `restore` wait until it is written.
    An older one is deleted when a newer one is whole.  Of several processes all call the same
    methods in the same order; the first one names and deletes folders.

    Args:
      folder: made where missing.
      keep: how many stay.
      say: `(text)`, told of checkpoints that are passed over; None: a line on stderr.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep: int = 2,
        say: Callable[[str], object] | None = None,
    ):
        # Here: importing Orbax takes seconds, which tools without checkpoints need not wait for.
        import orbax.checkpoint as ocp

        for name in ("absl", "asyncio"):
            # The same filter each time, which is added once.
            logging.getLogger(name).addFilter(_is_not_raised_too)
        self.folder = Path(folder).absolute()
        self._keep = keep
        self._say = say or (lambda text: print(text, file=sys.stderr))
        # Processes meet by names: those of another folder that is written meanwhile are others.
        apart = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=self.folder.name)
        self._orbax = ocp.StandardCheckpointer(multiprocessing_options=apart)
        self._writing: threading.Thread | None = None
        self._failure: Exception | None = None
        # Whether a save is under way that no process has been told of yet.
        self._is_open = False
        # Found by `restore`; deleted when the next one is whole.
        self._damaged: set[int] = set()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """`wait`; an error that is under way is not covered by another."""
        if error is None:
            self.wait()
            return
        # Without the other processes, which may not get here.
        self._join()
        if self._failure is not None:
            self._say(str(self._failure))

    def save(self, state: Any) -> None:
        """Begins to write a `TrainState` under its step; whole when `wait` returns.

        Raises: OSError where the save before this one failed, as `wait` does.
        """
        self.wait()
        step = int(state.step)
        state = _keys_to_data(state)
        leaves = _leaves(state)
        part = self.folder / f"{files.PART}{step}"

        def write() -> None:
            try:
                self._orbax.wait_until_finished()
                if hosts.is_first():
                    self._finish(step, part, leaves)
            except Exception as error:
                self._failure = self._failed(step, part, error)

        self._is_open = True
        try:
            hosts.of_first(lambda: self._make_room(part, _bytes(state)))
            # Orbax holds host copies until they are written.  On a CPU that is the state's own
            # memory: XLA sees the hold, and a step that is given the state takes new memory.
            self._orbax.save(part / STATE, state)
        except Exception as error:
            self._failure = self._failed(step, part, error)
            return
        self._writing = threading.Thread(target=write, name="checkpoint")
        self._writing.start()

    def _make_room(self, part: Path, size: int) -> None:
        """Makes the folder of a checkpoint.  Raises: OSError where so many bytes cannot fit."""
        for left in self._parts():
            shutil.rmtree(left, ignore_errors=True)
        part.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(part).free
        # Orbax compresses, floats by a tenth: what cannot fit is said before it is tried.
        if free < size / 2:
            raise OSError(f"{size / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free")

    def wait(self) -> None:
        """Returns when what was saved is whole on disk.

        Raises: OSError, in all processes, where one could not write it, for example to a full disk;
        earlier checkpoints are as they were.
        """
        self._join()
        if self._is_open:
            self._is_open = False
            hosts.agreed(self._raise_failure)

    def _join(self) -> None:
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def restore(self, like: Any) -> Any:
        """The newest state that is whole, in the structure, types and shardings of `like`.  What is
        damaged or half written is passed over, and named.

        Args:
          like: a state of the same run, for example a fresh one; only its form is read.

        Raises: FileNotFoundError where the folder holds none; ValueError where none is whole, and
        where the newest whole one is of another model, or of a newer version of this package.
        """
        self.wait()
        form = jax.tree.map(_form, _keys_to_data(like))
        step, passed = hosts.of_first(self._newest_complete)
        if step is None and not self._steps():
            raise FileNotFoundError(f"no checkpoint in {self.folder}")
        if step is None:
            raise ValueError(
                f"{self.folder}: no checkpoint is whole: {'; '.join(fault for _, fault in passed)}; "
                "put one back from elsewhere, or begin anew in another folder"
            )
        manifest = _manifest(self.folder / str(step))
        _check_version(self.folder / str(step), manifest["rlhf"])
        _check_leaves(self.folder / str(step), manifest["leaves"], _leaves(form))
        for _, fault in passed if hosts.is_first() else []:
            self._say(f"{self.folder}: {fault}; taken instead: the checkpoint of step {step}")
        self._damaged = self._steps() & {number for number, _ in passed}
        # Shapes with shardings: every array is read straight into its place.
        state = self._orbax.restore(self.folder / str(step) / STATE, form)
        return _data_to_keys(state, like)

    def latest(self) -> int | None:
        """The step of the newest checkpoint, whole or damaged, or None."""
        self.wait()
        return hosts.of_first(lambda: max(self._steps(), default=None))

    def _steps(self) -> set[int]:
        return {int(name) for name in self._names() if name.isdecimal()}

    def _parts(self) -> list[Path]:
        """What a process that was killed has left."""
        return [self.folder / name for name in self._names() if name.startswith(files.PART)]

    def _names(self) -> list[str]:
        return [entry.name for entry in self.folder.iterdir()] if self.folder.exists() else []

    def _newest_complete(self) -> tuple[int | None, list[tuple[int, str]]]:
        """The step of the newest whole checkpoint, and what is wrong with each one after it."""
        unfinished = (part.name.removeprefix(files.PART) for part in self._parts())
        half = {int(name) for name in unfinished if name.isdecimal()} - self._steps()
        passed: list[tuple[int, str]] = []
        for step in sorted(self._steps() | half, reverse=True):
            fault = "half written" if step in half else _fault(self.folder / str(step))
            if fault is None:
                return step, passed
            passed.append((step, f"the checkpoint of step {step} is not whole: {fault}"))
        return None, passed

    def _finish(self, step: int, part: Path, leaves: Mapping[str, str]) -> None:
        """Makes a checkpoint of what Orbax has written, and deletes older ones."""
        content = {
            "rlhf": rlhf.__version__,
            "step": step,
            "leaves": leaves,
            "files": _digests(part),
        }
        files.write(part / MANIFEST, json.dumps({"digest": _seal(content), **content}, indent=1))
        # A damaged one of the same step may stand there.
        with files.renewed(self.folder / str(step)) as new:
            part.rename(new)
        self._damaged.discard(step)
        complete = sorted(old for old in self._steps() - self._damaged if old <= step)
        for old in {*complete[: -self._keep], *self._damaged}:
            # First another name: a folder that is deleted by half is no checkpoint.
            gone = self.folder / f"{files.PART}old.{old}"
            (self.folder / str(old)).rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
        self._damaged.clear()

    def _failed(self, step: int, part: Path, error: Exception) -> OSError:
        # The room that it took may be what the next one needs.  Again for a second: threads of Orbax
        # that the error has not reached yet go on writing there.
        for _ in range(20):
            shutil.rmtree(part, ignore_errors=True)
            time.sleep(0.05)
        newest = max(self._steps(), default=None)
        left = "there is none before it" if newest is None else f"that of step {newest} stays"
        failure = OSError(
            f"{self.folder / str(step)}: the checkpoint could not be written; {left}: "
            f"{' '.join(str(error).split())[:500]}"
        )
        failure.__cause__ = error
        return failure


def _is_not_raised_too(record: logging.LogRecord) -> bool:
    """Whether a line of the log is more than an error of Orbax's threads, which `wait` raises."""
    return not (record.exc_info and "orbax" in record.pathname + record.getMessage())


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None where every file is as it was written."""
    try:
        written = _manifest(folder)["files"]
        found = _digests(folder, written)
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (OSError, ValueError) as error:
        return " ".join(str(error).split())
    changed = [name for name in written if found[name] != written[name]]
    return f"{folder / changed[0]} is not as it was written" if changed else None


def _manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of a checkpoint.  Raises: ValueError where it is not as it was written."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if content.pop("digest", None) == _seal(content):
            return content
    # No text, no JSON, or no mapping.
    except (ValueError, AttributeError, TypeError):
        logging.getLogger("absl").addFilter(_is_not_raised_too)
    raise ValueError(f"{folder / MANIFEST} is not as it was written")


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digests(folder: Path, names: Any = None) -> dict[str, str]:
    """The SHA-256 of files in a folder by their names, of all without names."""
    if names is None:
        found = (file for file in folder.rglob("*") if file.is_file())
        names = sorted(file.relative_to(folder).as_posix() for file in found)

    def digest(name: str) -> str:
        with (folder / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    # Hashing lets go of Python's lock: threads hash side by side.
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def _check_version(folder: Path, version: str) -> None:
    if _numbers(version) > _numbers(rlhf.__version__) > []:
        raise ValueError(
            f"{folder}: was written by rlhf {version}, and this is rlhf {rlhf.__version__}, which "
            "is older; go on with the newer one"
        )


def _numbers(version: str) -> list[int]:
    """
    >>> _numbers("0.10.1"), _numbers("unknown")
    ([0, 10, 1], [])
    """
    return [int(number) for number in re.findall(r"\d+", version)]


def _check_leaves(folder: Path, saved: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    differ = [
        f"{name} {saved.get(name, 'missing')} there, {wanted.get(name, 'missing')} here"
        for name in sorted({*saved, *wanted})
        if saved.get(name) != wanted.get(name)
    ]
    if differ:
        more = f", and {len(differ) - NAMED} more" if len(differ) > NAMED else ""
        raise ValueError(
            f"{folder}: is of another model or optimizer than this run's: "
            f"{', '.join(differ[:NAMED])}{more}; give the options that it was made with"
        )


def _leaves(tree: Any) -> dict[str, str]:
    """Types and shapes by path.

    >>> _leaves({"w": jnp.ones((2, 3))})
    {'w': 'float32[2,3]'}
    """
    named = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (
            f"{x.dtype}[{','.join(map(str, x.shape))}]"
        )
        for path, x in named
    }


def _bytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def _form(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _is_key(x) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


# Orbax writes arrays of numbers; typed keys are unwrapped, and wrapped again by the form of `like`.
def _keys_to_data(state):
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, state)


def _data_to_keys(data, like):
    def wrap(x, old):
        return jax.random.wrap_key_data(x, impl=jax.random.key_impl(old)) if _is_key(old) else x

    return jax.tree.map(wrap, data, like)
