"""One training step beside TRL's, in turns in one run: SFT, DPO with the reference in the step, and a whole GRPO step.

    python benchmarks/train_step.py [--json benchmarks/results/train_step.json] [--steps 9] [--only sft|dpo|grpo]

Float32 and AdamW on both sides, the same weights (Qwen2's architecture: hidden 256, 4 layers, vocabulary 4,096) and rows.
sft: 16 rows of 256 tokens.  dpo: 16 pairs of 64 + 64 tokens.  grpo: 8 prompts of 16 tokens × 8 samples × 64 new tokens, a KL
coefficient of 0.04.  TRL 1.16 runs with torch in an environment of its own, which the script makes; its gradient checkpointing
is off, and its steps are timed from `on_step_begin` to `on_step_end`.  The first losses of both are compared.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
import report
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import rlhf
from rlhf import rollouts
from rlhf.data import Tokenized, batch, pairs
from rlhf.models import TransformerConfig, transformer
from rlhf.recipes import dpo, grpo, sft
from rlhf.training.pairs import shared_prefix
from rlhf.training.policy import Policy

VOCABULARY, END, PAD = 4096, 1, 0
ROWS, LENGTH, HALF, PROMPTS, PROMPT, SAMPLES, NEW, BETA, RATE = (
    16,
    256,
    64,
    8,
    16,
    8,
    64,
    0.04,
    1e-5,
)
PEER = r"""
import json, sys, time, torch, transformers, datasets, trl
kind, folder, steps, rate = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
reply, sys.stdout = sys.stdout, sys.stderr
tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
rows = datasets.Dataset.from_list([json.loads(line) for line in open(folder + "/" + kind + ".jsonl")])

