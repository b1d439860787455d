"""Sampling: tokens per second beside transformers' `generate`, continuous batching beside fixed batches, what a token costs.

    python benchmarks/decode.py [--json benchmarks/results/decode.json] [--repeats 7] [--only peer|batching|cost]

1. 64 prompts of 16 tokens, 64 new tokens each, sampled at temperature 1 by both sides from the same weights (Qwen2's
   architecture, random, float32), in turns; transformers runs with torch in an environment of its own, which the script makes.
2. 512 prompts whose completions end with probability 1 / 32 a token, at most 128: `generate_many` with 64 slots beside
   `generate` on 64 prompts after another.
3. The time of a rollout, and the random numbers that its program asks for, by new tokens and by vocabulary.
"""

import json
import math
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import peers
import report

import rlhf
from rlhf import rollouts
from rlhf.models import TransformerConfig, transformer

ROWS, PROMPT, NEW = 64, 16, 64
SHAPES = {
    "64 / 2 / 128": (64, 2, 128),
    "256 / 4 / 4,096": (256, 4, 4096),
    "512 / 8 / 4,096": (512, 8, 4096),
}
PEER = """
import json, sys, time, torch, transformers
torch.set_grad_enabled(False)
models = {}
for line in sys.stdin:
    question = json.loads(line)
    time.sleep(0.3)
    folder, tokens = question["folder"], torch.tensor(question["tokens"]).to(question["device"])
    if folder not in models:
        models = {folder: transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(question["device"])}
    begin = time.perf_counter()
    out = models[folder].generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0,
        max_new_tokens=question["new"], min_new_tokens=question["new"], eos_token_id=None,
    )
    if question["device"] != "cpu":
        torch.cuda.synchronize()
    print(json.dumps({"seconds": time.perf_counter() - begin, "shape": list(out.shape)}), flush=True)
"""


