"""Optimizers and learning-rate schedules by name, as optax transformations.

Every optimizer is the same chain: clip the gradient, turn it into a direction, add weight decay,
multiply by the learning rate.  Names and numbers are those of transformers, where it has the same.

First moments can be held in bfloat16.  There are no 8-bit moments: optax has none, and the only
package that we found on PyPI, flashoptim-jax, has one release (0.1.0, March 2026) and an interface
of its own in place of optax's.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf.fields import documented
from rlhf.models.stacks import matrices, rank
from rlhf.ranges import Coefficient, Every, Share, at_least, between, check_fields, checked

Array = jax.Array
Beta = Annotated[float, between(0, 1, below=True)]

# Option -> the choice that gives it a meaning, and which values of that choice do.
MEANING: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "adam_beta1": ("optimizer", ("adamw", "adam", "lion", "muon")),
    "adam_beta2": ("optimizer", ("adamw", "adam", "lion", "muon")),
    "adam_epsilon": ("optimizer", ("adamw", "adam", "muon")),
    "momentum": ("optimizer", ("sgd", "muon")),
    "moments": ("optimizer", ("adamw", "adam", "lion", "muon", "sgd")),
    "weight_decay": (
        "optimizer",
        ("adamw", "adafactor", "lion", "muon", "sgd", "rmsprop", "adagrad"),
    ),
    "min_learning_rate_ratio": ("schedule", ("cosine_with_min_lr", "warmup_stable_decay")),
    "decay_ratio": ("schedule", ("warmup_stable_decay",)),
}
MUON_MOMENTUM = 0.95  # of the paper, optax and PyTorch
MUON_RMS = 0.2  # root mean square of AdamW's updates in practice  (arXiv:2502.16982, section 2.2)
ADAFACTOR_POWER = 0.8  # of t, in the decay of Adafactor's second moments
ADAFACTOR_EPSILON = 1e-30  # added to squared gradients, so that none is 0
RMSPROP_DECAY = 0.99  # PyTorch's and transformers'; optax's default is 0.9


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer, its learning rate over the steps, and its hyperparameters.

    Args:
      learning_rate: peak learning rate.
      optimizer: how gradients become updates; with muon, AdamW trains all but matrices of layers.
      adam_beta1: decay of AdamW's first moment, and Lion's β1.
      adam_beta2: decay of AdamW's second moment, and Lion's β2, for which its paper has 0.99.
      adam_epsilon: added to the root of AdamW's second moment.
      momentum: decay of the summed gradients of sgd and muon; null: 0 for sgd, 0.95 for muon.
      moments: dtype of first moments, float32 or bfloat16; null: that of the parameters.
      weight_decay: times learning rate and weight, decoupled as in AdamW; not of norms and biases.
      max_grad_norm: global-norm clipping threshold of the gradient.
      schedule: learning rate after the warm-up; constant has a warm-up too.
      warmup_steps: optimizer steps in which the learning rate rises from 0 to its peak.
      warmup_ratio: the same, as a share of all optimizer steps.
      min_learning_rate_ratio: last learning rate, as a share of the peak.
      decay_ratio: last share of the optimizer steps, in which warmup_stable_decay decays.

    Raises:
      ValueError: where an option is out of its range, or means nothing beside another.

    >>> OptimizerOptions(optimizer="adafactor", adam_beta1=0.95)
    Traceback (most recent call last):
    ValueError: adam_beta1 0.95 means nothing with optimizer adafactor; leave it out, or give \
--optimizer adamw, adam, lion or muon
    """

    learning_rate: Annotated[float, between(0, 100, above=True)] = 1e-5
    optimizer: Literal[
        "adamw",
        "adam",
        "adafactor",
        "lion",
        "muon",
        "sgd",
        "rmsprop",
        "adagrad",
    ] = "adamw"
    adam_beta1: Beta = 0.9
    adam_beta2: Beta = 0.999
    adam_epsilon: Annotated[float, between(0, 1, above=True)] = 1e-8
    momentum: Beta | None = None
    moments: Literal["float32", "bfloat16"] | None = None
    weight_decay: Coefficient = 0.0
    max_grad_norm: Annotated[float, between(0, 1e9, above=True)] = 1.0
    schedule: Literal[
        "linear",
        "cosine",
        "constant",
        "cosine_with_min_lr",
        "warmup_stable_decay",
        "inverse_sqrt",
    ] = "linear"
    warmup_steps: Every = 0
    warmup_ratio: Share = 0.0
    min_learning_rate_ratio: Share = 0.0
    decay_ratio: Annotated[float, between(0, 1, above=True)] = 0.1

    def __post_init__(self):
        check_fields(self)
        if self.warmup_ratio and self.warmup_steps:
            both = f"warmup_ratio {self.warmup_ratio} and warmup_steps {self.warmup_steps}"
            raise ValueError(f"{both} are one warm-up; give one of them")
        for name, (choice, values) in MEANING.items():
            value = getattr(self, name)
            chosen = getattr(self, choice)
            # Only what differs from its default was given; an option without effect is a mistake.
            if value != getattr(type(self), name) and chosen not in values:
                cure = f"leave it out, or give --{choice} {_either(values)}"
                raise ValueError(f"{name} {value} means nothing with {choice} {chosen}; {cure}")
        if self.moments and self.optimizer == "sgd" and not self.momentum:
            raise ValueError(
                f"moments {self.moments} means nothing with optimizer sgd without momentum, which "
                "has no moments; leave it out, or give --momentum 0.9"
            )
        if self.schedule == "cosine_with_min_lr" and not self.min_learning_rate_ratio:
            raise ValueError(
                "schedule cosine_with_min_lr needs a min_learning_rate_ratio above 0; "
                "give --min_learning_rate_ratio 0.1, or --schedule cosine"
            )


