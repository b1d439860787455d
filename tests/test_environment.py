"""Conversations with environments and tools: exact to the last column, and nothing that fails stops a batch."""

import asyncio
import functools
import json
import sys
import threading
import time
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf import losses, rollouts
from rlhf.rollouts import tools
from rlhf.rollouts.environment import Environment, Turn, play

import steps as tiny  # isort: skip

KEY = jax.random.key(0)
CALLS = {
    "add": '<tool_call> {"name": "add", "arguments": {"a": 1, "b": 2}} </tool_call>',
    "both": '<tool_call> {"name": "mul", "arguments": {"a": 3, "b": 4}} </tool_call> '
    '<tool_call> {"name": "add", "arguments": {"a": 5, "b": 6}} </tool_call>',
    "unknown": '<tool_call> {"name": "sub", "arguments": {}} </tool_call>',
}
OTHER = "what is it ? 12 the answer , again higher lower user assistant <tool_response> </tool_response> error:"
WORDS = [
    "<pad>",
    "<bos>",
    "<eos>",
    "<unk>",
    *map(str, range(12)),
    *" ".join((*CALLS.values(), OTHER)).split(),
]
PAD, BOS, EOS, UNKNOWN = range(4)


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel(
            {word: i for i, word in enumerate(dict.fromkeys(WORDS))}, unk_token="<unk>"
        )
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="module")
def ids(tokenizer):
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def player(choose):
    """A `generate` whose row b says `choose(turn, b, its conversation)`, with log-probs that tell turn, row and place."""
    calls = []

    def generate(
        lm, params, prompts, key, *, max_new_tokens, num_samples, sampler, eos_ids, pad_id
    ):
        number, start = prompts.tokens.shape
        shape = (number, start + max_new_tokens)
        tokens, mask, finished = (
            np.full(shape, pad_id, np.int32),
            np.zeros(shape, bool),
            np.zeros(number, bool),
        )
        for b in range(number):
            said = choose(len(calls), b, prompts.tokens[b][prompts.mask[b]].tolist())[
                :max_new_tokens
            ]
            tokens[b, start : start + len(said)], mask[b, start : start + len(said)] = said, True
            finished[b] = bool(said) and said[-1] in eos_ids
        logprobs = -np.float32(
            100 * len(calls) + 10 * np.arange(number)[:, None] + np.arange(shape[1]) - start + 1
        )
        calls.append(prompts)
        return rollouts.Rollout(
            tokens, mask, mask, mask, logprobs, logprobs - 0.5, finished, np.float32(1.0)
        )

    return generate, calls


def script(*turns):
    return player(lambda turn, b, said: turns[turn][b])


def start(tokenizer, environment, generate, prompts=((5, 6),), **kw):
    settings = dict(max_turns=3, max_new_tokens=30, max_tokens=60, eos_ids=(EOS,)) | kw
    return play(None, None, tokenizer, environment, prompts, KEY, generate=generate, **settings)


def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


async def mul(a: int, b: int) -> int:
    """Multiplies."""
    return a * b


