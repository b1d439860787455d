"""Gradients of log-probs of completions whose prompt is read once a group, beside those of rows by themselves, in turns.

    python benchmarks/shared_prefix.py [--json benchmarks/results/shared_prefix.json] [--turns 7]

Float32; Qwen2's architecture, hidden 256, 4 layers, vocabulary 4,096.  `temporary MB` is the compiler's own figure.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import report

from rlhf import rollouts
from rlhf.models import TransformerConfig, transformer
from rlhf.shared_prefix import SharedPrefix

VOCABULARY = 4096
SHAPES = [
    (2, 16, 64, 64),
    (8, 8, 16, 64),
    (8, 4, 128, 64),
    (8, 2, 512, 128),
]  # rows a group, groups, prompt, completion


def compared(lm, params, shape, turns):
    rows, groups, prompt, completion = shape
    rng = np.random.default_rng(0)
    prompts = np.repeat(rng.integers(0, VOCABULARY, (groups, prompt)), rows, axis=0)
    tokens = jnp.asarray(
        np.concatenate([prompts, rng.integers(0, VOCABULARY, (rows * groups, completion))], axis=1)
    )
    needed = jnp.broadcast_to(jnp.arange(prompt + completion) >= prompt, tokens.shape)
    batch = rollouts.unpacked_rows(tokens, jnp.ones_like(needed), needed)

    def compiled(shared):
        total = lambda params, batch: rollouts.score_batch(
            lm, params, batch, shared=shared
        ).logprobs.sum()
        return jax.jit(jax.value_and_grad(total)).lower(params, batch).compile()

    alone, together = compiled(None), compiled(SharedPrefix(rows, completion))
    pairs = []
    for _ in range(turns + 1):
        seconds, found = [], []
        for run in (alone, together):
            begin = time.perf_counter()
            found.append(jax.block_until_ready(run(params, batch)))
            seconds.append(time.perf_counter() - begin)
        pairs.append(seconds)
    far = max(
        jax.tree.leaves(
            jax.tree.map(lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(a).max()), *found)
        )
    )
    by_itself, shared = zip(*pairs[1:], strict=True)
    megabytes = lambda run: run.memory_analysis().temp_size_in_bytes / 1e6
    return {
        "rows": f"{groups} × {rows} of {prompt} + {completion}",
        "seconds": statistics.median(shared), "by themselves": statistics.median(by_itself),
        "times as fast": statistics.median(a / b for a, b in zip(by_itself, shared, strict=True)),
        "temporary MB": megabytes(together), "theirs": megabytes(alone), "largest difference": far,
    }  # fmt: skip


def main():
    parser = report.arguments(__doc__)
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    lm = transformer(
        TransformerConfig(
            VOCABULARY,
            hidden_size=256,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            mlp_size=1024,
            qkv_bias=True,
            tied=True,
        )
    )
    params = lm.init(jax.random.key(0))
    rows = [compared(lm, params, shape, args.turns) for shape in SHAPES]
    report.show("log-probs of completions and their gradient, prompts read once", rows, args.json)


if __name__ == "__main__":
    main()
