"""The process that renders chat templates, within bounds: `rlhf.data.render` runs this file by
itself and talks to it in lines.

A template is a foreign program.  A process of its own is the one place where it can be ended
whatever it does, and where memory can be bounded without bounding the run's.  It imports no JAX, so
that it is there in half a second.
"""

import json
import resource
import signal
import sys
from typing import Any

DESCRIBED = 300  # characters of a template's own message


def main(seconds: float, characters: int, memory: int) -> None:
    """Reads batches of conversations, one a line, and writes a line for each conversation:
    `[text, generations, error]`.

    Args:
      seconds: of computing, for one conversation; beyond them the process ends by SIGPROF.
      characters: of one text.
      memory: bytes beyond what the process has at its start.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    # After the import, whose memory is not the template's.
    _bound(memory)
    templates: list[str] = []
    for line in sys.stdin:
        batch = json.loads(line)
        templates += batch["templates"]
        for number, conversation in batch["conversations"]:
            # Computing time, not the clock's: a busy machine must not fail a row.  Python's
            # handlers would wait for a long operation to end; the default action of the signal does
            # not.
            signal.setitimer(signal.ITIMER_PROF, seconds)
            reply = _rendered(render_jinja_template, templates[number], conversation, characters)
            signal.setitimer(signal.ITIMER_PROF, 0)
            sys.stdout.write(json.dumps(reply) + "\n")
            sys.stdout.flush()


def _rendered(
    render: Any, template: str, conversation: dict[str, Any], characters: int
) -> tuple[str, list, str | None]:
    messages = conversation.pop("messages")
    try:
        (text,), generations = render([messages], chat_template=template, **conversation)
    except Exception as error:
        return "", [], _described(error)
    if len(text) > characters:
        return "", [], f"it writes {len(text):,} characters, but {characters:,} are the most"
    return text, generations[0] if generations else [], None


def _described(error: Exception) -> str:
    """One line; what `raise_exception` was given stands alone."""
    if isinstance(error, MemoryError):
        return "it takes more memory than it may"
    if isinstance(error, RecursionError):
        return "it calls itself without end, or the row is nested too deeply"
    said = " ".join(str(error)[: 4 * DESCRIBED].split())[:DESCRIBED]
    number = getattr(error, "lineno", None)
    line = f" in its line {number}" if isinstance(number, int) else ""
    return (
        said if type(error).__name__ == "TemplateError" else f"{type(error).__name__}{line}: {said}"
    )


def _bound(memory: int) -> None:
    """Of the address space; a system that has no such bound keeps the others."""
    try:
        with open("/proc/self/statm") as file:
            most = int(file.read().split()[0]) * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    except (OSError, ValueError):
        pass


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
