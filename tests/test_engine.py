"""Outside engines: a server process answers what `generate` does here, takes new weights, and what fails says so."""

import contextlib
import json
import math
import shutil
import subprocess
import sys
import threading
import types
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

import rlhf
from rlhf import adapters, losses, peft_files, rollouts
from rlhf.models import TransformerConfig, transformer
from rlhf.rollouts import engine as engines
from rlhf.rollouts import samplers
from rlhf.rollouts import server as servers

HERE = Path(__file__).parent
TOKENIZER = HERE / "checkpoints" / "tokenizer"
KEY = jax.random.key(0)
NEW = 8
PROMPTS = rollouts.Prompts(
    jnp.array([[3, 4, 5], [0, 6, 7], [8, 0, 0]]),
    jnp.array([[True, True, True], [False, True, True], [True, False, False]]),
)
ENDS = (
    2,
    *range(0, 100, 7),
)  # the server's own, and enough others that some rows end and some do not


@pytest.fixture(scope="module")
def model():
    lm = transformer(
        TransformerConfig(
            100, 16, num_layers=1, num_heads=4, num_kv_heads=2, mlp_size=32, qkv_bias=True
        )
    )
    # Far from uniform; of logits above 20 float32 on some processors would lose more than is compared.
    return lm, jax.tree.map(lambda x: 2.0 * x, lm.init(KEY))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """The model as `rlhf.load` reads it, with a tokenizer."""
    folder = tmp_path_factory.mktemp("engine") / "served"
    rlhf.save(folder, *model, family="qwen2", eos_token_id=2)
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@contextlib.contextmanager
def running(server):
    """The url of a server that answers in a thread."""
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def server(model, folder):
    """An engine that asks a process of `python -m rlhf.rollouts.server`."""
    command = [
        sys.executable,
        "-m",
        "rlhf.rollouts.server",
        str(folder),
        "--port",
        "0",
        "--model",
        "policy",
    ]
    with (
        open(folder / "errors", "w") as errors,
        subprocess.Popen(
            command, cwd=HERE.parent, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        try:
            greedily(model)  # compiles while the server starts
            line = process.stdout.readline()
            assert line.startswith("listening on "), (folder / "errors").read_text()
            url = line.split()[-1]
            with urllib.request.urlopen(f"{url}/health", timeout=60) as answer:
                assert answer.status == 200
            yield engines.openai_engine(
                url + "/v1", "policy", concurrency=8, retries=0, timeout=120
            )
        finally:
            process.terminate()


def ask(engine, key=KEY, prompts=PROMPTS, **settings):
    return engines.generate_remote(
        engine, prompts, key, **dict(max_new_tokens=NEW, eos_ids=ENDS) | settings
    )


def greedily(model, **changes):
    lm, params = model
    settings = (
        dict(max_new_tokens=NEW, num_samples=2, sampler=rollouts.greedy(), eos_ids=ENDS) | changes
    )
    return rollouts.generate(lm, settings.pop("params", params), PROMPTS, KEY, **settings)


def assert_same(remote, local):
    for name in ("tokens", "mask", "positions", "segment_ids", "finished", "temperature"):
        np.testing.assert_array_equal(getattr(remote, name), getattr(local, name), err_msg=name)
        assert getattr(remote, name).dtype == getattr(local, name).dtype, name
    np.testing.assert_allclose(remote.logprobs, local.logprobs, atol=1e-5)


# --- a server process --------------------------------------------------------------------------------------------------


def test_greedy_rows_equal_those_of_generate(server, model):
    remote = ask(server, temperature=0, num_samples=2)
    assert_same(remote, greedily(model))
    assert 0 < remote.finished.sum() < 6


def test_sampled_rows_have_the_logprobs_of_the_model(server, model):
    remote = ask(server, temperature=0.7, num_samples=2)
    assert remote.tokens.shape == (6, 3 + NEW)
    assert remote.temperature == np.float32(0.7)
    ours = engines.rescored(*model, remote)
    np.testing.assert_allclose(ours.logprobs, remote.sampling_logprobs, atol=1e-5)
    assert np.std(ours.logprobs[ours.mask]) > 0.1
    ratio = losses.importance.weights(ours.logprobs, remote.sampling_logprobs, remote.mask)
    np.testing.assert_allclose(ratio, remote.mask, atol=1e-4)
    for tokens, mask, finished in zip(remote.tokens, remote.mask, remote.finished, strict=True):
        ended = np.isin(tokens[mask], ENDS)
        assert not ended[:-1].any()
        assert ended[-1] == finished
        assert finished or mask.sum() == NEW
    np.testing.assert_array_equal(ask(server, temperature=0.7, num_samples=2).tokens, remote.tokens)
    assert not np.array_equal(
        ask(server, jax.random.key(1), temperature=0.7, num_samples=2).tokens, remote.tokens
    )


@pytest.mark.parametrize("setting", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_filters_are_sent_and_leave_the_likeliest_token(server, model, setting):
    remote = ask(server, num_samples=2, **setting)
    np.testing.assert_array_equal(remote.tokens, greedily(model).tokens)
    np.testing.assert_allclose(remote.sampling_logprobs, 0, atol=1e-6)
    np.testing.assert_allclose(
        engines.rescored(*model, remote).logprobs, greedily(model).logprobs, atol=1e-5
    )


def test_texts_are_read_and_written(server, folder):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = dict(
        prompt=[tokenizer.encode("ab")], temperature=0, stop_token_ids=ENDS, return_token_ids=True
    )
    answer = json.loads(server.send("/v1/completions", ids))
    text = json.loads(
        server.send("/v1/completions", ids | dict(prompt="ab", logprobs=1, return_token_ids=False))
    )
    (choice,), (expected,) = text["choices"], answer["choices"]
    assert choice["text"] == tokenizer.decode(expected["token_ids"], skip_special_tokens=True) != ""
    assert choice["logprobs"]["tokens"] == tokenizer.convert_ids_to_tokens(expected["token_ids"])
    assert (
        len(choice["logprobs"]["token_logprobs"])
        == text["usage"]["completion_tokens"]
        == len(expected["token_ids"])
    )
    assert "token_ids" not in choice
    assert expected["logprobs"] is None


def test_penalties_equal_those_of_generate(server, model):
    settings = dict(repetition_penalty=1.4, frequency_penalty=0.75, presence_penalty=1.5)
    transforms = [getattr(samplers, name)(value) for name, value in settings.items()] + [
        samplers.min_new_tokens(5, ENDS)
    ]
    local = greedily(model, sampler=rollouts.sampler(*transforms, *rollouts.greedy().transforms))
    assert_same(ask(server, temperature=0, num_samples=2, min_new_tokens=5, **settings), local)
    assert not np.array_equal(local.tokens, greedily(model).tokens)
    assert 5 <= local.mask.sum(1).min() < NEW

    body = dict(
        prompt=[[3, 4, 5]], temperature=0.7, seed=5, stop_token_ids=ENDS, max_tokens=NEW, logprobs=1
    )
    body |= dict(min_tokens=5, return_token_ids=True, logit_bias={"11": 60, "12": -3}, **settings)
    (choice,) = json.loads(server.send("/v1/completions", body))["choices"]
    bias = lambda logits, step: logits.at[:, jnp.array([11, 12])].add(
        jnp.array([[60.0, -3.0]]) / 0.7
    )
    one = rollouts.Prompts(PROMPTS.tokens[:1], PROMPTS.mask[:1])
    sampled = dict(
        max_new_tokens=NEW,
        eos_ids=ENDS,
        sampler=rollouts.sampler(bias, *transforms, temperature=0.7),
    )
    row = rollouts.generate(*model, one, jax.random.key(5), **sampled)
    assert choice["token_ids"] == row.tokens[row.mask].tolist()
    assert 11 in choice["token_ids"]
    np.testing.assert_allclose(
        choice["logprobs"]["token_logprobs"], row.sampling_logprobs[row.mask], atol=1e-5
    )


@pytest.mark.parametrize("filters", [{}, dict(min_p=0.01, top_k=6, top_p=0.97)])
@pytest.mark.exhaustive
def test_logits_are_edited_in_vllms_order(filters):
    """Bias, end tokens, penalties, then temperature, then filters; by definition, on logits of every kind."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 12)).astype(np.float32) * 2
    tokens = np.array([[9, 3, 3, 5, 5, 5, 0], [4, 9, 9, 9, 1, 2, 0]], np.int32)
    there = np.arange(7)[None, :] < np.array([[6], [6]])
    new = np.array([4, 2], np.int32)
    step = samplers.Step(
        tokens=jnp.asarray(tokens), here=jnp.asarray(there), sampled=jnp.asarray(there & (np.arange(7) >= 6 - new[:, None])),
        column=jnp.array([6, 6]), new=jnp.asarray(new), hidden=jnp.zeros((2, 1)), temperature=jnp.float32(0.5),
    )  # fmt: skip
    body = dict(
        logit_bias={"3": 1.5, "7": -6.5}, min_tokens=3, repetition_penalty=1.7, frequency_penalty=0.6, presence_penalty=-1.1,
        temperature=0.5, **filters,
    )  # fmt: skip
    expected = logits.astype(float)
    for row, x in enumerate(expected):
        x[3] += 1.5
        x[7] -= 6.5
        if new[row] < 3:
            x[[2, 8]] = -np.inf
        for token in set(tokens[row, :6]):
            x[token] = x[token] / 1.7 if x[token] > 0 else x[token] * 1.7
        sampled = tokens[row, 6 - new[row] : 6].tolist()
        for token in set(sampled):
            x[token] -= 0.6 * sampled.count(token) - 1.1
        x /= 0.5
        if not filters:
            continue
        probs = np.exp(x - np.logaddexp.reduce(x))
        x[probs < 0.01 * probs.max()] = -np.inf
        x[x < np.sort(x)[-6]] = -np.inf
        order = np.argsort(-x)
        probs = np.exp(x[order] - np.logaddexp.reduce(x))
        x[order[np.cumsum(probs) - probs >= 0.97]] = -np.inf
    _, edited = samplers.apply(servers._sampler(body, 12, (2, 8), 9), jnp.asarray(logits), step)
    np.testing.assert_allclose(edited, expected, atol=1e-4)
    assert (np.isfinite(expected).sum(1) > 1).all()
    _, greedy = samplers.apply(
        servers._sampler({"temperature": 0, "logit_bias": {"7": 100}}, 12, (), 9), logits, step
    )
    np.testing.assert_array_equal(np.argmax(greedy, axis=1), [7, 7])


def test_a_stop_string_cuts_the_text_and_not_the_tokens(server, model, folder):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    free = greedily(model, eos_ids=())
    pieces = [
        tokenizer.decode([token], skip_special_tokens=True) for token in free.tokens[0, 3:].tolist()
    ]
    whole = "".join(pieces)
    at = next(
        i for i in range(2, NEW) if len(pieces[i]) > 1 and pieces[i - 1]
    )  # a token of several letters ends the row
    before = len("".join(pieces[:at]))
    string = whole[
        before - 1 : before + 1
    ]  # the last letter of one token and the first of the next
    assert whole.find(string) == before - 1
    stops = ["never", string]

    remote = ask(server, temperature=0, num_samples=2, eos_ids=(), stop=stops)
    assert_same(remote, greedily(model, eos_ids=(), stop=rollouts.stop_strings(tokenizer, stops)))
    assert remote.mask[0].sum() == at + 1
    assert remote.finished[0]
    assert not remote.finished.all()

    body = dict(
        prompt=[[3, 4, 5]],
        max_tokens=NEW,
        temperature=0,
        logprobs=1,
        return_token_ids=True,
        ignore_eos=True,
    )
    answer = lambda **changes: json.loads(server.send("/v1/completions", body | changes))[
        "choices"
    ][0]
    for stop in (string, stops):
        choice = answer(stop=stop)
        assert choice["token_ids"] == free.tokens[0, 3 : 3 + at + 1].tolist()
        assert len(choice["logprobs"]["token_logprobs"]) == at + 1
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", string)
        assert choice["text"] == whole[: before - 1]
    assert answer(stop=string, include_stop_str_in_output=True)["text"] == whole[: before + 1]
    over = answer(stop=string, max_tokens=at)  # the string would be complete one token later
    assert (over["finish_reason"], over["stop_reason"], over["text"]) == (
        "length",
        None,
        whole[:before],
    )
    assert answer(stop=None)["text"] == answer(stop=[])["text"] == whole


def test_the_stop_string_is_the_one_that_is_complete_first_however_tokens_cut_it(monkeypatch):
    rng = np.random.default_rng(0)
    strings = ("éa", "béa", "baéb", "aé", "bbb")
    seen = set()
    for _ in range(200):
        said = "".join(rng.choice(list("abé"), 8))
        ends = [
            (end, s)
            for end in range(9)
            for s in sorted(strings, key=len, reverse=True)
            if said[:end].endswith(s)
        ]
        cuts = np.sort(rng.integers(0, len(said.encode()) + 1, 3))
        pieces = [bytes(piece) for piece in np.split(np.frombuffer(said.encode(), np.uint8), cuts)]
        monkeypatch.setattr(servers, "_token_bytes", lambda tokenizer, pieces=pieces: pieces)
        found = servers._found(None, list(range(len(pieces))), strings)
        expected = (ends[0][1], 8 - ends[0][0] + len(ends[0][1]), 8 - ends[0][0]) if ends else None
        assert found == expected, (said, cuts)
        seen.add(found and found[0])
    assert seen == {"éa", "béa", "aé", "bbb", None}  # inside "baéb" another is complete before
    monkeypatch.setattr(servers, "_token_bytes", lambda tokenizer: [b"a", b"b", b" the end"])
    assert (
        servers._found(None, [0, 3, 1], strings) is None
    )  # a token beyond the tokenizer's is no text
    tokenizer = types.SimpleNamespace(
        decode=lambda tokens, **settings: "the end", convert_ids_to_tokens=str
    )
    choice = servers._choice(
        0, [1], [2], [-1.0], (), (" the",), tokenizer, {}
    )  # its decoder drops the first space
    assert (choice["text"], choice["stop_reason"]) == ("", " the")


def test_requests_share_their_programs(model, folder):
    programs = sys.modules["rlhf.rollouts.generate"]._generate._cache_size
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    answer = lambda **body: servers._completions(
        *model, tokenizer, body | dict(prompt=[[3, 4]]), (2,)
    )
    answer(presence_penalty=0.5)
    one = programs()
    answer(logit_bias={"5": 2, "6": 1}, min_tokens=2, max_tokens=9, seed=3)
    answer(repetition_penalty=1.2, frequency_penalty=-1, temperature=0.5, top_k=4)
    assert programs() == one
    answer(stop="ab", presence_penalty=0.5)
    two = programs()
    answer(stop=["x", "yz ("], logit_bias={"5": 2})
    assert programs() == two == one + 1


def test_several_rows_are_one_batch_of_a_size_that_compiles_once(model, monkeypatch):
    calls = []

    def generate(lm, params, prompts, key, *, max_new_tokens, sampler, eos_ids, stop):
        assert stop is None
        calls.append((prompts, key, max_new_tokens, sampler, eos_ids))
        start = prompts.tokens.shape[1]
        tokens = np.pad(prompts.tokens, ((0, 0), (0, max_new_tokens)), constant_values=7)
        mask = np.arange(start + max_new_tokens)[None, :] >= np.full((len(tokens), 1), start)
        tokens[0, start + 1], mask[0, start + 2 :] = 2, False
        same = tokens, mask, tokens, tokens, -0.5 * mask, -0.25 * mask, mask[:, 0], np.float32(1)
        return rollouts.Rollout(*same)

    monkeypatch.setattr(servers, "generate", generate)
    with running(servers.http_server(*model, None, port=0, eos_ids=(2,))) as url:
        engine = engines.openai_engine(url, "rlhf", retries=0)
        body = dict(
            prompt=[[3, 4], [5] * 17], n=3, max_tokens=5, logprobs=1, seed=3, return_token_ids=True
        )
        answer = json.loads(engine.send("/v1/completions", body))
        other = json.loads(
            engine.send(
                "/v1/completions", body | dict(ignore_eos=True, stop_token_ids=[7], temperature=0)
            )
        )
        with pytest.raises(RuntimeError, match="no tokenizer: give prompts as lists"):
            engine.send("/v1/completions", {"prompt": "a"})
        with pytest.raises(
            RuntimeError, match="no tokenizer to match stop strings by: give stop_token_ids"
        ):
            engine.send("/v1/completions", body | {"stop": "a"})
        with pytest.raises(RuntimeError, match="started without a family"):
            engines.load_lora_adapter(engine, "x")
        monkeypatch.setattr(servers, "generate", lambda *arguments, **settings: calls[9])
        with pytest.raises(RuntimeError, match="500 IndexError: list index out of range"):
            engine.send("/v1/completions", body)
    (prompts, key, new, _, ends), (_, same_key, _, _, other_ends) = calls
    assert prompts.tokens.shape == (8, 32)
    assert new == 16
    np.testing.assert_array_equal(prompts.mask.sum(1), [2, 2, 2, 17, 17, 17, 17, 17])
    assert key == same_key == jax.random.key(3)
    assert (ends, other_ends) == ((2,), (7,))
    assert [choice["token_ids"] for choice in answer["choices"]] == [[7, 2]] + 5 * [5 * [7]]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop"] + 5 * ["length"]
    assert [choice["stop_reason"] for choice in answer["choices"]] == 6 * [
        None
    ]  # an end of the server's own is no reason
    assert other["choices"][1]["stop_reason"] == 7
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == 3 * [[3, 4]] + 3 * [
        17 * [5]
    ]
    assert answer["choices"][0]["logprobs"]["tokens"] == ["token_id:7", "token_id:2"]
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == [-0.25, -0.25]
    assert other["choices"][0]["logprobs"]["token_logprobs"] == [-0.5, -0.5]
    assert answer["usage"] == {"prompt_tokens": 19, "completion_tokens": 27, "total_tokens": 46}


def test_new_weights_answer(server, model, folder, tmp_path):
    new = jax.tree.map(lambda x: np.ascontiguousarray(np.flip(x, -1)), model[1])
    rlhf.save(tmp_path / "new", model[0], new, like=folder)
    try:
        engines.update_weights_from_disk(server, tmp_path / "new")
        assert_same(ask(server, temperature=0, num_samples=2), greedily(model, params=new))
    finally:
        engines.update_weights_from_disk(server, folder)
    assert_same(ask(server, temperature=0, num_samples=2), greedily(model))


@pytest.mark.exhaustive
def test_an_adapter_answers_under_its_name(server, model, tmp_path):
    lm, params = model

    def saved(name, seed):
        rng = np.random.default_rng(seed)
        trainable, frozen = adapters.add(params, KEY, rank=2, targets=r"layers\.(q|mlp_down)")
        trainable = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), trainable)
        joined = adapters.join(trainable, frozen)
        peft_files.save(tmp_path / name, lm, joined, "qwen2")
        return greedily(model, params=adapters.merge(joined))

    first, second = saved("first", 1), saved("second", 2)
    assert not np.array_equal(first.tokens, second.tokens)
    adapted = engines.load_lora_adapter(server, tmp_path / "first")
    assert adapted.model == str(tmp_path / "first")
    assert_same(ask(adapted, temperature=0, num_samples=2), first)
    assert_same(ask(server, temperature=0, num_samples=2), greedily(model))
    with pytest.raises(RuntimeError, match="first' has already been loaded"):
        engines.load_lora_adapter(server, tmp_path / "first")
    for folder, expected in (("first", first), ("second", second)):
        named = engines.load_lora_adapter(server, tmp_path / folder, name="current")
        assert named.model == "current"
        assert_same(ask(named, temperature=0, num_samples=2), expected)


def test_the_server_says_what_it_refuses(server, tmp_path):
    with pytest.raises(
        RuntimeError,
        match="all 3 rows failed; row 0: .*/completions failed after 1 attempt: 404 .*'other'",
    ):
        ask(server._replace(model="other"))
    for body, message in (
        ({"prompt": [[100]]}, "400 prompt 0 must have a token, and all of them below 100"),
        ({"prompt": [[]]}, "prompt 0 must have a token"),
        ({"prompt": [[1.5]]}, "list of token ids"),
        (
            {"prompt": [[1]], "stream": True},
            "stream = True is not supported by this server; leave it out",
        ),
        ({"prompt": [[1]], "echo": True}, "echo = True is not supported"),
        ({"prompt": [[1]], "suffix": "x"}, "suffix = 'x' is not supported"),
        ({"prompt": [[1]], "best_of": 2}, "best_of = 2 is not supported"),
        (
            {"prompt": [[1]], "skip_special_tokens": False},
            "skip_special_tokens = False is not supported",
        ),
        (
            {"prompt": [[1]], "stop": ["x", ""]},
            r"stop must be a text that is not empty, or a list of them, but is \['x', ''\]",
        ),
        ({"prompt": [[1]], "stop": 7}, "stop must be a text .* but is 7"),
        (
            {"prompt": [[1]], "stop": "x", "min_tokens": 2},
            "min_tokens = 2 holds back end tokens, but not stop strings",
        ),
        (
            {"prompt": [[1]], "min_tokens": 17},
            "min_tokens is 17 but max_tokens 16; it must be at most that",
        ),
        (
            {"prompt": [[1]], "repetition_penalty": -1},
            "penalty divides logits and must be above 0, but is -1.0",
        ),
        (
            {"prompt": [[1]], "presence_penalty": math.nan},
            "presence_penalty must be a number, but is nan",
        ),
        (
            {"prompt": [[1]], "logit_bias": [1]},
            r"logit_bias must be an object of token ids and numbers, but is \[1\]",
        ),
        (
            {"prompt": [[1]], "logit_bias": {"100": 1}},
            "logit_bias has 1 for token '100'; tokens are below 100",
        ),
        ({"prompt": [[1]], "logit_bias": {"a": 1}}, "logit_bias has 1 for token 'a'"),
        (
            {"prompt": [[1]], "logit_bias": {"5": -101}},
            "has -101 for token '5'; .* numbers in -100 … 100",
        ),
        (
            {"prompt": [[1]], "max_tokens": 0},
            "max_tokens must be a whole number and at least 1, but is 0",
        ),
        ({"prompt": [[1]], "top_p": 1.5}, "but it is 1.5"),
        ({"prompt": [[1]], "temperature": "hot"}, "temperature must be a number, but is 'hot'"),
    ):
        with pytest.raises(RuntimeError, match=message):
            server.send("/v1/completions", body)
    with pytest.raises(RuntimeError, match="404 POST /v1/chat/completions is not served"):
        server.send("/v1/chat/completions", {})
    with pytest.raises(RuntimeError, match="400 .*has no config.json"):
        engines.update_weights_from_disk(server, tmp_path)
    with pytest.raises(RuntimeError, match="400 .*has no adapter_config.json"):
        engines.load_lora_adapter(server, tmp_path)
    with urllib.request.urlopen(f"{server.url}/v1/models", timeout=60) as answer:
        assert json.load(answer)["data"][0]["id"] == "policy"


# --- servers that fail -------------------------------------------------------------------------------------------------

ONE = rollouts.Prompts(PROMPTS.tokens[:1], PROMPTS.mask[:1])
CHOICE = {
    "token_ids": [7, 2],
    "logprobs": {"token_logprobs": [-0.5, -0.25]},
    "finish_reason": "stop",
}
GOOD = 200, {"choices": [CHOICE]}


@contextlib.contextmanager
def fake(answer):
    """The url of a server whose `answer(number of the request, its JSON)` gives `(status, JSON)`, and the requests it got."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((body, dict(self.headers)))
            status, content = answer(len(requests), body)
            with contextlib.suppress(OSError):  # whoever asked may have left
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(content).encode())

        def log_message(self, *args):
            pass

    with running(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield url, requests


@pytest.fixture
def waits(monkeypatch):
    """The seconds that the client would have slept."""
    seconds: list[float] = []
    monkeypatch.setattr(engines, "time", types.SimpleNamespace(sleep=seconds.append))
    return seconds


def test_a_server_that_is_busy_is_asked_again(waits):
    with fake(lambda number, body: GOOD if number == 4 else (429 if number == 2 else 503, {})) as (
        url,
        requests,
    ):
        rollout = ask(
            engines.openai_engine(url, "m", api_key="secret"), prompts=ONE, eos_ids=(2,), pad_id=9
        )
    assert len(requests) == 4
    assert all(body == requests[0][0] for body, _ in requests)
    assert requests[0][1]["Authorization"] == "Bearer secret"
    assert all(low <= wait <= 3 * low for wait, low in zip(waits, (0.25, 0.5, 1.0), strict=True))
    assert (
        len({wait / low for wait, low in zip(waits, (0.25, 0.5, 1.0), strict=True)}) == 3
    )  # not all at once
    np.testing.assert_array_equal(rollout.tokens, [[3, 4, 5, 7, 2, 9, 9, 9, 9, 9, 9]])
    np.testing.assert_array_equal(rollout.positions, [[0, 1, 2, 3, 4, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(rollout.logprobs[0, 3:6], [-0.5, -0.25, 0])


def test_every_setting_is_sent_and_every_row_has_its_seed():
    settings = dict(
        temperature=0.5,
        top_p=0.9,
        top_k=20,
        min_p=0.1,
        num_samples=2,
        eos_ids=(2,),
        stop=("a", "b"),
    )
    settings |= dict(
        min_new_tokens=3, repetition_penalty=1.5, frequency_penalty=0.25, presence_penalty=-0.5
    )
    with fake(lambda number, body: GOOD) as (url, requests):
        ask(engines.openai_engine(url, "m", concurrency=1), **settings)
        ask(engines.openai_engine(url, "m", concurrency=1), eos_ids=())
    bodies = [body for body, _ in requests]
    wanted = dict(
        temperature=0.5,
        top_p=0.9,
        top_k=20,
        min_p=0.1,
        stop_token_ids=[2],
        ignore_eos=False,
        stop=["a", "b"],
    )
    wanted |= dict(
        min_tokens=3, repetition_penalty=1.5, frequency_penalty=0.25, presence_penalty=-0.5
    )
    assert (wanted | dict(max_tokens=NEW, model="m")).items() <= bodies[0].items()
    assert [body["prompt"] for body in bodies[:6]] == [[[3, 4, 5]]] * 2 + [[[6, 7]]] * 2 + [
        [[8]]
    ] * 2
    assert len({body["seed"] for body in bodies[:6]}) == 6
    plain = dict(
        temperature=1.0,
        top_p=1.0,
        top_k=-1,
        min_p=0.0,
        stop_token_ids=[],
        ignore_eos=True,
        stop=[],
        min_tokens=0,
    )
    plain |= dict(repetition_penalty=1.0, frequency_penalty=0.0, presence_penalty=0.0)
    assert plain.items() <= bodies[6].items()


def test_refusals_and_hanging_servers_end_in_an_error(waits):
    with fake(lambda number, body: (400, {"error": {"message": "too long"}})) as (url, requests):
        with pytest.raises(
            RuntimeError,
            match=f"all 1 rows failed; row 0: {url}/v1/completions .* 1 attempt: 400 too long",
        ):
            ask(engines.openai_engine(url, "m"), prompts=ONE)
        assert len(requests) == 1
        assert not waits
    release = threading.Event()
    with fake(lambda number, body: (release.wait(10), GOOD)[1]) as (url, requests):
        with pytest.raises(
            RuntimeError, match=f"{url}/v1/completions failed after 2 attempts: TimeoutError"
        ):
            ask(engines.openai_engine(url, "m", timeout=0.1, retries=1), prompts=ONE)
        assert len(requests) == 2
        release.set()
    with pytest.raises(
        RuntimeError, match="failed after 3 attempts: .*refused"
    ):  # nobody listens there any more
        ask(engines.openai_engine(url, "m", retries=2), prompts=ONE)


def test_a_row_that_fails_leaves_the_others(waits):
    failures: list[engines.Failure] = []
    with fake(
        lambda number, body: (500, "out of memory") if body["prompt"] == [[6, 7]] else GOOD
    ) as (url, _):
        engine = engines.openai_engine(url, "m", retries=1)
        rollout = ask(engine, num_samples=2, report=failures.extend)
        with pytest.warns(
            RuntimeWarning, match="rows 1 failed and come back empty; row 1: .* 2 attempts: 500"
        ):
            ask(engine)
    assert [failure.row for failure in failures] == [2, 3]
    assert "out of memory" in failures[0].error
    np.testing.assert_array_equal(rollout.mask.sum(1), [2, 2, 0, 0, 2, 2])
    np.testing.assert_array_equal(rollout.finished, [True, True, False, False, True, True])
    np.testing.assert_array_equal(rollout.tokens[2], [0, 6, 7] + NEW * [0])
    np.testing.assert_array_equal(rollout.segment_ids[2], [0, 1, 1] + NEW * [0])


def test_token_ids_may_come_as_strings_and_never_as_text():
    answering = lambda **changes: engines.openai_engine("http://x", "m")._replace(
        send=lambda path, body: json.dumps({"choices": [CHOICE | changes]})
    )
    as_strings = {"tokens": ["token_id:7", "token_id:2"], "token_logprobs": [-0.5, -0.25]}
    rollout = ask(answering(token_ids=None, logprobs=as_strings), prompts=ONE)
    np.testing.assert_array_equal(rollout.tokens[0, :5], [3, 4, 5, 7, 2])
    as_text = {"tokens": ["token_id:7", "</s>"], "token_logprobs": [-0.5, -0.25]}
    for changes, message in (
        (
            {"token_ids": None, "logprobs": as_text},
            "text without token ids, which cannot be trained on",
        ),
        (
            {"prompt_token_ids": [1, 3, 4, 5]},
            r"read the prompt as \[1, 3, 4, 5\], but \[3, 4, 5\] was sent",
        ),
        ({"token_ids": [7]}, "1 tokens but 2 log-probs"),
        ({"token_ids": [7] * 9, "logprobs": {"token_logprobs": [-1.0] * 9}}, "of at most 8"),
        ({"logprobs": {"token_logprobs": [-0.5, float("nan")]}}, "all finite"),
        ({"logprobs": None}, "no completion with log-probs"),
        ({"finish_reason": "abort"}, "ended the row with 'abort'"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ask(answering(**changes), prompts=ONE)
    with pytest.raises(RuntimeError, match="no completion with log-probs: <html>"):
        ask(answering()._replace(send=lambda path, body: "<html>"), prompts=ONE)


def test_refusals_name_both_sides():
    engine = engines.openai_engine("http://x", "m")
    for wrong, message in (
        (dict(max_new_tokens=0), "at least 1, but are 0 and 1"),
        (dict(temperature=-1), "but they are -1, 1.0, 0.0 and None"),
        (dict(top_k=0), "but they are 1.0, 1.0, 0.0 and 0"),
        (dict(prompts=PROMPTS._replace(inputs={"x": 1})), "prompts.inputs cannot be sent"),
        (
            dict(prompts=PROMPTS._replace(mask=PROMPTS.mask[:, :2])),
            r"prompts.tokens \[3, 3\] but prompts.mask \[3, 2\]",
        ),
        (
            dict(prompts=PROMPTS._replace(mask=PROMPTS.mask.at[1].set(False))),
            r"prompts \[1\] have no tokens",
        ),
        (
            dict(prompts=rollouts.Prompts(PROMPTS.tokens[:0], PROMPTS.mask[:0])),
            r"prompts.tokens \[0, 3\] has no rows",
        ),
        (dict(repetition_penalty=0), "but they are 0, 0 and 8"),
        (dict(min_new_tokens=9), "but they are 1.0, 9 and 8"),
        (dict(stop="ab"), "stop must be a list of texts that are not empty, but is 'ab'"),
        (dict(stop=["a", ""]), r"but is \['a', ''\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ask(engine, **wrong)
    with pytest.raises(TypeError, match=r"write \(2,\)"):
        ask(engine, eos_ids=2)
    with pytest.raises(TypeError, match="mask must be bool"):
        ask(engine, prompts=PROMPTS._replace(mask=PROMPTS.mask.astype(jnp.int32)))
    with pytest.raises(ValueError, match="must start with http"):
        engines.openai_engine("localhost:8000", "m")
    with pytest.raises(
        ValueError, match="retries must be a whole number at least 0 and at most 1,000, but is -1"
    ):
        engines.openai_engine("http://x", "m", retries=-1)
