"""What recipes that sample share: questions, how answers are drawn, and what judges them."""

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf import data, losses, rollouts, tasks
from rlhf.data.types import Row
from rlhf.loop import Training
from rlhf.losses import presets
from rlhf.recipes import setup
from rlhf.rollouts import Prompts, Rollout, reward_functions, rewards, samplers
from rlhf.runs import RunFolder
from rlhf.train import TrainState

REWARDS = {
    "accuracy": reward_functions.numeric_accuracy,
    "exact": reward_functions.exact_accuracy,
    "reasoning_accuracy": reward_functions.reasoning_accuracy(),
    "think_format": reward_functions.think_format,
    "length": reward_functions.length,
}
Judge = Callable[[Rollout, Mapping[str, list], int], tuple[Any, dict[str, float]]]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Args:
      num_samples: answers a prompt.
      max_new_tokens: the most tokens of an answer.
      temperature: divides the logits.
      top_k: the likeliest tokens only; 0: all.
      top_p: the likeliest tokens that together have this probability.
      min_p: tokens at least this share as likely as the likeliest.
    """

    num_samples: int = 8
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        self.sampler()
        if self.num_samples < 1 or self.max_new_tokens < 1 or self.top_k < 0:
            raise ValueError("num_samples and max_new_tokens must be at least 1, and top_k at least 0")

    def sampler(self) -> samplers.Sampler:
        """The same as `rollouts.generate` takes it."""
        filters = [samplers.top_k(self.top_k)] if self.top_k else []
        filters += [samplers.top_p(self.top_p)] if self.top_p != 1 else []
        filters += [samplers.min_p(self.min_p)] if self.min_p else []
        return samplers.sampler(*filters, temperature=self.temperature)


@dataclasses.dataclass(frozen=True)
class Scoring:
    """What answers are worth.

    Args:
      reward: accuracy, exact, reasoning_accuracy, think_format, length, or a function of your own as module:function; null for
        a generated task's own score.
      reward_weights: of each reward; null: 1 each.
    """

    reward: list[str] | None = None
    reward_weights: list[float] | None = None

    def judge(self, source: setup.Data, tokenizer: Any) -> Judge:
        """`(rollout, columns, samples a prompt) -> (rewards [B], figures)`.

        Raises: ValueError for a reward that is not known, and a missing column.
        """
        if self.reward is None:
            if not source.dataset.startswith(tasks.PREFIX):
                raise ValueError(
                    f"reward is not given; for a dataset of files choose from {', '.join(REWARDS)}, or module:function"
                )
            score = tasks.find(source.dataset).score
            return lambda rollout, columns, samples: _with_mean(score(rollout))
        weights = self.reward_weights or [1.0] * len(self.reward)
        if len(weights) != len(self.reward):
            raise ValueError(f"{len(self.reward)} rewards but {len(weights)} reward_weights; give one each")
        functions = rewards.combine(
            {name: _function(name) for name in self.reward}, weights=dict(zip(self.reward, weights, strict=True))
        )
        return partial(_of_texts, functions, tokenizer)


def _function(name: str) -> Callable:
    module, colon, function = name.partition(":")
    if not colon:
        return setup.named(name, REWARDS, "reward")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {name!r}: {error}; is it on the Python path?") from None


def _of_texts(functions, tokenizer, rollout: Rollout, columns: Mapping[str, list], samples: int):
    each = {name: [value for value in column for _ in range(samples)] for name, column in columns.items()}
    texts = rollouts.text.prompts(tokenizer, rollout), rollouts.text.completions(tokenizer, rollout)
    found = rewards.score_texts(functions, *texts, columns=each | rewards.token_columns(rollout))
    parts = {name: value for name, value in rewards.metrics(found).items() if name.startswith("rewards/")}
    total, figures = _with_mean(jnp.asarray(found.total))
    return total, {**parts, **figures}


def _with_mean(scores) -> tuple[Any, dict[str, Any]]:
    return scores, {"reward": jnp.nanmean(scores)}


class Asked(NamedTuple):
    """The questions of a step."""

    prompts: Prompts
    columns: dict[str, list]  # what the rows have beside
    key: Any


class Questions(NamedTuple):
    """Rows of prompts, tokenised."""

    prompts: Prompts  # [N, L]
    rows: Sequence[Row]

    @classmethod
    def of(cls, tokenizer, rows: list[Row]) -> "Questions":
        """Checks and tokenises rows with a `prompt`."""
        return cls(data.prompts(data.tokenize_prompts(tokenizer, rows)), rows)

    def take(self, seed: int, number: int, size: int) -> Asked:
        """The questions of a step: a pure function of seed and number."""
        chosen = data.batch_indices(seed, number, len(self.rows), size)
        return self.asked(chosen, jax.random.fold_in(jax.random.key(seed), number))

    def asked(self, chosen: Any, key) -> Asked:
        """These questions, by their numbers."""
        rows = [self.rows[i] for i in chosen]
        columns = {name: [row.get(name) for row in rows] for name in rows[0] if name not in ("prompt", "completion")}
        return Asked(setup.select(self.prompts, np.asarray(chosen)), columns, key)


def ends(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer.  Raises: ValueError where the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token, so that no answer would end; set eos_token in tokenizer_config.json")
    return (tokenizer.eos_token_id,)


def sampler(policy: setup.Policy, sampling: Sampling, tokenizer: Any) -> Callable:
    """`(state, prompts, key) -> Rollout` of `num_samples` answers a prompt."""
    settings: dict[str, Any] = dict(sampler=sampling.sampler(), eos_ids=ends(tokenizer), num_samples=sampling.num_samples)

    def sample(state: TrainState, prompts: Prompts, key) -> Rollout:
        params = policy.whole(state.params, state.context)
        return rollouts.generate(policy.lm, params, prompts, key, max_new_tokens=sampling.max_new_tokens, **settings)

    return sample


def figures(rollout: Rollout) -> dict[str, Any]:
    """What people watch: tokens an answer, the share that ended, all tokens."""
    return {
        "completion_length": rollout.mask.sum(-1).mean(),
        "finished": rollout.finished.mean(),
        "tokens": (rollout.segment_ids != 0).sum(),
    }


def rollout_metrics(rollout: Rollout, rewards, ref_logprobs) -> dict:
    """`figures`, the mean reward, and the KL to the reference in nats a sequence."""
    kl = losses.segment_sum(losses.kl.k1(rollout.logprobs, ref_logprobs, rollout.mask), rollout.mask)
    return {
        "reward": jnp.nanmean(rewards),
        "kl_to_reference": kl.mean(),
        **figures(rollout),
    }


PRESETS = {
    fn.__name__: fn
    for fn in (
        presets.grpo, presets.dr_grpo, presets.dapo, presets.lite_ppo, presets.gspo, presets.luspo, presets.gmpo, presets.cispo,
        presets.sapo, presets.vespo, presets.dppo, presets.max_rl,
    )
}  # fmt: skip


def algorithm(name: str, length: int, **knobs: float | None) -> presets.Objective:
    """A preset with those knobs that are given; `length` is what Dr. GRPO divides by.

    Raises: ValueError for a preset that is not known, or has no such knob.
    """
    preset = setup.named(name, PRESETS, "loss")
    takes = inspect.signature(preset).parameters
    given = {knob: value for knob, value in knobs.items() if value is not None}
    if useless := [knob for knob in given if knob not in takes]:
        raise ValueError(f"{', '.join(useless)} means nothing to {name}, whose knobs are {', '.join(takes)}; leave it out")
    return preset(**given, **({"length": length} if "length" in takes else {}))


def evaluation(run: RunFolder, sample: Callable, judge: Judge, test: Questions, training: Training, tokenizer) -> Callable:
    """`(state) -> figures` of answers to questions that are not trained on; the answers go to `samples/`."""
    most = min(len(test.rows), training.batch_size)

    def evaluate(state: TrainState) -> dict[str, Any]:
        asked = test.asked(range(most), jax.random.key(training.seed))
        rollout = sample(state, asked.prompts, asked.key)
        samples = len(rollout.tokens) // most
        scores, found = judge(rollout, asked.columns, samples)
        table = {
            "prompt": rollouts.text.prompts(tokenizer, rollout),
            "completion": rollouts.text.completions(tokenizer, rollout),
            "reward": np.asarray(scores, float).tolist(),
        }
        run.samples(int(state.step), table)
        return {**found, **{name: value for name, value in figures(rollout).items() if name != "tokens"}}

    return evaluate
