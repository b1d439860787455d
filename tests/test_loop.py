"""The host's loop: averages, hooks, early end, requests to stop, and what a checkpoint leaves out; over resumed runs too."""

import dataclasses
import io
import json
import signal
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from rlhf import files
from rlhf.checkpoint import Checkpoints
from rlhf.sharding import make_mesh
from rlhf.train import init_state
from rlhf.training import averages, loop, runs
from rlhf.training.interrupts import stop_requests
from rlhf.training.loop import fit
from rlhf.training.optimizers import make_optimizer
from rlhf.training.options import TrainingOptions

STEPS = 6
CONSTANT = TrainingOptions(
    steps=STEPS, batch_size=1, learning_rate=0.5, schedule="constant", max_grad_norm=1e9
)
QUIET = Console(file=io.StringIO())


def run(
    folder,
    training=CONSTANT,
    *,
    stop=None,
    resume=False,
    batches=lambda number: jnp.ones(1),
    total=STEPS,
    context=(),
    fixed=("shift",),
    step=None,
    **options,
):
    """A run on `(w - 1)² / 2` from 0, and the last value of every metric; `stop` breaks it off after that step."""

    def broken(number):
        if number == stop:
            raise KeyboardInterrupt
        return batches(number)

    begun = runs.RunFolder(folder, {"resume": resume})
    context = {"shift": jnp.zeros(()), **dict(context)}
    state = init_state(
        {"w": jnp.zeros(1)}, make_optimizer(training, total), jax.random.key(training.seed), context
    )
    state = fit(
        begun,
        training,
        state,
        step or quarter,
        broken,
        total=total,
        fixed=fixed,
        console=QUIET,
        **options,
    )
    return state, {name: value for name, (value, _) in begun.last_metrics().items()}


def quarter(state, batch):
    """`w ← w - 1/4 (w - x + shift)`, in place of an optimizer's step."""
    error = state.params["w"] - batch + state.context["shift"]
    params = {"w": state.params["w"] - 0.25 * error}
    return state._replace(step=state.step + 1, params=params), {
        "loss": 0.5 * (error**2).sum(),
        "reward": 0.0,
    }


W = 1 - 0.75 ** np.arange(STEPS + 1)  # by hand: what `quarter` makes of 0


def test_the_average_is_evaluated_and_returned(tmp_path):
    seen = []
    evaluate = lambda state: seen.append(float(state.params["w"][0])) or {"loss": 0.0}
    training = dataclasses.replace(CONSTANT, average="bema", eval_every=2)
    state, _ = run(tmp_path / "whole", training, evaluate=evaluate)
    ema, expected = 0.0, []
    for t in range(1, STEPS + 1):
        ema += (10 + t) ** -0.5 * (W[t] - ema)
        expected.append((10 + t) ** -0.2 * W[t] + ema)
    np.testing.assert_allclose(seen, expected[1::2], rtol=1e-5)
    np.testing.assert_allclose(state.params["w"], expected[-1], rtol=1e-5)
    with pytest.raises(KeyboardInterrupt):
        run(
            tmp_path / "halves",
            dataclasses.replace(training, save_every=2),
            stop=5,
            evaluate=evaluate,
        )
    resumed, _ = run(
        tmp_path / "halves",
        dataclasses.replace(training, save_every=2),
        resume=True,
        evaluate=evaluate,
    )
    np.testing.assert_array_equal(resumed.params["w"], state.params["w"])


def test_ema_is_its_definition():
    average = averages.ema(decay=0.9)
    state = average.init(jnp.array(2.0))
    for theta in (1.0, 5.0):
        state = average.update(state, jnp.array(theta))
    np.testing.assert_allclose(
        average.value(state, jnp.array(5.0)), 0.9 * (0.9 * 2 + 0.1) + 0.5, rtol=1e-6
    )


def test_a_reference_follows(tmp_path):
    hooks = [averages.following(4, 0.5)]
    context = {"reference": {"w": jnp.zeros(1)}}
    state, _ = run(tmp_path / "run", context=context, hooks=hooks)
    np.testing.assert_allclose(state.context["reference"]["w"], 0.5 * W[4], rtol=1e-6)


def test_callbacks_see_every_line_and_may_end_the_run(tmp_path):
    seen, exported = [], []
    callbacks = [
        lambda step, metrics: seen.append((step, metrics)),
        lambda step, metrics: "eval_loss" in metrics,
    ]
    training = dataclasses.replace(CONSTANT, eval_every=4)
    export = lambda state, over: exported.append((int(state.step), over))
    state, _ = run(
        tmp_path / "run",
        training,
        evaluate=lambda state: {"loss": 0.0},
        callbacks=callbacks,
        export=export,
    )
    logged = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 4]
    assert [(row["phase"], "eval_loss" in row) for row in logged] == [("train", False)] * 4 + [
        ("eval", True)
    ]
    assert seen == [
        (row["step"], {name: row[name] for name in row if name not in runs.ABOUT_ROWS})
        for row in logged
    ]
    assert exported == [(4, True)]
    np.testing.assert_allclose(state.params["w"], W[4], rtol=1e-6)


