"""Reward functions in processes of their own: what hangs, exits, crashes or eats memory costs its row, in bounded time."""

import os
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import rewards_that_misbehave as bad
from marks import exhaustive

from rlhf.rollouts import reward_functions, rewards
from rlhf.rollouts.workers import Worker, in_worker

TEXTS = ["a", "bad", "cc", "dddd"]
MEMORY = 200 << 20
HANGING = ["sleeps", "spins", "holds_the_lock", "ignores", "forks", "awaits", "silent"]
COSTING_A_ROW = {  # name -> why the row has no reward
    **dict.fromkeys(HANGING, "not there after"),
    "leaves": "ended its process, with exit code 3",
    "exits": "SystemExit: 3 (rewards_that_misbehave.py:",
    "interrupts": "KeyboardInterrupt:  (rewards_that_misbehave.py:",
    "own": "Own: mine (rewards_that_misbehave.py:",
    "unspeakable": "Unspeakable: (its text cannot be had)",
    "cancels": "CancelledError",
    "eats": "MiB of memory",
    "crashes": "ended its process, by SIGSEGV",
    "aborts": "ended its process, by SIGABRT",
    "recurses": "",  # a crash, or too much memory or time
    "closes": "closed its pipe",
    "threads": "SystemExit: 0",
    "objects": "returned <object object at",
    "infinite": "returned inf, not finite",
    "nothing": "returned 0 numbers for a row",
    "endless": "returned [1.0, 1.0] for one completion",
    "huge": "not a number",
}
QUICK = ["spins", "silent", "exits", "crashes", "objects", "infinite", "nothing", "endless", "huge"]


@pytest.mark.parametrize("name", exhaustive(COSTING_A_ROW, quick=QUICK))
def test_what_misbehaves_costs_its_row(name):
    start = time.monotonic()
    timeout = 0.8 if name in (*HANGING, "recurses") else 10.0
    reward = in_worker(f"{bad.__name__}:{name}", timeout=timeout, memory=MEMORY)
    found = rewards.try_texts(reward, [""] * 4, TEXTS)
    assert np.isnan(found.total).tolist() == [False, True, False, False], found.reasons
    (reasons,) = found.reasons.values()
    assert COSTING_A_ROW[name] in reasons[1]
    if name != "recurses":
        assert rewards.metrics(found)[f"rewards/{reward.__name__}/timeouts"] == (name in HANGING)
    assert (
        rewards.try_texts(reward, [""] * 2, ["a", "cc"]).failures == []
    )  # the next batch is none the worse
    reward.close()
    assert time.monotonic() - start < 15


def test_forks_die_with_their_process():
    mine = lambda: [
        int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _session(int(pid)) == session
    ]
    reward = in_worker(f"{bad.__name__}:forks", timeout=0.3)
    session = reward._worker._process.pid
    rewards.try_texts(reward, [""], ["bad"])
    end = time.monotonic() + 10
    while mine() and time.monotonic() < end:
        time.sleep(0.02)
    assert mine() == []
    reward.close()


def _session(pid: int) -> int:
    try:
        state, _, _, session = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
    except OSError:
        return 0
    return 0 if state == "Z" else int(session)


def test_a_batch_of_rows_that_all_hang_is_bounded():
    reward = in_worker(f"{bad.__name__}:sleeps", timeout=0.5)
    reward.load()
    start = time.monotonic()
    found = rewards.try_texts(reward, [""] * 64, ["bad"] * 64)
    assert time.monotonic() - start < 5
    assert rewards.metrics(found)[f"rewards/{reward.__name__}/timeouts"] == 64
    reward.close()


def test_what_is_printed_goes_to_stderr_alone(capfd):
    with_prints = in_worker(f"{bad.__name__}:prints")
    assert rewards.score_texts(with_prints, [""] * 4, TEXTS).total.tolist() == [1, 3, 2, 4]
    with_prints.close()
    out, err = capfd.readouterr()
    assert out == ""
    assert {letter: err.count(letter) >= 100_000 for letter in "xyz"} == dict.fromkeys("xyz", True)


