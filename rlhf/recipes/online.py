"""What recipes that sample share: questions, how answers are drawn, and what judges them (`online_scoring`)."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf import data, losses, ranges, rollouts
from rlhf.data.types import Row
from rlhf.fields import documented
from rlhf.lm import LM, SharedPrefix
from rlhf.loop import Training
from rlhf.losses import presets
from rlhf.models.huggingface import end_ids
from rlhf.ranges import INT32, Count, Length, Share, Temperature, between, check_fields
from rlhf.recipes import setup
from rlhf.recipes.online_scoring import Judge as Judge
from rlhf.recipes.online_scoring import Scoring as Scoring
from rlhf.rollouts import Prompts, Rollout, samplers
from rlhf.runs import RunFolder
from rlhf.train import TrainState


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How answers are drawn.

    Args:
      max_new_tokens: the most tokens of an answer.
      temperature: divides the logits.
      top_k: the likeliest tokens only; 0: all.
      top_p: the likeliest tokens that together have this probability.
      min_p: tokens at least this share as likely as the likeliest.
    """

    max_new_tokens: Length = 256
    temperature: Temperature = 1.0
    top_k: Annotated[int, between(0, INT32)] = 0
    top_p: Annotated[float, between(0, 1, above=True)] = 1.0
    min_p: Share = 0.0

    def __post_init__(self):
        check_fields(self)

    def sampler(self) -> samplers.Sampler:
        """The same as `rollouts.generate` takes it."""
        filters = [samplers.top_k(self.top_k)] if self.top_k else []
        filters += [samplers.top_p(self.top_p)] if self.top_p != 1 else []
        filters += [samplers.min_p(self.min_p)] if self.min_p else []
        return samplers.sampler(*filters, temperature=self.temperature)


@dataclasses.dataclass(frozen=True)
class Sampling(Drawing):
    """How many answers are drawn, and how.

    Args:
      num_samples: answers a prompt.
    """

    num_samples: Count = 8


@documented
class Asked(NamedTuple):
    """The questions of a step.

    Attributes:
      prompts: of the questions.
      columns: of the rows: their prompt as it was written, and what they have beside.
      key: of what is drawn.
    """

    prompts: Prompts
    columns: dict[str, list]
    key: Any


@dataclasses.dataclass(frozen=True)
class Asking(setup.Data):
    """The rows whose prompts are answered.

    Args:
      max_prompt_length: leave out rows with longer prompts, since all are padded to the longest; null: none.
    """

    max_prompt_length: Length | None = None

    def __post_init__(self):
        super().__post_init__()
        ranges.check_fields(self)


@documented
class Questions(NamedTuple):
    """Rows of prompts, tokenised.

    Attributes:
      prompts: [N, L].
      rows: all with the same columns.
    """

    prompts: Prompts
    rows: Sequence[Row]

    @classmethod
    def of(
        cls,
        tokenizer,
        rows: list[Row],
        seq2seq: data.Seq2Seq | None = None,
        *,
        most: int | None = None,
        say: Callable | None = None,
    ) -> "Questions":
        """Checks and tokenises rows with a `prompt`.

        Args:
          tokenizer: of `transformers`.
          rows: with `prompt`.
          seq2seq: how an encoder-decoder reads them; None: the model is none.
          most: rows with more tokens are left out, and how many is said; None: none are, and prompts that make all others far
            wider than they are is said.
          say: `(text)`; None: nothing is said.

        Raises: as `data.tokenize_prompts`; ValueError where no row is left.
        """
        lay_out = data.prompts if seq2seq is None else seq2seq.prompts
        prompts = data.tokenize_prompts(tokenizer, rows)
        lengths = np.array([len(prompt) for prompt in prompts])
        if most is None:
            wide, usual = lengths.max(), int(np.percentile(lengths, 99, method="lower"))
            if say and wide > 4 * max(usual, 64):
                say(
                    f"the longest prompt, row {lengths.argmax()}, has {wide} tokens, 99 of 100 have at most {usual}, and all "
                    f"are padded to the longest; --max_prompt_length {usual} leaves such rows out"
                )
            return cls(lay_out(prompts), data.filled(rows))
        kept = np.flatnonzero(lengths <= most)
        if not kept.size:
            raise ValueError(
                f"all {len(rows)} prompts have more than max_prompt_length {most} tokens, the shortest {lengths.min()}; "
                "raise it"
            )
        if say and (left_out := len(rows) - len(kept)):
            say(f"{left_out} of {len(rows)} rows were left out: their prompts have more than max_prompt_length {most} tokens")
        return cls(lay_out([prompts[i] for i in kept]), data.filled([rows[i] for i in kept]))

    def take(self, seed: int, number: int, size: int) -> Asked:
        """The questions of a step: a pure function of seed and number."""
        chosen = data.batch_indices(seed, number, len(self.rows), size)
        return self.asked(chosen, jax.random.fold_in(jax.random.key(seed), number))

    def asked(self, chosen: Any, key) -> Asked:
        """These questions, by their numbers."""
        rows = [self.rows[i] for i in chosen]
        columns = {name: [row.get(name) for row in rows] for name in rows[0] if name != "completion"}
        return Asked(setup.select(self.prompts, np.asarray(chosen)), columns, key)


