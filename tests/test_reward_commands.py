"""Rewards of a user's on the command line: called as TRL calls them, checked before the model loads, bounded in training."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from marks import exhaustive
from test_bad_inputs import load

from rlhf import cli
from rlhf.training import loading, runs
from rlhf.training import rewards as scoring

CASES = load(Path(__file__).parent / "bad_inputs" / "cases_rewards.py")
GRPO = ["--batch_size", "4", "--num_samples", "2", "--max_new_tokens", "4"]
REWARDS = """
calls = [0]

def chat(prompts, completions, completion_ids, solution, note, **kw):
    assert all(prompt[0] == {"role": "user", "content": "2+2="} for prompt in prompts), prompts
    assert all(len(c) == 1 and c[0]["role"] == "assistant" for c in completions), completions
    assert len({len(x) for x in (prompts, completions, completion_ids, solution, note)}) == 1
    assert solution == [4] * len(solution), solution
    return [len(c[0]["content"]) for c in completions]

def text(prompts, completions, **kw):
    assert all(prompt == "2+2=" for prompt in prompts), prompts
    return [float(len(c)) for c in completions]

def later(completions, **kw):
    calls[0] += 1
    if calls[0] > 2:
        raise ValueError("the judge is gone")
    return [1.0] * len(completions)

def some(completions, **kw):
    return [None if i else "odd" for i, c in enumerate(completions)] if len(completions) > 1 else [1.0]

