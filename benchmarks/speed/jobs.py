"""What is compared: the model, the shapes of every job, and the folder that all sides read."""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import rlhf
from rlhf.models import TransformerConfig, transformer

PAD = 0
END = 1


class Size(NamedTuple):
    """A model of Qwen2's architecture, and the shapes of the jobs."""

    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 1024
    vocabulary: int = 4096
    rows: int = 16
    length: int = 256
    pairs: int = 16
    half: int = 64
    prompts: int = 8
    prompt: int = 16
    samples: int = 8
    new: int = 64
    decode_rows: int = 64
    # Hyper-parameters; PPO's are TRL 1.12's defaults.
    grpo_beta: float = 0.04
    dpo_beta: float = 0.1
    ppo_kl: float = 0.05
    ppo_epochs: int = 4
    learning_rate: float = 1e-5
    clip_norm: float = 1.0


SIZES = {
    "full": Size(),
    "tiny": Size(
        hidden=16,
        layers=1,
        mlp=32,
        vocabulary=64,
        rows=4,
        length=16,
        pairs=4,
        half=8,
        prompts=2,
        prompt=4,
        samples=2,
        new=4,
        decode_rows=4,
    ),
}


def descriptions(size: Size) -> dict[str, str]:
    """Every job, in a few words."""
    sampled = f"{size.prompts} prompts of {size.prompt} × {size.samples} × {size.new} new tokens"
    return {
        "sft": f"{size.rows} × {size.length} tokens",
        "dpo": f"{size.pairs} pairs of {size.half} + {size.half} tokens, reference in the step",
        "grpo": f"{sampled}, β {size.grpo_beta}",
        "ppo": f"{sampled}, value head, {size.ppo_epochs} epochs",
        "decode": f"{size.decode_rows} prompts of {size.prompt}, {size.new} new tokens",
        "load": "the checkpoint, in Hugging Face's format",
    }


JOBS = tuple(descriptions(Size()))


def config(size: Size) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        num_layers=size.layers,
        num_heads=size.heads,
        num_kv_heads=size.kv_heads,
        mlp_size=size.mlp,
        qkv_bias=True,
        tied=True,
    )


def tokenizer(size: Size) -> PreTrainedTokenizerFast:
    """One word a token, so that all sides read the same ids."""
    words = {"<pad>": PAD, "<end>": END} | {f"w{i}": i for i in range(2, size.vocabulary)}
    inside = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inside.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inside, pad_token="<pad>", eos_token="<end>")


def write_folder(folder: Path, size: Size) -> None:
    """The checkpoint, `spec.json`, and rows of every job, as ids and as text."""
    lm = transformer(config(size))
    rlhf.save(
        folder,
        lm,
        lm.init(jax.random.key(0)),
        family="qwen2",
        tokenizer=tokenizer(size),
        max_position_embeddings=512,
    )
    (folder / "spec.json").write_text(json.dumps(size._asdict()))
    for job, of_job in rows(size).items():
        lines = [json.dumps(with_text(row)) + "\n" for row in of_job]
        (folder / f"{job}.jsonl").write_text("".join(lines))


def rows(size: Size) -> dict[str, list[dict[str, list[int]]]]:
    """Of every job, as ids of tokens, random but the same every time."""
    rng = np.random.default_rng(0)

    def ids(length: int) -> list[int]:
        return rng.integers(2, size.vocabulary, length).tolist()

    prompts = [{"prompt_ids": ids(size.prompt)} for _ in range(size.prompts)]
    return {
        "sft": [{"input_ids": ids(size.length)} for _ in range(size.rows)],
        "dpo": [pair(ids, size.half) for _ in range(size.pairs)],
        "grpo": prompts,
        "ppo": prompts,
        "decode": [{"prompt_ids": ids(size.prompt)} for _ in range(size.decode_rows)],
        "load": [],
    }


def pair(ids, half: int) -> dict[str, list[int]]:
    """A prompt and two completions, which lack the end token: every side appends it."""
    return {"prompt_ids": ids(half), "chosen_ids": ids(half - 1), "rejected_ids": ids(half - 1)}


def with_text(row: dict[str, list[int]]) -> dict[str, list[int] | str]:
    texts = {
        name.removesuffix("_ids"): " ".join(f"w{i}" for i in ids)
        for name, ids in row.items()
        if name != "input_ids"
    }
    # A completion follows its prompt: without a space their words would become one.
    if "chosen" in texts:
        texts["prompt"] += " "
    return {**row, **texts}
