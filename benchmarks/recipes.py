"""Every recipe on a generated task, three seeds: does it learn?

    python benchmarks/recipes.py [--only sft grpo …] [--seeds 0 1 2] [--runs DIR] [--json benchmarks/results/recipes.json]

`rlhf new` makes a small model, `rlhf sft` teaches it a little of the task (a weak policy), and each recipe goes on from there
by its command.  Policies are judged by `rlhf eval` on questions of their own: the share of drawn answers that are right, before
and after; others by a figure of rows that they were not trained on.  Runs that DIR holds are read, not made again.
"""

import contextlib
import io
import json
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import report

from rlhf import cli
from rlhf.runs import metrics_of

TASK = "task:reverse"
EVAL = ["--dataset_size", "256", "--max_new_tokens", "8", "--num_samples", "4", "--seed", "1000"]


class Recipe(NamedTuple):
    """A command's options, and from which figure on it has learned."""

    options: str
    least: float  # of the figure, after training
    figure: str = "pass@1"  # of `rlhf eval`, or one of the run's own
    start: str = "weak"  # the model it begins with
    task: str = TASK


RECIPES: dict[str, Recipe] = {
    "sft": Recipe("--batch_size 64 --learning_rate 3e-3 --steps 100", 0.3, start="new"),
}


def run(*words: str) -> None:
    """A command of `rlhf` that must succeed; what it says is shown only if it does not."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = cli.main(list(words))
    if code:
        raise SystemExit(f"rlhf {' '.join(words)}\n{said.getvalue()}")


def begun(folder: Path, start: str, task: str, seed: int) -> Path:
    """The model that a recipe begins with: new, or a weak policy of its task."""
    new, weak = folder / f"new-{task.replace(':', '-')}-{seed}", folder / f"weak-{task.replace(':', '-')}-{seed}"
    if not new.exists():
        run("new", str(new), "--task", task, "--seed", str(seed))
    if start == "weak" and not (weak / "model").exists():
        knobs = "--batch_size 64 --learning_rate 3e-3 --steps 100 --log_every 10".split()
        run("sft", "--model", str(new), "--dataset", task, *knobs, "--seed", str(seed), "--output", str(weak))
    return weak / "model" if start == "weak" else new


def judged(model: Path, recipe: Recipe) -> float:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert cli.main(["eval", str(model), "--dataset", recipe.task, *EVAL]) == 0
    words = said.getvalue().split()
    return float(words[words.index(recipe.figure) + 1])


def learned(name: str, recipe: Recipe, seed: int, folder: Path) -> dict:
    """Before, after and seconds of one run."""
    model, target = begun(folder, recipe.start, recipe.task, seed), folder / f"{name}-{seed}"
    command = name.split("-")[0]
    found = target / "learned.json"
    if not found.exists():
        own = recipe.figure != "pass@1"
        begin = time.perf_counter()
        judge = ["--eval_dataset", recipe.task] if own else []
        options = [*recipe.options.split(), *judge, "--log_every", "10", "--seed", str(seed)]
        run(command, "--model", str(model), "--dataset", recipe.task, *options, "--output", str(target))
        seconds = time.perf_counter() - begin
        if own:
            rows = [row[recipe.figure] for row in metrics_of(target) if recipe.figure in row]
            figures = {"before": rows[0] if len(rows) > 1 else float("nan"), "after": rows[-1]}
        else:
            figures = {"before": judged(model, recipe), "after": judged(target / "model", recipe)}
        found.write_text(json.dumps({**figures, "seconds": seconds}))
    return json.loads(found.read_text())


def main():
    parser = report.arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, help="folder for the runs (default: a temporary one)")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.only:
            recipe = RECIPES[name]
            found = [learned(name, recipe, seed, args.runs or Path(temporary)) for seed in args.seeds]
            after = [one["after"] for one in found]
            rows.append(
                {"recipe": name, "task": recipe.task.removeprefix("task:"), "figure": recipe.figure,
                 "before": " ".join(f"{one['before']:.2f}" for one in found), "after": " ".join(f"{x:.2f}" for x in after),
                 "at least": recipe.least, "learned": "yes" if min(after) >= recipe.least else "NO",
                 "seconds": max(one["seconds"] for one in found)}
            )  # fmt: skip
    report.show("every recipe on its task, seeds " + " ".join(map(str, args.seeds)), rows, args.json)
    if any(row["learned"] == "NO" for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