def test_what_is_fixed_is_not_saved(tmp_path):
    context = lambda n: {"shift": jnp.full((), 0.5), "n": jnp.full(1, n)}
    with pytest.raises(KeyboardInterrupt):
        run(
            tmp_path / "run",
            dataclasses.replace(CONSTANT, save_every=1),
            stop=3,
            context=context(1.0),
        )
    written = (tmp_path / "run" / "checkpoints" / "3" / "state" / "_METADATA").read_text()
    assert "'context', 'n'" in written
    assert "shift" not in written
    state, _ = run(tmp_path / "run", CONSTANT, resume=True, context=context(0.0))
    np.testing.assert_allclose(state.params["w"], 0.5 * W[-1], rtol=1e-6)
    assert state.context["n"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("name", "values", "steps"),
    [("loss", [3, 2, 2, 4, 1, 0], 4), ("reward", [1, 5, 4, 5, 6, 6], 4)],
)
def test_training_ends_when_nothing_gets_better(name, values, steps, tmp_path):
    left = iter(values)
    training = dataclasses.replace(CONSTANT, eval_every=1, patience=2)
    evaluate = lambda state: {name: next(left)}
    state, metrics = run(
        tmp_path / "run",
        training,
        evaluate=evaluate,
        shown=("loss" if name == "loss" else "absent", name),
    )
    assert int(state.step) == steps
    assert metrics[f"eval_{name}"] == values[steps - 1]
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest() == steps
    again, _ = run(tmp_path / "run", training, resume=True, evaluate=evaluate, shown=(name,))
    assert int(again.step) == steps  # it stays over


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def number(request):
    """A signal that is heeded, as it is not in a shell's background."""
    before = signal.signal(request.param, signal.default_int_handler)
    yield request.param
    signal.signal(request.param, before)


@pytest.mark.parametrize("place", ["batches", "evaluate", "export"])
def test_a_run_asked_to_stop_ends_with_its_step_and_goes_on(place, number, tmp_path):
    before, written, calls, card = signal.getsignal(number), [], [], tmp_path / "run" / "README.md"

    def passed(here, value=None):
        calls.append(here)
        if calls.count(place) == 3 and here == place:
            signal.raise_signal(number)
        return value

    hooks = dict(
        batches=lambda number: passed("batches", jnp.ones(1)),
        evaluate=lambda state: passed("evaluate", {"loss": 0.0}),
        export=lambda state, over: passed(
            "export", written.append((float(state.params["w"][0]), over, card.exists()))
        ),
    )
    often = lambda every: dict(save_every=every, export_every=every)
    training = dataclasses.replace(CONSTANT, eval_every=1, **often(1 if place == "export" else 0))
    with pytest.raises(KeyboardInterrupt, match="stopped after step 3 of 6; go on with --resume"):
        run(tmp_path / "run", training, **hooks)
    assert signal.getsignal(number) is before
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest() == 3
    np.testing.assert_allclose(written[-1], (W[3], False, True), rtol=1e-6)
    run(tmp_path / "run", dataclasses.replace(training, **often(2)), resume=True, **hooks)
    np.testing.assert_allclose(written[-2:], [(W[4], False, True), (W[6], True, True)], rtol=1e-6)
    assert "| eval_loss | 0 | 6 |" in card.read_text()
    card.unlink()
    _, metrics = run(
        tmp_path / "run", training, resume=True, **hooks | dict(batches=None)
    )  # over: nothing is left but to write
    assert (written[-1], metrics["eval_loss"]) == (
        written[-2],
        0.0,
    )  # and a model comes after its card


def test_asked_twice_a_run_stops_at_once(number, tmp_path):
    twice = lambda _: [signal.raise_signal(number) for _ in range(2)]
    with pytest.raises(KeyboardInterrupt) as stopped:
        run(tmp_path / "run", batches=twice)
    assert not str(stopped.value)
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest() is None


def test_signals_that_are_not_ours_are_left_alone(number):
    def elsewhere():
        before = signal.getsignal(number)
        with stop_requests() as stop_requested:
            return signal.getsignal(number) is before and not stop_requested()

    with ThreadPoolExecutor() as pool:
        assert pool.submit(elsewhere).result()
    assert not elsewhere()
    signal.signal(number, signal.SIG_IGN)
    assert elsewhere()


def test_nobody_need_hear_that_it_stops(number, monkeypatch):
    with monkeypatch.context() as patch, stop_requests() as stop_requested:
        patch.setattr("os.write", Mock(side_effect=BrokenPipeError))
        signal.raise_signal(number)
        assert stop_requested()


