"""Tunix's side: its trainers and learners, with its vanilla sampler, on one device."""

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from transformers import PreTrainedTokenizerFast
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen2 import params as qwen2_files
from tunix.rl.common import build_positions_from_mask, make_causal_attn_mask
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.ppo.ppo_learner import PPOConfig, PPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig
from tunix.sft.dpo.dpo_trainer import TrainingInput as PairsInput
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

from benchmarks.speed import protocol

# There is no last step: a process ends when no more lines come.
ENDLESS = 1_000_000
# Of no token: completions have all their tokens, as on the other sides.
NO_END = [-1]
VALUE_COEF = 0.1


def optimizer(size: SimpleNamespace) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(size.clip_norm)
    return optax.chain(clip, optax.adamw(size.learning_rate, weight_decay=0.0))


def load(folder: str, size: SimpleNamespace, mesh: jax.sharding.Mesh) -> Any:
    config = qwen2.ModelConfig(
        num_layers=size.layers,
        vocab_size=size.vocabulary,
        embed_dim=size.hidden,
        hidden_dim=size.mlp,
        num_heads=size.heads,
        head_dim=size.hidden // size.heads,
        num_kv_heads=size.kv_heads,
        rope_theta=10_000,
        norm_eps=1e-6,
        use_tied_embedding=True,
    )
    return qwen2_files.create_model_from_safe_tensors(folder, config, mesh, dtype=jnp.float32)


def critic(folder: str, size: SimpleNamespace, mesh: jax.sharding.Mesh) -> Any:
    """A network with one output in the place of logits.  Values start at 0 on every side."""
    model = load(folder, size, mesh)
    model.config.use_tied_embedding = False
    model.lm_head = nnx.Linear(
        size.hidden, 1, use_bias=False, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0)
    )
    return model


def in_turns(turns: protocol.Turns, batch: Any, finish) -> Iterator[Any]:
    """A data set of one batch, again and again: asking for the next one is what ends a step.

    Args:
      finish: waits for the step, and returns its loss.
    """
    turns.wait()
    yield batch
    while True:
        loss = finish()
        turns.stop()
        turns.reply(loss=loss)
        turns.wait()
        yield batch


def loss_of(trainer: PeftTrainer) -> float:
    """Of the last step, once the parameters that it gives are there."""
    jax.block_until_ready(nnx.state(trainer.model))
    # Its metrics reach loggers a step late; this is what they will get.
    return float(trainer._prev_buffered_train_metrics.loss)


def supervised(folder: str, size: SimpleNamespace, mesh, model, turns) -> None:
    tokens = np.array([row["input_ids"] for row in protocol.rows(folder, "sft")])
    config = TrainingConfig(eval_every_n_steps=ENDLESS, max_steps=ENDLESS)
    trainer = PeftTrainer(model, optimizer(size), config).with_gen_model_input_fn(model_inputs)
    batch = TrainingInput(tokens, np.ones(tokens.shape, bool))
    trainer.train(in_turns(turns, batch, lambda: loss_of(trainer)))


def model_inputs(batch: TrainingInput) -> dict[str, Any]:
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": build_positions_from_mask(batch.input_mask),
        "attention_mask": make_causal_attn_mask(batch.input_mask),
    }


def preferences(folder: str, size: SimpleNamespace, mesh, model, turns) -> None:
    rows = protocol.rows(folder, "dpo")
    end = PreTrainedTokenizerFast.from_pretrained(folder).eos_token_id
    prompts = np.array([row["prompt_ids"] for row in rows])
    chosen = np.array([[*row["chosen_ids"], end] for row in rows])
    rejected = np.array([[*row["rejected_ids"], end] for row in rows])
    mask = np.ones(prompts.shape, bool)
    batch = PairsInput(prompts, mask, chosen, mask, rejected, mask)
    config = DPOTrainingConfig(eval_every_n_steps=ENDLESS, max_steps=ENDLESS, beta=size.dpo_beta)
    trainer = DPOTrainer(model, load(folder, size, mesh), optimizer(size), config)
    trainer.train(in_turns(turns, batch, lambda: loss_of(trainer)))


