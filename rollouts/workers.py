"""Functions of a user's in processes of their own: what hangs, exits, crashes or eats memory costs
its row, not the run.
"""

import inspect
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf.rollouts import reward_worker
from rlhf.rollouts.reward_worker import LENGTH
from rlhf.rollouts.rewards import LATE, Failed

LOADING = 60.0  # seconds that a module may take to be imported
WATCH = 0.05  # seconds between looks at a process's memory
LARGEST = 1 << 30  # bytes of what a call returns


class CallFailed(Exception):
    """Why a call in a process has no result; `hopeless`: no other call would have one."""

    def __init__(self, message: str, hopeless: bool = False):
        super().__init__(message)
        self.hopeless = hopeless


class Odd:
    """Something that is no number, as the other process wrote it."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


class Worker:
    """A process that calls one function, and is started anew where it had to be ended.

    It has no part in this process's JAX: its own, if the function wants one, is on the CPU.  Forks
    die with it.

    Args:
      function: `module:function`, looked up in the current folder first; `file.py:function`; or a
        function that pickle knows.
      memory: bytes that it may take, on Linux; None: half of what is free now.

    Raises: ValueError for a function that no other process can find.
    """

    def __init__(self, function: str | Callable, *, memory: int | None = None):
        self.name = (
            function
            if isinstance(function, str)
            else getattr(function, "__name__", type(function).__name__)
        )
        self._memory = memory or _free_memory() // 2
        self._path = [os.getcwd(), *filter(None, sys.path)]
        self._function = function if isinstance(function, str) else _pickled(function)
        # The pipes carry one call at a time.
        self._lock = threading.Lock()
        self._refused: str | None = None
        self._start()

    def signature(self, timeout: float = LOADING) -> inspect.Signature | None:
        """The function's; None where Python does not know it.

        Raises: ValueError where there is no such function, or its module cannot be imported in
        time.
        """
        with self._lock:
            try:
                self._wait_until_ready(timeout)
            except CallFailed as failure:
                raise ValueError(f"{self.name!r}: {failure}") from None
            return self._signature

    def wait(self) -> float:
        """Waits until the process is ready, or cannot be; the seconds that it took."""
        started = time.monotonic()
        with self._lock, suppress(CallFailed):
            self._wait_until_ready(LOADING)
        return time.monotonic() - started

    def call(
        self, number: int, timeout: float, arguments: Sequence = (), named: Mapping[str, Any] = {}
    ) -> Any:
        """What the function returns: a list of numbers, lists of numbers, None and `Odd`; or an
        `Odd`.

        Args:
          number: of entries, beyond which there is no reading on.
          timeout: seconds.
          arguments, named: of the function, which gets those of the named that it takes; pickle
            must know them.

        Raises: CallFailed where it raised, ended its process, or took too long or too much memory.
        """
        with self._lock:
            self._wait_until_ready(LOADING)
            deadline = time.monotonic() + timeout
            self._send((number, timeout, tuple(arguments), dict(named)), deadline, timeout)
            kind, *content = self._receive(deadline, timeout)
        if kind == "raised":
            raise CallFailed(*content)
        return _of_plain(content[0])

    def close(self) -> None:
        """Ends the process, and every fork of it."""
        self._end()

    def _start(self) -> None:
        # The accelerator belongs to this process, which has taken most of its memory.
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        # -P: beside that file there is a types.py
        command = [sys.executable, "-P", reward_worker.__file__]
        pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        # A session of its own, so that it ends together with every fork that it makes.
        process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
        assert process.stdin is not None
        assert process.stdout is not None
        self._requests = process.stdin.fileno()
        self._replies = process.stdout.fileno()
        # Neither pipe may block: a full one would hold this process beyond every time limit.
        os.set_blocking(self._requests, False)
        os.set_blocking(self._replies, False)
        self._process = process
        self._ready = False
        # A finalizer also runs where Python ends, or where the worker is just forgotten.
        self._end = weakref.finalize(self, _end, process)
        # If the process has ended already, the first call reports it.
        with suppress(OSError):
            self._write((self._path, self._function), time.monotonic() + LOADING)

    def _restart(self) -> None:
        self._end()
        self._start()

    def _wait_until_ready(self, timeout: float) -> None:
        if self._refused:
            raise CallFailed(self._refused, hopeless=True)
        if self._ready:
            return
        try:
            kind, content = self._receive(time.monotonic() + timeout, timeout)
        except CallFailed as failure:
            raise CallFailed(f"cannot be imported: {failure}", hopeless=True) from None
        if kind == "refused":
            self._refused = content
            raise CallFailed(content, hopeless=True)
        self._signature = _signature(content)
        self._ready = True

    def _send(self, message: Any, deadline: float, timeout: float) -> None:
        try:
            if not self._write(message, deadline):
                self._fail(f"{LATE} {timeout:g} s")
        except OSError:
            self._fail(self._ended())

    def _write(self, message: Any, deadline: float) -> bool:
        """Whether all of it went out in time."""
        try:
            data = pickle.dumps(message)
        except Exception as error:
            raise CallFailed(
                f"its columns cannot be sent to another process: {error}", hopeless=True
            ) from None
        rest = memoryview(LENGTH.pack(len(data)) + data)
        while rest:
            if not select.select([], [self._requests], [], max(deadline - time.monotonic(), 0))[1]:
                return False
            with suppress(BlockingIOError):
                # 64 KiB at a time: between two pieces the deadline is looked at.
                rest = rest[os.write(self._requests, rest[: 1 << 16]) :]
        return True

    def _receive(self, deadline: float, timeout: float) -> tuple:
        size = LENGTH.unpack(self._read(LENGTH.size, deadline, timeout))[0]
        if size > LARGEST:
            self._fail(f"a result of {size} bytes")
        # The other side sends built-in types alone: unpickling runs no code of the user's.
        return pickle.loads(self._read(size, deadline, timeout))

    def _read(self, size: int, deadline: float, timeout: float) -> bytes:
        found = bytearray()
        while len(found) < size:
            left = deadline - time.monotonic()
            if left <= 0:
                self._fail(f"{LATE} {timeout:g} s")
            # Short waits, so that a process that eats memory is ended before the machine suffers.
            if not select.select([self._replies], [], [], min(left, WATCH))[0]:
                if (taken := _memory_of(self._process.pid)) > self._memory:
                    self._fail(
                        f"took {taken >> 20} MiB of memory, of {self._memory >> 20} that it may"
                    )
                continue
            part = os.read(self._replies, min(size - len(found), 1 << 20))
            if not part:
                self._fail(self._ended())
            found += part
        return bytes(found)

    def _ended(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0.1)
        code = self._process.returncode
        if code is None:
            return "closed its pipe"
        return (
            f"ended its process, by {signal.Signals(-code).name}"
            if code < 0
            else f"ended its process, with exit code {code}"
        )

    def _fail(self, message: str) -> None:
        self._restart()
        raise CallFailed(message)


class InWorker:
    """A reward function that runs in a process of its own: `in_worker` makes it."""

    def __init__(self, worker: Worker, timeout: float):
        self._worker = worker
        self._timeout = timeout
        self.__name__ = worker.name

    def load(self) -> None:
        """Waits until the function is there; from then on this one has its signature.

        Raises: ValueError where there is no such function, or its module cannot be imported.
        """
        signature = self._worker.signature()
        if signature is not None:
            self.__signature__ = signature

    def __call__(self, /, **given: Sequence) -> list:
        """The rewards of rows that are given by keyword; `Failed` where a row has none, and why."""
        number = len(next(iter(given.values()))) if given else 0
        try:
            returned = self._worker.call(number, self._timeout, named=given)
        except CallFailed as failure:
            # With a single row there is nothing to narrow down.
            if failure.hopeless or number < 2:
                return [Failed(str(failure))] * number
            return self._row_by_row(given, number)
        if number < 2 or (isinstance(returned, list) and len(returned) == number):
            return returned
        found = self._row_by_row(given, number)
        if any(isinstance(one, Failed) for one in found):
            return found
        # No row is to blame: a function that always returns one number is right for single rows.
        what = f"{len(returned)} rewards" if isinstance(returned, list) else f"{returned!r:.80}"
        wrong = f"returned {what} for {number} completions; give one number a completion"
        return [Failed(wrong)] * number

    def close(self) -> None:
        """Ends the process."""
        self._worker.close()

    def _row_by_row(self, given: dict[str, Sequence], number: int) -> list:
        """Every row by itself, all of them within `timeout` again; one row takes at most a quarter
        of what is left of it.
        """
        started = time.monotonic()
        deadline = time.monotonic() + self._timeout
        found: list = []
        for row in range(number):
            if time.monotonic() - started < LOADING:
                # A process that is started anew takes time to import, for which its row is not to
                # blame.
                deadline += self._worker.wait()
            left = deadline - time.monotonic()
            if left <= 0:
                rest = f"{LATE} {self._timeout:g} s: the rows before it took them"
                return found + [Failed(rest)] * (number - row)
            try:
                one = {name: column[row : row + 1] for name, column in given.items()}
                # A quarter of what is left, so that one hanging row leaves time for those behind
                # it.
                returned = self._worker.call(1, left / 4, named=one)
            except CallFailed as failure:
                found.append(Failed(str(failure)))
                continue
            complete = isinstance(returned, list) and len(returned) == 1
            found.append(
                returned[0] if complete else Failed(f"returned {returned!r:.80} for one completion")
            )
        return found


def in_worker(
    function: str | Callable, *, timeout: float = 60.0, memory: int | None = None
) -> InWorker:
    """A reward function in a process of its own, for `score_texts`: what hangs or ends it costs its
    row alone.

    The process starts now and stays; it is ended, with its forks, where a call takes too long or
    too much memory, and started anew.  A batch that fails is tried again row by row, within the
    same time once more.  What the function prints goes to stderr.

    Args:
      function: `module:function`, looked up in the current folder first; `file.py:function`; or a
        function, a partial or an object that pickle knows, which is what modules define by name.
      timeout: seconds of a call on a batch.
      memory: bytes that it may take, on Linux; None: half of what is free now.

    Returns: a reward function; its `load()` waits until the function is there, and raises
    ValueError where it is not.

    Raises: ValueError for a function that no other process can find, such as a lambda.

    >>> root = in_worker("math:sqrt")
    >>> root.close()
    """
    return InWorker(Worker(function, memory=memory), timeout)


def _end(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError, PermissionError):
        # Killed before it is waited for: until then no other process can have its number.
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in filter(None, (process.stdin, process.stdout)):
        with suppress(OSError):
            pipe.close()


def _pickled(function: Callable) -> bytes:
    name = getattr(function, "__qualname__", repr(function))
    if getattr(function, "__module__", None) == "__main__":
        raise ValueError(
            f"{name} is of the program that runs, which another process would run again; put it "
            "into a module"
        )
    try:
        return pickle.dumps(function)
    except Exception as error:
        raise ValueError(
            f"{name} cannot be found by another process ({error}); define it by name in a module"
        ) from None


def _signature(parameters: list[tuple[str, int, bool]] | None) -> inspect.Signature | None:
    if parameters is None:
        return None
    kinds = (  # in the order of their numbers
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.KEYWORD_ONLY,
        inspect.Parameter.VAR_KEYWORD,
    )

    def parameter(name: str, kind: int, needed: bool) -> inspect.Parameter:
        default = inspect.Parameter.empty if needed else None
        return inspect.Parameter(name, kinds[kind], default=default)

    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return inspect.Signature(
        [
            parameter(name, kind, needed or kinds[kind] in variable)
            for name, kind, needed in parameters
        ]
    )


def _of_plain(content: Any) -> Any:
    if isinstance(content, tuple):
        return Odd(content[1])
    return [Odd(entry[1]) if isinstance(entry, tuple) else entry for entry in content]


def _memory_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


def _free_memory() -> int:
    """Bytes; of the machine, and of the container if there is one."""
    found = []
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(
            1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
        )
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        found.append(
            int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        )
    # At least 256 MiB, so that a worker still starts where memory is nearly full.
    return max(min(found, default=1 << 40), 1 << 28)
