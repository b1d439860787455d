"""Steps of large models planned on pods and clusters, none of which is here: memory, collectives, times.

    python benchmarks/plan.py [--only TEXT] [--again]

Needs the compilers of `rlhf[plan-tpu]` and `rlhf[plan-gpu]`; plans whose compiler is missing are left
out.  Each is a process of its own, `rlhf plan …`, on a folder with a config.json made of the numbers
below and a small tokenizer.  What is planned already stays in `benchmarks/results/plan.json`, unless
`--again`.  `plan.md` beside it is the table.
"""

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import report

from rlhf import tasks

RESULTS = Path(__file__).parent / "results"
LIMIT = 600  # seconds of a plan
# Tokens.  Their sum is no other size of these models: a shape that has it twice holds scores.
PROMPT, NEW = 512, 576
SAMPLES = 8
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
    "max_position_embeddings": 8192, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "hidden_act": "silu", "num_key_value_heads": 8,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Llama-3-8B": {
        **LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "Llama-3-70B": {
        **LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "Qwen2.5-0.5B": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151936,
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768,
        "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "hidden_act": "silu",
    },
}  # fmt: skip


class Case(NamedTuple):
    recipe: str
    model: str
    topology: str
    devices: int
    rows: float  # of a device: sequences of an SFT step, prompts of a GRPO step
    mesh: tuple[str, ...] = ()  # (): the default
    length: int = 2048  # tokens of SFT's rows


CASES = (
    Case("sft", "Llama-3-8B", "v5p:4x4x4", 64, 4),
    Case("grpo", "Llama-3-8B", "v5p:4x4x4", 64, 0.5),
    Case("sft", "Llama-3-8B", "v5e:16x16", 256, 1),
    Case("grpo", "Llama-3-8B", "v5e:16x16", 256, 0.25, ("--fsdp", "64", "--tensor", "4")),
    Case("sft", "Llama-3-8B", "h200:1x1x8", 8, 4),
    Case("grpo", "Llama-3-8B", "h200:1x1x8", 8, 1),
    Case("sft", "Llama-3-8B", "h200:1x8x8", 64, 4),
    Case("grpo", "Llama-3-8B", "h200:1x8x8", 64, 1),
    Case("sft", "Llama-3-8B", "h200:1x64x8", 512, 4),
    Case("grpo", "Llama-3-8B", "h200:1x64x8", 512, 1),
    Case("sft", "Llama-3-70B", "v5p:8x8x8", 512, 2),
    Case("sft", "Qwen2.5-0.5B", "v6e:2x4", 8, 4),
    Case("grpo", "Qwen2.5-0.5B", "v6e:2x4", 8, 1),
    Case("sft", "Qwen2.5-0.5B", "v6e:2x4", 8, 0.25, ("--fsdp", "2", "--sequence", "4"), 32768),
)


def name_of(case: Case) -> str:
    long = [] if case.length == 2048 else [f"of {case.length} tokens"]
    return " ".join([case.recipe, case.model, case.topology, *case.mesh, *long])


def is_installed(case: Case) -> bool:
    compilers = (
        ("jax_cuda13_plugin", "jax_cuda12_plugin") if case.topology[0] == "h" else ("libtpu",)
    )
    return any(importlib.util.find_spec(compiler) for compiler in compilers)


def make_model(folder: Path, model: str) -> None:
    """A folder that holds a model's shape, without weights."""
    tasks.find("task:reverse").tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(MODELS[model]))


def plan(case: Case) -> dict[str, Any]:
    """What `rlhf plan` writes, with the seconds and gigabytes that it took here."""
    batch = int(case.rows * case.devices)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_model(folder / "model", case.model)
        # Letters are tokens of the task's; one more ends a row.
        row = (
            {"text": "a" * case.length} if case.recipe == "sft" else {"prompt": "a" * (PROMPT - 1)}
        )
        (folder / "rows.jsonl").write_text((json.dumps(row) + "\n") * batch)
        argv = [
            sys.executable, "-m", "rlhf", "plan", case.recipe, "--topology", case.topology,
            "--json", str(folder / "plan.json"), "--model", str(folder / "model"),
            "--dataset", str(folder / "rows.jsonl"), "--batch_size", str(batch),
            "--dtype", "bfloat16", "--remat", "full", *case.mesh,
        ]  # fmt: skip
        if case.recipe == "sft":
            argv += ["--max_length", str(case.length)]
        else:
            argv += [
                "--reward",
                "length",
                "--max_new_tokens",
                str(NEW),
                "--num_samples",
                str(SAMPLES),
            ]
        started = time.perf_counter()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ran = subprocess.run(argv, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=False)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        if ran.returncode:
            raise SystemExit(f"{name_of(case)}: exit code {ran.returncode}")
        found = json.loads((folder / "plan.json").read_text())
    return {
        **found,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime,
        "commit": report.machine()["commit"],
        # Of all children so far the most; Linux counts in KiB.
        "host_gb": used.ru_maxrss * 1024 / 1e9,
    }


def must_move(found: dict[str, Any], model: str) -> float:
    """Bytes that FSDP with remat must bring to a device: matrices of layers in bfloat16 gathered
    twice, the output matrix once, their gradients reduced once in float32, and what is left of these
    over `data` and `sequence`.
    """
    mesh = {"sequence": 1, **found["mesh"]}
    fsdp, tensor = mesh["fsdp"], mesh["tensor"]
    # Devices that share a row's columns each have a part of its gradient.
    data = mesh["data"] * mesh["sequence"]
    config = MODELS[model]
    output = config["vocab_size"] * config["hidden_size"] / tensor
    # Of an embedding that is not the output matrix too, a few rows move.
    tables = output if config["tie_word_embeddings"] else 2 * output
    layers = found["parameters"] / tensor - tables
    gathered = 2 * (2 * layers + output) * (fsdp - 1) / fsdp
    reduced = 4 * (layers + output) * (fsdp - 1) / fsdp
    return gathered + reduced + 2 * 4 * (layers + output) / fsdp * (data - 1) / data


