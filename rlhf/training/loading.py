"""Models as options name them: checked, read straight onto a mesh, given adapters and heads, and
written again.
"""

import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf import adapters, data, files, peft_files
from rlhf.fields import documented
from rlhf.lm import LM, Head
from rlhf.models import huggingface as huggingface
from rlhf.models import quantized
from rlhf.models.config import Config, EncoderDecoderConfig
from rlhf.models.huggingface_config import config_of, decoder_of, described
from rlhf.models.vocabulary import resized
from rlhf.rollouts import Batch, Prompts
from rlhf.sharding import make_mesh, shardings
from rlhf.train import TrainState, init_state, reference
from rlhf.training import averages, programs
from rlhf.training.options import ModelOptions
from rlhf.training.policy import Policy
from rlhf.training.runs import model_of


def name_of(options: ModelOptions) -> str:
    """What messages call the model."""
    return options.model if isinstance(options.model, str) else "the model"


def load_tokenizer(options: ModelOptions) -> Any:
    """The model's tokenizer.

    Raises: ValueError where there is no tokenizer, or it lacks the end or padding token that is
    given; FileNotFoundError where the folder or name has none.
    """
    if isinstance(options.model, str):
        tokenizer = huggingface.load_tokenizer(options.model, eos_token=options.eos_token)
    else:
        _, _, tokenizer = options.model
        if tokenizer is None:
            raise ValueError(
                "model has no tokenizer; give (lm, params, tokenizer) with one of transformers'"
            )
        if options.eos_token is not None:
            tokenizer.eos_token = _known_token(tokenizer, "eos_token", options.eos_token)
    if options.pad_token is not None:
        tokenizer.pad_token = _known_token(tokenizer, "pad_token", options.pad_token)
    if options.chat_template is not None:
        # `os.path.isfile` is False for a template too long to be a name, where `Path` would raise.
        is_file = os.path.isfile(options.chat_template)
        tokenizer.chat_template = (
            Path(options.chat_template).read_text() if is_file else options.chat_template
        )
    return tokenizer


def _known_token(tokenizer: Any, option: str, token: str) -> str:
    if token not in tokenizer.get_vocab():
        raise ValueError(
            f"{option} {token!r} is no token of the tokenizer; add it there, or give another"
        )
    return token


def read_config(options: ModelOptions) -> Config | None:
    """The model's config, without loading it; None for a model of your own, which has none."""
    if isinstance(options.model, str):
        return huggingface.read_config(options.model)
    try:
        return config_of(options.model[0])
    except TypeError:
        return None


def encoder_length(options: ModelOptions, length: int) -> int | None:
    """Of an encoder the most tokens that it reads, at most `length`; None for others.

    Raises: ValueError for an encoder-decoder, which is no classifier here.
    """
    config = read_config(options)
    if isinstance(config, EncoderDecoderConfig):
        raise ValueError(
            f"{name_of(options)} is an encoder-decoder, which cannot be a reward model or "
            "classifier here; take a decoder "
            "(Llama, Qwen, …) or an encoder (BERT, RoBERTa, DistilBERT)"
        )
    # `max_positions` is None where positions are computed and not learned: no limit.
    return None if config is None or config.causal else min(length, config.max_positions or length)


def check_decoder(options: ModelOptions) -> None:
    """Raises ValueError for an encoder and an encoder-decoder: in recipes for decoders alone,
    before they read data.
    """
    if isinstance(_generative_config(options), EncoderDecoderConfig):
        raise ValueError(
            f"{name_of(options)} is an encoder-decoder, whose encoder reads prompts; this command "
            "trains decoders alone.  "
            "sft, dpo, cpo, orpo, grpo, rloo, ppo, online_dpo, xpo and rft take both"
        )


