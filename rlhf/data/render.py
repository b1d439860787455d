"""Chat templates rendered within bounds of time, memory and size, by a process that can be ended
(`render_worker`).

Jinja's sandbox keeps a template from the machine, but bounds neither its time nor its output: loops
in loops, a big power, a text times 10^10.  10,000 conversations take about as long as in this
process, and half a second for the first.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.fields import documented

SECONDS = 1.0  # of computing, for one conversation; a usual one takes a thousandth
CHARACTERS = 16_000_000  # of a text; more than any model reads
MEMORY = 2**30  # bytes, for the template alone
BATCH = 128  # conversations of one message to the process


@documented
class Conversation(NamedTuple):
    """What a template is given.

    Attributes:
      template: the chat template, Jinja's text.
      messages: of the conversation, each with role and content.
      options: `tools`, `add_generation_prompt` and the like, and the template's own variables.
    """

    template: str
    messages: list[dict[str, Any]]
    options: dict[str, Any]


@documented
class Rendered(NamedTuple):
    """What a template makes of a conversation.

    Attributes:
      text: what the template made of it.
      generations: where in the text the template's `{% generation %}` blocks stand.
      error: why there is no text.
    """

    text: str
    generations: list[tuple[int, int]]
    error: str | None


def render(conversations: Sequence[Conversation]) -> list[Rendered]:
    """The text of each conversation, as `transformers` renders it.

    Args:
      conversations: each with its template.

    Returns: as many, in their order.  One that takes too long is the last, and those after it are
    left out.

    Raises: TypeError, ValueError, RecursionError for what JSON cannot hold, such as messages inside
    themselves.

    >>> hello = Conversation("{{ messages[0].content | upper }}", [{"role": "user", "content": "hello"}], {})
    >>> refused = hello._replace(template="{{ raise_exception('no ' ~ messages[0].role ~ ' here') }}")
    >>> [(rendered.text, rendered.error) for rendered in render([hello, refused])]
    [('HELLO', None), ('', 'no user here')]
    """
    done: list[Rendered] = []
    # One process for all threads: a batch and its replies must not mix with another's.
    with _LOCK:
        for start in range(0, len(conversations), BATCH):
            batch = conversations[start : start + BATCH]
            done += _WORKER.render(batch)
            if len(done) < start + len(batch):
                break
    return done


class _Worker:
    """The process, started when it is first needed; it ends with this one, whose end of its input
    closes then.
    """

    def __init__(self):
        self.process: subprocess.Popen | None = None
        # The process that started it: a fork must not share its pipes.
        self.owner = 0
        self.templates: dict[str, int] = {}  # those that were sent, and their numbers

    def render(self, batch: Sequence[Conversation]) -> list[Rendered]:
        """One a conversation, or fewer: then the process ended at the last of them."""
        process = self.running()
        # A template is sent once, and named by its number afterwards: it may have 10,000
        # characters.
        new = [
            template
            for template in dict.fromkeys(each.template for each in batch)
            if template not in self.templates
        ]
        numbers = self.templates | {
            template: len(self.templates) + i for i, template in enumerate(new)
        }
        lines = [
            [numbers[each.template], {**each.options, "messages": each.messages}] for each in batch
        ]
        request = json.dumps({"templates": new, "conversations": lines}, default=_placeholder)
        self.templates = numbers
        assert process.stdin is not None
        assert process.stdout is not None
        found: list[Rendered] = []
        try:
            process.stdin.write(request + "\n")
            process.stdin.flush()
            for _ in batch:
                line = process.stdout.readline()
                if not line:
                    break
                text, generations, error = json.loads(line)
                found.append(Rendered(text, [(start, end) for start, end in generations], error))
        except BrokenPipeError:
            pass
        except BaseException:
            # Such as Ctrl-C: lines that were not read would be taken for those of the next batch.
            self.stop()
            raise
        return (
            found if len(found) == len(batch) else [*found, Rendered("", [], _ended(self.stop()))]
        )

    def running(self) -> subprocess.Popen:
        if self.process is not None and self.owner == os.getpid() and self.process.poll() is None:
            return self.process
        self.stop()
        # -P: the folder of the script, which has a types.py, stays off the path
        script = str(Path(__file__).with_name("render_worker.py"))
        command = [sys.executable, "-P", script, str(SECONDS), str(CHARACTERS), str(MEMORY)]
        self.owner = os.getpid()
        self.templates = {}
        # A session of its own, so that Ctrl-C reaches this process alone, which then ends the
        # other.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="ascii",
            start_new_session=True,
        )
        return self.process

    def stop(self) -> int:
        """Ends the process, and says what it ended with."""
        process = self.process
        self.process = None
        if process is None or self.owner != os.getpid():
            return 0
        process.kill()
        with suppress(BrokenPipeError), process:
            pass
        return process.returncode


def _ended(code: int) -> str:
    # The worker's timer of computing time ends it by SIGPROF; anything else is a crash.
    if code == -signal.SIGPROF:
        return f"it takes longer than {SECONDS:g} s, which is the most for a row"
    return f"the process that renders it ended with {code}"


def _placeholder(value: Any) -> Any:
    """What JSON does not have: numbers of NumPy as Python's, and for anything else its type, as
    transformers shows it.
    """
    return (
        value.item()
        if hasattr(value, "item") and not getattr(value, "ndim", 1)
        else f"<{type(value).__name__}>"
    )


_LOCK = threading.Lock()
_WORKER = _Worker()
atexit.register(_WORKER.stop)
