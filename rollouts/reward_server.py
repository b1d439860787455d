"""Reward functions over HTTP: in a process or on a machine of their own, where a crash or a hang costs rows, not the run."""

import asyncio
import http.client
import inspect
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from rlhf.rollouts.rewards import RewardFunction, Unreachable

TRANSIENT = (429, 502, 503, 504)  # too many requests, and what proxies say of a server that restarts


def serve(rewards: Mapping[str, RewardFunction], *, host: str = "127.0.0.1", port: int = 8000) -> ThreadingHTTPServer:
    """A server of reward functions, each at `/name`: POST `{"prompts": […], "completions": […], "columns": {…}}` is answered by
    `{"rewards": […]}`, a function that raises by status 500 and `{"error": …}`.  GET `/` names the functions.

    It listens when it is returned, and answers while `serve_forever()` runs; every request has a thread.  It knows no users and
    no passwords: keep `host` to where every caller may be trusted.

    Args:
      rewards: name -> reward function.
      host, port: where to listen; port 0: any that is free, `server_port` says which.

    Raises: OSError where the port is taken.

    >>> import threading
    >>> with serve({"length": lambda prompts, completions, **columns: [len(c) for c in completions]}, port=0) as server:
    ...     threading.Thread(target=server.serve_forever, daemon=True).start()
    ...     remote(f"http://127.0.0.1:{server.server_port}/length")(["", ""], ["a", "abc"])
    ...     server.shutdown()
    [1, 3]
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(200, _encoded({"rewards": list(rewards)}))

        def do_POST(self):
            reward = rewards.get(self.path.strip("/"))
            if reward is None:
                return self.answer(404, _encoded({"error": f"no function at {self.path}; there are {list(rewards)}"}))
            try:
                texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                arguments, columns = (texts["prompts"], texts["completions"]), texts.get("columns", {})
            except (TypeError, ValueError, KeyError, AttributeError) as error:
                return self.answer(400, _encoded({"error": f"the body must have prompts and completions: {error!r}"}))
            try:
                status, content = 200, _encoded({"rewards": list(_run(reward(*arguments, **columns)))})
            except (Exception, SystemExit) as error:
                status, content = 500, _encoded({"error": f"{type(error).__name__}: {error}"})
            self.answer(status, content)

        def answer(self, status, body):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    return _Server((host, port), Handler)


def remote(url: str, *, timeout: float = 60.0, retries: int = 3, backoff: float = 0.5) -> RewardFunction:
    """The reward function behind a URL of `serve`.

    Args:
      url: `http://host:port/name`.
      timeout: seconds that the server may be silent.
      retries: further attempts where it cannot be reached, is silent, or answers 429, 502, 503 or 504.
      backoff: seconds before the first of them; every wait is twice the one before.

    Returns: a reward function.  It raises `Unreachable` when the attempts are used up, and RuntimeError with the server's words
    where the function there raised.

    Raises: ValueError where `url` is not of HTTP, or `retries` is negative.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url must start with http:// or https://, but is {url!r}")
    if retries < 0:
        raise ValueError(f"retries must be at least 0, but is {retries}")

    def reward(prompts, completions, **columns):
        body = _encoded({"prompts": list(prompts), "completions": list(completions), "columns": columns})
        for attempt in range(retries + 1):
            if attempt:
                time.sleep(backoff * 2 ** (attempt - 1))
            try:
                return _post(url, body, timeout)
            except (OSError, http.client.HTTPException) as error:
                last = error
        raise Unreachable(f"{url} did not answer in {retries + 1} attempts, the last time because of {last!r}") from last

    return reward


def _post(url: str, body: bytes, timeout: float) -> list:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return json.loads(response.read())["rewards"]
    except urllib.error.HTTPError as error:
        with error:
            if error.code in TRANSIENT:
                raise
            raise RuntimeError(f"{url} answered {error.code}: {error.read().decode(errors='replace')}") from None


def _run(returned):
    async def wait():
        return await returned

    return asyncio.run(wait()) if inspect.isawaitable(returned) else returned


def _encoded(content) -> bytes:
    return json.dumps(content, default=_plain).encode()


def _plain(x):
    """Arrays and their numbers as lists and numbers."""
    if not hasattr(x, "tolist"):
        raise TypeError(f"{type(x).__name__} does not go into JSON; give columns of text, numbers and lists")
    return x.tolist()


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # five, the library's, are too few where many hosts ask at once
