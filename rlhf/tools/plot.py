"""Curves of runs, side by side."""

from pathlib import Path
from typing import Annotated

from rlhf import files
from rlhf.ranges import at_least, checked
from rlhf.training import runs


@checked
def main(
    folders: Annotated[list[str], at_least(1)],
    *,
    output: str = "curves.png",
    metrics: Annotated[list[str], at_least(1)] | None = None,
    overwrite: bool = False,
) -> None:
    """Draws what runs have logged, one panel a metric and one line a run.

    Args:
      folders: of the runs.
      output: the picture.
      metrics: names in metrics.jsonl; null: loss, reward and accuracy, as far as they are there.
      overwrite: write over the picture if it exists.
    """
    files.check_output(output, inputs=folders, overwrite=overwrite)
    # Every recipe logs some of these; those that no run has are left out.
    names = metrics or [
        "loss",
        "reward",
        "accuracy",
        "rewards/accuracies",
        "rewards/margins",
        "objective/kl",
        "eval_loss",
    ]
    runs.plot([Path(folder) for folder in folders], Path(output), tuple(names))
    print(output)
