"""A model of Qwen2.5-0.5B's real shape, random weights in bfloat16 shards: loading, a forward pass, and its peer's.

    python benchmarks/big_model.py [--peer python-with-torch] [--json benchmarks/results/big_model.json]

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

SHAPE: dict = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151_936, "hidden_size": 896,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864,
    "max_position_embeddings": 32_768, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    "hidden_act": "silu", "use_sliding_window": False, "torch_dtype": "bfloat16",
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


def make(folder: Path) -> None:
    """Writes the folder: config and two shards."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    d, f, kv = SHAPE["hidden_size"], SHAPE["intermediate_size"], 128
    layer = {
        "input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,), "self_attn.q_proj.weight": (d, d),
        "self_attn.k_proj.weight": (kv, d), "self_attn.v_proj.weight": (kv, d), "self_attn.o_proj.weight": (d, d),
        "self_attn.q_proj.bias": (d,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,),
        "mlp.gate_proj.weight": (f, d), "mlp.up_proj.weight": (f, d), "mlp.down_proj.weight": (d, f),
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": (SHAPE["vocab_size"], d), "model.norm.weight": (d,)}
    shapes |= {
        f"model.layers.{i}.{name}": shape
        for i in range(SHAPE["num_hidden_layers"])
        for name, shape in layer.items()
    }
    rng = np.random.default_rng(0)
    names = list(shapes)
    files: dict[str, str] = {}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        tensors = {}
        for name in part:
            x = rng.standard_normal(shapes[name], np.float32)
            x = 1 + 0.1 * x if "norm" in name else x * 0.02
            tensors[name] = x.astype(ml_dtypes.bfloat16)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": files})
    )
    (folder / "config.json").write_text(json.dumps(SHAPE))


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
    from rlhf import adapters, losses, rollouts

    lm, params, _ = rlhf.load(folder, dtype=jnp.bfloat16, remat="full")
    trainable, frozen = adapters.add(params, jax.random.key(0), rank=16)
    tokens = jax.random.randint(jax.random.key(1), (8, 128), 0, SHAPE["vocab_size"])
    batch = rollouts.unpacked_rows(
        tokens, jnp.ones_like(tokens, bool), jnp.arange(128)[None, :] >= jnp.full((8, 1), 32)
    )
    advantages = losses.groups.to_tokens(
        losses.group_relative(jnp.array([[1.0, 0, 0, 0], [1, 1, 0, 0]])), batch.mask
    )
    weights = losses.weights.token_mean(batch.mask)
    where = dict(positions=batch.positions, segment_ids=batch.segment_ids)
    old = rollouts.token_logprobs(lm, params, tokens, **where)
    batch = batch._replace(advantages=advantages, weights=weights, old_logprobs=old)

    def loss_fn(own, frozen, batch, key):
        where = dict(positions=batch.positions, segment_ids=batch.segment_ids)
        logprobs = rollouts.token_logprobs(lm, adapters.join(own, frozen), batch.tokens, **where)
        per_token = losses.clipped_surrogate(
            logprobs, batch.old_logprobs, batch.advantages, batch.mask
        )
        return losses.weighted_sum(per_token, batch.weights), {}

    optimizer = optax.adamw(1e-4)
    state = rlhf.init_state(trainable, optimizer, jax.random.key(2), frozen)
    compiled = jax.jit(rlhf.train_step(loss_fn, optimizer)).lower(state, batch).compile()
    begin = time.perf_counter()
    state, metrics = compiled(state, batch)
    loss = float(metrics["loss"])
    seconds = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    temporary = memory.temp_size_in_bytes / 2**20 if memory else float("nan")
    return {
        "what": "LoRA GRPO step, 8 × 128",
        "seconds": seconds,
        "peak MiB": peak(),
        "temporary MiB": temporary,
        "loss": loss,
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
        make(Path(folder))
        rows = []
        for name in ("load", "forward", "step"):
            command = [sys.executable, __file__, "--only", name, folder]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
        if args.peer:
            rows.append(compare(Path(folder), args.peer))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    report.show(
        "Qwen2.5-0.5B's shape",
        [{name: row.get(name, "") for name in columns} for row in rows],
        args.json,
    )


if __name__ == "__main__":
    main()
