"""Rewards of texts: no failing call loses a completion, and every reward says what its docstring says."""

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from fractions import Fraction
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf import rollouts
from rlhf.lm import LM
from rlhf.models import classifier_head, scalar_head
from rlhf.rollouts import answers, reward_server, rewards
from rlhf.rollouts import reward_functions as catalogue

TEXTS = ["a", "bb", "ccc", "dddd"]
SCORE = partial(rewards.score_texts, prompts=[""] * 4, completions=TEXTS)
GSM8K = [  # the ends of real solutions
    (
        "She makes 9 * 2 = $<<9*2=18>>18 every day at the farmer’s market.\n#### 18",
        "sells 9 for $2 each.\nA: 18",
        1.0,
    ),
    (
        "The house is worth 80,000+50,000 = 130,000.\n#### 70000",
        "he made a profit of 130,000-40,000=$90,000\nA: 90,000",
        0.0,
    ),
    (
        "so 2+1=<<2+1=3>>3 bolts of fabric\n#### 3",
        "2+1=<<2+1=3>>3.0 bolts of blue and white fiber",
        1.0,
    ),
    ("He bought 2,125 of them\n#### 2,125", r"hence \boxed{2125} in all 3 shops", 1.0),
    ("She lost money.\n#### -10", "that is 10", 0.0),
]


@pytest.fixture
def hang():
    """A function that hangs until the test is over."""
    over = threading.Event()
    yield lambda prompts, completions, **columns: over.wait()
    over.set()


def lengths(prompts, completions, **columns):
    return [len(c) for c in completions]


def returns(result):
    return lambda prompts, completions, **columns: result


def test_values_total_and_metrics():
    some = returns([1.0, None, 3, None])
    none = returns((None, None, np.float32(2), None))
    r = SCORE(rewards.combine({"some": some, "none": none}, weights={"none": -0.5}))
    np.testing.assert_array_equal(
        r.values, np.array([[1, np.nan], [np.nan, np.nan], [3, 2], [np.nan, np.nan]], np.float32)
    )
    assert r.values.dtype == r.weights.dtype == r.total.dtype == np.float32
    assert (r.names, r.weights.tolist(), r.failures, r.per_token) == (
        ("some", "none"),
        [1.0, -0.5],
        [],
        {},
    )
    np.testing.assert_array_equal(r.total, [1, np.nan, 2, np.nan])
    assert rewards.metrics(r) == pytest.approx(
        {
            "reward/mean": 1.5,
            "reward/std": 0.5**0.5,
            "reward/unscorable": 0.5,
            "rewards/failures": 0.0,
        }
        | {"rewards/some/mean": 2.0, "rewards/some/std": 2**0.5, "rewards/some/unscorable": 0.5}
        | {"rewards/none/mean": 2.0, "rewards/none/std": 0.0, "rewards/none/unscorable": 0.75}
        | {
            f"rewards/{name}/{what}": 0.0
            for name in ("some", "none")
            for what in ("failures", "timeouts")
        }
    )
    assert np.isnan(rewards.metrics(SCORE(returns([None] * 4)))["reward/mean"])


def test_a_combination_is_a_reward_function():
    inner = rewards.combine(
        {"length": lengths, "two": returns([2, 2, None, 2])}, weights={"length": 10}
    )
    assert inner([""] * 4, TEXTS) == [12.0, 22.0, 30.0, 42.0]
    outer = SCORE(rewards.combine({"inner": inner}, weights={"inner": 0.5}))
    assert outer.total.tolist() == [6.0, 11.0, 15.0, 21.0]
    assert SCORE(lengths).names == ("lengths",)


def test_columns_reach_the_functions():
    def f(prompts, completions, *, solution, ids, **columns):
        assert columns == {}
        return [
            len(p) + len(c) + len(s) + i
            for p, c, s, i in zip(prompts, completions, solution, ids, strict=True)
        ]

    columns = {"solution": ["", "x", "", ""], "ids": np.arange(4)}
    assert rewards.score_texts(f, ["p"] * 4, TEXTS, columns=columns).total.tolist() == [
        2.0,
        5.0,
        6.0,
        8.0,
    ]


