"""JSON over HTTP with the standard library alone: a server of one function, and readers of a
request's fields.
"""

import json
import math
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TYPES = {400: "BadRequestError", 404: "NotFoundError", 500: "InternalServerError"}  # OpenAI's names


class Refused(Exception):
    """`Refused(status, message)`: what a request is answered that cannot be served."""


class _Server(ThreadingHTTPServer):
    request_queue_size = (
        256  # clients send hundreds of rows at once; the system drops what finds no place
    )


def json_server(
    handle: Callable[[str, str, bytes], Any], *, host: str, port: int
) -> ThreadingHTTPServer:
    """A server that listens; while `serve_forever()` runs, every request has a thread and is
    answered in JSON.

    Args:
      handle: `(command, path, body) -> content`, of `("POST", "/name", b"{}")` for example.
        `Refused` becomes its status, all else that is raised status 500 and a traceback on stderr;
        both say `{"error": {"message", "type", "param", "code"}}`.
      host, port: where to listen; port 0: any that is free, `server_port` says which.

    Returns: the server, quiet about its requests; `with` closes it.

    Raises: OSError where the port is taken.

    >>> import threading
    >>> from urllib.request import urlopen
    >>> with json_server(lambda command, path, body: [command, path], host="127.0.0.1", port=0) as server:
    ...     threading.Thread(target=server.handle_request).start()
    ...     urlopen(f"http://127.0.0.1:{server.server_port}/x").read().decode()
    '["GET", "/x"]'
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            try:
                data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status = 200
                content = encoded(handle(self.command, self.path, data))
            except Refused as refusal:
                status = refusal.args[0]
                content = _error(*refusal.args)
            # SystemExit too: a function of the user's that exits must not leave a request open.
            except (Exception, SystemExit) as error:
                traceback.print_exc()
                status = 500
                content = _error(500, f"{type(error).__name__}: {error}")
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            # With a length the client knows where the body ends, even over a connection that stays.
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, *args):
            """Quiet: a batch is hundreds of requests."""

    return _Server((host, port), Handler)


def encoded(content) -> bytes:
    """JSON, with arrays and their numbers as lists and numbers.

    Args:
      content: what `json` takes, and anything that has `tolist`.

    Returns: UTF-8.

    Raises: TypeError on anything else.

    >>> import numpy as np
    >>> encoded({"rewards": np.float32([0.5, 1])})
    b'{"rewards": [0.5, 1.0]}'
    """
    return json.dumps(content, default=_plain).encode()


def decoded(data: bytes) -> dict:
    """The JSON object that a body is.

    Args:
      data: UTF-8.

    Returns: its fields.

    Raises: ValueError where it is no JSON, or no object.

    >>> decoded(b'{"n": 2}')
    {'n': 2}
    """
    body = json.loads(data)
    if not isinstance(body, dict):
        raise ValueError(f"the body must be a JSON object, but is {body!r}")
    return body


def number(body: dict, name: str, default: float) -> float:
    """The finite number of a field, or the default where it is missing or null.

    Args:
      body: fields of a request.  name: of the field.  default: a number.

    Returns: an int where JSON has one.

    Raises: ValueError on anything but a finite number.

    >>> number({"top_p": 0.5}, "top_p", 1), number({"top_p": None}, "top_p", 1)
    (0.5, 1)
    """
    value = default if body.get(name) is None else body[name]
    # Booleans are ints to Python. The comparison with infinity is False for NaN too.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise ValueError(f"{name} must be a number, but is {value!r}")
    return value


def integer(body: dict, name: str, default: int, *, least: int = 1) -> int:
    """The whole number of a field, or the default where it is missing or null.

    Args:
      body: fields of a request.  name: of the field.  default: a whole number.  least: the smallest
        that is taken.

    Raises: ValueError on anything but a whole number from `least` on.

    >>> integer({"n": 2}, "n", 1)
    2
    """
    value = number(body, name, default)
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number and at least {least}, but is {value!r}")
    return value


def text(body: dict, name: str) -> str:
    """The text of a field.

    Args:
      body: fields of a request.  name: of the field.

    Raises: ValueError where it is missing, or no text.

    >>> text({"model": "policy"}, "model")
    'policy'
    """
    if not isinstance(body.get(name), str):
        raise ValueError(f"{name} must be a text, but is {body.get(name)!r}")
    return body[name]


def _plain(x):
    if not hasattr(x, "tolist"):
        raise TypeError(
            f"{type(x).__name__} does not go into JSON; give text, numbers, lists and arrays"
        )
    return x.tolist()


def _error(status: int, message: str) -> bytes:
    return encoded(
        {"error": {"message": message, "type": TYPES[status], "param": None, "code": status}}
    )
