"""Teaches a tiny language model to guess a number by halving: an environment in JAX, and whole runs in one compiled program.

The model has to find a number from 0 to 7 in three guesses; after each the game says "higher" or "lower".  It starts from
scratch, plays 32 games for each number, and is paid for a guess by the bits that it gains about the number, and one more for
the number itself.  REINFORCE compares a guess with the batch's guesses of the same turn; an entropy bonus keeps it trying.
Playing, scoring and learning are one jitted function that scans over the iterations, and runs of several seeds are that
function under `vmap`.

Run: python examples/guess.py

Measured on 2 CPU cores that other work used too, 60 s for three seeds: the share of games won rises from 23%, 20% and 23% in
the first iteration to 88%, 83% and 82% in the last, sampled at temperature 1; perfect play wins 87.5%.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rlhf
from rlhf import losses, rollouts
from rlhf.losses import policy, weights
from rlhf.models import TransformerConfig, transformer
from rlhf.rollouts import Prompts, Reply

NUMBERS, GUESSES = 8, 3
HIGHER, LOWER, START = (
    NUMBERS,
    NUMBERS + 1,
    NUMBERS + 2,
)  # tokens 0 … 7 are the numbers; a word is a guess too high
GAMES, LR, ENTROPY = 32, 2e-3, 0.1

LM = transformer(
    TransformerConfig(NUMBERS + 3, hidden_size=32, num_layers=2, num_heads=2, mlp_size=64)
)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(LR))


def answer(state, tokens, mask) -> Reply:
    """The game: a guess of one token is right, too low or too high, and leaves the numbers from `low` to `high`."""
    (secret, low, high), guess = state, tokens[0]
    found = guess == secret
    new_low = jnp.where(found, secret, jnp.where(guess < secret, jnp.maximum(low, guess + 1), low))
    new_high = jnp.where(
        found, secret, jnp.where(guess > secret, jnp.minimum(high, guess - 1), high)
    )
    bits = jnp.log2((high - low + 1) / (new_high - new_low + 1))
    hint = jnp.where(guess < secret, HIGHER, LOWER)
    return Reply(
        (secret, new_low, new_high), hint[None], jnp.ones(1, bool), reward=bits + found, done=found
    )


def play(params, key) -> rollouts.Simulated:
    """`GAMES` games for each number."""
    secrets = jnp.arange(NUMBERS)
    prompts = Prompts(jnp.full((NUMBERS, 1), START, jnp.int32), jnp.ones((NUMBERS, 1), bool))
    states = secrets, jnp.zeros_like(secrets), jnp.full_like(secrets, NUMBERS - 1)
    return rollouts.simulate(
        LM, params, answer, prompts, states, key,
        max_turns=GUESSES, max_new_tokens=1, num_samples=GAMES, early_end=False,
    )  # fmt: skip


def advantages_of(played: rollouts.Simulated):
    """Each guess's reward minus the mean of that turn's, whitened."""
    mask = played.rollout.mask
    turn = jnp.where(mask, jnp.cumsum(mask, axis=1), 0)
    same = turn[None] == jnp.arange(1, GUESSES + 1)[:, None, None]  # [turns, B, T]
    means = jnp.sum(same * played.rewards[None], axis=(1, 2)) / jnp.maximum(
        same.sum(axis=(1, 2)), 1
    )
    return losses.whiten(played.rewards - jnp.sum(same * means[:, None, None], axis=0), mask)


def loss_fn(params, context, batch, key):
    s = rollouts.score_batch(LM, params, batch)
    per_token = policy.reinforce(s.logprobs, batch.advantages, batch.mask) - ENTROPY * s.entropy
    return losses.weighted_sum(per_token, batch.weights), {}


def train(key, iterations):
    """A whole run: the parameters, and the share of games won in every iteration."""
    init_key, key = jax.random.split(key)
    step = rlhf.train_step(loss_fn, OPTIMIZER)

    def iterate(state, key):
        played = play(state.params, key)
        mask = played.rollout.mask
        batch = rollouts.batch_of(
            played.rollout, advantages=advantages_of(played), weights=weights.token_mean(mask)
        )
        return step(state, batch)[0], played.rollout.finished.mean()

    state = rlhf.init_state(LM.init(init_key), OPTIMIZER, init_key)
    state, won = jax.lax.scan(iterate, state, jax.random.split(key, iterations))
    return state.params, won


def main(argv=None) -> np.ndarray:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs side by side")
    parser.add_argument("--iterations", type=int, default=300)
    args = parser.parse_args(argv)
    begin = time.perf_counter()
    keys = jax.vmap(jax.random.key)(jnp.arange(args.seeds))
    _, curves = jax.jit(jax.vmap(lambda key: train(key, args.iterations)))(keys)
    curves = np.asarray(curves)
    for i in [*range(0, args.iterations, max(args.iterations // 10, 1)), args.iterations - 1]:
        print(f"iteration {i:4d}  won " + "  ".join(f"{share:6.1%}" for share in curves[:, i]))
    print(
        f"{time.perf_counter() - begin:.1f} s; perfect play wins {(2**GUESSES - 1) / NUMBERS:.1%}"
    )
    return curves


if __name__ == "__main__":
    main()