@pytest.mark.parametrize(
    ("result", "row", "message"),
    [
        ([1.0, 2.0, 3.0], None, "returned 3 rewards for 4 completions"),
        (None, None, "returned None, not a list"),
        (5.0, None, "returned 5.0, not a list"),
        ([1.0, float("nan"), 3.0, 4.0], 1, "returned nan, not finite"),
        ([1.0, 2.0, -float("inf"), 4.0], 2, "returned -inf, not finite"),
        ([1.0, 2.0, 3.0, 1e39], 3, "returned 1e+39, not finite"),
        ([1.0, "2.0", 3.0, 4.0], 1, "returned '2.0', not a number"),
        ([1.0] * 9, None, "returned more than 4 rewards for 4 completions"),
        ("abcd", None, "returned 'abcd', not a list"),
        (b"abcd", None, "returned b'abcd', not a list"),
        ({1.0, 2.0, 3.0, 4.0}, None, "not a list"),
        (dict.fromkeys(range(4), 1.0), None, "not a list"),
        ([1.0, {"score": 1}, 3.0, 4.0], 1, "not a number"),
        ([1.0, 2j, 3.0, 4.0], 1, "returned 2j, not a number"),
        ([1.0, 10**400, 3.0, 4.0], 1, "not a number"),
        ([1.0, [[1.0]], 3.0, 4.0], 1, "not a number or a list"),
        ([1.0, [1.0], 3.0, 4.0], 1, "no column completion_ids"),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_bad_results_lose_their_rows_alone(result, row, message, is_async):
    calls = []

    def plain(prompts, completions, **columns):
        calls.append(len(completions))
        return result

    async def awaited(*args, **columns):
        return plain(*args, **columns)

    r = SCORE(rewards.combine({"good": lengths, "bad": awaited if is_async else plain}))
    assert calls == [4]  # nothing was raised, so nothing is tried again
    lost = np.isnan(r.values[:, 1])
    np.testing.assert_array_equal(lost, [row is None or i == row for i in range(4)])
    np.testing.assert_array_equal(r.values[:, 0], [1, 2, 3, 4])
    np.testing.assert_array_equal(r.total, r.values[:, 0] + np.where(lost, 0, [1, 2, 3, 4]))
    assert [(f.name, f.row) for f in r.failures] == [("bad", row)]
    assert message in r.failures[0].message


def test_numbers_of_many_kinds():
    kinds = [True, Fraction(1, 2), np.float64(0.25), jnp.bfloat16(0.5)]
    assert SCORE(returns(kinds)).total.tolist() == [1.0, 0.5, 0.25, 0.5]
    assert (
        SCORE(returns(np.arange(4))).total.tolist()
        == SCORE(returns(jnp.arange(4.0))).total.tolist()
        == [0, 1, 2, 3]
    )
    assert SCORE(lambda *a, **k: (x for x in range(4))).total.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "error", [ValueError("bad text"), StopIteration(), SystemExit(3)], ids=repr
)
@pytest.mark.parametrize("is_async", [False, True])
def test_a_function_that_raises_loses_the_bad_rows_alone(error, is_async):
    def plain(prompts, completions, *, number, **columns):
        if "bb" in completions:
            raise error
        return number

    async def awaited(*args, **columns):
        await asyncio.sleep(0)
        return plain(*args, **columns)

    r = SCORE(awaited if is_async else plain, columns={"number": [1, 2, 3, 4]})
    np.testing.assert_array_equal(r.total, [1, np.nan, 3, 4])
    assert [f.row for f in r.failures] == [None, 1]
    assert "called again row by row" in r.failures[0].message
    if isinstance(error, ValueError):
        assert r.failures[1].message.startswith("ValueError: bad text (test_rewards.py:")


def test_a_function_that_fails_on_batches_alone_loses_nothing():
    def one_at_a_time(prompts, completions, **columns):
        (text,) = completions
        return [len(text)]

    r = SCORE(one_at_a_time)
    assert r.total.tolist() == [1, 2, 3, 4]
    assert [f.row for f in r.failures] == [None]


def test_what_is_unreachable_is_not_asked_row_by_row():
    calls = []

    def gone(prompts, completions, **columns):
        calls.append(len(completions))
        raise rewards.Unreachable("no answer")

    r = SCORE(rewards.combine({"good": lengths, "gone": gone}))
    assert calls == [4]
    assert [(f.name, f.row) for f in r.failures] == [("gone", None)]


def test_raises_where_everything_failed():
    both = rewards.combine({"short": returns([1.0]), "missing": lambda prompts, completions: []})
    with pytest.raises(
        RuntimeError,
        match="short: returned 1 rewards for 4 completions; missing: returned 0 rewards",
    ):
        SCORE(both, columns={"tags": TEXTS})
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        rewards.score_texts(lambda *a, **k: 1 / 0, [""], [""])
    assert SCORE(returns([None] * 4)).failures == []  # not scorable is no failure
    assert rewards.score_texts(lengths, [], []).values.shape == (0, 1)


def test_a_function_that_hangs_is_given_up(hang):
    cancelled = threading.Event()

    async def forever(prompts, completions, **columns):
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    start = time.monotonic()
    r = SCORE(rewards.combine({"good": lengths, "hang": hang, "forever": forever}), timeout=0.2)
    assert 0.2 <= time.monotonic() - start < 10
    assert r.total.tolist() == [1, 2, 3, 4]
    assert r.failures == [
        rewards.Failure(name, None, "not there after 0.2 s") for name in ("hang", "forever")
    ]
    assert cancelled.wait(10)  # what can be ended is
    with pytest.raises(RuntimeError, match="not there after 0.1 s"):
        SCORE(hang, timeout=0.1)


def test_an_async_function_that_blocks_its_loop_is_given_up(hang, monkeypatch):
    monkeypatch.setattr(rewards, "GRACE", 0.1)

    async def blocks(prompts, completions, **columns):
        hang(prompts, completions)

    with pytest.raises(RuntimeError, match="not there after 0.1 s"):
        SCORE(blocks, timeout=0.1)


def test_rows_that_are_there_in_time_count():
    async def slow_where_long(prompts, completions, **columns):
        if len(completions) > 1:
            raise ValueError("one at a time")
        await asyncio.sleep(60 * (completions[0] == "ccc"))
        return [1.0]

    r = SCORE(slow_where_long, timeout=0.3)
    np.testing.assert_array_equal(r.total, [1, 1, np.nan, 1])
    assert r.failures[1:] == [rewards.Failure("slow_where_long", 2, "not there after 0.3 s")]


@pytest.mark.parametrize("is_async", [False, True])
def test_functions_run_at_the_same_time(is_async):
    times = []

    def plain(prompts, completions, **columns):
        times.append(time.monotonic())
        time.sleep(0.1)
        times.append(time.monotonic())
        return [1.0] * 4

    async def awaited(prompts, completions, **columns):
        times.append(time.monotonic())
        await asyncio.sleep(0.1)
        times.append(time.monotonic())
        return [1.0] * 4

    ten = rewards.combine({str(i): awaited if is_async else plain for i in range(10)})
    assert SCORE(ten).total.tolist() == [10.0] * 4
    assert len(times) == 20
    assert max(times) - min(times) < 0.5


def test_works_inside_a_running_loop():
    async def caller():
        async def awaited(prompts, completions, **columns):
            await asyncio.sleep(0)
            return lengths(prompts, completions)

        return SCORE(awaited)

    assert asyncio.run(caller()).total.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(("is_async", "most"), [(False, 1), (True, rewards.CONCURRENT_ROWS)])
def test_row_by_row_is_bounded(is_async, most):
    running, peak, full = [], [], asyncio.Event()

    def enter(completions):
        if len(completions) > 1:
            raise ValueError("one at a time")
        running.append(1)
        peak.append(len(running))

    def plain(prompts, completions, **columns):
        enter(completions)
        time.sleep(0.001)
        running.pop()
        return [1.0]

    async def awaited(prompts, completions, **columns):
        enter(completions)
        full.set() if len(running) == most else await asyncio.wait_for(full.wait(), 30)
        await asyncio.sleep(0.02)
        running.pop()
        return [1.0]

    number = 3 * rewards.CONCURRENT_ROWS
    r = rewards.score_texts(awaited if is_async else plain, [""] * number, [""] * number)
    assert r.total.tolist() == [1.0] * number
    assert max(peak) == most


def rollout_of(mask, finished=None):
    mask = np.array(mask, bool)
    tokens = np.arange(mask.size, dtype=np.int32).reshape(mask.shape)
    finished = np.ones(len(mask), bool) if finished is None else np.array(finished)
    return rollouts.Rollout(tokens, mask, tokens, np.ones_like(tokens), None, None, finished, None)


MASKS = [
    [0, 1, 1, 1, 0, 0],
    [0, 0, 1, 0, 1, 1],
    [0, 1, 1, 1, 1, 1],
    [0, 1, 0, 0, 0, 0],
]  # row 1: two turns


def test_rewards_are_placed_where_they_are_earned():
    rollout = rollout_of(MASKS, finished=[True, False, True, True])
    columns = rewards.token_columns(rollout)
    assert columns["completion_ids"] == [[1, 2, 3], [8, 10, 11], [13, 14, 15, 16, 17], [19]]
    assert columns["finished"] == [True, False, True, True]
    per_token = returns([[1.0, 2.0, 4.0], np.array([8.0, 0.0, 16.0]), None, 3])
    per_step = returns([[1.0, 1.0], [2.0], [5.0, 7.0], None])
    scored = rewards.combine(
        {"whole": lengths, "token": per_token, "step": per_step}, weights={"token": 0.5, "step": 10}
    )
    r = SCORE(scored, columns=columns | {"step_ends": [[1, 2], [2], [3, 5], []]})
    assert r.failures == []
    np.testing.assert_array_equal(r.values[:, 1:], [[7, 2], [24, 2], [np.nan, 12], [3, np.nan]])
    expected = [
        [0, 10.5, 11, 3, 0, 0],
        [0, 0, 4, 0, 20, 10],
        [0, 0, 0, 50, 0, 73],
        [0, 5.5, 0, 0, 0, 0],
    ]
    placed = rewards.place(rollout, r)
    np.testing.assert_array_equal(placed, np.array(expected, np.float32))
    np.testing.assert_allclose(placed.sum(-1), r.total)
    with pytest.raises(ValueError, match="rewards of 4 rows but a rollout of 3"):
        rewards.place(rollout_of(MASKS[:3]), r)
    with pytest.raises(ValueError, match="row 1: 'token' rewards 3 tokens, but 4 were sampled"):
        rewards.place(rollout_of([MASKS[0], [1, *MASKS[1][1:]], *MASKS[2:]]), r)


def test_a_row_that_cannot_be_scored_is_nan_where_it_was_sampled():
    placed = rewards.place(rollout_of(MASKS), SCORE(returns([1.0, None, 2.0, 3.0])))
    nan = np.nan
    np.testing.assert_array_equal(
        placed,
        [[0, 0, 0, 1, 0, 0], [0, 0, nan, 0, nan, nan], [0, 0, 0, 0, 0, 2], [0, 3, 0, 0, 0, 0]],
    )


@pytest.mark.parametrize(
    ("numbers", "ends", "message"),
    [
        ([1.0, 2.0], None, "returned 2 numbers for 3 sampled tokens"),
        ([1.0, 2.0], [1, 2, 3], "returned 2 numbers for 3 sampled tokens in 3 steps"),
        ([1.0, 2.0], [2, 2], "do not ascend within the 3 sampled tokens"),
        ([1.0, 2.0], [0, 2], "do not ascend"),
        ([1.0, 2.0], [2, 4], "do not ascend"),
        ([1.0, None, 2.0], None, "not finite"),
    ],
)
def test_lists_that_cannot_be_placed_lose_their_row(numbers, ends, message):
    columns = {"completion_ids": [[5, 6, 7]] * 2, "step_ends": [ends] * 2}
    r = rewards.score_texts(returns([numbers, 1.0]), [""] * 2, [""] * 2, columns=columns)
    np.testing.assert_array_equal(r.total, [np.nan, 1.0])
    assert r.failures[0].row == 0
    assert message in r.failures[0].message


def test_refusals_name_both_sides():
    with pytest.raises(ValueError, match="completions has 4 rows but prompts has 1"):
        rewards.score_texts(lengths, [""], TEXTS)
    with pytest.raises(ValueError, match="solution has 2 rows but prompts has 4"):
        SCORE(lengths, columns={"solution": ["", ""]})
    with pytest.raises(ValueError, match="at least one reward function"):
        rewards.combine({})
    with pytest.raises(ValueError, match=r"weights name \['b'\] but the functions are \['a'\]"):
        rewards.combine({"a": lengths}, weights={"b": 1.0})
    with pytest.raises(ValueError, match="weight of 'a' must be finite, but is nan"):
        rewards.combine({"a": lengths}, weights={"a": float("nan")})
    for make, message in [
        (
            lambda: catalogue.cosine_scaled(lengths, 0),
            "max_length must be a whole number at least 1",
        ),
        (lambda: catalogue.soft_overlong(4, 5), "at most max_length = 4 tokens, but is 5"),
        (lambda: catalogue.soft_overlong(4, 0), "but is 0"),
        (lambda: catalogue.repetition_penalty(ngram=0), "ngram must be a whole number at least 1"),
        (
            lambda: catalogue.repetition_penalty(max_penalty=1),
            "max_penalty must be a number at least -1,000 and at most 0, but is 1",
        ),
        (lambda: reward_server.remote("file:///etc/hosts"), "must start with http"),
        (
            lambda: reward_server.remote("http://localhost", retries=-1),
            "retries must be at least 0, but is -1",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18), ("-5", -5), ("−3", -3), ("x = +7.", 7), ("5-3", 2), ("f(3)-2", None), ("COVID-19", None),
        ("the 12 km", 12), (".5", Fraction(1, 2)), ("so 5", 5),
        ("$1,234.50.", Fraction("1234.5")), ("-$5", -5), (r"$-5$", -5), (r"\boxed{10{,}000}", 10_000), ("1,2,3", None),
        ("2e3", 2000), (r"1.5 \times 10^{-3}", Fraction("0.0015")), ("3 × 10^2", 300),
        ("3/4", Fraction(3, 4)), ("1 3/4 cups", Fraction(7, 4)), (r"-\frac{1}{2}", Fraction(-1, 2)), ("12,34", None),
        (r"\frac{-3}{4}", Fraction(-3, 4)),
        (r"1\dfrac12", Fraction(3, 2)), ("3/0", None), ("18 m^2", 18), ("x_1", None), ("x^{10}", None), ("none", None),
        ("#### 7\nand 8", 7), ("#### 7\n#### 8\n9", 8), (r"\boxed{1} or \boxed{2} of 3", 2), (r"cut \boxed{18", None),
        ("9" * 5000, None), ("1e9999999", None), ("**18**", 18), ("Rs18", 18),
    ],
)  # fmt: skip
def test_numbers_are_read_exactly(text, value):
    found = answers.number(text)
    assert (found and found.value) == value


