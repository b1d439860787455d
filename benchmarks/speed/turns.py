"""Taking turns, and what the times of a comparison say."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.peers import Process

# Seconds before a step, until the other sides' threads have come to rest.
REST = 0.3
# Steps that are not counted: programs compile, also once more on what the first step gives.
WARM = 2
# How far first losses may be from ours: relatively, and for numbers near 0.
SAME = {"sft": 1e-4, "dpo": 1e-4, "load": 0.0}
# Sides sample by their own random numbers; TRL's PPO leaves out what follows a sampled padding token.
SAME_SAMPLED = 0.2
SAME_ENTROPY = 0.05
NEAR_ZERO = 1e-3

Replies = list[dict[str, Any]]


def take_turns(processes: Mapping[str, Process], steps: int) -> dict[str, Replies]:
    """One step of each side after another; a side that fails is left out from then on.

    Returns: replies of the counted steps with the first one before them; of a side that failed the
    reply that says so.
    """
    replies: dict[str, Replies] = {side: [] for side in processes}
    for _ in range(WARM + steps):
        for side, process in processes.items():
            if "error" not in (replies[side] or [{}])[-1]:
                replies[side].append(reply_of(process))
    for process in processes.values():
        process.close()
    return {side: _counted(lines) for side, lines in replies.items()}


def reply_of(process: Process) -> dict[str, Any]:
    """A step's reply, also of a side that was ended, say for its memory."""
    try:
        return process.ask(rest=REST)
    except (BrokenPipeError, SystemExit):
        return {"error": f"ended with code {process.process.wait()}"}


def _counted(lines: Replies) -> Replies:
    return lines[-1:] if "error" in lines[-1] else [lines[0], *lines[WARM:]]


def summary(replies: Replies) -> dict[str, Any]:
    """Of a side: seconds of its steps, the first one's loss, the most memory."""
    first, *counted = replies
    if not counted:
        return {"error": first["error"]}
    seconds = [reply["seconds"] for reply in counted]
    return {
        **spread(seconds),
        "all": seconds,
        "first_loss": first.get("loss"),
        "first_entropy": first.get("entropy"),
        "memory_mib": counted[-1]["memory_mib"],
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """How many times as fast ours is, turn by turn: machines that slow down slow both sides down."""
    return spread([b / a for a, b in zip(ours, theirs, strict=True)])


def compared(job: str, sides: Mapping[str, Replies]) -> dict[str, Any]:
    """A row of the results."""
    of_sides = {side: summary(replies) for side, replies in sides.items()}
    peers = [side for side, one in of_sides.items() if side != "ours" and "error" not in one]
    row: dict[str, Any] = {"job": job, "sides": of_sides, "ratios": {}}
    if "error" in of_sides["ours"]:
        raise SystemExit(f"our side of {job} failed: {of_sides['ours']['error']}")
    for side in peers:
        row["ratios"][side] = ratios(of_sides["ours"]["all"], of_sides[side]["all"])
    if peers:
        row["faster_peer"] = min(peers, key=lambda side: of_sides[side]["median"])
        row["same"] = all(same(job, of_sides["ours"], of_sides[side]) for side in peers)
    return row


def same(job: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether two sides' first losses and entropies are those of one computation."""
    tolerance = SAME.get(job, SAME_SAMPLED)
    pairs = [
        (ours["first_loss"], theirs["first_loss"], tolerance),
        (ours["first_entropy"], theirs["first_entropy"], SAME_ENTROPY),
    ]
    return all(
        a is None or b is None or math.isclose(a, b, rel_tol=limit, abs_tol=NEAR_ZERO)
        for a, b, limit in pairs
    )
