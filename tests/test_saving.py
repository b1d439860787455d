"""The loop's saves, exports and guards: what is lost and what is said where a save fails, a step cannot be taken, or a file is damaged."""

import dataclasses
import json
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_loop import CONSTANT, STEPS, W, quarter, run, skipping

import rlhf
from rlhf.checkpoint import Checkpoints
from rlhf.training import loop, runs

OFTEN = dataclasses.replace(CONSTANT, save_every=1, keep=4)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- exports ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "expected"), [(0, [(6, True)]), (4, [(4, False), (6, True)]), (6, [(6, True)])]
)
def test_exports_are_their_own_steps(every, expected, tmp_path):
    exported = []
    training = dataclasses.replace(OFTEN, export_every=every)
    run(
        tmp_path / "run",
        training,
        export=lambda state, over: exported.append((int(state.step), over)),
    )
    assert exported == expected


# --- saves that fail, and files that are damaged ---------------------------------------------------------------------------


@pytest.fixture
def full(monkeypatch):
    """Steps whose checkpoints cannot be written at the first try."""
    steps = set()
    finish = Checkpoints._finish

    def failing(self, step, *rest):
        if step in steps and self.folder.name == "checkpoints":
            steps.remove(step)
            raise OSError("No space left on device")
        return finish(self, step, *rest)

    monkeypatch.setattr(Checkpoints, "_finish", failing)
    return steps


def test_a_run_goes_on_where_a_save_fails_and_saves_again(full, tmp_path, capsys):
    full.add(2)
    run(tmp_path / "run", dataclasses.replace(CONSTANT, save_every=2))
    (said,) = capsys.readouterr().err.splitlines()
    assert "checkpoints/2: the checkpoint could not be written; there is none before it" in said
    assert "No space left on device; the run goes on, and saves again now" in said
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest() == STEPS


@pytest.mark.parametrize("stop", [None, 4])
def test_a_run_whose_last_save_fails_ends_with_that(full, stop, tmp_path):
    full.add(stop or STEPS)

    def step(state, batch):
        if stop and int(state.step) == stop:
            raise loop.Stopped("no more")
        return quarter(state, batch)

    training = dataclasses.replace(CONSTANT, save_every=3)
    with pytest.raises(OSError, match="could not be written; that of step 3 stays.*No space left"):
        run(tmp_path / "run", training, step=step)
    state, _ = run(tmp_path / "run", training, resume=True)
    np.testing.assert_allclose(state.params["w"], W[STEPS], rtol=1e-6)


def test_a_run_that_stops_after_a_save_that_failed_saves_again(full, tmp_path, capsys):
    full.add(4)

    def step(state, batch):
        if int(state.step) == 4:
            raise loop.Stopped("no more")
        return quarter(state, batch)

    with pytest.raises(loop.Stopped, match="stopped after step 4 of 6: no more"):
        run(tmp_path / "run", dataclasses.replace(CONSTANT, save_every=4), step=step)
    assert "checkpoints/4: the checkpoint could not be written" in capsys.readouterr().err
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest() == 4


