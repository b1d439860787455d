"""Outside engines: a server process answers what `generate` does here, takes new weights, and what fails says so."""

import contextlib
import json
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
from rlhf.rollouts import server as servers

HERE = Path(__file__).parent
TOKENIZER = HERE / "checkpoints" / "tokenizer"
KEY = jax.random.key(0)
NEW = 8
PROMPTS = rollouts.Prompts(
    jnp.array([[3, 4, 5], [0, 6, 7], [8, 0, 0]]), jnp.array([[True, True, True], [False, True, True], [True, False, False]])
)
ENDS = (2, *range(0, 100, 7))  # the server's own, and enough others that some rows end and some do not


@pytest.fixture(scope="module")
def model():
    lm = transformer(TransformerConfig(100, 16, num_layers=1, num_heads=4, num_kv_heads=2, mlp_size=32, qkv_bias=True))
    return lm, jax.tree.map(lambda x: 2.5 * x, lm.init(KEY))  # far from uniform


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
    command = [sys.executable, "-m", "rlhf.rollouts.server", str(folder), "--port", "0", "--model", "policy"]
    with (
        open(folder / "errors", "w") as errors,
        subprocess.Popen(command, cwd=HERE.parent, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        try:
            greedily(model)  # compiles while the server starts
            line = process.stdout.readline()
            assert line.startswith("listening on "), (folder / "errors").read_text()
            url = line.split()[-1]
            with urllib.request.urlopen(f"{url}/health", timeout=60) as answer:
                assert answer.status == 200
            yield engines.openai_engine(url + "/v1", "policy", concurrency=8, retries=0, timeout=120)
        finally:
            process.terminate()


def ask(engine, key=KEY, prompts=PROMPTS, **settings):
    return engines.generate_remote(engine, prompts, key, **dict(max_new_tokens=NEW, eos_ids=ENDS) | settings)


def greedily(model, **changes):
    lm, params = model
    settings = dict(max_new_tokens=NEW, num_samples=2, sampler=rollouts.greedy(), eos_ids=ENDS)
    return rollouts.generate(lm, changes.get("params", params), PROMPTS, KEY, **settings)


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
    assert not np.array_equal(ask(server, jax.random.key(1), temperature=0.7, num_samples=2).tokens, remote.tokens)


@pytest.mark.parametrize("setting", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_filters_are_sent_and_leave_the_likeliest_token(server, model, setting):
    remote = ask(server, num_samples=2, **setting)
    np.testing.assert_array_equal(remote.tokens, greedily(model).tokens)
    np.testing.assert_allclose(remote.sampling_logprobs, 0, atol=1e-6)
    np.testing.assert_allclose(engines.rescored(*model, remote).logprobs, greedily(model).logprobs, atol=1e-5)


def test_texts_are_read_and_written(server, folder):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = dict(prompt=[tokenizer.encode("ab")], temperature=0, stop_token_ids=ENDS, return_token_ids=True)
    answer = json.loads(server.send("/v1/completions", ids))
    text = json.loads(server.send("/v1/completions", ids | dict(prompt="ab", logprobs=1, return_token_ids=False)))
    (choice,), (expected,) = text["choices"], answer["choices"]
    assert choice["text"] == tokenizer.decode(expected["token_ids"], skip_special_tokens=True) != ""
    assert choice["logprobs"]["tokens"] == tokenizer.convert_ids_to_tokens(expected["token_ids"])
    assert len(choice["logprobs"]["token_logprobs"]) == text["usage"]["completion_tokens"] == len(expected["token_ids"])
    assert "token_ids" not in choice
    assert expected["logprobs"] is None


def test_several_rows_are_one_batch_of_a_size_that_compiles_once(model, monkeypatch):
    calls = []

    def generate(lm, params, prompts, key, *, max_new_tokens, sampler, eos_ids):
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
        body = dict(prompt=[[3, 4], [5] * 17], n=3, max_tokens=5, logprobs=1, seed=3, return_token_ids=True)
        answer = json.loads(engine.send("/v1/completions", body))
        other = json.loads(engine.send("/v1/completions", body | dict(ignore_eos=True, stop_token_ids=[7], temperature=0)))
        with pytest.raises(RuntimeError, match="no tokenizer: give prompts as lists"):
            engine.send("/v1/completions", {"prompt": "a"})
        with pytest.raises(RuntimeError, match="started without a family"):
            engines.load_lora_adapter(engine, "x")
    (prompts, key, new, _, ends), (_, same_key, _, _, other_ends) = calls
    assert prompts.tokens.shape == (8, 32)
    assert new == 16
    np.testing.assert_array_equal(prompts.mask.sum(1), [2, 2, 2, 17, 17, 17, 17, 17])
    assert key == same_key == jax.random.key(3)
    assert (ends, other_ends) == ((2,), (7,))
    assert [choice["token_ids"] for choice in answer["choices"]] == [[7, 2]] + 5 * [5 * [7]]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop"] + 5 * ["length"]
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == 3 * [[3, 4]] + 3 * [17 * [5]]
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
    with pytest.raises(RuntimeError, match="all 3 rows failed; row 0: .*/completions failed after 1 attempt: 404 .*'other'"):
        ask(server._replace(model="other"))
    for body, message in (
        ({"prompt": [[100]]}, "400 prompt 0 must have a token, and all of them below 100"),
        ({"prompt": [[]]}, "prompt 0 must have a token"),
        ({"prompt": [[1.5]]}, "list of token ids"),
        ({"prompt": [[1]], "stop": ["x"]}, r"stop = \['x'\] is not supported"),
        ({"prompt": [[1]], "stream": True}, "stream = True is not supported"),
        ({"prompt": [[1]], "max_tokens": 0}, "max_tokens must be a whole number and at least 1, but is 0"),
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
CHOICE = {"token_ids": [7, 2], "logprobs": {"token_logprobs": [-0.5, -0.25]}, "finish_reason": "stop"}
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
    with fake(lambda number, body: GOOD if number == 4 else (429 if number == 2 else 503, {})) as (url, requests):
        rollout = ask(engines.openai_engine(url, "m", api_key="secret"), prompts=ONE, eos_ids=(2,), pad_id=9)
    assert len(requests) == 4
    assert all(body == requests[0][0] for body, _ in requests)
    assert requests[0][1]["Authorization"] == "Bearer secret"
    assert all(low <= wait <= 3 * low for wait, low in zip(waits, (0.25, 0.5, 1.0), strict=True))
    assert len({wait / low for wait, low in zip(waits, (0.25, 0.5, 1.0), strict=True)}) == 3  # not all at once
    np.testing.assert_array_equal(rollout.tokens, [[3, 4, 5, 7, 2, 9, 9, 9, 9, 9, 9]])
    np.testing.assert_array_equal(rollout.positions, [[0, 1, 2, 3, 4, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(rollout.logprobs[0, 3:6], [-0.5, -0.25, 0])


def test_every_setting_is_sent_and_every_row_has_its_seed():
    settings = dict(temperature=0.5, top_p=0.9, top_k=20, min_p=0.1, num_samples=2, eos_ids=(2,))
    with fake(lambda number, body: GOOD) as (url, requests):
        ask(engines.openai_engine(url, "m", concurrency=1), **settings)
        ask(engines.openai_engine(url, "m", concurrency=1), eos_ids=())
    bodies = [body for body, _ in requests]
    wanted = dict(temperature=0.5, top_p=0.9, top_k=20, min_p=0.1, stop_token_ids=[2], ignore_eos=False)
    assert (wanted | dict(max_tokens=NEW, model="m")).items() <= bodies[0].items()
    assert [body["prompt"] for body in bodies[:6]] == [[[3, 4, 5]]] * 2 + [[[6, 7]]] * 2 + [[[8]]] * 2
    assert len({body["seed"] for body in bodies[:6]}) == 6
    plain = dict(temperature=1.0, top_p=1.0, top_k=-1, min_p=0.0, repetition_penalty=1.0, stop_token_ids=[], ignore_eos=True)
    assert plain.items() <= bodies[6].items()


def test_refusals_and_hanging_servers_end_in_an_error(waits):
    with fake(lambda number, body: (400, {"error": {"message": "too long"}})) as (url, requests):
        with pytest.raises(RuntimeError, match=f"all 1 rows failed; row 0: {url}/v1/completions .* 1 attempt: 400 too long"):
            ask(engines.openai_engine(url, "m"), prompts=ONE)
        assert len(requests) == 1
        assert not waits
    release = threading.Event()
    with fake(lambda number, body: (release.wait(10), GOOD)[1]) as (url, requests):
        with pytest.raises(RuntimeError, match=f"{url}/v1/completions failed after 2 attempts: TimeoutError"):
            ask(engines.openai_engine(url, "m", timeout=0.1, retries=1), prompts=ONE)
        assert len(requests) == 2
        release.set()
    with pytest.raises(RuntimeError, match="failed after 3 attempts: .*refused"):  # nobody listens there any more
        ask(engines.openai_engine(url, "m", retries=2), prompts=ONE)


def test_a_row_that_fails_leaves_the_others(waits):
    failures: list[engines.Failure] = []
    with fake(lambda number, body: (500, "out of memory") if body["prompt"] == [[6, 7]] else GOOD) as (url, _):
        engine = engines.openai_engine(url, "m", retries=1)
        rollout = ask(engine, num_samples=2, report=failures.extend)
        with pytest.warns(RuntimeWarning, match="rows 1 failed and come back empty; row 1: .* 2 attempts: 500"):
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
        ({"token_ids": None, "logprobs": as_text}, "text without token ids, which cannot be trained on"),
        ({"prompt_token_ids": [1, 3, 4, 5]}, r"read the prompt as \[1, 3, 4, 5\], but \[3, 4, 5\] was sent"),
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
        (dict(prompts=PROMPTS._replace(mask=PROMPTS.mask[:, :2])), r"prompts.tokens \[3, 3\] but prompts.mask \[3, 2\]"),
        (dict(prompts=PROMPTS._replace(mask=PROMPTS.mask.at[1].set(False))), "prompt 1 has no tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            ask(engine, **wrong)
    with pytest.raises(TypeError, match=r"write \(2,\)"):
        ask(engine, eos_ids=2)
    with pytest.raises(TypeError, match="mask must be bool"):
        ask(engine, prompts=PROMPTS._replace(mask=PROMPTS.mask.astype(jnp.int32)))
    with pytest.raises(ValueError, match="must start with http"):
        engines.openai_engine("localhost:8000", "m")
    with pytest.raises(ValueError, match="they are 600.0, -1, 64"):
        engines.openai_engine("http://x", "m", retries=-1)