def _either(values: tuple[str, ...]) -> str:
    """`a, b or c`."""
    return " or ".join(filter(None, [", ".join(values[:-1]), values[-1]]))


@checked
def make_schedule(options: OptimizerOptions, steps: Annotated[int, at_least(1)]) -> optax.Schedule:
    """The learning rate of every optimizer step: a linear warm-up, then the schedule.

    The values are those of transformers' schedule of the same name.  `constant` is its
    `constant_with_warmup`, which without a warm-up is its `constant`.  `cosine_with_min_lr` has
    `min_learning_rate_ratio` for its `min_lr_rate`; so has `warmup_stable_decay` for its
    `min_lr_ratio`, from which it also warms up, and `decay_ratio` of the steps, rounded, for its
    `num_decay_steps`.

    Args:
      options: the schedule and its numbers.
      steps: optimizer steps of the whole run.

    Returns:
      A function from the number of a step, from 0, to its learning rate.

    Raises:
      ValueError: where warm-up and decay of `warmup_stable_decay` are longer than the run.

    >>> options = OptimizerOptions(learning_rate=1.0, warmup_steps=2)
    >>> [float(make_schedule(options, 6)(step)) for step in range(7)]
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    peak = options.learning_rate
    floor = options.min_learning_rate_ratio
    # Rounded up, as transformers does.
    warmup = options.warmup_steps or math.ceil(options.warmup_ratio * steps)
    # At least 1: optax refuses a cosine over 0 steps, also where it is never reached.
    rest = max(steps - warmup, 1)
    if options.schedule == "warmup_stable_decay":
        decay = max(round(options.decay_ratio * steps), 1)
        if warmup + decay > steps:
            raise ValueError(
                f"a warm-up of {warmup} steps and a decay of {decay} (decay_ratio "
                f"{options.decay_ratio}) are more than all {steps} steps; give a smaller "
                "--decay_ratio or a shorter warm-up"
            )
        rise = optax.linear_schedule(floor * peak, peak, warmup)
        stable = optax.constant_schedule(peak)
        fall = optax.cosine_decay_schedule(peak, decay, alpha=floor)
        return optax.join_schedules([rise, stable, fall], [warmup, steps - decay])
    falls = {
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "cosine_with_min_lr": optax.cosine_decay_schedule(peak, rest, alpha=floor),
        "constant": optax.constant_schedule(peak),
        "inverse_sqrt": _inverse_sqrt(peak, warmup),
    }
    rise = optax.linear_schedule(0.0, peak, warmup)
    # The second schedule counts from the end of the warm-up on.
    return optax.join_schedules([rise, falls[options.schedule]], [warmup])


def _inverse_sqrt(peak: float, warmup: int) -> optax.Schedule:
    """`peak √(s / (s + step))`, s being the warm-up's steps, or 10,000 as in transformers."""
    scale = warmup or 10_000

    def schedule(step):
        # `join_schedules` asks for steps before the first too, and throws the result away.
        return peak * jnp.sqrt(scale / (scale + jnp.maximum(step, 0)))

    return schedule


