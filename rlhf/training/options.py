"""The options of recipes and tools, as dataclasses: the command line reads its flags, ranges and
help from them.

From Python a field may also hold an object where the command line takes a name: a loaded model,
rows, a reward function.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rlhf import tasks
from rlhf.ranges import (
    INT32,
    Count,
    Every,
    FromPython,
    Length,
    Seed,
    Share,
    Steps,
    Temperature,
    at_least,
    between,
    check_fields,
)
from rlhf.rollouts import samplers
from rlhf.rollouts.environment import Environment
from rlhf.training import track
from rlhf.training.optimizers import OptimizerOptions
from rlhf.training.runs import model_of

# `(step, metrics)`, of `rlhf.training.loop.fit`; no text on a command line could be one.
Callbacks = Annotated[Sequence[Callable], FromPython]
# Devices along an axis of the mesh; -1: all that the others leave.
Axis = Annotated[int, between(-1, 65_536)]
# Micro-batches, found by `rlhf.training.micro_batches`.
AUTO: Any = "auto"
# A number wherever a recipe reads it: the word is replaced before its `main` begins.
if TYPE_CHECKING:
    MicroBatches = Count
else:
    MicroBatches = Count | Literal["auto"]
# Samples of a prompt that are compared with each other: one alone has no other.
NumSamples = Annotated[int, between(2, 65_536)]


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The model: where it comes from, how it computes, and which of its parameters are trained.

    Args:
      model: a model's folder or a run's, or a name on the Hub; from Python also what `rlhf.load`
        returns.
      dtype: of the computation; trainable parameters have float32 masters.
      remat: what the backward pass computes again instead of keeping it.
      lora_rank: train adapters of this rank instead of all parameters; 0: all parameters.
      lora_alpha: an adapter is scaled by lora_alpha / lora_rank.
      lora_targets: matrices that get adapters, as PEFT names them (q_proj, v_proj) or by patterns
        of our own paths (layers.q); null: every matrix of the blocks.
      lora_dropout: share of an adapter's inputs that is dropped in training.
      rslora: scale by lora_alpha / sqrt(lora_rank) (rsLoRA).
      dora: adapters with a magnitude (DoRA).
      adapter: a folder with an adapter to go on from, as PEFT writes it; null: a new one.
      quantize: the matrices beneath adapters are held in 4 or 8 bits (QLoRA); needs qwix.
      reference_model: a model's folder, a run's or a name on the Hub; null: the model as it was.
      resize_embeddings: grow the embedding to the tokenizer's length; new tokens begin as the mean
        of the others.  Adapters do not train it, and theirs fit a base that is grown likewise.
      chat_template: a Jinja file or text in place of the tokenizer's own template.
      eos_token: the token that ends a completion; null: what the tokenizer's files name.
      pad_token: the token that fills rows; null: what the tokenizer's files name.
      text_only: of a model that reads images or sounds too, its language model alone.
    """

    model: str | tuple
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full"] = "none"
    lora_rank: Annotated[int, between(0, 65_536)] = 0
    lora_alpha: Annotated[float, between(0, 1_000_000, above=True)] = 32.0
    lora_targets: Annotated[list[str], at_least(1)] | None = None
    lora_dropout: Annotated[float, between(0, 1, below=True)] = 0.0
    rslora: bool = False
    dora: bool = False
    adapter: str | None = None
    quantize: Literal["nf4", "int8"] | None = None
    reference_model: str | None = None
    resize_embeddings: bool = False
    chat_template: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    text_only: bool = False

    def __post_init__(self):
        check_fields(self)
        if isinstance(self.model, str):
            # The dataclass is frozen; a run's folder is replaced by the model in it, once.
            object.__setattr__(self, "model", model_of(self.model))
        elif len(self.model) != 3:
            raise ValueError(
                f"model has {len(self.model)} parts; give (lm, params, tokenizer), as rlhf.load "
                "returns them"
            )
        # Without adapters these would be ignored in silence.
        for name in ("lora_targets", "lora_dropout", "rslora", "dora", "quantize"):
            value = getattr(self, name)
            if value and not self.has_adapters:
                raise ValueError(
                    f"lora_rank {self.lora_rank} with {name} {value}; that is of adapters, give "
                    "--lora_rank 16"
                )
        if self.adapter and self.lora_rank:
            raise ValueError(
                f"adapter {self.adapter} has a rank of its own, but lora_rank is {self.lora_rank}; "
                "give one of them"
            )
        if self.adapter and self.quantize:
            raise ValueError(
                f"adapter {self.adapter} goes on a base as it is, but quantize is {self.quantize}; "
                "leave it out"
            )

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are trained instead of all parameters."""
        return bool(self.lora_rank or self.adapter)


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """Where rows come from.

    Args:
      dataset: a .jsonl, .json, .csv, .parquet or .arrow file, a folder of those, a name on the Hub,
        or a generated task such as task:reverse or task:sums:2; from Python also rows: a list of
        dicts or a `datasets.Dataset`.
      split: of the dataset.
      dataset_config: of a dataset on the Hub that has several.
      dataset_size: rows of a generated task.
      max_rows: read so many rows of a dataset, from its start, and download no more than those;
        null: all.
      columns: names of the files' columns and what they are here, such as {question: prompt,
        answer: solution}.
    """

    dataset: str | Iterable
    split: str = "train"
    dataset_config: str | None = None
    dataset_size: Annotated[int, between(1, 10_000_000)] = 4096
    max_rows: Annotated[int, between(1, INT32)] | None = None
    columns: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_fields(self)

    @property
    def task(self) -> str | None:
        """The generated task that all rows are of, which has a score of its own; None for other
        rows.
        """
        is_task = isinstance(self.dataset, str) and self.dataset.startswith(tasks.PREFIX)
        return str(self.dataset) if is_task else None


@dataclasses.dataclass(frozen=True)
class DatasetOptions(SourceOptions):
    """The rows to train on, and held-out rows.

    Args:
      dataset_accuracy: how often the completions in a generated task's rows are right; null: as its
        kind of rows has it.
      more_datasets: further ones, trained on together with the first.
      fractions: the share of each in the mixture, no row twice; null: all rows of all.
      eval_dataset: held-out rows, from elsewhere.
      eval_split: held-out rows, another split of the dataset; of a generated task there are 256.
    """

    dataset_accuracy: Share | None = None
    more_datasets: list[str] = dataclasses.field(default_factory=list)
    fractions: Annotated[list[Annotated[float, between(0, 1, above=True)]], at_least(1)] | None = (
        None
    )
    eval_dataset: str | Iterable | None = None
    eval_split: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.fractions and len(self.fractions) != 1 + len(self.more_datasets):
            names = ", ".join([str(self.dataset), *self.more_datasets])
            raise ValueError(f"{len(self.fractions)} fractions of {names}; give one of each")

    @property
    def task(self) -> str | None:
        # In a mixture the task's score would be computed of rows that are not its own.
        return None if self.more_datasets else super().task


@dataclasses.dataclass(frozen=True)
class PromptOptions(DatasetOptions):
    """The rows whose prompts are completed.

    Args:
      max_prompt_length: leave out rows with longer prompts, since a step is as wide as its longest;
        null: none.
      log_completions: steps between tables of sampled completions in samples/; 0: none, but those
        of evaluations.
    """

    max_prompt_length: Length | None = None
    log_completions: Every = 0


@dataclasses.dataclass(frozen=True)
class TrainingOptions(OptimizerOptions):
    """How long and how fast to train, and what to keep.

    Args:
      steps: steps of the loop; null: as many as `epochs` are.
      epochs: passes over the data, where steps is null.
      batch_size: rows of a step: examples, pairs, or prompts.
      micro_batches: parts that a step's rows are taken in, one after the other; the result is the
        same.  auto: the fewest, 1 and its doubles, with which the update fits the devices' memory.
      average: of the parameters over the steps, which is evaluated and exported in place of the
        last ones.
      average_decay: of ema, which spans about 1 / (1 - average_decay) steps.
      seed: of everything random.
      log_every: steps between lines of metrics.jsonl.
      eval_every: steps between evaluations; there is one at the end too.  0: only there.
      eval_on_start: evaluate before the first step too.
      keep_best: keep and export the state of the best evaluation in place of the last one.
      patience: evaluations without a better result after which training ends; 0: it never does.
      save_every: steps between checkpoints; 0: only at the end.
      keep: checkpoints that stay.
      export_every: steps between two exports of the model, which the end and a stop make anyway; 0:
        none before.
      max_skipped: steps in a row with infinite or NaN gradients, which change nothing, after which
        the run ends; the batch is written out.
      track: where metrics go beside metrics.jsonl: tensorboard, wandb, trackio.
    """

    steps: Steps | None = None
    epochs: Annotated[float, between(0, 100_000, above=True)] = 1.0
    batch_size: Count = 8
    micro_batches: MicroBatches = 1
    average: Literal["none", "ema", "bema"] = "none"
    average_decay: Annotated[float, between(0, 1, below=True)] = 0.99
    seed: Seed = 0
    log_every: Steps = 1
    eval_every: Every = 0
    eval_on_start: bool = False
    keep_best: bool = False
    patience: Every = 0
    save_every: Every = 0
    keep: Count = 2
    export_every: Every = 0
    max_skipped: Count = 20
    track: list[Literal["tensorboard", "wandb", "trackio"]] = dataclasses.field(
        default_factory=list
    )

    def __post_init__(self):
        super().__post_init__()
        # A missing package is found before the model loads, not at the first logged step.
        track.check(self.track)
        if self.patience and not self.eval_every:
            raise ValueError(
                f"patience {self.patience} counts evaluations, but there are none before the end; "
                "give --eval_every"
            )
        if self.micro_batches != AUTO and self.batch_size % self.micro_batches:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be taken in {self.micro_batches} equal "
                "parts; change --micro_batches"
            )

    def total_steps(self, rows: int, *, has_held_out: bool) -> int:
        """Steps of the loop over so many rows an epoch; `has_held_out` says whether there are rows
        to evaluate on.

        Raises: ValueError where an epoch has fewer rows than a batch, and for a patience with
        nothing to evaluate on.
        """
        # Each needs evaluations, and would do nothing without held-out rows.
        for name in ("patience", "keep_best", "eval_on_start"):
            if getattr(self, name) and not has_held_out:
                raise ValueError(
                    f"{name} {getattr(self, name)} but no held-out rows; give --eval_dataset"
                )
        if rows < self.batch_size:
            raise ValueError(
                f"{rows} rows but batch_size {self.batch_size}; give more data or a smaller "
                "--batch_size"
            )
        # A last batch that is not full is left out: `rows // batch_size`.
        return self.steps or max(1, round(self.epochs * (rows // self.batch_size)))


@dataclasses.dataclass(frozen=True)
class MeshOptions:
    """The mesh of devices; where nothing is given, all devices are under fsdp, of a TPU's torus of 32
    or more half of them, at most 64.

    Args:
      data: devices over which rows alone are split; -1: all that the others leave.
      fsdp: devices over which rows, parameters and optimizer state are split; -1: all that the
        others leave.
      tensor: devices over which heads, MLPs and the vocabulary are split; -1: all that the others
        leave.
      sequence: devices over which the columns of long rows are split, and in sampling the rows; -1:
        all that the others leave.
      expert: devices over which rows and the experts of a mixture are split; -1: all that the
        others leave.
    """

    data: Axis | None = None
    fsdp: Axis | None = None
    tensor: Axis | None = None
    sequence: Axis | None = None
    expert: Axis | None = None

    def __post_init__(self):
        check_fields(self)
        sizes = self.sizes()
        if 0 in sizes.values() or list(sizes.values()).count(-1) > 1:
            listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise ValueError(
                f"a mesh of {listed}: give sizes of at least 1, and -1 (the rest) for one axis at "
                "most"
            )

    def sizes(self) -> dict[str, int]:
        """The sizes as they were given: 1 where nothing is, but all devices under fsdp where
        nothing at all is.
        """
        given = {
            "data": self.data,
            "fsdp": self.fsdp,
            "tensor": self.tensor,
            "sequence": self.sequence,
            "expert": self.expert,
        }
        # fsdp by default: it shares the memory of parameters and moments, at the cost of gathering
        # them.
        if all(size is None for size in given.values()):
            return {name: -1 if name == "fsdp" else 1 for name in given}
        return {name: 1 if size is None else size for name, size in given.items()}


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How completions are sampled.

    Args:
      max_new_tokens: the most tokens of a completion.
      temperature: divides the logits.
      top_k: the likeliest tokens only; 0: all.
      top_p: the likeliest tokens that together have this probability.
      min_p: tokens at least this share as likely as the likeliest.
      repetition_penalty: divides the logits of tokens that stand in the row already; 1: none.
      frequency_penalty: taken from a token's logit for every time that it was sampled.
      presence_penalty: taken from a token's logit once it was sampled.
      min_new_tokens: tokens before which no completion ends.
      stop: texts that end a completion.
    """

    max_new_tokens: Length = 256
    temperature: Temperature = 1.0
    top_k: Annotated[int, between(0, INT32)] = 0
    top_p: Annotated[float, between(0, 1, above=True)] = 1.0
    min_p: Share = 0.0
    repetition_penalty: Annotated[float, between(0, 1000, above=True)] = 1.0
    frequency_penalty: Annotated[float, between(-1000, 1000)] = 0.0
    presence_penalty: Annotated[float, between(-1000, 1000)] = 0.0
    min_new_tokens: Annotated[int, between(0, 1_000_000)] = 0
    stop: Annotated[list[str], at_least(1)] | None = None

    def __post_init__(self):
        check_fields(self)
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens {self.min_new_tokens} is above max_new_tokens "
                f"{self.max_new_tokens}; change one of them"
            )

    def sampler(self, eos_ids: tuple[int, ...] = ()) -> samplers.Sampler:
        """The same as `rollouts.generate` takes it; before `min_new_tokens` none of the `eos_ids`
        is sampled.
        """
        # Penalties before filters, so that top_k and top_p choose among penalised logits, as
        # transformers and vLLM do.  What would change nothing is left out: a filter is sorting.
        filters = []
        if self.repetition_penalty != 1:
            filters.append(samplers.repetition_penalty(self.repetition_penalty))
        if self.frequency_penalty:
            filters.append(samplers.frequency_penalty(self.frequency_penalty))
        if self.presence_penalty:
            filters.append(samplers.presence_penalty(self.presence_penalty))
        if self.min_new_tokens:
            filters.append(samplers.min_new_tokens(self.min_new_tokens, eos_ids))
        if self.top_k:
            filters.append(samplers.top_k(self.top_k))
        if self.top_p != 1:
            filters.append(samplers.top_p(self.top_p))
        if self.min_p:
            filters.append(samplers.min_p(self.min_p))
        return samplers.sampler(*filters, temperature=self.temperature)


