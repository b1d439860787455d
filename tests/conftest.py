"""Strict by default: eight CPU devices, rank promotion raises; warnings are errors (pyproject.toml)."""

import os
import subprocess
import sys
from pathlib import Path

FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",  # compilation is most of a test's time; this halves it
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",  # the older ones halve it again
    # Eight devices on two busy cores meet late: by default XLA ends the process after 40 seconds.
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    "--xla_cpu_parallel_codegen_split_count=1",  # one piece a program: they are small, and both cores are busy
)


def known_flags(flags):
    """Those that this jaxlib knows: it ends the process that gives it another, and says which."""
    ask = [sys.executable, "-c", "import jax; jax.devices()"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    asked = subprocess.run(ask, env=environment, capture_output=True, text=True)
    refused = {
        word
        for line in asked.stderr.splitlines()
        if "Unknown flag" in line
        for word in line.split()
    }
    known = [flag for flag in flags if flag not in refused]
    assert asked.returncode == 0 or len(known) < len(flags), asked.stderr
    return known


if FLAGS[0] not in os.environ.get("XLA_FLAGS", ""):  # workers inherit what their parent found
    os.environ["XLA_FLAGS"] = " ".join(
        [os.environ.get("XLA_FLAGS", ""), *known_flags(FLAGS)]
    ).strip()
os.environ["JAX_PLATFORMS"] = "cpu"

import gc

import jax
import pytest

# Programs and their traces are millions of objects that live long: the default of 700 new ones
# between two collections spends a tenth of the time on looking at them.
gc.set_threshold(50_000, 20, 50)
GIGABYTE = 1 << 30

jax.config.update("jax_numpy_rank_promotion", "raise")

BY_NAME = ({"test_contract.py", "test_properties.py"}, {"test_families.py"})


def pytest_collection_modifyitems(items):
    """Checks that share compilations stand side by side: function by function, model by model, instead of check by check."""
    for files in BY_NAME:
        places = [
            i
            for i, item in enumerate(items)
            if item.path.name in files and "name" in callspec(item)
        ]
        ordered = sorted((items[i] for i in places), key=lambda item: str(callspec(item)["name"]))
        for i, item in zip(places, ordered, strict=True):
            items[i] = item


class Memory:
    """Drops compiled programs where a worker has grown by two gigabytes: those of tests that are over
    would fill the memory of a small machine.
    """

    limit = 3 * GIGABYTE

    def pytest_runtest_teardown(self, nextitem):
        if nextitem is not None and self.used() > self.limit:
            jax.clear_caches()
            gc.collect()
            # Not all of it goes back to the system.
            self.limit = self.used() + 2 * GIGABYTE

    @staticmethod
    def used() -> int:
        statm = Path("/proc/self/statm")
        # Linux has it; elsewhere programs stay.
        pages = int(statm.read_text().split()[1]) if statm.exists() else 0
        return pages * os.sysconf("SC_PAGE_SIZE")


def pytest_configure(config):
    config.pluginmanager.register(Memory())


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of a tiny new model that commands begin with; nobody writes to it."""
    from rlhf import cli

    folder = tmp_path_factory.mktemp("models") / "base"
    assert (
        cli.main(
            ["new", str(folder), "--hidden_size", "16", "--num_heads", "2", "--num_layers", "1"]
        )
        == 0
    )
    return str(folder)


@pytest.fixture(autouse=True, scope="session")
def one_device():
    """Commands take one device, as on most machines; a test that is marked `mesh` gets all eight."""
    from rlhf.training import meshes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "local_devices", lambda: jax.devices()[:1])
        yield


@pytest.fixture(autouse=True)
def eight_devices(request, monkeypatch):
    if "mesh" not in request.keywords:
        yield
        return
    from rlhf.training import meshes

    monkeypatch.setattr(meshes, "local_devices", jax.devices)
    yield
    forget_programs(beyond=20_000)  # whole commands, each of dozens of programs for eight devices


@pytest.fixture(autouse=True, scope="module")
def memory_maps():
    yield
    forget_programs(beyond=30_000)


def forget_programs(beyond: int) -> None:
    """Every compiled program holds memory maps, of which a process has 65,530: beyond, XLA crashes.  Forgets them in time."""
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_text().splitlines()) > beyond:
        jax.clear_caches()


def callspec(item):
    return getattr(getattr(item, "callspec", None), "params", {})
