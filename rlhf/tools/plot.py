"""Curves of runs, side by side."""

from pathlib import Path

from rlhf import runs


def main(folders: list[str], *, output: str = "curves.png", figures: list[str] | None = None) -> None:
    """Draws what runs have logged, one panel a figure and one line a run.

    Args:
      folders: of the runs.
      output: the picture.
      figures: names in metrics.jsonl; null: loss, reward and accuracy, as far as they are there.
    """
    names = figures or ["loss", "reward", "accuracy", "margin", "kl_to_reference", "eval_loss"]
    runs.plot([Path(folder) for folder in folders], Path(output), tuple(names))
    print(output)
