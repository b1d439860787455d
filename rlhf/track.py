"""Where figures go beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio, each an optional package and one function."""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rlhf.runs import RunFolder

Track = Callable[[int, dict[str, float]], Any]


@contextlib.contextmanager
def trackers(names: Sequence[str], run: RunFolder) -> Iterator[Track]:
    """`track(step, figures)` for all of `names` at once; closed at the end."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(TRACKERS[name](run)) for name in names]

        def track(step: int, figures: dict[str, float]) -> None:
            for one in opened:
                one(step, figures)

        yield track


@contextlib.contextmanager
def tensorboard(run: RunFolder) -> Iterator[Track]:
    """Event files in `tensorboard/` of the run's folder."""
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(run.path / "tensorboard")) as writer:
        yield lambda step, figures: [writer.add_scalar(name, value, step) for name, value in figures.items()]


@contextlib.contextmanager
def wandb(run: RunFolder) -> Iterator[Track]:
    """A run of Weights & Biases, named after the folder; `WANDB_PROJECT` and its kin hold."""
    import wandb as library

    with library.init(name=run.path.name, dir=str(run.path)) as session:
        yield lambda step, figures: session.log(figures, step=step)


@contextlib.contextmanager
def trackio(run: RunFolder) -> Iterator[Track]:
    """A run of Trackio, named after the folder."""
    import trackio as library

    library.init(project="rlhf", name=run.path.name)
    yield lambda step, figures: library.log(figures, step=step)
    library.finish()


TRACKERS = {"tensorboard": tensorboard, "wandb": wandb, "trackio": trackio}
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


def check(names: Sequence[str]) -> None:
    """Raises: ValueError where a package is not installed."""
    missing = [PACKAGES[name] for name in names if importlib.util.find_spec(PACKAGES[name]) is None]
    if missing:
        raise ValueError(f"track needs {', '.join(missing)}, not installed here; pip install {' '.join(missing)}")
