"""A small server that speaks OpenAI's protocol, over `rollouts.generate`: for trying and for tests,
not for speed.

    python -m rlhf.rollouts.server FOLDER --port 8000

It answers `/v1/completions`, `/v1/models` and `/health`, and takes new weights as vLLM
(`/v1/load_lora_adapter`) and SGLang (`/update_weights_from_disk`) do.  Log-probs are of the
distribution that was sampled from, after penalties, temperature and filters; at temperature 0 of
softmax(logits).  A stop string cuts the text, and never the token ids, which hold the token that
completed it.  There is no access control: who reaches the port may have it load any folder.
"""

import argparse
import json
import random
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from functools import lru_cache
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from rlhf.lm import LM, Params
from rlhf.rollouts import samplers, stopping
from rlhf.rollouts.generate import generate
from rlhf.rollouts.json_http import Refused, decoded, integer, json_server, number, text
from rlhf.rollouts.types import Array, Prompts, Rollout

LEAST = 16  # columns of the shortest programs, of prompts and of completions; states of the smallest automaton
REFUSED: dict[str, Any] = {  # settings of the protocol that change the response and are not here -> what they may be
    "stream": False, "echo": False, "suffix": "", "best_of": 1, "use_beam_search": False, "bad_words": [],
    "allowed_token_ids": [], "skip_special_tokens": True, "response_format": {"type": "text"},
}  # fmt: skip
EDITS: dict[str, Any] = {  # settings that change logits before the temperature -> where they change nothing
    "logit_bias": {}, "min_tokens": 0, "repetition_penalty": 1, "frequency_penalty": 0, "presence_penalty": 0,
}  # fmt: skip


def serve(
    lm: LM, params: Params, tokenizer, *, host: str = "127.0.0.1", port: int = 8000, **settings
) -> None:
    """Serves until it is interrupted; arguments as `http_server` has them."""
    with http_server(lm, params, tokenizer, host=host, port=port, **settings) as server:
        print(f"listening on http://{host}:{server.server_address[1]}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


def http_server(
    lm: LM,
    params: Params,
    tokenizer,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    model: str = "rlhf",
    eos_ids: Sequence[int] = (),
    family: str | None = None,
) -> ThreadingHTTPServer:
    """A server that listens; `serve_forever` answers.  Requests wait for each other; each is one
    batch.

    Args:
      lm, params: the model; `generate` runs it.
      tokenizer: of `transformers`, or None: prompts are then token ids, and texts empty.
      host, port: where it listens; port 0 takes a free one, `server_address[1]`.
      model: the name that requests give.
      eos_ids: tokens that end a row unless a request has `ignore_eos`; `stop_token_ids` come beside
        them.
      family: a model type of `FAMILIES`, by which adapters are read; None: they are refused.

    >>> from urllib.request import urlopen
    >>> from rlhf.models import TransformerConfig, transformer
    >>> lm = transformer(TransformerConfig(vocab_size=8, hidden_size=4, num_layers=1, num_heads=1, mlp_size=8))
    >>> with http_server(lm, {}, None, port=0) as server:
    ...     threading.Thread(target=server.handle_request).start()
    ...     with urlopen(f"http://127.0.0.1:{server.server_address[1]}/v1/models") as response:
    ...         json.load(response)["data"][0]["id"]
    'rlhf'
    """
    posts, gets = _routes(lm, params, tokenizer, model, tuple(eos_ids), family)

    def handle(command: str, path: str, data: bytes) -> dict:
        routes = posts if command == "POST" else gets
        if path not in routes:
            raise Refused(404, f"{command} {path} is not served; known: {', '.join(routes)}")
        try:
            return routes[path](decoded(data)) if command == "POST" else routes[path]()
        except (ValueError, OSError) as error:
            raise Refused(400, str(error)) from error

    return json_server(handle, host=host, port=port)


def _routes(
    lm, params, tokenizer, model, eos_ids, family
) -> tuple[dict[str, Callable], dict[str, Callable]]:
    """What serves POST and GET by path; they share the models and one lock."""
    lock = threading.Lock()
    # The first is the model itself, all others are adapters of it.
    models = {model: (lm, params)}

    def completions(body: dict) -> dict:
        name = text({"model": model} | body, "model")
        named = _tokens(body.get("stop_token_ids") or [], "stop_token_ids")
        ends = tuple(sorted({*named, *(() if body.get("ignore_eos") else eos_ids)}))
        with lock:
            if name not in models:
                raise Refused(404, f"the model {name!r} does not exist; known: {', '.join(models)}")
            return {"model": name} | _completions(*models[name], tokenizer, body, ends)

    def load_lora_adapter(body: dict) -> dict:
        from rlhf import adapters, peft_files

        name = text(body, "lora_name")
        path = text(body, "lora_path")
        if family is None:
            raise ValueError("this server was started without a family, by which adapters are read")
        if name == model or (name in models and not body.get("load_inplace")):
            raise ValueError(
                f"{name!r} has already been loaded; give another name, or an adapter's with "
                "load_inplace"
            )
        with lock:
            models[name] = (
                models[model][0],
                adapters.join(*peft_files.load(path, *models[model], family)),
            )
        return {"success": True, "message": f"{name} is loaded"}

    def update_weights_from_disk(body: dict) -> dict:
        from rlhf.models import huggingface
        from rlhf.models.huggingface_config import config_of, decoder_of

        config = decoder_of(config_of(models[model][0]))
        with lock:
            new = huggingface.load(
                text(body, "model_path"), dtype=config.dtype, param_dtype=config.param_dtype
            )
            # Adapters were trained on the old weights: they go with them.
            models.clear()
            models[model] = new[:2]
        return {"success": True, "message": "the weights are new"}

    def listed() -> dict:
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "owned_by": "rlhf"} for name in list(models)],
        }

    posts = {
        "/v1/completions": completions,
        "/v1/load_lora_adapter": load_lora_adapter,
        "/update_weights_from_disk": update_weights_from_disk,
    }
    return posts, {"/v1/models": listed, "/health": dict}


