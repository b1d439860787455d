"""Rows with tokens, or positions, that the model has no embedding for: TMP/added and TMP/learned are the models."""

import json
import pathlib

TOKEN = "has embeddings for 44 tokens alone, 0 to 43; give --resize_embeddings"
LONG = "has 12 learned positions; give a smaller"
ROWS: dict[str, dict] = {  # of each kind, with `WORD` in it
    "text": {"text": "abWORDcd"},
    "completion": {"prompt": "ab", "completion": "WORDcd"},
    "pairs": {"prompt": "ab", "chosen": "WORD", "rejected": "cd"},
    "unpaired": {"prompt": "abWORD", "completion": "cd", "label": True},
    "steps": {"prompt": "ab", "completions": ["cdWORD", "ef"], "labels": [True, False]},
    "prompts": {"prompt": "abWORD", "solution": "cd"},
    "logged": {"prompt": "ab", "completion": "WORD", "reward": 1.0},
}
COMMANDS = {
    "sft": "text", "dpo": "pairs", "kto": "unpaired", "bco": "unpaired", "orpo": "pairs", "cpo": "pairs", "reward": "pairs",
    "prm": "steps", "grpo": "prompts", "rloo": "prompts", "ppo": "prompts", "online_dpo": "prompts", "xpo": "prompts",
    "nash_md": "prompts", "rft": "prompts", "gkd": "completion", "ilql": "logged", "eval": "prompts",
}  # fmt: skip
SAMPLING = ("grpo", "rloo", "ppo", "online_dpo", "xpo", "nash_md", "rft", "eval")


def _case(command: str, model: str, word: str, message: str) -> tuple[str, list[str], str]:
    more = (
        ["--reward", "exact"]
        if command in SAMPLING
        else ["--teacher", f"TMP/{model}"]
        if command == "gkd"
        else []
    )
    where = [] if command == "eval" else ["--output", "OUT", "--batch_size", "2"]
    argv = [
        command,
        "--model",
        f"TMP/{model}",
        "--dataset",
        f"TMP/{COMMANDS[command]}_{word}.jsonl",
        *where,
        *more,
    ]
    return f"{command}: {word} of {model}", argv, message


CASES = [
    *[_case(command, "added", "tool", TOKEN) for command in COMMANDS if command != "gkd"],
    _case("gkd", "added", "tool", "has logits for 44; take one that has them all"),
    *[_case(command, "learned", "long", LONG) for command in COMMANDS],
    ("adapters", ["sft", "--model", "TMP/added", "--dataset", "TMP/text_tool.jsonl", "--output", "OUT", "--batch_size", "2",
                  "--lora_rank", "2"], TOKEN),
]  # fmt: skip


def prepare(tmp: pathlib.Path, base: str) -> None:
    """The models and the rows."""
    import shutil

    import jax
    import numpy as np

    from rlhf.models import LayerKind, TransformerConfig, huggingface, transformer

    tokenizer = huggingface.load_tokenizer(base)
    fields: dict = dict(
        norm="layer", gated=False, activation="gelu", qkv_bias=True, out_bias=True, mlp_bias=True
    )
    config = TransformerConfig(
        vocab_size=len(tokenizer), hidden_size=4, num_layers=1, num_heads=1, mlp_size=8, max_positions=12,
        kinds=(LayerKind(rope=None),), **fields,
    )  # fmt: skip
    params = jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype),
        jax.eval_shape(transformer(config).init, jax.random.key(0)),
    )
    huggingface.save(
        tmp / "learned", transformer(config), params, tokenizer=tokenizer, family="gpt2"
    )
    shutil.copytree(base, tmp / "added")
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(tmp / "added")
    for word, text in (("tool", "<tool>"), ("long", "abcdefghijklmnop")):
        for name, row in ROWS.items():
            other = row | {"reward": 0.0} if "reward" in row else row
            lines = [json.dumps(row).replace("WORD", text) + "\n" for row in (row, other)]
            (tmp / f"{name}_{word}.jsonl").write_text("".join(lines) * 2)
