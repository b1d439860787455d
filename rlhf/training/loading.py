"""Models as options name them: checked, read straight onto a mesh, given adapters and heads, and
written again.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf import adapters, hosts, peft_files
from rlhf.fields import documented
from rlhf.lm import LM, Head
from rlhf.models import huggingface as huggingface
from rlhf.models import quantized
from rlhf.models.huggingface_config import config_of, decoder_of, described
from rlhf.models.vocabulary import resized
from rlhf.sharding import make_mesh, shardings
from rlhf.train import TrainState, init_state, reference
from rlhf.training import averages, model_info, programs
from rlhf.training.options import ModelOptions
from rlhf.training.policy import Policy
from rlhf.training.runs import model_of


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
        if programs.is_planned():
            return programs.shaped(tree, where)
        return jax.tree.map(hosts.put, tree, where)

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
        if programs.is_planned():

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
            step=hosts.put(state.step, everywhere),
            key=hosts.put(state.key, everywhere),
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
            with hosts.renewed(folder / "adapter") as new:
                peft_files.save(new, self.lm, lm, family, base=self.source)
            # Merged at the end alone: it takes the memory of a second copy of the model.
            if not over:
                return
            # One program on a mesh: many small ones, each with its collectives, would overlap.
            lm = jax.jit(adapters.merge)(lm) if self.mesh.size > 1 else adapters.merge(lm)
        with hosts.renewed(folder / "model") as new:
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
        **reading(options),
    )
    if options.resize_embeddings:
        lm, trunk = _resized(lm, params["lm"], len(tokenizer))
        params = params | {"lm": trunk}
    return _with_adapters(Loaded(lm, params, None, options.model, mesh, head), options, seed)


def reading(options: ModelOptions) -> dict[str, Any]:
    """Keyword arguments of `rlhf.load` and its kin: which parts, in which dtypes, and whether shapes
    alone.
    """
    dtype = jnp.dtype(options.dtype)
    fields = {} if options.remat == "none" else {"remat": options.remat}
    # What is trained needs float32 masters: updates of 1e-5 are lost in bfloat16's 8 bits.  Under
    # adapters the base is not trained, and may be in few.
    of_params = dtype if options.has_adapters else jnp.float32
    shapes_only = programs.is_planned()
    return {
        "dtype": dtype,
        "param_dtype": of_params,
        "shapes_only": shapes_only,
        "text_only": options.text_only,
        **fields,
    }


def hidden_size(lm: LM, params: Any) -> int:
    """D, the size of what a head reads."""
    # Shapes alone: nothing is computed.
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def hidden(params, x):
        inputs = {"tokens": x, "positions": x, "segment_ids": x} if lm.encode else None
        return lm.hidden(params, x, positions=x, segment_ids=x, inputs=inputs)[0]

    return jax.eval_shape(hidden, params, one).shape[-1]


def copied(params: Any) -> Any:
    """A copy, which a donated state does not free; of shapes the same."""
    return programs.computed(reference, params)


def _resized(lm: LM, params: Any, size: int) -> tuple[LM, Any]:
    """`resized`, also of shapes."""
    larger: list[LM] = []

    # A model is no array: it leaves by the list.
    def grow(params):
        grown_lm, grown = resized(lm, params, size)
        larger.append(grown_lm)
        return grown

    grown = programs.computed(grow, params)
    return larger[0], grown


def _language_model(options: ModelOptions, mesh: Mesh, say: Callable) -> tuple[LM, Any]:
    """The model with all its parameters, and with embeddings for all tokens where the options
    want them.
    """
    if isinstance(options.model, str):
        lm, params, tokenizer = huggingface.load(
            options.model, mesh=mesh, say=say, **reading(options)
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
        params, frozen = programs.computed(add, params)
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
    reference_lm, params, _ = huggingface.load(
        model_of(options.reference_model),
        mesh=mesh,
        say=say,
        **reading(options),
    )
    # Models of one config compare equal; one program then serves policy and reference.
    if reference_lm != lm:
        raise ValueError(
            f"reference_model {options.reference_model} has another config than "
            f"{model_info.name_of(options)}; give one of the same shape"
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