def test_percents_equal_shares_and_bare_numbers():
    same = lambda a, b: answers.same(answers.number(a), answers.number(b))
    assert same("50%", "0.5")
    assert same("50", r"50\%")
    assert same("50 percent", "50%")
    assert not same("50%", "0.5%")
    assert not same("50", "0.5")


@pytest.mark.parametrize(
    "piece",
    ["1", "1 ", "1,", "1/", "\\frac{", "\\boxed{", "1 " + " " * 9, "-", "#### ", "\\times "],
)
def test_degenerate_texts_are_read_in_linear_time(piece):
    start = time.monotonic()
    answers.number(piece * 20_000 + "x")
    assert time.monotonic() - start < 1.5


def test_accuracies():
    solutions, completions, expected = zip(*GSM8K, strict=True)
    columns = dict(prompts=[""] * 5, completions=completions, solution=solutions)
    assert catalogue.numeric_accuracy(**columns) == list(expected)
    near = partial(catalogue.numeric_accuracy, tolerance=0.1)
    assert near([""] * 2, ["109", "112"], solution=["100", "100"]) == [1.0, 0.0]
    assert catalogue.numeric_accuracy(
        [""] * 3, ["1", "1", "no"], solution=["no number", None, "1"]
    ) == [None, None, 0.0]
    exact = catalogue.exact_accuracy(
        [""] * 4,
        ["  The  Nile.", "#### 18", "Nile", "x"],
        solution=["the nile", "a #### 18", "the nile", ""],
    )
    assert exact == [1.0, 1.0, 0.0, None]