def _completions(lm: LM, params: Params, tokenizer, body: dict, eos_ids: tuple[int, ...]) -> dict:
    """The response to a request, without the model's name."""
    for name in _given(body, REFUSED):
        raise ValueError(f"{name} = {body[name]!r} is not supported by this server; leave it out")
    vocabulary = _vocabulary(lm, params)
    # Everything that a request may have wrong is found before the model runs.
    prompts = _prompts(body.get("prompt"), tokenizer, vocabulary)
    strings = _stop(body, tokenizer)
    copies = integer(body, "n", 1)
    most = integer(body, "max_tokens", 16)
    sampler = _sampler(body, vocabulary, eos_ids, most)
    key = jax.random.key(integer(body, "seed", random.getrandbits(31), least=-(2**63)) % 2**31)
    rows = [prompt for prompt in prompts for _ in range(copies)]
    stop = _automaton(tokenizer, strings) if strings else None
    # All rows of a request are one batch, and so one program.
    rollout, start = _sample(
        lm, params, rows, key, most, sampler=sampler, eos_ids=eos_ids, stop=stop
    )
    # A greedy sampler has probability 1 for its token: there the unfiltered ones say more.
    logprobs = rollout.sampling_logprobs if body.get("temperature") != 0 else rollout.logprobs
    choices = []
    for i, prompt in enumerate(rows):
        here = slice(start, start + min(int(rollout.mask[i].sum()), most))
        tokens = rollout.tokens[i, here].tolist()
        choices.append(
            _choice(
                i, prompt, tokens, logprobs[i, here].tolist(), eos_ids, strings, tokenizer, body
            )
        )
    read = sum(map(len, prompts))
    written = int(sum(len(choice["token_ids"]) for choice in choices))
    if not body.get("return_token_ids"):
        choices = [
            {k: v for k, v in choice.items() if not k.endswith("token_ids")} for choice in choices
        ]
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "choices": choices,
        "usage": {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
        },
    }


def _sample(lm, params, rows, key, most, **settings) -> tuple[Rollout, int]:
    """A rollout on the host and its first new column: sizes are powers of two, so that few programs
    compile.
    """
    batch = _power(len(rows))
    start = _power(max(map(len, rows)), LEAST)
    new = _power(most, LEAST)
    tokens = np.zeros((batch, start), np.int32)
    mask = np.zeros((batch, start), bool)
    for i in range(batch):
        # The rows that round a batch up repeat the last one; nobody reads them.
        row = rows[min(i, len(rows) - 1)]
        tokens[i, start - len(row) :] = row
        mask[i, start - len(row) :] = True
    prompts = Prompts(jnp.asarray(tokens), jnp.asarray(mask))
    return jax.device_get(generate(lm, params, prompts, key, max_new_tokens=new, **settings)), start