@dataclasses.dataclass(frozen=True)
class GroupSamplingOptions(SamplingOptions):
    """How completions are sampled, and how many.

    Args:
      num_samples: completions of a prompt.
    """

    num_samples: Count = 8


@dataclasses.dataclass(frozen=True)
class SelectionOptions:
    """Which prompts and completions are learned from.

    Args:
      dynamic_sampling: rounds in which a step may look for prompts whose completions differ in
        reward, each among batch_size others (DAPO); 0: there is one, and all of it is taken.
      replay_groups: groups of completions of earlier steps that stay at hand, and stand in for
        groups whose rewards are all equal; 0: none.
      curriculum: prompts are chosen by p (1 - p), p being how often they were solved, by rewards
        from 0 to 1; none: in random order, each once a pass.
    """

    dynamic_sampling: Every = 0
    replay_groups: Every = 0
    curriculum: Literal["none", "learnability"] = "none"

    def __post_init__(self):
        check_fields(self)
        if self.dynamic_sampling and self.curriculum != "none":
            raise ValueError(
                f"dynamic_sampling {self.dynamic_sampling} passes over prompts, and curriculum "
                f"{self.curriculum} chooses them; give one of them"
            )


@dataclasses.dataclass(frozen=True)
class EnvironmentOptions:
    """An environment to talk to, for conversations of several turns.

    Args:
      environment: a function of your own as file.py:make or module:make, which returns an
        rlhf.rollouts.environment.Environment, such as tools.tool_environment makes; its rewards
        are learned from.  null: completions are sampled once.
      max_turns: the most turns of a conversation, each of max_new_tokens at most.
      max_conversation_tokens: the most tokens after the prompt: turns and observations.
      observation_template: the text around an observation, {}, in the words of the chat template.
      turn_timeout: seconds that the environment has for a turn.
    """

    environment: str | Callable | Environment | None = None
    max_turns: Count = 8
    max_conversation_tokens: Length = 1024
    observation_template: str = "{}"
    turn_timeout: Annotated[float, between(0, 86_400, above=True)] = 60.0

    def __post_init__(self):
        check_fields(self)
        if "{}" not in self.observation_template:
            raise ValueError(
                f"observation_template {self.observation_template!r} has no {{}} where the "
                "observation goes; write one"
            )


