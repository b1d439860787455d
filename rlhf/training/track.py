"""Where metrics go beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio, each an optional
package and one function.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rlhf import hosts
from rlhf.training.runs import RunFolder

Track = Callable[[int, dict[str, float]], Any]


@contextlib.contextmanager
def trackers(names: Sequence[str], run: RunFolder) -> Iterator[Track]:
    """`track(step, metrics)` for all of `names` at once; closed at the end."""
    # Of several processes one writes.
    names = names if hosts.is_first() else ()
    # All are closed where one fails to open, or the run ends by an error.
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(TRACKERS[name](run)) for name in names]

        def track(step: int, metrics: dict[str, float]) -> None:
            for one in opened:
                one(step, metrics)

        yield track


@contextlib.contextmanager
def tensorboard(run: RunFolder) -> Iterator[Track]:
    """Event files in `tensorboard/` of the run's folder."""
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(run.path / "tensorboard")) as writer:
        yield lambda step, metrics: [
            writer.add_scalar(name, value, step) for name, value in metrics.items()
        ]


@contextlib.contextmanager
def wandb(run: RunFolder) -> Iterator[Track]:
    """A run of Weights & Biases, named after the folder; `WANDB_PROJECT` and its kin hold."""
    # Under another name: the function here has the package's.
    import wandb as library

    with library.init(name=run.path.name, dir=str(run.path)) as session:
        yield lambda step, metrics: session.log(metrics, step=step)


@contextlib.contextmanager
def trackio(run: RunFolder) -> Iterator[Track]:
    """A run of Trackio, named after the folder."""
    import trackio as library

    library.init(project="rlhf", name=run.path.name)
    yield lambda step, metrics: library.log(metrics, step=step)
    library.finish()


TRACKERS = {"tensorboard": tensorboard, "wandb": wandb, "trackio": trackio}
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


def check(names: Sequence[str]) -> None:
    """Raises: ValueError where a package is not installed."""
    # `find_spec` looks without importing: wandb takes seconds.
    missing = [PACKAGES[name] for name in names if importlib.util.find_spec(PACKAGES[name]) is None]
    if missing:
        raise ValueError(
            f"track needs {', '.join(missing)}, not installed here; pip install {' '.join(missing)}"
        )
