"""Breaks `losses/` in one place at a time and runs its tests: what stays green is a promise that no test holds.

    python tests/mutate.py [--module policy] [--jobs 2] [--list] [--every 7]

A mutant drops one `stop_gradient` or one `where`, flips one sign, swaps `clip_low` with `clip_high` or `minimum` with
`maximum`.  It is killed by the first failing test: the module's examples, the function's part of the contract suite, tests
that name the function, tests that name its module, then the contract and properties of the module.  Survivors are
listed; those that change nothing that could be seen are explained in `EQUIVALENT`.
"""

import argparse
import ast
import concurrent.futures
import copy
import importlib
import multiprocessing
import os
import re
import runpy
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SIGNS = {ast.Add: ast.Sub, ast.Sub: ast.Add}
SWAPS = {
    "minimum": "maximum",
    "maximum": "minimum",
    "clip_low": "clip_high",
    "clip_high": "clip_low",
}
DROPS = {
    "stop_gradient": 0,
    "where": 1,
    "clean": 0,
    "constant": 0,
}  # the argument that is left of a call
KEEPS = {
    "constant": "clean",
    "clean": "widen",
}  # a call without its gradient stop, or without its `where`
QUICK = ("test_definitions*.py", "test_gradients.py", "test_golden_*.py", "test_chunked.py")
EQUIVALENT: dict[str, str] = {}  # `module.function:line: mutation` -> why no test can see it


def called(node: ast.AST) -> str:
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "attr", getattr(function, "id", ""))


def mutations(tree: ast.Module) -> Iterator[tuple[ast.expr, str, ast.expr]]:
    """`(node, what is done to it, what stands there instead)`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and type(node.op) in SIGNS:
            yield node, "sign", ast.BinOp(node.left, SIGNS[type(node.op)](), node.right)
        elif (
            isinstance(node, ast.UnaryOp)
            and isinstance(node.op, ast.USub)
            and not isinstance(node.operand, ast.Constant)
        ):
            yield node, "sign", node.operand
        elif isinstance(node, ast.Call) and called(node) in KEEPS:
            name = KEEPS[called(node)]
            yield (
                node,
                f"{called(node)} -> {name}",
                ast.Call(ast.Name(name), node.args[: 2 if name == "clean" else 1], []),
            )
        elif isinstance(node, ast.Call) and called(node) in DROPS:
            yield node, f"drop {called(node)}", node.args[DROPS[called(node)]]
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(
            getattr(node, "ctx", None), ast.Load
        ):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
            if name in SWAPS:
                other = copy.deepcopy(node)
                setattr(other, "attr" if isinstance(node, ast.Attribute) else "id", SWAPS[name])
                yield node, f"{name} -> {SWAPS[name]}", other


def within(node: ast.expr, function: ast.FunctionDef) -> bool:
    return function.lineno <= node.lineno <= (function.end_lineno or 0)


class Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST):
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else super().generic_visit(node)


def mutants(path: Path) -> Iterator[tuple[str, str]]:
    """`(name, source)` of every mutant of a file; the helpers that a mutant needs are imported."""
    source = path.read_text()
    tree = ast.parse(source)
    for i, (node, what, _) in enumerate(mutations(tree)):
        fresh = ast.parse(source)
        old, _, new = list(mutations(fresh))[i]
        changed = ast.fix_missing_locations(Replace(old, new).visit(fresh))
        helpers = (
            "" if path.name == "_common.py" else "from rlhf.losses._common import clean, widen\n"
        )
        where = next(
            (f.name for f in tree.body if isinstance(f, ast.FunctionDef) and within(node, f)), ""
        )
        yield f"{path.stem}.{where}:{node.lineno}: {what}", helpers + ast.unparse(changed)


def kill(name: str, source: str, folder: Path) -> bool:
    """Whether a test in the copy of the project at `folder` notices."""
    module, function = name.split(":")[0].split(".")
    target = folder / "losses" / f"{module}.py"
    original = target.read_text()
    target.write_text(source)
    try:
        return any(not green(*tests) for tests in suites(folder, module, function))
    finally:
        target.write_text(original)


def suites(folder: Path, module: str, function: str) -> Iterator[tuple[str, ...]]:
    """The tests that a mutant must pass, those that are quick and likely to notice first."""
    contract, properties = "tests/losses/test_contract.py", "tests/losses/test_properties.py"
    private = module.startswith("_")
    if not private:
        yield (f"rlhf/losses/{module}.py",)
    if not private and not function.startswith("_"):
        yield contract, "-k", f"{module}.{function}"
    seen: set[Path] = set()
    for word in (function, module):  # tests that name the function, then those that name its module
        named = re.compile(rf"\b{word}\b")
        files = [
            file for pattern in QUICK for file in sorted((folder / "tests/losses").glob(pattern))
        ]
        files = [
            file
            for file in files
            if file not in seen and (private or named.search(file.read_text()))
        ]
        seen |= set(files)
        if files:
            yield tuple(map(str, files))
    yield (contract, properties) if private else (contract, properties, "-k", f"{module}.")


def green(*tests: str) -> bool:
    """Runs tests in a child, which need not import again what this process has imported (nothing of the project)."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = int(pytest.main(["-n0", "-qx", "-m", "", "-p", "no:cacheprovider", *tests]))
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (0, 5)


