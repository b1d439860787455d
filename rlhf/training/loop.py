"""The host's loop, which all recipes share: steps, metrics, evaluations, checkpoints; what differs
comes as functions.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rlhf import hosts
from rlhf.checkpoint import Checkpoints
from rlhf.train import TrainState
from rlhf.training import compilations, programs
from rlhf.training.averages import AVERAGES
from rlhf.training.chips import PEAKS
from rlhf.training.interrupts import Stopped, stop_requests
from rlhf.training.options import TrainingOptions
from rlhf.training.runs import RunFolder
from rlhf.training.track import trackers
from rlhf.typing import Callback, Evaluate, Export, Hook, StepFn

P = ParamSpec("P")
R = TypeVar("R")

# Where the batch is that a run could not learn from.
BAD_BATCH = "bad_batch.npz"


def in_its_folder(train: Callable[P, R]) -> Callable[P, R]:
    """The same, with `RunFolder.at_work` of its first argument around it."""

    @wraps(train)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        # The folder is made last, when all options are checked and the model is loaded.
        run: Any = kwargs.get("run") or args[0]
        if programs.is_planned():  # the step's programs alone are wanted: nothing is made
            _, _, state, step, batches = cast(Any, args)
            raise programs.Planned(step.trace(state, batches(0)), state)
        with run.at_work():
            return train(*args, **kwargs)

    return call


@in_its_folder
def fit(
    run: RunFolder,
    training: TrainingOptions,
    state: TrainState,
    step: StepFn,
    batches: Callable[[int], Any],
    *,
    total: int,
    updates: int = 1,
    fixed: Sequence[str] = ("frozen", "reference"),
    hooks: Sequence[Hook] = (),
    callbacks: Sequence[Callback] = (),
    evaluate: Evaluate | None = None,
    export: Export = lambda state, over: None,
    shown: tuple[str, ...] = ("loss",),
    mesh: Mesh | None = None,
    console: Console | None = None,
) -> TrainState:
    """A whole run, or the rest of one: a resumed run takes the steps that it would have taken, bit
    for bit.

    Args:
      run: where everything goes.
      training: the options.
      state: at step 0; consumed.
      step: `(state, batch) -> (state, metrics)`, complete: it samples, scores and updates where a
        recipe does.
      batches: `(number) -> batch` of step `number`, from 0: a pure function of it.
      total: steps of the loop, of `training.total_steps`.
      updates: optimizer steps that one step of the loop takes.
      fixed: entries of the state's context that no step changes, such as what adapters sit on; they
        are not saved, since a resumed run begins with the same.
      hooks: `(number, state) -> state` after every step, in their order, such as those of
        `rlhf.training.averages`.
      callbacks: `(number, metrics)`, called with every line that is logged; one that returns True
        ends the run, after the step that is under way by then.
      evaluate: `(state) -> metrics`, every `training.eval_every` steps and at the end.
      export: `(state, over) -> None`, every `training.export_every` steps, at a stop and at the end,
        where `over` is True: writes the model as it is.
      shown: metrics beside the progress bar, and in `curves.png`; patience compares the first that
        evaluations have.
      mesh: where the state is; steps and evaluations see it.  None: no mesh.
      console: of the progress bar.

    Returns: the last state, with the averaged parameters where there are.

    Raises: ValueError where no step was taken, since every gradient was infinite or NaN: after the
      first `training.max_skipped` steps already, and nothing is exported; ValueError where
      checkpoints are damaged, or are of another model.  KeyboardInterrupt where the process is told
      to stop before the last step: after its step, which is saved; where it is told twice, at once,
      and nothing is.  Stopped where a step or an evaluation raises it, and after
      `training.max_skipped` skipped steps in a row: what was trained until then is saved.  OSError
      where the last save failed; one that fails on the way is said, and the next tries again.
    """
    average = AVERAGES[training.average](training)
    averaged = average.init(state.params) if average else None
    # XLA's collectives among CPU devices may wait for each other for ever where two programs are
    # under way at once: there the next step begins when this one has ended.
    waits = mesh is not None and mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
    checkpoints = Checkpoints(run.path / "checkpoints", keep=training.keep, say=run.say)

    def split_context(state: TrainState) -> TrainState:
        """The state as it is saved: without what no step changes, and with the averaged
        parameters.
        """
        moving = {name: value for name, value in dict(state.context).items() if name not in fixed}
        if average:
            moving["average"] = averaged
        return state._replace(context=moving)

    def with_average(state: TrainState) -> TrainState:
        return state._replace(params=average.value(averaged, state.params)) if average else state

    best = Checkpoints(run.path / "best", keep=1, say=run.say) if training.keep_best else None
    if run.resumed and checkpoints.latest() is not None:
        # The fresh state says the form; what is fixed was left out, and comes from the fresh one.
        saved = checkpoints.restore(split_context(state))
        moving = dict(saved.context)
        averaged = moving.pop("average", None)
        state = saved._replace(context={**dict(state.context), **moving})
    elif run.resumed and run.read("metrics.jsonl"):
        run.say(f"{run.path}: no checkpoint was whole yet; the run begins again at step 0")
    # The state counts optimizer steps; a step of the loop takes `updates` of them.
    done = int(state.step) // updates
    # Lines beyond the checkpoint are of steps that are taken again.
    run.forget_after(done)
    # A resumed run may be over already: it was killed between its last checkpoint and its end.
    over = done >= total or _is_stuck(run, shown, training.patience)
    with (
        trackers(training.track, run) as track,
        stop_requests() as stop_requested,
        _set_mesh(mesh),
        # Last, so that they are waited for first: until then a second request to stop is heeded.
        checkpoints,
        best or nullcontext(),
    ):
        wants_to_stop = False

        def log(phase: str, number: int, metrics: dict[str, float]) -> None:
            nonlocal wants_to_stop
            run.log(phase, number, metrics)
            track(number, metrics)
            for callback in callbacks:
                wants_to_stop = callback(number, metrics) is True or wants_to_stop

        # Steps of this process whose update was not skipped: a number on the device, so that the
        # host need not wait for it at every step.
        taken: Any = 0
        # The newest of them that were skipped without one between, and when to look at that number:
        # no earlier than it can be too many, since a look waits for the device.
        skipped_last: Any = 0
        look = done + training.max_skipped
        # The last complete state: what is saved where a step raises `Stopped`.
        newest = state

        def settle() -> None:
            """Waits for the save that is under way."""
            # The best state is whole before a checkpoint that counts its evaluation, or a resumed
            # run would hold an older one for the best.
            if best is not None:
                best.wait()
            try:
                checkpoints.wait()
            except OSError as error:
                # Going on loses nothing: the state is in memory, and is saved again.
                run.say(f"{error}; the run goes on, and saves again now")

        def save(state: TrainState) -> None:
            settle()
            checkpoints.save(split_context(state))

        def write_model(state: TrainState) -> None:
            run.card()
            export(with_average(state), over)

        def check_skipped(number: int) -> None:
            """Raises where too many steps in a row were skipped: a model of NaN never recovers."""
            nonlocal look
            if number != look:
                return
            skipped = int(skipped_last)
            look += training.max_skipped - skipped
            if skipped < training.max_skipped:
                return
            batch = batches(number - 1)
            # A recipe that samples learns from more than its prompts.
            if isinstance(step, programs.Step):
                batch = step.update_inputs(batch)
            run.arrays(BAD_BATCH, batch)
            where = f"the batch of step {number} is in {run.path / BAD_BATCH}"
            _check_taken(run, number - done - int(taken), number - done, done, where)
            raise Stopped(
                f"the last {skipped} were skipped, since their gradients were infinite or NaN; "
                f"{where}"
            )

        def after(number: int, state: TrainState, report: Callable[[], None]) -> bool:
            nonlocal over, newest
            newest = state
            # A callback may look at the clock: the first process's answer is that of all.
            stops = hosts.broadcast(wants_to_stop) if callbacks else False
            over = number == total or stops
            evaluates = evaluate is not None and (over or _is_due(number, training.eval_every))
            # The line of this step comes before that of its evaluation.
            if over or evaluates:
                report()
            if evaluate is not None and evaluates:
                # The averaged parameters are what is exported, so they are what is evaluated.
                metrics = jax.device_get(evaluate(with_average(state)))
                log(
                    "eval",
                    number,
                    {f"eval_{name}": float(value) for name, value in metrics.items()},
                )
                # 0 evaluations since the best one: this is the best.
                if best is not None and _since_best(run, shown) == 0:
                    best.save(split_context(state))
                stops = hosts.broadcast(wants_to_stop) if callbacks else False
                over = over or stops or _is_stuck(run, shown, training.patience)
            check_skipped(number)
            # Fetching `taken` waits for the device: once in a run.
            if over:
                _check_taken(run, number - done - int(taken), number - done, done)
            saves = over or stop_requested() or _is_due(number, training.save_every)
            if saves:
                report()
                save(state)
            # A stop that was requested while saving ends the run here: this step is saved already.
            ends = over or (saves and stop_requested())
            if ends or _is_due(number, training.export_every):
                report()
                write_model(state)
                ends = ends or (saves and stop_requested())
            return ends

        def step_and_count(state: TrainState, number: int) -> tuple[TrainState, dict]:
            nonlocal taken, skipped_last, averaged
            state, metrics = step(state, batches(number))
            if waits:
                jax.block_until_ready((state, metrics))
            # Below 1: a mean over several updates, of which some were skipped, still moved.
            moved = metrics.get("skipped", 0.0) < 1
            taken = taken + moved
            skipped_last = (skipped_last + 1) * (1 - moved)
            # Hooks before the average: one of them may alter the parameters.
            for hook in hooks:
                state = hook(number + 1, state)
            if average:
                averaged = average.update(averaged, state.params)
            return state, metrics

        if training.eval_on_start and evaluate is not None and done == 0 and not over:
            metrics = jax.device_get(evaluate(with_average(state)))
            log("eval", 0, {f"eval_{name}": float(value) for name, value in metrics.items()})
        if over:
            # The model may be missing: killed after the last checkpoint, or deleted since.
            write_model(state)
        else:
            try:
                state = run_steps(
                    "train",
                    step_and_count,
                    state,
                    ((number,) for number in range(done, total)),
                    total,
                    start=done,
                    log=log,
                    after=after,
                    console=console or Console(stderr=True, quiet=not hosts.is_first()),
                    shown=shown,
                    every=training.log_every,
                    size=_size(state.params),
                    devices=_devices(state.params),
                )
            except Stopped as stop:
                number = int(newest.step) // updates
                over = False
                if number == 0:
                    raise
                settle()
                # Not where the newest checkpoint is of this step already.
                if checkpoints.latest() != int(newest.step):
                    save(newest)
                write_model(newest)
                # Only what is whole is said to be saved.
                checkpoints.wait()
                raise Stopped(
                    f"{run.path}: stopped after step {number} of {total}: {stop}; go on with "
                    "--resume"
                ) from None
        if best is not None and best.latest() is not None and over:
            # Only at the end: a run that goes on later needs its last state, not its best.
            found = _restored_best(best, split_context(state))
            # The average of the best step: `with_average` below reads it.
            averaged = found.context.pop("average", None)
            state = found._replace(context={**dict(state.context), **found.context})
            export(with_average(state), over)
        state = with_average(state)
    if run.last_metrics():
        run.plot(shown)
    if not over:
        number = int(newest.step) // updates
        raise KeyboardInterrupt(
            f"{run.path}: stopped after step {number} of {total}; go on with --resume"
        )
    return state


def _set_mesh(mesh: Mesh | None) -> Any:
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def _is_due(number: int, every: int) -> bool:
    """Whether a step is one of those of `every`; for 0 none is."""
    return every > 0 and number % every == 0


def _restored_best(best: Checkpoints, like: TrainState) -> TrainState:
    try:
        return best.restore(like)
    except ValueError as error:
        raise ValueError(
            f"{error}; the last state is saved, and in model/: take {best.folder} away and --resume "
            "to end with that"
        ) from None


def _check_taken(
    run: RunFolder, skipped: int, steps: int, before: int, where: str | None = None
) -> None:
    """Raises where no step was taken, in this process or in the steps before it; says how many were
    skipped, and where a batch of them is.
    """
    # Of a resumed run the log knows the steps of earlier processes; without them the file is not
    # read.
    known = (
        [row.get("skipped", 0.0) for row in run.read("metrics.jsonl") if row["phase"] == "train"]
        if before
        else []
    )
    if skipped == steps and all(share == 1 for share in known):
        raise ValueError(
            f"{run.path}: all {before + skipped} steps were skipped, since their gradients were "
            "infinite or NaN: the model is "
            "as it was; look at the losses in metrics.jsonl, and try --dtype float32, a lower "
            f"--learning_rate, or other rows{f'; {where}' if where else ''}"
        )
    if skipped:
        run.say(
            f"{skipped} of {steps} steps were skipped, since their gradients were infinite or NaN"
        )


def _is_stuck(run: RunFolder, shown: Sequence[str], patience: int) -> bool:
    """Whether so many evaluations have brought nothing better; for 0 never."""
    return patience > 0 and _since_best(run, shown) >= patience


def _since_best(run: RunFolder, shown: Sequence[str]) -> int:
    """Evaluations after the best one, by the first metric shown that they have: of a loss the
    lowest, of all else the highest.

    Raises: ValueError where evaluations have none of these metrics.
    """
    rows = [row for row in run.read("metrics.jsonl") if row["phase"] == "eval"]
    if not rows:
        return 0
    known = [name for name in shown if f"eval_{name}" in rows[0]]
    if not known:
        raise ValueError(
            f"evaluations are compared by one of {', '.join(shown)}, but have {', '.join(rows[0])}"
        )
    name = f"eval_{known[0]}"
    # `index` finds the first of equals: an evaluation that only repeats the best is no progress.
    values = [row[name] for row in rows]
    best = values.index((min if name.endswith("loss") else max)(values))
    return len(values) - 1 - best


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
    after: Callable[[int, Any, Callable[[], None]], bool | None] | None = None,
    size: int = 0,
    devices: int = 1,
) -> Any:
    """Takes steps `start + 1` to `total`, `state, metrics = step(state, *next(inputs))`, under a
    progress bar.

    Metrics are fetched a step late: while the host waits for those of step n, the device has step n
    + 1 to do.

    Args:
      phase: what the steps are, such as "train".
      step: `(state, *inputs) -> (state, metrics)`.
      state: before the first step.
      inputs: arguments of the steps.
      total: number of the last step.
      log: called with the phase, the step's number from 1, and its metrics as floats, every `every`
        steps and at the end.
      console: of the progress bar.
      shown: metrics that stand beside the bar.
      every: steps between two lines of the log.
      start: steps that were taken before.
      after: called with every step's number, the state, and a function that logs what is not logged
        yet; where it returns True, that step was the last.
      size: trained parameters; with a metric `tokens`, the share of the devices' peak is logged
        where it is known.
      devices: how many the run uses.

    Returns: the last state.
    """
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[metrics]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(phase, total=total, completed=start, metrics="")
        # The time that the next line of the log is about, and the steps since the last one.
        start_time = time.perf_counter()
        waiting: list[tuple[int, dict]] = []
        compiled_before = compilations.count()

        def report() -> None:
            """Logs the newest step that waits, if its line is due."""
            nonlocal start_time
            if not waiting or (waiting[-1][0] % every and waiting[-1][0] != total):
                return
            # One transfer for all: each fetch waits for the device.
            fetched = jax.device_get([metrics for _, metrics in waiting])
            number, _ = waiting[-1]
            seconds = time.perf_counter() - start_time
            start_time = time.perf_counter()
            waiting.clear()
            metrics = {name: float(value) for name, value in fetched[-1].items()}
            metrics |= _speed(fetched, seconds, size, devices)
            metrics["compilations"] = compilations.count() - compiled_before
            log(phase, number, metrics)
            text = "  ".join(f"{name} {metrics[name]:.3f}" for name in shown if name in metrics)
            progress.update(task, metrics=text)

        # Not strict: `inputs` may go on without end.
        for number, arguments in zip(range(start + 1, total + 1), inputs, strict=False):
            try:
                state, metrics = step(state, *arguments)
            finally:
                # Of the step before, also where this one raises.  Dispatch is asynchronous: step n
                # + 1 is in the device's queue before the host waits for the metrics of step n.
                report()
            waiting.append((number, metrics))
            progress.advance(task)
            if after is not None and after(number, state, report):
                break
        report()
    return state


def _speed(
    steps: Sequence[Mapping[str, Any]], seconds: float, size: int, devices: int
) -> dict[str, float]:
    """Tokens and sequences a second, and the share of these devices' peak that 6 operations a
    parameter and token are, where it is known.

    Args:
      steps: the metrics of the steps that took so many seconds together.
      seconds: of all of them.
      size: trained parameters.
      devices: how many the run uses.
    """
    counted = {
        f"{name}_per_second": float(sum(one[name] for one in steps)) / seconds
        for name in ("tokens", "sequences")
        # A step of a demo or a test may count nothing.
        if all(name in one for one in steps)
    }
    if "tokens_per_second" not in counted:
        return counted
    kind = jax.devices()[0].device_kind
    peak = next((peak for name, peak in PEAKS.items() if kind.startswith(name)), None)
    # 6 operations a parameter and token: 2 of the forward pass, 4 of the backward pass.
    tokens = counted["tokens_per_second"]
    mfu = {"mfu": 6 * size * tokens / (peak * devices)} if peak else {}
    return {**counted, **mfu}


def _devices(tree: Any) -> int:
    """How many devices hold a part of these arrays."""
    # From the arrays: a run may be on fewer devices than the process has.
    held = (x.sharding.device_set for x in jax.tree.leaves(tree) if isinstance(x, jax.Array))
    return len(set().union(*held)) or 1


def _size(params: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(params))
