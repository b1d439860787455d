"""What recipes start from: a model with what is trained of it, and rows of a data set; both as options of the command line."""

import dataclasses
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf import adapters, averages, data, files, peft_files, tasks
from rlhf.data import batch_indices, filled, mix, read_rows, renamed, stream_rows
from rlhf.data.types import Row
from rlhf.fields import documented
from rlhf.lm import LM, Head
from rlhf.loop import Training
from rlhf.models import huggingface
from rlhf.models.config import Config, EncoderDecoderConfig
from rlhf.models.huggingface_config import decoder_of
from rlhf.models.vocabulary import resized
from rlhf.ranges import INT32, Share, at_least, between, check_fields
from rlhf.rollouts import Batch, Prompts
from rlhf.runs import model_of
from rlhf.train import TrainState, reference, train_step


@dataclasses.dataclass(frozen=True)
class Model:
    """The model: where it comes from, how it computes, and what of it is trained.

    Args:
      model: a model's folder or a run's, or a name on the Hub.
      dtype: of the computation; what is trained has float32 masters.
      remat: what the backward pass computes again instead of keeping it.
      lora_rank: train adapters of this rank instead of the whole model; 0: the whole.
      lora_alpha: an adapter counts lora_alpha / lora_rank.
      dora: adapters with a magnitude.
      resize_embeddings: grow the embedding to the tokenizer's length; new tokens begin as the mean of the others.  Adapters do
        not train it, and theirs fit a base that is grown likewise.
      eos_token: the token that ends an answer; null: what the tokenizer's files name.
    """

    model: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full"] = "none"
    lora_rank: Annotated[int, between(0, 65_536)] = 0
    lora_alpha: Annotated[float, between(0, 1_000_000, above=True)] = 32.0
    dora: bool = False
    resize_embeddings: bool = False
    eos_token: str | None = None

    def tokenizer(self) -> Any:
        """The model's tokenizer.  Raises: as `rlhf.models.huggingface.load_tokenizer`; ValueError for an end token it lacks."""
        return huggingface.load_tokenizer(self.model, eos_token=self.eos_token)

    def precision(self) -> dict[str, Any]:
        """Keyword arguments of `rlhf.load` and its kin."""
        dtype = jnp.dtype(self.dtype)
        fields = {} if self.remat == "none" else {"remat": self.remat}
        return {"dtype": dtype, "param_dtype": dtype if self.lora_rank else jnp.float32, **fields}

    def load(self) -> tuple[LM, Any]:
        """The model, with embeddings for all tokens where they are asked for.  Raises: as `rlhf.load`."""
        lm, params, tokenizer = huggingface.load(self.model, **self.precision())
        return resized(lm, params, len(tokenizer)) if self.resize_embeddings else (lm, params)

    def load_classifier(self, labels: int, *, of_tokens: bool, seed: int) -> tuple[LM, Head, Any]:
        """A trunk and a head to train.  Raises: as `rlhf.models.huggingface.load_for_classification`."""
        lm, head, params, tokenizer = huggingface.load_for_classification(
            self.model, labels, of_tokens=of_tokens, key=jax.random.key(seed), **self.precision()
        )
        if self.resize_embeddings:
            lm, trunk = resized(lm, params["lm"], len(tokenizer))
            params = params | {"lm": trunk}
        return lm, head, params

    def encoder(self, length: int) -> int | None:
        """Of an encoder the most tokens that it reads, at most `length`; None for others.

        Raises: ValueError for an encoder-decoder, which is no classifier here.
        """
        config = huggingface.read_config(self.model)
        if isinstance(config, EncoderDecoderConfig):
            raise ValueError(
                f"{self.model} is an encoder-decoder, which cannot be a reward model or classifier here; take a decoder "
                "(Llama, Qwen, …) or an encoder (BERT, RoBERTa, DistilBERT)"
            )
        return None if config.causal else min(length, config.max_positions or length)

    def check_decoder(self) -> None:
        """Raises ValueError for an encoder and an encoder-decoder: in recipes for decoders alone, before they read data."""
        if isinstance(self._writer(), EncoderDecoderConfig):
            raise ValueError(
                f"{self.model} is an encoder-decoder, whose encoder reads prompts; this command trains decoders alone.  "
                "sft, dpo, cpo, orpo, grpo, rloo, ppo, online_dpo, xpo and rft take both"
            )

    def _writer(self) -> Config:
        """The config of a model that writes text."""
        config = huggingface.read_config(self.model)
        if not decoder_of(config).causal:
            raise ValueError(
                f"{self.model} is an encoder ({huggingface.model_type(self.model)}), which writes no text; `rlhf reward` and "
                "`rlhf prm` take it, other commands a decoder (Llama, Qwen, …) or an encoder-decoder (T5, BART)"
            )
        return config

    def seq2seq(self, tokenizer: Any) -> data.Seq2Seq | None:
        """How an encoder-decoder reads rows; None for other models.

        Raises: ValueError where config.json does not say what its decoder starts with.
        """
        if not isinstance(self._writer(), EncoderDecoderConfig):
            return None
        start = huggingface.decoder_start(self.model)
        if start is None:
            raise ValueError(f"{self.model}: config.json has no decoder_start_token_id for its decoder to start from; set it")
        return data.Seq2Seq.of(tokenizer, start)

    def check(self, tokenizer: Any, *rows: Any, more: int = 0) -> None:
        """Raises where the model has no embedding for a token of the rows, or for their positions, before it is loaded.

        Args:
          rows: arrays such as `Batch`, `Pairs` or `Prompts`, however nested.
          more: tokens that follow a row's last: answers to prompts.
        """
        whole = huggingface.read_config(self.model)
        config = decoder_of(whole)
        parts = [x for x in jax.tree.leaves(rows, is_leaf=_has_tokens) if _has_tokens(x)]
        sources = [Batch(mask=None, **part.inputs) for part in parts if getattr(part, "inputs", None) is not None]
        number = max(config.vocab_size, len(tokenizer) if self.resize_embeddings else 0)
        behind = [more] * len(parts) + [0] * len(sources)
        for part, more in zip([*parts, *sources], behind, strict=True):
            tokens = np.asarray(part.tokens)
            real = np.asarray(part.mask if isinstance(part, Prompts) else part.segment_ids) != 0
            if (strange := real & (tokens >= number)).any():
                token = int(tokens[strange][0])
                raise ValueError(
                    f"token {token}, {tokenizer.convert_ids_to_tokens(token)!r}, is in the rows, but {self.model} has "
                    f"embeddings for {number} tokens alone, 0 to {number - 1}; give --resize_embeddings, or another tokenizer"
                )
            places = real.cumsum(-1) - 1 if isinstance(part, Prompts) else np.where(real, np.asarray(part.positions), 0)
            length = int(places.max()) + 1
            if config.max_positions and length + more > config.max_positions:
                of_both = f" and {more} more of an answer" if more else ""
                cure = "--max_new_tokens, or shorter prompts" if more else "--max_length"
                raise ValueError(
                    f"a row has {length} tokens{of_both}, but {self.model} has {config.max_positions} learned positions; "
                    f"give a smaller {cure}"
                )

    def trained(self, params: Any, seed: int) -> tuple[Any, Any]:
        """`(what is trained, what adapters sit on)`; the latter is None without adapters."""
        if not self.lora_rank:
            return params, None
        key = jax.random.key(seed)
        return adapters.add(params, key, rank=self.lora_rank, alpha=self.lora_alpha, dora=self.dora)

    def __post_init__(self):
        check_fields(self)
        object.__setattr__(self, "model", model_of(self.model))
        if self.dora and not self.lora_rank:
            raise ValueError(f"lora_rank {self.lora_rank} with dora {self.dora}; DoRA is of adapters, give --lora_rank 16")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where rows come from.

    Args:
      dataset: a .jsonl, .json, .csv, .parquet or .arrow file, a folder of those, a name on the Hub, or a generated task such as
        task:reverse or task:sums:2.
      split: of the dataset.
      dataset_config: of a dataset on the Hub that has several.
      dataset_size: rows of a generated task.
      max_rows: read so many rows of a dataset, from its start, and download no more than those; null: all.
      columns: names of the files' columns and what they are here, such as {question: prompt, answer: solution}.
    """

    dataset: str
    split: str = "train"
    dataset_config: str | None = None
    dataset_size: Annotated[int, between(1, 10_000_000)] = 4096
    max_rows: Annotated[int, between(1, INT32)] | None = None
    columns: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_fields(self)

    @property
    def generated(self) -> bool:
        """Whether all rows are of one generated task, which has a score of its own."""
        return self.dataset.startswith(tasks.PREFIX)

    def questions(self) -> list[Row]:
        """Rows to judge by alone; of a generated task not those that are trained on."""
        return self.read(self.dataset, self.split, tasks.prompts, self.dataset_size, 1)

    def read(self, source: str, split: str, kind: Callable, number: int, seed: int, **knobs) -> list[Row]:
        """The rows of a source; `kind` makes those of a generated task, so many, by a seed."""
        if source.startswith(tasks.PREFIX):
            return tasks.load(source, kind, number, seed=seed, **knobs)
        read = read_rows if self.max_rows is None else stream_rows
        rows = filled(list(islice(read(source, split=split, config=self.dataset_config), self.max_rows)))
        if missing := [name for name in self.columns if name not in rows[0]]:
            raise ValueError(f"columns renames {', '.join(missing)}, but {source} has {', '.join(rows[0]):.200}")
        return list(data.each(rows, lambda row: renamed(row, **self.columns)))


@dataclasses.dataclass(frozen=True)
class Data(Source):
    """The rows to train on, and those to judge by.

    Args:
      dataset_accuracy: how often the answers in a generated task's rows are right; null: as its kind of rows has it.
      more_datasets: further ones, trained on together with the first.
      fractions: the share of each in the mixture, no row twice; null: all rows of all.
      eval_dataset: rows to judge by, from elsewhere.
      eval_split: rows to judge by, another split of the dataset; of a generated task there are 256.
    """

    dataset_accuracy: Share | None = None
    more_datasets: list[str] = dataclasses.field(default_factory=list)
    fractions: Annotated[list[Annotated[float, between(0, 1, above=True)]], at_least(1)] | None = None
    eval_dataset: str | None = None
    eval_split: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.fractions and len(self.fractions) != 1 + len(self.more_datasets):
            names = ", ".join([self.dataset, *self.more_datasets])
            raise ValueError(f"{len(self.fractions)} fractions of {names}; give one of each")

    @property
    def generated(self) -> bool:
        return super().generated and not self.more_datasets

    def rows(self, kind: Callable, **knobs) -> tuple[list[Row], list[Row]]:
        """Rows to train on, and rows to judge by, none where none were asked for; `kind` makes those of a generated task."""
        names = [self.dataset, *self.more_datasets]
        if self.dataset_accuracy is not None:
            if kind is tasks.prompts:
                raise ValueError(f"dataset_accuracy {self.dataset_accuracy} is of answers, but prompts have none; leave it out")
            knobs = {**knobs, "accuracy": self.dataset_accuracy}
        sources = [self.read(name, self.split, kind, self.dataset_size, 0, **knobs) for name in names]
        train = filled(mix(sources, self.fractions).rows if self.fractions else [row for rows in sources for row in rows])
        if self.eval_dataset is None and self.eval_split is None:
            return train, []
        return train, self.read(self.eval_dataset or self.dataset, self.eval_split or "train", kind, 256, 1, **knobs)

    def laid_out(self, kind: Callable, lay_out: Callable[[list[Row]], Any]) -> tuple[Any, Any]:
        """`rows` as arrays; None for the second where none were asked for."""
        train, held_out = self.rows(kind)
        return lay_out(train), lay_out(held_out) if held_out else None


@documented
class Policy(NamedTuple):
    """A language model and what is trained of it; for a reward model also a head, which always is.

    Attributes:
      lm: the language model.
      params: what is trained: all parameters, or those of the adapters; with a head `{"lm": …, "head": …}`.
      frozen: what the adapters sit on; None without.
      source: the folder or name that it was loaded from.
      head: of a reward model; None: there is none.
    """

    lm: LM
    params: Any
    frozen: Any
    source: str
    head: Head | None = None

    def whole(self, params: Any, context: Any) -> Any:
        """The model's parameters, of those trained and the state's context."""
        if self.frozen is None:
            return params
        if self.head is None:
            return adapters.join(params, context["frozen"])
        return params | {"lm": adapters.join(params["lm"], context["frozen"])}

    def reference(self, context: Any) -> Any:
        """The parameters of the model as it was."""
        return context["reference"] if self.frozen is None else adapters.off(context["frozen"])

    def context(self, *, with_reference: bool = False) -> dict[str, Any]:
        """What the train state carries beside what is trained."""
        if self.frozen is not None:
            return {"frozen": self.frozen}  # with the adapters off it is the reference
        return {"reference": reference(self.params)} if with_reference else {}

    def of_whole(self, loss_fn: Callable) -> Callable:
        """A `loss_fn` of the language model's parameters as one of those trained."""
        return lambda params, context, batch, key: loss_fn(self.whole(params, context), context, batch, key)

    def export(self, folder: Path, tokenizer: Any, state: TrainState, over: bool) -> None:
        """Writes `model/` in the place of that of an earlier state, in the dtype that the model has in the files it came from.

        For adapters `adapter/`, without a head, and `model/` once the run is over: merging takes the memory of a second copy.
        """
        whole = self.whole(state.params, state.context)
        lm, head = (whole, None) if self.head is None else (whole["lm"], whole["head"])
        if self.frozen is not None:
            with files.renewed(folder / "adapter") as new:
                peft_files.save(new, self.lm, lm, huggingface.model_type(self.source), base=self.source)
            if not over:
                return
            lm = adapters.merge(lm)
        with files.renewed(folder / "model") as new:
            dtype = huggingface.stored_dtype(self.source)
            huggingface.save(new, self.lm, lm, head=head, like=self.source, tokenizer=tokenizer, dtype=dtype)