def test_accuracy_of_what_follows_the_reasoning():
    completions = [
        "<think>7</think>8",
        "<think>8</think>7",
        "8 <think>8",
        "<think>7</think>6</think>8",
        "8",
    ]
    solution = ["8", "8", "8", "8", "none"]
    assert catalogue.reasoning_accuracy()([""] * 5, completions, solution=solution) == [
        1.0,
        0.0,
        0.0,
        1.0,
        None,
    ]
    other = catalogue.reasoning_accuracy(catalogue.exact_accuracy, delimiter="ANSWER")
    assert other([""] * 2, ["ANSWER thus ANSWER yes", "yes"], solution=["Yes", "yes"]) == [1.0, 0.0]
    always = catalogue.reasoning_accuracy(returns([1.0, 1.0]))
    assert always([""] * 2, ["</think>", "so"]) == [1.0, 0.0]


def test_math_accuracy_where_it_is_installed():
    pytest.importorskip("math_verify")
    completions = [r"so \boxed{\frac{2}{4}}", r"it is $\sqrt{8}$", "$x+1$", "$x+1$"]
    accuracy = rewards.score_texts(
        catalogue.math_accuracy(),
        [""] * 4,
        completions,
        columns={"solution": ["0.5", r"2\sqrt{2}", "x-1", ""]},
    )
    np.testing.assert_array_equal(accuracy.total, [1, 1, 0, np.nan])


