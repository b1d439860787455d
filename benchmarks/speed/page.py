"""The page: tables and sentences of what was measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.speed import scaling
from benchmarks.speed.jobs import JOBS
from benchmarks.speed.sides import NAMES, SIDES

Results = Mapping[str, Any]

# Times as fast as the faster peer, at least.
BARS = {"sft": 1.15, "dpo": 1.5, "grpo": 1.5, "ppo": 1.5, "decode": 1.5}
# Share of the machine's matrix rate that a step of SFT reaches, at least.
RATE_BAR = 0.7
# Share of the processor that other programs may use.  torch's threads wait in loops: on two busy cores
# its decoding took 21 s, and 1.9 s with threads that sleep (`OMP_WAIT_POLICY=passive`).
QUIET = 0.1
NONE = "–"

HEAD = """# Speed

Made by `python -m benchmarks.speed`: ours, TRL with torch, and Tunix, each in an environment and a process of its own, on the
same weights, tokens, precision (float32) and reward, one step of each side after another.  The model has Qwen2's architecture.
"""
STEPS = """- *seconds*: the median of a step; programs were compiled before.
- *times as fast*: as the faster of the two peers, the median over turns, with the lowest and highest turn.
- *peak*: the most memory that a side's process held, or on an accelerator its memory there; compilation is in it.
- *first losses*: of the job's first step.  Where completions are sampled they depend on a side's random numbers, which is
  also why entropies (nats a sampled token) differ a little.
- PPO: TRL's trainer is that of 1.12, the last with one.  Its value model and Tunix's are networks of their own; our value
  head sits on the policy's trunk.
- load: modules are imported already; ours reads the tokenizer too.
- TRL's gradient checkpointing is off.
"""
STARTS = """Seconds from the start of a process to the end of its first step, or to a checkpoint that is loaded (the median of
fresh processes, imports in it), without and with JAX's persistent compilation cache filled; *compile*: of our step alone.
"""
SCALING = """The slope of log time over log size, by least squares, of a step at each of the sizes, which take turns.
*attention's share*: of the operations at the longest length, those that grow with its square; decoding's are left out.
"""
BATCHING = """Tokens a second where completions end at random: rows that are refilled beside one fixed batch after another.
"""


def text(results: Results) -> str:
    """The page as Markdown; what was not measured is left out."""
    parts = [HEAD]
    if results.get("jobs"):
        parts += ["## Steps\n", table(step_lines(results)), STEPS, reasons(results)]
    if results.get("jobs") and loss_lines(results):
        parts += ["### First losses\n", table(loss_lines(results))]
    of_bars = bars(results)
    if of_bars:
        parts += ["## Bars\n", "\n".join(f"- {line}" for line in of_bars) + "\n"]
    if results.get("starts"):
        parts += ["## Starts\n", STARTS, table(start_lines(results["starts"]))]
    if results.get("machine"):
        parts += ["## What the machine can do\n", table(machine_lines(results))]
    if results.get("scaling"):
        parts += ["## Scaling\n", SCALING, table(scaling_lines(results))]
    if results.get("batching"):
        parts += ["## Continuous batching\n", BATCHING, table(batching_lines(results["batching"]))]
    parts.append(", ".join(f"{key} {value}" for key, value in results["about"].items()) + "\n")
    return "\n".join(part for part in parts if part)


def short(results: Results) -> str:
    """A table for the README."""
    lines = [
        {
            "job": f"{row['job']}: {row['what']}",
            "seconds": seconds(row, "ours"),
            "TRL": seconds(row, "trl"),
            "Tunix": seconds(row, "tunix"),
            "times as fast as the faster": ratio(row),
        }
        for row in rows(results)
    ]
    return table(lines)


def rows(results: Results) -> list[dict[str, Any]]:
    return [results["jobs"][job] for job in JOBS if job in results["jobs"]]


def step_lines(results: Results) -> list[dict[str, str]]:
    return [
        {
            "job": f"{row['job']}: {row['what']}",
            **{f"{NAMES[side]}, seconds": seconds(row, side) for side in SIDES},
            "times as fast": ratio(row, with_range=True),
            **{f"{NAMES[side]}, peak MiB": memory(row, side) for side in SIDES},
        }
        for row in rows(results)
    ]


def seconds(row: Mapping[str, Any], side: str) -> str:
    one = row["sides"].get(side, {})
    return digits(one["median"]) if "median" in one else NONE


def memory(row: Mapping[str, Any], side: str) -> str:
    one = row["sides"].get(side, {})
    return f"{one['memory_mib']:,.0f}" if "memory_mib" in one else NONE


def ratio(row: Mapping[str, Any], *, with_range: bool = False) -> str:
    if "faster_peer" not in row:
        return NONE
    found = row["ratios"][row["faster_peer"]]
    of_turns = f" ({found['lowest']:.2f}–{found['highest']:.2f})" if with_range else ""
    return f"{found['median']:.2f}{of_turns}"


def reasons(results: Results) -> str:
    """Why a cell is empty."""
    lines = [
        f"- {NAMES[side]}, {row['job']}: did not run: {one['error']}"
        for row in rows(results)
        for side, one in row["sides"].items()
        if "error" in one
    ]
    return "\n".join(lines) + "\n" if lines else ""


def loss_lines(results: Results) -> list[dict[str, str]]:
    def shown(one: Mapping[str, Any]) -> str:
        values = [one.get("first_loss"), one.get("first_entropy")]
        # A sum that makes no zero negative.
        found = [f"{round(value, 4) + 0.0:,.4f}" for value in values if value is not None]
        return ", entropy ".join(found) or NONE

    return [
        {
            "job": row["job"],
            **{NAMES[side]: shown(row["sides"].get(side, {})) for side in SIDES},
            "the same": ("yes" if row["same"] else "no") if "same" in row else NONE,
        }
        for row in rows(results)
        if row["job"] != "load"
    ]


def bars(results: Results) -> list[str]:
    """Every bar of what was measured, and whether it is held."""
    found = []
    for row in rows(results) if results.get("jobs") else []:
        bar = BARS.get(row["job"])
        if bar and "faster_peer" in row:
            value = row["ratios"][row["faster_peer"]]["median"]
            peer = NAMES[row["faster_peer"]]
            found.append(
                f"{row['job']}: {value:.2f} times as fast as {peer}, the faster peer; "
                f"the bar is {bar}: {held(value >= bar)}{of_busy(row)}."
            )
    share = rate_share(results)
    if share is not None:
        found.append(
            f"sft: {share:.0%} of the machine's matrix rate; the bar is {RATE_BAR:.0%}: "
            f"{held(share >= RATE_BAR)}."
        )
    for row in results.get("scaling", {}).values():
        found.append(
            f"{row['job']}, {row['axis']}: exponent {row['exponent']:.2f}; the bar is "
            f"{row['bar']}: {held(scaling.is_held(row))}."
        )
    return found


def of_busy(row: Mapping[str, Any]) -> str:
    """What makes a comparison one that says little."""
    share = row.get("busy", 0.0)
    if share <= QUIET:
        return ""
    return f", but other programs used {share:.0%} of the processor, which slows torch most"


def held(is_held: bool) -> str:
    return "held" if is_held else "not held"


def rate_share(results: Results) -> float | None:
    """Of the machine's matrix rate, what a step of SFT reaches."""
    machine = results.get("machine")
    sft = results.get("jobs", {}).get("sft")
    if not machine or not sft:
        return None
    per_second = machine["step_flops"] / sft["sides"]["ours"]["median"]
    return per_second / machine["rate"]["median"]


