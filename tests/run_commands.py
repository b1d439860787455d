"""Runs a page's commands in a folder, one after the other, as they stand or shortened.

    python tests/run_commands.py README.md FOLDER

`BASE` in a command is the environment's variable of that name.
"""

import os
import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path

from rlhf import cli

SHORT = {
    "--steps": "2",
    "--batch_size": "8",
    "--dataset_size": "16",
    "--num_samples": "2",
    "--max_new_tokens": "4",
    "--max_length": "64",
}


def commands(page: str) -> list[list[str]]:
    """All commands of `rlhf` and `python -c` in a page's blocks of shell."""
    lines = [
        line
        for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
        for line in block.splitlines()
    ]
    split = [shlex.split(line) for line in lines]
    return [argv for argv in split if argv[:1] == ["rlhf"] or argv[:2] == ["python", "-c"]]


def shortened(argv: list[str]) -> list[str]:
    """The same command with few steps and rows, and of a new model one layer."""
    same = [argv[0], *(SHORT.get(before, word) for before, word in pairwise(argv))]
    return [*same, "--num_layers", "1"] if argv[:2] == ["rlhf", "new"] else same


def run(argv: list[str]) -> None:
    """Raises: SystemExit where a command fails."""
    if argv[0] == "python":
        exec(argv[2], {})
    elif cli.main(argv[1:]):
        raise SystemExit(f"failed: {shlex.join(argv)}")


def main(page: str, folder: str) -> None:
    text = Path(page).read_text().replace("BASE", os.environ.get("BASE", "BASE"))
    Path(folder).mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    for argv in commands(text):
        print(f"$ {shlex.join(argv)}", flush=True)
        run(argv)


if __name__ == "__main__":
    main(*sys.argv[1:])
