"""A small server that speaks OpenAI's protocol, over `rollouts.generate`: for trying and for tests, not for speed.

    python -m rlhf.rollouts.server FOLDER --port 8000

It answers `/v1/completions`, `/v1/models` and `/health`, and takes new weights as vLLM (`/v1/load_lora_adapter`) and SGLang
(`/update_weights_from_disk`) do.  Log-probs are of the distribution that was sampled from, after temperature and filters; at
temperature 0 of softmax(logits).  There is no access control: who reaches the port may have it load any folder.
"""

import argparse
import json
import random
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf.lm import LM, Params
from rlhf.rollouts import samplers
from rlhf.rollouts.generate import generate
from rlhf.rollouts.types import Prompts, Rollout

LEAST = 16  # columns of the shortest programs, of prompts and of completions
REFUSED: dict[str, Any] = {  # settings of the protocol that change the answer and are not here -> what they may be
    "stream": False, "echo": False, "suffix": "", "stop": [], "best_of": 1, "logit_bias": {}, "min_tokens": 0,
    "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1,
}  # fmt: skip


class NotFound(Exception):
    """Becomes status 404."""


class _Server(ThreadingHTTPServer):
    request_queue_size = 256  # clients send hundreds of rows at once; the system drops what finds no place


def serve(lm: LM, params: Params, tokenizer, *, host: str = "127.0.0.1", port: int = 8000, **settings) -> None:
    """Answers until it is interrupted; arguments as `http_server` has them."""
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
    """A server that listens; `serve_forever` answers.  Requests wait for each other; each is one batch.

    Args:
      lm, params: the model; `generate` runs it.
      tokenizer: of `transformers`, or None: prompts are then token ids, and texts empty.
      host, port: where it listens; port 0 takes a free one, `server_address[1]`.
      model: the name that requests give.
      eos_ids: tokens that end a row unless a request has `ignore_eos`; `stop_token_ids` come beside them.
      family: a model type of `FAMILIES`, by which adapters are read; None: they are refused.

    >>> from urllib.request import urlopen
    >>> from rlhf.models import TransformerConfig, transformer
    >>> lm = transformer(TransformerConfig(vocab_size=8, hidden_size=4, num_layers=1, num_heads=1, mlp_size=8))
    >>> with http_server(lm, {}, None, port=0) as server:
    ...     threading.Thread(target=server.handle_request).start()
    ...     with urlopen(f"http://127.0.0.1:{server.server_address[1]}/v1/models") as answer:
    ...         json.load(answer)["data"][0]["id"]
    'rlhf'
    """
    posts, gets = _routes(lm, params, tokenizer, model, tuple(eos_ids), family)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(gets, lambda: ())

        def do_POST(self):
            self.answer(posts, lambda: (_json(self.rfile.read(int(self.headers.get("Content-Length", 0)))),))

        def answer(self, routes: dict[str, Callable], read: Callable):
            try:
                if self.path not in routes:
                    raise NotFound(f"{self.command} {self.path} is not served; known: {', '.join(routes)}")
                code, content = 200, routes[self.path](*read())
            except NotFound as error:
                code, content = 404, _error(error, "NotFoundError", 404)
            except (ValueError, OSError) as error:
                code, content = 400, _error(error, "BadRequestError", 400)
            except Exception as error:
                traceback.print_exc()
                code, content = 500, _error(error, "InternalServerError", 500)
            data = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            """Quiet: a batch is hundreds of requests."""

    return _Server((host, port), Handler)


