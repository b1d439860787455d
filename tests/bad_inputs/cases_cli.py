"""Runs' folders, outputs, TRL's names, and models of runs."""

import json
import os
import pathlib
import shutil

TASK = ["--dataset", "task:reverse"]
SFT = ["sft", "--model", "BASE", *TASK]
GRPO = ["grpo", "--model", "BASE", *TASK, "--output", "OUT"]
NEW = ["new", "--hidden_size", "8", "--num_heads", "1", "--num_layers", "1", "--output"]
DATA = "TMP/data.jsonl"
EVAL = ["eval", "BASE", "--dataset", DATA, "--reward", "exact", "--output"]

CASES: list[tuple[str, list[str], str]] = [
    ("resume nothing", [*SFT, "--resume", "--output", "OUT"], "no run there to resume; leave out --resume to begin one"),
    ("resume a file", [*SFT, "--resume", "--output", DATA], "already holds a run or other files"),
    ("resume others' files", [*SFT, "--resume", "--output", "TMP/things"], "already holds a run or other files"),
    ("resume a config that is no mapping", [*SFT, "--resume", "--output", "TMP/listed"], "already holds a run or other files"),
    ("resume a config that is binary", [*SFT, "--resume", "--output", "TMP/binary"], "already holds a run or other files"),
    ("begin in a config of one's own", [*SFT, "--output", "TMP/config"], "already holds a run or other files"),
    ("begin in a run", [*SFT, "--output", "TMP/run"], "move it away, or --resume it"),
    ("begin in a file", [*SFT, "--output", DATA], "already holds a run or other files"),
    ("begin below a file", [*SFT, "--output", f"{DATA}/run"], "cannot be made in"),
    ("begin at a dangling link", [*SFT, "--output", "TMP/dangling"], "already holds a run or other files"),
    ("metrics that are no JSON", ["plot", "TMP/broken", "--output", "OUT"], "metrics.jsonl, line 2"),
    ("completions over the data", [*EVAL, DATA], "data.jsonl: exists; choose another --output"),
    ("completions over the data, asked for", [*EVAL, DATA, "--overwrite"], "is read by this command too"),
    ("completions over a link to the data", [*EVAL, "TMP/link.jsonl", "--overwrite"], "is read by this command too"),
    ("completions over a hard link to the data", [*EVAL, "TMP/hard.jsonl", "--overwrite"], "is read by this command too"),
    ("completions into the model", [*EVAL, "BASE/config.json", "--overwrite"], "is read by this command too"),
    ("completions over a folder", [*EVAL, "TMP/things", "--overwrite"], "is a folder; give a file as --output"),
    ("completions below a file", [*EVAL, f"{DATA}/completions.jsonl"], "it is no folder; choose another --output"),
    ("completions over the options", ["eval", "--config", "TMP/eval.yaml", "--output", "TMP/eval.yaml", "--overwrite"],
     "is read by this command too"),
    ("a new model over one", [*NEW, "BASE"], "exists; choose another --output, move it away, or --overwrite it"),
    ("a new model over files", [*NEW, "TMP/things", "--overwrite"], "holds files and no model"),
    ("a new model over a file", [*NEW, DATA, "--overwrite"], "is a file or a link, and no folder"),
    ("a new model here", [*NEW, ".", "--overwrite"], "is the folder that you are in"),
    ("a picture over lines", ["plot", "TMP/run", "--output", "TMP/run/metrics.jsonl", "--overwrite"], "is read by this"),
    ("a run into itself", ["export", "TMP/run", "--output", "TMP/run/model", "--overwrite"], "is read by this command"),
    ("a run without a model", ["sft", "--model", "TMP/bare", *TASK, "--output", "OUT"], "a run without a model yet"),
    ("a run without a model as a teacher", ["gkd", "--model", "BASE", "--teacher", "TMP/bare", *TASK, "--output", "OUT"],
     "a run without a model yet"),
    ("an option that chat does not have", ["chat", "BASE", "--num_samples", "3"], "--num_samples is not known"),
    ("the whole batch and its parts", [*SFT, "--output", "OUT", "--batch_size", "8", "--gradient_accumulation_steps", "2"],
     "give --micro_batches 2"),
    ("no whole groups", [*GRPO, "--per_device_train_batch_size", "12"], "no whole groups of num_generations 8"),
    ("no whole updates", [*GRPO, "--max_steps", "5", "--num_iterations", "2"], "give a multiple of 2, or --steps"),
    ("a schedule that is not here", [*SFT, "--output", "OUT", "--lr_scheduler_type", "polynomial"], "is not here; give one of"),
    ("half precision", [*SFT, "--output", "OUT", "--fp16"], "nothing is computed in float16 here; give --dtype bfloat16"),
    ("two warm-ups", [*SFT, "--output", "OUT", "--warmup_steps", "2", "--warmup_ratio", "0.1"], "are one warm-up"),
    ("an option of another command", [*SFT, "--output", "OUT", "--num_generations", "2"], "is no option of rlhf sft"),
    ("another run's checkpoint", [*SFT, "--output", "OUT", "--resume_from_checkpoint", "TMP/run"], "goes on in its own folder"),
    ("TRL in a file", [*SFT, "--output", "OUT", "--config", "TMP/trl.yaml"], "trl.yaml: optim adamw_8bit: no moments of 8 bits here"),
]  # fmt: skip


def prepare(tmp: pathlib.Path, base: str) -> None:
    """Folders of runs, and files of others."""
    (tmp / "data.jsonl").write_text('{"prompt": "ab=", "solution": "ba"}\n')
    os.symlink(tmp / "data.jsonl", tmp / "link.jsonl")
    os.link(tmp / "data.jsonl", tmp / "hard.jsonl")
    os.symlink(tmp / "nowhere", tmp / "dangling")
    for name, files in {
        "things": {"letter.txt": "mine"},
        "listed": {"config.yaml": "- 1\n", "metrics.jsonl": '{"step": 1}\n'},
        "binary": {"config.yaml": "\x00\x01", "metrics.jsonl": '{"step": 1}\n'},
        "config": {"config.yaml": "learning_rate: 0.1\n"},
        "broken": {"metrics.jsonl": '{"step": 1}\n{"step": \n{"step": 3}\n'},
        "bare": {"config.yaml": "model: base\n", "metrics.jsonl": '{"step": 1}\n'},
        "run": {
            "config.yaml": "model: base\nresume: false\n",
            "metrics.jsonl": json.dumps({"step": 1, "loss": 0.5}) + "\n",
        },
    }.items():
        (tmp / name).mkdir()
        for file, text in files.items():
            (tmp / name / file).write_text(text)
    shutil.copytree(base, tmp / "run" / "model")
    (tmp / "eval.yaml").write_text(
        f"model: {base}\ndataset: {tmp / 'data.jsonl'}\nreward: [exact]\n"
    )
    (tmp / "trl.yaml").write_text("optim: adamw_8bit\n")
