"""A GRPO step made of the toolkit's functions beside the same step written by hand as one function.

    python -m benchmarks.fused_step [--json benchmarks/results/fused_step.json] [--turns 5]

Both have the same trunk (Qwen2's architecture, hidden 256, 4 layers, float32), which reads a group's prompt once, and the same
optimizer; what is by hand is all that comes after the hidden states: logits, log-probs, KL, the clipped loss and its gradient.
GF are those of matrix products, counted in the traced program; temporaries are the compiler's own figure.
"""

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

import rlhf
from benchmarks import report
from benchmarks.speed import jobs
from rlhf import rollouts
from rlhf.models import transformer
from rlhf.planning import flops
from rlhf.recipes import grpo
from rlhf.shared_prefix import SharedPrefix
from rlhf.training import programs
from rlhf.training.policy import Policy

PROMPTS, PROMPT, SAMPLES, NEW = 8, 16, 8, 64
CLIP, KL_COEF, EPS = 0.2, 0.04, 1e-4
CHUNK = 64  # columns whose logits exist at a time, as in the composed step


def by_hand(lm: Any, optimizer: optax.GradientTransformation, *, samples: int, new: int) -> Any:
    """`update(state, rollout, rewards)`: GRPO for completions of equal length and a tied output matrix."""
    shared = SharedPrefix(samples, new)

    def hidden_before(params, rollout):
        hidden, _, _ = lm.hidden(
            params,
            rollout.tokens,
            positions=rollout.positions,
            segment_ids=rollout.segment_ids,
            shared=shared,
        )
        return hidden[:, -new - 1 : -1]

    def chunks(x):
        size = min(CHUNK, new)
        return jnp.moveaxis(x.reshape(x.shape[0], new // size, size, *x.shape[2:]), 1, 0)

    def joined(x):
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], new, *x.shape[3:])

    def reference_logprobs(params, hidden, tokens):
        def of_chunk(_, xs):
            hidden, tokens = xs
            logits = hidden @ params["embedding"].T
            logprobs = jax.nn.log_softmax(logits)
            return None, jnp.take_along_axis(logprobs, tokens[..., None], -1)[..., 0]

        return joined(jax.lax.scan(of_chunk, None, (chunks(hidden), chunks(tokens)))[1])

    def update(state, rollout, rewards):
        tokens, old = rollout.tokens[:, -new:], rollout.logprobs[:, -new:]
        grouped = rewards.reshape(-1, samples)
        centered = grouped - grouped.mean(1, keepdims=True)
        advantages = (centered / (grouped.std(1, ddof=1, keepdims=True) + EPS)).reshape(-1, 1)
        reference = state.context["reference"]
        ref = reference_logprobs(reference, hidden_before(reference, rollout), tokens)
        hidden, backward = jax.vjp(lambda p: hidden_before(p, rollout), state.params)
        matrix = state.params["embedding"]
        number = old.size

        def of_chunk(gradient, xs):
            hidden, tokens, old, ref = xs
            logits = hidden @ matrix.T
            logprobs = jax.nn.log_softmax(logits)
            probs = jnp.exp(logprobs)
            chosen = jnp.take_along_axis(logprobs, tokens[..., None], -1)[..., 0]
            ratio, ref_ratio = jnp.exp(chosen - old), jnp.exp(ref - chosen)
            clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
            surrogate = jnp.minimum(ratio * advantages, clipped * advantages)
            loss = KL_COEF * (ref_ratio - 1 - jnp.log(ref_ratio)) - surrogate
            is_clipped = clipped * advantages < ratio * advantages
            slope = KL_COEF * (1 - ref_ratio) - jnp.where(is_clipped, 0.0, ratio * advantages)
            # d logprob / d logits = onehot - probs; each of B · new tokens counts the same.
            onehot = jax.nn.one_hot(tokens, matrix.shape[0])
            of_logits = slope[..., None] * (onehot - probs) / number
            entropy = -jnp.sum(probs * logprobs, -1)
            gradient = gradient + jnp.einsum("btv,btd->vd", of_logits, hidden)
            return gradient, (of_logits @ matrix, loss.sum() / number, entropy.sum() / number)

        columns = tuple(chunks(x) for x in (hidden, tokens, old, ref))
        gradient, (of_hidden, loss, entropy) = jax.lax.scan(
            of_chunk, jnp.zeros_like(matrix), columns
        )
        (grads,) = backward(joined(of_hidden))
        grads = grads | {"embedding": grads["embedding"] + gradient}
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = state._replace(params=params, opt_state=opt_state, step=state.step + 1)
        return state, {"loss": loss.sum(), "entropy": entropy.sum()}

    return update


