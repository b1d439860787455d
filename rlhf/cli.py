"""The command line: `rlhf COMMAND`, one recipe or tool each; their own signatures are the
options.
"""

import atexit
import gc
import importlib
import multiprocessing
import os
import sys
import tempfile
import traceback
from functools import partial
from typing import Any, NoReturn

import rlhf
from rlhf.training import interrupts

COMMANDS = {  # command -> where its `main` is, and what it does
    "demo": ("rlhf.demo", "from nothing to an aligned model on a CPU, in minutes"),
    "sft": ("rlhf.recipes.sft", "teach a model to write what a data set says"),
    "reward": ("rlhf.recipes.reward", "a reward model from preference pairs"),
    "dpo": ("rlhf.recipes.dpo", "preference pairs, without sampling: DPO and its kin"),
    "kto": (
        "rlhf.recipes.kto",
        "completions labelled good or bad, without pairs: KTO and APO-zero",
    ),
    "bco": (
        "rlhf.recipes.bco",
        "completions labelled good or bad, told apart by the policy's own reward",
    ),
    "orpo": (
        "rlhf.recipes.orpo",
        "preference pairs and imitation of the chosen in one, without a reference",
    ),
    "cpo": ("rlhf.recipes.cpo", "preference pairs without a reference: CPO, SimPO, AlphaPO, TPO"),
    "grpo": ("rlhf.recipes.grpo", "sample groups, score them, compare within: GRPO and its kin"),
    "rloo": (
        "rlhf.recipes.rloo",
        "sample several, compare each with the others: REINFORCE leave-one-out",
    ),
    "ppo": ("rlhf.recipes.ppo", "sample, score, compare with a value head's expectation"),
    "online_dpo": (
        "rlhf.recipes.online_dpo",
        "sample, and prefer the best completion to the worst",
    ),
    "xpo": ("rlhf.recipes.xpo", "completions of the policy against the reference's, with optimism"),
    "nash_md": (
        "rlhf.recipes.nash_md",
        "completions of the policy against a mixture of it and the reference",
    ),
    "prm": ("rlhf.recipes.prm", "a process reward model from completions labelled step by step"),
    "gkd": (
        "rlhf.recipes.gkd",
        "distil a teacher into a student, on data and on its own completions",
    ),
    "rft": ("rlhf.recipes.rft", "sample completions, keep the best, learn to write them"),
    "ilql": ("rlhf.recipes.ilql", "values of logged completions, by which a model then samples"),
    "plan": ("rlhf.tools.plan", "a recipe's step on a pod or cluster that is elsewhere"),
    "new": ("rlhf.tools.new", "a small model with random weights, to train from scratch"),
    "launch": ("rlhf.tools.launch", "a recipe in several processes of this machine"),
    "eval": ("rlhf.tools.evaluate", "score a model's completions: greedy, and pass@k"),
    "chat": ("rlhf.tools.chat", "talk to a model in the terminal"),
    "plot": ("rlhf.tools.plot", "curves of one run or several"),
    "export": ("rlhf.tools.export", "a run's model as a folder, or pushed to the Hub"),
    "help": ("rlhf.tools.help", "`rlhf help trl`: TRL's option names that work here"),
}

