"""Regular expressions that others wrote, matched within bounds of time and memory."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence

SECONDS = 5.0  # for all patterns of a call
# Without these a pattern is read once from left to right, and needs no process.
BRANCHES = re.compile(r"[*+?{|(]")
# Flushed line by line, so that after a timeout the number of lines says which pattern was at fault.
PROGRAM = """
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
except (ImportError, ValueError, OSError):
    pass
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    compiled = re.compile(pattern)
    print(json.dumps([name for name in names if compiled.fullmatch(name)]), flush=True)
"""


def matches(
    patterns: Iterable[str], names: Sequence[str], *, seconds: float = SECONDS
) -> dict[str, set[str]]:
    """The names that each pattern matches in full, as `re.fullmatch` has it.

    Patterns that can go back run in a process of their own, which is killed after so many seconds:
    `(a+)+$` would take for ever, and nothing else stops Python's `re`.

    Raises: ValueError for what is no regular expression, or takes too long.

    >>> matches(["layers.0.q", "layers.*q"], ["layers.0.q", "layers.1.q"])["layers.0.q"]
    {'layers.0.q'}
    """
    patterns = list(dict.fromkeys(patterns))
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"the pattern {pattern!r:.80} is no regular expression: {error}"
            ) from error
    branching = [pattern for pattern in patterns if BRANCHES.search(pattern)]
    straight = [pattern for pattern in patterns if not BRANCHES.search(pattern)]
    found = {
        pattern: {name for name in names if re.fullmatch(pattern, name)} for pattern in straight
    }
    if branching:
        found |= _apart(branching, names, seconds)
    return found


def _apart(patterns: list[str], names: Sequence[str], seconds: float) -> dict[str, set[str]]:
    # Isolated and without site packages: nothing of the caller's runs, and it starts fast.
    command = [sys.executable, "-I", "-S", "-c", PROGRAM]
    try:
        ran = subprocess.run(
            command,
            input=json.dumps([patterns, names]).encode(),
            capture_output=True,
            timeout=seconds,
        )
        lines = ran.stdout.splitlines()
    except subprocess.TimeoutExpired as stopped:
        lines = (stopped.stdout or b"").splitlines()
    if len(lines) < len(patterns):
        at_fault = patterns[len(lines)]
        raise ValueError(
            f"the pattern {at_fault!r:.80} takes more than {seconds:g} s or 1 GB; write a simpler "
            "one"
        )
    return {pattern: set(json.loads(line)) for pattern, line in zip(patterns, lines, strict=True)}
