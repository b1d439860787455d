"""Several processes on this machine that compute one run together: a pod on a laptop, or one process
a GPU.
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import IO, NamedTuple

from rlhf.fields import documented
from rlhf.ranges import Count, checked
from rlhf.training import interrupts

# Seconds that the others have to end by themselves, once one has failed.
GRACE = 10
# Lines of another process's output that are shown where the run has failed.
SHOWN = 20
DEVICES = "--xla_force_host_platform_device_count"
# Of `prctl` of Linux: the signal that a process gets when its parent ends.
PR_SET_PDEATHSIG = 1


@documented
class Child(NamedTuple):
    """A process that was started.

    Attributes:
      number: of the process in the run.
      process: of the system.
      output: what it prints; None: it goes where the launcher's does.
    """

    number: int
    process: subprocess.Popen
    output: IO[bytes] | None

    def __str__(self) -> str:
        return f"process {self.number} ({socket.gethostname()}, pid {self.process.pid})"


@checked
def main(command: list[str], *, processes: Count = 2, devices: Count | None = None) -> None:
    """Starts a recipe in several processes of this machine: `rlhf launch --processes 2 -- grpo …`.

    Shows what the first prints; of the others the last lines, where the run fails.  Where one
    process dies it is named, and the others have 10 seconds to end.  Ctrl-C and SIGTERM are passed
    on: all stop after the same step, saved.  Where the launcher itself is killed (SIGKILL), Linux
    kills the processes with it; on other systems they go on, and are to be ended by hand.

    Args:
      command: a recipe with its options, after `--`.
      processes: how many; GPUs are dealt out to them in equal parts.
      devices: of each process: GPUs, or where there are none CPU devices; null: its share of the
        GPUs, one CPU.
    """
    # Here: `rlhf.cli` names this module among its commands.
    from rlhf.cli import COMMANDS

    name = command[0]
    if not COMMANDS.get(name, ("",))[0].startswith("rlhf.recipes."):
        raise ValueError(
            f"{name} is no recipe; write rlhf launch --processes {processes} -- RECIPE OPTIONS"
        )
    coordinator = f"127.0.0.1:{_free_port()}"
    shares = [_devices(number, processes, devices, _gpus()) for number in range(processes)]
    with ExitStack() as stack:
        stopping = "stopping all processes after this step, and saving; once more ends them at once"
        # Before they start: a signal must not leave them behind.
        stop_requested = stack.enter_context(interrupts.requested(stopping))
        children: list[Child] = []
        stack.callback(_kill, children)
        for number, share in enumerate(shares):
            place = {
                "JAX_COORDINATOR_ADDRESS": coordinator,
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(number),
            }
            output = stack.enter_context(tempfile.TemporaryFile()) if number else None
            children.append(_start(number, command, {**os.environ, **share, **place}, output))
        code = _watch(children, stop_requested)
        if code:
            sys.exit(code)


def _start(
    number: int, command: Sequence[str], environment: Mapping[str, str], output: IO[bytes] | None
) -> Child:
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf", *command],
        env=dict(environment),
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        # Of its own: Ctrl-C goes to all of a terminal's group, and each would stop by itself.
        start_new_session=True,
        preexec_fn=_end_with_launcher(),
    )
    return Child(number, process, output)


def _end_with_launcher() -> Callable[[], None] | None:
    """For a new process, before its program starts: has the kernel kill it when the launcher ends,
    however it does.  None where the system is not Linux.
    """
    if sys.platform != "linux":
        return None
    launcher = os.getpid()
    # Here: a process that was just forked should load nothing.
    prctl = ctypes.CDLL(None).prctl

    def request_signal() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # The launcher ended before the request: no signal will come.
        if os.getppid() != launcher:
            os._exit(1)

    return request_signal


def _watch(children: Sequence[Child], stop_requested) -> int:
    """Waits for all.  Returns: the exit code of the first that failed, as a shell has it; 0 where
    none did.
    """
    failed: Child | None = None
    deadline = 0.0
    has_passed_on = False
    while any(child.process.poll() is None for child in children):
        if stop_requested() and not has_passed_on:
            has_passed_on = True
            for child in _running(children):
                child.process.send_signal(signal.SIGTERM)
        failed = failed or _first_failed(children)
        if failed is not None and not deadline:
            # Those that have failed alike, such as by a mistake in the options, are about to end.
            deadline = time.monotonic() + GRACE
        if deadline and time.monotonic() > deadline:
            _kill(children)
        time.sleep(0.05)
    failed = failed or _first_failed(children)
    if failed is None:
        return 0
    code = failed.process.returncode
    # All told to stop, or by a mistake that process 0 has reported: nothing died.
    if code < 0 or any(child.process.returncode != code for child in children):
        _report(children, failed)
    return 128 - code if code < 0 else code


def _report(children: Sequence[Child], failed: Child) -> None:
    """Says which process ended how, and what the others have printed last."""
    for child in children:
        if child.output is not None:
            child.output.seek(0)
            lines = child.output.read().decode(errors="replace").splitlines()[-SHOWN:]
            print("\n".join(f"[{child.number}] {line}" for line in lines), file=sys.stderr)
    code = failed.process.returncode
    ending = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    others = f"the others were given {GRACE} s to end"
    print(f"rlhf launch: {failed} {ending}; {others}", file=sys.stderr)


def _first_failed(children: Sequence[Child]) -> Child | None:
    return next((child for child in children if child.process.poll()), None)


def _running(children: Sequence[Child]) -> list[Child]:
    return [child for child in children if child.process.poll() is None]


def _kill(children: Sequence[Child]) -> None:
    for child in _running(children):
        # Not SIGTERM, which JAX takes for a wish to stop after a step that may never end.
        child.process.kill()
        child.process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _gpus() -> list[str]:
    """The GPUs of this machine that may be used, by number or name; without asking JAX, which would
    take their memory.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    if os.environ.get("JAX_PLATFORMS") == "cpu" or shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return [str(number) for number, _ in enumerate(listed.stdout.splitlines())]


def _devices(
    number: int, processes: int, devices: int | None, gpus: Sequence[str]
) -> dict[str, str]:
    """Variables by which a process sees its own devices.

    Raises: ValueError where there are too few.

    >>> _devices(1, 2, None, ["0", "1", "2", "3"])
    {'CUDA_VISIBLE_DEVICES': '2,3'}
    """
    if gpus:
        each = devices or len(gpus) // processes
        if not each or each * processes > len(gpus):
            raise ValueError(
                f"{processes} processes of {each or 1} GPUs, but there are {len(gpus)}; change "
                "--processes or --devices, or set JAX_PLATFORMS=cpu"
            )
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[number * each : (number + 1) * each])}
    # The last of several flags of one name holds.
    flags = [os.environ.get("XLA_FLAGS", ""), f"{DEVICES}={devices or 1}"]
    return {"XLA_FLAGS": " ".join(flags).strip()}
