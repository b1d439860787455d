"""A process for one function of a user's: `workers.Worker` starts this file, and talks to it in
pickles over two pipes.

It needs the standard library alone, so that it starts at once.  What the function prints goes to
stderr, what it raises and returns goes back in plain words and numbers, and when the process that
started this one is gone, so is this one.
"""

import asyncio
import contextlib
import difflib
import faulthandler
import importlib
import importlib.util
import inspect
import itertools
import os
import pickle
import struct
import sys
import sysconfig
import traceback
from collections.abc import Callable
from numbers import Number
from pathlib import Path
from typing import Any

LENGTH = struct.Struct("<Q")  # of the pickle that follows
WORDS = 500  # characters of a message
SPARE = 5.0  # seconds after which a call ends by itself that nobody waits for any more


class Refused(Exception):
    """What a name stands for cannot be called."""


def describe(error: BaseException) -> str:
    """An exception in one line: its type, its words, and the deepest line of a file that is no
    library's.

    >>> describe(SystemExit(3))
    'SystemExit: 3'
    """
    try:
        words = " ".join(str(error).split())
    # The text of an exception is code of a user's class, and may itself raise anything.
    except BaseException:
        words = "(its text cannot be had)"
    if isinstance(error, SyntaxError) and error.filename:
        return f"SyntaxError: {error.msg} ({Path(error.filename).name}:{error.lineno})"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen")
    ]
    frames = [frame for frame in frames if frame.filename != __file__]
    # The deepest line that a user wrote says more than the library's below it.
    of_user = [frame for frame in frames if not _of_library(frame.filename)] or frames
    where = f" ({Path(of_user[-1].filename).name}:{of_user[-1].lineno})" if of_user else ""
    return f"{type(error).__name__}: {words[:WORDS]}{where}"


def shown(x: Any) -> str:
    """The start of what something looks like, whatever its own class has to say about that.

    >>> shown([1, 2]), shown(10**5000)
    ('[1, 2]', 'something of type int')
    """
    try:
        return f"{x!r:.80}"
    except BaseException:
        return f"something of type {type(x).__name__}"


def find(name: str) -> Callable:
    """The function that `module:function` or `file.py:function` names.

    Raises: Refused where it is not there, or no function; and whatever the module raises.
    """
    where, _, inside = name.partition(":")
    module = _of_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    found: Any = module
    for part in inside.split("."):
        if not hasattr(found, part):
            known = [
                key
                for key, value in vars(found).items()
                if callable(value) and not key.startswith("_")
            ]
            near = difflib.get_close_matches(part, known, n=1)
            hint = (
                f"did you mean {near[0]}? it has {', '.join(known)}"
                if near
                else f"it has {', '.join(known) or 'no function'}"
            )
            raise Refused(f"{where} has no {part}; {hint}")
        found = getattr(found, part)
    if inspect.isclass(found):
        raise Refused(
            f"{inside} of {where} is a class; give a function, or an object of it that can be "
            "called"
        )
    if not callable(found):
        raise Refused(
            f"{inside} of {where} is {shown(found)}, which cannot be called; give a function"
        )
    return found


