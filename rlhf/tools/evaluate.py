"""A model's answers, scored."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf import rollouts
from rlhf.models import huggingface
from rlhf.recipes import online, setup
from rlhf.recipes.online import Sampling, Scoring


def load_run(model: str) -> tuple[Any, Any, Any]:
    """`rlhf.load` of a run's model, or of a model's folder or name."""
    inside = Path(model) / "model"
    return huggingface.load(inside if (inside / "config.json").exists() else model)


def main(
    model: str, source: setup.Data, scoring: Scoring, sampling: Sampling, *, batch_size: int = 32, output: str | None = None,
    seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Scores a model's answers to the questions of a data set: the likeliest ones, and `num_samples` drawn ones as pass@k.

    An answer passes with a reward of at least 1.

    Args:
      model: a run's folder, or a model's folder or name.
      batch_size: prompts at a time.
      output: a .jsonl file for the answers.
      seed: of what is drawn.
    """
    lm, params, tokenizer = load_run(model)
    judge = scoring.judge(source, tokenizer)
    questions = online.Questions.of(tokenizer, source.questions())
    answer = partial(rollouts.generate, lm, params, max_new_tokens=sampling.max_new_tokens, eos_ids=online.ends(tokenizer))
    likeliest, drawn, lines = [], [], []
    for number, chosen in enumerate(np.array_split(np.arange(len(questions.rows)), -(-len(questions.rows) // batch_size))):
        asked = questions.asked(chosen, jax.random.fold_in(jax.random.key(seed), number))
        best = answer(asked.prompts, asked.key, sampler=rollouts.greedy())
        several = answer(asked.prompts, asked.key, sampler=sampling.sampler(), num_samples=sampling.num_samples)
        likeliest.append(np.asarray(judge(best, asked.columns, 1)[0], float))
        drawn.append(np.asarray(judge(several, asked.columns, sampling.num_samples)[0], float).reshape(len(chosen), -1))
        texts = rollouts.text.prompts(tokenizer, best), rollouts.text.completions(tokenizer, best)
        lines += [dict(prompt=p, completion=c, reward=float(r)) for p, c, r in zip(*texts, likeliest[-1], strict=True)]
    right = np.nan_to_num(np.concatenate(drawn)) >= 1
    figures = {"rows": len(questions.rows), "reward": float(np.nanmean(np.concatenate(likeliest)))}
    figures |= {"reward_drawn": float(np.nanmean(np.concatenate(drawn)))}
    for k in dict.fromkeys((1, 2, 4, 8, sampling.num_samples)):
        if k <= sampling.num_samples:
            figures[f"pass@{k}"] = float(np.mean(rollouts.pass_at_k(right, k)))
    if output is not None:
        Path(output).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print("  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    return figures