@checked
def make_optimizer(
    options: OptimizerOptions,
    steps: Annotated[int, at_least(1)],
) -> optax.GradientTransformation:
    """The optimizer, with clipping, weight decay and schedule.

    What is stacked over layers or experts is trained as if each matrix were a leaf of its own.
    Weight decay is of `rlhf.models.matrices` alone, and decoupled whatever the optimizer:
    `-learning_rate · weight_decay · weight`.  PyTorch's sgd, rmsprop and adagrad add it to the
    gradient instead, which is the same only for sgd without momentum.

    - adamw, adam: optax's, as PyTorch's; adam is adamw without weight decay.
    - adafactor: `scale_by_adafactor`.
    - lion: optax's  (arXiv:2302.06675).  It wants a learning rate 3 to 10 times below AdamW's.
    - muon: optax's, for the matrices of the layers, their adapters included; adamw for embeddings,
      output matrices, heads and vectors.  The updates of a matrix have AdamW's size, so that one
      learning rate and weight decay, AdamW's, serve both  (arXiv:2502.16982, eq. 4).
    - sgd, rmsprop, adagrad: with PyTorch's defaults, which are transformers' too and not optax's.

    Args:
      options: which optimizer, and its hyperparameters.
      steps: optimizer steps of the whole run, for the schedule.

    Returns:
      An optax transformation, whose `update` needs the parameters too.

    Raises:
      ValueError: where warm-up and decay of `warmup_stable_decay` are longer than the run; when the
        state is made, where muon finds no matrix of a layer.

    >>> params = {"layers": {"q": jnp.ones((2, 4, 4)), "norm": jnp.ones((2, 4))}}
    >>> optimizer = make_optimizer(OptimizerOptions(weight_decay=0.5, schedule="constant"), 10)
    >>> gradient = jax.tree.map(jnp.zeros_like, params)
    >>> updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    >>> updates["layers"]["q"][0, 0, 0].item(), updates["layers"]["norm"][0, 0].item()
    (-5e-06, 0.0)
    """
    # Nested like `chain(clip, optax.adamw(…))`, so that checkpoints of such runs can be resumed.
    return optax.chain(
        optax.clip_by_global_norm(options.max_grad_norm),
        optax.chain(
            _direction(options),
            optax.add_decayed_weights(options.weight_decay, mask=matrices),
            optax.scale_by_learning_rate(make_schedule(options, steps)),
        ),
    )


def _direction(options: OptimizerOptions) -> optax.GradientTransformation:
    """What the learning rate multiplies, without weight decay."""
    dtype = None if options.moments is None else jnp.dtype(options.moments)
    beta1 = options.adam_beta1
    beta2 = options.adam_beta2
    adam = optax.scale_by_adam(beta1, beta2, options.adam_epsilon, mu_dtype=dtype)
    match options.optimizer:
        case "adamw" | "adam":
            return adam
        case "adafactor":
            return scale_by_adafactor()
        case "lion":
            return optax.scale_by_lion(beta1, beta2, mu_dtype=dtype)
        case "muon":
            muon = _muon(options.momentum, dtype)
            return optax.partition({"muon": muon, "adam": adam}, _muon_or_adam)
        case "sgd":
            # `trace` with a decay of 0 would hold a copy of the gradient for nothing.
            if not options.momentum:
                return optax.identity()
            return optax.trace(options.momentum, accumulator_dtype=dtype)
        case "rmsprop":
            # The epsilon is added to the root, as PyTorch does; optax's default is under it.
            return optax.scale_by_rms(RMSPROP_DECAY, eps=1e-8, eps_in_sqrt=False)
        case "adagrad":
            # PyTorch adds 1e-10 to the root, and optax its epsilon under the root.  optax's own
            # defaults, 0.1 to begin with, would drown the small gradients of a language model.
            return optax.scale_by_rss(initial_accumulator_value=0.0, eps=1e-20)


def _muon(momentum: float | None, dtype: Any) -> optax.GradientTransformation:
    """Orthogonalised momentum of matrices `[.., in, out]`, each by itself, at AdamW's size."""
    last_two = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

    # optax takes an axis that is neither for one of a batch: layers and experts are.  Left to
    # itself, it would take only leaves of rank 2, and so stacked vectors for matrices.
    def dimensions(params):
        return jax.tree.map(lambda x: last_two, params)

    def scale(updates, params):
        # An orthogonal matrix `[a, b]` has a root mean square of 1/√max(a, b): times √max it is 1,
        # times 0.2 AdamW's.
        return jax.tree.map(lambda x: MUON_RMS * max(x.shape[-2:]) ** 0.5 * x, updates)

    # `optax.contrib.muon` is not taken whole: its AdamW decays vectors too and is Nesterov's, and
    # it has one epsilon for both.
    return optax.chain(
        optax.contrib.scale_by_muon(
            beta=MUON_MOMENTUM if momentum is None else momentum,
            mu_dtype=dtype,
            weight_dimension_numbers=dimensions,
        ),
        optax.stateless(scale),
    )


def _muon_or_adam(params: Any) -> Any:
    """`muon` for matrices of layers, `adam` for all else."""

    def one(path, x):
        names = _names(path)
        return "muon" if "layers" in names and rank(names, x) == 2 else "adam"

    # Embeddings, outputs and heads are matrices too, but Muon's paper trains them by AdamW.
    labels = jax.tree_util.tree_map_with_path(one, params)
    if "muon" not in jax.tree.leaves(labels):
        raise ValueError(
            "optimizer muon trains the matrices of layers, which stand under a key `layers`, but "
            "these parameters have none; give --optimizer adamw"
        )
    return labels


