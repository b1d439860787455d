"""Several processes, often one a host, that compute one run together; with one process every function
here is a plain pass-through.

`start` joins them.  From then on all run the same Python in the same order: what one of them alone
knows (a file, an error, a random number) is passed on to all before anything depends on it.
"""

import atexit
import json
import os
import pickle
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from rlhf import files
from rlhf.fields import documented

T = TypeVar("T")

# Seconds to wait for hosts at the start: pods of a cluster are scheduled one after the other.
START = 300
# Seconds without a sign of life after which a host counts as dead.
HEARTBEAT = 60
# Seconds longer that the others wait for process 0, which can say who is missing.
PATIENCE = 5
# Seconds between the ends of two processes that are no error: one may have more to write.
APART = 10
# What a process sends to the others when it ends by itself.
ENDING = "ending"
# What tells JAX of several processes: (variables that must be there, one that says how many).
CLUSTERS = (
    (("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID"), "SLURM_NTASKS"),
    (("OMPI_MCA_orte_hnp_uri",), "OMPI_COMM_WORLD_SIZE"),
)


@documented
class Host(NamedTuple):
    """A process of a run.

    Attributes:
      process: its number, from 0.
      name: of the machine.
      pid: of the process there.
    """

    process: int
    name: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.process} ({self.name}, pid {self.pid})"


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    start_timeout: int = START,
    heartbeat_timeout: int = HEARTBEAT,
) -> None:
    """Joins the processes of one run: call it once in each, before anything else of JAX.

    What is not given is read from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    Where those are not set either, processes of Slurm, Open MPI and a TPU slice of Kubernetes are
    found by what their launchers set, and a single process is left as it is.

    Args:
      coordinator: host:port of process 0; "auto": JAX finds all three, as it can on Cloud TPU, and
        on Kubernetes with the package `kubernetes`.
      num_processes: of the run.
      process_id: number of this one, from 0.
      start_timeout: seconds to wait for the others.
      heartbeat_timeout: seconds without a sign of life of one after which the others end.

    Where the coordinator is given, a process that dies is named at once by all others, on stderr;
    JAX ends them, and knows its number alone.

    Raises: ValueError where only some of the three are given, and where a process is missing when
    the time is up (naming it).

    >>> start()
    >>> several()
    False
    """
    settings: dict[str, Any] = {
        "initialization_timeout": start_timeout,
        "heartbeat_timeout_seconds": heartbeat_timeout,
        # At the end all wait for each other; one that died is not waited for longer than that.
        "shutdown_timeout_seconds": heartbeat_timeout,
    }
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    num_processes = _number(num_processes, "JAX_NUM_PROCESSES")
    process_id = _number(process_id, "JAX_PROCESS_ID")
    is_given = (coordinator, num_processes, process_id) != (None, None, None)
    found_by_jax = coordinator == "auto" or (not is_given and _has_cluster(os.environ))
    if not found_by_jax and not is_given:
        return
    connections: dict[Host, socket.socket] = {}
    if not found_by_jax:
        place = _checked(coordinator, num_processes, process_id)
        if place.num_processes == 1:
            return
        # JAX ends the process where one is missing, and does not say which.
        connections = _call_roll(place, start_timeout)
        settings |= {
            "coordinator_address": coordinator,
            "num_processes": num_processes,
            "process_id": process_id,
            # JAX would look for a cluster all the same, for the numbers of local devices.
            "cluster_detection_method": "deactivate",
        }
    # What a scheduler sends before it takes a machine away reaches all: `stop_requested`.
    jax.config.update("jax_enable_preemption_service", True)
    jax.distributed.initialize(**settings)
    for connection in connections.values():
        _keep_alive(connection, heartbeat_timeout)
    _watch(connections, heartbeat_timeout)


def several() -> bool:
    """Whether more than one process computes this run."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes and speaks for all."""
    return jax.process_index() == 0


def this() -> Host:
    """This process."""
    return Host(jax.process_index(), socket.gethostname(), os.getpid())


