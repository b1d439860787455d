"""The command line: `rlhf demo`."""

import argparse
import os
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Runs a command; a mistake of the user's ends in one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="rlhf", description="Post-train language models in JAX.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="from nothing to an aligned model on a CPU, in minutes",
        description="Trains a small language model and a reward model on generated movie reviews, then moves the language "
        "model towards positive ones.  Needs no download.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--algorithm", choices=("ppo", "grpo", "dpo"), default="ppo", help="of the last phase")
    demo.add_argument("--seed", type=_count(0), default=0, help="of everything random")
    demo.add_argument("--output", metavar="DIR", default=None, help="a new folder (default: runs/demo-ALGORITHM-SEED)")
    demo.add_argument("--steps", type=_count(1), default=None, help="of every phase, instead of each phase's own number")
    demo.add_argument("--control", choices=("none", "shuffled"), default="none", help="shuffled: rewards dealt out at random")
    arguments = vars(parser.parse_args(argv))
    del arguments["command"]
    if arguments["output"] is None:
        control = "" if arguments["control"] == "none" else f"-{arguments['control']}"
        arguments["output"] = str(Path("runs") / f"demo-{arguments['algorithm']}-{arguments['seed']}{control}")

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would advise every user of JAX to install PyTorch
    from rlhf import demo as demo_module  # after parsing: --help needs no JAX

    try:
        demo_module.main(**arguments)
    except ValueError as error:
        print(f"rlhf demo: {error}", file=sys.stderr)
        return 2
    return 0


def _count(least: int):
    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, but is {value}")
        return value

    parse.__name__ = "integer"
    return parse