def _has_tokens(x: Any) -> bool:
    return isinstance(x, Prompts) or (hasattr(x, "tokens") and hasattr(x, "segment_ids"))


def policy(options: Model, seed: int) -> Policy:
    """Loads the model, with fresh adapters if they are asked for.  Raises: as `rlhf.load`."""
    lm, params = options.load()
    return Policy(lm, *options.trained(params, seed), options.model)


def reward_model(options: Model, seed: int) -> tuple[Policy, Head]:
    """Loads a reward model to be trained: with its own head where it has one, else with one that starts at 0.

    Raises: as `rlhf.models.huggingface.load_for_classification`.
    """
    return classifier(options, seed, 1)


def classifier(options: Model, seed: int, labels: int, *, of_tokens: bool = False) -> tuple[Policy, Head]:
    """Loads a classifier to be trained, of whole texts or of tokens.

    Raises: as `rlhf.models.huggingface.load_for_classification`.
    """
    lm, head, params = options.load_classifier(labels, of_tokens=of_tokens, seed=seed)
    trained, frozen = options.trained(params["lm"], seed)
    return Policy(lm, {"lm": trained, "head": params["head"]}, frozen, options.model, head), head


def with_head(options: Model, seed: int, make: Callable[[int], Head]) -> tuple[Policy, Head]:
    """Loads the model as a trunk with a new head, `make(size of a hidden state)`.  Raises: as `rlhf.load`."""
    lm, params = options.load()
    head = make(hidden_size(lm, params))
    trained, frozen = options.trained(params, seed)
    return Policy(lm, {"lm": trained, "head": head.init(jax.random.key(seed))}, frozen, options.model, head), head


