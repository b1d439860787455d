"""The example on real reviews, run small on sentences made here; and what bad input gets."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

SMALL = ["--hidden", "16", "--sft-passes", "2", "--reward-passes", "2", "--rl-steps", "2"]


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parent.parent / "examples" / "positive_reviews.py"
    spec = importlib.util.spec_from_file_location("positive_reviews", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.LENGTH, module.LAYERS, module.SAMPLES, module.EVALUATED, module.CLASSIFIERS = (
        12,
        1,
        64,
        32,
        2,
    )
    module.PPO_LR = 1e-2  # two steps show
    return module


@pytest.fixture
def data(tmp_path):
    """Two files of 90 sentences; a third of the words say what the author felt."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    folder.mkdir()
    for name, felt in (
        ("pos.txt", "good fine bright".split()),
        ("neg.txt", "bad dull flat".split()),
    ):
        words = "a the film plot actor and is with".split() + 4 * felt
        lines = [" ".join(rng.choice(words, rng.integers(3, 9))) for _ in range(90)]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.mark.exhaustive
def test_a_small_run_measures_before_and_after(example, data, tmp_path, capsys):
    summary = example.main(["--data", str(data), "--output", str(tmp_path / "out"), *SMALL])
    assert summary["judge_accuracy"] > 0.8
    assert summary["seconds"] > 0
    for side in ("before", "after"):
        assert set(summary[side]) == {
            "positive_share",
            "distinct_bigrams",
            "objective/kl",
            "tokens",
        }
        assert 0 <= summary[side]["positive_share"] <= 1
        assert 0 < summary[side]["distinct_bigrams"] <= 1
        assert 1 <= summary[side]["tokens"] <= example.LENGTH - 1
    assert abs(summary["before"]["objective/kl"]) < 1e-4
    assert 1e-3 < abs(summary["after"]["objective/kl"]) < 10
    assert json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8")) == summary
    samples = (tmp_path / "out" / "after.txt").read_text(encoding="utf-8")
    assert len(samples.splitlines()) == example.EVALUATED
    assert not any(word in samples for word in example.SPECIAL)
    assert "PPO writes:" in capsys.readouterr().out


def spoil_missing_folder(data):
    return data / "nowhere"


def spoil_missing_file(data):
    (data / "neg.txt").unlink()


def spoil_empty(data):
    (data / "pos.txt").write_text("\n \n", encoding="utf-8")


def spoil_bytes(data):
    (data / "pos.txt").write_bytes(b"clich\xe9 .\n" * 100)


def spoil_same(data):
    (data / "pos.txt").write_bytes((data / "neg.txt").read_bytes())


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_missing_folder, "no such file; check the path"),
        (spoil_missing_file, "no such file; check the path"),
        (spoil_empty, "the file is empty; it needs one text a line"),
        (spoil_bytes, "pos.txt, line 1: not UTF-8"),
        (spoil_same, "sentences stand in both"),
    ],
)
def test_bad_data_gets_one_line_and_exit_code_2(example, data, tmp_path, capsys, spoil, said):
    folder = spoil(data) or data
    assert_refused(
        example, ["--data", str(folder), "--output", str(tmp_path / "out")], said, capsys
    )
    assert not (tmp_path / "out").exists()


def test_an_output_that_holds_results_is_left_alone(example, data, tmp_path, capsys):
    (tmp_path / "summary.json").write_text("{}", encoding="utf-8")
    assert_refused(
        example,
        ["--data", str(data), "--output", str(tmp_path)],
        "already holds a run or other files",
        capsys,
    )
    assert (tmp_path / "summary.json").read_text(encoding="utf-8") == "{}"


def test_a_missing_scikit_learn_is_named(example, data, monkeypatch, capsys):
    monkeypatch.setattr(example, "find_spec", lambda name: None)
    assert_refused(example, ["--data", str(data)], "pip install scikit-learn", capsys)


@pytest.mark.parametrize("knob", [["--hidden", "12"], ["--rl-steps", "0"], ["--sft-passes", "-1"]])
def test_knobs_out_of_range_are_refused(example, data, capsys, knob):
    assert_refused(example, ["--data", str(data), *knob], "at least 1", capsys)


def assert_refused(example, arguments, said, capsys):
    with pytest.raises(SystemExit) as exited:
        example.main(arguments)
    assert exited.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
