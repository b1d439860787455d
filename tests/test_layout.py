"""Imports point down, start nothing, and `rlhf.losses` needs JAX alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {  # module prefix -> floor; the longest prefix counts
    "rlhf.cli": 4, "rlhf.command_line": 4, "rlhf.tools": 4, "rlhf.demo": 4, "rlhf.__main__": 4,
    "rlhf.recipes": 3, "rlhf.planning": 2.75,
    "rlhf.training": 2.5,
    "rlhf.classic": 3,
    "rlhf.train": 2, "rlhf.checkpoint": 2, "rlhf.metrics": 2,
    "rlhf.data": 2, "rlhf.tasks": 2, "rlhf.rollouts": 2,
    "rlhf.models": 1, "rlhf.adapters": 1, "rlhf.peft_files": 1, "rlhf.sharding": 1,
    "rlhf.mixture": 1, "rlhf.from_flax": 1, "rlhf.hosts": 1,
    "rlhf.fields": -1, "rlhf.typing": -1, "rlhf.trl_tables": -1,
    "rlhf.losses": 0, "rlhf.lm": 0, "rlhf.bound": 0, "rlhf.shared_prefix": 0,
    "rlhf.json_text": 0, "rlhf.ranges": 0, "rlhf.yaml_files": 0, "rlhf.files": 0, "rlhf.trl_names": 0,
}  # fmt: skip
ROOMS = [p for p in FLOORS if FLOORS[p] == 0]


def modules():
    for folder in ("rlhf", "losses", "rollouts"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT)
            if inside.parts[:2] in (("rlhf", "losses"), ("rlhf", "rollouts")):
                continue  # the links; the files are read where they stand
            name = ".".join(inside.with_suffix("").parts)
            name = name.removesuffix(".__init__")
            yield (name if folder == "rlhf" else f"rlhf.{name}"), path


def room(name: str) -> str | None:
    return max((p for p in FLOORS if name == p or name.startswith(p + ".")), key=len, default=None)


def imports(path: Path):
    """Modules of ours that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_has_a_floor_and_imports_point_down():
    seen = 0
    for name, path in modules():
        if name == "rlhf":
            continue
        assert room(name), f"{name} has no floor"
        for target in imports(path):
            assert target.split(".")[0] not in ("losses", "rollouts"), (
                f"{path} imports {target}: say rlhf.{target}"
            )
            other = room(target)
            if other is None or other == room(name):
                continue
            seen += 1
            assert FLOORS[other] <= FLOORS[room(name)], (
                f"{name} imports {target}, which is on a higher floor"
            )
            assert FLOORS[room(name)] > 0 or FLOORS[other] < 0, (
                f"{name} is on floor 0 but imports {target}"
            )
    assert seen > 20


def test_no_circles_between_rooms_of_a_floor():
    edges = {
        (room(name), room(target))
        for name, path in modules()
        if name != "rlhf"
        for target in imports(path)
    }
    edges = {(a, b) for a, b in edges if a and b and a != b}
    order = list(dict.fromkeys(a for edge in edges for a in edge))
    while order:
        free = [a for a in order if not any(b in order for x, b in edges if x == a)]
        assert free, f"a circle among {order}"
        order = [a for a in order if a not in free]


@pytest.mark.parametrize("module", ["rlhf", "rlhf.losses", "rlhf.lm"])
def test_imports_without_flax_and_transformers(module):
    code = f"""
import sys
for name in ("flax", "transformers", "optax", "orbax", "datasets", "rich", "matplotlib"):
    sys.modules[name] = None
import {module}
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr


def test_imports_start_no_device_and_set_no_environment():
    code = """
import os
before = dict(os.environ)
import rlhf, rlhf.losses, rlhf.rollouts, rlhf.models, rlhf.sharding, rlhf.train, rlhf.checkpoint, rlhf.cli, rlhf.recipes.ppo
import jax
assert not jax._src.xla_bridge._backends, "a device was started"
changed = {k for k in os.environ if before.get(k) != os.environ[k]}
assert not [k for k in changed if k.startswith(("JAX", "XLA"))], changed
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr


def test_public_names_of_rlhf_resolve():
    import rlhf

    for name in rlhf.__all__:
        assert getattr(rlhf, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = rlhf.nothing


RECIPES = [
    path for path in sorted((ROOT / "rlhf" / "recipes").glob("*.py")) if path.name != "__init__.py"
]


def functions_of(path: Path) -> dict[str, ast.FunctionDef]:
    return {
        node.name: node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }


def lines_of_code(function: ast.FunctionDef, lines: list[str]) -> int:
    """Without its docstring, comments and blank lines: those are not what makes it long to follow."""
    docstring, *body = function.body
    numbers = set(range(function.lineno, docstring.lineno))
    for node in body:
        numbers |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    real = [lines[number - 1].strip() for number in numbers]
    return sum(bool(line) and not line.startswith("#") for line in real)


def test_no_recipe_imports_a_recipe():
    assert len(RECIPES) > 15
    for path in RECIPES:
        assert not [name for name in imports(path) if name.startswith("rlhf.recipes")], path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_one_make_update_and_one_main(path):
    functions = functions_of(path)
    assert {"make_update", "main"} <= functions.keys()
    lines = path.read_text().splitlines()
    assert sum(lines_of_code(functions[name], lines) for name in ("make_update", "main")) <= 150
    assert "# fmt: skip" not in path.read_text()


def test_losses_are_put_into_steps_in_recipes_and_their_rooms_alone():
    """README, demo, classic PPO and benchmarks call `make_update`; an objective of one's own is an example."""
    own_objectives = (
        "benchmarks/algorithms/closed_form.py",  # GRPO with other estimators of the KL
        "examples/custom_objective.py",
        "examples/guess.py",
        "examples/positive_reviews.py",
    )
    allowed = (
        "rlhf/recipes/",
        "rlhf/training/",
        "rlhf/train.py",
        "benchmarks/big_model.py",
        *own_objectives,
    )
    for folder in ("rlhf", "rollouts", "examples", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if name.startswith(allowed) or name.startswith(("rlhf/losses", "rlhf/rollouts")):
                continue
            calls = [
                node.func
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Call)
            ]
            named = {getattr(call, "attr", getattr(call, "id", None)) for call in calls}
            assert not named & {"train_step", "coupled_train_step"}, (
                f"{name} puts a loss into a step of its own"
            )
    for name in ("rlhf/demo.py", "rlhf/classic.py", "README.md", "examples/positive_reviews.py"):
        assert "make_update(" in (ROOT / name).read_text(), name
