"""The sides of a comparison: where each gets its Python, and how its process starts."""

import os
import sys
import tomllib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import jax

from benchmarks import peers

ROOT = Path(__file__).parent.parent.parent
SIDES = ("ours", "trl", "tunix")
NAMES = {"ours": "ours", "trl": "TRL", "tunix": "Tunix"}
# The one version of torch with which TRL is measured.
TORCH = "torch==2.13.0"
PROGRAM = "import runpy; runpy.run_module('benchmarks.speed.{side}', run_name='__main__')"


def requirements(side: str, job: str) -> list[str]:
    """What a side's environment has; ours what this Python has of our dependencies, and no more: torch
    beside them would be imported with transformers.
    """
    if side == "trl":
        # The last with a trainer for PPO is 1.12.
        return [TORCH, "trl==1.12.0" if job == "ppo" else "trl==1.16.0"]
    accelerated = [f"jax[cuda13]=={version('jax')}"] if jax.default_backend() == "gpu" else []
    if side == "tunix":
        return ["google-tunix==0.1.7", *accelerated]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [line.split(">=")[0] for line in project["dependencies"]]
    return [*(f"{name}=={version(name)}" for name in names), *accelerated]


def python(side: str, job: str, *, isolated: bool = True) -> str:
    """The Python of a side.

    Args:
      isolated: in an environment that is made for it; otherwise, of our side alone, this one.
    """
    if side == "ours" and not isolated:
        return sys.executable
    name = "trl_ppo" if (side, job) == ("trl", "ppo") else side
    return str(peers.environment(name, *requirements(side, job)))


def environment_variables(cache: Path | None) -> dict[str, str]:
    """Of a side's process.

    Args:
      cache: folder of JAX's persistent compilation cache; None: none.
    """
    variables = dict(os.environ)
    variables.pop("JAX_COMPILATION_CACHE_DIR", None)
    variables["PYTHONPATH"] = str(ROOT)
    if jax.default_backend() != "cpu":
        # Sides share a device, and float32 is float32 on all of them, as torch has it.
        variables["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        variables["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    if cache is not None:
        variables["JAX_COMPILATION_CACHE_DIR"] = str(cache)
        variables["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        variables["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    return variables


def start(
    side: str, job: str, folder: Path, *, isolated: bool = True, cache: Path | None = None
) -> peers.Process:
    """A side's process, which waits for its turns; the folder is of `jobs.write_folder`."""
    return peers.Process(
        python(side, job, isolated=isolated),
        PROGRAM.format(side=side),
        job,
        str(folder),
        env=environment_variables(cache),
    )


def start_all(sides: Sequence[str], job: str, folder: Path) -> dict[str, peers.Process]:
    """All of them; ours is by itself in this Python's environment."""
    isolated = len(sides) > 1
    return {side: start(side, job, folder, isolated=isolated) for side in sides}