def composed(lm: Any, optimizer: optax.GradientTransformation, *, samples: int, new: int) -> Any:
    update = grpo.make_update(
        Policy(lm), optimizer, num_samples=samples, kl_coef=KL_COEF, max_new_tokens=new
    )
    return lambda state, rollout, rewards: update(state, rollout, rewards, state.key)


def inputs(lm: Any, vocabulary: int, optimizer: optax.GradientTransformation, sizes: tuple) -> Any:
    """A state whose reference is another model, and a rollout with its rewards."""
    prompts, prompt, samples, new = sizes
    params, other = lm.init(jax.random.key(0)), lm.init(jax.random.key(1))
    tokens = jax.random.randint(jax.random.key(2), (prompts, prompt), 0, vocabulary)
    rollout = rollouts.generate(
        lm,
        params,
        rollouts.Prompts(tokens, jnp.ones_like(tokens, bool)),
        jax.random.key(3),
        max_new_tokens=new,
        num_samples=samples,
    )
    rewards = (rollout.tokens[:, prompt] % 2).astype(jnp.float32)
    context = {"reference": other}
    return rlhf.init_state(params, optimizer, jax.random.key(4), context), rollout, rewards


def compared(vocabulary: int, turns: int) -> dict[str, Any]:
    lm = transformer(jobs.config(jobs.Size(vocabulary=vocabulary)))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5))
    arguments = inputs(lm, vocabulary, optimizer, (PROMPTS, PROMPT, SAMPLES, NEW))
    steps = {
        name: jax.jit(make(lm, optimizer, samples=SAMPLES, new=NEW), donate_argnums=0)
        for name, make in (("composed", composed), ("by hand", by_hand))
    }
    counts, compiled = {}, {}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for name, step in steps.items():
        counts[name] = flops.counted(step.trace(*arguments).jaxpr).work.flops / 1e9
        compiled[name] = step.lower(*arguments).compile()
    for _ in range(turns + 1):
        for name, program in compiled.items():
            state = jax.tree.map(jnp.copy, arguments[0])
            begin = time.perf_counter()
            jax.block_until_ready(program(state, *arguments[1:]))
            seconds[name].append(time.perf_counter() - begin)
    memory = {name: programs.temporaries(program) / 1e6 for name, program in compiled.items()}
    times = {name: statistics.median(x[1:]) for name, x in seconds.items()}
    return {
        "vocabulary": vocabulary,
        "GF": counts["composed"], "GF by hand": counts["by hand"],
        "GF ratio": counts["composed"] / counts["by hand"],
        "temporary MB": memory["composed"], "by hand MB": memory["by hand"],
        "memory ratio": memory["composed"] / memory["by hand"],
        "seconds": times["composed"], "seconds by hand": times["by hand"],
        "seconds ratio": statistics.median(
            a / b for a, b in zip(seconds["composed"][1:], seconds["by hand"][1:], strict=True)
        ),
    }  # fmt: skip


def main() -> None:
    parser: argparse.ArgumentParser = report.arguments(__doc__)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    rows = [compared(vocabulary, args.turns) for vocabulary in (4096, 32_768)]
    title = f"a GRPO step, {PROMPTS} prompts of {PROMPT} × {SAMPLES} × {NEW} new tokens"
    report.show(title, rows, args.json)


if __name__ == "__main__":
    main()
