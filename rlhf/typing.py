"""The plug points of the library: what a function that you write is called with, and what it returns.

Arrays are `jax.Array`; parameters, states and batches are any pytrees.  A function fits a protocol by its
form alone: none of these is inherited.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class LossFn(Protocol):
    """A loss that is a weighted sum over rows, for `rlhf.train_step`.

    `batch` is a mini-batch or a micro-batch of it, with weights of the whole mini-batch, so that losses of
    micro-batches add up; `key` is the micro-batch's own.  Metrics are scalars that add up, `Ratio`s or
    `Max`es of `rlhf.metrics`.
    """

    def __call__(
        self, params: Any, context: Any, batch: Any, key: Any, /
    ) -> tuple[Any, dict[str, Any]]: ...


class ScoresFn(Protocol):
    """Scores of rows, a pytree of `[rows, ...]` arrays, for `rlhf.coupled_train_step`."""

    def __call__(self, params: Any, context: Any, batch: Any, key: Any, /) -> Any: ...


class ScoresObjective(Protocol):
    """A loss of the scores of all rows of a mini-batch, which may couple them."""

    def __call__(self, scores: Any, context: Any, batch: Any, /) -> tuple[Any, dict[str, Any]]: ...


class StepFn(Protocol):
    """One step: `(state, batch) -> (state, metrics)`; the state that is passed in may be consumed."""

    def __call__(self, state: Any, batch: Any, /) -> tuple[Any, dict[str, Any]]: ...


class UpdateFn(Protocol):
    """An algorithm that learns from samples: what `make_update` returns in recipes that sample.

    `rewards` is `[B]`, NaN where a completion could not be scored.
    """

    def __call__(
        self, state: Any, rollout: Any, rewards: Any, key: Any, /
    ) -> tuple[Any, dict[str, Any]]: ...


class MakeUpdate(Protocol):
    """`(max_new_tokens) -> update`, of rollouts whose last columns, those of completions, are so many.

    Rollouts are cut to few widths, and each gets an update of its own: `make_update` of a recipe with all
    its other arguments given.
    """

    def __call__(self, *, max_new_tokens: int) -> UpdateFn: ...


class SampleFn(Protocol):
    """`(state, prompts, key) -> Rollout`, a prompt's completions contiguous."""

    def __call__(self, state: Any, prompts: Any, key: Any, /) -> Any: ...


class RewardFn(Protocol):
    """Rewards of the completions of a step, on the host: an `rlhf.training.rewards.Rewarded`.

    `columns` are those of the prompts' rows, one entry a prompt; `num_samples` completions of a prompt
    stand side by side in the rollout.
    """

    def __call__(self, rollout: Any, columns: Mapping[str, list], num_samples: int, /) -> Any: ...


class TextReward(Protocol):
    """A reward function on texts, called by keyword with those of the columns that it names.

    `completions` are texts, or lists of messages where the prompts are conversations.  It returns one
    number a completion, None where it cannot say; it may be async.
    """

    def __call__(self, completions: Sequence[Any], **columns: Sequence[Any]) -> Any: ...


class Evaluate(Protocol):
    """`(state) -> metrics` of held-out rows."""

    def __call__(self, state: Any, /) -> dict[str, Any]: ...


class Hook(Protocol):
    """`(number, state) -> state`, after every step of the loop."""

    def __call__(self, number: int, state: Any, /) -> Any: ...


class Callback(Protocol):
    """`(step, metrics)`, called with every line of the log; True ends the run after that step."""

    def __call__(self, step: int, metrics: dict[str, float], /) -> Any: ...


class Export(Protocol):
    """`(state, over)`: writes the model as it is; `over` at the end of the run."""

    def __call__(self, state: Any, over: bool, /) -> None: ...
