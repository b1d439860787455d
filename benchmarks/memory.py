"""Compiled temporary memory of a log-prob and its gradient: whole logits against `losses.chunked`.

    python benchmarks/memory.py [--json benchmarks/results/memory.json]

Nothing is run: the figures are the compiler's own.  `beyond gradient` leaves out the `[D, V]` gradient of the unembedding,
which every method must hold.
"""

import time

import jax
import jax.numpy as jnp
import report

from rlhf import losses

TOKENS, VOCAB, WIDTH = 8192, 32_000, 896


def whole(hidden, weight, tokens):
    return losses.logits.token_logprob(hidden @ weight, tokens).sum()


def chunked(chunk_size):
    def logprob(hidden, weight, tokens):
        return losses.chunked(
            losses.logits.token_logprob, hidden, lambda h: h @ weight, tokens, chunk_size=chunk_size
        ).sum()

    return logprob


def measure(name, fn, batch):
    shapes = [
        jax.ShapeDtypeStruct((batch, TOKENS // batch, WIDTH), jnp.float32),
        jax.ShapeDtypeStruct((WIDTH, VOCAB), jnp.float32),
        jax.ShapeDtypeStruct((batch, TOKENS // batch), jnp.int32),
    ]
    begin = time.perf_counter()
    compiled = jax.jit(jax.value_and_grad(fn, argnums=(0, 1))).lower(*shapes).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes / 2**20
    gradient = 4 * WIDTH * VOCAB / 2**20
    beyond = temporary - gradient
    seconds = time.perf_counter() - begin
    return {"method": name, "rows × tokens": f"{batch} × {TOKENS // batch}", "temporary MiB": temporary,
            "beyond gradient MiB": beyond, "compile s": seconds}  # fmt: skip


def main():
    args = report.arguments(__doc__).parse_args()
    rows = [measure("whole", whole, 1)]
    rows += [
        measure(f"chunked {size}", chunked(size), batch)
        for batch, size in ((1, 64), (1, 128), (1, 256), (8, 16))
    ]
    for row in rows:
        row["times less"] = rows[0]["beyond gradient MiB"] / row["beyond gradient MiB"]
    report.show(
        f"log-prob and gradient, {TOKENS:,} tokens × {VOCAB:,} vocabulary, {WIDTH} wide, float32",
        rows,
        args.json,
    )


if __name__ == "__main__":
    main()