def hidden_size(lm: LM, params: Any) -> int:
    """D, the size of what a head reads."""
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def hidden(params, x):
        inputs = {"tokens": x, "positions": x, "segment_ids": x} if lm.encode else None
        return lm.hidden(params, x, positions=x, segment_ids=x, inputs=inputs)[0]

    return jax.eval_shape(hidden, params, one).shape[-1]


def following(options: Model, every: int, share: float) -> list[Callable]:
    """The `hooks` of `rlhf.loop.fit` that move the reference every so many steps; none for 0.

    Raises: ValueError where there are adapters, and as `rlhf.averages.following`.
    """
    if every and options.lora_rank:
        raise ValueError(f"sync_every {every}, but with adapters the reference is the model beneath, which stays; leave it out")
    return [averages.following(every, share)] if every else []


def kept(context: dict[str, Any], hooks: list[Callable]) -> dict[str, Any]:
    """`context`, `fixed` and `hooks` of `rlhf.loop.fit`: what moves is saved, what does not is not."""
    return {"context": context, "hooks": hooks} if hooks else {"fixed": context}


def named(name: str, known: Mapping[str, Any], what: str) -> Any:
    """What a name stands for.  Raises: ValueError for one that is not known, with the nearest that is."""
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"{what} {name!r} is not known; {hint}known: {', '.join(known)}")
    return known[name]


