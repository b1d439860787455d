"""Commands, options, files and data sets that cannot be."""

SFT = ["sft", "--model", "BASE", "--output", "OUT"]
DPO = ["dpo", "--model", "BASE", "--output", "OUT"]
GRPO = ["grpo", "--model", "BASE", "--output", "OUT"]
TASK = ["--dataset", "task:reverse"]
CASES: list[tuple[str, list[str], str]] = [
    ("stf", ["stf"], "stf is no command; did you mean sft?"),
    ("frobnicate", ["frobnicate"], "frobnicate is no command; see rlhf --help"),
    (
        "sft lerning_rate 1",
        [*SFT, *TASK, "--lerning_rate", "1"],
        "--lerning_rate is not known; did you mean --learning_rate?",
    ),
    ("sft zzzz 1", [*SFT, *TASK, "--zzzz", "1"], "--zzzz is not known; see --help"),
    (
        "sft stray",
        [*SFT, *TASK, "stray"],
        "--dataset takes one value, but is given task:reverse stray",
    ),
    ("sft steps", [*SFT, *TASK, "--steps"], "--steps takes one value, but is given none"),
    ("chat a b", ["chat", "a", "b"], "--model takes one value, but is given a b"),
    ("sft", ["sft", *TASK, "--output", "OUT"], "--model is missing; see --help"),
    ("sft (2)", ["sft", "--model", "BASE", *TASK], "--output is missing"),
    ("sft (3)", [*SFT], "--dataset is missing"),
    (
        "sft learning_rate fast",
        [*SFT, *TASK, "--learning_rate", "fast"],
        "--learning_rate must be a number above 0 and at most 100, but is 'fast'",
    ),
    (
        "sft steps 2.5",
        [*SFT, *TASK, "--steps", "2.5"],
        "--steps must be a whole number at least 1 and at most 1,000,000, or null, but is '2.5'",
    ),
    (
        "sft schedule quick",
        [*SFT, *TASK, "--schedule", "quick"],
        "must be one of linear, cosine, constant, cosine_with_min_lr, warmup_stable_decay, inverse_sqrt, but is 'quick'",
    ),
    (
        "sft packing tight",
        [*SFT, *TASK, "--packing", "tight"],
        "--packing must be one of none, bfd, split, wrapped, but is 'tight'",
    ),
    (
        "sft dtype float8",
        [*SFT, *TASK, "--dtype", "float8"],
        "--dtype must be one of float32, bfloat16, but is 'float8'",
    ),
    (
        "sft resume perhaps",
        [*SFT, *TASK, "--resume", "perhaps"],
        "--resume must be true or false, but is 'perhaps'",
    ),
    (
        "sft batch_size 0",
        [*SFT, *TASK, "--batch_size", "0"],
        "--batch_size must be a whole number at least 1 and at most 65,536, but is 0",
    ),
    (
        "sft batch_size 8 micro_batches 3",
        [*SFT, *TASK, "--batch_size", "8", "--micro_batches", "3"],
        "batch_size 8 cannot be taken in 3 equal parts",
    ),
    (
        "sft steps 0",
        [*SFT, *TASK, "--steps", "0"],
        "--steps must be a whole number at least 1 and at most 1,000,000",
    ),
    (
        "sft epochs 0",
        [*SFT, *TASK, "--epochs", "0"],
        "--epochs must be a number above 0 and at most 100,000, but is 0.0",
    ),
    (
        "sft learning_rate 1",
        [*SFT, *TASK, "--learning_rate", "-1"],
        "--learning_rate must be a number above 0 and at most 100, but is -1.0",
    ),
    (
        "sft lora_rank 1",
        [*SFT, *TASK, "--lora_rank", "-1"],
        "--lora_rank must be a whole number at least 0 and at most 65,536, but is -1",
    ),
    (
        "sft dora",
        [*SFT, *TASK, "--dora"],
        "lora_rank 0 with dora True; that is of adapters, give --lora_rank 16",
    ),
    (
        "sft log_every 0",
        [*SFT, *TASK, "--log_every", "0"],
        "--log_every must be a whole number at least 1 and at most 1,000,000, but is 0",
    ),
    (
        "sft patience 2",
        [*SFT, *TASK, "--patience", "2"],
        "patience 2 counts evaluations, but there are none before the end; give --eval_every",
    ),
    (
        "sft patience 2 eval_every 1",
        [*SFT, *TASK, "--patience", "2", "--eval_every", "1"],
        "patience 2 but no held-out rows; give --eval_dataset",
    ),
    (
        "grpo dataset_accuracy 0.5",
        [*GRPO, *TASK, "--dataset_accuracy", "0.5"],
        "dataset_accuracy 0.5 is of completions, but prompts have none; leave it out",
    ),
    (
        "grpo reward_funcs a reward_model_path b",
        [*GRPO, *TASK, "--reward_funcs", "a", "--reward_model_path", "b"],
        "--reward_funcs are both --reward; give one",
    ),
    (
        "dpo sync_every 2 lora_rank 2",
        [*DPO, *TASK, "--sync_every", "2", "--lora_rank", "2"],
        "with adapters the reference is the model beneath, which stays",
    ),
    (
        "dpo sync_every 2 loss aot",
        [*DPO, *TASK, "--sync_every", "2", "--loss", "aot"],
        "aot takes a reference that stays; leave out --sync_every",
    ),
    (
        "grpo sync_every 2",
        [*GRPO, *TASK, "--sync_every", "2"],
        "sync_every 2 moves the reference, but with a kl_coef of 0 there is none; give --kl_coef",
    ),
    (
        "eval preference m:f",
        ["eval", "BASE", *TASK, "--preference", "m:f"],
        "preference says who wins against another model; give --against",
    ),
    (
        "sft max_rows 0",
        [*SFT, *TASK, "--max_rows", "0"],
        "--max_rows must be a whole number at least 1",
    ),
    (
        "sft fractions 0.5 0.5",
        [*SFT, *TASK, "--fractions", "0.5", "0.5"],
        "2 fractions of task:reverse; give one of each",
    ),
    (
        "sft more_datasets task:sort fractions 0.5 0.4",
        [*SFT, *TASK, "--more_datasets", "task:sort", "--fractions", "0.5", "0.4"],
        "must be above 0 and sum to 1",
    ),
    (
        "sft track [tensorboard]",
        [*SFT, *TASK, "--track", "[tensorboard]"],
        "track needs tensorboardX, not installed here; pip install tensorboardX",
    ),
    (
        "sft config missing.yaml",
        [*SFT, *TASK, "--config", "HERE/missing.yaml"],
        "missing.yaml: no such file; give a YAML file of options",
    ),
    (
        "sft config unknown.yaml",
        [*SFT, *TASK, "--config", "HERE/unknown.yaml"],
        "unknown.yaml: lerning_rate is not known; did you mean learning_rate?",
    ),
    (
        "sft config broken.yaml",
        [*SFT, *TASK, "--config", "HERE/broken.yaml"],
        "broken.yaml, line 2: not YAML: expected the node content",
    ),
    (
        "sft task:revers",
        [*SFT, "--dataset", "task:revers"],
        "no task 'revers'; did you mean reverse?",
    ),
    ("sft task:reverse:99", [*SFT, "--dataset", "task:reverse:99"], "level"),
    (
        "sft none.jsonl",
        [*SFT, "--dataset", "HERE/none.jsonl"],
        "none.jsonl: no such file or folder; check the path",
    ),
    (
        "sft malformed.jsonl",
        [*SFT, "--dataset", "HERE/malformed.jsonl"],
        "malformed.jsonl, line 2, column",
    ),
    (
        "sft empty.jsonl",
        [*SFT, "--dataset", "HERE/empty.jsonl"],
        "empty.jsonl: the file has no rows",
    ),
    (
        "sft list.jsonl",
        [*SFT, "--dataset", "HERE/list.jsonl"],
        "list.jsonl, line 1: a row must be an object of columns",
    ),
    ("sft latin.jsonl", [*SFT, "--dataset", "HERE/latin.jsonl"], "latin.jsonl, line 1: not UTF-8"),
    (
        "sft cells.csv",
        [*SFT, "--dataset", "HERE/cells.csv"],
        "cells.csv, line 3: 3 cells but 2 columns",
    ),
    ("sft twice.csv", [*SFT, "--dataset", "HERE/twice.csv"], "two columns have one name"),
    (
        "sft notes.txt",
        [*SFT, "--dataset", "HERE/notes.txt"],
        "notes.txt: a format that is not read",
    ),
    (
        "sft broken.parquet",
        [*SFT, "--dataset", "HERE/broken.parquet"],
        "broken.parquet: not a whole Parquet file",
    ),
    ("sft questions.jsonl", [*SFT, "--dataset", "HERE/questions.jsonl"], "fit no type"),
    (
        "sft questions.jsonl split test",
        [*SFT, "--dataset", "HERE/questions.jsonl", "--split", "test"],
        "has no split 'test'",
    ),
    (
        "sft questions.jsonl columns {query: prompt}",
        [*SFT, "--dataset", "HERE/questions.jsonl", "--columns", "{query: prompt}"],
        "columns renames query, but",
    ),
    (
        "sft number.jsonl",
        [*SFT, "--dataset", "HERE/number.jsonl"],
        "row 1: completion must be a string or messages with role and content",
    ),
    (
        "sft mixed.jsonl",
        [*SFT, "--dataset", "HERE/mixed.jsonl"],
        "prompt hold messages but completion a string",
    ),
    ("sft chat.jsonl", [*SFT, "--dataset", "HERE/chat.jsonl"], "chat template"),
    (
        "sft fine.jsonl assistant_only",
        [*SFT, "--dataset", "HERE/fine.jsonl", "--assistant_only"],
        "assistant",
    ),
    (
        "sft fine.jsonl max_length 2",
        [*SFT, "--dataset", "HERE/fine.jsonl", "--max_length", "2"],
        "has a trained token among its first 2",
    ),
    ("sft dataset_size 4", [*SFT, *TASK, "--dataset_size", "4"], "4 rows but batch_size 8"),
    (
        "dpo fine.jsonl",
        [*DPO, "--dataset", "HERE/fine.jsonl"],
        "need the columns chosen, rejected, but row 0 has prompt, completion",
    ),
    ("dpo loss [sigmoyd]", [*DPO, *TASK, "--loss", "[sigmoyd]"], "loss 'sigmoyd' is not known"),
    (
        "dpo loss [sigmoid,sft] loss_weights [1]",
        [*DPO, *TASK, "--loss", "[sigmoid,sft]", "--loss_weights", "[1]"],
        "2 losses but 1 loss_weights",
    ),
    (
        "dpo loss [hinge] label_smoothing 0.1",
        [*DPO, *TASK, "--loss", "[hinge]", "--label_smoothing", "0.1"],
        "label_smoothing means nothing to hinge",
    ),
    (
        "grpo loss sapo epsilon 0.1",
        [*GRPO, *TASK, "--loss", "sapo", "--epsilon", "0.1"],
        "clip_high means nothing to sapo, whose options are tau_pos",
    ),
    (
        "grpo loss grop",
        [*GRPO, *TASK, "--loss", "grop"],
        "loss 'grop' is not known; did you mean grpo?",
    ),
    (
        "grpo reward [acuracy]",
        [*GRPO, *TASK, "--reward", "[acuracy]"],
        "reward 'acuracy' is not known; did you mean accuracy?",
    ),
    (
        "grpo reward [my.rewards:score]",
        [*GRPO, *TASK, "--reward", "[my.rewards:score]"],
        "reward 'my.rewards:score': No module named",
    ),
    (
        "grpo reward [accuracy] reward_weights [1,2]",
        [*GRPO, *TASK, "--reward", "[accuracy]", "--reward_weights", "[1,2]"],
        "1 rewards but 2 reward_weights",
    ),
    ("grpo fine.jsonl", [*GRPO, "--dataset", "HERE/fine.jsonl"], "reward is not given"),
    (
        "grpo more_datasets task:sort",
        [*GRPO, *TASK, "--more_datasets", "task:sort"],
        "reward is not given; for files, and for several datasets, choose from",
    ),
    (
        "grpo num_samples 0",
        [*GRPO, *TASK, "--num_samples", "0"],
        "--num_samples must be a whole number at least 1",
    ),
    (
        "grpo temperature 0",
        [*GRPO, *TASK, "--temperature", "0"],
        "--temperature must be a number above 0 and at most 100, but is 0.0",
    ),
    (
        "grpo top_p 1.5",
        [*GRPO, *TASK, "--top_p", "1.5"],
        "--top_p must be a number above 0 and at most 1, but is 1.5",
    ),
    (
        "sft no/such-model",
        ["sft", "--model", "no/such-model", *TASK, "--output", "OUT"],
        "no/such-model is no folder, and no name that the Hub",
    ),
    (
        "sft fine.jsonl",
        ["sft", "--model", "BASE", *TASK, "--output", "HERE/fine.jsonl"],
        "already holds a run or other files",
    ),
    (
        "plot nowhere elsewhere",
        ["plot", "nowhere", "elsewhere"],
        "nowhere: no metrics.jsonl, so no run",
    ),
]
