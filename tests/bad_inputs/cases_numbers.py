"""Numbers out of their ranges, values of another type, and files of options that cannot be."""

import pathlib

SFT = ["sft", "--model", "BASE", "--dataset", "task:reverse", "--output", "OUT"]
DPO = ["dpo", "--model", "BASE", "--dataset", "task:reverse", "--output", "OUT"]
PPO = ["ppo", "--model", "BASE", "--dataset", "task:reverse", "--output", "OUT"]
GRPO = ["grpo", "--model", "BASE", "--dataset", "task:reverse", "--output", "OUT"]
ILQL = ["ilql", "--model", "BASE", "--dataset", "task:reverse", "--output", "OUT"]
NEW = ["new", "OUT"]
EVAL = ["eval", "BASE", "--dataset", "task:reverse"]

NUMBERS = [
    ("learning rate nan", [*SFT, "--learning_rate", "nan"], "above 0 and at most 100, but is nan"),
    ("learning rate inf", [*SFT, "--learning_rate", "inf"], "above 0 and at most 100, but is inf"),
    (
        "learning rate huge",
        [*SFT, "--learning_rate=1e300"],
        "above 0 and at most 100, but is 1e+300",
    ),
    (
        "learning rate null",
        [*SFT, "--learning_rate", "null"],
        "must be a number above 0 and at most 100, but is null",
    ),
    (
        "learning rate list",
        [*SFT, "--learning_rate", "[1]"],
        "--learning_rate must be a number above 0",
    ),
    (
        "learning rate empty",
        [*SFT, "--learning_rate="],
        "--learning_rate must be a number above 0 and at most 100, but is ''",
    ),
    (
        "learning rate true",
        [*SFT, "--learning_rate", "true"],
        "--learning_rate must be a number above 0",
    ),
    (
        "learning rate digits",
        [*SFT, "--learning_rate", "9" * 5000],
        "--learning_rate must be a number above 0 and at most 100",
    ),
    (
        "steps digits",
        [*SFT, "--steps", "9" * 5000],
        "--steps must be a whole number at least 1 and at most 1,000,000",
    ),
    (
        "steps too many",
        [*SFT, "--steps", "10000000"],
        "at most 1,000,000, or null, but is 10000000",
    ),
    ("steps true", [*SFT, "--steps", "true"], "--steps must be a whole number"),
    (
        "epochs minus inf",
        [*SFT, "--epochs=-inf"],
        "--epochs must be a number above 0 and at most 100,000, but is -inf",
    ),
    (
        "seed negative",
        [*SFT, "--seed", "-1"],
        "--seed must be a whole number at least 0 and at most 2,147,483,647",
    ),
    ("seed beyond", [*SFT, "--seed", "4294967296"], "at most 2,147,483,647, but is 4294967296"),
    (
        "weight decay nan",
        [*SFT, "--weight_decay", "nan"],
        "--weight_decay must be a number at least 0 and at most 1,000",
    ),
    ("grad norm nan", [*SFT, "--max_grad_norm", "nan"], "--max_grad_norm must be a number above 0"),
    (
        "average decay 1",
        [*SFT, "--average", "ema", "--average_decay", "1"],
        "must be a number at least 0 and below 1, but is 1.0",
    ),
    ("max length 0", [*SFT, "--max_length", "0"], "--max_length must be a whole number at least 1"),
    (
        "max length negative",
        [*SFT, "--max_length", "-5"],
        "--max_length must be a whole number at least 1",
    ),
    (
        "rank nan",
        [*SFT, "--lora_rank", "nan"],
        "--lora_rank must be a whole number at least 0 and at most 65,536, but is 'nan'",
    ),
    (
        "alpha nan",
        [*SFT, "--lora_rank", "2", "--lora_alpha", "nan"],
        "--lora_alpha must be a number above 0",
    ),
    (
        "rows of a task",
        [*SFT, "--dataset_size", "-3"],
        "--dataset_size must be a whole number at least 1",
    ),
    (
        "accuracy of a task",
        [*SFT, "--dataset_accuracy", "1.5"],
        "--dataset_accuracy must be a number at least 0 and at most 1",
    ),
    (
        "no fractions",
        [*SFT, "--fractions", "[]"],
        "--fractions must be a list with entries, or null, but is []",
    ),
    (
        "fractions nan",
        [*SFT, "--fractions", "nan"],
        "--fractions must be a list of which each is a number above 0 and at most 1",
    ),
    (
        "label smoothing",
        [*DPO, "--label_smoothing", "2"],
        "--label_smoothing must be a number at least 0 and at most 1",
    ),
    ("no loss", [*DPO, "--loss", "[]"], "--loss must be a list with entries, or null, but is []"),
    (
        "loss weights nan",
        [*DPO, "--loss_weights", "nan"],
        "--loss_weights must be a list of which each is a number",
    ),
    (
        "loss weights words",
        [*DPO, "--loss_weights", "[much]"],
        "--loss_weights must be a list of which each is a number",
    ),
    (
        "beta inf",
        [*DPO, "--beta", "inf"],
        "--beta must be a number above 0 and at most 1,000, but is inf",
    ),
    (
        "sync share",
        [*DPO, "--sync_every", "1", "--sync_share", "7"],
        "--sync_share must be a number above 0 and at most 1",
    ),
    (
        "discount 7",
        [*PPO, "--discount", "7"],
        "--discount must be a number at least 0 and at most 1, but is 7.0",
    ),
    (
        "lam negative",
        [*PPO, "--lam", "-0.1"],
        "--lam must be a number at least 0 and at most 1, but is -0.1",
    ),
    (
        "kl coef negative",
        [*PPO, "--kl_coef", "-1"],
        "--kl_coef must be a number at least 0 and at most 1,000, but is -1.0",
    ),
    ("kl target 0", [*PPO, "--kl_target", "0"], "--kl_target must be a number above 0"),
    ("kl horizon 0", [*PPO, "--kl_horizon", "0"], "--kl_horizon must be a whole number at least 1"),
    ("clip nan", [*PPO, "--clip", "nan"], "--clip must be a number above 0"),
    (
        "mini batches 0",
        [*PPO, "--mini_batches", "0"],
        "--mini_batches must be a whole number at least 1",
    ),
    (
        "updates 0",
        [*PPO, "--updates_per_batch", "0"],
        "--updates_per_batch must be a whole number at least 1",
    ),
    ("target kl nan", [*PPO, "--target_kl", "nan"], "--target_kl must be a number above 0"),
    (
        "no reward",
        [*GRPO, "--reward", "[]"],
        "--reward must be a list with entries, or null, but is []",
    ),
    (
        "no reward weights",
        [*GRPO, "--reward_weights", "[]"],
        "--reward_weights must be a list with entries, or null, but is []",
    ),
    (
        "reward weights nan",
        [*GRPO, "--reward", "length", "--reward_weights", "nan"],
        "a list of which each is a number at least -1,",
    ),
    ("reward clip", [*GRPO, "--reward_clip", "-1"], "--reward_clip must be a number above 0"),
    (
        "end penalty",
        [*GRPO, "--missing_eos_penalty", "nan"],
        "--missing_eos_penalty (here missing_end_penalty) must be a number",
    ),
    (
        "new tokens",
        [*GRPO, "--max_new_tokens", "1e9"],
        "--max_new_tokens must be a whole number at least 1",
    ),
    (
        "temperature nan",
        [*GRPO, "--temperature", "nan"],
        "--temperature must be a number above 0 and at most 100, but is nan",
    ),
    ("min p", [*GRPO, "--min_p", "1.5"], "--min_p must be a number at least 0 and at most 1"),
    ("top k", [*GRPO, "--top_k", "-1"], "--top_k must be a whole number at least 0"),
    ("tau 1", [*ILQL, "--tau", "1"], "--tau must be a number above 0 and below 1, but is 1.0"),
    (
        "target every 0",
        [*ILQL, "--target_every", "0"],
        "--target_every must be a whole number at least 1",
    ),
    (
        "eval batch 0",
        [*EVAL, "--batch_size", "0"],
        "--batch_size must be a whole number at least 1",
    ),
    ("eval seed", [*EVAL, "--seed", "-1"], "--seed must be a whole number at least 0"),
    (
        "new of size 0",
        [*NEW, "--hidden_size", "0"],
        "--hidden_size must be a whole number at least 1",
    ),
    (
        "new of layers -1",
        [*NEW, "--num_layers", "-1"],
        "--num_layers must be a whole number at least 1",
    ),
    ("new of heads 0", [*NEW, "--num_heads", "0"], "--num_heads must be a whole number at least 1"),
    (
        "new of uneven heads",
        [*NEW, "--hidden_size", "10", "--num_heads", "4"],
        "hidden_size 10 is not 4 heads of one even size",
    ),
    (
        "new of odd heads",
        [*NEW, "--hidden_size", "12", "--num_heads", "4"],
        "hidden_size 12 is not 4 heads of one even size",
    ),
    ("new seed", [*NEW, "--seed", "nan"], "--seed must be a whole number"),
    (
        "demo steps",
        ["demo", "--output", "OUT", "--steps", "0"],
        "--steps must be a whole number at least 1",
    ),
    (
        "chat tokens",
        ["chat", "BASE", "--max_new_tokens", "0"],
        "--max_new_tokens must be a whole number at least 1",
    ),
    ("plot nothing", ["plot", "[]"], "--folders must be a list with entries"),
    (
        "columns a list",
        [*SFT, "--columns", "[a]"],
        "--columns must be a mapping of text to text, but is ['a']",
    ),
    (
        "columns a number",
        [*SFT, "--columns", "{a: 1}"],
        "--columns must be a mapping of text to text, but is {'a': 1}",
    ),
    ("columns broken", [*SFT, "--columns", "{a: "], "--columns, line 1: not YAML: "),
    (
        "columns twice",
        [*SFT, "--columns", "{a: b, a: c}"],
        "--columns, line 1: a is there twice; leave one out",
    ),
    ("columns deep", [*SFT, "--columns", "[" * 5000], "--columns, line 1: more than 32 levels"),
    (
        "columns alias",
        [*SFT, "--columns", "{a: &x b, c: *x}"],
        "--columns, line 1: *x stands for what is elsewhere",
    ),
    (
        "columns tag",
        [*SFT, "--columns", "!!python/name:os.system ''"],
        "is a tag, which is not read",
    ),
    ("config of nothing", [*SFT, "--config"], "--config takes a file, but is given none"),
]
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
FILES = {  # name -> (content, part of the message)
    "twice": ("steps: 5\nsteps: 6\n", ", line 2: steps is there twice; leave one out"),
    "two names": ("steps: 5\nmax_steps: 6\n", "both --steps; give one of them"),
    "null": ("learning_rate:\n", ": learning_rate must be a number above 0 and at most 100, but is null"),
    "tilde": ("batch_size: ~\n", ": batch_size must be a whole number at least 1 and at most 65,536, but is null"),
    "nan": ("learning_rate: .nan\n", ": learning_rate must be a number above 0 and at most 100, but is nan"),
    "inf": ("weight_decay: .inf\n", ": weight_decay must be a number at least 0 and at most 1,000, but is inf"),
    "list": ("seed: [1, 2]\n", ": seed must be a whole number at least 0"),
    "mapping": ("seed: {a: 1}\n", ": seed must be a whole number at least 0"),
    "words": ("learning_rate: fast\n", ": learning_rate must be a number above 0 and at most 100, but is 'fast'"),
    "number for text": ("split: 5\n", ": split must be text, but is 5"),
    "switch": ("resume: 1\n", ": resume must be true or false, but is 1"),
    "fraction": ("steps: 2.5\n", ": steps must be a whole number"),
    "a list": ("- steps: 5\n", ": holds a list, but no options; write lines such as learning_rate: 1e-5"),
    "a text": ("steps\n", ": holds text, but no options"),
    "empty": ("", ": is empty; write lines such as learning_rate: 1e-5"),
    "comment": ("# steps: 5\n", ": is empty"),
    "broken": ("steps: [5\n", "not YAML: "),
    "tabs": ("steps:\n\t5\n", "not YAML: "),
    "two documents": ("steps: 5\n---\nsteps: 6\n", ", line 2: not YAML: but found another document"),
    "alias": ("dataset: &a x\nsplit: *a\n", ", line 2: *a stands for what is elsewhere"),
    "itself": ("columns: &a {b: *a}\n", "*a stands for what is elsewhere"),
    "bomb": (BOMB, ", line 2: *a stands for what is elsewhere"),
    "tag": ("steps: !!python/object/apply:os.system ['true']\n", "is a tag, which is not read; leave it out"),
    "deep": ("columns: " + "[" * 100_000, "more than 32 levels"),
    "deep lines": ("".join(f"{' ' * i}a:\n" for i in range(400)), "more than 32 levels"),
    "long": ("# " + "x" * 2**20, ": more than 256 KB, which options never are"),
    "complex key": ("? [a]\n: b\n", "a key must be text"),
    "number as key": ("5: b\n", "a key must be text"),
    "unknown": ("model_name: x\n", ": model_name is not known; did you mean model"),
    "nul": ("steps: 5\0\n", "line 1: '\\x00' is no letter of a text"),
}  # fmt: skip
BYTES = {
    "binary": (bytes(range(256)), "line 2: not UTF-8 text; give a YAML file of options"),
    "zip": (b"PK\x03\x04\xff\xfe" * 9, "not UTF-8 text; give a YAML file of options"),
    "utf-16": (
        "steps: 5\n".encode("utf-16"),
        "line 1: not UTF-8 text; give a YAML file of options",
    ),
    "latin": ("# größer\n".encode("latin-1"), "line 1: not UTF-8 text"),
}
CASES: list[tuple[str, list[str], str]] = [
    *NUMBERS,
    *(
        (f"config {name}", [*SFT, "--config", f"TMP/{name}.yaml"], said)
        for name, (_, said) in [*FILES.items(), *BYTES.items()]
    ),
    ("config a folder", [*SFT, "--config", "TMP"], ": a folder; give a YAML file of options"),
    (
        "run with a broken config",
        [*SFT[:-1], "TMP/run", "--resume"],
        "already holds a run or other files; choose another --output",
    ),
    (
        "run with an empty config",
        [*SFT[:-1], "TMP/empty_run", "--resume"],
        "already holds a run or other files; choose another --output",
    ),
]


def prepare(tmp: pathlib.Path, base: str) -> None:
    """Writes the files."""
    for name, (text, _) in FILES.items():
        (tmp / f"{name}.yaml").write_text(text, encoding="utf-8", newline="")
    for name, (content, _) in BYTES.items():
        (tmp / f"{name}.yaml").write_bytes(content)
    for name, text in (("run", "steps: 5\nepochs: [\n"), ("empty_run", "")):
        (tmp / name).mkdir()
        (tmp / name / "config.yaml").write_text(text, encoding="utf-8")
        (tmp / name / "metrics.jsonl").write_text(
            '{"phase": "train", "step": 1, "seconds": 1.0}\n'
        )  # it has begun
