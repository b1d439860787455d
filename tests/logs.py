"""The lines of a run's log without what differs between two runs of the same seeds."""

from pathlib import Path

from rlhf.training.runs import metrics_of

# Of time and of the process: its caches decide what is compiled.
UNSTEADY = {
    "seconds", "tokens_per_second", "sequences_per_second", "mfu", "compilations",
    "time/sampling", "time/rewards",
}  # fmt: skip


def steady(folder: Path, *phases: str) -> list[dict]:
    """Lines of metrics.jsonl, of these phases or of all."""
    return [
        {name: value for name, value in row.items() if name not in UNSTEADY}
        for row in metrics_of(folder)
        if not phases or row["phase"] in phases
    ]