def test_rewards_are_called_by_keyword_with_what_they_take():
    columns = {
        "solution": ["a", "b", "cc", 4],
        "completion_ids": [[1]] * 4,
        "self": [1] * 4,
        "number": [2] * 4,
        "timeout": [3] * 4,
    }
    told = in_worker(f"{bad.__name__}:given")
    (reasons,) = rewards.try_texts(told, ["p"] * 4, TEXTS, columns=columns).reasons.values()
    assert (
        "ValueError: ['p'] ['a'] ['a'] ['number', 'self', 'timeout'] (rewards_that_misbehave.py:"
        in reasons[0]
    )
    only = in_worker(f"{bad.__name__}:only")
    assert rewards.score_texts(only, ["p"] * 4, TEXTS, columns=columns).total.tolist() == [
        1,
        0,
        1,
        0,
    ]
    assert rewards.score_texts(bad.only, ["p"] * 4, TEXTS, columns=columns).total.tolist() == [
        1,
        0,
        1,
        0,
    ]
    only.load()
    assert rewards.missing(only, ["prompts", "completions"]) == ["solution"]
    with pytest.raises(
        ValueError, match="reward '.*:only' needs solution, but there are prompts, completions"
    ):
        rewards.score_texts(only, ["p"] * 4, TEXTS)
    for reward in (told, only):
        reward.close()


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (bad.Weighted(3.0), [3, 9, 6, 12]),
        (f"{bad.__name__}:weighted", [2, 6, 4, 8]),
        (f"{bad.__name__}:weighted.__call__", [2, 6, 4, 8]),
        (partial(reward_functions.numeric_accuracy, tolerance=0.5), [1, 0, 1, None]),
        (reward_functions.length, [1, 2, 3, 0]),
    ],
)
def test_functions_partials_and_objects(function, expected):
    texts = TEXTS if expected[0] != 1 else ["9", "bad", "12", "3x"]
    reward = in_worker(function)
    ids = [[0] * n for n in (1, 2, 3, 0)]
    found = rewards.score_texts(
        reward, [""] * 4, texts, columns={"solution": ["10"] * 4, "completion_ids": ids}
    )
    np.testing.assert_array_equal(found.total, np.array(expected, float))
    reward.close()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "no_such_module:f",
            "'no_such_module:f': No module named 'no_such_module'; is it in this folder",
        ),
        ("no.such.module:f", "No module named 'no'; is it in this folder"),
        ("os.no_such:f", "No module named 'os.no_such'; 'os' is not a package; is it"),
        (f"{bad.__name__}:weightd", "has no weightd; did you mean weighted"),
        (f"{bad.__name__}:zzz", "has no zzz; it has"),
        (f"{bad.__name__}:number", "number of .* is 3, which cannot be called"),
        (f"{bad.__name__}:Weighted", "is a class; give a function"),
        ("broken:f", r"cannot be imported: SyntaxError: .* \(broken.py:2\)"),
        ("raises:f", r"cannot be imported: KeyError: 'x' \(raises.py:1\)"),
        ("exits:f", r"cannot be imported: SystemExit: 0 \(exits.py:2\)"),
        ("interrupts:f", r"cannot be imported: KeyboardInterrupt:  \(interrupts.py:1\)"),
        ("leaves:f", "cannot be imported: ended its process, with exit code 7"),
        (
            "needs:f",
            r"cannot be imported: ModuleNotFoundError: No module named 'nothing_here' \(needs.py:1\)",
        ),
        ("hangs:f", "cannot be imported: not there after 0.8 s"),
        ("nowhere/file.py:f", "there is no file nowhere/file.py"),
        ("nul.py:f", "cannot be imported"),
    ],
)
def test_names_that_cannot_be_called_say_what_they_are(name, message, tmp_path, monkeypatch):
    files = {
        "broken": "x = 1\ny = (",
        "raises": "{}['x']",
        "exits": "import sys\nsys.exit(0)",
        "interrupts": "raise KeyboardInterrupt",
        "leaves": "import os\nos._exit(7)",
        "needs": "import nothing_here",
        "hangs": "while True: pass",
        "nul": "\0",
    }
    for file, text in files.items():
        (tmp_path / f"{file}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    worker = Worker(name)
    with pytest.raises(ValueError, match=message) as refusal:
        worker.signature(0.8)
    assert "\n" not in str(refusal.value)
    with pytest.raises(
        ValueError, match=r"cannot be imported|no_such|No module|has no|which|class|no file"
    ):
        worker.signature(0.8)  # it is not tried for ever
    worker.close()


def test_files_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import helper\ndef f(completions, **kw): return [helper.n] * len(completions)\n"
    )
    (tmp_path / "helper.py").write_text("n = 7\n")
    monkeypatch.chdir(tmp_path)
    for name in ("mine:f", "mine.py:f", f"{tmp_path}/mine.py:f"):
        reward = in_worker(name)
        assert rewards.score_texts(reward, [""], [""]).total.tolist() == [7.0]
        reward.close()
    assert "mine" not in sys.modules  # nothing of it runs here


