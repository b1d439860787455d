"""A model's completions, scored."""

import json
import sys
from functools import partial
from typing import Any

import jax
import numpy as np

from rlhf import files, rollouts
from rlhf.models.huggingface import load_tokenizer
from rlhf.ranges import Count, Length, Seed, checked
from rlhf.tools import saved
from rlhf.training import datasets, meshes, model_info, prompts, rewards
from rlhf.training.options import (
    GroupSamplingOptions,
    MeshOptions,
    ModelOptions,
    RewardOptions,
    SourceOptions,
)
from rlhf.training.runs import model_of


def wins(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """1 where our reward is higher, 0.5 where they are equal, NaN where one could not be scored.

    >>> wins(np.array([1.0, 1.0, 0.0, 1.0]), np.array([0.0, 1.0, 1.0, np.nan])).tolist()
    [1.0, 0.5, 0.0, nan]
    """
    return np.where(np.isnan(ours + theirs), np.nan, np.where(ours == theirs, 0.5, ours > theirs))


def sample_lines(
    prompts: list[str],
    completions: list[list[str]],
    rewards: list[list[float]],
    reasons: list[list[str | None]],
) -> list[dict]:
    """Lines of `--output`: the samples of every prompt, the first of them the likeliest; why a
    reward is none, where it is.

    >>> sample_lines(["1+1="], [["2", "3"]], [[1.0, float("nan")]], [[None, "too slow"]])[1]
    {'prompt': '1+1=', 'completion': '3', 'reward': None, 'sample': 1, 'reason': 'too slow'}
    """
    lines = []
    for prompt, *samples in zip(prompts, completions, rewards, reasons, strict=True):
        for sample, (text, reward, reason) in enumerate(zip(*samples, strict=True)):
            value = None if np.isnan(reward) else reward
            line = {"prompt": prompt, "completion": text, "reward": value, "sample": sample}
            lines.append(line if reason is None else line | {"reason": reason})
    return lines


@checked
def main(
    model: str,
    dataset: SourceOptions,
    reward: RewardOptions,
    sampling: GroupSamplingOptions,
    mesh: MeshOptions,
    *,
    against: str | None = None,
    preference: str | None = None,
    batch_size: Count = 32,
    output: str | None = None,
    seed: Seed = 0,
    eos_token: str | None = None,
    max_prompt_length: Length | None = None,
    overwrite: bool = False,
) -> dict[str, float]:
    """Scores a model's completions of the prompts of a data set: the likeliest ones, and
    `num_samples` sampled ones as pass@k.

    A completion passes with a reward of at least 1.

    Args:
      model: a run's folder, or a model's folder or name.
      against: another, with the same tokenizer: how often the model's likeliest completion wins, a
        tie counting half.
      preference: who wins, as module:function of lists of prompts, completions and the other's
        completions, to numbers from 0 to 1, None where it cannot say; null: the higher reward.
      batch_size: prompts at a time.
      output: a .jsonl file for the completions, one a line: its prompt, completion, reward (null:
        none could be given), and its sample, 0 for the likeliest and 1 … num_samples for the
        sampled ones.
      seed: of what is sampled.
      eos_token: the token that ends a completion, such as <|im_end|>; null: what the tokenizer's
        files name.
      max_prompt_length: leave out prompts of more tokens; null: none.
      overwrite: write over the file if it exists.
    """
    # Everything that can be wrong is found before a model loads: the output first of all.
    if output is not None:
        named = [
            name for name in (dataset.dataset, *(reward.reward or [])) if isinstance(name, str)
        ]
        files.check_output(output, inputs=[model, against, *named], overwrite=overwrite)
    if preference and not against:
        raise ValueError("preference says who wins against another model; give --against")
    prefer = rewards.preference(preference, reward.reward_timeout) if preference else None
    options = ModelOptions(model, eos_token=eos_token)
    tokenizer = model_info.load_tokenizer(options)
    if against and load_tokenizer(model_of(against)).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"{against} has another tokenizer than {model}; they must share one")
    seq2seq = model_info.load_seq2seq(options, tokenizer)
    say = partial(print, file=sys.stderr)
    rows = datasets.read_held_out(dataset)
    prompt_set = prompts.tokenize(
        tokenizer, rows, seq2seq, max_prompt_length=max_prompt_length, say=say
    )
    for name in filter(None, (model, against)):
        model_info.check_tokens(
            ModelOptions(name),
            tokenizer,
            prompt_set.prompts,
            max_new_tokens=sampling.max_new_tokens,
        )
    score = rewards.load(reward, dataset, tokenizer, prompt_set.rows)
    strings = rollouts.stop_strings(tokenizer, sampling.stop) if sampling.stop else None
    devices = meshes.make(mesh)
    policy = saved.load(model, devices, eos_token)
    rival = saved.load(against, devices, eos_token) if against else None

    likeliest: list[np.ndarray] = []
    sampled: list[np.ndarray] = []
    won: list[np.ndarray] = []
    lines: list[dict] = []
    num_samples = sampling.num_samples
    # Parts of nearly one size rather than a short last one: two compiled shapes at most.
    number_of_batches = -(-len(prompt_set.rows) // batch_size)
    for number, chosen in enumerate(
        np.array_split(np.arange(len(prompt_set.rows)), number_of_batches)
    ):
        batch = prompt_set.select(chosen, jax.random.fold_in(jax.random.key(seed), number))
        settings: dict[str, Any] = dict(
            prompts=batch.prompts,
            key=batch.key,
            max_new_tokens=sampling.max_new_tokens,
            stop=strings,
        )
        # Its own pass beside the samples: pass@k wants samples, win rate and reward the likeliest.
        best = policy.sample(**settings, sampler=rollouts.greedy())
        several = policy.sample(
            **settings, sampler=sampling.sampler(policy.eos_ids), num_samples=num_samples
        )
        of_best = score(best, batch.columns, 1)
        likeliest.append(np.asarray(of_best.rewards, float))
        of_several = score(several, batch.columns, num_samples)
        sampled.append(np.asarray(of_several.rewards, float).reshape(len(chosen), -1))
        texts = rollouts.text.prompts(tokenizer, best), rollouts.text.completions(tokenizer, best)
        several_texts = np.reshape(rollouts.text.completions(tokenizer, several), (len(chosen), -1))
        if rival:
            other = rival.sample(**settings, sampler=rollouts.greedy())
            # A preference function compares the texts where one is given; else the higher reward
            # wins.
            if prefer:
                won.append(prefer(*texts, rollouts.text.completions(tokenizer, other)))
            else:
                won.append(
                    wins(likeliest[-1], np.asarray(score(other, batch.columns, 1).rewards, float))
                )
        completions = np.column_stack([texts[1], several_texts]).tolist()
        values = np.column_stack([likeliest[-1], sampled[-1]]).tolist()
        # Sample 0 is the likeliest, samples of a prompt are neighbours: one list a prompt.
        reasons = [
            [reason, *of_several.reasons[i * num_samples : (i + 1) * num_samples]]
            for i, reason in enumerate(of_best.reasons)
        ]
        lines += sample_lines(texts[0], completions, values, reasons)
    # A completion that could not be scored has not passed; in the means it has no part.
    passed = np.nan_to_num(np.concatenate(sampled)) >= 1
    metrics = {"rows": len(prompt_set.rows), "reward": float(np.nanmean(np.concatenate(likeliest)))}
    metrics |= {"reward_sampled": float(np.nanmean(np.concatenate(sampled)))}
    if won:
        metrics["win_rate"] = float(np.nanmean(np.concatenate(won)))
    # `fromkeys`: `num_samples` may be one of the others.
    for k in dict.fromkeys((1, 2, 4, 8, num_samples)):
        if k <= num_samples:
            metrics[f"pass@{k}"] = float(np.mean(rollouts.pass_at_k(passed, k)))
    if output is not None:
        files.write(output, "".join(json.dumps(line) + "\n" for line in lines))
    print("  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    return metrics