@dataclasses.dataclass(frozen=True)
class RewardOptions:
    """Rewards of completions.

    Args:
      reward: accuracy, exact, math (by math-verify), reasoning_accuracy, think_format, length; with
        arguments, as in soft_overlong(max_length=256, cache=64), also repetition_penalty,
        cosine_scaled, regex_format, missing_end; the folder of a reward model, which reads texts
        where its tokenizer is another than the policy's; or a function of your own as
        module:function or file.py:function.  null: a generated task's own score.  From Python also
        a function, sync or async, or what `rlhf.load_classifier` returns, or a list of all those.
      reward_weights: of each reward; null: 1 each.
      reward_clip: rewards are clipped to ± this; null: they are not.
      missing_end_penalty: penalty for truncated completions.
      reward_timeout: seconds that a function of your own, or math, has for a step's completions;
        then its process is ended.
      max_reward_failures: the run stops where a reward fails on a larger share of the last 10
        steps' completions.
    """

    reward: Annotated[list[str | Callable | tuple], at_least(1)] | None = None
    reward_weights: Annotated[list[Annotated[float, between(-1000, 1000)]], at_least(1)] | None = (
        None
    )
    reward_clip: Annotated[float, between(0, 1_000_000, above=True)] | None = None
    missing_end_penalty: Annotated[float, between(0, 1_000_000)] = 0.0
    reward_timeout: Annotated[float, between(0, 86_400, above=True)] = 60.0
    max_reward_failures: Annotated[float, between(0, 1)] = 0.5

    def __post_init__(self):
        # A single reward stands for a list of one; a tuple is a loaded reward model.
        is_one = isinstance(self.reward, str | tuple) or callable(self.reward)
        if is_one:
            object.__setattr__(self, "reward", [self.reward])
        check_fields(self)

    def named(self) -> dict[str, Any]:
        """The rewards by name: what was given, or a function's own name.

        Raises: ValueError where two have one name, and for another number of weights.
        """
        given: Any = self.reward or []
        names = [_reward_name(one) for one in given]
        # Metrics and weights go by name, so that two of one name would be mixed up.
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise ValueError(f"reward names {', '.join(twice)} twice; give it once, and a weight")
        if self.reward_weights and len(self.reward_weights) != len(names):
            raise ValueError(
                f"{len(names)} rewards but {len(self.reward_weights)} reward_weights; give one each"
            )
        return dict(zip(names, given, strict=True))


def _reward_name(reward: Any) -> str:
    if isinstance(reward, str):
        return reward
    return (
        "reward_model"
        if isinstance(reward, tuple)
        else getattr(reward, "__name__", type(reward).__name__)
    )