def _choice(index, prompt, tokens, logprobs, eos_ids, strings, tokenizer, body) -> dict:
    as_ids = tokenizer is None or body.get("return_tokens_as_token_ids")
    names = (
        [f"token_id:{token}" for token in tokens]
        if as_ids
        else tokenizer.convert_ids_to_tokens(tokens)
    )
    wanted = body.get("logprobs") is not None
    # Text is made for the reader alone; the token ids are what is trained on.
    said = "" if tokenizer is None else tokenizer.decode(tokens, skip_special_tokens=True)
    reason = tokens[-1] if tokens[-1] in (body.get("stop_token_ids") or ()) else None
    if found := _found(tokenizer, tokens, strings):
        reason, from_start, from_end = found
        said = said[
            : max(
                0, len(said) - (from_end if body.get("include_stop_str_in_output") else from_start)
            )
        ]
    return {
        "index": index,
        "text": said,
        "finish_reason": "stop" if found or tokens[-1] in eos_ids else "length",
        "stop_reason": reason,
        "logprobs": {"tokens": names, "token_logprobs": logprobs, "top_logprobs": None}
        if wanted
        else None,
        "token_ids": tokens,
        "prompt_token_ids": prompt,
    }


def _stop(body: dict, tokenizer) -> tuple[str, ...]:
    """The stop strings of a request."""
    stop = body.get("stop") or []
    strings = (
        (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list) else (None,)
    )
    if not all(isinstance(string, str) and string for string in strings):
        raise ValueError(
            f"stop must be a text that is not empty, or a list of them, but is {stop!r}"
        )
    if strings and tokenizer is None:
        raise ValueError(
            "this server has no tokenizer to match stop strings by: give stop_token_ids"
        )
    special = stopping.special_tokens(tokenizer).items() if strings else ()
    if named := [
        (token, piece) for token, piece in special if any(piece in string for string in strings)
    ]:
        token, piece = named[0]
        raise ValueError(
            f"stop has the special token {piece!r}, which texts leave out: give stop_token_ids = "
            f"[{token}] for it"
        )
    if strings and body.get("min_tokens"):
        raise ValueError(
            f"min_tokens = {body['min_tokens']!r} holds back end tokens, but not stop strings: "
            "leave one out"
        )
    return strings


_token_bytes = lru_cache(maxsize=1)(stopping.token_bytes)


@lru_cache(maxsize=4)
def _automaton(tokenizer, strings: tuple[str, ...]) -> Array:
    """`stop_strings` with a power of two of states, so that few programs compile; nothing leads to
    those added.
    """
    table = np.asarray(stopping.stop_strings(tokenizer, strings))
    stopped = table.shape[1] - 1
    last = _power(table.shape[1], LEAST) - 1
    return jnp.asarray(
        np.pad(np.where(table == stopped, last, table), ((0, 0), (0, last - stopped)), mode="edge")
    )


def _found(tokenizer, tokens: list[int], strings: tuple[str, ...]) -> tuple[str, int, int] | None:
    """The stop string that is complete first, of several the longest, and how many characters stand
    from its start and its end on: counted from the end of the text, since a decoder may leave out
    the space that a text begins with."""
    pieces = _token_bytes(tokenizer) if strings else []
    # 0xff is in no UTF-8: a token beyond the tokenizer's never is part of a string.
    said = b"".join(pieces[token] if token < len(pieces) else b"\xff" for token in tokens)
    places = {string: at for string in strings if (at := said.find(string.encode())) >= 0}
    if not places:
        return None
    # The one that ends first; of those that end in one place the one that starts first.
    first = min(places, key=lambda string: (places[string] + len(string.encode()), places[string]))
    rest = len(said[places[first] :].decode(errors="replace"))
    return first, rest, rest - len(first)