def test_math_accuracy_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match="pip install math-verify"):
        catalogue.math_accuracy()


def test_formats():
    texts = [
        "<think>a\nb</think>c",
        "x<think>a</think>",
        "<think>a",
        "<think>a</think></think>",
        "<think><think></think>",
    ]
    assert catalogue.think_format([""] * 5, texts) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert catalogue.regex_format("a.*b")([""] * 3, ["a\nb", "a b c", "xab"]) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("is_async", [False, True])
def test_cosine_scaled(is_async):
    correctness = returns([1.0, 0.0, 1.0, None])

    async def later(*args, **columns):
        return correctness(*args, **columns)

    reward = catalogue.cosine_scaled(
        later if is_async else correctness, 100, correct=(2.0, 1.0), wrong=(-10.0, -3.0)
    )
    r = SCORE(reward, columns={"completion_ids": [[0] * n for n in (25, 50, 200, 1)]})
    np.testing.assert_allclose(
        r.total, [1.5 + 0.5 * np.cos(np.pi / 4), -6.5, 1.0, np.nan], rtol=1e-6
    )
    defaults = catalogue.cosine_scaled(returns([1.0, 1.0, 0.0, 0.0]), 10)
    ends = SCORE(defaults, columns={"completion_ids": [[], [0] * 10, [], [0] * 10]})
    np.testing.assert_allclose(ends.total, [1.0, 0.5, -1.0, -0.5])


