"""Rewards that cannot be, and rewards that fail, with the files that they need."""

import json
from pathlib import Path

REWARDS = """
import os, sys

number = 3

class Scorer:
    def __call__(self, completions, **kw): return [0.0] * len(completions)

class Own(BaseException): pass

def fine(completions, **kw): return [1.0] * len(completions)
def needs(completions, answer): return [1.0] * len(completions)
def by_position(a, b, /): return [1.0] * len(a)
def two(p, c): return [1.0] * len(c)
def fails(completions, **kw): return 1 / 0
def exits(completions, **kw): sys.exit(3)
def leaves(completions, **kw): os._exit(3)
def interrupts(completions, **kw): raise KeyboardInterrupt
def own(completions, **kw): raise Own("mine")
def aborts(completions, **kw): os.abort()
def none(completions, **kw): return None
def words(completions, **kw): return ["good"] * len(completions)
def infinite(completions, **kw): return [float("inf")] * len(completions)
def few(completions, **kw): return []
def keys(completions, **kw): return {i: 1.0 for i, _ in enumerate(completions)}
def sleeps(completions, **kw): __import__("time").sleep(600)
async def awaits(completions, **kw): raise KeyError("solution")
"""
MODULES = {
    "mine": REWARDS,
    "broken": "def f(completions:\n",
    "tabs": "if True:\n\tx = 1\n        y = 2\n",
    "raises": "x = {}['key']\n",
    "exits": "import sys\nsys.exit('bye')\n",
    "leaves": "import os\nos._exit(7)\n",
    "interrupts": "raise KeyboardInterrupt\n",
    "needs": "import no_such_package_here\n",
    "nul": "x = 1\0\n",
    "empty": "",
}

START = [
    "grpo",
    "--model",
    "BASE",
    "--output",
    "OUT",
    "--steps",
    "1",
    "--batch_size",
    "2",
    "--num_samples",
    "2",
]
ASK = [*START, "--max_new_tokens", "2", "--dataset", "TMP/rows.jsonl"]


def reward(name: str, *more: str) -> list[str]:
    return [*ASK, "--reward", name, *more]


CASES: list[tuple[str, list[str], str]] = [
    ("reward: a typo of ours", reward("acuracy"), "did you mean accuracy?"),
    ("reward: a dot for a colon", reward("os.path.join"), "is module:function, so that here: os.path:join"),
    ("reward: no module", reward("no_such_module:f"), "No module named 'no_such_module'"),
    ("reward: no file", reward("TMP/nowhere.py:f"), "there is no file"),
    ("reward: no function", reward("TMP/mine.py:fin"), "has no fin; did you mean fine?"),
    ("reward: an empty module", reward("TMP/empty.py:f"), "has no f; it has no function"),
    ("reward: a number", reward("TMP/mine.py:number"), "is 3, which cannot be called"),
    ("reward: a class", reward("TMP/mine.py:Scorer"), "is a class"),
    ("reward: a module that is no Python", reward("TMP/broken.py:f"), "SyntaxError"),
    ("reward: tabs and spaces", reward("TMP/tabs.py:f"), "tabs.py:3"),
    ("reward: a module that raises", reward("TMP/raises.py:f"), "KeyError: 'key' (raises.py:1)"),
    ("reward: a module that exits", reward("TMP/exits.py:f"), "SystemExit: bye (exits.py:2)"),
    ("reward: a module that leaves", reward("TMP/leaves.py:f"), "ended its process, with exit code 7"),
    ("reward: a module that interrupts", reward("TMP/interrupts.py:f"), "KeyboardInterrupt"),
    ("reward: a module that lacks a package", reward("TMP/needs.py:f"), "No module named 'no_such_package_here' (needs.py:1)"),
    ("reward: a module with a NUL", reward("TMP/nul.py:f"), "cannot be imported"),
    ("reward: a missing column", reward("TMP/mine.py:needs"), "needs answer, but it is given"),
    ("reward: a module without a function", reward("my_rewards"), "a function of your own is module:function or file.py:function"),
    ("reward: a missing column of ours", reward("accuracy"), "reward 'accuracy' needs solution"),
    ("reward: positional parameters", reward("TMP/mine.py:by_position"), "needs a, b"),
    ("reward: other parameters", reward("TMP/mine.py:two"), "needs p, c"),
    ("reward: our column", reward("length", "--columns", "{note: completion_ids}"), "completion_ids of their own"),
    ("reward: twice", reward("[length, length]"), "names length twice"),
    ("reward: one that no number is", reward("length", "--reward_timeout", "nan"), "reward_timeout must be a number"),
    ("reward: a share above 1", reward("length", "--max_reward_failures", "1.5"), "max_reward_failures must be a number"),
]  # fmt: skip
FAILING: list[tuple[str, list[str], str]] = [  # when the first completions are there: below a line of the progress bar's
    ("reward: raises", reward("TMP/mine.py:fails"), "on every completion: ZeroDivisionError: division by zero (mine.py:15)"),
    ("reward: exits", reward("TMP/mine.py:exits"), "failed on every completion: SystemExit: 3 (mine.py:16)"),
    ("reward: leaves", reward("TMP/mine.py:leaves"), "ended its process, with exit code 3"),
    ("reward: interrupts", reward("TMP/mine.py:interrupts"), "KeyboardInterrupt"),
    ("reward: an exception of its own", reward("TMP/mine.py:own"), "Own: mine (mine.py:19)"),
    ("reward: aborts", reward("TMP/mine.py:aborts"), "ended its process, by SIGABRT"),
    ("reward: returns None", reward("TMP/mine.py:none"), "returned None"),
    ("reward: returns words", reward("TMP/mine.py:words"), "returned 'good', not a number"),
    ("reward: returns infinities", reward("TMP/mine.py:infinite"), "returned inf, not finite"),
    ("reward: returns too few", reward("TMP/mine.py:few"), "returned [] for one completion"),
    ("reward: returns a dict", reward("TMP/mine.py:keys"), "returned {0: 1.0}"),
    ("reward: hangs", reward("TMP/mine.py:sleeps", "--reward_timeout", "0.5"), "not there after"),
    ("reward: async, and raises", reward("TMP/mine.py:awaits"), "KeyError: 'solution' (mine.py:"),
]  # fmt: skip


def prepare(tmp: Path, base: str) -> None:
    """Writes the modules and the rows."""
    for name, text in MODULES.items():
        (tmp / f"{name}.py").write_text(text)
    row = json.dumps({"prompt": "2+2=", "note": "x"}) + "\n"
    (tmp / "rows.jsonl").write_text(row * 4)