def _routes(lm, params, tokenizer, model, eos_ids, family) -> tuple[dict[str, Callable], dict[str, Callable]]:
    """What answers POST and GET by path; they share the models and one lock."""
    lock = threading.Lock()
    models = {model: (lm, params)}  # those beside the first are adapters of it

    def completions(body: dict) -> dict:
        name = _text({"model": model} | body, "model")
        ends = (*_tokens(body.get("stop_token_ids") or [], "stop_token_ids"), *(() if body.get("ignore_eos") else eos_ids))
        with lock:
            if name not in models:
                raise NotFound(f"the model {name!r} does not exist; known: {', '.join(models)}")
            return {"model": name} | _completions(*models[name], tokenizer, body, tuple(sorted(set(ends))))

    def load_lora_adapter(body: dict) -> dict:
        from rlhf import adapters, peft_files

        name, path = _text(body, "lora_name"), _text(body, "lora_path")
        if family is None:
            raise ValueError("this server was started without a family, by which adapters are read")
        if name == model or (name in models and not body.get("load_inplace")):
            raise ValueError(f"{name!r} has already been loaded; give another name, or an adapter's with load_inplace")
        with lock:
            models[name] = models[model][0], adapters.join(*peft_files.load(path, *models[model], family))
        return {"success": True, "message": f"{name} is loaded"}

    def update_weights_from_disk(body: dict) -> dict:
        from rlhf.models import huggingface
        from rlhf.models.huggingface_config import config_of, decoder_of

        config = decoder_of(config_of(models[model][0]))
        with lock:
            new = huggingface.load(_text(body, "model_path"), dtype=config.dtype, param_dtype=config.param_dtype)
            models.clear()  # adapters of the old weights go with them
            models[model] = new[:2]
        return {"success": True, "message": "the weights are new"}

    def listed() -> dict:
        return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "rlhf"} for name in list(models)]}

    posts = {
        "/v1/completions": completions,
        "/v1/load_lora_adapter": load_lora_adapter,
        "/update_weights_from_disk": update_weights_from_disk,
    }
    return posts, {"/v1/models": listed, "/health": dict}


def _completions(lm: LM, params: Params, tokenizer, body: dict, eos_ids: tuple[int, ...]) -> dict:
    """The answer to a request, without the model's name."""
    for name, neutral in REFUSED.items():
        if body.get(name) not in (None, neutral):
            raise ValueError(f"{name} = {body[name]!r} is not supported; leave it out")
    prompts = _prompts(body.get("prompt"), tokenizer, _vocabulary(lm, params))
    number, most = _whole(body, "n", 1), _whole(body, "max_tokens", 16)
    greedy = body.get("temperature") == 0
    sampler = samplers.greedy() if greedy else _sampler(body)
    key = jax.random.key(_whole(body, "seed", random.getrandbits(31), least=-(2**63)) % 2**31)
    rows = [prompt for prompt in prompts for _ in range(number)]
    rollout, start = _sample(lm, params, rows, key, most, sampler, eos_ids)
    logprobs = rollout.logprobs if greedy else rollout.sampling_logprobs
    choices = []
    for i, prompt in enumerate(rows):
        count = min(int(rollout.mask[i].sum()), most)
        here = slice(start, start + count)
        tokens = rollout.tokens[i, here].tolist()
        choices.append(_choice(i, prompt, tokens, logprobs[i, here].tolist(), tokens[-1] in eos_ids, tokenizer, body))
    read, written = sum(map(len, prompts)), int(sum(len(choice["token_ids"]) for choice in choices))
    if not body.get("return_token_ids"):
        choices = [{k: v for k, v in choice.items() if not k.endswith("token_ids")} for choice in choices]
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "choices": choices,
        "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
    }


def _sample(lm, params, rows, key, most, sampler, eos_ids) -> tuple[Rollout, int]:
    """A rollout on the host and its first new column: sizes are powers of two, so that few programs compile."""
    batch, start, new = _power(len(rows)), _power(max(map(len, rows)), LEAST), _power(most, LEAST)
    tokens, mask = np.zeros((batch, start), np.int32), np.zeros((batch, start), bool)
    for i in range(batch):
        row = rows[min(i, len(rows) - 1)]  # those too many repeat the last
        tokens[i, start - len(row) :], mask[i, start - len(row) :] = row, True
    prompts = Prompts(jnp.asarray(tokens), jnp.asarray(mask))
    return jax.device_get(generate(lm, params, prompts, key, max_new_tokens=new, sampler=sampler, eos_ids=eos_ids)), start


