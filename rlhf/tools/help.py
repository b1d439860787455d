"""Where people from other systems find what they know."""

import importlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from rlhf import trl_names, trl_tables
from rlhf.command_line import options_of
from rlhf.ranges import checked


@checked
def main(topic: Literal["trl"] = "trl") -> None:
    """Lists option names of TRL that work here, what they are called, and where defaults differ.

    Args:
      topic: whose names.
    """
    print(
        f"Names of {topic.upper()}'s options that work here, on the command line and in --config "
        "files:\n"
    )
    names = sorted((trl_tables.RENAMED | trl_tables.TARGETS).items())
    width = max(len(theirs) for theirs, _ in names)
    for theirs, ours in names:
        # "translated": the value changes too, not the name alone.
        translated = theirs in trl_names.RULES and theirs not in trl_names.ALWAYS
        print(f"  --{theirs:<{width}}  --{ours}{' (translated)' if translated else ''}")
    print(f"\nTranslated so that the same numbers mean the same: {NOTES}\n")
    print("Defaults that differ, and TRL 1.16's:")
    _table("every recipe", trl_names.differences(trl_tables.TRAINER, defaults_of("sft")))
    alike = []
    for command, defaults in trl_tables.DEFAULTS.items():
        found = trl_names.differences(defaults, defaults_of(command))
        if found:
            _table(f"rlhf {command}", found)
        else:
            alike.append(command)
    print(f"\nNo other in {', '.join(alike)}.")
    print(
        f"TRL 1.16 has no trainer of {', '.join(trl_tables.GONE)}: theirs are of the last that had."
    )


def _table(title: str, rows: Mapping[str, tuple[Any, Any]]) -> None:
    print(f"\n  {title:<26}{'here':<16}TRL")
    for name, (ours, theirs) in rows.items():
        print(f"    --{name:<22}{_shown(ours):<16}{_shown(theirs)}")


NOTES = """
--batch_size is the whole batch of a step, in prompts or rows: TRL's is
per_device_train_batch_size x gradient_accumulation_steps (x devices), and in GRPO and RLOO counts
completions, of which num_generations are one prompt.  --steps counts batches of completions where
one is several updates; max_steps counts updates.  warmup_steps below 1 is a share, here
--warmup_ratio.  epsilon is both --clip_low and --clip_high.  --lora_targets null is every matrix of
the blocks, where PEFT has a list by architecture (of most q_proj and v_proj).  Training is in
float32 unless --dtype bfloat16 (TRL: bf16); what is trained has float32 masters.""".strip()


def defaults_of(command: str) -> dict[str, Any]:
    """Every option of a command with its default, from its signature; None where it must be
    given.
    """
    # Here: `rlhf.cli` names this module among its commands.
    from rlhf.cli import COMMANDS

    options = options_of(importlib.import_module(COMMANDS[command][0]).main)
    return {name: None if option.needed else option.default for name, option in options.items()}


def _shown(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
