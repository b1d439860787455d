"""Conversations with an environment through the commands: what is played is learned from."""

import numpy as np
import pyarrow.parquet
import pytest
from marks import exhaustive

from rlhf import cli
from rlhf.recipes import grpo
from rlhf.rollouts.environment import Environment, Turn
from rlhf.training.runs import metrics_of

TASK = ["--dataset", "task:reverse", "--dataset_size", "16", "--steps", "2", "--batch_size", "4"]
SHORT = ["--max_new_tokens", "3", "--max_turns", "2", "--max_conversation_tokens", "12"]

TALK = '''
from rlhf.rollouts.environment import Environment, Turn

def make():
    """A second turn is asked for; a long row is worth more."""
    def step(state, ids, text):
        row, turn = state
        return Turn((row, turn + 1), "ab", reward=len(ids) + 0.5, done=turn == 1)
    return Environment(lambda row: (row["prompt"], 0), step)

def no_row():
    def reset(row):
        raise OSError("no sandbox")
    return Environment(reset, lambda *turn: Turn(None))

def wrong():
    return Environment(lambda row: row, lambda state, ids, text: ("x", 0.0, True))

def mistakes():
    def step(state, ids, text):
        return Turn(state, reward=float(ids[0] % 2), done=True, error="no such call")
    return Environment(lambda row: row, step)

def number():
    return 3

def fails():
    raise OSError("no network")
'''


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    file = tmp_path_factory.mktemp("environment") / "talk.py"
    file.write_text(TALK)
    return str(file)


@pytest.mark.parametrize("command", exhaustive(["grpo", "rloo", "ppo"], quick=["grpo"]))
def test_turns_are_played_and_learned_from(command, base, talk, tmp_path):
    argv = [command, "--model", base, *TASK, *SHORT, "--environment", f"{talk}:make"]
    more = ["--num_samples", "2", "--log_completions", "1", "--observation_template", "-{}-"]
    held_out = ["--eval_split", "train"]
    assert cli.main([*argv, *more, *held_out, "--output", str(tmp_path / "run")]) == 0
    rows = metrics_of(tmp_path / "run")
    assert [row["phase"] for row in rows] == ["train", "train", "eval"]
    first, last = rows[0], rows[-1]
    assert first["environment/turns"] == 2
    assert first["environment/errors"] == last["eval_environment/errors"] == 0
    # Two turns of one to three tokens, each worth its tokens and a half.
    sampled = first["completions/mean_length"]
    np.testing.assert_allclose(first["reward"], sampled + 1, rtol=1e-6)
    # The step's samples: what the environment said stands between two turns.
    table = pyarrow.parquet.read_table(next((tmp_path / "run" / "samples").glob("*train*")))
    assert all("-ab-" in text for text in table["completion"].to_pylist())


def test_mistakes_of_the_policy_are_no_failures_of_the_environment(base, talk, tmp_path):
    argv = ["grpo", "--model", base, *TASK, *SHORT, "--environment", f"{talk}:mistakes"]
    assert cli.main([*argv, "--num_samples", "2", "--output", str(tmp_path / "run")]) == 0
    assert [row["environment/errors"] for row in metrics_of(tmp_path / "run")] == [1, 1]


@pytest.mark.exhaustive
def test_an_environment_from_python(base, tmp_path):
    def step(state, ids, text):
        return Turn(None, reward=float(ids[0] % 2), done=True)

    trained = grpo.main(
        model=base,
        dataset="task:reverse",
        environment=Environment(lambda row: row, step),
        output=str(tmp_path / "run"),
        steps=1,
        batch_size=4,
        num_samples=4,
        max_new_tokens=2,
        max_conversation_tokens=4,
    )
    assert trained.metrics["environment/turns"] == [1.0]
    assert 0 < trained.metrics["reward"][0] < 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ("no_row", "environment.reset failed on all"),
        ("no_row", "no sandbox"),
        (
            "wrong",
            "failed in every turn of a step: turn 1: TypeError: environment.step must return",
        ),
    ],
)
def test_an_environment_that_fails_stops_the_run(make, message, base, talk, tmp_path, capsys):
    argv = ["grpo", "--model", base, *TASK, *SHORT, "--environment", f"{talk}:{make}"]
    assert cli.main([*argv, "--output", str(tmp_path / "run")]) != 0
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--environment", "talk.py"], "'talk.py' names no function; write file.py:make"),
        (["--environment", "TALK:mak"], "has no mak; did you mean make?"),
        (["--environment", "TALK:number"], "TALK:number created 3; it must return an"),
        (["--environment", "TALK:fails"], "TALK:fails: OSError: no network (talk.py:"),
        (["--environment", "nowhere.py:make"], "nowhere.py"),
        (
            ["--environment", "TALK:make", "--reward", "length"],
            "gives the rewards itself, but reward is ['length']",
        ),
        (["--environment", "TALK:make", "--stop", "x"], "stop ['x'] ends completions"),
        (
            ["--environment", "TALK:make", "--observation_template", "user:"],
            "observation_template 'user:' has no {}",
        ),
    ],
)
def test_environments_that_cannot_be(options, message, base, talk, tmp_path, capsys):
    options = [option.replace("TALK", talk) for option in options]
    argv = ["grpo", "--model", base, *TASK, *SHORT, *options, "--output", str(tmp_path / "no")]
    assert cli.main(argv) == 2
    assert message.replace("TALK", talk) in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