def truncated(*sides: Any, length: int, say: Callable) -> data.Truncated:
    """`data.truncate`; what is cut or left out is said."""
    kept = data.truncate(*sides, length=length)
    if kept.rows_cut or kept.rows_removed:
        cut = f"{kept.rows_cut} sequences lost {kept.tokens_cut} tokens beyond {length}"
        say(f"{cut}; {kept.rows_removed} rows with nothing left to train on were left out")
    return kept


def offline_step(loss_fn: Callable, prepare: Callable, training: Training) -> Callable:
    """`make_step` of `rlhf.loop.fit` for batches that are there before the step: prepared, and taken in one program."""
    return prepared_step(lambda optimizer: train_step(loss_fn, optimizer, micro_batches=training.micro_batches), prepare)


def prepared_step(step_of: Callable, prepare: Callable) -> Callable:
    """`offline_step` for any step, `step_of(optimizer)`."""

    def make_step(optimizer):
        step = step_of(optimizer)

        @partial(jax.jit, donate_argnums=0)
        def update(state, batch):
            state, metrics = step(state, prepare(batch))
            return state, {**metrics, "tokens": (batch.segment_ids != 0).sum()}

        return update

    return make_step


def take(arrays: Any, seed: int, number: int, size: int) -> Any:
    """The batch of a step: a pure function of seed and number."""
    return select(arrays, batch_indices(seed, number, len(jax.tree.leaves(arrays)[0]), size))


def select(arrays: Any, rows: Any) -> Any:
    """These rows of all arrays; what has no rows is every row's."""
    return jax.tree.map(lambda x: x[rows] if np.ndim(x) else x, arrays)


def parts(arrays: Any, size: int) -> list[Any]:
    """All rows, `size` at a time."""
    return [select(arrays, slice(i, i + size)) for i in range(0, len(jax.tree.leaves(arrays)[0]), size)]


def evaluation(loss_fn: Callable, prepared: Any, size: int) -> Callable[[TrainState], dict[str, Any]] | None:
    """`(state) -> loss and metrics` of rows that are not trained on, `size` at a time; None where there are none.

    The weights are those of all the rows together, so that the parts add up to the whole.
    """
    if prepared is None:
        return None

    @jax.jit
    def one(params, context, part):
        loss, metrics = loss_fn(params, context, part, None)
        return {"loss": loss, **metrics}

    def evaluate(state: TrainState) -> dict[str, Any]:
        found = [one(state.params, state.context, part) for part in parts(prepared, size)]
        return jax.tree.map(lambda *values: sum(values), *found)

    return evaluate