def test_what_no_other_process_can_find_is_refused():
    with pytest.raises(ValueError, match="cannot be found by another process"):
        in_worker(lambda completions: [0.0])
    code = "from rlhf.rollouts.workers import in_worker\ndef f(completions): return [1.0]\nin_worker(f)"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert "ValueError: f is of the program that runs" in ran.stderr


def test_a_process_ends_with_the_one_that_started_it():
    code = (
        "from rlhf.rollouts.workers import in_worker\nimport os, sys, time\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"w = in_worker({bad.__name__ + ':awaits'!r})\nw.load()\nprint(w._worker._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    pid, end = int(ran.stdout), time.monotonic() + 10
    while _session(pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert not _session(pid)


def test_a_process_has_no_gpu_of_jax(monkeypatch, tmp_path):
    (tmp_path / "platform.py").write_text("")
    (tmp_path / "asks.py").write_text(
        "import os\ndef f(completions): return [float(os.environ['JAX_PLATFORMS'] == 'cpu')] * len(completions)\n"
    )
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.chdir(tmp_path)
    reward = in_worker("asks:f")
    assert rewards.score_texts(reward, [""], [""]).total.tolist() == [1.0]
    reward.close()


@pytest.mark.parametrize("kind", ["exits", "interrupts", "own", "cancels", "unspeakable"])
@pytest.mark.parametrize("is_async", [False, True])
def test_in_a_thread_too_whatever_is_raised_costs_its_row(kind, is_async):
    plain = getattr(bad, kind)

    async def awaited(**given):
        return plain(**given)

    found = rewards.score_texts(awaited if is_async else plain, [""] * 4, TEXTS)
    assert np.isnan(found.total).tolist() == [False, True, False, False]
    assert COSTING_A_ROW[kind].split(" (")[0].strip(": ") in found.failures[1].message


def test_math_checking_is_bounded(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text(
        "import time\n"
        "def parse(text, parsing_timeout): return [text.strip('$').removeprefix('\\\\boxed{').removesuffix('}')]\n"
        "def verify(gold, answer, timeout_seconds): return time.sleep(60) if '9^9^9' in answer else gold == answer\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(
        sys.modules, "math_verify", types.ModuleType("math_verify")
    )  # here; there it is the file
    reward = in_worker(reward_functions.math_accuracy(), timeout=1.0)
    reward.load()
    found = rewards.score_texts(
        reward, [""] * 4, ["7", "8", "9^9^9", "$7$"], columns={"solution": [7, "7", "7", "7"]}
    )
    np.testing.assert_array_equal(found.total, [1, 0, np.nan, 1])
    reward.close()
