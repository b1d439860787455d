"""T5 and BART through the commands and classic PPO: the encoder reads prompts, the decoder writes completions."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from marks import exhaustive

from rlhf import classic, cli, data, rollouts, tasks
from rlhf.models import huggingface, scalar_head
from rlhf.recipes import rft, sft
from rlhf.training import model_info, pairs, supervised
from rlhf.training.options import ModelOptions
from rlhf.training.policy import Policy
from rlhf.training.runs import metrics_of

CHECKPOINTS = Path(__file__).parent / "checkpoints"
ROWS = [
    {
        "prompt": "the film",
        "completion": " is great",
        "chosen": " is great",
        "rejected": " was dull and slow",
    },
    {
        "prompt": "a long and quiet plot",
        "completion": " was slow",
        "chosen": " was fine",
        "rejected": " was",
    },
] * 2
COMMON = ["--batch_size", "4", "--steps", "2", "--learning_rate", "1e-2"]
SAMPLED = [*COMMON, "--max_new_tokens", "3", "--reward", "length"]
COMMANDS = {
    "sft": COMMON,
    "dpo": [*COMMON, "--eval_dataset", "ROWS"],
    "grpo": [*SAMPLED, "--num_samples", "2", "--kl_coef", "0.1", "--micro_batches", "2"],
    "ppo": [*SAMPLED, "--eval_dataset", "ROWS"],
    "online_dpo": [*SAMPLED, "--num_samples", "6", "--max_new_tokens", "5"],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models with a tokenizer that ends prompts as T5's does, and one that begins them too, as BART's."""
    tmp = tmp_path_factory.mktemp("seq2seq")
    for name in ("t5", "bart"):
        shutil.copytree(CHECKPOINTS / name, tmp / name)
        (tmp / name / "golden.npz").unlink()
        tokenizer = huggingface.load_tokenizer(CHECKPOINTS / "tokenizer")
        start = f"{tokenizer.bos_token} " if name == "bart" else ""
        from tokenizers.processors import TemplateProcessing

        special = [
            (token, tokenizer.convert_tokens_to_ids(token))
            for token in (tokenizer.bos_token, tokenizer.eos_token)
        ]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{start}$A {tokenizer.eos_token}", special_tokens=special
        )
        tokenizer.save_pretrained(tmp / name)
    (tmp / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp


def batch_of(folder):
    tokenizer = huggingface.load_tokenizer(folder)
    seq2seq = model_info.load_seq2seq(ModelOptions(str(folder)), tokenizer)
    rows = [{name: row[name] for name in ("prompt", "completion")} for row in ROWS]
    return (
        tokenizer,
        seq2seq,
        sft.lay_out(sft.tokenize(tokenizer, rows, False, True), "none", 64, print, seq2seq=seq2seq),
    )


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_rows_are_laid_out_as_transformers_wants_them(name, folders):
    tokenizer, seq2seq, batch = batch_of(folders / name)
    for row, tokens, inputs, segments in zip(
        ROWS, batch.tokens, batch.inputs["tokens"], batch.inputs["segment_ids"], strict=True
    ):
        assert inputs[segments != 0].tolist() == tokenizer(row["prompt"])["input_ids"]
        want = [seq2seq.start[0], *tokenizer(row["completion"])["input_ids"]]
        assert tokens[: len(want)].tolist() == want
    assert not batch.mask[:, : len(seq2seq.start)].any()
    assert len(seq2seq.start) == (2 if name == "bart" else 1)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_loss_is_that_of_transformers(name, folders):
    torch = pytest.importorskip("torch")
    import transformers

    _, _, batch = batch_of(folders / name)
    lm, params, _ = huggingface.load(folders / name)
    batch_on_device = supervised.with_weights(jax.tree.map(jnp.asarray, batch))
    ours, _ = supervised.make_loss(Policy(lm))(params, {}, batch_on_device, None)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(folders / name).eval()
    where = torch.tensor(batch.mask[:, 1:])
    with torch.no_grad():
        logits = theirs(
            input_ids=torch.tensor(batch.inputs["tokens"]).long(),
            attention_mask=torch.tensor(batch.inputs["segment_ids"]).long(),
            decoder_input_ids=torch.tensor(batch.tokens[:, :-1]).long(),
        ).logits
    loss = torch.nn.functional.cross_entropy(
        logits[where], torch.tensor(batch.tokens[:, 1:]).long()[where]
    )
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "command"),
    exhaustive(
        [*(("t5", command) for command in COMMANDS), ("bart", "sft"), ("bart", "grpo")],
        quick=[("t5", "sft")],
    ),  # from there on they share a path
)
def test_a_command_trains_and_exports(name, command, folders, tmp_path):
    options = [
        str(folders / "rows.jsonl") if word == "ROWS" else word for word in COMMANDS[command]
    ]
    ask = [
        command,
        "--model",
        str(folders / name),
        "--dataset",
        str(folders / "rows.jsonl"),
        *options,
    ]
    assert cli.main([*ask, "--output", str(tmp_path / "run")]) == 0
    rows = [row for row in metrics_of(tmp_path / "run") if row["phase"] == "train"]
    assert len(rows) == 2
    assert all(np.isfinite(value) for row in rows for key, value in row.items() if key != "phase")
    before, after = (
        huggingface.load(folder)[1] for folder in (folders / name, tmp_path / "run" / "model")
    )
    for half in ("encoder", "decoder"):
        moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before[half], after[half])
        assert max(jax.tree.leaves(moved)) > 1e-4


