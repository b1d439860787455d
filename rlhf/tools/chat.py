"""Talking to a model in the terminal."""

import sys

import jax

from rlhf import data, rollouts
from rlhf.ranges import Seed, checked
from rlhf.tools import saved
from rlhf.training import meshes
from rlhf.training.options import MeshOptions, SamplingOptions


@checked
def main(
    model: str,
    sampling: SamplingOptions,
    mesh: MeshOptions,
    *,
    eos_token: str | None = None,
    seed: Seed = 0,
) -> None:
    """Completes line after line; a model without a chat template goes on with each line.  An empty
    line ends it.

    Args:
      model: a run's folder, or a model's folder or name.
      eos_token: the token that ends a completion, such as <|im_end|>; null: what the tokenizer's
        files name.
      seed: of what is sampled.
    """
    chat_model = saved.load(model, meshes.make(mesh), eos_token)
    strings = rollouts.stop_strings(chat_model.tokenizer, sampling.stop) if sampling.stop else None
    messages: list[dict[str, str]] = []
    # `iter` with "": an empty line ends it, and so does the end of input, which reads as one.
    for number, line in enumerate(iter(lambda: _next_line().rstrip("\n"), "")):
        messages.append({"role": "user", "content": line})
        # Without a template there are no turns: the model goes on with the line alone.
        row = {"prompt": messages if chat_model.tokenizer.chat_template else line}
        lay_out = chat_model.seq2seq.prompts if chat_model.seq2seq else data.prompts
        prompts = lay_out(data.tokenize_prompts(chat_model.tokenizer, [row]))
        # A key a line: the same line twice may be completed otherwise.
        key = jax.random.key(seed + number)
        rollout = chat_model.sample(
            prompts,
            key,
            sampling.sampler(chat_model.eos_ids),
            max_new_tokens=sampling.max_new_tokens,
            stop=strings,
        )
        completion = rollouts.text.completions(chat_model.tokenizer, rollout)[0]
        messages.append({"role": "assistant", "content": completion})
        print(completion, flush=True)


def _next_line() -> str:
    # On stderr: stdout holds completions alone, for a pipe.
    print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline()