def load_seq2seq(options: ModelOptions, tokenizer: Any) -> data.Seq2Seq | None:
    """How an encoder-decoder reads rows; None for other models.

    Raises: ValueError for an encoder, which generates nothing, and where config.json does not say
    what its decoder starts with.
    """
    config = _generative_config(options)
    if not isinstance(config, EncoderDecoderConfig):
        return None
    if not isinstance(options.model, str):
        raise ValueError(
            "model is an encoder-decoder in memory, whose start token is not known; save it, and "
            "give its folder"
        )
    start = huggingface.decoder_start(options.model)
    if start is None:
        raise ValueError(
            f"{options.model}: config.json has no decoder_start_token_id for its decoder to start "
            "from; set it"
        )
    return data.Seq2Seq.of(tokenizer, start)


def _generative_config(options: ModelOptions) -> Config | None:
    config = read_config(options)
    if config is not None and not decoder_of(config).causal:
        kind = (
            huggingface.model_type(options.model) if isinstance(options.model, str) else "in memory"
        )
        raise ValueError(
            f"{name_of(options)} is an encoder ({kind}), which writes no text; `rlhf reward` and "
            "`rlhf prm` take it, other "
            "commands a decoder (Llama, Qwen, …) or an encoder-decoder (T5, BART)"
        )
    return config


def eos_ids(options: ModelOptions, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a completion.  Raises: ValueError where the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end token, so that no completion would end; give --eos_token, or "
            "set eos_token in "
            "tokenizer_config.json"
        )
    if isinstance(options.model, str):
        return huggingface.end_ids(options.model, tokenizer)
    return (tokenizer.eos_token_id,)


def check_tokens(
    options: ModelOptions, tokenizer: Any, *rows: Any, max_new_tokens: int = 0
) -> None:
    """Raises where the model has no embedding for a token of the rows, or for their positions,
    before it is loaded.

    Args:
      options: of the model.
      tokenizer: of the model.
      rows: arrays such as `Batch`, `Pairs` or `Prompts`, however nested.
      max_new_tokens: tokens that follow a row's last: completions of prompts.
    """
    full_config = read_config(options)
    if full_config is None:
        return
    config = decoder_of(full_config)
    parts = [x for x in jax.tree.leaves(rows, is_leaf=_has_tokens) if _has_tokens(x)]
    # The encoder's inputs are tokens too, with positions of their own; nothing is sampled after
    # them.
    sources = [
        Batch(mask=None, **part.inputs)
        for part in parts
        if getattr(part, "inputs", None) is not None
    ]
    # An embedding may have more rows than the tokenizer has tokens: they are padded to multiples of
    # 64 or 128.
    number = max(config.vocab_size, len(tokenizer) if options.resize_embeddings else 0)
    following = [max_new_tokens] * len(parts) + [0] * len(sources)
    longest = 0
    for part, more in zip([*parts, *sources], following, strict=True):
        tokens = np.asarray(part.tokens)
        # Prompts have a mask of what is no padding; rows have segments, of which 0 is padding.
        real = np.asarray(part.mask if isinstance(part, Prompts) else part.segment_ids) != 0
        unknown = real & (tokens >= number)
        if unknown.any():
            token = int(tokens[unknown][0])
            raise ValueError(
                f"token {token}, {tokenizer.convert_ids_to_tokens(token)!r}, is in the rows, but "
                f"{name_of(options)} has "
                f"embeddings for {number} tokens alone, 0 to {number - 1}; give "
                "--resize_embeddings, or another tokenizer"
            )
        positions = (
            # Prompts are padded on the left: positions count from their first real token.
            real.cumsum(-1) - 1
            if isinstance(part, Prompts)
            else np.where(real, np.asarray(part.positions), 0)
        )
        length = int(positions.max()) + 1
        longest = max(longest, length + more)
        if config.max_positions and length + more > config.max_positions:
            of_both = f" and {more} more of a completion" if more else ""
            cure = "--max_new_tokens, or shorter prompts" if more else "--max_length"
            raise ValueError(
                f"a row has {length} tokens{of_both}, but {name_of(options)} has "
                f"{config.max_positions} learned positions; "
                f"give a smaller {cure}"
            )
    # Rotary positions go on without end, but what a model makes of later ones nobody has trained.
    most = huggingface.trained_positions(options.model) if _source(options) else None
    if most is not None and longest > most:
        print(
            f"rows have up to {longest} tokens with their completions, but {name_of(options)} was "
            f"made for {most} (max_position_embeddings of config.json): expect it to be worse "
            "beyond",
            file=sys.stderr,
        )