@pytest.mark.exhaustive
def test_what_reads_an_encoder_decoder_says_what_it_read(folders, tmp_path, capsys):
    completions = tmp_path / "completions.jsonl"
    ask = [
        "--dataset",
        str(folders / "rows.jsonl"),
        "--reward",
        "length",
        "--max_new_tokens",
        "3",
        "--num_samples",
        "2",
    ]
    assert cli.main(["eval", str(folders / "t5"), *ask, "--output", str(completions)]) == 0
    prompts = {json.loads(line)["prompt"].strip() for line in completions.read_text().splitlines()}
    assert prompts == {row["prompt"] for row in ROWS}


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        (
            "sft",
            ["--packing", "bfd"],
            "packing bfd: an encoder-decoder takes one prompt with its completion a row",
        ),
        ("sft", ["--completion_only", "false"], "an encoder-decoder, which only reads prompts"),
        ("dpo", ["--packing", "bfd"], "packing bfd: an encoder-decoder takes one prompt"),
        ("reward", [], "is an encoder-decoder, which cannot be a reward model or classifier here"),
        (
            "kto",
            [],
            "is an encoder-decoder, whose encoder reads prompts; this command trains decoders alone",
        ),
    ],
)
def test_what_cannot_be_is_refused(command, more, message, folders, tmp_path, capsys):
    ask = [
        command,
        "--model",
        str(folders / "t5"),
        "--dataset",
        str(folders / "rows.jsonl"),
        *COMMON,
        *more,
    ]
    if command == "kto":
        (tmp_path / "kto.jsonl").write_text(
            '{"prompt": "a", "completion": "b", "label": true}\n' * 8
        )
        ask[4] = str(tmp_path / "kto.jsonl")
    assert cli.main([*ask, "--output", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err


def test_pairs_keep_their_inputs(folders):
    tokenizer = huggingface.load_tokenizer(folders / "t5")
    seq2seq = model_info.load_seq2seq(ModelOptions(str(folders / "t5")), tokenizer)
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in ROWS[:2]]
    laid = pairs.lay_out(tokenizer, rows, "none", 64, print, seq2seq=seq2seq)
    assert laid.inputs["tokens"].shape[:2] == (2, 2)
    flat = rollouts.pair_rows(laid)
    np.testing.assert_array_equal(flat.inputs["tokens"][0], flat.inputs["tokens"][1])


@pytest.mark.exhaustive
def test_classic_steps_take_queries_and_responses(folders):
    lm, params, _ = huggingface.load(folders / "t5")
    head = scalar_head(32)
    optimizer = optax.sgd(0.1)
    seq2seq = data.Seq2Seq((0,), (2,))
    with pytest.raises(ValueError, match="the model has an encoder, but seq2seq is None"):
        classic.ppo_step(lm, head, optimizer, length=8)
    step = classic.ppo_step(lm, head, optimizer, length=8, seq2seq=seq2seq)
    state = classic.start(
        {"lm": params, "head": head.init(jax.random.key(0))}, optimizer, jax.random.key(1)
    )
    before = jax.tree.map(np.asarray, state.params["lm"])
    state, seen = step(state, [[5, 6, 7], [8]], [[9, 2], [10, 11]], [1.0, -1.0])
    assert np.isfinite(seen["loss"])
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, state.params["lm"])
    assert moved["encoder"]["layers"]["q"] > 0


