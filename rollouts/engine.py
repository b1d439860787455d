"""Engines outside: completions of a server that speaks OpenAI's protocol (vLLM, SGLang,
`rollouts.server`), as a `Rollout`.

    engine = openai_engine("http://localhost:8000", "Qwen/Qwen2.5-0.5B")
    rollout = generate_remote(engine, prompts, key, max_new_tokens=256, num_samples=8,
    eos_ids=(tokenizer.eos_token_id,)) rollout = rescored(lm, params, rollout)
    ratio = losses.importance.weights(rollout.logprobs, rollout.sampling_logprobs, rollout.mask)

Tokens travel as ids in both directions and text is never tokenised again: what was sampled is what
is trained on.
"""

import contextlib
import json
import math
import random
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf.fields import documented
from rlhf.lm import LM, Params
from rlhf.ranges import Count, between, checked
from rlhf.rollouts.score import score_batch
from rlhf.rollouts.types import Array, Prompts, Rollout, check_prompts

# Seconds before the second attempt, which double with each further one, and the longest wait.
FIRST_WAIT = 0.5
LONGEST_WAIT = 30.0


@documented
class Engine(NamedTuple):
    """A server, and how requests reach it.

    Attributes:
      url: of the server.
      model: which one completes: the name of a base model or of an adapter.
      send: (path, JSON) -> the response's text; RuntimeError when it has failed for good.
      concurrency: requests under way at a time.
    """

    url: str
    model: str
    send: Callable[[str, dict], str]
    concurrency: int


@documented
class Failure(NamedTuple):
    """A row that no attempt has filled.

    Attributes:
      row: of the prompt.
      error: what went wrong.
    """

    row: int
    error: str


class _Completion(NamedTuple):
    tokens: list[int]
    logprobs: list[float]
    finished: bool


