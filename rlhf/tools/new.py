"""A small model with random weights and a task's tokenizer: something to train from scratch."""

import jax

from rlhf import tasks
from rlhf.models import TransformerConfig, huggingface, transformer


def main(
    output: str, *, task: str = "task:reverse", hidden_size: int = 64, num_layers: int = 2, num_heads: int = 4, seed: int = 0
) -> None:
    """Writes a new model with random weights, to be trained from scratch.

    Args:
      output: a new folder for the model.
      task: whose tokenizer it gets.
      hidden_size: of a token's state; the layers between are 4 times as wide.
      num_layers: of the transformer.
      num_heads: that attend, in every layer.
      seed: of the weights.
    """
    tokenizer = tasks.find(task).tokenizer()
    lm = transformer(TransformerConfig(len(tokenizer), hidden_size, num_layers, num_heads, 4 * hidden_size, tied=True))
    huggingface.save(output, lm, lm.init(jax.random.key(seed)), tokenizer=tokenizer, family="llama")
