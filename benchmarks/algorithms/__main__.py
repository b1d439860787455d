"""Algorithms against each other: every one tuned alike, on the same tasks, over many seeds.

    python -m benchmarks.algorithms [--size smallest] [--runs DIR] [--output benchmarks/results]

Each algorithm's sweep over learning rates and one more hyper-parameter is of other seeds than those that are reported.
Pieces that DIR holds are read, not made again.  Written are `algorithms.md`, its plots, and all evaluations of all runs as
`algorithms.parquet`.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks import report
from benchmarks.algorithms import closed_form, findings, page, study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=study.SIZES, default="smallest")
    parser.add_argument(
        "--runs", type=Path, help="folder for the pieces (default: a temporary one)"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "results")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples")
    args = parser.parse_args()
    about = {**report.machine(), "size": args.size}
    with tempfile.TemporaryDirectory() as temporary:
        table = study.run_all(args.size, args.runs or Path(temporary), args.workers)
    started = time.perf_counter()
    bandit = [closed_form.line(name) for name in study.SIZES[args.size].bandit]
    bandit_minutes = (time.perf_counter() - started) / 60
    # Also of pieces that were read: what the whole table costs.
    minutes = findings.minutes(table) / args.workers + bandit_minutes
    args.output.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, args.output / "algorithms.parquet")
    about |= {"processes": str(args.workers), "minutes": f"{minutes:.1f}"}
    text = page.write(table, bandit, args.output, about, np.random.default_rng(args.seed))
    print(text)


if __name__ == "__main__":
    main()