def taken(signature: inspect.Signature | None, given: dict[str, Any]) -> dict[str, Any]:
    """What a function takes of that which is given by name; all of it where it has `**columns`.

    >>> taken(inspect.signature(lambda completions, limit=3: 0), {"prompts": ["a"], "completions": ["b"]})
    {'completions': ['b']}
    """
    if signature is None or any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        return given
    named = [
        p.name
        for p in signature.parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    return {name: given[name] for name in named if name in given}


def listed(returned: Any, number: int) -> Any:
    """What a function returned for `number` rows as a list, of at most one entry more; itself,
    where it has no rows in order.

    >>> listed((x for x in range(9)), 2), listed({1.0, 2.0}, 2)
    ([0, 1, 2], {1.0, 2.0})
    """
    if isinstance(returned, str | bytes | set | frozenset | dict):
        return returned
    try:
        rows = iter(returned)
    except TypeError:
        return returned
    # A generator may never end: one entry too many is enough to refuse it.
    return list(itertools.islice(rows, number + 1))


def plain(returned: Any, number: int) -> Any:
    """What a function returned for `number` rows, as lists, numbers and None; ("odd", its text) for
    all else.
    """
    rows = listed(returned, number)
    return (
        [_plain_entry(row) for row in rows] if isinstance(rows, list) else ("odd", shown(returned))
    )


def main() -> None:
    """Reads a function, then calls, until there are no more."""
    # The two pipes move to descriptors of their own. What the function prints then goes to stderr,
    # and what it reads from stdin is empty: neither breaks the protocol.
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.dup(1)
    owner = os.getpid()
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    with contextlib.suppress(OSError):
        # Where the machine runs out of memory, Linux ends the process of the highest score first.
        Path("/proc/self/oom_score_adj").write_text("1000")

    def reply(*message: Any) -> None:
        # A function that forks, and lets the child return, comes out here a second time.
        if os.getpid() != owner:
            os._exit(0)
        data = memoryview(pickle.dumps(message))
        for part in (LENGTH.pack(len(data)), data):
            while part:
                part = part[os.write(replies, part) :]

    sys.path[:], function = _read(requests)
    try:
        function = find(function) if isinstance(function, str) else pickle.loads(function)
        signature = _signature(function)
    except BaseException as error:
        # os._exit, since a normal exit would wait for threads that the module has started.
        reply("refused", _refusal(function, error))
        os._exit(0)
    reply(
        "ready",
        signature
        and [(p.name, int(p.kind), p.default is p.empty) for p in signature.parameters.values()],
    )
    while True:
        number, timeout, arguments, named = _read(requests)
        # If nobody waits any more, the call ends by itself. This timer runs in C, and so works even
        # where the function never lets go of the lock.
        faulthandler.dump_traceback_later(timeout + SPARE, exit=True, file=nothing)
        message: tuple
        try:
            message = (
                "returned",
                plain(_run(function(*arguments, **taken(signature, named))), number),
            )
        except BaseException as error:
            message = (
                "raised",
                describe(error),
                any(kind.__name__ == "Unreachable" for kind in type(error).__mro__),
            )
        reply(*message)
        faulthandler.cancel_dump_traceback_later()


def _read(file: Any) -> Any:
    head = file.read(LENGTH.size)
    if len(head) < LENGTH.size:
        # The pipe has closed: the run is over. Threads that the function left behind do not count.
        os._exit(0)
    return pickle.loads(file.read(LENGTH.unpack(head)[0]))


def _run(returned: Any) -> Any:
    async def wait():
        return await returned

    return asyncio.run(wait()) if inspect.isawaitable(returned) else returned


def _plain_entry(entry: Any) -> Any:
    entry = entry.tolist() if hasattr(entry, "tolist") else entry
    if isinstance(entry, list | tuple):
        numbers = [_plain_number(x.tolist() if hasattr(x, "tolist") else x) for x in entry]
        odd = any(isinstance(x, tuple) for x in numbers)
        return ("odd", shown(entry)) if odd else numbers
    return _plain_number(entry)


def _plain_number(x: Any) -> Any:
    if x is None or type(x) in (bool, int, float):
        return x
    # Fractions and decimals are numbers too; a complex one is no reward.
    if isinstance(x, Number) and not isinstance(x, complex) and hasattr(x, "__float__"):
        return float(x)
    return "odd", shown(x)


def _signature(function: Callable) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (ValueError, TypeError):
        # Some functions that are written in C have no signature.
        return None


def _refusal(function: str | bytes, error: BaseException) -> str:
    if isinstance(error, Refused):
        return str(error)
    module = function.partition(":")[0] if isinstance(function, str) else ""
    if (
        isinstance(error, ModuleNotFoundError)
        and error.name
        and f"{module}.".startswith(f"{error.name}.")
    ):
        return f"{error}; is it in this folder, or on the Python path?"
    return f"cannot be imported: {describe(error)}"


def _of_file(path: Path) -> Any:
    if not path.is_file():
        raise Refused(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    # The name ends in .py, for which there always is a loader.
    assert spec is not None
    assert spec.loader is not None
    # A file may import what stands beside it, as a script may.
    sys.path.insert(0, str(path.parent.resolve()))
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _of_library(file: str) -> bool:
    libraries = [sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib")]
    return any(file.startswith(folder + os.sep) for folder in libraries)


if __name__ == "__main__":
    main()