def test_a_folder_is_renewed_whole(tmp_path):
    model, old, new = (tmp_path / name for name in ("model", ".part.old.model", ".part.new.model"))
    for content, killed in (("first", [new]), ("second", [old, new])):
        for left in killed:
            left.mkdir()
            (left / "left").touch()
        with files.renewed(model) as fresh:
            assert not fresh.exists()
            fresh.mkdir()
            (fresh / "content").write_text(content)
            assert model.exists() == (content == "second")
        assert [file.name for file in tmp_path.iterdir()] == ["model"]
        assert [file.read_text() for file in model.iterdir()] == [content]


def test_a_folder_whose_place_was_not_taken_yet_is_put_back(tmp_path):
    (tmp_path / ".part.old.model").mkdir()
    with pytest.raises(RuntimeError), files.renewed(tmp_path / "model"):
        raise RuntimeError("killed before the new one is whole")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_run_of_fewer_rows_than_it_had_is_over(tmp_path):
    run(tmp_path / "run")
    state, _ = run(tmp_path / "run", resume=True, total=STEPS - 2)
    np.testing.assert_allclose(state.params["w"], W[STEPS], rtol=1e-6)


def test_refusals():
    with pytest.raises(ValueError, match="patience 1 but no held-out rows; give --eval_dataset"):
        dataclasses.replace(CONSTANT, eval_every=1, patience=1).total_steps(8, has_held_out=False)
    with pytest.raises(ValueError, match="average_decay must be a number at least 0 and below 1"):
        TrainingOptions(average_decay=1.0)
    with pytest.raises(ValueError, match="patience 2 counts.*give --eval_every"):
        TrainingOptions(patience=2)
    with pytest.raises(ValueError, match="share must be a number above 0 and at most 1"):
        averages.following(1, 0.0)
    with pytest.raises(ValueError, match="decay must be a number at least 0 and at most 1"):
        averages.ema(decay=1.5)
    with pytest.raises(ValueError, match="lag must be a number at least 1"):
        averages.bema(lag=0.5)


# --- steps that are not taken --------------------------------------------------------------------------------------------


def skipping(share):
    """`quarter`, where `share(number)` of the updates of a step from 1 were skipped."""

    def step(state, batch):
        new, metrics = quarter(state, batch)
        skipped = share(int(state.step) + 1)
        return new._replace(params=state.params if skipped == 1 else new.params), {
            **metrics,
            "skipped": skipped,
        }

    return step


def run_skipping(folder, share, *, resume=False, total=STEPS, **options):
    exported = []
    training = dataclasses.replace(CONSTANT, steps=total, **options)
    export = lambda state, over: exported.append(int(state.step))
    run(folder, training, resume=resume, total=total, step=skipping(share), export=export)
    return exported


@pytest.mark.parametrize("options", [{}, dict(log_every=5), dict(average="ema")], ids=str)
def test_a_run_in_which_no_step_was_taken_is_an_error(tmp_path, options):
    with pytest.raises(ValueError, match="all 6 steps were skipped"):
        run_skipping(tmp_path / "run", lambda number: 1.0, **options)
    assert not (tmp_path / "run" / "README.md").exists()


def test_it_ends_early(tmp_path):
    with pytest.raises(ValueError, match="all 20 steps were skipped"):
        run_skipping(tmp_path / "run", lambda number: 1.0, total=100)


@pytest.mark.parametrize(
    "share",
    [lambda n: float(n != 3), lambda n: 0.5, lambda n: float(n < 6)],
    ids=["one", "half", "last"],
)
def test_a_run_with_some_steps_taken_goes_on(tmp_path, share, capsys):
    assert run_skipping(tmp_path / "run", share) == [STEPS]


def test_a_resumed_run_counts_the_steps_before(tmp_path):
    assert run_skipping(tmp_path / "a", lambda number: 0.0, total=3) == [3]
    assert run_skipping(tmp_path / "a", lambda number: 1.0, resume=True) == [STEPS]
    with pytest.raises(ValueError, match="all 6 steps were skipped"):
        run_skipping(tmp_path / "b", lambda number: 1.0, save_every=2)
    with pytest.raises(ValueError, match="all 6 steps were skipped"):
        run_skipping(tmp_path / "b", lambda number: 1.0, resume=True, save_every=2)


def test_mfu_is_of_the_devices_that_the_run_uses(monkeypatch):
    monkeypatch.setitem(loop.PEAKS, jax.devices()[0].device_kind, 6e3)
    one, mesh = (
        jax.device_put(jnp.ones(8), jax.devices()[3]),
        make_mesh(4, devices=jax.devices()[:4]),
    )
    four = jax.device_put(jnp.ones(8), NamedSharding(mesh, PartitionSpec("data")))
    used = [
        loop._devices(tree)
        for tree in ({"a": one}, {"a": four}, {"a": one, "b": four}, {"a": np.ones(1)})
    ]
    assert used == [1, 4, 4, 1]
    assert [loop._speed([{"tokens": 1000}], 1.0, 1, devices)["mfu"] for devices in (1, 4)] == [
        1.0,
        0.25,
    ]
