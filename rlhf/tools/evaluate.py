"""A model's answers, scored."""

import json
import sys
from functools import partial

import jax
import numpy as np

from rlhf import files, rollouts
from rlhf.models.huggingface import load_tokenizer
from rlhf.ranges import Count, Length, Seed, checked
from rlhf.recipes import online, setup
from rlhf.recipes.online import Sampling, Scoring
from rlhf.recipes.online_scoring import preference
from rlhf.runs import model_of
from rlhf.tools import saved


def wins(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """1 where our reward is higher, 0.5 where they are equal, NaN where one could not be scored.

    >>> wins(np.array([1.0, 1.0, 0.0, 1.0]), np.array([0.0, 1.0, 1.0, np.nan])).tolist()
    [1.0, 0.5, 0.0, nan]
    """
    return np.where(np.isnan(ours + theirs), np.nan, np.where(ours == theirs, 0.5, ours > theirs))


def answers(
    prompts: list[str], completions: list[list[str]], rewards: list[list[float]], reasons: list[list[str | None]]
) -> list[dict]:
    """Lines of `--output`: the samples of every prompt, the first of them the likeliest; why a reward is none, where it is.

    >>> answers(["1+1="], [["2", "3"]], [[1.0, float("nan")]], [[None, "too slow"]])[1]
    {'prompt': '1+1=', 'completion': '3', 'reward': None, 'sample': 1, 'reason': 'too slow'}
    """
    lines = []
    for prompt, *samples in zip(prompts, completions, rewards, reasons, strict=True):
        for sample, (text, reward, why) in enumerate(zip(*samples, strict=True)):
            line = {"prompt": prompt, "completion": text, "reward": None if np.isnan(reward) else reward, "sample": sample}
            lines.append(line if why is None else line | {"reason": why})
    return lines


@checked
def main(
    model: str, source: setup.Source, scoring: Scoring, sampling: Sampling, *, against: str | None = None,
    judge: str | None = None, batch_size: Count = 32, output: str | None = None, seed: Seed = 0,
    eos_token: str | None = None, max_prompt_length: Length | None = None,
    overwrite: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Scores a model's answers to the questions of a data set: the likeliest ones, and `num_samples` drawn ones as pass@k.

    An answer passes with a reward of at least 1.

    Args:
      model: a run's folder, or a model's folder or name.
      against: another, with the same tokenizer: how often the model's likeliest answer wins, a tie counting half.
      judge: who wins, as module:function of lists of prompts, answers and the other's answers, to numbers from 0 to 1, None
        where it cannot say; null: the higher reward.
      batch_size: prompts at a time.
      output: a .jsonl file for the answers, one a line: its prompt, completion, reward (null: none could be given), and its
        sample, 0 for the likeliest and 1 … num_samples for those drawn.
      seed: of what is drawn.
      eos_token: the token that ends an answer, such as <|im_end|>; null: what the tokenizer's files name.
      max_prompt_length: leave out prompts of more tokens; null: none.
      overwrite: write over the file if it exists.
    """
    if output is not None:
        files.check_output(output, inputs=[model, against, source.dataset, *(scoring.reward or [])], overwrite=overwrite)
    if judge and not against:
        raise ValueError("judge says who wins against another model; give --against")
    prefer = preference(judge, scoring.reward_timeout) if judge else None
    tokenizer = load_tokenizer(model_of(model), eos_token=eos_token)
    if against and load_tokenizer(model_of(against)).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"{against} has another tokenizer than {model}; they must share one")
    seq2seq = setup.Model(model_of(model)).seq2seq(tokenizer)
    say = partial(print, file=sys.stderr)
    questions = online.Questions.of(tokenizer, source.questions(), seq2seq, most=max_prompt_length, say=say)
    for name in filter(None, (model, against)):
        setup.Model(model_of(name)).check(tokenizer, questions.prompts, more=sampling.max_new_tokens)
    score = scoring.judge(source, tokenizer, questions.rows).explained
    own, rival = saved.load(model, eos_token), saved.load(against, eos_token) if against else None

    likeliest, drawn, won, lines = [], [], [], []
    for number, chosen in enumerate(np.array_split(np.arange(len(questions.rows)), -(-len(questions.rows) // batch_size))):
        asked = questions.asked(chosen, jax.random.fold_in(jax.random.key(seed), number))
        asking = dict(prompts=asked.prompts, key=asked.key, max_new_tokens=sampling.max_new_tokens)
        best = own.answer(**asking, sampler=rollouts.greedy())
        several = own.answer(**asking, sampler=sampling.sampler(), num_samples=sampling.num_samples)
        judged = score(best, asked.columns, 1)
        likeliest.append(np.asarray(judged.rewards, float))
        judged_drawn = score(several, asked.columns, sampling.num_samples)
        drawn.append(np.asarray(judged_drawn.rewards, float).reshape(len(chosen), -1))
        texts = rollouts.text.prompts(tokenizer, best), rollouts.text.completions(tokenizer, best)
        sampled = np.reshape(rollouts.text.completions(tokenizer, several), (len(chosen), -1))
        if rival:
            other = rival.answer(**asking, sampler=rollouts.greedy())
            if prefer:
                won.append(prefer(*texts, rollouts.text.completions(tokenizer, other)))
            else:
                won.append(wins(likeliest[-1], np.asarray(score(other, asked.columns, 1)[0], float)))
        completions = np.column_stack([texts[1], sampled]).tolist()
        rewards = np.column_stack([likeliest[-1], drawn[-1]]).tolist()
        each = sampling.num_samples
        reasons = [[why, *judged_drawn.reasons[i * each : (i + 1) * each]] for i, why in enumerate(judged.reasons)]
        lines += answers(texts[0], completions, rewards, reasons)
    right = np.nan_to_num(np.concatenate(drawn)) >= 1
    figures = {"rows": len(questions.rows), "reward": float(np.nanmean(np.concatenate(likeliest)))}
    figures |= {"reward_drawn": float(np.nanmean(np.concatenate(drawn)))}
    if won:
        figures["win_rate"] = float(np.nanmean(np.concatenate(won)))
    for k in dict.fromkeys((1, 2, 4, 8, sampling.num_samples)):
        if k <= sampling.num_samples:
            figures[f"pass@{k}"] = float(np.mean(rollouts.pass_at_k(right, k)))
    if output is not None:
        files.write(output, "".join(json.dumps(line) + "\n" for line in lines))
    print("  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    return figures
