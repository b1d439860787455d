"""The results file: runs of one commit, size and machine are put into one."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.speed import sides

# Parts whose rows have names, and may be of several runs.
BY_NAME = ("jobs", "scaling")
# What must be the same for two runs to be one result.
SAME = ("commit", "size", "device", "processor")


def about(size: str) -> dict[str, str]:
    """Machine, versions and commit."""
    versions = {
        requirement.split("==")[0]: requirement.split("==")[1]
        for side in ("trl", "tunix")
        for requirement in sides.requirements(side, "sft")
        if not requirement.startswith("jax")
    }
    return {**report.machine(), "commit": commit(), **versions, "size": size}


def commit() -> str:
    """Of the code that is measured: the results that a run has written do not make it another."""
    root = Path(__file__).parent.parent.parent

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=root)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return git("describe", "--always") + ("-dirty" if changed else "")


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The new results with those of the old ones that they lack, if both are of the same code.

    >>> here = {"commit": "a", "size": "full", "device": "cpu", "processor": "x"}
    >>> old = {"about": here, "jobs": {"sft": 1, "dpo": 1}}
    >>> merged(old, {"about": here, "jobs": {"sft": 2}})["jobs"]
    {'sft': 2, 'dpo': 1}
    >>> merged(old, {"about": here | {"commit": "b"}, "jobs": {"sft": 2}})["jobs"]
    {'sft': 2}
    """
    if any(old.get("about", {}).get(name) != new["about"][name] for name in SAME):
        return dict(new)
    by_name = {name: {**old.get(name, {}), **new.get(name, {})} for name in BY_NAME}
    return {**old, **new, **by_name}


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}


def write(file: Path, results: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