SMALLER = {  # options that need less memory on a device, the cheapest first
    "micro_batches": "auto", "remat": "full", "dtype": "bfloat16", "lora_rank": "16",
    "max_length": "a smaller number", "max_new_tokens": "a smaller number",
    "batch_size": "a smaller number", "fsdp": "-1 on more devices",
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs a command; a mistake of the user's ends in one line and exit code 2, and where it is
    told to stop in 130.
    """
    # Without arguments it is the process's own command; a test or a script gives them.
    typed = argv is None
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return 0 if argv else 2
    if argv == ["--version"]:
        print(f"rlhf {rlhf.__version__}")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        from difflib import get_close_matches

        near = get_close_matches(name, COMMANDS, n=1)
        print(
            f"rlhf: {name} is no command; "
            + (f"did you mean {near[0]}?" if near else "see rlhf --help"),
            file=sys.stderr,
        )
        return 2
    # transformers would advise every user of JAX to install PyTorch.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if typed:
        # At its end Python looks at every object several times: seconds, once JAX and its programs
        # are loaded.  Frozen objects are passed over.
        atexit.register(gc.freeze)
    # In a process of its own nothing is lost where it leaves at once: a run's folder is made last,
    # and files are written whole.
    with interrupts.terminable(partial(_leave, name) if typed else None):
        try:
            _run(name, rest, typed)
        # Whoever read, such as `head`, has enough.  Python flushes stdout at exit, which would
        # raise again: it goes to /dev/null.
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        # Mistakes are ValueErrors by convention here, and OSErrors of files; all else is a bug, and
        # shows its traceback.
        except (ValueError, OSError) as error:
            print(
                f"rlhf {name}: {' '.join(str(error).split()) or type(error).__name__}{_elsewhere(error)}",
                file=sys.stderr,
            )
            return 2
        # Out of memory on a device is one JaxRuntimeError among others, told apart by its text; the
        # class would have to be imported for `rlhf --help` too.
        except RuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"rlhf {name}: {_out_of_memory(name, error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt as stop:
            print(f"rlhf {name}: {str(stop) or 'stopped'}", file=sys.stderr)
            return 130
    return 0


def _leave(name: str) -> NoReturn:
    # `os._exit` runs no handlers: workers would outlive this process.
    for child in multiprocessing.active_children():
        child.terminate()
    os.write(2, f"rlhf {name}: stopped\n".encode())
    os._exit(130)


def _run(name: str, argv: list[str], is_process: bool) -> None:
    # Here: `rlhf --help` and `--version` need neither JAX nor yaml.
    from rlhf.command_line import parsed, surroundings

    argv, around = surroundings(argv)
    module = importlib.import_module(COMMANDS[name][0])
    command = module.main
    # A command whose options are those of another reads its own words.
    arguments = getattr(module, "parsed", parsed)(command, name, argv)
    # In another's process JAX's settings are the caller's.
    if is_process:
        from rlhf.training import compilations

        compilations.keep_on_disk(around.compilation_cache)
        _join_hosts(name, around)
    returned = command(**arguments)
    # Of a recipe; tools say themselves what they have made.
    if folder := getattr(returned, "folder", None):
        print(f"rlhf {name}: the model is in {folder / 'model'}", file=sys.stderr)


def _join_hosts(name: str, around: Any) -> None:
    """Joins the other processes of a recipe's run, where there are."""
    if COMMANDS[name][0].startswith("rlhf.recipes"):
        from rlhf import hosts

        hosts.start(
            around.coordinator,
            around.num_processes,
            around.process_id,
            start_timeout=around.start_timeout,
            heartbeat_timeout=around.heartbeat_timeout,
        )
    elif any(x is not None for x in (around.coordinator, around.num_processes, around.process_id)):
        raise ValueError(
            "runs in one process; leave out --coordinator, --num_processes and --process_id"
        )


def _out_of_memory(name: str, error: RuntimeError) -> str:
    """What was too large, and which options of the command make it smaller."""
    from rlhf.command_line import options_of

    options = options_of(importlib.import_module(COMMANDS[name][0]).main)
    cures = [f"--{option} {value}" for option, value in SMALLER.items() if option in options]
    what = str(error).splitlines()[0].partition("RESOURCE_EXHAUSTED: ")[2]
    cure = f"try {', '.join(cures)}" if cures else "take a larger device"
    return f"a device has not enough memory: {what}{_elsewhere(error)}; {cure}"


def _elsewhere(error: BaseException) -> str:
    """Where the whole traceback is, of an error that another package raised: it may be no mistake
    of the user's.
    """
    # The innermost frame: where the error was raised.
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    package = frame.f_globals.get("__name__", "").partition(".")[0]
    if package == "rlhf":
        return ""
    with tempfile.NamedTemporaryFile(
        "w", prefix="rlhf-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        traceback.print_exception(error, file=file)
    return f" (raised by {package}; traceback in {file.name})"


def overview() -> str:
    """All commands, one a line."""
    lines = "\n".join(f"  {name:<12}{text}" for name, (_, text) in COMMANDS.items())
    start = "usage: rlhf COMMAND [options]\n\nPost-train language models in JAX."
    return f"{start}\n\n{lines}\n\nrlhf COMMAND --help lists its options; rlhf --version."