def ends(model: str, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer.  Raises: ValueError where the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end token, so that no answer would end; give --eos_token, or set eos_token in "
            "tokenizer_config.json"
        )
    return end_ids(model, tokenizer)


def sampler(policy: setup.Policy, sampling: Sampling, eos_ids: tuple[int, ...]) -> Callable:
    """`(state, prompts, key) -> Rollout` of `num_samples` answers a prompt by the policy as it is."""
    return player(policy.lm, params_of(policy), sampling, eos_ids, sampling.num_samples)


def params_of(policy: setup.Policy) -> Callable:
    """`(state) -> params` of the policy as it is."""
    return lambda state: policy.whole(state.params, state.context)


def player(lm: LM, params_of: Callable, drawing: Drawing, eos_ids: tuple[int, ...], num_samples: int = 1) -> Callable:
    """`(state, prompts, key) -> Rollout` of `num_samples` answers a prompt; `params_of(state)` are the parameters of `lm`."""
    settings: dict[str, Any] = dict(max_new_tokens=drawing.max_new_tokens, sampler=drawing.sampler(), eos_ids=eos_ids)

    def sample(state: TrainState, prompts: Prompts, key) -> Rollout:
        return rollouts.generate(lm, params_of(state), prompts, key, num_samples=num_samples, **settings)

    return sample


def logprobs(lm: LM, params: Any, rollout: Rollout, shared: SharedPrefix | None = None) -> Any:
    """`[B, T]` of a rollout's tokens at its own temperature, without gradient; its rows may share their prompts."""
    return jax.lax.stop_gradient(rollouts.score_batch(lm, params, rollout, shared=shared).logprobs)


def two_players(first: Callable, second: Callable) -> Callable:
    """`(state, prompts, key) -> Rollout` of two answers a prompt, one of each sampler: row 2p is the first's."""

    def sample(state: TrainState, prompts: Prompts, key) -> Rollout:
        keys = jax.random.split(key)
        both = (player(state, prompts, k) for player, k in zip((first, second), keys, strict=True))
        return jax.tree.map(lambda a, b: jnp.stack([a, b], 1).reshape(-1, *a.shape[1:]) if a.ndim else a, *both)

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


def duel_figures(rollout: Rollout, rewards) -> dict:
    """`figures` and the mean reward of the first of `two_players`, and the other's reward."""
    own, other = (setup.select((rollout, rewards), slice(player, None, 2)) for player in (0, 1))
    seen = {"reward": jnp.nanmean(own[1]), "opponent_reward": jnp.nanmean(other[1]), **figures(own[0])}
    return seen | {"tokens": figures(rollout)["tokens"]}


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
    objective = preset(**given, **({"length": length} if "length" in takes else {}))
    check(objective.loss)
    return objective


def check(loss: Callable, **knobs) -> None:
    """Raises what a loss on tokens raises of its knobs, before a model is there."""
    one = jnp.zeros((1, 1))
    loss(one, one, one, one == 0, **knobs)


def evaluation(run: RunFolder, sample: Callable, judge: Judge, test: Questions, training: Training, tokenizer) -> Callable:
    """`(state) -> figures` of answers to questions that are not trained on; the answers go to `samples/`."""
    import pyarrow

    most = min(len(test.rows), training.batch_size)

    def evaluate(state: TrainState) -> dict[str, Any]:
        asked = test.asked(range(most), jax.random.key(training.seed))
        rollout = sample(state, asked.prompts, asked.key)
        samples = len(rollout.tokens) // most
        scores, found, reasons = judge.explained(rollout, asked.columns, samples)
        table = {
            "prompt": rollouts.text.prompts(tokenizer, rollout),
            "completion": rollouts.text.completions(tokenizer, rollout),
            "reward": np.asarray(scores, float).tolist(),
            "reason": pyarrow.array(reasons, pyarrow.string()),
        }
        run.samples(int(state.step), table)
        return {**found, **{name: value for name, value in figures(rollout).items() if name != "tokens"}}

    return evaluate
