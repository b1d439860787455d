"""What packing brings on GSM8K: supervised steps over the same texts, one a row and several a row.

    python benchmarks/packing.py [--data openai/gsm8k] [--json benchmarks/results/packing.json]

A byte-level BPE of 4,096 tokens, trained on these texts, reads them; they are cut at 512 tokens, and rows are as long as the
longest: padding is what packing saves.  The model is small (hidden 256, 4 layers), in float32; medians of 5 steps in turns.
`--data` takes a file with the same columns too.
"""

import statistics
import time
from functools import partial

import jax
import numpy as np
import optax
import report
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import rlhf
from rlhf import data
from rlhf.models import TransformerConfig, transformer
from rlhf.recipes import sft
from rlhf.training import datasets

VOCABULARY, LENGTH, BATCH, STEPS = 4096, 512, 16, 5


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    inside = Tokenizer(models.BPE())
    inside.pre_tokenizer, inside.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    inside.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<pad>", "<end>"])
    )
    return PreTrainedTokenizerFast(tokenizer_object=inside, pad_token="<pad>", eos_token="<end>")


def measured(rows: dict) -> list[dict]:
    lm = transformer(
        TransformerConfig(VOCABULARY, 256, 4, 4, 1024, num_kv_heads=2, qkv_bias=True, tied=True)
    )
    optimizer = optax.adamw(1e-5)
    step = jax.jit(sft.make_update(rlhf.Policy(lm), optimizer), donate_argnums=0)
    states = {
        name: rlhf.init_state(lm.init(jax.random.key(0)), optimizer, jax.random.key(0))
        for name in rows
    }
    speeds: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(STEPS + 1):
        for name, whole in rows.items():
            batch = jax.device_put(datasets.take(whole, 0, number, BATCH))
            begin = time.perf_counter()
            states[name], _ = jax.block_until_ready(step(states[name], batch))
            speeds[name].append(
                float((batch.segment_ids != 0).sum()) / (time.perf_counter() - begin)
            )
    speed = {
        name: statistics.median(values[1:]) for name, values in speeds.items()
    }  # the first compiles
    return [
        {"packing": name, "rows": len(whole.tokens), "columns": whole.tokens.shape[1],
         "real tokens %": 100 * float((whole.segment_ids != 0).mean()), "real tokens / s": speed[name],
         "ratio": speed[name] / speed["none"]}
        for name, whole in rows.items()
    ]  # fmt: skip


def main():
    parser = report.arguments(__doc__)
    parser.add_argument("--data", default="openai/gsm8k")
    args = parser.parse_args()
    texts = [
        {"prompt": row["question"], "completion": row["answer"]}
        for row in data.read_rows(args.data)
    ]
    tokenizer = tokenizer_of([text for row in texts for text in row.values()])
    tokenized = sft.tokenize(tokenizer, texts, assistant_only=False, completion_only=True)
    laid_out = partial(sft.lay_out, tokenized, length=LENGTH, say=print)
    rows = {packing: laid_out(packing) for packing in ("none", "bfd", "split", "wrapped")}
    lengths = [len(row.tokens) for row in tokenized]
    print(f"{len(lengths)} texts, {np.mean(lengths):.0f} tokens on average, at most {max(lengths)}")
    report.show("supervised steps of 16 rows", measured(rows), args.json)


if __name__ == "__main__":
    main()
