"""The gated delta rule of 8 rows of 1,024 tokens: ours by chunks and token by token, and transformers' own on a CPU.

    python benchmarks/delta_rule.py [--peer python-with-torch] [--json benchmarks/results/delta_rule.json]

Qwen3.5-0.8B's heads: 16, 128 wide.  The sides take turns in one run; a figure is the median of its turns.  `--peer` also
holds our outputs and gradients against transformers'.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peers
import report

from rlhf.models.delta import delta_rule

ROWS, HEADS, TOKENS, WIDTH = 8, 16, 1024, 128
TURNS = 5
CHUNKS = {"by chunks": 64, "token by token": 1}
NAMES = ("q", "k", "v", "decay", "beta")
# transformers' inputs are [rows, tokens, heads, width]; it norms q and k, and scales q, by itself.
PEER = """
import json, sys, time
import numpy as np, torch
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule as rule
inputs = np.load(sys.argv[1] + "/inputs.npz")
q, k, v, decay, beta = (
    torch.tensor(inputs[name]).transpose(1, 2).contiguous() for name in ("q", "k", "v", "decay", "beta")
)
decay = decay[..., 0]
leaves = [x.requires_grad_() for x in (q, k, v, decay, beta)]
for line in sys.stdin:
    backward = json.loads(line)["backward"]
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        out = rule(*leaves, chunk_size=64)[0]
    if backward:
        grads = torch.autograd.grad(torch.sin(out).sum(), leaves)
    seconds = time.perf_counter() - start
    np.save(sys.argv[1] + "/out.npy", out.detach().numpy())
    if backward:
        np.savez(sys.argv[1] + "/grads.npz", *[g.numpy() for g in grads])
    print(json.dumps({"seconds": seconds}), flush=True)
"""


def inputs(seed: int = 0) -> dict[str, np.ndarray]:
    """`[B, H, T, ..]`, with keys and queries of length 1, as the layer gives them."""
    rng = np.random.default_rng(seed)
    shape = ROWS, HEADS, TOKENS
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    arrays = {
        "q": unit(rng.normal(size=(*shape, WIDTH))),
        "k": unit(rng.normal(size=(*shape, WIDTH))),
        "v": rng.normal(size=(*shape, WIDTH)),
        "decay": -rng.exponential(0.1, size=(*shape, 1)),
        "beta": rng.uniform(size=shape),
    }
    return {name: x.astype(np.float32) for name, x in arrays.items()}


def ours(chunk: int, backward: bool):
    segment_ids = jnp.ones((ROWS, TOKENS), jnp.int32)

    def forward(q, k, v, decay, beta):
        return delta_rule(q * WIDTH**-0.5, k, v, decay, beta, segment_ids, chunk=chunk)[0]

    if not backward:
        return jax.jit(forward)

    def loss(*arrays):
        out = forward(*arrays)
        return jnp.sin(out).sum(), out

    return jax.jit(jax.grad(loss, argnums=tuple(range(len(NAMES))), has_aux=True))


def side(chunk: int, backward: bool, arrays):
    """A function that computes once, and returns how many seconds that took."""
    fn = ours(chunk, backward)

    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready(fn(*arrays))
        return time.perf_counter() - start

    return once


def differences(folder: Path, arrays) -> dict[str, float]:
    """Largest, of outputs and of each gradient over its own largest entry."""
    grads, out = ours(64, backward=True)(*arrays)
    theirs = np.load(folder / "out.npy").swapaxes(1, 2)
    found = {"outputs": float(np.abs(out - theirs).max())}
    for name, mine, other in zip(NAMES, grads, np.load(folder / "grads.npz").values(), strict=True):
        other = other.swapaxes(1, 2).reshape(mine.shape)
        found[f"gradient of {name}"] = float(np.abs(mine - other).max() / np.abs(other).max())
    return found


def row(peer, backward: bool, arrays) -> dict:
    """Seconds of all sides, by turns."""
    sides = {name: side(chunk, backward, arrays) for name, chunk in CHUNKS.items()}
    if peer:
        sides["transformers"] = lambda: peer.ask(backward=backward)["seconds"]
    for once in sides.values():
        once()  # compiles, or warms up
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(TURNS):
        for name, once in sides.items():
            seconds[name].append(once())
    found = {name: statistics.median(values) for name, values in seconds.items()}
    first = next(iter(CHUNKS))
    ratios = {f"{name} / {first}": x / found[first] for name, x in found.items() if name != first}
    return {
        "what": "value and gradient" if backward else "value",
        **{f"{name}, s": value for name, value in found.items()},
        **ratios,
    }


def main() -> None:
    parser = report.arguments(__doc__)
    parser.add_argument("--peer", help="a python that has torch and transformers")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        given: dict[str, Any] = inputs()
        np.savez(Path(folder) / "inputs.npz", **given)
        arrays = [jnp.asarray(x) for x in given.values()]
        peer = peers.Process(args.peer, PEER, folder) if args.peer else None
        rows = [row(peer, backward, arrays) for backward in (False, True)]
        title = f"gated delta rule, {ROWS} × {TOKENS} tokens, {HEADS} heads of {WIDTH}, float32"
        if peer:
            peer.close()
            print(differences(Path(folder), arrays))
        report.show(title, rows, args.json)


if __name__ == "__main__":
    main()
