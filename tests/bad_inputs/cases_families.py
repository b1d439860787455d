"""Encoders, encoder-decoders and classifiers where they cannot be, and rewards that are no reward models."""

import json
import shutil
from pathlib import Path

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
MODELS = {
    "bert": "bert_classifier_1",
    "roberta": "roberta_classifier",
    "t5": "t5",
    "bart": "bart",
    "prm": "qwen2_prm",
    "reward_model": "llama_reward",
}
ROW = {
    "prompt": "a", "completion": "b", "chosen": "b", "rejected": "c", "label": True, "reward": 1.0,
}  # fmt: skip
STEPS = {"prompt": "a", "completions": ["b"], "labels": [True]}
ENCODER = "is an encoder"
TWO_STACKS = (
    "is an encoder-decoder, whose encoder reads prompts; this command trains decoders alone"
)
NO_CLASSIFIER = "is an encoder-decoder, which cannot be a reward model"


def _asked(command: str, model: str, *more: str, rows: str = "rows") -> list[str]:
    return [
        command,
        "--model",
        f"TMP/{model}",
        "--dataset",
        f"TMP/{rows}.jsonl",
        "--output",
        "OUT",
        "--steps",
        "1",
        *more,
    ]


SAMPLING = ("grpo", "rloo", "ppo", "online_dpo", "xpo", "nash_md", "rft")
WRITING = ("sft", "dpo", "cpo", "orpo", "kto", "bco")
CASES: list[tuple[str, list[str], str]] = [
    *((f"{command} of an encoder", _asked(command, "bert"), ENCODER) for command in WRITING),
    *(
        (f"{command} of an encoder", _asked(command, "roberta", "--reward", "length"), ENCODER)
        for command in SAMPLING
    ),
    ("gkd of an encoder", _asked("gkd", "bert", "--teacher", "TMP/bert"), ENCODER),
    ("kto of an encoder-decoder", _asked("kto", "t5"), TWO_STACKS),
    ("bco of an encoder-decoder", _asked("bco", "bart"), TWO_STACKS),
    ("ilql of an encoder-decoder", _asked("ilql", "t5"), TWO_STACKS),
    ("gkd of an encoder-decoder", _asked("gkd", "t5", "--teacher", "TMP/t5"), TWO_STACKS),
    ("nash_md of an encoder-decoder", _asked("nash_md", "bart", "--reward", "length"), TWO_STACKS),
    ("reward of an encoder-decoder", _asked("reward", "t5"), NO_CLASSIFIER),
    ("prm of an encoder-decoder", _asked("prm", "bart", rows="steps"), NO_CLASSIFIER),
    (
        "reward of a classifier of tokens",
        _asked("reward", "prm", "--batch_size", "1"),
        "is a classifier of tokens (score.weight)",
    ),
    (
        "prm of a reward model",
        _asked("prm", "reward_model", "--batch_size", "1", rows="steps"),
        "is a classifier of whole texts (score.weight)",
    ),
    (
        "max_length of one token",
        _asked("reward", "bert", "--max_length", "1"),
        "length must be at least 2 tokens",
    ),
    *(
        (
            f"a reward that is {what}",
            ["grpo", "--model", "BASE", "--dataset", "task:reverse", "--output", "OUT", *reward],
            message,
        )
        for what, reward, message in (
            ("an encoder-decoder", ["--reward", "TMP/t5"], NO_CLASSIFIER),
            (
                "a process reward model",
                ["--reward", "TMP/prm"],
                "scores every token, but a reward is one number a text",
            ),
            (
                "a language model",
                ["--reward", "BASE"],
                "is it a reward model, as `rlhf reward` writes them?",
            ),
        )
    ),
]


def prepare(tmp: Path, base: str) -> None:
    """Checkpoints with the tokenizer of `base`."""
    for name, checkpoint in MODELS.items():
        shutil.copytree(
            CHECKPOINTS / checkpoint, tmp / name, ignore=shutil.ignore_patterns("*.npz")
        )
        for file in Path(base).glob("*token*"):
            shutil.copy(file, tmp / name)
    for name, row in (("rows", ROW), ("steps", STEPS)):
        (tmp / f"{name}.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