class InTurns(transformers.TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        sys.stdin.readline()
        time.sleep(0.3)  # until the other side's threads have come to rest
        self.begin = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds = time.perf_counter() - self.begin

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            reply.write(json.dumps({"seconds": self.seconds, "loss": logs["loss"]}) + "\n")
            reply.flush()

common = dict(
    output_dir=folder + "/trl", max_steps=steps, learning_rate=rate, lr_scheduler_type="constant", use_cpu=True, bf16=False,
    gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, seed=0,
    max_grad_norm=1.0, logging_first_step=True, shuffle_dataset=False,
)
make = dict(model=model, train_dataset=rows, processing_class=tokenizer, callbacks=[InTurns()])
if kind == "sft":
    common["per_device_train_batch_size"] = len(rows)
    common.pop("shuffle_dataset")
    trl.SFTTrainer(args=trl.SFTConfig(**common, max_length=None), **make).train()
elif kind == "dpo":
    common["per_device_train_batch_size"] = len(rows)
    common.pop("shuffle_dataset")
    trl.DPOTrainer(args=trl.DPOConfig(**common, beta=0.1, max_length=None), **make).train()
else:
    new, samples = int(sys.argv[5]), int(sys.argv[6])
    config = trl.GRPOConfig(
        **common, per_device_train_batch_size=len(rows) * samples, num_generations=samples, max_completion_length=new,
        beta=0.04, generation_kwargs={"min_new_tokens": new}, temperature=1.0,
    )
    reward = lambda completions, completion_ids, **kwargs: [float(ids[0] % 2) for ids in completion_ids]
    trl.GRPOTrainer(args=config, reward_funcs=reward, **make).train()
"""


def tokenizer():
    """One word a token, so that both sides read the same ids."""
    words = {"<pad>": PAD, "<end>": END} | {f"w{i}": i for i in range(2, VOCABULARY)}
    inside = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inside.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inside, pad_token="<pad>", eos_token="<end>")


def text(ids) -> str:
    return " ".join(f"w{i}" for i in ids)


def ids_of(rng, length) -> list[int]:
    return rng.integers(2, VOCABULARY, length).tolist()


def optimizer():
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE, weight_decay=0.0))


def supervised(lm, params, folder: Path, rng):
    rows = [ids_of(rng, LENGTH) for _ in range(ROWS)]
    write(folder / "sft.jsonl", [{"input_ids": row} for row in rows])
    made = jax.device_put(batch([Tokenized(row, [True] * LENGTH) for row in rows]))
    return jax.jit(sft.make_update(Policy(lm), optimizer()), donate_argnums=0), made


def preferences(lm, params, folder: Path, rng):
    prompts, chosen, rejected = (
        [ids_of(rng, n) for _ in range(ROWS)] for n in (HALF, HALF - 1, HALF - 1)
    )
    names = ("prompt", "chosen", "rejected")
    write(
        folder / "dpo.jsonl",
        [
            dict(
                zip(names, (f"{text(p)} ", text(c), text(r)), strict=True)
            )  # a space, lest two words become one
            for p, c, r in zip(prompts, chosen, rejected, strict=True)
        ],
    )
    whole = lambda completions: [
        Tokenized([*p, *c, END], [False] * HALF + [True] * HALF)
        for p, c in zip(prompts, completions, strict=True)
    ]
    made = pairs(whole(chosen), whole(rejected))
    shared = shared_prefix(made)
    update = dpo.make_update(Policy(lm), optimizer(), shared=shared, reference_in_step=True)
    return jax.jit(update, donate_argnums=0), jax.device_put(made)


def sampled(lm, params, folder: Path, rng):
    prompts = [ids_of(rng, PROMPT) for _ in range(PROMPTS)]
    write(folder / "grpo.jsonl", [{"prompt": text(row)} for row in prompts])
    update = grpo.make_update(
        Policy(lm), optimizer(), num_samples=SAMPLES, kl_coef=BETA, max_new_tokens=NEW
    )

    def step(state, prompts):
        sample_key, update_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        rollout = rollouts.generate(
            lm, state.params, prompts, sample_key, max_new_tokens=NEW, num_samples=SAMPLES
        )
        rewards = (rollout.tokens[:, PROMPT] % 2).astype(jnp.float32)
        return update(state, rollout, rewards, update_key)

    return jax.jit(step, donate_argnums=0), rollouts.Prompts(
        jnp.asarray(prompts), jnp.ones((PROMPTS, PROMPT), bool)
    )


def write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


KINDS = {
    "sft": (supervised, f"{ROWS} × {LENGTH} tokens"),
    "dpo": (preferences, f"{ROWS} pairs of {HALF} + {HALF} tokens"),
    "grpo": (sampled, f"{PROMPTS} prompts × {SAMPLES} × {NEW} new tokens, β {BETA}"),
}


def compared(kind: str, steps: int) -> dict:
    config = TransformerConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        mlp_size=1024,
        qkv_bias=True,
        tied=True,
    )
    lm = transformer(config)
    make, what = KINDS[kind]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        params = lm.init(jax.random.key(0))
        rlhf.save(
            folder, lm, params, family="qwen2", tokenizer=tokenizer(), max_position_embeddings=512
        )
        step, rows = make(lm, params, folder, np.random.default_rng(0))
        state = rlhf.init_state(
            params, optimizer(), jax.random.key(1), {"reference": rlhf.reference(params)}
        )
        python = peers.environment("trl", "torch==2.13.0", "trl==1.16.0")
        peer = peers.Process(
            python, PEER, kind, name, str(steps + 1), str(RATE), str(NEW), str(SAMPLES)
        )
        begin = time.perf_counter()
        step = step.lower(state, rows).compile()
        compile_seconds = time.perf_counter() - begin
        pairs_of_times, losses = [], []
        for _ in range(steps + 1):
            theirs = peer.ask()
            time.sleep(0.3)
            begin = time.perf_counter()
            state, metrics = jax.block_until_ready(step(state, rows))
            pairs_of_times.append((time.perf_counter() - begin, theirs["seconds"]))
            losses.append((float(metrics["loss"]), theirs["loss"]))
        peer.close()
    mine, its = zip(*pairs_of_times[1:], strict=True)  # the first is warm-up on either side
    return {
        "step": f"{kind}: {what}", "seconds": statistics.median(mine), "lowest": min(mine), "highest": max(mine),
        "TRL": statistics.median(its), "its lowest": min(its), "its highest": max(its),
        "ratio": statistics.median(b / a for a, b in zip(mine, its, strict=True)), "compile s": compile_seconds,
        "first loss": losses[0][0], "TRL's": losses[0][1],
    }  # fmt: skip


def main():
    parser = report.arguments(__doc__)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--only", choices=KINDS)
    args = parser.parse_args()
    rows = [compared(kind, args.steps) for kind in KINDS if args.only in (None, kind)]
    report.show("one training step, float32", rows, args.json)


if __name__ == "__main__":
    main()