def machine_lines(results: Results) -> list[dict[str, str]]:
    machine = results["machine"]
    peaks = machine["peaks"]
    rate = machine["rate"]
    lines = [
        line(
            "matrix rate: the products of a step of SFT, one by one",
            f"{giga(rate['median'])} GFLOP/s ({giga(rate['lowest'])}–{giga(rate['highest'])})",
        )
    ]
    sft = results.get("jobs", {}).get("sft")
    if sft:
        took = sft["sides"]["ours"]["median"]
        for name, flops in (
            ("a step of SFT", machine["step_flops"]),
            ("the same without what is computed again", machine["model_flops"]),
        ):
            share = f"{flops / took / rate['median']:.0%} of the matrix rate"
            mfu = (
                f", {flops / took / peaks['flops']:.1%} MFU (bfloat16)" if "flops" in peaks else ""
            )
            lines.append(line(name, f"{giga(flops / took)} GFLOP/s, {share}{mfu}"))
    decode = results.get("jobs", {}).get("decode")
    if decode:
        read = machine["decode_bytes"] / decode["sides"]["ours"]["median"]
        share = f", {read / peaks['memory_rate']:.1%} of the peak" if "memory_rate" in peaks else ""
        lines.append(line("decoding: weights and cache read", f"{giga(read)} GB/s{share}"))
    return lines


def line(name: str, value: str) -> dict[str, str]:
    return {"what": name, "measured": value}


def giga(value: float) -> str:
    return f"{value / 1e9:,.1f}"


def start_lines(starts: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    return [
        {
            "first": row["job"] if row["job"] == "load" else f"step of {row['job']}",
            "side": NAMES[row["side"]],
            "compilation cache": "filled" if row["cached"] else NONE,
            "seconds": digits(row["median"]) if "median" in row else f"{NONE} ({row['error']})",
            "lowest–highest": f"{digits(row['lowest'])}–{digits(row['highest'])}"
            if "median" in row
            else NONE,
            "compile": digits(row["compile"]) if "compile" in row else NONE,
        }
        for row in starts
    ]


def scaling_lines(results: Results) -> list[dict[str, str]]:
    return [
        {
            "step": row["job"],
            "axis": row["axis"],
            "sizes": ", ".join(f"{size:,}" for size in row["sizes"]),
            "seconds": ", ".join(digits(value) for value in row["seconds"]),
            "exponent": f"{row['exponent']:.2f}",
            "bar": str(row["bar"]),
            "held": "yes" if scaling.is_held(row) else "no",
            "attention's share": f"{row['attention']:.0%}" if "attention" in row else NONE,
        }
        for row in results["scaling"].values()
    ]


def batching_lines(found: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    return [
        {
            "way": row["way"],
            "tokens": f"{row['tokens']:,}",
            "tokens a second": f"{row['tokens_per_second']['median']:,.0f}",
            "times as fast": f"{row['ratio']['median']:.2f} "
            f"({row['ratio']['lowest']:.2f}–{row['ratio']['highest']:.2f})",
        }
        for row in found
    ]


def digits(value: float) -> str:
    """Three that count."""
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def table(lines: Sequence[Mapping[str, str]]) -> str:
    cells = [list(lines[0]), ["---"] * len(lines[0]), *[list(x.values()) for x in lines]]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells) + "\n"
