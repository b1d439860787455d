"""Reward models on completions: those with the policy's tokens read the tokens, all others read the
text.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from rlhf import data, rollouts
from rlhf.data.types import Row
from rlhf.fields import documented
from rlhf.models import huggingface
from rlhf.models.config import TransformerConfig
from rlhf.models.huggingface_config import config_of
from rlhf.rollouts import Rollout, reward_functions
from rlhf.training.runs import model_of


@documented
class Found(NamedTuple):
    """A reward model, and the tokenizers of both sides.

    Attributes:
      name: as it was given.
      source: its folder, which is not loaded yet, or `(lm, head, params)`.
      config: of the model.
      tokenizer: its own.
      policy_tokenizer: the policy's.
    """

    name: str
    source: str | tuple
    config: TransformerConfig
    tokenizer: Any
    policy_tokenizer: Any

    @property
    def causal(self) -> bool:
        """Whether it is a decoder, which reads a rollout's tokens as they lie; an encoder needs a
        text's special tokens.
        """
        return self.config.causal

    @property
    def same_tokens(self) -> bool:
        """Whether it can read the policy's tokens as they are."""
        return self.causal and self.tokenizer.get_vocab() == self.policy_tokenizer.get_vocab()


def find(given: str | tuple, policy_tokenizer: Any) -> Found:
    """A run's reward model, or that of a folder or name, without loading it; or one in memory.

    Args:
      given: a run, a folder, a name on the Hub, or what `rlhf.load_classifier` returns.
      policy_tokenizer: the policy's.

    Raises: ValueError for an encoder-decoder, and a tokenizer that cannot read texts; as
    `huggingface.load_tokenizer`.
    """
    source: str | tuple
    if isinstance(given, str):
        name = given
        source = model_of(name)
        tokenizer = huggingface.load_tokenizer(source)
        config = huggingface.read_config(source)
    else:
        if len(given) != 4:
            raise ValueError(
                f"reward has {len(given)} parts; give (lm, head, params, tokenizer) of "
                "rlhf.load_classifier"
            )
        name = "reward_model"
        *model, tokenizer = given
        source = tuple(model)
        config = config_of(model[0])
    if not isinstance(config, TransformerConfig):
        raise ValueError(
            f"reward {name} is an encoder-decoder, which cannot be a reward model here; take a "
            "decoder or encoder"
        )
    found = Found(name, source, config, tokenizer, policy_tokenizer)
    if not found.same_tokens:
        try:
            # A chat template that fails, or a tokenizer without the tokens it needs, fails on any
            # row: here rather than after the first sampling.
            tokens_of(found, [{"prompt": "1", "completion": "1"}])
        except ValueError as error:
            raise ValueError(
                f"reward {name} has another tokenizer than the policy and cannot read its texts: "
                f"{error}"
            ) from None
    return found


def load(found: Found) -> Callable:
    """Loads it as `(rollout, columns, num_samples) -> (rewards [B], metrics)`.

    Where its tokens are others than the policy's, or the policy is an encoder-decoder, whose
    rollouts hold the prompt apart, it reads texts: the prompt of the row and the decoded
    completion, as `rlhf reward` reads its rows.  Conversations go through its own chat template;
    without one their contents stand one below the other.  Of a text longer than its positions it
    reads the first token and the last ones.  A text that it cannot read has no reward (NaN).

    Raises: ValueError where it is no model of one number a text; where called, if it can read none
    of a batch's texts.
    """
    if isinstance(found.source, str):
        try:
            lm, head, params, _ = huggingface.load_classifier(found.source)
        except ValueError as error:
            raise ValueError(
                f"reward {found.name}: {error}; is it a reward model, as `rlhf reward` writes them?"
            ) from None
    else:
        lm, head, params = found.source
    labels = params["head"]["weight"].shape[-1]
    if head.reads == "every" or labels != 1:
        what = "scores every token" if head.reads == "every" else f"has {labels} labels"
        raise ValueError(
            f"reward {found.name} {what}, but a reward is one number a text; take a model that "
            "`rlhf reward` wrote"
        )
    of_tokens = reward_functions.model_reward(lm, head, params)
    same_tokens = found.same_tokens
    max_length = found.config.max_positions

    def score(rollout: Rollout, columns: Mapping[str, list], num_samples: int):
        # No detour over text: decoding and tokenising may merge tokens otherwise, and costs the
        # host.
        if same_tokens and rollout.inputs is None:
            scores = of_tokens(rollout)
        else:
            texts = _readable(
                found, texts_of(found.policy_tokenizer, rollout, columns, num_samples)
            )
            scores = jnp.asarray(
                reward_functions.score_rows(lm, head, params, texts, max_length=max_length)
            )
        # NaN is a text that could not be read; it has no part in the mean.
        return scores, {f"rewards/{found.name}/mean": jnp.nanmean(scores)}

    return score


def texts_of(
    tokenizer: Any, rollout: Rollout, columns: Mapping[str, list], num_samples: int
) -> list[Row]:
    """Prompts and completions of a rollout as rows: prompts as they were written where the columns
    hold them, else decoded.

    Args:
      tokenizer: the policy's.
      rollout: of `num_samples` completions a prompt.
      columns: of the prompts' rows; of `prompt` and `tools` is made use.
      num_samples: completions a prompt.
    """
    # A prompt as it was written: decoded, a conversation would be text with template marks in it.
    completions = rollouts.text.completions(tokenizer, rollout)
    if "prompt" in columns:
        prompts = [prompt for prompt in columns["prompt"] for _ in range(num_samples)]
    else:
        prompts = rollouts.text.prompts(tokenizer, rollout)
    of_prompts = columns.get("tools", [None] * (len(completions) // num_samples))
    tools = [each for each in of_prompts for _ in range(num_samples)]
    rows = []
    for prompt, text, tool in zip(prompts, completions, tools, strict=True):
        completion = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        rows.append(
            {"prompt": prompt, "completion": completion} | ({"tools": tool} if tool else {})
        )
    return rows


def tokens_of(found: Found, rows: list[Row]) -> list[list[int]]:
    """Prompts and completions in the reward model's tokens, as `rlhf reward` reads them.

    Raises: ValueError for a row that its template or tokenizer refuses.
    """
    # Tokenising warns of special tokens in texts; sampled ones hold them at every step.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        if not found.causal:
            read = data.tokenize_joined(found.tokenizer, rows)
        elif found.tokenizer.chat_template is None:
            texts = [data.contents(data.joined(row["prompt"], row["completion"])) for row in rows]
            read = data.tokenize_texts(found.tokenizer, [{"text": text} for text in texts])
        else:
            read = data.tokenize_completions(found.tokenizer, rows)
    return [row.tokens for row in read]


def _readable(found: Found, rows: list[Row]) -> list[list[int]]:
    """The tokens of all rows, [] where one cannot be read.  Raises: ValueError where none can."""
    # All at once, which is fast; row by row only where one of them fails.
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
        raise ValueError(
            f"reward {found.name} can read none of {len(rows)} completions: {problems[0]}"
        )
    return read