def test_rewards_of_tokens():
    ids = [[0] * n for n in range(12)]
    by_definition = [0.0 if n <= 6 else (6 - n) / 4 if n <= 10 else -1.0 for n in range(12)]
    overlong = catalogue.soft_overlong(10, 4)([""] * 12, [""] * 12, completion_ids=ids)
    assert overlong == by_definition
    assert str(overlong[0]) == "0.0"
    repeated = catalogue.repetition_penalty(max_penalty=-2.0)
    assert repeated(
        [""] * 3, [""] * 3, completion_ids=[[1, 2, 3, 1, 2, 3, 1], [1, 2, 3, 4], [1, 2]]
    ) == [-0.8, 0.0, 0.0]
    assert catalogue.length([""] * 2, ["x", "x"], completion_ids=[[], [7, 7]]) == [0.0, 2.0]
    assert catalogue.missing_end()([""] * 2, [""] * 2, finished=[False, True]) == [-1.0, 0.0]


class Letters:
    """A tokenizer: a is 1, b is 2, …"""

    encode = staticmethod(lambda text: [ord(c) - ord("a") + 1 for c in text])


def summed(params, tokens, *, positions, segment_ids, cache=None, inputs=None):
    """Hidden states that depend on every token so far and its position."""
    each = params[tokens] * ((1 + positions) * (segment_ids != 0))[..., None]
    return jnp.cumsum(each, axis=1), cache, {}


