"""Curves of runs, side by side."""

from pathlib import Path
from typing import Annotated

from rlhf import files, runs
from rlhf.ranges import at_least, checked


@checked
def main(
    folders: Annotated[list[str], at_least(1)],
    *,
    output: str = "curves.png",
    figures: Annotated[list[str], at_least(1)] | None = None,
    overwrite: bool = False,
) -> None:
    """Draws what runs have logged, one panel a figure and one line a run.

    Args:
      folders: of the runs.
      output: the picture.
      figures: names in metrics.jsonl; null: loss, reward and accuracy, as far as they are there.
      overwrite: write over the picture if it exists.
    """
    files.check_output(output, inputs=folders, overwrite=overwrite)
    names = figures or ["loss", "reward", "accuracy", "margin", "kl_to_reference", "eval_loss"]
    runs.plot([Path(folder) for folder in folders], Path(output), tuple(names))
    print(output)