def _has_tokens(x: Any) -> bool:
    return isinstance(x, Prompts) or (hasattr(x, "tokens") and hasattr(x, "segment_ids"))


@documented
class Loaded(NamedTuple):
    """A language model on a mesh, and which of its parameters are trained.

    Attributes:
      lm: the language model.
      params: trainable parameters: all, or those of the adapters; with a head
        `{"lm": …, "head": …}`.
      frozen: the parameters that adapters sit on; None without adapters.
      source: the folder or name that it was loaded from; None: it was in memory.
      mesh: where the parameters are.
      head: of a reward model or a critic, always trained; None: there is none.
      reference: parameters of a reference model from elsewhere; None: it is the model as it was.
      dropout: of the adapters.
    """

    lm: LM
    params: Any
    frozen: Any
    source: str | None
    mesh: Mesh
    head: Head | None = None
    reference: Any = None
    dropout: float = 0.0

    @property
    def policy(self) -> Policy:
        """What is trained, without its arrays."""
        return Policy(
            self.lm, self.head, has_adapters=self.frozen is not None, dropout=self.dropout
        )

    @property
    def axes(self) -> dict[str, Any]:
        """Logical axes of the parameters, by which `rlhf.sharding` finds them, their moments and
        references in a state.
        """
        names = self.lm.axes()
        if self.frozen is not None:
            names = adapters.axes(names, self.frozen)
        # The language model's names stand at the top too: a reference in the context has no "lm"
        # above it.  `shardings` compares ends of paths.
        return names if self.head is None else {"lm": names, "head": self.head.axes(), **names}

    def context(self, *, with_reference: bool = False) -> dict[str, Any]:
        """What the train state carries beside the trainable parameters; under adapters their base
        is the reference too.
        """
        context = {} if self.frozen is None else {"frozen": self.frozen}
        if with_reference and self.reference is not None:
            context["reference"] = self.reference
        elif with_reference and self.frozen is None:
            # A copy: a donated state frees the parameters.
            context["reference"] = copied(self._lm_params)
        return context

    def reference_context(self) -> dict[str, Any]:
        """A context by which `Policy.reference_params` finds the reference, before training begins;
        nothing is copied.
        """
        context = self.context()
        # No copy here: the parameters are still those of the start, and nothing is donated yet.
        if self.reference is not None or self.frozen is None:
            context["reference"] = self._lm_params if self.reference is None else self.reference
        return context

    @property
    def _lm_params(self) -> Any:
        return self.params if self.head is None else self.params["lm"]

    def place(self, tree: Any, axes: Any = None) -> Any:
        """Arrays moved to their places on the mesh, by the axes of the parameters or by others."""
        where = shardings(tree, self.axes if axes is None else axes, self.mesh, say=_silent)
        if is_planned():
            return programs.shaped(tree, where)
        return jax.tree.map(jax.device_put, tree, where)

    def init_state(
        self,
        optimizer: optax.GradientTransformation,
        seed: int,
        context: Mapping[str, Any] | None = None,
        *,
        axes: Mapping[str, Any] | None = None,
    ) -> TrainState:
        """The state at step 0, every array born in its place on the mesh; the parameters become
        part of it.

        Args:
          optimizer: any optax transformation.
          seed: of the run's key.
          context: what the objective needs and does not train; None: `self.context()`.
          axes: of entries of the state that are not the model's, such as further heads.
        """
        names = {**self.axes, **(axes or {})}
        context = self.context() if context is None else dict(context)
        if is_planned():

            def start(params, context):
                return init_state(params, optimizer, jax.random.key(seed), context)

            return self.place(jax.eval_shape(start, self.params, context), names)

        # Moments are born sharded: made on one device first, Adam's two would need twice the
        # model's memory there.
        def init_optimizer(params):
            where = shardings(jax.eval_shape(optimizer.init, params), names, self.mesh, say=_silent)
            return jax.jit(optimizer.init, out_shardings=where)(params)

        sharded = optax.GradientTransformation(init_optimizer, optimizer.update)
        # Scalars and keys on every device: an array on one device alone beside a mesh's makes jit
        # raise.
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        state = init_state(self.params, sharded, jax.random.key(seed), context)
        return state._replace(
            step=jax.device_put(state.step, everywhere),
            key=jax.device_put(state.key, everywhere),
            context=self.place(state.context, names),
        )

    def export(self, folder: Path, tokenizer: Any, state: TrainState, over: bool) -> None:
        """Writes `model/` in the place of that of an earlier state, in the dtype that the model has
        in the files it came from.

        For adapters `adapter/`, without a head, and `model/` once the run is over: merging takes
        the memory of a second copy.
        """
        full = self.policy.full_params(state.params, state.context)
        lm, head = (full, None) if self.head is None else (full["lm"], full["head"])
        if self.frozen is not None:
            family = _family(self)
            with files.renewed(folder / "adapter") as new:
                peft_files.save(new, self.lm, lm, family, base=self.source)
            # Merged at the end alone: it takes the memory of a second copy of the model.
            if not over:
                return
            # One program on a mesh: many small ones, each with its collectives, would overlap.
            lm = jax.jit(adapters.merge)(lm) if self.mesh.size > 1 else adapters.merge(lm)
        with files.renewed(folder / "model") as new:
            # Masters are float32; written so, a bfloat16 model would come back twice as large.
            dtype = huggingface.stored_dtype(self.source) if self.source else None
            huggingface.save(
                new, self.lm, lm, head=head, like=self.source, tokenizer=tokenizer, dtype=dtype
            )