def test_two_tools_and_three_turns_to_the_last_token(tokenizer, ids):
    chat = lambda text: f"user {text} <eos> assistant"
    said = [[*ids(CALLS["add"]), EOS], [*ids(CALLS["both"]), EOS], [*ids("the answer is 12"), EOS]]
    short = [*ids("it is 3"), EOS]
    generate, calls = script([said[0], short], [said[1], [EOS]], [said[2], [EOS]])
    seen = []

    async def reward(row, messages):
        seen.append((row, messages))
        return 1.0 if messages[-1]["content"] == "the answer is 12" else None

    prompts = [[BOS, *ids("what is it ?")], ids("it ?")]
    played = start(
        tokenizer, tools.tool_environment([add, mul], reward=reward), generate, prompts,
        rows=["first", "second"], max_tokens=80, render=chat, max_turns=9,
    )  # fmt: skip
    heard = [
        ids(chat("<tool_response> 3 </tool_response>")),
        ids(chat("<tool_response> 12 </tool_response> <tool_response> 11 </tool_response>")),
    ]
    assert UNKNOWN not in heard[0] + heard[1]
    row0 = prompts[0] + said[0] + heard[0] + said[1] + heard[1] + said[2]
    row1 = [PAD] * 3 + prompts[1] + short
    sampled = [False] * 5 + [
        x for i in range(3) for x in [True] * len(said[i]) + [False] * len((*heard, [])[i])
    ]
    r = played.rollout
    pad = lambda x, value=0: np.pad(x, (0, 80 - len(x)), constant_values=value)
    np.testing.assert_array_equal(r.tokens, [pad(row0), pad(row1)])
    np.testing.assert_array_equal(r.mask, [pad(sampled), pad([False] * 5 + [True] * 4)])
    np.testing.assert_array_equal(r.segment_ids, [pad([1] * len(row0)), pad([0] * 3 + [1] * 6)])
    np.testing.assert_array_equal(r.positions, [pad(range(len(row0))), pad([0, 0, 0, *range(6)])])
    logprobs = -np.concatenate(
        [100 * turn + 1 + np.arange(len(x)) for turn, x in enumerate(said)], dtype=np.float32
    )
    np.testing.assert_array_equal(r.logprobs[0][r.mask[0]], logprobs)
    np.testing.assert_array_equal(r.sampling_logprobs[0][r.mask[0]], logprobs - 0.5)
    np.testing.assert_array_equal(r.logprobs[1][r.mask[1]], [-11, -12, -13, -14])
    assert not r.logprobs[~r.mask].any()
    assert not r.sampling_logprobs[~r.mask].any()

    rewards = np.zeros((2, 80))
    rewards[0, len(row0) - 1], rewards[1, len(row1) - 1] = 1.0, np.nan  # None: not scorable
    np.testing.assert_array_equal(played.rewards, rewards)
    assert r.finished.tolist() == [True, True]
    assert played.turns.tolist() == [3, 1]
    assert played.errors == [[], []]
    assert sorted(row for row, _ in seen) == ["first", "second"]
    assert [(m["role"], m.get("name"), m["content"]) for m in played.states[0].messages] == [
        ("assistant", None, CALLS["add"]), ("tool", "add", "3"),
        ("assistant", None, CALLS["both"]), ("tool", "mul", "12"), ("tool", "add", "11"),
        ("assistant", None, "the answer is 12"),
    ]  # fmt: skip

    # what generate saw: every row, in lengths that are powers of two; the row that is over stands in for the other
    assert [x.tokens.shape for x in calls] == [(2, 8), (2, 32), (2, 64)]
    for call, length in zip(
        calls, [5, 5 + len(said[0] + heard[0]), len(row0) - len(said[2])], strict=True
    ):
        assert call.tokens[0][call.mask[0]].tolist() == row0[:length]
        assert call.mask[0, -length:].all()
        assert call.mask[0].sum() == length
    assert calls[1].tokens[1].tolist() == calls[1].tokens[0].tolist()


def test_samples_of_a_prompt_are_contiguous_and_texts_are_the_default_rows(tokenizer, ids):
    generate, calls = player(lambda turn, b, said: [4 + b, EOS])
    env = Environment(
        lambda row: row,
        lambda state, said, text: Turn(f"{state} : {text}", reward=said[0], done=True),
    )
    prompts = rollouts.Prompts(
        jnp.array([[4, 5, 0], [BOS, 6, 7]]), jnp.array([[True, True, False], [True] * 3])
    )
    played = start(tokenizer, env, generate, prompts, num_samples=2, buckets=(4, 16))
    assert played.states == ["0 1 : 0", "0 1 : 1", "2 3 : 2", "2 3 : 3"]
    np.testing.assert_array_equal(
        played.rollout.tokens[:, :4], [[0, 4, 5, 4], [0, 4, 5, 5], [1, 6, 7, 6], [1, 6, 7, 7]]
    )
    np.testing.assert_array_equal(played.rewards[:, 4], [4, 5, 6, 7])
    assert calls[0].tokens.shape == (4, 4)


def guessing_game(low=0, high=11):
    """The policy guesses a number; it reads "higher" or "lower", and loses 1 for every guess that is wrong."""

    async def reset(row):
        return row

    async def step(secret, said, text):
        guess = int(text)
        return Turn(secret, observation=None if guess == secret else "higher" if guess < secret else "lower",
                    reward=float(guess == secret) - 1, done=guess == secret)  # fmt: skip

    return Environment(reset, step)