@documented
class AdafactorState(NamedTuple):
    """Second moments of Adafactor.

    Attributes:
      step: [] int32, steps taken.
      rows: like params: of matrices `[.., in, out]` the means over outputs `[.., in]`; else None.
      columns: like params: of matrices the means over inputs `[.., out]`; else None.
      full: like params: of vectors and scalars all second moments; else None.
    """

    step: Array
    rows: Any
    columns: Any
    full: Any


def scale_by_adafactor() -> optax.GradientTransformation:
    """`u = g / √v`, `u / max(1, RMS(u))`, with `v = r cᵀ / mean(r)`  (arXiv:1804.04235, alg. 4, 5).

    r and c are moving means of `g² + 1e-30` over each matrix's outputs and inputs; vectors keep v
    whole.  The decay is `1 - t^-0.8`.  As transformers' Adafactor with `scale_parameter=False` and
    `relative_step=False`, which is its Trainer's `optim="adafactor"`: every matrix is factored,
    whatever its size, and an update is as large as the learning rate says.

    optax's own does something else with stacked leaves `[layers, in, out]`: it factors the two
    largest axes, of which one may be layers or experts, and clips the stack as a whole.  It also
    holds arrays `[1]` for moments that a leaf has not, which `rlhf.sharding` would split like the
    leaf.

    Returns:
      An optax transformation; moments are in at least float32.

    >>> params = {"layers": {"q": jnp.ones((2, 3, 4)), "norm": jnp.ones((2, 3))}}
    >>> state = scale_by_adafactor().init(params)
    >>> jax.tree.map(jnp.shape, (state.rows["layers"], state.columns["layers"]))
    ({'norm': None, 'q': (2, 3)}, {'norm': None, 'q': (2, 4)})
    """

    def init(params):
        # Ranks in the checkpoint's file: a stack `[layers, in, out]` is matrices, `[layers, d]`
        # vectors.
        ranks = _ranks(params)

        def zeros(shape, x):
            return jnp.zeros(shape, jnp.promote_types(x.dtype, jnp.float32))

        def rows(x, rank):
            return zeros(x.shape[:-1], x) if rank > 1 else None

        def columns(x, rank):
            return zeros((*x.shape[:-2], x.shape[-1]), x) if rank > 1 else None

        def full(x, rank):
            return None if rank > 1 else zeros(x.shape, x)

        unfactored = (jax.tree.map(f, params, ranks) for f in (rows, columns, full))
        return AdafactorState(jnp.zeros((), jnp.int32), *unfactored)

    def update(grads, state, params=None):
        step = optax.safe_increment(state.step)
        # 0 at step 1, so that the zeros of the start count nothing: no bias correction is needed.
        decay = 1 - step.astype(jnp.float32) ** -ADAFACTOR_POWER

        # Means of g² over an axis of a matrix, or g² itself; None stays None.
        def moved(grads, moments, reduce):
            def one(g, old):
                if old is None:
                    return None
                square = jnp.square(g.astype(old.dtype)) + ADAFACTOR_EPSILON
                return decay * old + (1 - decay) * reduce(square)

            return jax.tree.map(one, grads, moments)

        state = AdafactorState(
            step=step,
            rows=moved(grads, state.rows, lambda square: square.mean(-1)),
            columns=moved(grads, state.columns, lambda square: square.mean(-2)),
            full=moved(grads, state.full, lambda square: square),
        )

        def scaled(g, rank, rows, columns, full):
            if full is not None:
                u = g * jax.lax.rsqrt(full)
            else:
                # Two roots rather than one of the product: a product of tiny moments would be 0.
                by_row = jax.lax.rsqrt(rows / rows.mean(-1, keepdims=True))
                u = g * by_row[..., None] * jax.lax.rsqrt(columns)[..., None, :]
            # The last axes of one matrix or vector, without those of layers and experts: each is
            # clipped by itself, as if it were a leaf.
            of_matrix = tuple(range(-rank, 0))
            rms = jnp.sqrt(jnp.square(u).mean(of_matrix, keepdims=True))
            return (u / jnp.maximum(rms, 1.0)).astype(g.dtype)

        moments = (state.rows, state.columns, state.full)
        return jax.tree.map(scaled, grads, _ranks(grads), *moments), state

    return optax.GradientTransformation(init, update)


def _ranks(params: Any) -> Any:
    """The axes that each leaf has in the checkpoint's file."""
    return jax.tree_util.tree_map_with_path(lambda path, x: max(rank(_names(path), x), 0), params)


def _names(path: Any) -> list[str]:
    return [jax.tree_util.keystr((key,), simple=True) for key in path]
