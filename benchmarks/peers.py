"""Peers run in environments of their own, in processes that stay, so that both sides of a comparison can take turns."""

import contextlib
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

HOME = Path(os.environ.get("RLHF_PEERS", Path.home() / ".cache" / "rlhf-peers"))


def environment(name: str, *requirements: str) -> Path:
    """The Python of a virtual environment with these packages, made if it is not there yet."""
    folder = HOME / name
    python, done = folder / "bin" / "python", folder / "requirements.txt"
    if not done.exists() or done.read_text().split() != list(requirements):
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *requirements], check=True)
        done.write_text("\n".join(requirements))
    return python


class Process:
    """A program that answers one line of JSON for each line of JSON that it gets; its errors are shown.

    Args:
      python: that runs it.
      program: its text.
      arguments: `sys.argv[1:]` of it.
      settings: of `subprocess.Popen`, such as its environment.
    """

    def __init__(self, python: Path | str, program: str, *arguments: str, **settings: Any):
        command = [str(python), "-c", program, *arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **settings
        )

    def ask(self, **question):
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"the peer ended with code {self.process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        # What one that has ended was not told is lost.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
