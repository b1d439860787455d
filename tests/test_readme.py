"""The README's programs run as they stand, and its numbers are those of the results that are committed."""

import dataclasses
import json
import pkgutil
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import objectives_table
import pytest
from run_commands import commands, run, shortened

import rlhf
from benchmarks.speed import page, results
from rlhf import cli, losses
from rlhf.models import transformer
from rlhf.models.families import FAMILIES
from rlhf.models.huggingface_config import config_of

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_first_programs_train():
    names: dict = {}
    exec(PROGRAMS[0], names)
    # Leaves the first program's names to the second, as a reader would.
    exec(PROGRAMS[1], names)
    assert int(names["state"].step) == 3
    assert float(names["metrics"]["grad_norm"]) > 0
    assert float(names["metrics"]["kl"]) < 1e-6
    assert np.isfinite(float(names["metrics"]["loss"]))


@pytest.mark.exhaustive
def test_the_mesh_program_runs():
    names: dict = {}
    exec(PROGRAMS[2], names)
    assert int(names["state"].step) == 3
    assert np.isfinite(float(names["metrics"]["loss"]))


def test_the_program_from_a_checkpoint_to_a_checkpoint_runs(tmp_path, monkeypatch):
    """In a folder of its own, with the checkouts' checkpoints in their place."""
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(PROGRAMS[3], names)
    assert float(names["metrics"]["loss"]) > 0
    lm, merged, _ = rlhf.load(tmp_path / "runs" / "merged")
    assert lm == transformer(dataclasses.replace(config_of(names["lm"]), remat="none"))
    jax.tree.map(np.testing.assert_array_equal, merged, names["adapters"].merge(names["trained"]))
    again, _ = names["peft_files"].load(tmp_path / "runs" / "adapter", lm, names["params"], "qwen2")
    jax.tree.map(np.testing.assert_array_equal, again, names["state"].params)


def test_every_family_is_named():
    families = set(re.findall(r"\b[a-z]+[0-9]*(?:_[a-z0-9]+)*\b", README))
    assert {name.removesuffix("_text") for name in FAMILIES} <= families
    assert f"spans {len(FAMILIES)} families" in README


def test_quoted_numbers_of_the_big_model_are_the_committed_results():
    rows = json.loads((ROOT / "benchmarks" / "results" / "big_model.json").read_text())["rows"]
    load, _, step, peer = rows
    assert f"{load['of the files']:.2f} times the files' size" in README
    assert f"peaks at {step['peak MiB'] * 2**20 / 1e9:.1f} GB" in README
    assert (
        f"agrees with transformers' to {peer['largest difference']:.0e}".replace("e-0", "e-")
        in README
    )


def committed(name: str) -> list[dict]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["rows"]


def test_quoted_numbers_of_the_hybrid_model_are_the_committed_results():
    load, _, step, peer = committed("big_model_hybrid")
    assert f"loading takes {load['of the files']:.2f} times the\nfiles" in README
    assert f"the step peaks at {step['peak MiB'] * 2**20 / 1e9:.1f} GB" in README
    difference = f"{peer['largest difference']:.0e}".replace("e-0", "e-")
    assert f"agrees to {difference} (logits up to {peer['largest logit']:.1f})" in README
    value, gradient = committed("delta_rule")
    for row, digits in ((value, 2), (gradient, 1)):
        assert f"{row['transformers / by chunks']:.{digits}f} times" in README
    slower = [row["token by token / by chunks"] for row in (value, gradient)]
    assert f"{slower[0]:.1f} and {slower[1]:.1f} times as long as by chunks" in README


def test_quoted_speed_is_the_committed_result():
    found = results.read(ROOT / "benchmarks" / "results" / "speed.json")
    assert page.short(found) in README
    ratio = found["batching"][0]["ratio"]["median"]
    assert f"most go {ratio:.1f} times as fast" in README
    assert page.text(found) == (ROOT / "benchmarks" / "results" / "speed.md").read_text()


def test_quoted_cost_of_a_composed_step_is_the_committed_result():
    rows = json.loads((ROOT / "benchmarks" / "results" / "fused_step.json").read_text())["rows"]
    readme = " ".join(README.split())
    for row in rows:
        assert row["GF ratio"] <= 1.05
        assert row["memory ratio"] <= 1.05
    one, two = rows
    assert (
        f"has {one['GF ratio']:.2f} times its FLOPs and {one['memory ratio']:.2f} times" in readme
    )
    assert (
        f"{two['GF ratio']:.2f} and {two['memory ratio']:.2f} times at {two['vocabulary']:,}"
        in readme
    )


def test_the_objective_stands_on_the_first_screen():
    lines = README.splitlines()
    assert next(i for i, line in enumerate(lines) if "return loss" in line) < 35