def summary(name: str, found: dict[str, Any]) -> dict[str, str]:
    """A line of the table."""
    recipe, model = name.split()[:2]
    rows = {row["program"]: row for row in found["rows"]}
    update, sample = rows["update"], rows.get("sample")
    needed = max(row["needed"] for row in found["rows"])
    squares = sorted({shape for row in found["rows"] for shape in row["squares"]})
    moved = sum(one["bytes"] for one in update["moved"])
    token = share = ""
    if sample is not None and sample["token"] is not None:
        token = f"{sum(one['bytes'] for one in sample['moved'] if one['per_token']) / 2**20:.2f}"
        share = f"{sample['token_least'] / max(sample['token'].values()):.0%}"
    spent = [f"{found['seconds']:.0f} s", f"{found['host_gb']:.1f} GB"]
    if "cpu_seconds" in found:
        spent.insert(1, f"{found['cpu_seconds']:.0f} CPU s")
    return {
        "plan": name,
        "mesh": " × ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1),
        "fits": f"{'yes' if found['fits'] else 'no'}, {needed / 2**30:.1f} GiB",
        "temporaries of the update, GiB": f"{update['temporaries'] / 2**30:.2f}",
        "MiB a token": token,
        "update moves, GiB": f"{moved / 2**30:.1f}",
        "of what it must": f"{moved / must_move(found, model):.2f}" if recipe == "sft" else "",
        "weights by all-reduce": f"{update['weights_by_all_reduce'] / 2**20:.0f} MiB",
        "[.., T, T]": ", ".join(squares[:2]) or "none",
        "update at best, s": f"{max(update['times'].values()):.2f}",
        "MFU": f"{update['mfu']:.0%}" if update["mfu"] else "",
        "sampling of its memory bound": share,
        "here": ", ".join(spent),
        "commit": found["commit"],
    }


HEAD = """# Large steps, planned

Programs of the recipes, compiled ahead of time by `python benchmarks/plan.py` on a machine without an
accelerator (`benchmarks/results/plan.json` has all of it).  Figures are of one device.  `sft`: rows of
2,048 tokens, where the plan names no other length; `grpo`: prompts of 512 tokens, 8 samples each, 576
new tokens; bfloat16 with float32 masters, AdamW, `--remat full`.

- *fits*: parameters, moments, batch and temporaries of the program that needs most.
- *MiB a token*: what a decoding loop brings from other devices for a token.
- *must*: with L parameters in layers and O in the output matrix, on fsdp n, data d and tensor t: layers in
  bfloat16 gathered for the forward pass and for its recomputation, the output matrix once, gradients reduced and
  scattered in float32: (2 · (2L + O) + 4 · (L + O)) / t · (n - 1)/n, and the rest of these summed over `data` and
  `sequence`: 2 · 4 (L + O)/(t n) · (d - 1)/d bytes.  Activations are not in it.
- *at best*, *MFU*: the longest of products at the peak rate, of memory traffic and of links, all
  overlapped (`rlhf/planning/roofline.py`; rates and their sources: `rlhf/training/chips.py`).  MFU is of
  6 operations a parameter and token, or of those that are computed where they are fewer: of `grpo` a prompt is
  read once for its 8 samples.
- *sampling of its memory bound*: seconds in which memory brings weights and cache once, of those that the
  compiled loop takes for a token.
- *[.., T, T]*: shapes that end in the rows' length twice, or in a device's part of it and the length.
  pred[2048,2048] holds no scores: 512 devices look up tokens of 2,048 rows.
- *MiB a token* with `--tensor 4` is activations: two all-reduces a layer, of 8 rows.
- *here*: what the plan took on this machine; its memory is the most of all plans of that run so far.
"""


def write(plans: dict[str, Any]) -> None:
    ordered = {name_of(case): plans[name_of(case)] for case in CASES if name_of(case) in plans}
    # A table is made over several runs: each line has its own commit.
    about_all = report.machine()
    machine = {key: about_all[key] for key in about_all if key not in ("device", "commit")}
    text = {"machine": machine, "plans": ordered}
    (RESULTS / "plan.json").write_text(json.dumps(text, indent=1) + "\n")
    lines = [summary(name, found) for name, found in ordered.items()]
    if not lines:
        return
    table = [list(lines[0]), ["---"] * len(lines[0]), *[list(line.values()) for line in lines]]
    missing = [name_of(case) for case in CASES if name_of(case) not in ordered]
    left_out = f"\nNot planned here: {', '.join(missing)}.\n" if missing else ""
    rows = "\n".join(f"| {' | '.join(row)} |" for row in table)
    about = ", ".join(f"{key} {value}" for key, value in machine.items())
    (RESULTS / "plan.md").write_text(f"{HEAD}\n{rows}\n{left_out}\n{about}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="plans whose names hold this text")
    parser.add_argument("--again", action="store_true", help="also those that are there")
    args = parser.parse_args()
    file = RESULTS / "plan.json"
    plans = json.loads(file.read_text())["plans"] if file.exists() else {}
    for case in CASES:
        name = name_of(case)
        if args.only not in name or (name in plans and not args.again) or not is_installed(case):
            continue
        plans[name] = plan(case)
        write(plans)
        seconds = plans[name]["seconds"]
        print(
            name, f"{seconds:.0f} s" + (f", above {LIMIT}" if seconds > LIMIT else ""), flush=True
        )
    write(plans)


if __name__ == "__main__":
    main()