def test_reward_models():
    nothing: Any = None
    lm, head = LM(nothing, nothing, summed, nothing, nothing), scalar_head(4, scale=0.5)
    params = {
        "lm": np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32),
        "head": head.init(jax.random.key(1)),
    }
    other = params | {"head": jax.tree.map(lambda x: 2 * x, params["head"])}
    prompts, completions = ["ab", "cd"], ["efg", "aa"]
    tokens = np.array([[1, 2, 5, 6, 7, 0], [3, 4, 1, 1, 0, 0]], np.int32)
    batch = rollouts.unpacked_rows(tokens, tokens != 0)
    rollout = rollouts.Rollout(
        *batch[:2], batch.positions, batch.segment_ids, None, None, None, None
    )

    def by_definition(params):
        sums = [
            sum((1 + i) * params["lm"][t] for i, t in enumerate(row[row != 0])) for row in tokens
        ]
        return np.array(sums) @ np.asarray(params["head"]["weight"]) + np.asarray(
            params["head"]["bias"]
        )

    expected = by_definition(params)
    assert np.std(expected) > 0.1
    passed = jax.jit(lambda reward, rollout: reward(rollout))
    for p in (params, other):
        np.testing.assert_allclose(
            passed(catalogue.model_reward(lm, head, p), rollout), by_definition(p), rtol=1e-4
        )
    assert passed._cache_size() == 1  # the params are arguments, not constants
    gradient = jax.jit(jax.grad(lambda reward: reward(rollout).sum()))(
        catalogue.model_reward(lm, head, params)
    )
    assert all((x == 0).all() for x in jax.tree.leaves(gradient))

    of_texts = catalogue.model_text_reward(lm, head, params, Letters, max_length=6)
    for row in range(2):  # beside a text that is too long, and one that is empty
        r = rewards.score_texts(
            of_texts, [prompts[row], ""], [completions[row], ["abcdefg", ""][row]]
        )
        np.testing.assert_allclose(r.total, [expected[row], np.nan], rtol=1e-4)
        assert r.failures == []

    labels = classifier_head(4, 3)
    three = catalogue.model_reward(
        lm, labels, {"lm": params["lm"], "head": labels.init(jax.random.key(0))}
    )
    with pytest.raises(
        ValueError, match=r"the head gives \[2, 3\] for 2 rows; a reward is one number a row"
    ):
        three(rollout)