def test_the_table_of_objectives_is_that_of_the_docstrings():
    assert objectives_table.section(README) == README


def test_every_module_of_objectives_is_in_the_table():
    helpers = {"chunks", "logits", "metrics", "segments"}
    modules = {
        info.name for info in pkgutil.iter_modules(losses.__path__) if not info.name.startswith("_")
    }
    assert modules - helpers == set(objectives_table.TOPICS)


def test_quoted_memory_is_the_committed_result():
    rows = json.loads((ROOT / "benchmarks" / "results" / "memory.json").read_text())["rows"]
    for row in rows:
        if row["method"] in ("whole", "chunked 64"):
            assert f"{row['beyond gradient MiB']:,.0f} MiB" in README


def test_every_recipe_has_learned_and_stands_in_the_table():
    rows = json.loads((ROOT / "benchmarks" / "results" / "recipes.json").read_text())["rows"]
    recipes = {name for name, (module, _) in cli.COMMANDS.items() if ".recipes." in module}
    assert {row["recipe"] for row in rows if row["learned"] == "yes"} == recipes
    for row in rows:
        bar = f"{'+' if row['metric'] == 'pass@1' else ''}{row['at least']:.2f}"
        line = next(
            line for line in README.splitlines() if line.startswith(f"| `{row['recipe']}` |")
        )
        assert line.endswith(f"| {row['before']} | {row['after']} | {bar} |")


def test_quoted_speed_of_shared_prefixes_and_packing_is_the_committed_result():
    folder = ROOT / "benchmarks" / "results"
    for row in json.loads((folder / "shared_prefix.json").read_text())["rows"]:
        assert row["largest difference"] < 1e-4
        numbers = f"{row['seconds']:.2f} | {row['by themselves']:.2f} | {row['times as fast']:.2f}"
        assert (
            f"| {row['rows']} | {numbers} | {row['temporary MB']:,.0f} | {row['theirs']:,.0f} |"
            in README
        )
    none, packed, *_ = json.loads((folder / "packing.json").read_text())["rows"]
    assert 30 < none["real tokens %"] < 37
    assert (
        f"train {packed['ratio']:.1f} times as fast with `--packing {packed['packing']}`" in README
    )


@pytest.mark.exhaustive
def test_commands_of_the_readme_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for argv in commands(README):
        run(shortened(argv))
    assert (tmp_path / "final" / "config.json").exists()
    assert (tmp_path / "curves.png").exists()
    assert "pass@2" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_commands_for_gsm8k_run(tmp_path, monkeypatch):
    """On rows of the same form."""
    page = (ROOT / "examples" / "gsm8k.md").read_text()
    rows = (ROOT / "tests" / "data" / "sums.jsonl").read_text() * 16
    (tmp_path / "gsm8k").mkdir()
    for split in ("train", "test"):
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text(rows)
    solutions = {
        "question": "1 + 1?",
        "a": {"solution": "2", "is_correct": True},
        "b": {"solution": "3", "is_correct": False},
    }
    (tmp_path / "gsm8k" / "example_model_solutions.jsonl").write_text(
        8 * (json.dumps(solutions) + "\n")
    )
    monkeypatch.chdir(tmp_path)
    lm, params, _ = rlhf.load(ROOT / "tests" / "checkpoints" / "qwen2")
    one = transformer(dataclasses.replace(config_of(lm), num_layers=1))
    first = {**params, "layers": jax.tree.map(lambda x: x[:1], params["layers"])}
    rlhf.save(tmp_path / "base", one, first, family="qwen2", eos_token_id=2)
    shutil.copytree(
        ROOT / "tests" / "checkpoints" / "tokenizer", tmp_path / "base", dirs_exist_ok=True
    )
    file = tmp_path / "base" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["unk_token"] = "<unk>"  # it knows few letters
    file.write_text(json.dumps(tokenizer))
    for argv in commands(page.replace("BASE", "base")):
        trains = argv[0] == "rlhf" and argv[1] not in ("eval", "export")
        run([*shortened(argv), "--steps", "1"] if trains else shortened(argv))
    assert len((tmp_path / "pairs.jsonl").read_text().splitlines()) == 8
    assert (tmp_path / "final" / "config.json").exists()


def test_quoted_numbers_of_the_command_line_are_the_committed_results():
    results = json.loads((ROOT / "benchmarks" / "results" / "command_line.json").read_text())
    for name in ("sft", "grpo"):
        r = results[name]
        row = f"| after `{name}` | {r['reward']:.3f} | {r['reward_sampled']:.3f} | {r['pass@1']:.1%} | {r['pass@4']:.1%} |"
        assert row in README