def one_device() -> Mesh:
    """A mesh of the first device."""
    return make_mesh(devices=jax.devices()[:1])


def load_policy(options: ModelOptions, seed: int, mesh: Mesh, *, say: Callable = print) -> Loaded:
    """The model on a mesh, with fresh adapters if the options want them.

    Args:
      options: of the model.
      seed: of what is random in adapters.
      mesh: where its parameters are born.
      say: `(text)`, called once for each axis that the mesh does not divide and so does not split.

    Raises: FileNotFoundError where the folder or name has no model; ValueError for a config or
    weights that cannot be read.
    """
    say = without_repeats(say)
    lm, params = _language_model(options, mesh, say)
    loaded = Loaded(
        lm, params, None, _source(options), mesh, reference=_reference(options, lm, mesh, say)
    )
    return _with_adapters(loaded, options, seed)


def load_with_head(
    options: ModelOptions,
    seed: int,
    mesh: Mesh,
    make_head: Callable[[int], Head],
    *,
    say: Callable = print,
) -> Loaded:
    """The model as a trunk with a new head, `make_head(size of a hidden state)`.

    Raises: FileNotFoundError where the folder or name has no model; ValueError for a config or
    weights that cannot be read.
    """
    say = without_repeats(say)
    lm, params = _language_model(options, mesh, say)
    head = make_head(hidden_size(lm, params))
    both = {"lm": params, "head": head.init(jax.random.key(seed))}
    loaded = Loaded(
        lm, both, None, _source(options), mesh, head, reference=_reference(options, lm, mesh, say)
    )
    return _with_adapters(loaded, options, seed)


