"""A small model with random weights and a task's tokenizer: something to train from scratch."""

from typing import Annotated

import jax

from rlhf import files, tasks
from rlhf.models import TransformerConfig, huggingface, transformer
from rlhf.ranges import Seed, between, checked


@checked
def main(
    output: str,
    *,
    task: str = "task:reverse",
    hidden_size: Annotated[int, between(1, 65_536)] = 64,
    num_layers: Annotated[int, between(1, 1024)] = 2,
    num_heads: Annotated[int, between(1, 1024)] = 4,
    seed: Seed = 0,
    overwrite: bool = False,
) -> None:
    """Writes a new model with random weights, to be trained from scratch.

    Args:
      output: a new folder for the model.
      task: whose tokenizer it gets.
      hidden_size: of a token's state; the layers between are 4 times as wide.
      num_layers: of the transformer.
      num_heads: that attend, in every layer.
      seed: of the weights.
      overwrite: write over the folder if it holds a model.
    """
    # Twice: rotary embeddings turn pairs of a head's numbers, so that its size is even.
    if hidden_size % (2 * num_heads):
        raise ValueError(
            f"hidden_size {hidden_size} is not {num_heads} heads of one even size; change "
            "--num_heads"
        )
    files.check_output_folder(output, overwrite=overwrite)
    tokenizer = tasks.find(task).tokenizer()
    # Input and output embeddings are one matrix: of so small a model they would be most of it.
    lm = transformer(
        TransformerConfig(
            len(tokenizer), hidden_size, num_layers, num_heads, 4 * hidden_size, tied=True
        )
    )
    with files.renewed(output) as folder:
        huggingface.save(
            # As Llama: the shape above is Llama's, which every other library reads.
            folder,
            lm,
            lm.init(jax.random.key(seed)),
            tokenizer=tokenizer,
            family="llama",
        )
