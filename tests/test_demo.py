"""The demo, small, in process; the command line; and what it refuses."""

import functools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from marks import exhaustive
from rich.console import Console

from rlhf import cli, demo
from rlhf.checkpoint import Checkpoints
from rlhf.models import huggingface
from rlhf.training import meshes
from rlhf.training.options import MeshOptions

SMALL = dict(hidden_size=32, rows=32, corpus=64, pairs=64, steps=2)
KEYS = {
    "positive_before", "positive_after", "grammatical_after", "distinct_after", "objective/kl", "reward_accuracy", "seconds"
}  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(demo, "SAMPLES", 32)
    monkeypatch.setattr(demo, "HELD_OUT", 32)
    monkeypatch.setattr(demo, "make_models", functools.partial(demo.make_models, num_layers=1))


@pytest.mark.parametrize("algorithm", exhaustive(["ppo", "grpo", "dpo"], quick=[]))
@pytest.mark.usefixtures("small")
def test_demo_writes_everything(algorithm, tmp_path):
    folder = tmp_path / algorithm
    console = Console(quiet=True)
    summary = demo.run(
        algorithm=algorithm,
        seed=0,
        output=str(folder),
        control="shuffled",
        console=console,
        **SMALL,
    )
    assert set(summary) >= KEYS
    assert summary == json.loads((folder / "summary.json").read_text())
    assert all(np.isfinite(v) for v in summary.values() if isinstance(v, float))
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2] * 3
    assert len({m["phase"] for m in metrics}) == 3
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 32
    assert set(samples[0]) == {"before", "after", "positive"}
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert Checkpoints(folder / "checkpoint").latest() is not None
    _, params, tokenizer = huggingface.load(folder / "model")
    assert sum(x.size for x in jax.tree.leaves(params)) > 10_000
    assert tokenizer.decode(tokenizer.encode("the film")) == "<bos> the film"
    if algorithm == "ppo":
        with pytest.raises(ValueError, match="already holds a run"):
            demo.run(
                algorithm=algorithm,
                seed=0,
                output=str(folder),
                control="none",
                console=console,
                **SMALL,
            )
        assert summary == json.loads((folder / "summary.json").read_text())  # nothing was lost


def test_the_demos_model_is_about_a_million_parameters():
    models = demo.make_models(96)
    size = sum(
        np.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(models.lm.init, jax.random.key(0)))
    )
    assert 0.8e6 < size < 1.2e6


def test_a_used_folder_ends_in_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep me")
    assert cli.main(["demo", "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "already holds a run or other files; choose another --output" in error
    assert cli.main(["demo", "--output", str(tmp_path / "run" / "mine.txt")]) == 2
    assert (tmp_path / "run" / "mine.txt").read_text() == "keep me"


def test_help_as_a_process_needs_no_jax():
    code = "import sys; sys.modules['jax'] = None; from rlhf.cli import main; main(['--help'])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "grpo" in shown.stdout
    module = subprocess.run(
        [sys.executable, "-m", "rlhf"], capture_output=True, text=True, check=False
    )
    assert module.returncode == 2


@pytest.mark.exhaustive
@pytest.mark.mesh
@pytest.mark.usefixtures("small")
def test_the_demo_runs_on_a_mesh(tmp_path):
    losses = {}
    for name, mesh in (("one", None), ("eight", meshes.make(MeshOptions(fsdp=4, tensor=2)))):
        console = Console(quiet=True)
        output = str(tmp_path / name)
        demo.run(
            algorithm="grpo",
            seed=0,
            output=output,
            control="none",
            console=console,
            mesh=mesh,
            **SMALL,
        )
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(row)["loss"] for row in rows[:4]]
    np.testing.assert_allclose(losses["eight"], losses["one"], rtol=1e-3)
