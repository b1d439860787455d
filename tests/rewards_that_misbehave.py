"""Reward functions as users should not write them, for processes of their own; a completion "bad" brings it out."""

import asyncio
import ctypes
import os
import signal
import sys
import threading
import time


class Own(BaseException):
    """Neither an Exception nor an exit."""


def _when_bad(misbehave):
    def reward(prompts, completions, **columns):
        if "bad" in completions:
            returned = misbehave(completions)
            if returned is not None:
                return returned
        return [float(len(c)) for c in completions]

    return reward


def _raises(error):
    def misbehave(completions):
        raise error

    return _when_bad(misbehave)


def _ignores(completions):
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    time.sleep(60)


def _forks(completions):
    if os.fork() == 0:
        time.sleep(60)
    os.fork()  # both go on from here
    time.sleep(60)


def _eats(completions):
    hoard = []
    while True:
        hoard.append(b"x" * (16 << 20))


def _closes(completions):
    sys.stdout.close()
    os.closerange(0, 256)
    time.sleep(60)


def _threads(completions):
    for _ in range(8):
        threading.Thread(target=time.sleep, args=(60,)).start()
    sys.exit(0)


def _deep(completions):
    sys.setrecursionlimit(1 << 30)
    return _deep(completions)


def _endless():
    while True:
        yield 1.0


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no words")


class Silent:
    def __repr__(self):
        time.sleep(60)

    def __iter__(self):
        return self

    def __next__(self):
        time.sleep(60)


sleeps = _when_bad(lambda completions: time.sleep(60))
spins = _when_bad(lambda completions: sum(iter(int, 1)))
holds_the_lock = _when_bad(
    lambda completions: ctypes.PyDLL(None).sleep(60)
)  # PyDLL keeps Python's lock
ignores = _when_bad(_ignores)
forks = _when_bad(_forks)
leaves = _when_bad(lambda completions: os._exit(3))
exits = _raises(SystemExit(3))
interrupts = _raises(KeyboardInterrupt())
own = _raises(Own("mine"))
unspeakable = _raises(Unspeakable())
cancels = _raises(asyncio.CancelledError())
eats = _when_bad(_eats)
crashes = _when_bad(lambda completions: ctypes.string_at(0))
aborts = _when_bad(lambda completions: os.abort())
recurses = _when_bad(_deep)
closes = _when_bad(_closes)
threads = _when_bad(_threads)
objects = _when_bad(lambda completions: [object() if c == "bad" else 1.0 for c in completions])
infinite = _when_bad(lambda completions: [float("inf") if c == "bad" else 1.0 for c in completions])
nothing = _when_bad(lambda completions: [[]] if len(completions) == 1 else 1 / 0)
endless = _when_bad(lambda completions: _endless())
silent = _when_bad(lambda completions: Silent())
huge = _when_bad(lambda completions: [10**5000 if c == "bad" else 1.0 for c in completions])


async def awaits(completions, **columns):
    await asyncio.sleep(60 if "bad" in completions else 0)
    return [float(len(c)) for c in completions]


def prints(completions, **columns):
    print("x" * 100_000)
    sys.stdout.write("y" * 100_000)
    os.write(1, b"z" * 100_000)
    return [float(len(c)) for c in completions]


def given(prompts, completions, completion_ids, solution, **columns):
    """What a reward is called with, told by an exception."""
    raise ValueError(f"{prompts} {completions} {solution} {sorted(columns)}")


def only(completions, solution):
    """It has no **columns."""
    return [float(c == s) for c, s in zip(completions, solution, strict=True)]


class Weighted:
    """An object that can be called, with something in it."""

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, completions, **columns):
        return [self.weight * len(c) for c in completions]


weighted = Weighted(2.0)
number = 3
