"""Every recipe on a generated task, three seeds: does it learn?

    python benchmarks/recipes.py [--only sft grpo …] [--seeds 0 1 2] [--runs DIR] [--json benchmarks/results/recipes.json]

`rlhf new` makes a small model, `rlhf sft` teaches it a little of the task (a weak policy), and each recipe goes on from there
by its command.  Policies are measured by `rlhf eval` on prompts of their own: the share of sampled completions that are right,
before and after; others by a metric of rows that they were not trained on.  Runs that DIR holds are read, not made again.
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
from rlhf.training.runs import metrics_of

TASK = "task:reverse"
EVAL = ["--dataset_size", "256", "--max_new_tokens", "8", "--num_samples", "4", "--seed", "1000"]


class Recipe(NamedTuple):
    """A command's options, and from which value of a metric on it has learned."""

    options: str
    least: float  # that pass@1 gains, or that another metric reaches
    metric: str = "pass@1"  # of `rlhf eval`, or one of the run's own
    start: str = "weak"  # the model it begins with
    task: str = TASK


SAMPLED = "--max_new_tokens 8 --learning_rate 5e-4"
RECIPES: dict[str, Recipe] = {
    "sft": Recipe("--batch_size 64 --learning_rate 3e-3 --steps 100", 0.35, start="new"),
    "gkd": Recipe("--teacher TEACHER --batch_size 64 --learning_rate 2e-3 --steps 150 --max_new_tokens 8", 0.35),
    "dpo": Recipe("--batch_size 64 --learning_rate 1e-3 --steps 100", 0.8, "eval_rewards/accuracies"),
    "kto": Recipe("--batch_size 64 --learning_rate 1e-3 --steps 100 --beta 1 --desirable_weight 2", 0.05),
    "bco": Recipe("--batch_size 64 --learning_rate 1e-3 --steps 100 --beta 1 --dataset_accuracy 0.75", 0.05),
    "orpo": Recipe("--batch_size 64 --learning_rate 3e-3 --steps 200", 0.05),
    "cpo": Recipe("--batch_size 64 --learning_rate 1e-3 --steps 100", 0.05),
    "reward": Recipe("--batch_size 64 --learning_rate 1e-3 --steps 300", 0.8, "eval_accuracy"),
    "prm": Recipe("--batch_size 64 --learning_rate 2e-3 --steps 400", 0.8, "eval_accuracy"),
    "grpo": Recipe("--max_new_tokens 8 --learning_rate 1e-3 --num_samples 8 --batch_size 32 --steps 150", 0.05),
    "rloo": Recipe(f"{SAMPLED} --num_samples 8 --batch_size 16 --mini_batches 2 --updates_per_batch 2 --steps 100", 0.05),
    "ppo": Recipe(f"{SAMPLED} --temperature 1 --batch_size 128 --lam 1.0 --steps 80", 0.05),
    "online_dpo": Recipe(f"{SAMPLED} --num_samples 8 --batch_size 32 --mini_batches 2 --steps 120", 0.05),
    "xpo": Recipe(f"{SAMPLED} --batch_size 128 --steps 120", 0.03),
    "nash_md": Recipe(f"{SAMPLED} --batch_size 128 --beta 0.01 --steps 120", 0.03),
    "rft": Recipe("--max_new_tokens 8 --num_samples 8 --batch_size 64 --learning_rate 1e-3 --steps 100", 0.03),
    "ilql": Recipe(
        "--max_new_tokens 10 --num_samples 4 --batch_size 128 --learning_rate 3e-3 --target_rate 0.1 --beta 4 --steps 300",
        0.9, "eval_reward", start="new", task="task:walks:4",
    ),
}  # fmt: skip


def run(*words: str) -> None:
    """A command of `rlhf` that must succeed; what it says is shown only if it does not."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = cli.main(list(words))
    if code:
        raise SystemExit(f"rlhf {' '.join(words)}\n{said.getvalue()}")


def begun(folder: Path, start: str, task: str, seed: int) -> Path:
    """The model that recipes begin with: new, a weak policy of the task, or a teacher, which has gone on from there."""
    target = folder / f"{start}-{task.replace(':', '-')}-{seed}"
    if start == "new":
        if not target.exists():
            run("new", str(target), "--task", task, "--seed", str(seed))
        return target
    if not (target / "model").exists():
        before, steps = ("new", "100") if start == "weak" else ("weak", "400")
        options = [
            "--dataset",
            task,
            "--batch_size",
            "64",
            "--learning_rate",
            "3e-3",
            "--steps",
            steps,
            "--log_every",
            "10",
        ]
        run(
            "sft",
            "--model",
            str(begun(folder, before, task, seed)),
            *options,
            "--seed",
            str(seed),
            "--output",
            str(target),
        )
    return target / "model"


def evaluated(model: Path, recipe: Recipe) -> float:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert cli.main(["eval", str(model), "--dataset", recipe.task, *EVAL]) == 0
    words = said.getvalue().split()
    return float(words[words.index(recipe.metric) + 1])


def learned(name: str, recipe: Recipe, seed: int, folder: Path) -> dict:
    """Before, after and seconds of one run."""
    model, target = begun(folder, recipe.start, recipe.task, seed), folder / f"{name}-{seed}"
    found = target / "learned.json"
    if not found.exists():
        own = recipe.metric != "pass@1"
        begin = time.perf_counter()
        held_out = ["--eval_dataset", recipe.task] if own else []
        taught = lambda word: (
            str(begun(folder, "teacher", recipe.task, seed)) if word == "TEACHER" else word
        )
        options = [
            *map(taught, recipe.options.split()),
            *held_out,
            "--log_every",
            "10",
            "--seed",
            str(seed),
        ]
        run(
            name, "--model", str(model), "--dataset", recipe.task, *options, "--output", str(target)
        )
        seconds = time.perf_counter() - begin
        if own:
            rows = [row[recipe.metric] for row in metrics_of(target) if recipe.metric in row]
            values = {"before": None, "after": rows[-1]}
        else:
            values = {
                "before": evaluated(model, recipe),
                "after": evaluated(target / "model", recipe),
            }
        found.write_text(json.dumps({**values, "seconds": seconds}))
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
            found = [
                learned(name, recipe, seed, args.runs or Path(temporary)) for seed in args.seeds
            ]
            after = [one["after"] for one in found]
            reached = [one["after"] - (one["before"] or 0.0) for one in found]
            shown = lambda values: " ".join("–" if x is None else f"{x:.2f}" for x in values)
            rows.append(
                {"recipe": name, "task": recipe.task.removeprefix("task:"), "metric": recipe.metric,
                 "before": shown(one["before"] for one in found), "after": shown(after),
                 "at least": recipe.least, "learned": "yes" if min(reached) >= recipe.least else "NO",
                 "seconds": max(one["seconds"] for one in found)}
            )  # fmt: skip
    report.show(
        "every recipe on its task, seeds " + " ".join(map(str, args.seeds)), rows, args.json
    )
    if any(row["learned"] == "NO" for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
