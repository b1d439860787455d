"""Three small runs give the metrics that they gave before recipes became a library, their old defaults spelt out.

`golden/runs.json` was recorded at commit b20ece2; metrics that have other names since stand there under the new ones.
The seed of `grpo` is one whose sampled tokens do not hang on last bits: JAX 0.10 and 0.12 draw the same ones, with SSE4,
AVX2 and AVX-512.
"""

import json
import re
from pathlib import Path

import pytest
from marks import exhaustive

from rlhf import cli
from rlhf.training.runs import metrics_of

GOLDEN = json.loads((Path(__file__).parent / "golden" / "runs.json").read_text())


@pytest.mark.parametrize("name", GOLDEN)
def test_the_same_seeds_give_the_same_metrics(name, base, tmp_path):
    argv = [*GOLDEN[name]["argv"], "--model", base, "--output", str(tmp_path / "run")]
    assert cli.main(argv) == 0
    rows = metrics_of(tmp_path / "run")
    wanted = GOLDEN[name]["rows"]
    assert len(rows) == len(wanted)
    for row, golden in zip(rows, wanted, strict=True):
        assert row["phase"] == golden["phase"]
        for metric, value in golden.items():
            if metric == "phase":
                continue
            assert row[metric] == pytest.approx(value, rel=1e-5, abs=1e-6), (
                f"step {golden['step']}, {metric}"
            )


def test_a_run_compiles_its_programs_once(base, tmp_path):
    """Prompts of many lengths and other completions at every step: nothing is compiled after the first two steps."""
    rows = [{"prompt": "abcdefgh"[:length] + "="} for length in (1, 5, 2, 7, 3, 4, 6, 8)] * 4
    dataset = tmp_path / "rows.jsonl"
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [
        "grpo",
        "--model",
        base,
        "--dataset",
        str(dataset),
        "--reward",
        "length",
        "--max_new_tokens",
        "4",
    ]
    argv += [
        "--batch_size",
        "2",
        "--num_samples",
        "2",
        "--steps",
        "8",
        "--kl_coef",
        "0.1",
        "--mini_batches",
        "2",
    ]
    assert cli.main([*argv, "--output", str(tmp_path / "run")]) == 0
    compiled = [
        row["compilations"] for row in metrics_of(tmp_path / "run") if row["phase"] == "train"
    ]
    assert len(compiled) == 8
    assert compiled[-1] == compiled[1], compiled


@pytest.mark.parametrize("name", exhaustive(GOLDEN, quick=["grpo"]))
def test_every_metric_is_in_the_table_of_the_docs(name, base, tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    argv = [*GOLDEN[name]["argv"], "--eval_split", "train", "--model", base]
    assert cli.main([*argv, "--output", str(tmp_path / "run")]) == 0
    names = {metric.removeprefix("eval_") for row in metrics_of(tmp_path / "run") for metric in row}
    of_rows = {"phase", "step", "seconds"}
    table = set()
    for first, rest in re.findall(r"`([\w/]+)`((?:, `/\w+`)*)", page):
        table.add(first)
        table |= {first.rsplit("/", 1)[0] + part for part in re.findall(r"`(/\w+)`", rest)}
    assert names - of_rows <= table, names - of_rows - table
