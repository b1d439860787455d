"""Run by `test_hosts.py` in two processes at once: what each finds, as a line of JSON."""

import atexit
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

if os.environ.get("JAX_PROCESS_ID") == "0":
    # Before JAX, so that it runs after JAX's: the other process is gone before this one is.
    atexit.register(time.sleep, 3)

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf import hosts
from rlhf.training.interrupts import stop_requests
from rlhf.training.runs import RunFolder


def message_of(fn) -> str:
    try:
        fn()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def fail() -> None:
    raise FileNotFoundError(f"no such file, says process {jax.process_index()}")


def fail_in_second() -> None:
    if not hosts.is_first():
        fail()


def work_in(folder: Path) -> None:
    run = RunFolder(folder, {"model": "m"})
    with run.at_work():
        run.log("train", 1, {"loss": 0.5})
        rows = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
        run.arrays("batch.npz", {"rows": hosts.put(np.arange(4), rows), "key": jax.random.key(3)})


def main() -> None:
    hosts.start()
    me = jax.process_index()
    calls: list[int] = []

    def judge(which: slice) -> list[float]:
        calls.extend(range(5)[which])
        return [random.random() for _ in range(5)[which]]

    found = {
        "hosts": [host.pid for host in hosts.gather(hosts.this())],
        "gathered": hosts.gather("x" * (me + 1)),
        "broadcast": hosts.broadcast(me),
        "of_first": message_of(lambda: hosts.of_first(fail)),
        "agreed": message_of(lambda: hosts.agreed(fail_in_second)),
        "shared": hosts.shared(judge, 5),
        "calls": calls,
    }
    folder = Path(sys.argv[1])
    found["work"] = message_of(lambda: work_in(folder / "run"))
    # As on machines that share no disk: the same name, and two folders.
    found["apart"] = message_of(lambda: work_in(folder / str(me) / "run"))
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows = np.arange(8.0).reshape(4, 2)
    spread = hosts.put(rows, NamedSharding(mesh, PartitionSpec("data")))
    key = hosts.put(jax.random.key(3), NamedSharding(mesh, PartitionSpec()))
    found["held"] = [shard.data.tolist() for shard in spread.addressable_shards]
    found["fetched"] = hosts.fetch({"rows": spread, "local": rows[0]})["rows"].tolist()
    found["key"] = hosts.fetch(jax.random.key_data(key)).tolist()

    # One of the two is told to stop, and is faster than the other.
    with stop_requests() as stop_requested:
        for step in range(1000):
            if stop_requested():
                break
            if step == 5 and not hosts.is_first():
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01 * (me + 1))
            hosts.broadcast(0)
    found["stopped"] = step
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
