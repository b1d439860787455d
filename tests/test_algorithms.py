"""The comparison of algorithms: runs, pieces, and the page that is made of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from marks import exhaustive

from benchmarks.algorithms import findings, page, runs, statistics, study
from benchmarks.algorithms.offline import OFFLINE
from benchmarks.algorithms.online import ONLINE
from benchmarks.algorithms.runs import Setting
from rlhf import tasks

TINY = Setting(
    tasks.find("task:walks"),
    hidden_size=8,
    warm_steps=60,
    steps=4,
    prompts=4,
    samples=4,
    evaluations=2,
    eval_prompts=512,
)


@pytest.fixture(scope="module")
def start():
    return jax.jit(partial(runs.warm, TINY))(jax.random.key(0))


def test_there_are_sixteen_algorithms_and_more():
    assert len(ONLINE) + len(OFFLINE) >= 16
    assert set(OFFLINE) == {"SFT", "DPO", "IPO", "KTO", "SimPO", "ILQL"}


@pytest.mark.parametrize("name", exhaustive(study.ALGORITHMS, quick=["PPO", "ILQL"]))
def test_every_algorithm_is_a_pure_function_of_key_and_hyperparameters(name, start):
    algorithm = study.ALGORITHMS[name]
    curves = jax.eval_shape(
        runs.make_train(algorithm, TINY), jax.random.key(1), start, 1e-3, algorithm.knobs[0]
    )
    assert {curve.shape for curve in curves.values()} == {(TINY.evaluations + 1,)}
    # An equal budget of tuning.
    assert len(set(study.points(algorithm, TINY))) == study.POINTS


@pytest.mark.parametrize("name", exhaustive(study.ALGORITHMS, quick=["GRPO", "DPO"]))
def test_runs_side_by_side_are_runs_in_turn(name, start):
    """And their hyper-parameters reach them."""
    algorithm = study.ALGORITHMS[name]
    train = runs.make_train(algorithm, TINY._replace(staleness=1))
    keys = jnp.stack([jax.random.key(1)] * 2)
    rates = jnp.array([0.0, 3e-2])
    starts = jax.tree.map(lambda x: jnp.stack([x, x]), start)
    both = jax.jit(jax.vmap(train))(keys, starts, rates, jnp.full(2, algorithm.knobs[0]))
    one = jax.jit(train)(keys[0], start, rates[0], algorithm.knobs[0])
    for name, curve in one.items():
        np.testing.assert_allclose(both[name][0], curve, atol=1e-6, err_msg=name)
    # Nothing is learned at a rate of 0, and the held-out prompts stay the same.
    assert len(set(both["score"][0][:-1].tolist())) == 1
    assert len(set(both["score"][1].tolist())) > 1
    assert (np.diff(both["tokens"], axis=1) > 0).all()


def test_every_control_pays_for_something_else(start):
    lm = runs.model(TINY)
    prompts = TINY.task.prompts(jax.random.key(0), 16)
    right = TINY.task.attempts(jax.random.key(1), prompts, 1.0)
    rollout = tasks.as_rollout(prompts, right)
    assert runs.sample(TINY.task, lm, start, prompts, jax.random.key(2)).tokens.shape[0] == 16
    paid = {name: f(TINY.task, rollout, jax.random.key(3)) for name, f in study.CONTROLS.items()}
    assert (paid["flipped"] == 0).all()
    assert (paid["masked"] == 0).all()
    assert set(paid["random"].tolist()) == {0.0, 1.0}
    assert np.corrcoef(paid["spurious"], rollout.mask.sum(axis=1))[0, 1] == pytest.approx(1)


def test_pieces_have_names_by_themselves():
    for size in study.SIZES.values():
        names = [piece.name for piece in study.pieces(size)]
        assert len(set(names)) == len(names)


# ---- the page ----------------------------------------------------------------------------------


def runs_that_end(**ends):
    """A table of 8 runs of 2 tasks, which rise from 0.2 to about these ends."""
    rng = np.random.default_rng(0)
    rows = []
    for name, end in ends.items():
        for task in ("walks", "sort"):
            for seed in range(8):
                at = end + 0.01 * rng.random()
                rows += [
                    {
                        "kind": "main", "task": task, "algorithm": name, "hidden_size": 16, "staleness": 0, "control": "",
                        "purpose": "final", "seed": seed, "learning_rate": 1e-3, "knob": 0.1, "evaluation": i,
                        "tokens": 1000 * i, "exact": 0.2 + (at - 0.2) * i / 6, "score": at, "compile_seconds": 1.0,
                        "run_seconds": 1.0, "piece_seconds": 90.0,
                    }
                    for i in range(7)
                ]  # fmt: skip
    return rows


def test_the_table_says_what_the_runs_say():
    rng = np.random.default_rng(0)
    table = pa.Table.from_pylist(runs_that_end(GRPO=0.8, RLOO=0.801, DPO=0.5))
    found = findings.scores(table, kind="main")
    lines = {line["algorithm"]: line for line in findings.main_table(found, rng)}
    assert list(lines)[-1] == "DPO"
    assert lines["RLOO"]["within 0.02"] == "yes"
    assert lines["DPO"]["within 0.02"] == "not shown"
    assert float(lines["DPO"]["p, Holm"]) < 0.01 < float(lines["RLOO"]["p, Holm"])
    assert lines["DPO"]["P(better than GRPO)"].startswith("0.000")
    assert lines["GRPO"]["at the start"] == "0.200"
    assert lines["GRPO"]["interquartile mean"].startswith(
        f"{statistics.interquartile_mean(found[0].final):.3f}"
    )
    said = findings.sentences(table, rng)
    assert said[-1].endswith("2 of the 2 tasks; of fewer: GRPO (0) and RLOO (0).")
    assert any(
        "Of 3 pairs of algorithms 2 differ" in text and "1 are equal" in text for text in said
    )


def test_the_bar_is_for_every_run_of_those_that_sample():
    table = pa.Table.from_pylist(runs_that_end(GRPO=0.95, RLOO=0.945, DPO=0.5))
    said = findings.sentences(table, np.random.default_rng(0))
    assert said[-1] == (
        "Of 2 algorithms that sample, 1 end at 0.95 or above in every run of at least 2 of the 2 tasks; of fewer: RLOO (0)."
    )


def test_minutes_are_those_of_each_piece():
    rows = runs_that_end(GRPO=0.8, RLOO=0.8)
    assert findings.minutes(pa.Table.from_pylist(rows)) == 6.0  # 2 algorithms, 2 tasks
    flipped = [row | {"kind": "control", "control": "flipped"} for row in rows]
    assert findings.minutes(pa.Table.from_pylist(rows + flipped)) == 12.0


def test_sentences_of_pieces_beside_the_main_table():
    rows = runs_that_end(GRPO=0.9, RLOO=0.9)
    stale = [
        row | {"kind": "staleness", "staleness": 8} for row in runs_that_end(GRPO=0.9, RLOO=0.6)
    ]
    stale = [row for row in stale if row["task"] == "walks"]
    flipped = [row | {"kind": "control", "control": "flipped"} for row in runs_that_end(GRPO=0.0)]
    said = findings.sentences(
        pa.Table.from_pylist(rows + stale + flipped), np.random.default_rng(0)
    )
    (of_age,) = [text for text in said if "8 steps old" in text]
    assert "costs RLOO (-0.3" in of_age
    assert of_age.endswith("for GRPO.")
    assert any("flipped 0.20 → 0.0" in text for text in said)


@pytest.mark.exhaustive
def test_the_smallest_comparison(tmp_path):
    """Its pieces are run once, and the page has all of them."""
    table = study.run_all("smallest", tmp_path / "runs", workers=2)
    files = sorted((tmp_path / "runs").iterdir())
    times = [file.stat().st_mtime_ns for file in files]
    assert study.run_all("smallest", tmp_path / "runs").equals(table)
    assert [file.stat().st_mtime_ns for file in files] == times
    assert len(files) == len(list(study.pieces(study.SIZES["smallest"])))

    about = {"size": "smallest"}
    text = page.write(table, [{"algorithm": "x"}], tmp_path, about, np.random.default_rng(0))
    assert text == (tmp_path / "algorithms.md").read_text()
    found = {one.name: one for one in findings.scores(table, kind="main")}
    for name in ("GRPO", "RLOO"):
        assert found[name].final.min() > 0.9, name
    (flipped,) = findings.scores(table, kind="control")
    assert flipped.final.max() < 0.1
    # Equal budgets: as many completions, of lengths that differ.
    assert {len(one.tokens) for one in found.values()} == {7}
    # Of other seeds than those that are reported.
    swept = table.filter(pc.equal(table["purpose"], "sweep"))
    assert min(swept["seed"].to_pylist()) >= study.SWEEP_SEED > max(found["DPO"].final.shape)
