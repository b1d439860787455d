"""Teaches a tiny language model to ask a calculator instead of guessing: tools, turns and GRPO in one file.

The prompt is a sum such as "7 + 5 =".  The model, trained from scratch, has seen two kinds of conversation: in one it calls
the tool `add`, reads the result and says it; in the other, as often, it guesses.  Its first token decides.  The reward is 1 for
the right sum, whichever way it came about.  What the tool says is read, but GRPO does not train on it.

Run: python examples/calculator.py

Measured on 2 CPU cores, seed 0: 38 s of processor time, 96 s in all while other work held most of both cores.  The share of
conversations that ask the calculator rises from 43% to 99%, the share of right answers from 42% to 93% (mean of the last five
iterations, 640 conversations).
"""

import argparse
import time

import jax
import numpy as np
import optax

import rlhf
from rlhf import rollouts
from rlhf.losses import groups, policy, presets, weights
from rlhf.models import TransformerConfig, transformer
from rlhf.recipes import grpo, sft
from rlhf.rollouts import environment, tools

LARGEST, DEMONSTRATIONS = 12, 32  # numbers are 0 … LARGEST; conversations in a batch of imitation
PROMPTS, SAMPLES, LR = 16, 8, 1e-3
TURN, COLUMNS = 12, 24  # the most tokens of a turn, and of a conversation

BOS, EOS = "<bos>", "<eos>"
CALL = '<tool_call> {{"name": "add", "arguments": {{"a": {} , "b": {} }}}} </tool_call>'
VOCABULARY = [
    "<pad>",
    BOS,
    EOS,
    *map(str, range(2 * LARGEST + 1)),
    "+",
    "=",
    "<tool_response>",
    "</tool_response>",
    "error:",
]
VOCABULARY += [word for word in CALL.format("", "").split() if word not in VOCABULARY]


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


def verdict(row, messages) -> float:
    """1 for the right sum, and for nothing else."""
    return float(messages[-1]["content"] == str(sum(row)))


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20, help="iterations of GRPO")
    parser.add_argument("--sft-steps", type=int, default=200)
    args = parser.parse_args(argv)

    tokenizer, rng = make_tokenizer(), np.random.default_rng(args.seed)
    lm = transformer(
        TransformerConfig(
            len(tokenizer), hidden_size=64, num_layers=2, num_heads=4, mlp_size=128, tied=True
        )
    )
    key = jax.random.key(args.seed)
    params = imitate(lm, tokenizer, rng, args.sft_steps, key)
    talk = tools.tool_environment([add], reward=verdict)

    def converse(params, key):
        """A batch of conversations on new sums."""
        sums = rng.integers(0, LARGEST + 1, (PROMPTS, 2)).tolist()
        prompts = [tokenizer.encode(f"{a} + {b} =") for a, b in sums]
        return environment.play(
            lm, params, tokenizer, talk, prompts, key, rows=sums, num_samples=SAMPLES, buckets=[COLUMNS],
            max_turns=3, max_new_tokens=TURN, max_tokens=COLUMNS, eos_ids=(tokenizer.eos_token_id,),
        )  # fmt: skip

    update, state = learner(lm, params, key)
    history = []
    for i in range(args.steps):
        begin = time.perf_counter()
        played = converse(state.params, jax.random.fold_in(key, i))
        rewards = played.rewards.sum(1)
        state, _ = update(state, played.rollout, rewards, jax.random.fold_in(key, args.steps + i))
        history.append({"right": rewards.mean().item(), "asks": (played.turns > 1).mean().item()})
        if i % 5 == 0 or i == args.steps - 1:
            metrics = "  ".join(f"{name} {value:6.1%}" for name, value in history[-1].items())
            print(f"iteration {i:3d}  {metrics}  {time.perf_counter() - begin:5.2f} s", flush=True)
    mean = lambda part: {
        name: float(np.mean([metrics[name] for metrics in part])) for name in history[0]
    }
    return {"before": mean(history[:1]), "after": mean(history[-5:])}


def learner(lm, params, key):
    """GRPO: a step of a batch of conversations, and the state it starts from."""
    algorithm = presets.objective(
        groups.group_relative, policy.clipped_surrogate, weights.token_mean
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(LR))
    update = grpo.make_update(rlhf.Policy(lm), optimizer, num_samples=SAMPLES, algorithm=algorithm)
    return jax.jit(update), rlhf.init_state(params, optimizer, key)


# ---- before reinforcement: half of the conversations ask, half guess --------------------------------------------------


def make_tokenizer():
    """One token a word, numbers included."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="error:")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, VOCABULARY.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def demonstration(rng) -> str:
    """A conversation that asks, or one that guesses."""
    a, b, guess = rng.integers(0, LARGEST + 1, 3).tolist()
    asked = f"{CALL.format(a, b)} {EOS} {tools.tool_responses([str(a + b)])} {a + b} {EOS}"
    return f"{a} + {b} = " + (asked if rng.random() < 0.5 else f"{guess} {EOS}")


def imitate(lm, tokenizer, rng, steps, key):
    """A language model of demonstrations, from scratch."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(5e-3, steps))
    )
    update = jax.jit(sft.make_update(rlhf.Policy(lm), optimizer))
    state = rlhf.init_state(lm.init(key), optimizer, key)
    for _ in range(steps):
        tokens = np.zeros((DEMONSTRATIONS, COLUMNS), np.int32)
        for row in tokens:
            ids = tokenizer.encode(demonstration(rng))
            row[: len(ids)] = ids
        state, _ = update(state, rollouts.unpacked_rows(tokens, tokens != 0))
    return state.params


if __name__ == "__main__":
    main()