def work(mutants_: list[tuple[str, str]], folder: Path, compiled: Path) -> list[str]:
    """The mutants that survive in a copy of the project; runs as a process of its own."""
    os.chdir(folder)
    sys.path[:0] = [str(folder), str(folder / "tests")]
    sys.dont_write_bytecode = True
    log = os.open(os.devnull, os.O_WRONLY)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(log, 1), os.dup2(log, 2)
    os.environ |= {  # what a mutant does not touch compiles once
        "JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"
    }  # fmt: skip
    runpy.run_path(str(folder / "tests" / "conftest.py"))
    for name in ("chex", "jax.test_util", "optax", "scipy.optimize"):
        importlib.import_module(name)
    if not green("rlhf/losses/kl.py", "tests/losses/test_contract.py", "-k", "kl.k3 or rlhf"):
        raise RuntimeError("the tests are red without a mutant; run pytest tests/losses")
    survivors = []
    for name, source in mutants_:
        dead = kill(name, source, folder)
        print("killed  " if dead else "SURVIVES", name, file=out, flush=True)
        survivors += [] if dead else [name]
    return survivors


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--module", action="append", help="a module of losses; all if not given")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--every", type=int, default=1, help="try only every n-th mutant")
    parser.add_argument("--list", action="store_true", help="name the mutants and stop")
    args = parser.parse_args()
    paths = sorted((ROOT / "losses").glob("*.py"))
    chosen = [m for p in paths if not args.module or p.stem in args.module for m in mutants(p)][
        :: args.every
    ]
    if args.list:
        print(*(name for name, _ in chosen), sep="\n")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / str(i) for i in range(args.jobs)]
        for folder in folders:
            shutil.copytree(
                ROOT,
                folder,
                symlinks=True,
                ignore=shutil.ignore_patterns(".git", "runs", "__pycache__"),
            )
        parts = [chosen[i :: args.jobs] for i in range(args.jobs)]
        with concurrent.futures.ProcessPoolExecutor(
            args.jobs, multiprocessing.get_context("spawn")
        ) as pool:
            compiled = [Path(temporary) / "compiled"] * args.jobs
            survivors = [name for part in pool.map(work, parts, folders, compiled) for name in part]
    print(
        f"{len(chosen)} mutants, {len(survivors)} survive ({len(survivors) / max(len(chosen), 1):.1%})"
    )
    print(
        *(f"  {name}  {EQUIVALENT.get(name, 'UNEXPLAINED')}" for name in sorted(survivors)),
        sep="\n",
    )
    return any(name not in EQUIVALENT for name in survivors)


if __name__ == "__main__":
    sys.exit(main())