def model(hidden, layers, vocabulary):
    config = TransformerConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_layers=layers, num_heads=max(1, hidden // 64),
        num_kv_heads=max(1, hidden // 128), mlp_size=4 * hidden, qkv_bias=True, tied=True,
    )  # fmt: skip
    lm = transformer(config)
    return lm, lm.init(jax.random.key(0))


def prompts(rows, vocabulary):
    return rollouts.Prompts(
        jax.random.randint(jax.random.key(1), (rows, PROMPT), 0, vocabulary),
        jnp.ones((rows, PROMPT), bool),
    )


def seconds(fn) -> float:
    time.sleep(0.3)  # until the other side's threads have come to rest
    begin = time.perf_counter()
    jax.block_until_ready(fn())
    return time.perf_counter() - begin


def against_transformers(repeats: int) -> list[dict]:
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    python = peers.environment("transformers", "torch==2.13.0", "transformers==5.23.0")
    peer, rows = peers.Process(python, PEER), []
    for name, shape in SHAPES.items():
        lm, params = model(*shape)
        batch = prompts(ROWS, shape[2])
        with tempfile.TemporaryDirectory() as folder:
            rlhf.save(folder, lm, params, family="qwen2", max_position_embeddings=512)
            question = dict(folder=folder, tokens=batch.tokens.tolist(), new=NEW, device=device)
            ours = lambda i, lm=lm, params=params, batch=batch: rollouts.generate(
                lm, params, batch, jax.random.key(i), max_new_tokens=NEW
            )
            compile_seconds = seconds(lambda ours=ours: ours(0))
            assert peer.ask(**question)["shape"] == [ROWS, PROMPT + NEW]
            pairs = [
                (seconds(lambda i=i, ours=ours: ours(i)), peer.ask(**question)["seconds"])
                for i in range(repeats)
            ]
        mine, theirs = ([ROWS * NEW / pair[side] for pair in pairs] for side in (0, 1))
        rows.append(
            {"hidden / layers / vocabulary": name,
             "tokens/s": statistics.median(mine), "lowest": min(mine), "highest": max(mine),
             "transformers": statistics.median(theirs), "its lowest": min(theirs), "its highest": max(theirs),
             "ratio": statistics.median(a / b for a, b in zip(mine, theirs, strict=True)), "compile s": compile_seconds}
        )  # fmt: skip
    peer.close()
    return rows


def ends_often(logits, step):
    """Token 0, the end, with probability 1 / 32."""
    others = jax.nn.logsumexp(logits[:, 1:], axis=-1)
    return logits.at[:, 0].set(others - math.log(31))


def continuous_batching(repeats: int) -> list[dict]:
    lm, params = model(*SHAPES["256 / 4 / 4,096"])
    batch, limit = prompts(512, 4096), 128
    settings: dict = dict(max_new_tokens=limit, sampler=rollouts.sampler(ends_often), eos_ids=(0,))
    keys = jax.random.split(jax.random.key(0), 512)
    many = lambda: [rollouts.generate_many(lm, params, batch, keys, slots=64, **settings)]
    part = lambda i: jax.tree.map(lambda x: x[i : i + 64], batch)
    fixed = lambda: [
        rollouts.generate(lm, params, part(i), keys[i : i + 64], **settings)
        for i in range(0, 512, 64)
    ]
    sides = {"slots": many, "fixed": fixed}
    compile_seconds = {name: seconds(fn) for name, fn in sides.items()}
    tokens = {name: sum(int(r.mask.sum()) for r in fn()) for name, fn in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, fn in sides.items():
            times[name].append(seconds(fn))
    speed = {name: [tokens[name] / t for t in times[name]] for name in sides}
    return [
        {"512 prompts": {"slots": "generate_many, 64 slots", "fixed": "generate, 8 batches of 64"}[name],
         "tokens": tokens[name], "tokens/s": statistics.median(speed[name]), "lowest": min(speed[name]),
         "highest": max(speed[name]), "compile s": compile_seconds[name],
         "ratio": statistics.median(a / b for a, b in zip(speed[name], speed["fixed"], strict=True))}
        for name in sides
    ]  # fmt: skip


def random_numbers(jaxpr, times=1) -> int:
    """Random bits that a program asks for, in words of 32; loops of known length count as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("random_bits", "random_fold_in", "threefry2x32"):
            total += times * sum(math.prod(out.aval.shape) for out in equation.outvars)
        inside = times * equation.params.get("length", 1)
        for value in equation.params.values():
            for sub in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(sub, "jaxpr", sub)
                if hasattr(inner, "eqns"):
                    total += random_numbers(inner, inside)
    return total


def cost(repeats: int) -> list[dict]:
    rows = []
    for new, vocabulary in (
        (32, 4096),
        (64, 4096),
        (128, 4096),
        (256, 4096),
        (64, 1024),
        (64, 16_384),
        (64, 65_536),
    ):
        lm, params = model(64, 2, vocabulary)
        batch = prompts(ROWS, vocabulary)
        run = jax.jit(
            lambda key, lm=lm, params=params, batch=batch, new=new: rollouts.generate(
                lm, params, batch, key, max_new_tokens=new, early_end=False
            )
        )
        jaxpr = jax.make_jaxpr(run)(jax.random.key(0)).jaxpr
        compiled = run.lower(jax.random.key(0)).compile()
        compiled(jax.random.key(0))
        took = statistics.median(
            seconds(lambda i=i, compiled=compiled: compiled(jax.random.key(i)))
            for i in range(repeats)
        )
        rows.append(
            {"new tokens": new, "vocabulary": vocabulary, "ms": 1e3 * took, "ms / token": 1e3 * took / new,
             "random words": random_numbers(jaxpr), "random words / token": random_numbers(jaxpr) / new / ROWS,
             "compiled operations": sum(" = " in line for line in (compiled.as_text() or "").splitlines())}
        )  # fmt: skip
    return rows


PARTS = {
    "peer": ("64 rows × 64 new tokens, float32", against_transformers),
    "batching": (
        "completions of 32 tokens on average, at most 128; 256 / 4 / 4,096",
        continuous_batching,
    ),
    "cost": (f"cost of a rollout of {ROWS} rows; hidden 64, 2 layers", cost),
}


def main():
    parser = report.arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", choices=PARTS)
    args = parser.parse_args()
    tables = []
    for name, (title, measure) in PARTS.items():
        if args.only in (None, name):
            tables.append((title, measure(args.repeats)))
            report.show(*tables[-1], None)
    if args.json:
        about = report.machine()
        results = [{"title": title, "rows": rows} for title, rows in tables]
        Path(args.json).write_text(
            json.dumps({"machine": about, "tables": results}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
