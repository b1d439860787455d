"""A model's answers, scored."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf import rollouts
from rlhf.models import huggingface
from rlhf.recipes import online, setup
from rlhf.recipes.online import Sampling, Scoring
from rlhf.recipes.online_scoring import function


def load_run(model: str) -> tuple[Any, Any, Any, tuple[int, ...]]:
    """`rlhf.load` of a run's model, or of a model's folder or name; and the tokens that end its answers."""
    inside = Path(model) / "model"
    name = str(inside) if (inside / "config.json").exists() else model
    lm, params, tokenizer = huggingface.load(name)
    return lm, params, tokenizer, online.ends(name, tokenizer)


def main(
    model: str, source: setup.Data, scoring: Scoring, sampling: Sampling, *, against: str | None = None,
    judge: str | None = None, batch_size: int = 32, output: str | None = None, seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Scores a model's answers to the questions of a data set: the likeliest ones, and `num_samples` drawn ones as pass@k.

    An answer passes with a reward of at least 1.

    Args:
      model: a run's folder, or a model's folder or name.
      against: another, with the same tokenizer: how often the model's likeliest answer wins, a tie counting half.
      judge: who wins, as module:function of lists of prompts, answers and the other's answers, to numbers from 0 to 1; null:
        the higher reward.
      batch_size: prompts at a time.
      output: a .jsonl file for the answers.
      seed: of what is drawn.
    """
    lm, params, tokenizer, eos_ids = load_run(model)
    score = scoring.judge(source, tokenizer)
    rival = load_run(against) if against else None
    if rival and rival[2].get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"{against} has another tokenizer than {model}; they must share one")
    prefer = function(judge) if judge else None
    questions = online.Questions.of(tokenizer, source.questions())

    def answer(prompts, key, of=(lm, params, tokenizer, eos_ids), **how):
        return rollouts.generate(*of[:2], prompts, key, max_new_tokens=sampling.max_new_tokens, eos_ids=of[3], **how)

    likeliest, drawn, wins, lines = [], [], [], []
    for number, chosen in enumerate(np.array_split(np.arange(len(questions.rows)), -(-len(questions.rows) // batch_size))):
        asked = questions.asked(chosen, jax.random.fold_in(jax.random.key(seed), number))
        best = answer(asked.prompts, asked.key, sampler=rollouts.greedy())
        several = answer(asked.prompts, asked.key, sampler=sampling.sampler(), num_samples=sampling.num_samples)
        likeliest.append(np.asarray(score(best, asked.columns, 1)[0], float))
        drawn.append(np.asarray(score(several, asked.columns, sampling.num_samples)[0], float).reshape(len(chosen), -1))
        texts = rollouts.text.prompts(tokenizer, best), rollouts.text.completions(tokenizer, best)
        if rival:
            other = answer(asked.prompts, asked.key, sampler=rollouts.greedy(), of=rival)
            said = rollouts.text.completions(tokenizer, other)
            theirs = np.asarray(score(other, asked.columns, 1)[0], float)
            higher = np.where(likeliest[-1] == theirs, 0.5, likeliest[-1] > theirs)
            wins.append(np.asarray(prefer(*texts, said), float) if prefer else higher)
        lines += [dict(prompt=p, completion=c, reward=float(r)) for p, c, r in zip(*texts, likeliest[-1], strict=True)]
    right = np.nan_to_num(np.concatenate(drawn)) >= 1
    figures = {"rows": len(questions.rows), "reward": float(np.nanmean(np.concatenate(likeliest)))}
    figures |= {"reward_drawn": float(np.nanmean(np.concatenate(drawn)))}
    if wins:
        figures["win_rate"] = float(np.concatenate(wins).mean())
    for k in dict.fromkeys((1, 2, 4, 8, sampling.num_samples)):
        if k <= sampling.num_samples:
            figures[f"pass@{k}"] = float(np.mean(rollouts.pass_at_k(right, k)))
    if output is not None:
        Path(output).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print("  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    return figures
