"""The example of objectives written by users runs, learns something from the grammar, and keeps them short."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).parent.parent / "examples" / "custom_objective.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("custom_objective", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.exhaustive
def test_a_small_run(example, monkeypatch):
    monkeypatch.setattr(example, "OBJECTIVES", {"saturating": example.mine})
    monkeypatch.setattr(example.demo, "SAMPLES", 32)
    # A model of two steps writes nothing grammatical, so that something else is rewarded here.
    monkeypatch.setattr(
        example,
        "verdicts",
        lambda tokenizer, rollout: np.float32((rollout.tokens % 3 == 0).sum(-1)),
    )
    metrics = example.main(["--steps", "2", "--sft-steps", "4", "--hidden-size", "16"])
    assert list(metrics) == ["language model", "saturating"]
    assert metrics["language model"]["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    assert metrics["saturating"]["objective/kl"] > 1e-3  # it has moved


def test_every_objective_has_at_most_ten_lines():
    source = PATH.read_text()
    written = source[source.index("# ---- the objectives") : source.index("OBJECTIVES =")]
    blocks = re.split(r"\n\n+", written)[1:]
    assert len(blocks) >= 5
    assert all(len(block.splitlines()) <= 10 for block in blocks)


def test_the_verdict_is_the_grammars(example, monkeypatch):
    texts = {
        "prompts": ["the film", "the film", "the film"],
        "completions": ["is great .", "is dull .", "great is ."],
    }
    for name, value in texts.items():
        monkeypatch.setattr(
            example.rollouts.text, name, lambda tokenizer, rollout, value=value: value
        )
    assert example.verdicts(None, None).tolist() == [1.0, 0.0, 0.0]
