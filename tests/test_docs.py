"""What the pages in `docs/` name is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WALK = (ROOT / "docs" / "architecture.md").read_text()


def names_of(path: Path) -> set[str]:
    """Functions, classes and methods (`Class.method`) that a file defines."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}.{inner.name}"
                for inner in node.body
                if isinstance(inner, ast.FunctionDef)
            }
    return found


def test_the_walk_names_files_and_functions_that_exist():
    steps = re.findall(r"^\d+\. (.*(?:\n   .*)*)", WALK, re.MULTILINE)
    assert 10 <= len(steps) <= 15
    files = set()
    for step in steps:
        quoted = re.findall(r"`([^`]+)`", step)
        paths = [name for name in quoted if name.endswith(".py")]
        assert all((ROOT / name).is_file() for name in paths), step
        files |= set(paths)
        known = set().union(*(names_of(ROOT / name) for name in paths))
        known |= names_of(ROOT / "rlhf/recipes/grpo.py")
        for name in quoted:
            if not name.endswith(".py"):
                assert name in known, f"{name} is not in {paths}"
    assert len(files) <= 15


def test_every_path_in_the_pages_exists():
    for page in (ROOT / "docs").glob("*.md"):
        for name in re.findall(
            r"`((?:rlhf|losses|rollouts|tests|benchmarks|examples)/[\w./]*)`", page.read_text()
        ):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


@pytest.mark.exhaustive
def test_the_blocks_of_recipes_from_python_run(tmp_path, monkeypatch):
    from rlhf import cli

    monkeypatch.chdir(tmp_path)
    assert (
        cli.main(
            [
                "new",
                "--output",
                "base",
                "--task",
                "task:sums",
                "--hidden_size",
                "16",
                "--num_layers",
                "1",
            ]
        )
        == 0
    )
    page = (ROOT / "docs" / "python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    scope: dict = {}
    for block in blocks:
        assert len([line for line in block.splitlines() if line.strip()]) <= 8, block
        exec(compile(block, "docs/python.md", "exec"), scope)
    trained = scope["trained"]
    assert trained.folder == Path("runs/sft")
    assert len(trained.metrics["loss"]) == len(trained.metrics["step"]) == 2
    assert scope["scorer"] is not None
    rewards = [
        row
        for row in (Path("runs/ppo") / "metrics.jsonl").read_text().splitlines()
        if "rewards/reward_model/mean" in row
    ]
    assert rewards


def test_a_reward_of_another_number_is_found_before_the_model_loads(base, tmp_path, monkeypatch):
    from rlhf.recipes import grpo
    from rlhf.training import loading

    monkeypatch.setattr(loading.huggingface, "load", None)
    options = {
        "model": base,
        "dataset": [{"prompt": "ab="}] * 8,
        "output": str(tmp_path / "run"),
        "max_new_tokens": 2,
    }

    def one_for_all(completions, **columns):
        return [1.0]

    def needs_more(completions, solution):
        return [1.0] * len(completions)

    async def one_for_all_later(completions, **columns):
        return [1.0]

    for reward in (one_for_all, one_for_all_later):
        with pytest.raises(
            ValueError, match=r"returned 1 .* for 2|returned .*; give one number a completion"
        ):
            grpo.main(reward=reward, **options)
    with pytest.raises(ValueError, match="needs solution"):
        grpo.main(reward=needs_more, **options)
    with pytest.raises(
        ValueError, match="learning_rat is no option .*; did you mean learning_rate"
    ):
        grpo.main(reward=one_for_all, learning_rat=1.0, **options)
    with pytest.raises(
        ValueError, match="num_generations is no option .*; TRL's name is num_samples here"
    ):
        grpo.main(reward=one_for_all, num_generations=4, **options)
    for rows, message in (
        ({"prompt": ["ab="]}, "dataset is a dict of columns; give a list of rows"),
        (["ab="], "row 0 of dataset is 'ab='; give a dict"),
    ):
        with pytest.raises(ValueError, match=message):
            grpo.main(reward=one_for_all, **(options | {"dataset": rows}))
    with pytest.raises(ValueError, match="output must be given"):
        grpo.main(model=base, dataset=[{"prompt": "ab="}], reward=one_for_all)
    assert not any(tmp_path.iterdir())
