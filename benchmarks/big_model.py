"""Models of real shapes, random weights in bfloat16 shards: loading, a forward pass, a step, and their peer's.

    python benchmarks/big_model.py [--shape Qwen3.5-0.8B] [--peer python-with-torch] [--json FILE]

Each measurement is a process of its own.  `extra host MiB` is what the process' peak memory grew by, from just before the
call; the file's pages in the system's cache are not the process'.  `--peer` compares the logits with those of transformers.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMON: dict = {"tie_word_embeddings": True, "hidden_act": "silu", "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16"}  # fmt: skip
SHAPES: dict[str, dict] = {
    "Qwen2.5-0.5B": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151_936, "hidden_size": 896,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864,
        "max_position_embeddings": 32_768, "rope_theta": 1e6, "use_sliding_window": False,
    },
    # Three layers of the gated delta rule to one of attention.
    "Qwen3.5-0.8B": {
        "model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"], "vocab_size": 248_320,
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 256, "intermediate_size": 3584, "linear_num_key_heads": 16, "linear_num_value_heads": 16,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4, "max_position_embeddings": 262_144, "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
    },
}  # fmt: skip
TOKENS = [list(range(7, 39)), list(range(100_000, 100_032))]


def peak() -> float:
    """The process' largest resident memory so far, MiB; `ru_maxrss` would count the parent's too."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) / 1024


def make(folder: Path, shape: dict) -> None:
    """Writes the folder: config and two shards."""
    import jax
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    from rlhf.models import huggingface, mapping
    from rlhf.models import huggingface_config as configs

    (folder / "config.json").write_text(json.dumps({**COMMON, **shape}))
    config = huggingface.read_config(folder)
    lm = configs.lm_of(config)
    shapes = {
        path: leaf.shape
        for path, leaf in mapping.flat(jax.eval_shape(lm.init, jax.random.key(0))).items()
    }
    rows = configs.family_of(shape["model_type"]).rows(config)
    places = mapping.places(rows, shapes, config)
    rng = np.random.default_rng(0)
    names = list(places)
    files: dict[str, str] = {}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        tensors = {}
        for name in part:
            x = rng.standard_normal(mapping.file_shape(places[name], shapes), np.float32)
            x = 1 - configs.decoder_of(config).norm_offset + 0.1 * x if "norm" in name else x * 0.02
            tensors[name] = x.astype(ml_dtypes.bfloat16)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": files})
    )


def load(folder: Path) -> dict:
    """Loads in bfloat16, as it is stored."""
    import jax
    import jax.numpy as jnp

    import rlhf.models.huggingface  # which `rlhf.load` imports: not on the clock

    jnp.zeros(()).block_until_ready()
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**20
    before, begin = peak(), time.perf_counter()
    _, params, _ = rlhf.load(folder, dtype=jnp.bfloat16)
    jax.block_until_ready(params)
    extra = peak() - before
    return {
        "what": "load",
        "seconds": time.perf_counter() - begin,
        "extra host MiB": extra,
        "of the files": extra / size,
    }


def forward(folder: Path) -> dict:
    """Logits of two rows in float32, written to the folder."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import rlhf

    before = peak()
    lm, params, _ = rlhf.load(folder)
    tokens = jnp.asarray(TOKENS, jnp.int32)
    where = dict(
        positions=jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
        segment_ids=jnp.ones_like(tokens),
    )
    run = jax.jit(lambda params: lm.unembed(params, lm.hidden(params, tokens, **where)[0]))
    np.save(folder / "ours.npy", run(params))
    begin = time.perf_counter()
    run(params).block_until_ready()
    return {
        "what": "forward, float32",
        "seconds": time.perf_counter() - begin,
        "extra host MiB": peak() - before,
    }


def step(folder: Path) -> dict:
    """One GRPO step on LoRA adapters: 8 rows of 128 tokens, the base in bfloat16, rematerialised block by block."""
    import jax
    import jax.numpy as jnp
    import optax

    import rlhf
    from rlhf import adapters, rollouts
    from rlhf.models.huggingface_config import config_of, decoder_of
    from rlhf.recipes import grpo
    from rlhf.training.policy import Policy

    lm, params, _ = rlhf.load(folder, dtype=jnp.bfloat16, remat="full")
    trainable, frozen = adapters.add(params, jax.random.key(0), rank=16)
    # Prompts of 32 tokens, four completions of 96 each.
    tokens = jax.random.randint(
        jax.random.key(1), (8, 128), 0, decoder_of(config_of(lm)).vocab_size
    )
    real = jnp.ones_like(tokens, bool)
    rows = rollouts.unpacked_rows(tokens, real, real & (jnp.arange(128) >= 32)[None, :])
    where = dict(positions=rows.positions, segment_ids=rows.segment_ids)
    logprobs = rollouts.token_logprobs(lm, params, tokens, **where)
    rollout = rollouts.Rollout(
        tokens, rows.mask, **where, logprobs=logprobs, sampling_logprobs=logprobs,
        finished=real[:, 0], temperature=jnp.float32(1),
    )  # fmt: skip
    rewards = jnp.array([1.0, 0, 0, 0, 1, 1, 0, 0])
    optimizer = optax.adamw(1e-4)
    state = rlhf.init_state(trainable, optimizer, jax.random.key(2), {"frozen": frozen})
    update = grpo.make_update(Policy(lm, has_adapters=True), optimizer, num_samples=4)
    begin = time.perf_counter()
    arguments = state, rollout, rewards, jax.random.key(3)
    compiled = jax.jit(update, donate_argnums=0).lower(*arguments).compile()
    compiling = time.perf_counter() - begin
    begin = time.perf_counter()
    state, metrics = compiled(*arguments)
    grad_norm = float(metrics["grad_norm"])
    seconds = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    temporary = memory.temp_size_in_bytes / 2**20 if memory else float("nan")
    return {
        "what": "LoRA GRPO step, 8 × 128",
        "seconds": seconds,
        "compile seconds": compiling,
        "peak MiB": peak(),
        "temporary MiB": temporary,
        "gradient's norm": grad_norm,
    }


PEER = """
import sys, numpy as np, torch, transformers
folder, tokens = sys.argv[1], eval(sys.argv[2])
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
with torch.no_grad():
    np.save(folder + "/theirs.npy", model(torch.tensor(tokens)).logits.numpy())
"""


def compare(folder: Path, python: str) -> dict:
    import numpy as np

    subprocess.run([python, "-c", PEER, str(folder), repr(TOKENS)], check=True)
    ours, theirs = (np.load(folder / f"{name}.npy") for name in ("ours", "theirs"))
    return {
        "what": "logits against transformers",
        "largest difference": float(np.abs(ours - theirs).max()),
        "largest logit": float(np.abs(theirs).max()),
        "same next token": float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="Qwen2.5-0.5B")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peer", help="a python that has torch and transformers")
    parser.add_argument(
        "--only", nargs=2, help=argparse.SUPPRESS
    )  # a measurement in its own process: its name, the folder
    args = parser.parse_args()
    if args.only:
        print(json.dumps(globals()[args.only[0]](Path(args.only[1]))))
        return
    import report

    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), SHAPES[args.shape])
        rows = []
        for name in ("load", "forward", "step"):
            command = [sys.executable, __file__, "--only", name, folder]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
        if args.peer:
            rows.append(compare(Path(folder), args.peer))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    report.show(
        f"{args.shape}'s shape",
        [{name: row.get(name, "") for name in columns} for row in rows],
        args.json,
    )


if __name__ == "__main__":
    main()