def fails(completions, **kw): return 1 / 0
def short(completions, **kw): return [1.0]
def exits(completions, **kw): raise SystemExit(3)
def nothing(completions, **kw): return [0.0] * len(completions)
def needs(completions, answer): return [0.0] * len(completions)
def ties(prompts, completions, others): return [0.5] * len(completions)
def beyond(prompts, completions, others): return [2] * len(completions)
"""


@pytest.fixture
def here(tmp_path, monkeypatch, base):
    """A folder with rewards, rows, and a model with a chat template; commands run in it."""
    (tmp_path / "mine.py").write_text(REWARDS)
    shutil.copytree(base, tmp_path / "base")
    config = tmp_path / "base" / "tokenizer_config.json"
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": template}))
    chat, text = [{"role": "user", "content": "2+2="}], "2+2="
    for name, prompt in (("chat", chat), ("text", text)):
        row = json.dumps({"prompt": prompt, "solution": 4, "note": "x"}) + "\n"
        (tmp_path / f"{name}.jsonl").write_text(row * 8)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def grpo(*more, data="text"):
    return cli.main(
        ["grpo", "--model", "base", "--dataset", f"{data}.jsonl", *GRPO, "--output", "out", *more]
    )


def test_rewards_are_called_as_trl_calls_them(here):
    more = ["--eval_dataset", "chat.jsonl", "--steps", "1"]
    assert grpo("--reward", "mine:chat", "accuracy", "think_format", *more, data="chat") == 0
    row = runs.metrics_of(here / "out")[0]
    assert (
        row["rewards/mine:chat/failures"]
        == row["rewards/accuracy/failures"]
        == row["rewards/failures"]
        == 0
    )
    (table,) = (here / "out" / "samples").iterdir()
    assert pyarrow.parquet.read_table(table).to_pydict()["reason"] == [None] * 8
    shutil.rmtree(here / "out")
    assert grpo("--reward", "mine:text", "--steps", "1") == 0
    assert runs.metrics_of(here / "out")[0]["rewards/mine:text/failures"] == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    exhaustive([case[1:] for case in CASES.FAILING], quick=[CASES.FAILING[0][1:]]),
    ids=[case[0] for case in CASES.FAILING],
)
def test_a_reward_that_fails_from_the_start_is_one_line(base, tmp_path, capfd, argv, message):
    CASES.prepare(tmp_path, base)
    words = {"BASE": base, "OUT": str(tmp_path / "out"), "TMP": str(tmp_path)}
    assert (
        cli.main([re.sub("BASE|OUT|TMP", lambda found: words[found[0]], word) for word in argv])
        == 2
    )
    said = capfd.readouterr().err
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("rlhf grpo: ")]
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            ["mine:fails"],
            "reward 'mine:fails' failed on every completion: ZeroDivisionError: division by zero (mine.py:",
        ),
        pytest.param(
            ["mine:short"],
            "reward 'mine:short' failed on every completion: returned 1 rewards for 8 completions; give one",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            ["mine:exits", "length"],
            "reward 'mine:exits' failed on every completion: SystemExit: 3 (mine.py:",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_a_reward_that_fails_on_every_row_stops_the_run_in_one_line(here, capsys, reward, message):
    assert grpo("--reward", *reward, "--steps", "3") == 2
    assert message in (said := capsys.readouterr().err)
    assert "Traceback" not in said
    assert not (here / "out").exists()  # the next try may have it
    assert grpo("--reward", "mine:nothing", "--steps", "1") == 0


def test_a_run_whose_reward_breaks_down_is_saved_and_goes_on(here, capsys):
    ask = ["--reward", "mine:later", "--steps", "6"]
    assert grpo(*ask) == 2
    said = capsys.readouterr().err
    assert (
        "out: stopped after step 4 of 6: reward 'mine:later' failed on 24 of 40 completions in the last 5 steps"
        in said
    )
    assert "ValueError: the judge is gone (mine.py:" in said
    assert grpo(*ask, "--resume") == 0  # in a new process the reward is well for two steps again
    steps = [row["step"] for row in runs.metrics_of(here / "out") if row["phase"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_rows_without_a_reward_have_a_reason(here):
    more = ["--eval_dataset", "text.jsonl", "--steps", "1", "--max_reward_failures", "1"]
    assert grpo("--reward", "mine:some", *more) == 0
    (table,) = (here / "out" / "samples").iterdir()
    found = pyarrow.parquet.read_table(table).to_pydict()
    assert found["reason"] == [
        "mine:some: returned 'odd', not a number or a list of numbers",
        *[None] * 7,
    ]
    assert np.isnan(found["reward"]).all()


@pytest.mark.exhaustive
def test_that_rewards_teach_nothing_is_said_once(here, capsys):
    assert grpo("--reward", "mine:nothing", "--steps", "21") == 0
    assert (
        capsys.readouterr().err.count(
            "every reward was 0 in the last 10 steps: there is nothing to learn from that"
        )
        == 1
    )


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([[0.5] * 4], "every reward was 0.5"),
        ([[np.nan] * 4], "no completion could be scored"),
        ([[0.0, 0.0, 1.0, 1.0]], "all completions of a prompt had the same reward"),
        ([[0.0, 1.0, 1.0, 1.0]], None),
        ([[0.0] * 4, [0.0, 0.0, 0.0, 1.0]], None),
    ],
)
def test_what_there_is_to_learn(rewards, message, capsys):
    warn_if_equal = scoring.EqualRewards()
    of_steps = iter(rewards * scoring.RECENT)
    for _ in range(scoring.RECENT):
        warn_if_equal(np.array(next(of_steps), np.float32), 2)
    said = capsys.readouterr().err
    assert (message in said) if message else not said


@pytest.mark.parametrize(
    ("reward", "more", "message"),
    [
        (
            "mine:needs",
            [],
            "reward 'mine:needs' needs answer, but it is given prompts, completions, completion_ids, finished",
        ),
        (
            "accuracy",
            ["--columns", "{solution: answer}"],
            "reward 'accuracy' needs solution, but it is given",
        ),
        ("reasoning_accuracy", ["--columns", "{solution: answer}"], "needs solution"),
        (
            "mine:text",
            ["--columns", "{note: finished}"],
            "the rows have a column finished of their own; rename it",
        ),
        (
            "mine:text",
            ["--columns", "{note: prompts}"],
            "the rows have a column prompts of their own; rename it",
        ),
        ("mine.text", [], "a function of your own is module:function, so that here: mine:text"),
        ("mine:txt", [], "mine has no txt; did you mean text?"),
        ("min:text", [], "reward 'min:text': No module named 'min'"),
        ("math", [], "pip install math-verify"),
    ],
)
def test_rewards_that_cannot_be_are_refused_before_the_model_loads(
    here, capsys, monkeypatch, reward, more, message
):
    monkeypatch.setitem(sys.modules, "math_verify", None)  # as where it is not installed
    monkeypatch.setattr(loading.huggingface, "load", None)
    assert grpo("--reward", reward, "--steps", "1", *more) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert message in said
    assert not Path("out").exists() or not any(Path("out").iterdir())


@pytest.mark.exhaustive
def test_completions_are_compared_by_a_function_of_the_user_s(here, capsys):
    ask = [
        "eval",
        "base",
        "--dataset",
        "text.jsonl",
        "--reward",
        "length",
        "--against",
        "base",
        "--max_new_tokens",
        "2",
    ]
    assert cli.main([*ask, "--preference", "mine:ties"]) == 0
    assert "win_rate 0.5" in capsys.readouterr().out
    assert cli.main([*ask, "--preference", "mine:beyond"]) == 2
    assert (
        "preference mine:beyond returned 2, which is no number from 0 to 1"
        in capsys.readouterr().err
    )
    assert cli.main([*ask, "--preference", "mine:fails"]) == 2
    assert "preference mine:fails: TypeError" in capsys.readouterr().err
