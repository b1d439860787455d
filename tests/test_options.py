"""Options of models, sampling, rewards and the loop through the commands: each does what it says."""

import json

import jax
import numpy as np
import pyarrow.parquet
import pytest

from rlhf import cli
from rlhf.losses import presets
from rlhf.training import loading, policy_gradient
from rlhf.training.options import ModelOptions
from rlhf.training.runs import metrics_of

TASK = ["--dataset", "task:reverse", "--dataset_size", "16", "--steps", "2", "--batch_size", "4"]


def run(command: str, model: str, output, *more: str) -> None:
    assert cli.main([command, "--model", model, *TASK, *more, "--output", str(output)]) == 0


def test_adapters_stand_where_targets_say_and_go_on_from_a_folder(base, tmp_path):
    lora = [
        "--lora_rank",
        "2",
        "--lora_targets",
        "q_proj",
        "v_proj",
        "--lora_dropout",
        "0.5",
        "--rslora",
    ]
    run("sft", base, tmp_path / "first", *lora)
    config = json.loads((tmp_path / "first" / "adapter" / "adapter_config.json").read_text())
    targets = config["target_modules"]
    assert {name.rsplit(".", 1)[-1] for name in targets} == {"q_proj", "v_proj"}
    run("sft", base, tmp_path / "second", "--adapter", str(tmp_path / "first" / "adapter"))
    before = metrics_of(tmp_path / "first")
    after = metrics_of(tmp_path / "second")
    assert after[0]["loss"] != before[0]["loss"]


@pytest.mark.exhaustive
def test_dropout_is_of_training_alone(base, tmp_path):
    lora = [
        "--lora_rank",
        "2",
        "--learning_rate",
        "0.1",
        "--optimizer",
        "sgd",
        "--eval_split",
        "train",
    ]
    run("sft", base, tmp_path / "with", *lora, "--lora_dropout", "0.9", "--eval_on_start")
    run("sft", base, tmp_path / "without", *lora, "--eval_on_start")
    first, second = (metrics_of(tmp_path / name) for name in ("with", "without"))
    assert [row["phase"] for row in first] == ["eval", "train", "train", "eval"]
    assert first[0]["step"] == 0
    assert first[0]["eval_loss"] == second[0]["eval_loss"]
    # B starts at 0, so that the first step's gradient is the first thing that dropout touches.
    assert first[2]["loss"] != second[2]["loss"]


@pytest.mark.exhaustive
def test_a_reference_model_from_elsewhere(base, tmp_path):
    run("sft", base, tmp_path / "other", "--learning_rate", "0.1", "--optimizer", "sgd")
    run("dpo", base, tmp_path / "own")
    run("dpo", base, tmp_path / "from", "--reference_model", str(tmp_path / "other"))
    assert metrics_of(tmp_path / "own")[0]["rewards/chosen"] == 0
    assert metrics_of(tmp_path / "from")[0]["rewards/chosen"] != 0


def test_sampling_options_hold(base, tmp_path):
    sampling = [
        "--max_new_tokens",
        "6",
        "--num_samples",
        "2",
        "--min_new_tokens",
        "3",
        "--reward",
        "length",
    ]
    more = ["--repetition_penalty", "1.5", "--frequency_penalty", "0.5", "--log_completions", "1"]
    run("grpo", base, tmp_path / "run", *sampling, *more)
    rows = metrics_of(tmp_path / "run")
    assert rows[0]["completions/min_length"] >= 3
    table = pyarrow.parquet.read_table(tmp_path / "run" / "samples" / "train_00000001.parquet")
    assert table.num_rows == 8
    assert set(table.column_names) == {"prompt", "completion", "reward", "reason"}
    letters = list("abcdefghijklmnopqrstuvwxyz")
    stop = ["--max_new_tokens", "6", "--num_samples", "2", "--reward", "length", "--stop", *letters]
    run("grpo", base, tmp_path / "stopped", *stop, "--log_completions", "1")
    table = pyarrow.parquet.read_table(tmp_path / "stopped" / "samples" / "train_00000001.parquet")
    for text in table["completion"].to_pylist():
        assert not any(letter in text[:-1] for letter in letters), text


@pytest.mark.exhaustive
def test_grpo_s_further_options_train(base, tmp_path):
    options = [
        "--max_new_tokens",
        "24",
        "--num_samples",
        "4",
        "--reward",
        "length",
        "--learning_rate",
        "0.1",
    ]
    more = {
        "plain": [],
        "entropy": ["--entropy_coef", "1"],
        "top": ["--top_entropy", "0.3"],
        "masked": ["--mask_truncated_completions"],
        "scaled": ["--scale_rewards", "none"],
        "capped": ["--max_ratio", "1.01", "--updates_per_batch", "3"],
    }
    losses = {}
    for name, words in more.items():
        run("grpo", base, tmp_path / name, *options, *words)
        losses[name] = metrics_of(tmp_path / name)[0]["grad_norm"]
    assert all(np.isfinite(list(losses.values())))
    assert all(losses[name] != losses["plain"] for name in ("entropy", "top", "masked", "scaled"))


