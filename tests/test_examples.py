"""The examples about environments run, with few steps."""

import runpy
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.exhaustive
def test_calculator():
    metrics = runpy.run_path(str(EXAMPLES / "calculator.py"))["main"](
        ["--steps", "1", "--sft-steps", "2"]
    )
    assert set(metrics["before"]) == {"right", "asks"}
    assert all(0 <= share <= 1 for share in metrics["after"].values())


@pytest.mark.exhaustive
def test_guess():
    curves = runpy.run_path(str(EXAMPLES / "guess.py"))["main"](
        ["--seeds", "2", "--iterations", "20"]
    )
    assert curves.shape == (2, 20)
    assert (np.abs(curves[0] - curves[1]) > 0).any()  # seeds of their own
    assert curves[:, -5:].mean() > curves[:, :5].mean()
