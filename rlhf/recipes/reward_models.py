"""Reward models as judges of answers: those with the policy's tokens read the tokens, all others read the text."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from rlhf import data, rollouts
from rlhf.data.types import Row
from rlhf.fields import documented
from rlhf.models import huggingface
from rlhf.models.config import TransformerConfig
from rlhf.rollouts import Rollout, reward_functions
from rlhf.runs import model_of


@documented
class Found(NamedTuple):
    """A reward model that is not loaded yet, and the tokenizers of both sides.

    Attributes:
      name: as it was given.
      folder: of the model.
      config: of the model.
      tokenizer: its own.
      policy: the policy's tokenizer.
    """

    name: str
    folder: str
    config: TransformerConfig
    tokenizer: Any
    policy: Any

    @property
    def causal(self) -> bool:
        """Whether it is a decoder, which reads a rollout's tokens as they lie; an encoder needs a text's special tokens."""
        return self.config.causal

    @property
    def same_tokens(self) -> bool:
        """Whether it can read the policy's tokens as they are."""
        return self.causal and self.tokenizer.get_vocab() == self.policy.get_vocab()


def find(name: str, tokenizer: Any) -> Found:
    """A run's reward model, or that of a folder or name, without loading it.

    Args:
      name: of a run, a folder, or on the Hub.
      tokenizer: the policy's.

    Raises: ValueError for an encoder-decoder, and a tokenizer that cannot read texts; as `huggingface.load_tokenizer`.
    """
    folder = model_of(name)
    own, config = huggingface.load_tokenizer(folder), huggingface.read_config(folder)
    if not isinstance(config, TransformerConfig):
        raise ValueError(f"reward {name} is an encoder-decoder, which cannot be a reward model here; take a decoder or encoder")
    found = Found(name, folder, config, own, tokenizer)
    if not found.same_tokens:
        try:
            tokens_of(found, [{"prompt": "1", "completion": "1"}])
        except ValueError as error:
            raise ValueError(
                f"reward {name} has another tokenizer than the policy and cannot read its texts: {error}"
            ) from None
    return found


def judge(found: Found) -> Callable:
    """Loads it as `(rollout, columns, samples a prompt) -> (rewards [B], figures)`.

    Where its tokens are others than the policy's, or the policy is an encoder-decoder, whose rollouts hold the prompt apart, it
    reads texts: the prompt of the row and the decoded answer, as `rlhf reward` reads its rows.  Conversations go through its
    own chat template; without one their contents stand one below the other.  Of a text longer than its positions it reads the
    first token and the last ones.  A text that it cannot read has no reward (NaN).

    Raises: ValueError where it is no model of one number a text; where called, if it can read none of a batch's texts.
    """
    try:
        lm, head, params, _ = huggingface.load_classifier(found.folder)
    except ValueError as error:
        raise ValueError(f"reward {found.name}: {error}; is it a reward model, as `rlhf reward` writes them?") from None
    labels = params["head"]["weight"].shape[-1]
    if head.reads == "every" or labels != 1:
        what = "judges every token" if head.reads == "every" else f"has {labels} labels"
        raise ValueError(
            f"reward {found.name} {what}, but a reward is one number a text; take a model that `rlhf reward` wrote"
        )
    of_tokens, same = reward_functions.model_reward(lm, head, params), found.same_tokens

    def score(rollout: Rollout, columns: Mapping[str, list], samples: int):
        if same and rollout.inputs is None:
            scores = of_tokens(rollout)
        else:
            texts = _readable(found, texts_of(found.policy, rollout, columns, samples))
            scores = jnp.asarray(reward_functions.score_rows(lm, head, params, texts, max_length=found.config.max_positions))
        return scores, {f"rewards/{found.name}/mean": jnp.nanmean(scores)}

    return score


def texts_of(tokenizer: Any, rollout: Rollout, columns: Mapping[str, list], samples: int) -> list[Row]:
    """Prompts and answers of a rollout as rows: prompts as they were written where the columns hold them, else decoded.

    Args:
      tokenizer: the policy's.
      rollout: of `samples` answers a prompt.
      columns: of the prompts' rows; of `prompt` and `tools` is made use.
      samples: answers a prompt.
    """
    answers = rollouts.text.completions(tokenizer, rollout)
    if "prompt" in columns:
        prompts = [prompt for prompt in columns["prompt"] for _ in range(samples)]
    else:
        prompts = rollouts.text.prompts(tokenizer, rollout)
    tools = [each for each in columns.get("tools", [None] * (len(answers) // samples)) for _ in range(samples)]
    rows = []
    for prompt, answer, tool in zip(prompts, answers, tools, strict=True):
        said = answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]
        rows.append({"prompt": prompt, "completion": said} | ({"tools": tool} if tool else {}))
    return rows


def tokens_of(found: Found, rows: list[Row]) -> list[list[int]]:
    """Prompts and answers in the reward model's tokens, as `rlhf reward` reads them.

    Raises: ValueError for a row that its template or tokenizer refuses.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of what the answers hold, at every step
        if not found.causal:
            read = data.tokenize_whole(found.tokenizer, rows)
        elif found.tokenizer.chat_template is None:
            whole = [data.contents(data.joined(row["prompt"], row["completion"])) for row in rows]
            read = data.tokenize_texts(found.tokenizer, [{"text": text} for text in whole])
        else:
            read = data.tokenize_completions(found.tokenizer, rows)
    return [row.tokens for row in read]


def _readable(found: Found, rows: list[Row]) -> list[list[int]]:
    """The tokens of all rows, [] where one cannot be read.  Raises: ValueError where none can."""
    try:
        return tokens_of(found, rows)
    except ValueError:
        pass
    read: list[list[int]] = []
    problems = []
    for row in rows:
        try:
            read += tokens_of(found, [row])
        except ValueError as error:
            problems.append(str(error).removeprefix("row 0: "))
            read.append([])
    if len(problems) == len(rows):
        raise ValueError(f"reward {found.name} can read none of {len(rows)} answers: {problems[0]}")
    return read
