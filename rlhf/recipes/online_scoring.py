"""What answers are worth: reward functions on texts, reward models, a generated task's own score."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from rlhf import losses, rollouts, tasks
from rlhf.models import huggingface
from rlhf.ranges import at_least, between, check_fields
from rlhf.recipes import setup
from rlhf.rollouts import Rollout, reward_functions, rewards
from rlhf.runs import model_of

REWARDS = {
    "accuracy": reward_functions.numeric_accuracy,
    "exact": reward_functions.exact_accuracy,
    "reasoning_accuracy": reward_functions.reasoning_accuracy(),
    "think_format": reward_functions.think_format,
    "length": reward_functions.length,
}
Judge = Callable[[Rollout, Mapping[str, list], int], tuple[Any, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Scoring:
    """What answers are worth.

    Args:
      reward: accuracy, exact, reasoning_accuracy, think_format, length, the folder of a reward model with the policy's
        tokenizer, or a function of your own as module:function; null for a generated task's own score.
      reward_weights: of each reward; null: 1 each.
      reward_clip: rewards are cut to ± this; null: they are not.
      missing_end_penalty: what an answer loses that was cut before its end.
    """

    reward: Annotated[list[str], at_least(1)] | None = None
    reward_weights: Annotated[list[Annotated[float, between(-1000, 1000)]], at_least(1)] | None = None
    reward_clip: Annotated[float, between(0, 1_000_000, above=True)] | None = None
    missing_end_penalty: Annotated[float, between(0, 1_000_000)] = 0.0

    def __post_init__(self):
        check_fields(self)

    def judge(self, source: setup.Source, tokenizer: Any) -> Judge:
        """`(rollout, columns, samples a prompt) -> (rewards [B], figures)`; reward models are loaded once all is checked.

        Where something else rewards the answers to a generated task, its own score is the figure `task_score`.

        Raises: ValueError for a reward that is not known, a missing column, and a reward model with another tokenizer.
        """
        own: Any = jax.jit(tasks.find(source.dataset).score) if source.generated else None
        names = self.reward or []
        if not names and own is None:
            known = f"{', '.join(REWARDS)}, the folder of a reward model, or module:function"
            raise ValueError(f"reward is not given; for files, and for several datasets, choose from {known}")
        weights = self.reward_weights or [1.0] * len(names)
        if len(weights) != len(names):
            raise ValueError(f"{len(names)} rewards but {len(weights)} reward_weights; give one each")
        weighted = dict(zip(names, weights, strict=True))
        functions = {name: function(name) for name in names if not is_model(name)}
        folders = {name: _folder(name, tokenizer) for name in names if is_model(name)}
        parts = [(weighted[name], _of_model(name, folder)) for name, folder in folders.items()]
        if functions:
            texts = rewards.combine(functions, weights={name: weighted[name] for name in functions})
            parts.append((1.0, partial(_of_texts, texts, tokenizer)))
        if not names:
            parts = [(1.0, lambda rollout, columns, samples: (own(rollout), {}))]

        def judged(rollout: Rollout, columns: Mapping[str, list], samples: int):
            found = [part(rollout, columns, samples) for _, part in parts]
            scores = jnp.stack([jnp.asarray(values) for values, _ in found], axis=1)
            total = losses.groups.weighted_rewards(scores, jnp.array([weight for weight, _ in parts]))
            if self.reward_clip is not None:
                total = jnp.clip(total, -self.reward_clip, self.reward_clip)
            total = total - self.missing_end_penalty * ~rollout.finished
            figures = {"reward": jnp.nanmean(total)} | {k: v for _, figures in found for k, v in figures.items()}
            return total, figures | ({"task_score": own(rollout).mean()} if own and names else {})

        return judged


def is_model(name: str) -> bool:
    """Whether a reward's name is a folder's or the Hub's."""
    return ":" not in name and ("/" in name or Path(name).is_dir())


def function(name: str) -> Callable:
    """A reward of `REWARDS`, or one of your own as module:function.  Raises: ValueError for one that is not there."""
    module, colon, function = name.partition(":")
    if not colon:
        return setup.named(name, REWARDS, "reward")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {name!r}: {error}; is it on the Python path?") from None


def _folder(name: str, tokenizer: Any) -> str:
    """A run's model, or the folder itself; its tokens must be the policy's."""
    folder = model_of(name)
    vocabulary, other = tokenizer.get_vocab(), huggingface.load_tokenizer(folder).get_vocab()
    if other != vocabulary:
        raise ValueError(
            f"reward {name}: its tokenizer has {len(other)} tokens, of which {len(other.items() & vocabulary.items())} are the "
            f"policy's {len(vocabulary)}; train a reward model with the policy's tokenizer"
        )
    return folder


def _of_model(name: str, folder: str) -> Callable:
    try:
        lm, head, params, _ = huggingface.load_classifier(folder)
    except ValueError as error:
        raise ValueError(f"reward {name}: {error}; is it a reward model, as `rlhf reward` writes them?") from None
    reward = reward_functions.model_reward(lm, head, params)

    def score(rollout: Rollout, columns: Mapping[str, list], samples: int):
        scores = reward(rollout)
        return scores, {f"rewards/{name}/mean": scores.mean()}

    return score


def _of_texts(functions, tokenizer, rollout: Rollout, columns: Mapping[str, list], samples: int):
    each = {name: [value for value in column for _ in range(samples)] for name, column in columns.items()}
    texts = rollouts.text.prompts(tokenizer, rollout), rollouts.text.completions(tokenizer, rollout)
    found = rewards.score_texts(functions, *texts, columns=each | rewards.token_columns(rollout))
    return found.total, {name: value for name, value in rewards.metrics(found).items() if name.startswith("rewards/")}