def test_a_run_goes_on_from_the_newest_whole_one_and_forgets_what_came_after(tmp_path, capsys):
    run(tmp_path / "whole", OFTEN)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", OFTEN, stop=5)
    folder = tmp_path / "run" / "checkpoints"
    (folder / "5" / "manifest.json").unlink()
    (folder / "4" / "state" / "_METADATA").write_text("{}")
    numbers = []
    batches = lambda number: numbers.append(number) or jnp.ones(1)
    state, _ = run(tmp_path / "run", OFTEN, resume=True, batches=batches)
    assert numbers == [3, 4, 5]
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2].partition(":")[0] for line in said] == [
        "the checkpoint of step 5 is not whole",
        "the checkpoint of step 4 is not whole",
    ]
    assert all(line.endswith("taken instead: the checkpoint of step 3") for line in said)
    assert [row["step"] for row in lines(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(state.params["w"], W[STEPS], rtol=1e-6)


def test_a_run_without_a_whole_one_is_refused_and_one_without_any_begins_again(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", dataclasses.replace(CONSTANT, save_every=2), stop=3)
    folder = tmp_path / "run" / "checkpoints"
    (folder / "2" / "manifest.json").unlink()
    before = lines(tmp_path / "run")
    with pytest.raises(ValueError, match="no checkpoint is whole"):
        run(tmp_path / "run", resume=True)
    assert lines(tmp_path / "run") == before
    shutil.rmtree(folder)
    state, _ = run(tmp_path / "run", resume=True)
    assert "no checkpoint was whole yet; the run begins again at step 0" in capsys.readouterr().err
    np.testing.assert_allclose(state.params["w"], W[STEPS], rtol=1e-6)


def keeping_best(folder, losses, **options):
    """A run that evaluates at every step, with these losses."""
    training = dataclasses.replace(OFTEN, eval_every=1, keep_best=True)
    evaluate = lambda state: {"loss": losses[int(state.step) - 1]}
    return run(folder, training, evaluate=evaluate, **options)


def test_the_best_state_is_whole_before_a_checkpoint_that_knows_of_it(tmp_path, monkeypatch):
    ended = []
    finish = Checkpoints._finish

    def note(self, step, *rest):
        # The best is slow: without a wait the checkpoint of the same step would be whole first.
        time.sleep(0.2 if self.folder.name == "best" else 0)
        finish(self, step, *rest)
        ended.append((self.folder.name, step))

    monkeypatch.setattr(Checkpoints, "_finish", note)
    keeping_best(tmp_path / "run", [3, 2, 1, 4, 5, 6])
    for step in (1, 2, 3):
        assert ended.index(("best", step)) < ended.index(("checkpoints", step))


def test_a_damaged_best_state_is_an_error_that_loses_nothing(tmp_path):
    losses = [3, 1, 2, 4, 5, 6]
    with pytest.raises(KeyboardInterrupt):
        keeping_best(tmp_path / "run", losses, stop=5)
    (tmp_path / "run" / "best" / "2" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="no checkpoint is whole.*take .*best away and --resume"):
        keeping_best(tmp_path / "run", losses, resume=True)
    shutil.rmtree(tmp_path / "run" / "best")
    state, _ = keeping_best(tmp_path / "run", losses, resume=True)
    np.testing.assert_allclose(state.params["w"], W[STEPS], rtol=1e-6)


# --- guards ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_every", [1, 7])
@pytest.mark.parametrize(("good", "ends"), [(2, 5), (4, 7), (5, 8)])
def test_a_run_ends_after_so_many_skipped_steps_in_a_row(good, ends, log_every, tmp_path):
    """The first `good` steps are taken but for the second; `ends` is the third skipped one in a row."""
    training = dataclasses.replace(CONSTANT, steps=9, max_skipped=3, log_every=log_every)
    step = skipping(lambda number: float(number > good or number == 2 < good))
    batches = lambda number: {
        "x": jnp.full(1, number),
        "texts": ["a", "b"],
        "key": jax.random.key(1),
    }
    take = lambda state, batch: step(state, batch["x"])
    message = f"stopped after step {ends} of 9: the last 3 were skipped.*step {ends} is in .*npz"
    with pytest.raises(loop.Stopped, match=message):
        run(tmp_path / "run", training, step=take, batches=batches, total=9)
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest() == ends
    with np.load(tmp_path / "run" / "bad_batch.npz") as bad:
        assert {name: bad[name].tolist() for name in bad.files} == {
            "x": [ends - 1], "texts.0": "a", "texts.1": "b", "key": [0, 1],
        }  # fmt: skip


def test_where_none_was_taken_the_batch_is_named_too(tmp_path):
    training = dataclasses.replace(CONSTANT, max_skipped=2)
    with pytest.raises(ValueError, match="all 2 steps were skipped.*batch of step 2 is in .*npz"):
        run(tmp_path / "run", training, step=skipping(lambda number: 1.0))


def test_a_loss_spike_ends_a_run(tmp_path, capsys):
    spiking = lambda number: jnp.full(1, 9.0 if number == 3 else 1.0 + 0.01 * number)
    guard = rlhf.guards.loss_spike(4.0, window=3)
    export = lambda state, over: ended.append(over)
    ended = []
    state, _ = run(tmp_path / "run", batches=spiking, callbacks=[guard], export=export)
    # A line is logged while the next step is under way.
    assert (int(state.step), ended) == (5, [True])
    assert "step 4: loss 35.41 is above" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("guard", "metric", "values", "expected"),
    [
        (lambda: rlhf.guards.kl_above(1.0, lines=2), "objective/kl", [2, 0, 2, 2], [0, 0, 0, 1]),
        (lambda: rlhf.guards.kl_above(1.0, metric="kl"), "kl", [1, np.nan, 1.1], [0, 0, 1]),
        (lambda: rlhf.guards.kl_above(1.0), "loss", [9], [0]),
        (lambda: rlhf.guards.loss_spike(2.0, window=2), "loss", [1, 3, 5, 9], [0, 0, 1, 1]),
        (lambda: rlhf.guards.loss_spike(2.0, window=2), "loss", [1, np.nan, 1, 1], [0, 0, 0, 0]),
        (lambda: rlhf.guards.loss_spike(2.0, window=3), "loss", [1, 1, 9, 9], [0, 0, 0, 0]),
        (lambda: rlhf.guards.loss_spike(2.0, window=3), "loss", [1, 1, 1, 1.1], [0, 0, 0, 1]),
    ],
)
def test_guards_by_hand(guard, metric, values, expected):
    guard = guard()
    assert [guard(step, {metric: value}) for step, value in enumerate(values)] == expected


def test_guards_refuse(tmp_path):
    with pytest.raises(ValueError, match="deviations 0 must be above 0, and window 50"):
        rlhf.guards.loss_spike(0)
    with pytest.raises(ValueError, match="bound 1.0 must be above 0, and lines 0 at least 1"):
        rlhf.guards.kl_above(1.0, lines=0)


def test_what_is_saved_and_when_is_free_on_resuming(tmp_path):
    assert {"save_every", "keep", "export_every", "max_skipped"} <= set(runs.FREE)
