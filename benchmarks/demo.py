"""The demo, every algorithm and seed, and the control with shuffled rewards.

    python benchmarks/demo.py [--runs DIR] [--json benchmarks/results/demo.json]

Runs that DIR already holds are read instead of made again.
"""

import json
import tempfile
from pathlib import Path

import report

from rlhf import demo

RUNS = [(algorithm, seed, "none") for algorithm in ("ppo", "grpo", "dpo") for seed in (0, 1, 2)]
RUNS += [(algorithm, 0, "shuffled") for algorithm in ("ppo", "grpo", "dpo")]
SHOWN = (
    "algorithm", "seed", "control", "positive_before", "positive_after", "grammatical_before", "grammatical_after",
    "distinct_after", "objective/kl", "reward_accuracy", "seconds",
)  # fmt: skip


def main():
    parser = report.arguments(__doc__)
    parser.add_argument("--runs", type=Path, help="folder for the runs (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        rows = []
        for algorithm, seed, control in RUNS:
            folder = (
                args.runs or Path(temporary)
            ) / f"{algorithm}-{seed}{'' if control == 'none' else '-shuffled'}"
            done = folder / "summary.json"
            if not done.exists():
                demo.run(
                    algorithm=algorithm, seed=seed, control=control, output=str(folder), steps=None
                )
            summary = json.loads(done.read_text())
            rows.append({name: summary[name] for name in SHOWN})
    report.show("the demo", rows, args.json)


if __name__ == "__main__":
    main()