def load_classifier(
    options: ModelOptions,
    seed: int,
    mesh: Mesh,
    *,
    labels: int = 1,
    of_tokens: bool = False,
    say: Callable = print,
) -> Loaded:
    """A classifier to train, of texts or of single tokens: with its own head where it has one, else
    with one that starts at 0.

    Args:
      options: of the model.
      seed: of what is random in a new head and in adapters.
      mesh: where its parameters are born.
      labels: numbers a text; 1 for a reward.
      of_tokens: a classifier of every token, such as a process reward model.
      say: `(text)`, called once for each axis that the mesh does not divide and so does not split.

    Raises: ValueError for a model in memory, a config or weights that cannot be read, and a head
    with another number of labels; FileNotFoundError where the folder or name has no model.
    """
    if options.reference_model is not None:
        raise ValueError(
            f"reference_model {options.reference_model}, but a classifier is trained without one; "
            "leave it out"
        )
    if not isinstance(options.model, str):
        raise ValueError(
            "a classifier is loaded from files; save the model (rlhf.save), and give its folder"
        )
    lm, head, params, tokenizer = huggingface.load_for_classification(
        options.model,
        labels,
        of_tokens=of_tokens,
        key=jax.random.key(seed),
        mesh=mesh,
        say=without_repeats(say),
        shapes_only=is_planned(),
        **precision(options),
    )
    if options.resize_embeddings:
        lm, trunk = _resized(lm, params["lm"], len(tokenizer))
        params = params | {"lm": trunk}
    return _with_adapters(Loaded(lm, params, None, options.model, mesh, head), options, seed)


def precision(options: ModelOptions) -> dict[str, Any]:
    """Keyword arguments of `rlhf.load` and its kin."""
    dtype = jnp.dtype(options.dtype)
    fields = {} if options.remat == "none" else {"remat": options.remat}
    # What is trained needs float32 masters: updates of 1e-5 are lost in bfloat16's 8 bits.  Under
    # adapters the base is not trained, and may be in few.
    return {"dtype": dtype, "param_dtype": dtype if options.has_adapters else jnp.float32, **fields}


def hidden_size(lm: LM, params: Any) -> int:
    """D, the size of what a head reads."""
    # Shapes alone: nothing is computed.
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def hidden(params, x):
        inputs = {"tokens": x, "positions": x, "segment_ids": x} if lm.encode else None
        return lm.hidden(params, x, positions=x, segment_ids=x, inputs=inputs)[0]

    return jax.eval_shape(hidden, params, one).shape[-1]


def is_planned() -> bool:
    """Whether only programs are wanted, and parameters are shapes."""
    return programs.devices() is not None


def copied(params: Any) -> Any:
    """A copy, which a donated state does not free; of shapes the same."""
    return params if is_planned() else reference(params)


def _resized(lm: LM, params: Any, size: int) -> tuple[LM, Any]:
    """`resized`, also of shapes."""
    if not is_planned():
        return resized(lm, params, size)
    larger: list[LM] = []

    def grow(params):
        grown_lm, grown = resized(lm, params, size)
        larger.append(grown_lm)
        return grown

    shapes = jax.eval_shape(grow, params)
    return larger[0], shapes


def _language_model(options: ModelOptions, mesh: Mesh, say: Callable) -> tuple[LM, Any]:
    """The model with all its parameters, and with embeddings for all tokens where the options
    want them.
    """
    if isinstance(options.model, str):
        lm, params, tokenizer = huggingface.load(
            options.model, mesh=mesh, say=say, shapes_only=is_planned(), **precision(options)
        )
    else:
        lm, params, tokenizer = options.model
        # A donated state would free the caller's arrays.
        params = copied(params)
    if not options.resize_embeddings:
        return lm, params
    return _resized(lm, params, len(tokenizer))


