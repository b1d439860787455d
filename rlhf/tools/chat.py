"""Talking to a model in the terminal."""

import sys

import jax

from rlhf import data, rollouts
from rlhf.ranges import Seed, checked
from rlhf.recipes.online import Drawing
from rlhf.tools import saved


@checked
def main(model: str, drawing: Drawing, *, eos_token: str | None = None, seed: Seed = 0) -> None:
    """Answers line after line; a model without a chat template goes on with each line.  An empty line ends it.

    Args:
      model: a run's folder, or a model's folder or name.
      eos_token: the token that ends an answer, such as <|im_end|>; null: what the tokenizer's files name.
      seed: of what is drawn.
    """
    own = saved.load(model, eos_token)
    messages: list[dict[str, str]] = []
    for number, line in enumerate(iter(lambda: _asked().rstrip("\n"), "")):
        messages.append({"role": "user", "content": line})
        row = {"prompt": messages if own.tokenizer.chat_template else line}
        lay_out = own.seq2seq.prompts if own.seq2seq else data.prompts
        prompts = lay_out(data.tokenize_prompts(own.tokenizer, [row]))
        key, sampler = jax.random.key(seed + number), drawing.sampler()
        rollout = own.answer(prompts, key, sampler, max_new_tokens=drawing.max_new_tokens)
        answer = rollouts.text.completions(own.tokenizer, rollout)[0]
        messages.append({"role": "assistant", "content": answer})
        print(answer, flush=True)


def _asked() -> str:
    print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline()