@checked
def openai_engine(
    url: str,
    model: str,
    *,
    api_key: str | None = None,
    timeout: Annotated[float, between(0, 1_000_000, above=True)] = 600.0,
    retries: Annotated[int, between(0, 1000)] = 3,
    concurrency: Count = 64,
) -> Engine:
    """A server that speaks OpenAI's protocol.  Nothing is sent yet.

    A lost connection, a timeout, 429 and 5xx are tried again after 0.5 s, 1 s, 2 s, … up to 30 s,
    each times a random number in [0.5, 1.5], so that a thousand rows do not come back at once.
    Other refusals are final.

    Args:
      url: of the server, with or without `/v1`.
      model: as the server names it.
      api_key: sent as a bearer token.
      timeout: seconds that a request waits for its response, which comes when the last token is
        sampled.
      retries: attempts after the first.
      concurrency: requests under way at a time.

    Raises: ValueError where the url is none of HTTP, or a number is out of range.

    >>> openai_engine("http://localhost:8000/v1/", "policy").url
    'http://localhost:8000'
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url must start with http:// or https://, but is {url!r}")
    url = url.rstrip("/").removesuffix("/v1")
    headers = {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {api_key}"} if api_key else {}
    )

    def send(path: str, body: dict) -> str:
        request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)
        for attempt in range(1, retries + 2):
            try:
                with urllib.request.urlopen(request, timeout=timeout) as response:
                    return response.read().decode(errors="replace")
            except urllib.error.HTTPError as error:
                problem = f"{error.code} {_message(error)}"
                # 429 asks to come back later, 5xx may pass; all other refusals would be repeated.
                final = error.code != 429 and error.code < 500
            except (OSError, HTTPException) as error:
                problem = f"{type(error).__name__} {error}"
                final = False
            if final or attempt > retries:
                break
            time.sleep(
                min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT) * random.uniform(0.5, 1.5)
            )
        raise RuntimeError(
            f"{url}{path} failed after {attempt} attempt{'s' * (attempt > 1)}: {problem}"
        )

    return Engine(url, model, send, concurrency)


def warn(failures: list[Failure]) -> None:
    """One RuntimeWarning for all rows that failed: what `generate_remote` reports them by.

    Args:
      failures: at least one.

    >>> with warnings.catch_warnings(record=True, action="always") as caught:
    ...     warn([Failure(3, "500 out of memory"), Failure(5, "timed out")])
    >>> str(caught[0].message)
    'rows 3, 5 failed and come back empty; row 3: 500 out of memory'
    """
    rows = ", ".join(str(failure.row) for failure in failures)
    first = f"row {failures[0].row}: {failures[0].error}"
    warnings.warn(f"rows {rows} failed and come back empty; {first}", RuntimeWarning, stacklevel=3)


def generate_remote(
    engine: Engine,
    prompts: Prompts,
    key: Array,
    *,
    max_new_tokens: int,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    min_new_tokens: int = 0,
    eos_ids: tuple[int, ...] = (),
    stop: Sequence[str] = (),
    pad_id: int = 0,
    report: Callable[[list[Failure]], Any] = warn,
) -> Rollout:
    """`rollouts.generate` by a server: samples `num_samples` completions of every prompt, a request
    for each.

    `sampling_logprobs` are the engine's, as it returns them.  vLLM's are of softmax(logits),
    without temperature, penalties and filters (`raw_logprobs`); started with
    `--logprobs-mode processed_logprobs` they are of the distribution that was sampled from, as
    importance weights need them.  SGLang's have the temperature and not the filters; those of
    `rollouts.server` all.

    `logprobs` copy them: what a `Rollout` promises, of softmax(logits / temperature), at
    temperature 1 without penalties and filters.  Otherwise, and because an engine rounds in its own
    way, `rescored` puts the trainer's in their place.

    Every setting is sent, so that a server's own defaults (vLLM takes them from
    generation_config.json) change nothing.

    Args:
      engine: from `openai_engine`.
      prompts: `[P, L]`, padded anywhere; without `inputs`.
      key: consumed.  A row's seed comes from it and the row's number: a rerun asks for the same.
      max_new_tokens: the most tokens sampled a row; the end token counts.
      temperature: 0 takes the likeliest token; the rollout's temperature is then 1, as `greedy()`
        has it.
      top_p, top_k, min_p: as the transforms of these names; the defaults filter nothing.
      repetition_penalty, frequency_penalty, presence_penalty: as the transforms of these names; the
        defaults change nothing.
      min_new_tokens: tokens before which no end token is sampled; what `stop` does before them is
        the server's own.
      eos_ids: tokens that end a row, beside those that the server ends it by; empty: none, not even
        the server's.
      stop: texts that end a row; it keeps the token that completes one.  The server matches them,
        in its text of the tokens.
      pad_id: what stands in `tokens` outside prompt and completion.
      report: called once with the rows that failed for good, if there are any.  They come back
        without a sampled token, `mask` and `finished` False.  `failures.extend` keeps them in a
        list.

    Returns: a `Rollout` of `B = P * num_samples` rows and `T = L + max_new_tokens` columns, as
    `generate` does.

    Raises: ValueError on wrong shapes or settings, TypeError on a mask that is not bool;
    RuntimeError where all rows failed, as
      they do when the server returns no token ids.

    >>> response = '{"choices": [{"token_ids": [7, 2], "logprobs": {"token_logprobs": [-0.5, -0.25]}, "finish_reason": "stop"}]}'
    >>> engine = openai_engine("http://localhost:8000", "policy")._replace(send=lambda path, body: response)
    >>> prompts = Prompts(jnp.array([[5, 6]]), jnp.array([[True, True]]))
    >>> rollout = generate_remote(engine, prompts, jax.random.key(0), max_new_tokens=3, eos_ids=(2,))
    >>> rollout.tokens.tolist(), rollout.logprobs.tolist()
    ([[5, 6, 7, 2, 0]], [[0.0, 0.0, -0.5, -0.25, 0.0]])
    """
    _check(
        max_new_tokens,
        num_samples,
        temperature,
        top_p,
        top_k,
        min_p,
        repetition_penalty,
        min_new_tokens,
        eos_ids,
        stop,
    )
    # A request a row, not n samples a request: each has a seed, and fails by itself.
    rows = [row for row in _rows(prompts) for _ in range(num_samples)]
    seeds = jax.random.randint(key, (len(rows),), 0, 2**31 - 1).tolist()
    settings = {
        "model": engine.model,
        "max_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": -1 if top_k is None else top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "frequency_penalty": frequency_penalty,
        "presence_penalty": presence_penalty,
        "min_tokens": min_new_tokens,
        "stop_token_ids": [int(token) for token in eos_ids],
        "stop": list(stop),
        "ignore_eos": not eos_ids,  # SGLang ignores stop_token_ids too when it is True
        "logprobs": 1,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,  # the same by another way, for servers that lack the first
    }

    def complete(row: int) -> _Completion | Failure:
        try:
            response = engine.send(
                "/v1/completions", {**settings, "prompt": [rows[row]], "seed": seeds[row]}
            )
            return _completion(response, rows[row], max_new_tokens)
        except RuntimeError as error:
            return Failure(row, str(error))

    # Threads, since a request spends all of its time waiting for the server.
    pool = ThreadPoolExecutor(engine.concurrency)
    try:
        outcomes = list(pool.map(complete, range(len(rows))))
    finally:
        # An interrupt does not wait for requests under way.
        pool.shutdown(wait=False, cancel_futures=True)
    failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    if len(failures) == len(rows):
        raise RuntimeError(f"all {len(rows)} rows failed; row 0: {failures[0].error}")
    if failures:
        report(failures)
    return _rollout(
        rows, outcomes, prompts.tokens.shape[1], max_new_tokens, temperature or 1.0, pad_id
    )


def rescored(lm: LM, params: Params, rollout: Rollout, *, chunk_size: int = 64) -> Rollout:
    """The rollout with `logprobs` by this model:
    `importance.weights(logprobs, sampling_logprobs, mask)` then corrects for what the engine does
    otherwise.

    Args:
      lm, params: the policy as the trainer has it.
      rollout: `[B, T]`.
      chunk_size: the most columns whose logits exist at a time.

    Returns: a `Rollout`; `logprobs` are of softmax(logits / temperature), 0 outside the mask.
    """
    return rollout._replace(
        logprobs=score_batch(lm, params, rollout, chunk_size=chunk_size).logprobs
    )


def load_lora_adapter(engine: Engine, folder, *, name: str | None = None) -> Engine:
    """Hands an adapter to vLLM, and waits until it is there: `POST /v1/load_lora_adapter`.

    vLLM must have been started with `--enable-lora`, a large enough `--max-lora-rank`, and
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1.

    Args:
      engine: from `openai_engine`.
      folder: that `rlhf.peft_files.save` wrote, where the server sees it too.
      name: of the adapter on the server, whose weights are replaced if it has one of that name.
        vLLM's prefix cache goes by names and would serve old weights' keys and values (its issue
        42125): start it with `--no-enable-prefix-caching`.  None: the folder's path, a new name for
        new weights.

    Returns: the engine that asks for the adapter; the one given still asks for what it did.

    Raises: RuntimeError with the server's message.

    >>> engine = openai_engine("http://localhost:8000", "base")._replace(send=lambda path, body: "")
    >>> load_lora_adapter(engine, "/runs/step-40").model
    '/runs/step-40'
    """
    path = str(Path(folder).absolute())
    body = {"lora_name": name or path, "lora_path": path, "load_inplace": name is not None}
    engine.send("/v1/load_lora_adapter", body)
    return engine._replace(model=name or path)


def update_weights_from_disk(engine: Engine, folder) -> None:
    """Hands a whole model to SGLang, and waits until it is there: `POST /update_weights_from_disk`.

    Args:
      engine: from `openai_engine`; it asks for the new weights from now on.
      folder: that `rlhf.save` wrote, where the server sees it too.

    Raises: RuntimeError with the server's message.
    """
    engine.send("/update_weights_from_disk", {"model_path": str(Path(folder).absolute())})


def _message(refusal: urllib.error.HTTPError) -> str:
    """What a refusal says, in OpenAI's form, SGLang's, or none."""
    text = str(refusal.reason)
    with (
        refusal,
        contextlib.suppress(
            OSError, HTTPException, ValueError, LookupError, TypeError, AttributeError
        ),
    ):
        text = refusal.read().decode(errors="replace")[:2000]
        content = json.loads(text)
        text = content.get("error", content)["message"]
    return text


def _check(
    max_new_tokens,
    num_samples,
    temperature,
    top_p,
    top_k,
    min_p,
    penalty,
    min_new_tokens,
    eos_ids,
    stop,
) -> None:
    if max_new_tokens < 1 or num_samples < 1:
        raise ValueError(
            f"max_new_tokens and num_samples must be at least 1, but are {max_new_tokens} and "
            f"{num_samples}"
        )
    if not (
        temperature >= 0 and 0 < top_p <= 1 and 0 <= min_p <= 1 and (top_k is None or top_k >= 1)
    ):
        raise ValueError(
            "temperature >= 0, 0 < top_p <= 1, 0 <= min_p <= 1, and top_k >= 1 or None, "
            f"but they are {temperature}, {top_p}, {min_p} and {top_k}"
        )
    if not (penalty > 0 and 0 <= min_new_tokens <= max_new_tokens):
        raise ValueError(
            "repetition_penalty > 0 and 0 <= min_new_tokens <= max_new_tokens, "
            f"but they are {penalty}, {min_new_tokens} and {max_new_tokens}"
        )
    if isinstance(stop, str) or not all(stop):
        raise ValueError(f"stop must be a list of texts that are not empty, but is {stop!r}")
    if isinstance(eos_ids, int):
        raise TypeError(f"eos_ids must be a tuple of tokens, but is {eos_ids}; write ({eos_ids},)")


def _rows(prompts: Prompts) -> list[list[int]]:
    """The ids of each prompt, without padding."""
    if prompts.inputs is not None:
        raise ValueError(
            "prompts.inputs cannot be sent to a server; generate_remote takes prompts of tokens "
            "alone"
        )
    prompts = Prompts(np.asarray(prompts.tokens), np.asarray(prompts.mask))
    check_prompts(prompts)
    if not len(prompts.mask):
        raise ValueError(
            f"prompts.tokens {list(prompts.tokens.shape)} has no rows; generate_remote needs at "
            "least one prompt"
        )
    return [row[keep].tolist() for row, keep in zip(prompts.tokens, prompts.mask, strict=True)]


def _completion(response: str, prompt: list[int], max_new_tokens: int) -> _Completion:
    """Reads and checks the one choice of a response."""
    try:
        choice = json.loads(response)["choices"][0]
        tokens = _token_ids(choice)
        reason = choice["finish_reason"]
        logprobs = [float(x) for x in choice["logprobs"]["token_logprobs"]]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise RuntimeError(
            f"the response is no completion with log-probs: {response[:500]}"
        ) from None
    # A server may add a start token of its own: its log-probs would be of another prompt.
    if (read := choice.get("prompt_token_ids")) not in (None, prompt):
        raise RuntimeError(f"the server read the prompt as {read}, but {prompt} was sent")
    if (
        len(tokens) != len(logprobs)
        or len(tokens) > max_new_tokens
        or not all(map(math.isfinite, logprobs))
    ):
        raise RuntimeError(
            f"{len(tokens)} tokens but {len(logprobs)} log-probs, of at most {max_new_tokens} and "
            f"all finite: {response[:500]}"
        )
    if reason not in ("stop", "length"):
        raise RuntimeError(f"the server ended the row with {reason!r}, neither 'stop' nor 'length'")
    return _Completion(tokens, logprobs, reason == "stop")


def _token_ids(choice: dict) -> list[int]:
    if choice.get("token_ids") is not None:
        return choice["token_ids"]
    # Servers without `token_ids` write each id as a "token_id:7" in place of its text.
    names = choice["logprobs"]["tokens"]
    if not all(name.startswith("token_id:") for name in names):
        raise RuntimeError(
            "the server returns text without token ids, which cannot be trained on: the same text "
            "may be other tokens; "
            "vLLM since 0.10 and a recent SGLang return them (return_token_ids)"
        )
    return [int(name.removeprefix("token_id:")) for name in names]


def _rollout(
    rows, outcomes, start: int, max_new_tokens: int, temperature: float, pad_id: int
) -> Rollout:
    """Prompts that end in column `start`, and what was sampled after them."""
    shape = len(rows), start + max_new_tokens
    tokens = np.full(shape, pad_id, np.int32)
    mask = np.zeros(shape, bool)
    real = np.zeros(shape, np.int32)
    logprobs = np.zeros(shape, np.float32)
    finished = np.zeros(len(rows), bool)
    for i, (prompt, outcome) in enumerate(zip(rows, outcomes, strict=True)):
        # A failed row has no sampled token; it weighs nothing in a loss.
        done = _Completion([], [], False) if isinstance(outcome, Failure) else outcome
        # Prompts end in column `start`, so that completions begin in the same one.
        real_columns = slice(start - len(prompt), start + len(done.tokens))
        sampled = slice(start, start + len(done.tokens))
        tokens[i, real_columns] = prompt + done.tokens
        real[i, real_columns] = 1
        mask[i, sampled] = True
        logprobs[i, sampled] = done.logprobs
        finished[i] = done.finished
    return Rollout(
        tokens=jnp.asarray(tokens),
        mask=jnp.asarray(mask),
        positions=jnp.asarray(np.where(real, real.cumsum(1) - 1, 0).astype(np.int32)),
        segment_ids=jnp.asarray(real),
        logprobs=jnp.asarray(logprobs),
        sampling_logprobs=jnp.asarray(logprobs),
        finished=jnp.asarray(finished),
        temperature=jnp.float32(temperature),
    )
