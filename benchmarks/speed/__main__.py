"""Ours beside TRL and Tunix: steps, decoding, loads, starts and memory; and how our steps scale.

    python -m benchmarks.speed [--only sft] [--scaling] [--batching] [--output benchmarks/results]

TRL and Tunix run in environments of their own, which this makes where they are not there yet (`RLHF_PEERS` says where), and
so does our side beside them.  All jobs take their turns; one at a time is measured with `--only`, and goes into the results
that are there if they are of the same commit, size and machine.  Written are `speed.json` and `speed.md`.  On a GPU the same
command gives MFU and bandwidth too.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.speed import batching, jobs, machine, page, results, scaling, sides, starts, turns

RESULTS = Path(__file__).parent.parent / "results"
OTHERS = ("starts", "machine")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=(*jobs.JOBS, *OTHERS), help="one job")
    parser.add_argument(
        "--scaling", action="store_true", help="exponents of our steps, of those --only names"
    )
    parser.add_argument("--batching", action="store_true", help="continuous batching, alone")
    parser.add_argument("--sides", nargs="+", choices=sides.SIDES, default=sides.SIDES)
    parser.add_argument("--size", choices=jobs.SIZES, default="full")
    parser.add_argument("--steps", type=int, default=9, help="counted turns of a job")
    parser.add_argument("--starts", type=int, default=3, help="fresh processes of each side")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder")
    args = parser.parse_args(argv)
    if "ours" not in args.sides:
        parser.error("--sides needs ours, which the others are compared with")
    if args.scaling and args.only and not scaling.axes(args.only):
        parser.error(f"--scaling is of {' and '.join(scaling.FIELDS)}, not of {args.only}")
    return args


def main(argv: Sequence[str] | None = None) -> str:
    args = arguments(argv)
    if jax.default_backend() != "cpu":
        # As on all sides: float32 is float32.
        jax.config.update("jax_default_matmul_precision", "highest")
    file = args.output / "speed.json"
    args.output.mkdir(parents=True, exist_ok=True)
    # Before the first measurement: code that changes during a run is not what is measured.
    about = results.about(args.size)
    for part in measured(args):
        found = results.merged(results.read(file), {"about": about, **part})
        results.write(file, found)
        # After every part, since a run can take an hour.
        (args.output / "speed.md").write_text(page.text(found))
    text = page.text(results.read(file))
    print(text)
    return text


def measured(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Parts of the results, one after another."""
    size = jobs.SIZES[args.size]
    if args.scaling or args.batching:
        for job, axis in scaling.axes(args.only) if args.scaling else []:
            row = scaling.measure_axis(args.size, job, axis, args.steps)
            yield {"scaling": {f"{job}, {axis}": row}}
        if args.batching:
            load = batching.LOADS[args.size]
            yield {"batching": batching.measure(size, load, args.steps)}
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs.write_folder(folder, size)
        for job in jobs.JOBS:
            if args.only in (None, job):
                yield {"jobs": {job: job_row(job, args, folder)}}
        if args.only in (None, "starts"):
            yield {"starts": starts.measure(args.sides, folder, args.starts)}
    if args.only in (None, "machine"):
        sft = scaling.prepared("sft", size)
        yield {"machine": machine.measure(size, sft, args.steps)}


def job_row(job: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A job's row of the results."""
    before = machine.busy_share()
    replies = turns.take_turns(sides.start_all(args.sides, job, folder), args.steps)
    row = turns.compared(job, replies)
    row["what"] = jobs.descriptions(jobs.SIZES[args.size])[job]
    # Of other programs: its own processes have not started, or have ended.
    row["busy"] = max(before, machine.busy_share())
    return row


if __name__ == "__main__":
    main()