def _choice(index, prompt, tokens, logprobs, ended, tokenizer, body) -> dict:
    as_ids = tokenizer is None or body.get("return_tokens_as_token_ids")
    names = [f"token_id:{token}" for token in tokens] if as_ids else tokenizer.convert_ids_to_tokens(tokens)
    wanted = body.get("logprobs") is not None
    return {
        "index": index,
        "text": "" if tokenizer is None else tokenizer.decode(tokens, skip_special_tokens=True),
        "finish_reason": "stop" if ended else "length",
        "logprobs": {"tokens": names, "token_logprobs": logprobs, "top_logprobs": None} if wanted else None,
        "token_ids": tokens,
        "prompt_token_ids": prompt,
    }


def _sampler(body: dict) -> samplers.Sampler:
    """All filters every time, so that settings are arrays and one program serves them; in vLLM's order."""
    value = lambda name, default: float(_number(body, name, default))
    k = int(_number(body, "top_k", -1))
    return samplers.sampler(
        samplers.min_p(value("min_p", 0)),
        samplers.top_k(k if k > 0 else 2**31 - 1),
        samplers.top_p(value("top_p", 1)),
        temperature=value("temperature", 1),
    )


def _prompts(prompt, tokenizer, vocabulary: int) -> list[list[int]]:
    """The rows of a request's prompt: a text, texts, token ids, or lists of them."""
    several = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
    if tokenizer is None and any(isinstance(one, str) for one in several):
        raise ValueError("this server has no tokenizer: give prompts as lists of token ids")
    rows = [tokenizer.encode(one) if isinstance(one, str) else _tokens(one, "prompt") for one in several]
    for i, row in enumerate(rows):
        if not row or max(row) >= vocabulary:
            raise ValueError(f"prompt {i} must have a token, and all of them below {vocabulary}, but is {row}")
    return rows


def _vocabulary(lm: LM, params: Params) -> int:
    def logits(params, one):
        return lm.unembed(params, lm.hidden(params, one, positions=one, segment_ids=one)[0])

    return jax.eval_shape(logits, params, jax.ShapeDtypeStruct((1, 1), jnp.int32)).shape[-1]


def _tokens(value, name: str) -> list[int]:
    if not isinstance(value, list) or not all(type(token) is int and token >= 0 for token in value):
        raise ValueError(f"{name} must be a list of token ids, or for prompts a text or several of either, but is {value!r}")
    return value


def _number(body: dict, name: str, default):
    value = default if body.get(name) is None else body[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, but is {value!r}")
    return value


def _whole(body: dict, name: str, default: int, *, least: int = 1) -> int:
    value = _number(body, name, default)
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number and at least {least}, but is {value!r}")
    return value


def _text(body: dict, name: str) -> str:
    if not isinstance(body.get(name), str):
        raise ValueError(f"{name} must be a text, but is {body.get(name)!r}")
    return body[name]


def _power(number: int, least: int = 1) -> int:
    return max(least, 1 << (number - 1).bit_length())


def _json(data: bytes) -> dict:
    body = json.loads(data)
    if not isinstance(body, dict):
        raise ValueError(f"the body must be a JSON object, but is {body!r}")
    return body


def _error(error: Exception, kind: str, code: int) -> dict:
    return {"error": {"message": str(error), "type": kind, "param": None, "code": code}}


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m rlhf.rollouts.server FOLDER`: serves a folder that `rlhf.load` reads."""
    from rlhf.models import huggingface

    parser = argparse.ArgumentParser(prog="python -m rlhf.rollouts.server", description="serve a model to OpenAI's clients")
    parser.add_argument("folder", type=Path, help="with config.json and model.safetensors")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--model", default="rlhf", help="the name that requests give")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    given = parser.parse_args(arguments)
    if not (given.folder / "config.json").exists():
        sys.exit(f"{given.folder} has no config.json")
    lm, params, tokenizer = huggingface.load(given.folder, dtype=jnp.dtype(given.dtype))
    settings = {k: v for name in ("config.json", "generation_config.json") for k, v in _settings(given.folder / name).items()}
    ends = settings.get("eos_token_id") or []
    where = dict(host=given.host, port=given.port, model=given.model, family=settings["model_type"])
    serve(lm, params, tokenizer, **where, eos_ids=[ends] if isinstance(ends, int) else ends)


def _settings(file: Path) -> dict:
    return json.loads(file.read_text()) if file.exists() else {}


if __name__ == "__main__":
    main()