def gather(value: T) -> list[T]:
    """The values of all processes, in their order, for each of them.

    Args:
      value: any small value of Python that can be pickled.

    >>> gather("a")
    ['a']
    """
    if not several():
        return [value]
    from jax.experimental.multihost_utils import process_allgather

    mine = np.frombuffer(pickle.dumps(value), np.uint8)
    lengths = process_allgather(np.array(mine.size))
    # To a power of two: a program is compiled for each width.
    padded = np.zeros(1 << int(lengths.max() - 1).bit_length(), np.uint8)
    padded[: mine.size] = mine
    rows = process_allgather(padded)
    return [pickle.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def broadcast(value: T) -> T:
    """The first process's value, for all.

    >>> broadcast(3)
    3
    """
    return gather(value if is_first() else None)[0]  # type: ignore[return-value]


def agreed(fn: Callable[[], T]) -> list[T]:
    """What `fn` returns in each process, for all; an error of one is an error of all.

    Raises: what `fn` raises in the first process in which it does.

    >>> agreed(lambda: 1)
    [1]
    """
    if not several():
        return [fn()]
    value: T | None = None
    error: Exception | None = None
    try:
        value = fn()
    # Any error: a process that left here alone would let the others wait for it.
    except Exception as raised:
        error = raised
    outcomes = gather((value, error and _portable(error)))
    for process, (_, failure) in enumerate(outcomes):
        if failure is not None:
            # Its own has the traceback.
            raise (error if error and process == jax.process_index() else failure)
    return [value for value, _ in outcomes]  # type: ignore[misc]


def of_first(fn: Callable[[], T]) -> T:
    """What `fn` returns in the first process, for all; the others do not call it.

    Raises: what `fn` raises, in all.

    >>> of_first(lambda: 1)
    1
    """
    return agreed(fn if is_first() else lambda: None)[0]  # type: ignore[return-value]


def shared(fn: Callable[[slice], Sequence[T]], number: int) -> list[T]:
    """What `fn` returns for all of `number` things: each process calls it for its own contiguous
    share, and gets the shares of all.

    Args:
      fn: `(which) -> sequence`, one entry for each thing of the slice; each is called for once,
        whatever it computes or costs.
      number: of all.

    Raises: what `fn` raises in one process, in all.

    >>> shared(lambda which: [i * i for i in range(5)[which]], 5)
    [0, 1, 4, 9, 16]
    """
    each = -(-number // jax.process_count())
    start = min(jax.process_index() * each, number)
    mine = slice(start, min(start + each, number))
    # More processes than things: some have nothing to do.
    parts = agreed(lambda: fn(mine) if mine.stop > mine.start else [])
    return [entry for part in parts for entry in part]


@contextmanager
def renewed(folder: str | Path) -> Iterator[Path]:
    """`files.renewed`, by the first process alone: the others get the folder's name, and wait until
    it is in its place.
    """
    with ExitStack() as stack:
        yield of_first(lambda: stack.enter_context(files.renewed(folder)))
        of_first(stack.close)


def fetch(tree: Any) -> Any:
    """Arrays as NumPy in every process, their parts on other hosts too: all must call it, in the same
    order.  With one process the arrays stay as they are.

    >>> fetch({"a": np.ones(2)})
    {'a': array([1., 1.])}
    """
    if not several():
        return tree
    from jax.experimental.multihost_utils import process_allgather

    def one(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return process_allgather(x, tiled=True)

    return jax.tree.map(one, tree)


def put(x: Any, where: jax.sharding.Sharding) -> jax.Array:
    """An array in its place, which may be on several hosts: of what each of them holds whole, it
    takes the parts that are its own.

    >>> put(np.ones(2), jax.sharding.SingleDeviceSharding(jax.devices()[0])).shape
    (2,)
    """
    spread = isinstance(x, jax.Array) and not x.is_fully_addressable
    if where.is_fully_addressable or spread:
        return jax.device_put(x, where)
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = put(jax.random.key_data(x), where)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    # Not `device_put`, which would compare the values of all hosts at every call.
    held = np.asarray(x)
    held = held.astype(jax.dtypes.canonicalize_dtype(held.dtype), copy=False)
    return jax.make_array_from_callback(held.shape, where, lambda at: held[at])


def missing(present: Iterable[int], number: int) -> str:
    """Which processes are not there.

    >>> missing([0, 2], 4)
    'processes 1, 3'
    """
    absent = sorted(set(range(number)) - set(present))
    return f"process{'es' if len(absent) > 1 else ''} {', '.join(map(str, absent))}"


def _number(given: int | None, variable: str) -> int | None:
    if given is not None or variable not in os.environ:
        return given
    try:
        return int(os.environ[variable])
    except ValueError:
        raise ValueError(
            f"{variable} is {os.environ[variable]!r}, but must be a whole number"
        ) from None


def _has_cluster(environment: Any) -> bool:
    """Whether a launcher that JAX knows has started several processes."""
    # One task of Slurm, as in an interactive job, is a run by itself.
    for needed, count in CLUSTERS:
        if all(name in environment for name in needed):
            return int(environment.get(count, 1)) > 1
    return "," in environment.get("TPU_WORKER_HOSTNAMES", "")


class _Place(NamedTuple):
    address: tuple[str, int]
    num_processes: int
    process_id: int


def _checked(coordinator: str | None, num_processes: int | None, process_id: int | None) -> _Place:
    """Raises: ValueError for what is missing or cannot be."""
    variables = "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
    if coordinator is None or num_processes is None or process_id is None:
        raise ValueError(
            f"coordinator {coordinator}, num_processes {num_processes}, process_id {process_id}: "
            f"several processes need all three (or {variables}), one needs none"
        )
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"process_id {process_id} but num_processes {num_processes}; processes count from 0"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise ValueError(f"coordinator {coordinator!r} is no host:port, such as 10.0.0.1:8476")
    return _Place((host.strip("[]"), int(port)), num_processes, process_id)


def _call_roll(place: _Place, timeout: float) -> dict[Host, socket.socket]:
    """Returns once all processes have called at the coordinator's address.

    Returns: the connections that stay open: of process 0 to all others, of them to process 0.

    Raises: ValueError, in all that have called, which names those that have not.
    """
    deadline = time.monotonic() + timeout
    this_host = Host(place.process_id, socket.gethostname(), os.getpid())
    if place.process_id == 0:
        problem, connections = _await_calls(place, this_host, deadline)
    else:
        problem, connections = _call(place, this_host, deadline)
    if problem:
        for connection in connections.values():
            connection.close()
        raise ValueError(f"{problem} within {timeout} s; see whether it runs, and its own message")
    return connections


def _await_calls(
    place: _Place, this_host: Host, deadline: float
) -> tuple[str, dict[Host, socket.socket]]:
    """Hears the others, and answers all at once: "" where all are there, else what is wrong."""
    callers: dict[int, tuple[Host, socket.socket]] = {}
    number = place.num_processes
    # On all addresses, and of both versions of IP where the machine has them, as JAX does.
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    address = ("", place.address[1])
    with socket.create_server(address, family=family, dualstack_ipv6=dual) as server:
        while len(callers) < number - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with suppress(OSError, ValueError, TypeError):
                caller, _ = server.accept()
                # Whoever else connects, such as a port scanner, says nothing or nonsense.
                caller.settimeout(min(left, 10))
                host = Host(*json.loads(caller.makefile().readline(1000)))
                if host.process in range(1, number):
                    callers[host.process] = (host, caller)
    absent = set(range(1, number)) - set(callers)
    problem = f"{missing([0, *callers], number)} of {number} did not start" if absent else ""
    connections = dict(callers.values())
    _send(connections.values(), json.dumps([problem, this_host]))
    return problem, connections


def _call(place: _Place, this_host: Host, deadline: float) -> tuple[str, dict[Host, socket.socket]]:
    """Calls until it is answered.  Returns: what `_await_calls` answers."""
    while time.monotonic() < deadline + PATIENCE:
        # Refused until process 0 listens, and its name is not known until its machine is up.
        with suppress(OSError), ExitStack() as stack:
            connection = socket.create_connection(place.address, timeout=5)
            stack.enter_context(connection)
            _send([connection], json.dumps(this_host))
            connection.settimeout(max(deadline - time.monotonic(), 0) + PATIENCE)
            if line := connection.makefile().readline():
                problem, first = json.loads(line)
                # It stays open.
                stack.pop_all()
                return problem, {Host(*first): connection}
        time.sleep(0.2)
    host, port = place.address
    return f"process 0 did not answer at {host}:{port}", {}


def _send(connections: Iterable[socket.socket], line: str) -> None:
    for connection in connections:
        # Whoever has ended hears nothing.
        with suppress(OSError):
            connection.sendall(f"{line}\n".encode())


def _watch(connections: Mapping[Host, socket.socket], heartbeat_timeout: int) -> None:
    """Says on stderr which process has died, as soon as its connection ends.  Ends none: a broken
    connection may be the network's, and JAX decides by heartbeats of its own.

    Args:
      connections: what `_call_roll` returns; each is read by a thread until it ends.
      heartbeat_timeout: seconds until JAX ends this process too.
    """
    is_ending = threading.Event()

    def end() -> None:
        is_ending.set()
        _send(connections.values(), ENDING)

    def say(text: str, source: socket.socket) -> None:
        with suppress(OSError):  # whoever reads may be gone already
            # In one write: the main thread may be printing an error of its own.
            os.write(2, f"\nrlhf: {text}\n".encode())
        # Process 0 alone is connected to all.
        _send((other for other in connections.values() if other is not source), text)

    def listen(host: Host, connection: socket.socket) -> None:
        has_ended = False
        # An error is an end, too: of the machine, which answers no more.
        with suppress(OSError), connection, connection.makefile() as lines:
            for line in map(str.strip, lines):
                if line != ENDING:
                    # Process 0 names another.
                    say(line, connection)
                    continue
                has_ended = True
                if not is_ending.wait(APART):
                    say(f"{host} has ended {APART} s before the others", connection)
        if not has_ended:
            say(
                f"{host} is gone: it died, or its machine or network did; without it JAX ends the "
                f"others within {heartbeat_timeout} s; --resume goes on from the newest checkpoint",
                connection,
            )

    for host, connection in connections.items():
        threading.Thread(target=listen, args=(host, connection), daemon=True).start()
    # Before JAX's own, in which all wait for each other.
    atexit.register(end)


def _keep_alive(connection: socket.socket, timeout: int) -> None:
    """Has the system notice, a little before the timeout, that a machine no longer answers."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Elsewhere the system's own times hold.
    if sys.platform == "linux":
        # After one interval without a word a probe each interval, of which three may be lost.
        interval = max(timeout // 6, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, interval)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def _portable(error: Exception) -> Exception:
    """An error in a form that can be sent; one that cannot be pickled by its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return ValueError(f"{type(error).__name__}: {error}")
    return error