def _with_adapters(loaded: Loaded, options: ModelOptions, seed: int) -> Loaded:
    """The same, its arrays in their places, with adapters on the language model where the
    options want them.
    """
    # Adapters sit on the language model alone; a head is small, and always trained in full.
    params = loaded.params if loaded.head is None else loaded.params["lm"]
    frozen = None
    if options.has_adapters:
        add = partial(_added, loaded, options, seed)
        params, frozen = jax.eval_shape(add, params) if is_planned() else add(params)
    trainable = params if loaded.head is None else {"lm": params, "head": loaded.params["head"]}
    loaded = loaded._replace(params=trainable, frozen=frozen, dropout=options.lora_dropout)
    return loaded._replace(
        params=loaded.place(trainable), frozen=frozen if frozen is None else loaded.place(frozen)
    )


def _added(loaded: Loaded, options: ModelOptions, seed: int, params: Any) -> tuple[Any, Any]:
    """`(trainable, frozen)`: the adapters of a folder or new ones, and what they sit on."""
    if options.adapter:
        return peft_files.load(options.adapter, loaded.lm, params, _family(loaded))
    # Before adapters are added: they go on the quantised base, as in QLoRA.
    if options.quantize:
        params = quantized.quantize(params, options.quantize)
    return adapters.add(
        params,
        jax.random.key(seed),
        rank=options.lora_rank,
        alpha=options.lora_alpha,
        targets=[_target(name) for name in options.lora_targets or [adapters.BLOCKS]],
        rank_stabilised=options.rslora,
        dora=options.dora,
    )


def _target(name: str) -> str:
    """The pattern of the leaves that PEFT's name of a matrix stands for; any other text is a
    pattern already.
    """
    if name == "all-linear":
        return adapters.BLOCKS
    # PEFT says `q_proj` where our leaf is `q`, in whatever layer or expert.
    return rf"(.*\.)?{name.removesuffix('_proj')}" if name.endswith("_proj") else name


def _reference(options: ModelOptions, lm: LM, mesh: Mesh, say: Callable) -> Any:
    """Parameters of a reference model from elsewhere; None where there is none.

    Raises: ValueError where it is of another shape.
    """
    if options.reference_model is None:
        return None
    of_policy = precision(options)
    reference_lm, params, _ = huggingface.load(
        model_of(options.reference_model),
        mesh=mesh,
        say=say,
        shapes_only=is_planned(),
        **of_policy,
    )
    # Models of one config compare equal; one program then serves policy and reference.
    if reference_lm != lm:
        raise ValueError(
            f"reference_model {options.reference_model} has another config than "
            f"{name_of(options)}; give one of the same shape"
        )
    return params


def _family(loaded: Loaded) -> str:
    """The model type whose names an adapter's matrices get."""
    if loaded.source:
        return huggingface.model_type(loaded.source)
    return described(config_of(loaded.lm), None, {}).model_type


def _source(options: ModelOptions) -> str | None:
    return options.model if isinstance(options.model, str) else None


def without_repeats(say: Callable) -> Callable:
    """`say`, which does not repeat itself: a mesh that does not divide the vocabulary is reported
    once, not for each array.
    """
    said: set[str] = set()

    def say_new(text: str) -> None:
        # A message is `path [shape]: axis = size …`; what follows the path is the same for many
        # arrays.
        what = text.partition("]: ")[2]
        if what not in said:
            said.add(what)
            say(text)

    return say_new


def _silent(text: str) -> None:
    """Says nothing: loading has reported it already."""


def is_causal(lm: LM) -> bool:
    """Whether a model reads from left to right, as decoders do; a model of your own counts as
    one.
    """
    # A model that is not built from a config raises TypeError.
    try:
        return decoder_of(config_of(lm)).causal
    except TypeError:
        return True


def following(options: ModelOptions, every: int, share: float) -> list[Callable]:
    """The `hooks` of `rlhf.training.loop.fit` that move the reference every so many steps; none for
    0.

    Raises: ValueError where there are adapters, or a share outside (0, 1].
    """
    if every and options.has_adapters:
        raise ValueError(
            f"sync_every {every}, but with adapters the reference is the model beneath, which "
            "stays; leave it out"
        )
    return [averages.following(every, share)] if every else []
