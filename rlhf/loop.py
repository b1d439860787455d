"""The host's loop, which all recipes share: steps, figures, evaluations, checkpoints; what differs comes as functions."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

import jax
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rlhf.averages import averaging, bema, ema
from rlhf.checkpoint import Checkpoints
from rlhf.interrupts import Stopped, told_to_stop
from rlhf.models.stacks import matrices
from rlhf.ranges import Coefficient, Count, Every, Seed, Share, Steps, between, check_fields
from rlhf.runs import RunFolder
from rlhf.track import check, trackers
from rlhf.train import TrainState, init_state

P = ParamSpec("P")
R = TypeVar("R")

PEAKS = {  # bfloat16 operations a second, by the start of a device's name
    "NVIDIA H200": 989e12, "NVIDIA H100": 989e12, "NVIDIA A100": 312e12,
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12,
}  # fmt: skip
HOPELESS = 20  # steps after which a run ends if every one was skipped


@dataclasses.dataclass(frozen=True)
class Training:
    """How long and how fast to train, and what to keep.

    Args:
      steps: steps of the loop; null: as many as `epochs` are.
      epochs: passes over the data, where steps is null.
      batch_size: rows of a step: examples, pairs, or prompts.
      micro_batches: parts that a step's rows are taken in, one after the other; the result is the same.
      learning_rate: the highest.
      schedule: how the learning rate falls after the warm-up.
      warmup_steps: optimizer steps in which it rises from 0.
      warmup_ratio: the same, as a share of all of them.
      weight_decay: of what is a matrix in the checkpoint's file, as AdamW has it: not of norms and biases.
      max_grad_norm: longer gradients are cut to this length.
      average: of the parameters over the steps, which is judged and exported in place of the last ones.
      average_decay: of ema, which spans about 1 / (1 - average_decay) steps.
      seed: of everything random.
      log_every: steps between lines of metrics.jsonl.
      eval_every: steps between evaluations; there is one at the end too.  0: only there.
      patience: evaluations without a better result after which training ends; 0: it never does.
      save_every: steps between checkpoints; 0: only at the end.
      keep: checkpoints that stay.
      track: where the figures go beside metrics.jsonl: tensorboard, wandb, trackio.
    """

    steps: Steps | None = None
    epochs: Annotated[float, between(0, 100_000, above=True)] = 1.0
    batch_size: Count = 8
    micro_batches: Count = 1
    learning_rate: Annotated[float, between(0, 100, above=True)] = 1e-5
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: Every = 0
    warmup_ratio: Share = 0.0
    weight_decay: Coefficient = 0.0
    max_grad_norm: Annotated[float, between(0, 1e9, above=True)] = 1.0
    average: Literal["none", "ema", "bema"] = "none"
    average_decay: Annotated[float, between(0, 1, below=True)] = 0.99
    seed: Seed = 0
    log_every: Steps = 1
    eval_every: Every = 0
    patience: Every = 0
    save_every: Every = 0
    keep: Count = 2
    track: list[Literal["tensorboard", "wandb", "trackio"]] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        check_fields(self)
        check(self.track)
        if self.warmup_ratio and self.warmup_steps:
            both = f"warmup_ratio {self.warmup_ratio} and warmup_steps {self.warmup_steps}"
            raise ValueError(f"{both} are one warm-up; give one of them")
        if self.patience and not self.eval_every:
            raise ValueError(
                f"patience {self.patience} counts evaluations, but there are none before the end; give --eval_every"
            )
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be taken in {self.micro_batches} equal parts; change --micro_batches"
            )

    def total_steps(self, rows: int, *, judged: bool) -> int:
        """Steps of the loop over so many rows an epoch; `judged` says whether there are rows to judge by.

        Raises: ValueError where an epoch has fewer rows than a batch, and for a patience with nothing to judge by.
        """
        if self.patience and not judged:
            raise ValueError(f"patience {self.patience} but no rows to judge by; give --eval_dataset")
        if rows < self.batch_size:
            raise ValueError(f"{rows} rows but batch_size {self.batch_size}; give more data or a smaller --batch_size")
        return self.steps or max(1, round(self.epochs * (rows // self.batch_size)))


def optimizer_of(training: Training, steps: int) -> optax.GradientTransformation:
    """AdamW behind a clipped gradient, its rate by the schedule over `steps` optimizer steps."""
    warmup = training.warmup_steps or math.ceil(training.warmup_ratio * steps)
    peak, rest = training.learning_rate, max(steps - warmup, 1)
    falls = {
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "constant": optax.constant_schedule(peak),
    }[training.schedule]
    rate = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), falls], [warmup])
    return optax.chain(
        optax.clip_by_global_norm(training.max_grad_norm),
        optax.adamw(rate, weight_decay=training.weight_decay, mask=matrices),
    )


def in_its_folder(train: Callable[P, R]) -> Callable[P, R]:
    """The same, with `RunFolder.at_work` of its first argument around it."""

    @wraps(train)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        run: Any = kwargs.get("run") or args[0]
        with run.at_work():
            return train(*args, **kwargs)

    return call


@in_its_folder
def fit(
    run: RunFolder,
    training: Training,
    make_step: Callable,
    params: Any,
    inputs: Callable[[int, int], Any],
    total: int,
    *,
    context: Mapping[str, Any] | None = None,
    fixed: Mapping[str, Any] | None = None,
    updates: int = 1,
    hooks: Sequence[Callable[[int, TrainState], TrainState]] = (),
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    export: Callable[[TrainState, bool], None] = lambda state, over: None,
    shown: tuple[str, ...] = ("loss",),
    console: Console | None = None,
) -> tuple[TrainState, dict[str, float]]:
    """A whole run, or the rest of one: a resumed run takes the steps that it would have taken, bit for bit.

    Args:
      run: where everything goes.
      training: the options.
      make_step: `(optimizer) -> step(state, batch) -> (state, metrics)`.
      params: what is trained.
      inputs: `(number, size) -> batch` of step `number`, from 0: a pure function of it.
      total: steps, of `training.total_steps`.
      context: what the step needs and does not train, but may move.
      fixed: further entries of the context that no step changes, such as what adapters sit on; they are not saved, since a
        resumed run begins with the same.
      updates: optimizer steps that one step of the loop takes.
      hooks: `(number, state) -> state` after every step, in their order, such as those of `rlhf.averages`.
      evaluate: `(state) -> figures`, every `training.eval_every` steps and at the end.
      export: `(state, over) -> None`, with every checkpoint: writes the model as it is; `over` at the end of the run.
      shown: figures beside the progress bar, and in `curves.png`; patience judges by the first that evaluations have.

    Returns: the last state, with the averaged parameters where there are, and the last value of every figure.

    Raises: ValueError where no step was taken, since every gradient was infinite or NaN: after the first steps already, and
      nothing is exported.  KeyboardInterrupt where the process is told to stop before the last step: after its step, which is
      saved; where it is told twice, at once, and nothing is.  Stopped where a step or an evaluation raises it: what was trained
      until then is saved.
    """
    optimizer, context, judged = optimizer_of(training, total * updates), dict(context or {}), lambda state: state
    if training.average != "none":
        average = bema() if training.average == "bema" else ema(decay=training.average_decay)
        context["average"], hooks = average.init(params), [*hooks, averaging(average)]
        judged = lambda state: state._replace(params=average.value(state.context["average"], state.params))
    state = init_state(params, optimizer, jax.random.key(training.seed), {**context, **(fixed or {})})
    saved = lambda state: state._replace(context={name: state.context[name] for name in context})
    checkpoints = Checkpoints(run.path / "checkpoints", keep=training.keep)
    if run.resumed and checkpoints.latest() is not None:
        kept = checkpoints.restore(saved(state))
        state = kept._replace(context={**state.context, **kept.context})
    done = int(state.step) // updates
    run.forget_after(done)
    over = done >= total or _is_stuck(run, shown, training.patience)  # a run that goes on may be over already
    with trackers(training.track, run) as track, told_to_stop() as told:

        def log(phase: str, number: int, figures: dict[str, float]) -> None:
            run.log(phase, number, figures)
            track(number, figures)

        taken: Any = 0  # steps here with an update that was not skipped; a device's number, which nobody waits for
        newest = state  # that is whole

        def save(state: TrainState) -> None:
            checkpoints.save(saved(state))
            run.card()
            export(judged(state), over)

        def after(number: int, state: TrainState) -> bool:
            nonlocal over, newest
            newest, over = state, number == total
            if evaluate is not None and (over or (training.eval_every and number % training.eval_every == 0)):
                log("eval", number, {f"eval_{name}": float(value) for name, value in evaluate(judged(state)).items()})
                over = over or _is_stuck(run, shown, training.patience)
            if over or number - done == HOPELESS:
                _check_taken(run, number - done - int(taken), number - done, done)
            saves = over or told() or (training.save_every > 0 and number % training.save_every == 0)
            if saves:
                save(state)
            return over or (saves and told())  # told while saving: this step is saved already

        batches = ((number + 1, inputs(number, training.batch_size)) for number in range(done, total))
        made = make_step(optimizer)

        def step(state: TrainState, number: int, batch: Any) -> tuple[TrainState, dict]:
            nonlocal taken
            state, metrics = made(state, batch)
            taken = taken + (metrics.get("skipped", 0.0) < 1)
            for hook in hooks:
                state = hook(number, state)
            return state, metrics

        if over:
            run.card()
            export(judged(state), over)  # it may have been killed after its last checkpoint, or its model deleted
        else:
            try:
                state = run_steps(
                    "train", step, state, batches, total, start=done, log=log, after=after,
                    console=console or Console(stderr=True), shown=shown, every=training.log_every, size=_size(params),
                    devices=_devices(params),
                )  # fmt: skip
            except Stopped as stop:
                number, over = int(newest.step) // updates, False
                if number == 0:
                    raise
                if checkpoints.latest() != int(newest.step):
                    save(newest)
                raise Stopped(f"{run.path}: stopped after step {number} of {total}: {stop}; go on with --resume") from None
    figures = run.figures()
    if figures:
        run.plot(shown)
    if not over:
        raise KeyboardInterrupt(f"{run.path}: stopped after step {int(state.step) // updates} of {total}; go on with --resume")
    return judged(state), {name: value for name, (value, _) in figures.items()}


def _check_taken(run: RunFolder, skipped: int, steps: int, before: int) -> None:
    """Raises where no step was taken, in this process or in the steps before it; says how many were skipped."""
    known = [row.get("skipped", 0.0) for row in run.read("metrics.jsonl") if row["phase"] == "train"] if before else []
    if skipped == steps and all(share == 1 for share in known):
        raise ValueError(
            f"{run.path}: all {before + skipped} steps were skipped, since their gradients were infinite or NaN: the model is "
            "as it was; look at the losses in metrics.jsonl, and try --dtype float32, a lower --learning_rate, or other rows"
        )
    if skipped:
        run.say(f"{skipped} of {steps} steps were skipped, since their gradients were infinite or NaN")


def _is_stuck(run: RunFolder, shown: Sequence[str], patience: int) -> bool:
    """Whether so many evaluations have brought nothing better, by the first figure shown that they have; for 0 never.

    Of a loss the lower is better, of all else the higher.
    """
    rows = [row for row in run.read("metrics.jsonl") if row["phase"] == "eval"] if patience else []
    if not rows:
        return False
    known = [name for name in shown if f"eval_{name}" in rows[0]]
    if not known:
        raise ValueError(f"patience judges by one of {', '.join(shown)}, but evaluations have {', '.join(rows[0])}")
    name = f"eval_{known[0]}"
    found = [row[name] for row in rows]
    best = found.index((min if name.endswith("loss") else max)(found))
    return len(found) - 1 - best >= patience


def run_steps(
    phase: str,
    step: Callable,
    state: Any,
    inputs: Iterable[tuple],
    total: int,
    *,
    log: Callable[[str, int, dict[str, float]], None],
    console: Console,
    shown: tuple[str, ...] = ("loss",),
    every: int = 1,
    start: int = 0,
    after: Callable[[int, Any], bool | None] | None = None,
    size: int = 0,
    devices: int = 1,
) -> Any:
    """Takes steps `start + 1` to `total`, `state, metrics = step(state, *next(inputs))`, under a progress bar.

    Args:
      log: called with the phase, the step's number from 1, and its metrics as floats, every `every` steps and at the end.
      shown: metrics that stand beside the bar.
      after: called with every step's number and the state; where it returns True, that step was the last.
      size: trained parameters; with a metric `tokens`, the share of the devices' peak is logged where it is known.
      devices: how many the run uses.

    Returns: the last state.
    """
    columns = (
        TextColumn("{task.description:<24}"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(phase, total=total, completed=start, figures="")
        begin, tokens = time.perf_counter(), []
        for number, arguments in zip(range(start + 1, total + 1), inputs, strict=False):
            state, metrics = step(state, *arguments)
            tokens.append(metrics.get("tokens", np.nan))
            if number % every == 0 or number == total:
                figures = {name: float(value) for name, value in jax.device_get(metrics).items()}
                seconds, begin = time.perf_counter() - begin, time.perf_counter()
                figures |= _speed(float(np.sum(jax.device_get(tokens))) / seconds, size, devices)
                tokens.clear()
                log(phase, number, figures)
                progress.update(task, figures="  ".join(f"{name} {figures[name]:.3f}" for name in shown if name in figures))
            progress.advance(task)
            if after is not None:
                if after(number, state):
                    break
                begin = time.perf_counter() if not tokens else begin
    return state


def _speed(tokens: float, size: int, devices: int) -> dict[str, float]:
    """Tokens a second, and the share of these devices' peak that 6 operations a parameter and token are, where it is known."""
    if np.isnan(tokens):
        return {}
    kind = jax.devices()[0].device_kind
    peak = next((peak for name, peak in PEAKS.items() if kind.startswith(name)), None)
    mfu = {"mfu": 6 * size * tokens / (peak * devices)} if peak else {}
    return {"tokens_per_second": tokens, **mfu}


def _devices(tree: Any) -> int:
    """How many devices hold a part of these arrays."""
    held = (x.sharding.device_set for x in jax.tree.leaves(tree) if isinstance(x, jax.Array))
    return len(set().union(*held)) or 1


def _size(params: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(params))