@pytest.fixture
def url():
    """Of a server in a thread."""

    def fussy(prompts, completions, *, bonus, **columns):
        if "bb" in completions:
            raise ValueError("no bb here")
        return [len(c) + b if c != "a" else None for c, b in zip(completions, bonus, strict=True)]

    async def awaited(prompts, completions, **columns):
        await asyncio.sleep(0)
        return np.array([0.5] * len(completions))

    def exits(prompts, completions, **columns):
        sys.exit(3)

    functions = {
        "fussy": fussy,
        "awaited": awaited,
        "object": lambda *a, **k: [object()] * 4,
        "exits": exits,
    }
    with reward_server.serve(functions, port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_rewards_by_http(url):
    remote = partial(reward_server.remote, retries=0)
    r = SCORE(
        rewards.combine({"fussy": remote(f"{url}/fussy"), "awaited": remote(f"{url}/awaited")}),
        columns={"bonus": np.arange(4), "score": [jnp.float32(1)] * 4},
    )
    np.testing.assert_array_equal(
        r.values, np.array([[np.nan, 0.5], [np.nan, 0.5], [5, 0.5], [7, 0.5]], np.float32)
    )
    assert [f.row for f in r.failures] == [None, 1]
    assert "ValueError: no bb here" in r.failures[1].message
    for path, message in [
        ("nothing", "answered 404: .*no function at /nothing; there are.*fussy"),
        ("object", "answered 500: .*does not go into JSON"),
        ("exits", "answered 500: .*SystemExit: 3"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            SCORE(remote(f"{url}/{path}"))
    with pytest.raises(TypeError, match="object does not go into JSON"):
        remote(f"{url}/fussy")([""], [""], bonus=[object()])
    for body in (b"", b"{", b"[]", b'{"prompts": []}'):
        with pytest.raises(RuntimeError, match="answered 400: .*prompts and completions"):
            reward_server._post(f"{url}/fussy", body, 5)
    with urllib.request.urlopen(url) as response:
        assert json.load(response) == {"rewards": ["fussy", "awaited", "object", "exits"]}
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(f"{url}/nothing", b"{}")
    message = "no function at /nothing; there are ['fussy', 'awaited', 'object', 'exits']"
    with refusal.value as answer:
        error = json.load(answer)["error"]
    assert error == {"message": message, "type": "NotFoundError", "param": None, "code": 404}


def test_what_passes_is_tried_again_and_what_does_not_is_not(monkeypatch):
    statuses, waits = [], []
    monkeypatch.setattr(reward_server.time, "sleep", waits.append)

    class Flaky(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            status = statuses.pop(0)
            body = b'{"rewards": [7]}' if status == 200 else b"sorry"
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) + (status == 0)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Flaky) as server:
        threading.Thread(
            target=partial(server.serve_forever, poll_interval=0.02), daemon=True
        ).start()
        ask = lambda **knobs: reward_server.remote(
            f"http://127.0.0.1:{server.server_port}", **knobs
        )([""], [""])
        statuses[:] = [503, 429, 200]
        assert ask() == [7]
        assert waits == [0.5, 1.0]
        statuses[:] = [502, 504, 200]
        with pytest.raises(rewards.Unreachable, match="did not answer in 2 attempts.*504"):
            ask(retries=1)
        assert statuses == [200]
        statuses[:] = [500, 200]
        with pytest.raises(RuntimeError, match="answered 500: sorry"):
            ask()
        assert statuses == [200]
        server.shutdown()


def test_a_server_that_is_gone_or_silent():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/length"
        with pytest.raises(
            rewards.Unreachable, match="2 attempts.*refused"
        ):  # bound, but it does not listen
            reward_server.remote(url, retries=1, backoff=0.01)([""], [""])
        silent.listen()
        with pytest.raises(rewards.Unreachable, match="1 attempts.*timed out"):
            reward_server.remote(url, retries=0, timeout=0.05)([""], [""])


def test_a_server_in_a_process_of_its_own_and_one_that_hangs():
    code = """
import os, sys, threading
from rlhf.rollouts import reward_server, rewards
from rlhf.rollouts.reward_functions import length
hang = lambda *a, **k: threading.Event().wait()
both = rewards.combine({"hang": hang, "length": length})
kept = rewards.score_texts(both, [""], [""], timeout=1, columns={"completion_ids": [[1]]})
assert kept.total.tolist() == [1.0]
if sys.argv[1] == "hang":
    sys.exit()  # the thread that hangs must not keep the process
def crash(prompts, completions, **columns):
    os._exit(1)
with reward_server.serve({"length": length, "crash": crash}, port=0) as server:
    print(server.server_port, flush=True)
    server.serve_forever()
"""
    with (
        subprocess.Popen([sys.executable, "-c", code, "hang"]) as hanging,
        subprocess.Popen(
            [sys.executable, "-c", code, "serve"], stdout=subprocess.PIPE, text=True
        ) as serving,
    ):
        assert serving.stdout is not None
        ask = lambda name: reward_server.remote(
            f"http://127.0.0.1:{port}/{name}", retries=1, backoff=0.01
        )
        try:
            port = int(serving.stdout.readline())
            rows = {"completion_ids": [[1], [1, 2], [], [3]]}
            assert SCORE(ask("length"), columns=rows).total.tolist() == [1, 2, 0, 1]
            r = SCORE(
                rewards.combine({"good": lengths, "crash": ask("crash")})
            )  # the process is gone, the batch is not
            assert r.total.tolist() == [1, 2, 3, 4]
            assert "did not answer in 2 attempts" in r.failures[0].message
            assert hanging.wait(timeout=30) == 0
        finally:
            serving.kill()
            hanging.kill()