@pytest.mark.exhaustive
def test_what_reads_prompts_with_completions_reads_them_of_an_encoder_too():
    """The score of a generated task is that of the same rollout of a decoder; so are its prompts as texts."""
    task, tokenizer = tasks.find("task:reverse"), tasks.find("task:reverse").tokenizer()
    row = tasks.load("task:reverse", tasks.demonstrations, 1, seed=0)[0]
    prompt = tokenizer(row["prompt"])["input_ids"]
    completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
    tokenized = data.Tokenized(
        prompt + completion, [False] * len(prompt) + [True] * len(completion)
    )

    def rollout_of(rows):
        nothing = jnp.zeros(rows.tokens.shape)
        return rollouts.Rollout(
            rows.tokens,
            rows.mask,
            rows.positions,
            rows.segment_ids,
            nothing,
            nothing,
            jnp.ones(1, bool),
            jnp.float32(1),
            rows.inputs,
        )

    of_decoder = rollout_of(data.batch([tokenized]))
    of_encoder = rollout_of(data.Seq2Seq((0,), ()).batch([tokenized]))
    assert task.score(of_decoder).tolist() == [1.0]
    assert task.score(of_encoder).tolist() != [1.0]
    assert task.score(rollouts.joined(of_encoder)).tolist() == [1.0]
    assert rollouts.joined(of_decoder) is of_decoder
    texts = rollouts.text.prompts(tokenizer, of_encoder)
    assert (
        texts
        == rollouts.text.prompts(tokenizer, of_decoder)
        == rollouts.text.prompts(tokenizer, rollouts.joined(of_encoder))
    )


def test_completions_that_are_selected_keep_what_the_encoder_read():
    read = np.array([[5, 6], [7, 8], [5, 6]])
    inputs = {
        "tokens": read,
        "positions": np.array([[0, 1]] * 3),
        "segment_ids": np.ones_like(read),
    }
    rows = rollouts.unpacked_rows(
        np.array([[0, 9]] * 3), np.ones((3, 2), bool), np.array([[False, True]] * 3)
    )
    rollout = rollouts.Rollout(
        np.asarray(rows.tokens), np.asarray(rows.mask), np.asarray(rows.positions), np.asarray(rows.segment_ids),
        None, None, None, None, inputs,
    )  # fmt: skip
    chosen = rft.distinct(rollout, np.arange(3))
    assert chosen.tolist() == [0, 1]  # the same completion of another prompt is another row
    (batch,) = rft.dealt(rollout, chosen, 1)
    np.testing.assert_array_equal(batch.inputs["tokens"], read[:2])


@pytest.mark.parametrize("recipe", ["kto", "bco", "ilql", "nash_md"])
def test_recipes_of_decoders_say_so_before_they_read_data(folders, recipe, capsys):
    argv = [
        recipe,
        "--model",
        str(folders / "t5"),
        "--dataset",
        "nowhere.jsonl",
        "--output",
        str(folders / "never"),
    ]
    assert cli.main(argv) == 2
    assert (
        "is an encoder-decoder, whose encoder reads prompts; this command trains decoders alone"
        in capsys.readouterr().err
    )
