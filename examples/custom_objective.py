"""Writes DAPO, Dr. GRPO, GSPO, CISPO and an objective of its own in a few lines each, and trains them side by side.

The task is the demo's: a small grammar writes movie reviews, a language model learns them from scratch, and reinforcement
learning moves it to positive ones.  The reward is the grammar's own verdict on the text: 1 for a grammatical, positive review,
0 for anything else.  An objective says three things: what the rewards of a prompt's samples are turned into, what every
token loses, and what every token weighs.

Run: python examples/custom_objective.py

Measured on 2 CPU cores that other work used too, seed 0, 2 min 21 s in all: of 1,024 fresh samples judged by the grammar, the
share of positive ones among the grammatical rises from 47.7% to 97.0% (DAPO), 94.7% (Dr. GRPO), 98.6% (GSPO), 98.8% (CISPO) and
96.5% (the new one), with 96% to 98% grammatical and a KL to the language model of 0.7 to 0.9 nats a sequence (ideal: ln 2).
"""

import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import rlhf
from rlhf import demo, losses, rollouts
from rlhf.losses import groups, policy, presets, ratios, weights
from rlhf.tasks import reviews
from rlhf.training.loop import run_steps

STEPS, PROMPTS, SAMPLES = 20, 16, 8  # iterations; prompts an iteration, samples a prompt
MINI_BATCHES, LR, KL_COEF = 2, 3e-4, 0.1

# ---- the objectives ---------------------------------------------------------------------------------------------------

dapo = presets.objective(
    groups.group_relative, policy.clipped_surrogate, weights.token_mean,
    clip_low=0.2, clip_high=0.28,
)  # fmt: skip

dr_grpo = presets.objective(
    groups.dr_grpo, policy.clipped_surrogate, partial(weights.constant, length=demo.NEW_TOKENS),
)  # fmt: skip

gspo = presets.objective(
    groups.group_relative, policy.clipped_surrogate, weights.sequence_mean,
    log_ratio=ratios.sequence_log_ratio, clip_low=0.03, clip_high=0.04,
)  # fmt: skip

cispo = presets.objective(
    groups.group_relative, policy.cispo, weights.token_mean,
    max_ratio=5.0,
)  # fmt: skip


def saturating(logprobs, old_logprobs, advantages, mask, *, width=0.3):
    """`-A δ tanh(log r / δ)`: REINFORCE's gradient at r = 1, which fades on both sides instead of being clipped."""
    log_ratio = ratios.token_log_ratio(logprobs, old_logprobs, mask)
    return -jnp.where(mask, advantages, 0.0) * width * jnp.tanh(log_ratio / width)


mine = presets.objective(groups.rloo, saturating, weights.token_mean)

OBJECTIVES = {"DAPO": dapo, "Dr. GRPO": dr_grpo, "GSPO": gspo, "CISPO": cispo, "saturating": mine}

# ---- the program ------------------------------------------------------------------------------------------------------


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help="iterations of every objective")
    parser.add_argument("--sft-steps", type=int, default=demo.STEPS["sft"])
    parser.add_argument("--hidden-size", type=int, default=192)
    args = parser.parse_args(argv)

    task = demo.make_task(args.seed)
    models = demo.make_models(len(task.tokenizer), hidden_size=args.hidden_size)
    show = partial(run_steps, log=lambda *_, **__: None, console=Console(quiet=True))
    lm_params = demo.train_lm(task, models, args.seed, args.sft_steps, 32, show)
    metrics = {"language model": demo.evaluate(task, models, lm_params, lm_params, args.seed)[0]}
    report("language model", metrics["language model"], 0.0)
    for name, objective in OBJECTIVES.items():
        begin = time.perf_counter()
        params = train(objective, task, models.lm, lm_params, args.steps, jax.random.key(args.seed))
        metrics[name] = demo.evaluate(task, models, params, lm_params, args.seed)[0]
        report(name, metrics[name], time.perf_counter() - begin)
    return metrics


def train(objective, task, lm, lm_params, steps, key):
    """Samples, asks the grammar, and takes the optimizer steps, `steps` times over."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(LR))

    def loss_fn(params, context, batch, key):
        s = rollouts.score_batch(lm, params, batch)
        per_token = objective.loss(s.logprobs, batch.old_logprobs, batch.advantages, batch.mask)
        per_token += KL_COEF * losses.kl.k3(s.logprobs, batch.ref_logprobs, batch.mask)
        return losses.weighted_sum(per_token, batch.weights), {}

    step = rlhf.train_step(loss_fn, optimizer)

    @jax.jit
    def update(state, rollout, rewards, key):
        advantages = objective.advantages(groups.split(rewards, size=SAMPLES), rollout.mask)
        ref_logprobs = rollouts.score_batch(lm, state.context["reference"], rollout).logprobs
        batch = rollouts.batch_of(rollout, advantages=advantages, ref_logprobs=ref_logprobs)
        weighted = lambda batch: batch._replace(weights=objective.weights(batch.mask))
        batches = rlhf.minibatches(key, batch, MINI_BATCHES, 1)
        return jax.lax.scan(lambda state, batch: step(state, weighted(batch)), state, batches)[0]

    sample = jax.jit(
        partial(
            rollouts.generate,
            lm,
            max_new_tokens=demo.NEW_TOKENS,
            num_samples=SAMPLES,
            eos_ids=(task.tokenizer.eos_token_id,),
        )
    )
    state = rlhf.init_state(
        rlhf.reference(lm_params), optimizer, key, {"reference": rlhf.reference(lm_params)}
    )
    for i, (prompts,) in enumerate(demo.batches(task.prompts, 0, PROMPTS, steps)):
        sample_key, order_key = jax.random.split(jax.random.fold_in(key, i))
        rollout = sample(state.params, prompts, sample_key)
        state = update(state, rollout, verdicts(task.tokenizer, rollout), order_key)
    return state.params


def verdicts(tokenizer, rollout) -> np.ndarray:
    """1 for a grammatical, positive review, 0 for anything else."""
    pairs = zip(
        rollouts.text.prompts(tokenizer, rollout),
        rollouts.text.completions(tokenizer, rollout),
        strict=True,
    )
    return np.array(
        [reviews.sentiment(f"{start} {end}") is True for start, end in pairs], np.float32
    )


def report(name, metrics, seconds):
    positive, grammatical, kl = (
        metrics[key] for key in ("positive", "grammatical", "objective/kl")
    )
    print(
        f"{name:16s} positive {positive:6.1%}  grammatical {grammatical:6.1%}  KL {kl:5.2f} nats  {seconds:4.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