def _sampler(body: dict, vocabulary: int, eos_ids: tuple[int, ...], most: int) -> samplers.Sampler:
    """vLLM's transforms in its order.  Settings are arrays: one program serves all that edit
    logits, one all that do not.
    """
    value = lambda name, default: float(number(body, name, default))
    edits: tuple[Callable, ...] = ()
    if _given(body, EDITS):
        least = integer(body, "min_tokens", 0, least=0)
        if least > most:
            raise ValueError(
                f"min_tokens is {least} but max_tokens {most}; it must be at most that"
            )
        edits = (
            _bias(body.get("logit_bias") or {}, vocabulary),
            samplers.min_new_tokens(least, eos_ids),
            samplers.repetition_penalty(value("repetition_penalty", 1)),
            samplers.frequency_penalty(value("frequency_penalty", 0)),
            samplers.presence_penalty(value("presence_penalty", 0)),
        )
    temperature = value("temperature", 1)
    k = int(number(body, "top_k", -1))
    if temperature == 0:
        return samplers.sampler(*edits, *samplers.greedy().transforms)
    filters = (
        samplers.min_p(value("min_p", 0)),
        # "No limit" as a huge k, so that requests with and without one share a program.
        samplers.top_k(k if k > 0 else 2**31 - 1),
        samplers.top_p(value("top_p", 1)),
    )
    return samplers.sampler(*edits, *filters, temperature=temperature)


def _bias(biases, vocabulary: int) -> Partial:
    """The transform that adds to the logits of tokens, as they are before the temperature."""
    bias = np.zeros(vocabulary, np.float32)
    if not isinstance(biases, dict):
        raise ValueError(
            f"logit_bias must be an object of token ids and numbers, but is {biases!r}"
        )
    for token in biases:
        if (
            not token.isdecimal()
            or int(token) >= vocabulary
            or not abs(number(biases, token, 0)) <= 100
        ):
            raise ValueError(
                f"logit_bias has {biases[token]!r} for token {token!r}; tokens are below "
                f"{vocabulary}, numbers in -100 … 100"
            )
        bias[int(token)] = number(biases, token, 0)
    return Partial(_add_bias, bias=jnp.asarray(bias))


def _add_bias(logits, step, *, bias):
    return logits + (bias / step.temperature).astype(logits.dtype)[None, :]


def _given(body: dict, settings: dict[str, Any]) -> list[str]:
    """Which settings a request has that are neither null nor what changes nothing."""
    return [name for name, neutral in settings.items() if body.get(name) not in (None, neutral)]


def _prompts(prompt, tokenizer, vocabulary: int) -> list[list[int]]:
    """The rows of a request's prompt: a text, texts, token ids, or lists of them."""
    several = (
        prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
        else [prompt]
    )
    if tokenizer is None and any(isinstance(one, str) for one in several):
        raise ValueError("this server has no tokenizer: give prompts as lists of token ids")
    rows = [
        tokenizer.encode(one) if isinstance(one, str) else _tokens(one, "prompt") for one in several
    ]
    for i, row in enumerate(rows):
        if not row or max(row) >= vocabulary:
            raise ValueError(
                f"prompt {i} must have a token, and all of them below {vocabulary}, but is {row}"
            )
    return rows


def _vocabulary(lm: LM, params: Params) -> int:
    def logits(params, one):
        return lm.unembed(params, lm.hidden(params, one, positions=one, segment_ids=one)[0])

    return jax.eval_shape(logits, params, jax.ShapeDtypeStruct((1, 1), jnp.int32)).shape[-1]


def _tokens(value, name: str) -> list[int]:
    if not isinstance(value, list) or not all(type(token) is int and token >= 0 for token in value):
        raise ValueError(
            f"{name} must be a list of token ids, or for prompts a text or several of either, but "
            f"is {value!r}"
        )
    return value


def _power(number: int, least: int = 1) -> int:
    return max(least, 1 << (number - 1).bit_length())


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m rlhf.rollouts.server FOLDER`: serves a folder that `rlhf.load` reads."""
    from rlhf.models import huggingface

    parser = argparse.ArgumentParser(
        prog="python -m rlhf.rollouts.server", description="serve a model to OpenAI's clients"
    )
    parser.add_argument("folder", type=Path, help="with config.json and model.safetensors")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--model", default="rlhf", help="the name that requests give")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    given = parser.parse_args(arguments)
    if not (given.folder / "config.json").exists():
        sys.exit(f"{given.folder} has no config.json")
    lm, params, tokenizer = huggingface.load(given.folder, dtype=jnp.dtype(given.dtype))
    settings = {
        k: v
        for name in ("config.json", "generation_config.json")
        for k, v in _settings(given.folder / name).items()
    }
    ends = settings.get("eos_token_id") or []
    where = dict(host=given.host, port=given.port, model=given.model, family=settings["model_type"])
    serve(lm, params, tokenizer, **where, eos_ids=[ends] if isinstance(ends, int) else ends)


def _settings(file: Path) -> dict:
    return json.loads(file.read_text()) if file.exists() else {}


if __name__ == "__main__":
    main()