def cluster(folder: str, size: SimpleNamespace, mesh, model, **models) -> RLCluster:
    of_critic = {"critic_optimizer": optimizer(size)} if "critic" in models else {}
    training = RLTrainingConfig(
        eval_every_n_steps=ENDLESS,
        max_steps=ENDLESS,
        actor_optimizer=optimizer(size),
        **of_critic,
    )
    rollout = RolloutConfig(
        max_tokens_to_generate=size.new,
        max_prompt_length=size.prompt,
        kv_cache_size=size.prompt + size.new,
        temperature=1.0,
        top_p=1.0,
        eos_tokens=NO_END,
    )
    return RLCluster(
        actor=model,
        reference=load(folder, size, mesh),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(folder),
        cluster_config=ClusterConfig(
            role_to_mesh={role: mesh for role in Role},
            training_config=training,
            rollout_config=rollout,
        ),
        **models,
    )


def reward_of_texts(prompts, completions, **kwargs):
    return [protocol.reward(ids(text)) for text in completions]


def ids(text: str) -> list[int]:
    words = [word[1:] for word in text.split()]
    return [int(word) for word in words if word.isdecimal()]


def of_groups(folder: str, size: SimpleNamespace, mesh, model, turns) -> None:
    parts = cluster(folder, size, mesh, model)
    config = GRPOConfig(
        num_generations=size.samples, beta=size.grpo_beta, kl_loss_mode="low_var_kl"
    )
    prompts = np.array([row["prompt"] for row in protocol.rows(folder, "grpo")])
    learner = GRPOLearner(parts, config, reward_of_texts)
    finish = lambda: loss_of(parts.actor_trainer)
    learner.train(in_turns_of_dicts(turns, prompts, finish))


def with_values(folder: str, size: SimpleNamespace, mesh, model, turns) -> None:
    parts = cluster(folder, size, mesh, model, critic=critic(folder, size, mesh))
    config = PPOConfig(num_iterations=size.ppo_epochs, beta=size.ppo_kl, kl_method="kl")
    prompts = np.array([row["prompt"] for row in protocol.rows(folder, "ppo")])
    learner = PPOLearner(parts, config, reward_of_texts)

    def finish() -> float:
        return loss_of(parts.actor_trainer) + VALUE_COEF * loss_of(parts.critic_trainer)

    learner.train(in_turns_of_dicts(turns, prompts.repeat(size.samples), finish))


def in_turns_of_dicts(turns: protocol.Turns, prompts: np.ndarray, finish) -> Iterator[Any]:
    """New dictionaries, since learners add to them."""
    for batch in in_turns(turns, prompts, finish):
        yield {"prompts": batch}


def decode(folder: str, size: SimpleNamespace, mesh, model, turns) -> None:
    prompts = [row["prompt"] for row in protocol.rows(folder, "decode")]
    head_size = size.hidden // size.heads
    cache = CacheConfig(size.prompt + size.new, size.layers, size.kv_heads, head_size)
    sampler = Sampler(model, PreTrainedTokenizerFast.from_pretrained(folder), cache)
    for seed in itertools.count():
        turns.wait()
        sampled = sampler(
            prompts,
            max_generation_steps=size.new,
            max_prompt_length=size.prompt,
            temperature=1.0,
            top_p=1.0,
            eos_tokens=NO_END,
            return_logprobs=True,
            seed=seed,
        )
        turns.stop()
        loss = -float(np.concatenate([np.asarray(x) for x in sampled.logprobs]).mean())
        turns.reply(loss=loss, entropy=loss)


def loading(folder: str, size: SimpleNamespace, mesh, model, turns) -> None:
    while True:
        turns.wait()
        params = jax.block_until_ready(nnx.state(load(folder, size, mesh)))
        turns.stop()
        turns.reply(loss=float(sum(x.size for x in jax.tree.leaves(params))))


PROGRAMS = {
    "load": loading,
    "sft": supervised,
    "dpo": preferences,
    "grpo": of_groups,
    "ppo": with_values,
    "decode": decode,
}


def memory_mib() -> float:
    stats = jax.local_devices()[0].memory_stats()
    if jax.default_backend() == "cpu" or not stats:
        return protocol.peak_mib()
    return stats["peak_bytes_in_use"] / 2**20


def main(job: str, folder: str, turns: protocol.Turns) -> None:
    size = protocol.spec(folder)
    # Its models constrain what XLA is to decide.
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=axis_types)
    # The first load is timed where loading is the job.
    model = None if job == "load" else load(folder, size, mesh)
    with mesh:
        PROGRAMS[job](folder, size, mesh, model, turns)


if __name__ == "__main__":
    protocol.run(main, protocol.Turns(memory_mib))