def test_a_guessing_game_is_won_by_halving(tokenizer, ids):
    def halve(turn, b, said):
        low, high = 0, 11
        for guess, word in zip(said[1::3], said[3::3], strict=True):  # number, end token, word
            number = int(tokenizer.decode([guess]))
            low, high = (number + 1, high) if word == ids("higher")[0] else (low, number - 1)
        return [*ids(str((low + high) // 2)), EOS]

    generate, _ = player(halve)
    prompts = [ids("what")] * 12
    played = start(
        tokenizer, guessing_game(), generate, prompts, rows=range(12), max_turns=4, max_tokens=20
    )
    assert played.rollout.finished.all()
    assert played.turns.max() == 4
    np.testing.assert_array_equal(played.rewards.sum(1), 1 - played.turns)
    for secret in range(12):
        last = played.rollout.tokens[secret][played.rollout.mask[secret]][-2:]
        assert last.tolist() == [*ids(str(secret)), EOS]


@pytest.mark.exhaustive
def test_gae_passes_over_observations(tokenizer, ids):
    generate, _ = player(lambda turn, b, said: [[4, 5, EOS], [6, EOS], [7, 4, 4, EOS]][turn])
    env = Environment(
        lambda row: 0.0,
        lambda n, said, text: Turn(
            n + 1, "what is it", reward=[0.5, -1.0, 2.0][int(n)], done=n == 2
        ),
    )
    played = start(tokenizer, env, generate, max_tokens=24)
    mask, values = (
        played.rollout.mask,
        np.random.default_rng(0).normal(size=(1, 24)).astype(np.float32),
    )
    assert mask.sum() == 9
    advantages, returns = losses.gae(
        played.rewards, values, mask, bootstrap=jnp.ones(1), discount=0.9, lam=0.8
    )
    rewards, values = (
        np.array([0, 0, 0.5, 0, -1, 0, 0, 0, 2]),
        np.append(values[mask], 1.0),
    )  # without the tool's tokens
    expected = np.zeros(10)
    for t in reversed(range(9)):
        expected[t] = rewards[t] + 0.9 * values[t + 1] - values[t] + 0.9 * 0.8 * expected[t + 1]
    np.testing.assert_allclose(advantages[mask], expected[:9], atol=1e-5)
    np.testing.assert_allclose(returns[mask], (expected + values)[:9], atol=1e-5)


def test_logprobs_of_a_real_model_equal_token_logprobs(tokenizer, ids):
    lm = tiny.models(num_layers=2)[0]
    params = jax.tree.map(lambda x: 2.5 * x, lm.init(KEY))
    env = Environment(lambda row: 0, lambda n, said, text: Turn(n + 1, observation=[9, 8, 7 + n]))
    prompts, sampler = [[3, 4, 5], [6]], rollouts.sampler(rollouts.top_k(8), temperature=0.7)
    played = play(
        lm, params, tokenizer, env, prompts, KEY, max_turns=3, max_new_tokens=4, max_tokens=24,
        num_samples=2, sampler=sampler, eos_ids=(EOS,), buckets=[20],
    )  # fmt: skip
    r = played.rollout
    where = dict(positions=r.positions, segment_ids=r.segment_ids, temperature=r.temperature)
    scored = rollouts.token_logprobs(lm, params, r.tokens, **where)
    np.testing.assert_allclose(
        r.logprobs[r.mask], scored[r.mask], atol=1e-4
    )  # rounding: the model is sharp
    assert (r.sampling_logprobs[r.mask] > r.logprobs[r.mask] + 1e-3).any()  # of what top_k left
    assert played.turns.tolist() == [3] * 4
    assert r.mask.sum() > 30
    assert (r.segment_ids.sum(1) - r.mask.sum(1)).tolist() == [
        9,
        9,
        7,
        7,
    ]  # prompt and two observations
    assert len({tuple(row) for row in r.tokens.tolist()}) == 4
    assert (
        len({tuple(r.tokens[0, 3:7]), tuple(r.tokens[0][r.mask[0]][4:8])}) == 2
    )  # turns do not repeat each other


def test_what_fails_becomes_an_observation_and_the_others_go_on(tokenizer):
    release = threading.Event()

    async def sleeps():
        await asyncio.sleep(60)

    def raises():
        raise KeyError("lost")

    steps = {
        "fine": lambda: Turn("new", "fine"),
        "raises": raises,
        "hangs": release.wait,
        "sleeps": sleeps,
        "exits": lambda: sys.exit(3),
        "prints": lambda: Turn("new", "x" * 1_000_000),
        "broken": lambda: Turn("new", "\ud800 fine"),
        "nothing": lambda: None,
        "reward": lambda: Turn("new", reward="high"),
        "token": lambda: Turn("new", [4, 10_000]),
    }
    expected = {
        "raises": "KeyError: 'lost'",
        "hangs": "no answer within 0.3 seconds",
        "sleeps": "no answer within 0.3 seconds",
        "exits": "SystemExit: 3",
        "nothing": "TypeError: environment.step must return a Turn, but returned NoneType",
        "reward": "ValueError: could not convert string to float: 'high'",
        "token": f"ValueError: observation has token 10000, but the tokenizer has {len(tokenizer)} tokens",
    }
    heard: list[str] = []
    generate, _ = player(lambda turn, b, said: [4 + turn, EOS])
    begun = time.perf_counter()
    played = start(
        tokenizer,
        Environment(lambda row: row, lambda state, said, text: steps[state]() if text == "0" else Turn(state, done=True)),
        generate, [[5]] * len(steps), rows=list(steps), turn_timeout=0.3, max_characters=100,
        render=lambda text: heard.append(text) or "again",
    )  # fmt: skip
    assert time.perf_counter() - begun < 3  # all of them at the same time
    hanging = [
        thread for thread in threading.enumerate() if "work" in thread.name and thread.is_alive()
    ]
    assert len(hanging) == 1
    assert hanging[0].daemon  # the process may end without it
    release.set()
    good = {
        "fine": "fine",
        "prints": "x" * 100 + "\n[999900 of 1000000 characters left out]",
        "broken": "? fine",
    }
    assert heard == [good[name] if name in good else f"error: {expected[name]}" for name in steps]
    for name, state, errors in zip(steps, played.states, played.errors, strict=True):
        assert errors == ([f"turn 1: {expected[name]}"] if name in expected else [])
        assert state == (name if name in expected else "new")
    assert played.turns.tolist() == [2] * len(steps)
    assert played.rollout.finished.all()


def test_rows_run_at_the_same_time_in_threads_or_on_one_loop(tokenizer):
    generate, _ = player(lambda turn, b, said: [4, EOS])
    threads, tasks, loops = threading.Barrier(3), asyncio.Barrier(3), set()

    def plain(state, said, text):
        threads.wait(5)
        return Turn(state, done=True)

    async def together(state, said, text):
        await tasks.wait()
        loops.add(asyncio.get_running_loop())
        return Turn(state + 1, done=state == 1)

    for step in (plain, together):
        played = start(
            tokenizer, Environment(lambda row: 0, step), generate, [[4]] * 3, turn_timeout=5.0
        )
        assert played.errors == [[], [], []]
        assert played.rollout.finished.all()
    assert len(loops) == 1


def test_an_async_step_that_blocks_costs_its_turn_alone(tokenizer):
    async def step(state, said, text):
        if text == "0":
            time.sleep(1.5)  # of 0.2 seconds, and the grace of the event loop
        return Turn(state, done=True)

    generate, _ = player(lambda turn, b, said: [4 + turn, EOS])
    played = start(tokenizer, Environment(lambda row: row, step), generate, turn_timeout=0.2)
    assert played.errors[0][0] == "turn 1: no answer within 0.2 seconds"


def test_limits(tokenizer, ids):
    never = Environment(
        lambda row: 0, lambda n, said, text: Turn(n + 1, observation=[9] * 3, reward=1.0)
    )
    once = Environment(
        lambda row: 0, lambda n, said, text: Turn(n + 1, [10_000], reward=1.0, done=True)
    )  # an observation that is not read
    cases = {  # environment, settings, what a turn says -> sampled tokens, all tokens, turns, finished
        "turns": (
            never,
            dict(max_turns=2),
            [4, EOS],
            (4, 9, 2, False),
        ),  # no observation after the last turn
        "sampled tokens do not fit": (never, dict(max_tokens=8), [4, EOS], (3, 8, 2, False)),
        "observation does not fit": (never, dict(max_tokens=7), [4, EOS], (2, 4, 1, False)),
        "done": (once, {}, [4, EOS], (2, 4, 1, True)),
        "done, but cut": (once, dict(max_new_tokens=3), [4, 4, 4, EOS], (3, 5, 1, False)),
        "done, but cut by the row": (once, dict(max_tokens=4), [4, 4, EOS], (2, 4, 1, False)),
        "no end token": (once, dict(max_new_tokens=3, eos_ids=()), [4, 4, 4, 4], (3, 5, 1, True)),
    }
    for name, (env, settings, says, expected) in cases.items():
        generate, _ = player(lambda turn, b, said, says=says: says)
        played = start(tokenizer, env, generate, **settings)
        r = played.rollout
        figures = (r.mask.sum(), (r.segment_ids != 0).sum(), played.turns[0], r.finished[0])
        assert figures == expected, name
        assert played.rewards.sum() == played.turns[0]


def test_a_row_that_cannot_start_or_say_anything_is_not_scored(tokenizer):
    def reset(row):
        if row == "bad":
            raise OSError("no room")
        return row

    env = Environment(reset, lambda state, said, text: Turn(state, reward=1.0, done=True))
    generate, _ = player(lambda turn, b, said: [] if b == 1 else [4, EOS])
    played = start(tokenizer, env, generate, [[5]] * 3, rows=["bad", "mute", "good"])
    assert played.errors == [
        ["reset: OSError: no room"],
        ["turn 1: generate returned no sampled token"],
        [],
    ]
    assert played.turns.tolist() == [0, 0, 1]
    np.testing.assert_array_equal(played.rewards.sum(1), [np.nan, np.nan, 1.0])
    assert not played.rollout.mask[:2].any()
    with pytest.raises(RuntimeError, match="reset failed on all 2 rows; row 0: OSError: no room"):
        start(tokenizer, env, generate, [[5]] * 2, rows=["bad", "bad"])


def test_refusals_name_both_sides(tokenizer):
    run = lambda prompts=((5, 6), (7,)), **kw: start(
        tokenizer, Environment(None, None), None, prompts, **kw
    )
    for match, kw in {
        "max_turns must be above 0, but is 0": dict(max_turns=0),
        "3 rows but 2 prompts": dict(rows=[1, 2, 3]),
        "max_tokens 2 but prompts of 2 columns": dict(max_tokens=2),
        "prompt 1 has no tokens": dict(prompts=[[5], []]),
        "prompt 0 has no tokens": dict(prompts=[]),
    }.items():
        with pytest.raises(ValueError, match=match):
            run(**kw)
    with pytest.raises(TypeError, match=r"eos_ids must be a tuple of tokens, but is 2"):
        run(eos_ids=EOS)
    with pytest.raises(ValueError, match=r"prompts.mask bool \[1, 2\] but prompts.tokens \[1, 3\]"):
        run(prompts=rollouts.Prompts(jnp.ones((1, 3), int), jnp.ones((1, 2), bool)))


# ---- tools ------------------------------------------------------------------------------------------------------------


def answer(text, *functions, **kw):
    """What a tool environment answers to one turn."""
    env = tools.tool_environment(functions, render=lambda texts: " | ".join(texts), **kw)
    return asyncio.run(env.step(env.reset("row"), [], text))


def call(name, **arguments):
    return f"<tool_call>{json.dumps(dict(name=name, arguments=arguments))}</tool_call>"


def test_calls_that_fail_are_answered_in_their_order():
    release = threading.Event()

    def hang():
        release.wait()

    def leave():
        sys.exit(1)

    def fail():
        raise RuntimeError("broken")

    def long():
        return "x" * 1_000_000

    def circle():
        ring: list = []
        ring.append(ring)
        return ring

    functions = (add, mul, hang, leave, fail, long, circle)
    names = ("sub", "add", "hang", "fail", "leave", "long", "circle")
    text = (
        "".join(call(name) for name in names)
        + call("mul", a=2, b="3")
        + call("mul", a=2, b=3, c=4)
        + call("mul", a=2, b=4)
    )
    turn = answer(text, *functions, timeout=0.2, max_characters=120)
    release.set()
    results = turn.observation.split(" | ")
    expected = [
        "error: unknown tool; there are add, mul, hang, leave, fail, long, circle",
        "error: missing arguments ['a', 'b'], unknown arguments []; the tool has",
        "error: no answer within 0.2 seconds",
        "error: RuntimeError: broken",
        "error: SystemExit: 1",
        "x" * 120 + "\n[999880 of 1000000 characters left out]",
        "error: the result does not become JSON: Circular reference detected",
        'error: argument b is \'3\', but must fit {"type": "integer"}',
        "error: missing arguments [], unknown arguments ['c']; the tool has",
        "8",
    ]
    assert len(results) == len(expected)
    for result, start_of_it in zip(results, expected, strict=True):
        assert result.startswith(start_of_it)
    assert turn.error.count(";") >= 7
    assert "fail: RuntimeError: broken" in turn.error
    assert not turn.done
    assert turn.reward == 0


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("<tool_call>{1}</tool_call>", "Expecting property name"),
        (call("add", a=1, b=2) + "<tool_call>{", "<tool_call> without </tool_call>"),
        ("<tool_call>[1]</tool_call>", "a call is an object"),
        (
            '<tool_call>{"name": "add", "arguments": 3}</tool_call>',
            "arguments of add must be an object, but are 3",
        ),
    ],
)
def test_a_call_that_cannot_be_read_runs_none(text, error):
    turn = answer(text, add)
    assert turn.observation.startswith(f"error: the call cannot be read: {error}")
    assert turn.error.startswith(f"tool_call: the call cannot be read: {error}")
    assert not turn.done


def test_a_turn_without_a_call_is_scored():
    score = lambda row, messages: float(row == "row") + len(messages)
    assert answer("so be it", add, reward=score)[1:] == (None, 2.0, True, None)
    assert answer("so be it", add)[1:] == (None, 0.0, True, None)
    assert answer("so be it", add, reward=lambda row, messages: 1 / 0)[1:] == (
        None, None, True, "reward: ZeroDivisionError: division by zero",
    )  # fmt: skip


def test_parsers():
    Call = tools.Call
    assert tools.parse_hermes("no call") == []
    assert tools.parse_hermes(f"a {call('f', x=[1])}\n{call('g')}") == [
        Call("f", {"x": [1]}),
        Call("g", {}),
    ]
    assert tools.parse_json(' [{"name": "f", "arguments": {"x": 1}}, {"name": "g"}]') == [
        Call("f", {"x": 1}),
        Call("g", {}),
    ]
    assert tools.parse_json("a [1]") == []
    for text in ("[1]", "{", '{"name": 1}'):
        with pytest.raises(ValueError, match="call is an object|Expecting"):
            tools.parse_json(text)


def test_schema_of_a_function():
    def search(
        query: str,
        *,
        kind: Literal["web", "news"] = "web",
        limits: dict[str, list[float]] | None = None,
        raw: bool = False,
    ):
        """Looks something up,
        somewhere.

        Args:
          query: what to look for,
            in words
          kind (str): where: there

        Returns:
          raw: no argument
        """

    assert tools.tool(search) == {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Looks something up, somewhere.",
            "parameters": {
                "type": "object",
                "properties": {
                    "query": {"type": "string", "description": "what to look for, in words"},
                    "kind": {"enum": ["web", "news"], "description": "where: there"},
                    "limits": {
                        "anyOf": [
                            {
                                "type": "object",
                                "additionalProperties": {
                                    "type": "array",
                                    "items": {"type": "number"},
                                },
                            },
                            {"type": "null"},
                        ]
                    },
                    "raw": {"type": "boolean"},
                },
                "required": ["query"],
            },
        },
    }
    misfit = lambda **arguments: tools._misfit(
        arguments, tools.tool(search)["function"]["parameters"]
    )
    assert misfit(query="x", kind="news", limits={"a": [1, 2.5]}, raw=True) is None
    assert misfit(query="x", limits=None) is None
    for wrong in (
        dict(kind="book"),
        dict(limits={"a": [True]}),
        dict(limits=[1]),
        dict(raw=1),
        dict(query=1),
    ):
        assert f"argument {next(iter(wrong))} is" in misfit(**{"query": "x"} | wrong)


def test_functions_that_are_no_tools_are_refused():
    def bare(x): ...

    def many(*xs: int): ...

    def array(x: np.ndarray): ...

    for fn, match in (
        (bare, "parameter x of tool bare has no type"),
        (many, r"parameter \*xs: int of tool many cannot be given by name"),
        (array, "parameter x of tool array is <class 'numpy.ndarray'>, which JSON does not have"),
        (functools.partial(add, 1), "has no name"),
    ):
        with pytest.raises(TypeError, match=match):
            tools.tool(fn)
    with pytest.raises(ValueError, match="tools share a name: add, add"):
        tools.tool_environment([add, add])
