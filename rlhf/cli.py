"""The command line: `rlhf COMMAND`, one recipe or tool each; their own signatures are the options."""

import importlib
import os
import sys

COMMANDS = {  # command -> where its `main` is, and what it does
    "demo": ("rlhf.demo", "from nothing to an aligned model on a CPU, in minutes"),
    "sft": ("rlhf.recipes.sft", "teach a model to write what a data set says"),
    "reward": ("rlhf.recipes.reward", "a reward model from preference pairs"),
    "dpo": ("rlhf.recipes.dpo", "preference pairs, without sampling: DPO and its kin"),
    "grpo": ("rlhf.recipes.grpo", "sample groups, score them, compare within: GRPO and its kin"),
    "new": ("rlhf.tools.new", "a small model with random weights, to train from scratch"),
    "eval": ("rlhf.tools.evaluate", "score a model's answers: greedy, and pass@k"),
    "chat": ("rlhf.tools.chat", "talk to a model in the terminal"),
    "plot": ("rlhf.tools.plot", "curves of one run or several"),
    "export": ("rlhf.tools.export", "a run's model as a folder, or pushed to the Hub"),
    "help": ("rlhf.tools.help", "`rlhf help trl`: TRL's option names that work here"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command; a mistake of the user's ends in one line and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        from difflib import get_close_matches

        near = get_close_matches(name, COMMANDS, n=1)
        print(f"rlhf: {name} is no command; " + (f"did you mean {near[0]}?" if near else "see rlhf --help"), file=sys.stderr)
        return 2
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would advise every user of JAX to install PyTorch
    from rlhf.options import parsed

    command = importlib.import_module(COMMANDS[name][0]).main
    try:
        command(**parsed(command, name, rest))
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        print(f"rlhf {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def overview() -> str:
    """All commands, one a line."""
    lines = "\n".join(f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items())
    start = "usage: rlhf COMMAND [options]\n\nPost-train language models in JAX."
    return f"{start}\n\n{lines}\n\nrlhf COMMAND --help lists its options."
