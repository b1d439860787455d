"""Inputs that cannot be, by the hundred: each ends in one line and exit code 2, in bounded time and memory, and writes nothing.

The cases stand in bad_inputs/cases_*.py, `CASES = [(name, argv, part of the message)]`.  In argv BASE is a tiny model's folder,
OUT a fresh output, TMP a folder of the test, and HERE/x the file bad_inputs/x.  Where inputs have to be made, `prepare(tmp,
base)` beside the cases writes them under TMP.
"""

import faulthandler
import importlib.util
import re
import resource
import signal
import sys
from pathlib import Path

import pytest

from rlhf import cli

HERE = Path(__file__).parent / "bad_inputs"
SECONDS = 20
BAR = "train "  # how a progress bar begins: some errors come in the first step alone
GIGABYTES = 2  # beside what the process had before
KILOBYTES_OF_GIGABYTE = 2**20  # ru_maxrss counts kilobytes


class TookTooLong(BaseException):
    """Nobody's `except Exception` catches it."""


def load(path: Path):
    """The module of a file that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODULES = {path.stem.removeprefix("cases_"): load(path) for path in sorted(HERE.glob("cases_*.py"))}
CASES = [
    pytest.param(
        module,
        argv,
        message,
        id=f"{room}-{name}",
        marks=pytest.mark.exhaustive if number % 3 else (),
    )
    for room, module in MODULES.items()
    for number, (name, argv, message) in enumerate(module.CASES)
]


def contents(folder: Path) -> dict:
    """Every file, its size and when it was written."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    ]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize(("module", "argv", "message"), CASES)
def test_a_bad_input_is_one_line_and_exit_code_2(
    module, argv, message, base, tmp_path, capsys, monkeypatch
):
    tmp, out = tmp_path / "in", tmp_path / "out"
    tmp.mkdir()
    if hasattr(module, "prepare"):
        module.prepare(tmp, base)
    before = contents(tmp)
    words = {"BASE": base, "OUT": str(out), "TMP": str(tmp), "HERE": str(HERE)}
    filled = [
        re.sub("BASE|OUT|TMP|HERE(?=/)", lambda found: words[found[0]], word) for word in argv
    ]
    monkeypatch.chdir(tmp)
    monkeypatch.setenv("COLUMNS", "200")  # a progress bar is one line
    monkeypatch.setattr(sys, "path", [*sys.path])
    code = in_bounds(lambda: cli.main(filled))
    said = capsys.readouterr().err
    error = "\n".join(
        line for line in said.splitlines() if line.strip() and not line.startswith(BAR)
    )
    assert code == 2, said
    assert message in error
    assert "\n" not in error
    assert "Traceback" not in error
    assert re.match(r"rlhf( \w+)?: ", error), "the line begins with the command's name"
    assert not out.exists() or not contents(out), "something was written"
    assert contents(tmp) == before, "an input was written over, or something was left beside it"


def in_bounds(call):
    """What it returns.  Raises: TookTooLong, and AssertionError where it took too much memory."""

    def late(number, frame):
        raise TookTooLong(f"nothing after {SECONDS} s")

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    earlier = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(
        3 * SECONDS, exit=True, file=sys.__stderr__
    )  # native code hears no signal
    try:
        return call()
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, earlier)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most) / KILOBYTES_OF_GIGABYTE
        assert grown < GIGABYTES, f"it took {grown:.1f} GB"


def test_names_of_cases_are_different():
    ids = [case.id for case in CASES]
    assert len(ids) == len(set(ids))