def test_algorithms_by_name_take_scales_and_a_cap():
    rewards = jax.numpy.array([[1.0, 0.0]])
    mask = jax.numpy.ones((2, 1), bool)
    plain = policy_gradient.named("grpo", 4, scale_rewards="none")
    np.testing.assert_allclose(plain.advantages(rewards, mask), [[0.5], [-0.5]])
    own = presets.grpo().advantages(rewards, mask)
    np.testing.assert_array_equal(
        policy_gradient.named("grpo", 4, scale_rewards="group").advantages(rewards, mask), own
    )
    of_dr_grpo = policy_gradient.named("dr_grpo", 4, scale_rewards="group").advantages(
        rewards, mask
    )
    np.testing.assert_allclose(of_dr_grpo, own)
    logprobs, old = jax.numpy.array([[0.0], [0.0]]), jax.numpy.log(jax.numpy.array([[0.1], [0.1]]))
    capped = policy_gradient.named("grpo", 4, max_ratio=2.0)
    np.testing.assert_allclose(capped.loss(logprobs, old, -jax.numpy.ones((2, 1)), mask), 2.0)
    with pytest.raises(ValueError, match="max_ratio means nothing to gspo"):
        policy_gradient.named("gspo", 4, max_ratio=2.0)


@pytest.mark.exhaustive
def test_the_best_evaluation_is_kept_and_exported(base, tmp_path):
    more = ["--eval_split", "train", "--eval_every", "1", "--steps", "4", "--optimizer", "sgd"]
    run(
        "sft",
        base,
        tmp_path / "run",
        *more,
        "--learning_rate",
        "30",
        "--schedule",
        "constant",
        "--keep_best",
    )
    losses = [row["eval_loss"] for row in metrics_of(tmp_path / "run") if row["phase"] == "eval"]
    assert losses.index(min(losses)) < len(losses) - 1, losses
    run(
        "sft",
        str(tmp_path / "run"),
        tmp_path / "again",
        "--eval_split",
        "train",
        "--eval_on_start",
        "--learning_rate",
        "1e-9",
    )
    assert metrics_of(tmp_path / "again")[0]["eval_loss"] == pytest.approx(min(losses), rel=1e-4)


@pytest.mark.exhaustive
def test_rewards_with_arguments(base, tmp_path, capsys):
    options = ["--max_new_tokens", "6", "--num_samples", "2"]
    reward = ["--reward", "soft_overlong(max_length=4, cache=2)", "length"]
    run("grpo", base, tmp_path / "run", *options, *reward)
    row = metrics_of(tmp_path / "run")[0]
    assert "rewards/soft_overlong(max_length=4, cache=2)/mean" in row
    argv = ["grpo", "--model", base, *TASK, *options, "--output", str(tmp_path / "no")]
    for wrong in (
        "soft_overlong(4)",
        "soft_overlong(max_length=4, size=2)",
        "soft_over(max_length=4)",
        "length(1",
    ):
        assert cli.main([*argv, "--reward", wrong]) == 2
        assert "soft_over" in (said := capsys.readouterr().err) or "length(1" in said


@pytest.mark.exhaustive
def test_quantised_matrices_lie_under_adapters(tmp_path):
    pytest.importorskip("qwix")
    new = [
        "new",
        str(tmp_path / "base"),
        "--hidden_size",
        "64",
        "--num_heads",
        "2",
        "--num_layers",
        "1",
    ]
    assert cli.main(new) == 0
    options = ModelOptions(str(tmp_path / "base"), lora_rank=2, quantize="nf4")
    loaded = loading.load_policy(options, 0, loading.one_device())
    kinds = {
        type(x).__name__
        for x in jax.tree.leaves(loaded.frozen, is_leaf=lambda x: hasattr(x, "array"))
    }
    assert "QuantizedWeight" in kinds
    run("sft", str(tmp_path / "base"), tmp_path / "run", "--lora_rank", "2", "--quantize", "nf4")
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lora_dropout", "0.1"], "lora_rank 0 with lora_dropout 0.1; that is of adapters"),
        (["--lora_rank", "2", "--adapter", "x"], "has a rank of its own"),
        (["--min_learning_rate_ratio", "0.1"], "means nothing with schedule linear"),
        (["--eval_on_start"], "eval_on_start True but no held-out rows"),
        (["--pad_token", "<nothing>"], "is no token of the tokenizer"),
    ],
)
def test_options_that_cannot_be_are_one_line(more, message, base, tmp_path, capsys):
    assert cli.main(["sft", "--model", base, *TASK, *more, "--output", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
