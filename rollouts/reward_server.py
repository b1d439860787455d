"""Reward functions over HTTP: in a process or on a machine of their own, where a crash or a hang
costs rows, not the run.
"""

import asyncio
import http.client
import inspect
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.server import ThreadingHTTPServer

from rlhf.rollouts.json_http import Refused, decoded, encoded, json_server
from rlhf.rollouts.rewards import RewardFunction, Unreachable, call, missing

# Too many requests (429), and what proxies say of a server that restarts.
TRANSIENT = (
    429,
    502,
    503,
    504,
)


def serve(
    rewards: Mapping[str, RewardFunction], *, host: str = "127.0.0.1", port: int = 8000
) -> ThreadingHTTPServer:
    """A server of reward functions, each at `/name`: POST
    `{"prompts": […], "completions": […], "columns": {…}}` is answered by `{"rewards": […]}`, a
    function that raises by status 500 and `{"error": …}`.  GET `/` names the functions.

    It listens when it is returned, and answers while `serve_forever()` runs; every request has a
    thread.  It knows no users and no passwords: keep `host` to where every caller may be trusted.

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

    def handle(command: str, path: str, data: bytes) -> dict:
        if command == "GET":
            return {"rewards": list(rewards)}
        reward = rewards.get(path.strip("/"))
        if reward is None:
            raise Refused(404, f"no function at {path}; there are {list(rewards)}")
        try:
            body = decoded(data)
            given = {
                **body.get("columns", {}),
                "prompts": body["prompts"],
                "completions": body["completions"],
            }
        except (ValueError, KeyError) as error:
            raise Refused(400, f"the body must have prompts and completions: {error!r}") from None
        if lacking := missing(reward, given):
            raise Refused(
                400, f"{path} needs {', '.join(lacking)}, but there are {', '.join(given)}"
            )
        return {"rewards": list(_run(call(reward, given)))}

    return json_server(handle, host=host, port=port)


def remote(
    url: str, *, timeout: float = 60.0, retries: int = 3, backoff: float = 0.5
) -> RewardFunction:
    """The reward function behind a URL of `serve`.

    Args:
      url: `http://host:port/name`.
      timeout: seconds that the server may be silent.
      retries: further attempts where it cannot be reached, is silent, or answers 429, 502, 503 or
        504.
      backoff: seconds before the first of them; every wait is twice the one before.

    Returns: a reward function.  It raises `Unreachable` when the attempts are used up, and
    RuntimeError with the server's words where the function there raised.

    Raises: ValueError where `url` is not of HTTP, or `retries` is negative.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url must start with http:// or https://, but is {url!r}")
    if retries < 0:
        raise ValueError(f"retries must be at least 0, but is {retries}")

    def reward(prompts, completions, **columns):
        body = encoded(
            {"prompts": list(prompts), "completions": list(completions), "columns": columns}
        )
        # The body is encoded once, before: what cannot be sent fails at once, and not `retries`
        # times.
        for attempt in range(retries + 1):
            if attempt:
                time.sleep(backoff * 2 ** (attempt - 1))
            try:
                return _post(url, body, timeout)
            except (OSError, http.client.HTTPException) as error:
                last = error
        raise Unreachable(
            f"{url} did not answer in {retries + 1} attempts, the last time because of {last!r}"
        ) from last

    return reward


def _post(url: str, body: bytes, timeout: float) -> list:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return json.loads(response.read())["rewards"]
    except urllib.error.HTTPError as error:
        with error:
            # HTTPError is an OSError: raised again, it counts as an attempt that failed.
            if error.code in TRANSIENT:
                raise
            raise RuntimeError(
                f"{url} answered {error.code}: {error.read().decode(errors='replace')}"
            ) from None


def _run(returned):
    async def wait():
        return await returned

    return asyncio.run(wait()) if inspect.isawaitable(returned) else returned
