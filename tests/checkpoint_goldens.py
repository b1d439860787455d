"""The checkpoints beside the tests, and what transformers computed from them.

`RLHF_CHECKPOINTS=folder` runs the tests over every checkpoint of another folder.
"""

import functools
import json
import os
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from rlhf import losses, rollouts
from rlhf.models import huggingface

HOME = Path(__file__).parent / "checkpoints"
CHECKPOINTS = Path(os.environ.get("RLHF_CHECKPOINTS", HOME))
NEW = 8
WAYS = (
    "gpt2",
    "llama",
    "bloom",
    "falcon_new",
    "gemma3_text",
    "gptj",
    "opt",
    "phi3_longrope",
    "qwen3_moe",
    "t5",
    "bart",
    "deepseek_v3",
    "gemma4_moe",
    "gemma4_text",
    "gpt_oss",
    "kimi_linear",
    "lfm2",
    "llama4_text",
    "qwen3_5_moe",
    "qwen3_next",
)
GENERATING = (
    WAYS if CHECKPOINTS == HOME else [file.parent.name for file in CHECKPOINTS.glob("*/meta.json")]
)
"""Who generates: with our own checkpoints those that decode in a way of their own, which takes a minute; otherwise all."""


def names(*kinds):
    """The folders whose model is of one of these kinds."""
    folders = (file.parent.name for file in sorted(CHECKPOINTS.glob("*/meta.json")))
    return [
        name
        for name in folders
        if meta(name).get("kind") in kinds and (CHECKPOINTS / name / "config.json").exists()
    ]


def meta(name):
    return json.loads((CHECKPOINTS / name / "meta.json").read_text())


@functools.cache
def golden(name):
    arrays = SimpleNamespace(**np.load(CHECKPOINTS / name / "golden.npz"))
    arrays.tolerance = meta(name)["facts"]["suggested_absolute_tolerance"]
    arrays.config = json.loads((CHECKPOINTS / name / "config.json").read_text())
    return arrays


@functools.cache
def load(name):
    """`(lm, head or None, params, tokenizer)`."""
    if meta(name)["kind"] in ("causal", "seq2seq", "encoder"):
        lm, params, tokenizer = huggingface.load(CHECKPOINTS / name)
        return lm, None, params, tokenizer
    return huggingface.load_classifier(CHECKPOINTS / name)


def source(tokens, mask):
    """An encoder's inputs; positions count from the start of the row, padding or not."""
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return {
        "tokens": jnp.asarray(tokens),
        "positions": jnp.asarray(positions),
        "segment_ids": jnp.asarray(mask),
    }


def generate(name, eos_ids=(), num_samples=1):
    lm, _, params, _ = load(name)
    g = golden(name)
    tokens, mask = jnp.asarray(g.gen_input_ids), jnp.asarray(g.gen_attention_mask == 1)
    prompts = rollouts.Prompts(tokens, mask)
    if meta(name)["kind"] == "seq2seq":
        start = jnp.full((len(tokens), 1), g.config["decoder_start_token_id"], jnp.int32)
        prompts = rollouts.Prompts(
            start, jnp.ones_like(start, bool), source(tokens, g.gen_attention_mask)
        )
    return rollouts.generate(
        lm, params, prompts, jax.random.key(0), max_new_tokens=NEW, sampler=rollouts.greedy(), eos_ids=eos_ids,
        num_samples=num_samples,
    )  # fmt: skip


@functools.cache
def rollout(name):
    return generate(name)


@functools.partial(jax.jit, static_argnums=0)
def outputs(lm, params, tokens, positions, segment_ids, inputs=None):
    """Hidden states, logits, and the log-probs that `score` makes of such logits."""
    hidden, _, _ = lm.hidden(
        params, tokens, positions=positions, segment_ids=segment_ids, inputs=inputs
    )
    logits = lm.unembed(params, hidden)
    of_next = losses.logits.token_logprob(logits[:, :-1], tokens[:, 1:])
    follows = (segment_ids[:, 1:] != 0) & (segment_ids[:, 1:] == segment_ids[:, :-1])
    return hidden, logits, jnp.pad(jnp.where(follows, of_next, 0.0), ((0, 0), (1, 0)))


@functools.cache
def forward(name):
    """Hidden states, logits and log-probs of the golden rows, the packed row, and the rows that were generated: one program."""
    g, (lm, _, params, _), seq2seq = golden(name), load(name), meta(name)["kind"] == "seq2seq"
    if seq2seq:
        mask = g.decoder_attention_mask
        blocks = {"rows": (g.decoder_input_ids, np.maximum(np.cumsum(mask, axis=1) - 1, 0), mask)}
    else:
        blocks = {"rows": (g.input_ids, g.position_ids, g.attention_mask)}
    if hasattr(g, "packed_input_ids"):
        blocks["packed"] = (
            g.packed_input_ids,
            g.packed_position_ids,
            np.cumsum(g.packed_position_ids == 0, axis=1),
        )
    if hasattr(g, "long_input_ids"):
        mask = g.long_attention_mask
        blocks["long"] = (g.long_input_ids, np.maximum(np.cumsum(mask, axis=1) - 1, 0), mask)
    if name in GENERATING:
        blocks["generated"] = (
            rollout(name).tokens,
            rollout(name).positions,
            rollout(name).segment_ids,
        )
    stacked = lambda columns: [np.concatenate(column) for column in zip(*columns, strict=True)]
    length = max(tokens.shape[1] for tokens, _, _ in blocks.values())
    widen = lambda x: np.pad(x, ((0, 0), (0, length - x.shape[1]))).astype(np.int32)
    inputs = None
    if seq2seq:
        read = [
            source(g.input_ids, g.attention_mask),
            *([rollout(name).inputs] if name in GENERATING else []),
        ]
        inputs = {key: np.concatenate([each[key] for each in read]) for key in read[0]}
    whole = outputs(
        lm, params, *stacked([[widen(x) for x in block] for block in blocks.values()]), inputs
    )
    results, start = {}, 0
    for block, (tokens, _, _) in blocks.items():
        rows = slice(start, start + tokens.shape[0])
        hidden, logits, logprobs = (np.asarray(x)[rows, : tokens.shape[1]] for x in whole)
        results[block] = SimpleNamespace(hidden=hidden, logits=logits, logprobs=logprobs)
        start = rows.stop
    return results
