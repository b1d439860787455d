"""Our side: the recipes' updates on a checkpoint in Hugging Face's format."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import optax

import rlhf
from benchmarks.speed import protocol
from benchmarks.speed.jobs import END, Size
from rlhf import rollouts
from rlhf.data import Tokenized, batch, pairs
from rlhf.models import scalar_head
from rlhf.recipes import dpo, grpo, ppo, sft
from rlhf.training.pairs import shared_prefix
from rlhf.training.policy import Policy

Rows = list[dict[str, Any]]


class Job(NamedTuple):
    """A step that is pure, `(state, batch) -> (state, metrics)`, and what it begins with."""

    step: Callable
    state: Any
    batch: Any


def make(job: str, size: Size, lm: Any, params: Any, rows: Rows) -> Job:
    """A job's step, not compiled yet, on these rows."""
    return MAKERS[job](size, lm, params, rows)


def optimizer(size: Size) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(size.clip_norm)
    return optax.chain(clip, optax.adamw(size.learning_rate, weight_decay=0.0))


def supervised(size: Size, lm: Any, params: Any, rows: Rows) -> Job:
    texts = [Tokenized(row["input_ids"], [True] * len(row["input_ids"])) for row in rows]
    state = rlhf.init_state(params, optimizer(size), jax.random.key(1))
    return Job(sft.make_update(Policy(lm), optimizer(size)), state, batch(texts))


def preferences(size: Size, lm: Any, params: Any, rows: Rows) -> Job:
    def texts(column: str) -> list[Tokenized]:
        mask = [False] * size.half + [True] * size.half
        return [Tokenized([*row["prompt_ids"], *row[column], END], mask) for row in rows]

    both = pairs(texts("chosen_ids"), texts("rejected_ids"))
    update = dpo.make_update(
        Policy(lm),
        optimizer(size),
        beta=size.dpo_beta,
        shared=shared_prefix(both),
        reference_in_step=True,
    )
    context = {"reference": rlhf.reference(params)}
    return Job(update, rlhf.init_state(params, optimizer(size), jax.random.key(1), context), both)


def of_groups(size: Size, lm: Any, params: Any, rows: Rows) -> Job:
    update = grpo.make_update(
        Policy(lm),
        optimizer(size),
        num_samples=size.samples,
        kl_coef=size.grpo_beta,
        max_new_tokens=size.new,
    )
    context = {"reference": rlhf.reference(params)}
    state = rlhf.init_state(params, optimizer(size), jax.random.key(1), context)
    return Job(sampling_step(size, lm, update, lambda params: params), state, prompts(rows))


def with_values(size: Size, lm: Any, params: Any, rows: Rows) -> Job:
    head = scalar_head(size.hidden)
    update = ppo.make_update(
        Policy(lm, head), optimizer(size), kl_coef=size.ppo_kl, epochs=size.ppo_epochs
    )
    context = {"reference": rlhf.reference(params)}
    with_head = {"lm": params, "head": head.init(jax.random.key(2))}
    state = rlhf.init_state(with_head, optimizer(size), jax.random.key(1), context)

    def step(state, prompts):
        state, metrics = with_update(state, prompts)
        return state, {
            **metrics,
            "loss": metrics["policy_loss"] + 0.1 * metrics["value_loss"],
        }

    with_update = sampling_step(size, lm, update, lambda params: params["lm"])
    return Job(step, state, prompts(rows))


def sampling_step(size: Size, lm: Any, update: Callable, lm_params: Callable) -> Callable:
    """Samples, scores and updates, in one program."""

    def step(state, prompts):
        sample_key, update_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        rollout = rollouts.generate(
            lm,
            lm_params(state.params),
            prompts,
            sample_key,
            max_new_tokens=size.new,
            num_samples=size.samples,
        )
        # `protocol.reward`: the number of even tokens.
        rewards = (1 - rollout.tokens[:, size.prompt :] % 2).sum(axis=1).astype(jnp.float32)
        state, metrics = update(state, rollout, rewards, update_key)
        return state, {**metrics, "entropy": nats(rollout)}

    return step


def decoding(size: Size, lm: Any, params: Any, rows: Rows) -> Job:
    def step(state, prompts):
        params, key = state
        key, sample_key = jax.random.split(key)
        rollout = rollouts.generate(lm, params, prompts, sample_key, max_new_tokens=size.new)
        return (params, key), {"loss": nats(rollout), "entropy": nats(rollout)}

    return Job(step, (params, jax.random.key(1)), prompts(rows))


def nats(rollout: rollouts.Rollout) -> jax.Array:
    """Of a sampled token, the mean: on all sides the policy's entropy, but for chance."""
    return -rollout.logprobs.sum() / rollout.mask.sum()


def prompts(rows: Rows) -> rollouts.Prompts:
    tokens = jnp.asarray([row["prompt_ids"] for row in rows])
    return rollouts.Prompts(tokens, jnp.ones(tokens.shape, bool))


MAKERS = {
    "sft": supervised,
    "dpo": preferences,
    "grpo": of_groups,
    "ppo": with_values,
    "decode": decoding,
}


def compiled(job: Job) -> Callable:
    return jax.jit(job.step, donate_argnums=0).lower(job.state, job.batch).compile()


def memory_mib() -> float:
    """On an accelerator its memory, else the process's."""
    stats = jax.local_devices()[0].memory_stats()
    if jax.default_backend() == "cpu" or not stats:
        return protocol.peak_mib()
    return stats["peak_bytes_in_use"] / 2**20


def loading(folder: str, turns: protocol.Turns) -> NoReturn:
    while True:
        turns.wait()
        _, params, _ = rlhf.load(Path(folder))
        jax.block_until_ready(params)
        turns.stop()
        turns.reply(loss=float(sum(x.size for x in jax.tree.leaves(params))))


def main(name: str, folder: str, turns: protocol.Turns) -> None:
    if name == "load":
        loading(folder, turns)
    size = Size(**vars(protocol.spec(folder)))
    lm, params, _ = rlhf.load(Path(folder))
    job = make(name, size, lm, params, protocol.rows(folder, name))
    job = job._replace(batch=jax.device_put(job.batch))
    with turns.part("compile"):
        step = compiled(job)
    state = job.state
    while True:
        turns.wait()
        state, metrics = jax.block_until_ready(step(state, job.batch))
        turns.stop()
        shown = {key: float(metrics[key]) for key in ("loss", "entropy") if key in metrics}
        turns.reply(**shown)


if __name__ == "__main__":
    protocol.run(main, protocol.Turns(memory_mib))
