"""The command line: options out of signatures, one line for every mistake, runs that resume bit for bit."""

import contextlib
import importlib
import io
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest
import yaml
from logs import steady

from rlhf import cli, tasks, trl_tables
from rlhf.checkpoint import Checkpoints
from rlhf.command_line import options_of
from rlhf.models import huggingface
from rlhf.recipes import sft
from rlhf.training import datasets, q_heads, runs, track
from rlhf.training.options import DatasetOptions

HERE = Path(__file__).parent / "bad_inputs"
SMALL = [
    "--dataset_size",
    "64",
    "--batch_size",
    "8",
    "--learning_rate",
    "1e-3",
    "--max_length",
    "32",
]


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def test_a_run_says_where_its_model_is_and_what_it_was_made_for(base, tmp_path, capsys):
    short = tmp_path / "short"
    shutil.copytree(base, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 3}))
    words = ["--dataset", "task:reverse", *SMALL, "--steps", "1", "--output", str(tmp_path / "run")]
    assert cli.main(["sft", "--model", str(short), *words]) == 0
    said = capsys.readouterr().err
    assert re.search(r"rows have up to (\d+) tokens .* was made for 3 \(max_position", said)
    assert f"rlhf sft: the model is in {tmp_path / 'run' / 'model'}\n" in said


def test_out_of_memory_is_one_line(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sft, "load_policy", lambda *_, **__: jnp.zeros(1 << 48))
    words = ["--dataset", "task:reverse", *SMALL, "--output", str(tmp_path / "run")]
    assert cli.main(["sft", "--model", base, *words]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("rlhf sft: ")]
    assert "not enough memory: Out of memory allocating" in line
    assert "try --micro_batches auto, --remat full" in line
    assert "--max_new_tokens" not in line  # sft has none


def test_sft_resumes_bit_for_bit(base, tmp_path, monkeypatch):
    ask = [
        "sft",
        "--model",
        base,
        "--dataset",
        "task:reverse",
        *SMALL,
        "--steps",
        "5",
        "--save_every",
        "2",
        "--export_every",
        "2",
        "--packing",
        "bfd",
    ]
    ask += ["--batch_size", "4", "--eval_dataset", "task:reverse"]
    assert cli.main([*ask, "--output", str(tmp_path / "whole")]) == 0
    original = runs.RunFolder.log

    def stop(self, phase, step, metrics):
        original(self, phase, step, metrics)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs.RunFolder, "log", stop)
        assert cli.main([*ask, "--output", str(tmp_path / "halves")]) == 130
    assert [row["step"] for row in steady(tmp_path / "halves", "train")] == [1, 2, 3]
    assert cli.main(["export", str(tmp_path / "halves"), "--output", str(tmp_path / "early")]) == 0
    assert re.search(r"\| loss \| \S+ \| 2 \|", (tmp_path / "early" / "README.md").read_text())
    early = huggingface.load(tmp_path / "early")[1]["embedding"]
    assert cli.main([*ask, "--output", str(tmp_path / "halves")]) == 2  # not by accident
    assert cli.main([*ask, "--output", str(tmp_path / "halves"), "--resume"]) == 0
    for phase in ("train", "eval"):
        assert steady(tmp_path / "halves", phase) == steady(tmp_path / "whole", phase)
    assert weights(tmp_path / "halves") == weights(tmp_path / "whole")
    assert (
        np.abs(early - huggingface.load(tmp_path / "whole" / "model")[1]["embedding"]).max() > 1e-4
    )
    first, last = steady(tmp_path / "whole", "train")[::4]
    assert last["loss"] < first["loss"]
    config = yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())
    assert (config["packing"], config["learning_rate"], config["seed"]) == ("bfd", 1e-3, 0)
    assert "rlhf" in json.loads((tmp_path / "whole" / "about.json").read_text())["versions"]
    assert "| eval_loss |" in (tmp_path / "whole" / "README.md").read_text()
    assert (tmp_path / "whole" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_process_asked_to_stop_saves_first(base, tmp_path):
    ask = [
        "sft",
        "--model",
        base,
        "--dataset",
        "task:reverse",
        *SMALL,
        "--steps",
        "1000000",
        "--output",
        str(tmp_path / "run"),
    ]
    metrics = tmp_path / "run" / "metrics.jsonl"
    with subprocess.Popen(
        [sys.executable, "-m", "rlhf", *ask], stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and not (metrics.exists() and metrics.read_text()):
            time.sleep(0.1)
        process.terminate()
        _, said = process.communicate()
    assert process.returncode == 130, said
    last = steady(tmp_path / "run", "train")[-1]["step"]
    assert "stopping after this step, and saving" in said
    assert f"stopped after step {last} of 1000000; go on with --resume" in said
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest() == last
    assert weights(tmp_path / "run")


def test_a_resumed_run_asks_for_the_same(base, tmp_path, capsys):
    ask = [
        "sft",
        "--model",
        base,
        "--dataset",
        "task:reverse",
        *SMALL,
        "--output",
        str(tmp_path / "run"),
    ]
    run = runs.RunFolder(tmp_path / "run", {"learning_rate": 1e-3, "model": "another"})
    run.describe()
    assert cli.main([*ask, "--resume"]) == 2
    assert "a run goes on as it began, but" in (error := capsys.readouterr().err)
    assert f"model was 'another' and is {base!r}" in error
    assert "learning_rate was" not in error


@pytest.mark.exhaustive
def test_reward_and_dpo_with_adapters(base, tmp_path):
    ask = ["--model", base, "--dataset", "task:reverse", *SMALL, "--steps", "2", "--lora_rank", "2"]
    assert (
        cli.main(["reward", *ask, "--center_coef", "0.1", "--output", str(tmp_path / "reward")])
        == 0
    )
    *_, params, _ = huggingface.load_classifier(tmp_path / "reward" / "model")
    assert np.abs(params["head"]["weight"]).max() > 0
    extra = ["--loss", "sigmoid", "sft", "--loss_weights=[1,0.5]", "--eval_dataset", "task:reverse"]
    assert cli.main(["dpo", *ask, *extra, "--output", str(tmp_path / "dpo")]) == 0
    first, second = steady(tmp_path / "dpo", "train")
    assert first["rewards/margins"] == 0  # policy and reference are one
    assert second["loss"] < first["loss"]
    assert (tmp_path / "dpo" / "adapter" / "adapter_config.json").exists()
    before, after = (
        huggingface.load(folder)[1]["layers"]["q"] for folder in (base, tmp_path / "dpo" / "model")
    )
    assert np.linalg.matrix_rank(np.asarray(after - before)[0], tol=1e-6) == 2


@pytest.mark.exhaustive
def test_a_reference_follows_its_policy(base, tmp_path):
    ask = ["dpo", "--model", base, "--dataset", "task:reverse", *SMALL, "--steps", "3"]
    assert cli.main([*ask, "--output", str(tmp_path / "stays")]) == 0
    assert (
        cli.main(
            [*ask, "--sync_every", "2", "--sync_share", "1", "--output", str(tmp_path / "follows")]
        )
        == 0
    )
    stays, follows = (steady(tmp_path / name, "train") for name in ("stays", "follows"))
    margins = lambda rows: [row["rewards/margins"] for row in rows]
    assert margins(follows)[:2] == pytest.approx(margins(stays)[:2], abs=1e-5)
    assert margins(stays)[2] != 0
    assert margins(follows)[2] == pytest.approx(
        0, abs=1e-5
    )  # after two steps the reference is the policy


def test_grpo_samples_scores_and_resumes(base, tmp_path):
    ask = [
        "grpo",
        "--model",
        base,
        "--dataset",
        "task:reverse",
        "--dataset_size",
        "32",
        "--batch_size",
        "4",
        "--steps",
        "2",
    ]
    ask += [
        "--num_samples",
        "4",
        "--max_new_tokens",
        "4",
        "--kl_coef",
        "0.1",
        "--mini_batches",
        "2",
        "--loss",
        "dapo",
    ]
    ask += [
        "--eval_dataset",
        "task:reverse",
        "--learning_rate",
        "1e-3",
        "--output",
        str(tmp_path / "run"),
    ]
    assert cli.main(ask) == 0
    rows = steady(tmp_path / "run", "train")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(0 <= row["reward"] <= 1 and row["tokens"] > 0 for row in rows)
    table = pyarrow.parquet.read_table(
        tmp_path / "run" / "samples" / "00000004.parquet"
    ).to_pydict()
    assert sorted(table) == ["completion", "prompt", "reason", "reward"]
    assert len(table["reward"]) == 16
    written = weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    assert (
        cli.main([*ask, "--resume"]) == 0
    )  # it is over: its model is written again, and no step is taken
    assert weights(tmp_path / "run") == written
    assert steady(tmp_path / "run", "train") == rows


def test_data_sets_are_mixed_and_cut_short():
    fine, task = bad("fine.jsonl"), "task:reverse"
    rows = lambda **options: datasets.load_rows(DatasetOptions(**options), tasks.demonstrations)[0]
    alone = rows(dataset=fine)
    assert rows(dataset=fine, max_rows=1) == alone[:1]
    assert len(alone) > 1
    both = rows(dataset=fine, more_datasets=[task], dataset_size=10)
    assert both == alone + rows(dataset=task, dataset_size=10)
    assert rows(dataset=task, dataset_accuracy=0.0) != rows(dataset=task)
    mixed = rows(dataset=fine, more_datasets=[task], dataset_size=10, fractions=[0.5, 0.5])
    assert mixed[: len(alone)] == alone
    assert len(mixed) == 2 * len(alone)


def test_metrics_go_to_trackers_too(tmp_path, monkeypatch):
    seen = []

    @contextlib.contextmanager
    def tracker(run):
        yield lambda step, metrics: seen.append((run.path.name, step, metrics["loss"]))

    monkeypatch.setitem(track.TRACKERS, "wandb", tracker)
    with track.trackers(["wandb", "wandb"], runs.RunFolder(tmp_path / "run")) as log:
        log(3, {"loss": 0.5})
    assert seen == [("run", 3, 0.5)] * 2


def test_chat_replies_line_after_line(base, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("abc=\ncd=\n\nnever\n"))
    assert cli.main(["chat", base, "--max_new_tokens", "3", "--top_k", "2"]) == 0
    said = capsys.readouterr()
    assert said.err.count("> ") == 3
    replies = said.out.splitlines()
    assert len(replies) == 2
    assert all(
        set(reply) <= set("abcdefghijklmnopqrstuvwxyz0123456789=+-:\n ") for reply in replies
    )


def shorter(prompts, completions, others):
    """A judge: the shorter completion wins."""
    return [
        0.5 if len(a) == len(b) else float(len(a) < len(b))
        for a, b in zip(completions, others, strict=True)
    ]


@pytest.mark.exhaustive
def test_a_model_wins_against_another(base, tmp_path, capsys):
    other = str(tmp_path / "other")
    assert cli.main(["new", other, "--hidden_size", "16", "--num_heads", "2", "--seed", "1"]) == 0
    ask = [
        "--dataset",
        "task:reverse",
        "--dataset_size",
        "16",
        "--max_new_tokens",
        "4",
        "--num_samples",
        "1",
    ]

    def rate(model, against, *more):
        assert cli.main(["eval", model, *ask, "--against", against, *more]) == 0
        words = capsys.readouterr().out.split()
        return float(words[words.index("win_rate") + 1])

    assert rate(base, base) == 0.5
    assert rate(base, other, "--reward", "length") == pytest.approx(
        1 - rate(other, base, "--reward", "length")
    )
    by_judge = rate(base, other, "--preference", f"{__name__}:shorter")
    assert by_judge != 0.5
    assert by_judge == pytest.approx(1 - rate(other, base, "--preference", f"{__name__}:shorter"))


@pytest.mark.exhaustive
def test_a_run_of_ilql_samples_by_its_values(base, tmp_path):
    """Both Qs of one token are far above all others, and the run leaned to them: every completion is that token."""
    (tmp_path / "run").mkdir()
    shutil.copytree(base, tmp_path / "run" / "model")
    (tmp_path / "run" / "config.yaml").write_text("beta: 2.0\n")
    tokenizer = huggingface.load_tokenizer(base)
    heads = q_heads.heads_of(16, huggingface.load(base)[1]["embedding"].shape[0])
    params = jax.tree.map(jnp.zeros_like, heads.init(jax.random.key(0)))
    target = {
        **params["q"],
        "bias": params["q"]["bias"].at[:, tokenizer.convert_tokens_to_ids("k")].set(50.0),
    }
    q_heads.save(tmp_path / "run" / q_heads.FILE, {**params, "target": target})
    ask = [
        "--dataset",
        "task:reverse",
        "--dataset_size",
        "4",
        "--max_new_tokens",
        "3",
        "--num_samples",
        "1",
    ]
    for model, same in ((tmp_path / "run", True), (tmp_path / "run" / "model", False)):
        assert (
            cli.main(
                [
                    "eval",
                    str(model),
                    *ask,
                    "--output",
                    str(tmp_path / "completions.jsonl"),
                    "--overwrite",
                ]
            )
            == 0
        )
        rows = [
            json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()
        ]
        assert ({row["completion"] for row in rows} == {"kkk"}) == same


def test_a_run_without_a_model_yet_is_named(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("model: base\n")
    run = str(tmp_path)
    for command in (
        ["eval", run, "--dataset", "task:reverse"],
        ["chat", run],
        ["export", run, "--output", f"{run}/new"],
    ):
        assert cli.main(command) == 2
        assert "a model yet (of adapters it comes last); --resume it" in capsys.readouterr().err


def test_several_tokens_may_end_a_completion(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    tokenizer, file = huggingface.load_tokenizer(base), tmp_path / "base" / "generation_config.json"
    assert huggingface.end_ids(base, tokenizer) == (2,)
    file.write_text(json.dumps({"eos_token_id": [7, 5]}))
    assert huggingface.end_ids(tmp_path / "base", tokenizer) == (2, 5, 7)
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": [2, 9]}))
    assert huggingface.end_ids(tmp_path / "base", tokenizer) == (2, 5, 7, 9)
    file.unlink()
    assert huggingface.end_ids(tmp_path / "base", tokenizer) == (2, 9)
    lm, params, _ = huggingface.load(tmp_path / "base")
    huggingface.save(tmp_path / "again", lm, params, like=tmp_path / "base", tokenizer=tokenizer)
    written = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [2, 9]


def test_every_name_of_trl_is_an_option_here():
    known = set()
    for fn in (
        importlib.import_module(module).main
        for module, _ in cli.COMMANDS.values()
        if ".recipes." in module
    ):
        known |= set(options_of(fn))
    names = trl_tables.RENAMED | trl_tables.TARGETS
    assert set(names.values()) <= known, set(names.values()) - known


def test_options_from_a_file_and_from_the_command_line(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(
        "model: m\ndataset: task:sort\nlearning_rate: 0.5\nsteps: 3\n"
    )
    with pytest.raises(SystemExit):
        cli.main(
            [
                "sft",
                "--config",
                str(tmp_path / "run.yaml"),
                "--output",
                "o",
                "--steps",
                "7",
                "--print_config",
            ]
        )
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["learning_rate"], shown["steps"], shown["dataset"]) == (0.5, 7, "task:sort")
    with pytest.raises(SystemExit):
        cli.main(
            [
                "sft",
                "--model_name_or_path",
                "m",
                "--dataset-name",
                "d",
                "--output_dir=o",
                "--resume",
                "--print_config",
            ]
        )
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["model"], shown["dataset"], shown["output"], shown["resume"]) == (
        "m",
        "d",
        "o",
        True,
    )
    theirs = [
        "--per_device_train_batch_size",
        "4",
        "--gradient_accumulation_steps",
        "2",
        "--loss_type",
        "ipo",
    ]
    with pytest.raises(SystemExit):
        cli.main(
            ["dpo", "--model", "m", "--dataset", "d", "--output", "o", *theirs, "--print_config"]
        )
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["batch_size"], shown["micro_batches"], shown["loss"]) == (
        8,
        2,
        ["ipo"],
    )  # the batch of TRL's step


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "help"])
def test_help_is_three_screens_of_options_and_defaults(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 140
    options = options_of(importlib.import_module(cli.COMMANDS[name][0]).main)
    needed = {option for option in options if options[option].needed}
    assert all(f"--{option} " in " ".join(lines) for option in options)
    own = {option for option in options if options[option].of is None}
    explained = {line.split()[0].removeprefix("--") for line in lines if line.startswith("  --")}
    assert own | needed <= explained


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "help"])
def test_help_all_explains_every_option(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main([name, "--help", "all"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    shown = {line.split()[0]: line.split()[1] for line in lines if line.startswith("  --")}
    options = options_of(importlib.import_module(cli.COMMANDS[name][0]).main)
    assert {option.removeprefix("--") for option in shown} == set(options)
    needed = {option for option in options if options[option].needed}
    assert {
        option.removeprefix("--") for option, value in shown.items() if value == "..."
    } == needed
    assert all(option.text for option in options.values())
    if "--learning_rate" in shown:
        assert shown["--learning_rate"] == str(options["learning_rate"].default)
        assert shown["--patience"] == "0"
        assert shown["--track"] == "[]"
        choices = (
            "(linear, cosine, constant, cosine_with_min_lr, warmup_stable_decay, inverse_sqrt)"
        )
        assert choices in " ".join(" ".join(lines).split())


def test_help_without_a_command(capsys):
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert set(cli.COMMANDS) <= set(said.split())
    assert max(map(len, said.splitlines())) <= 88
    assert cli.main(["help", "trl"]) == 0
    assert "--model_name_or_path" in capsys.readouterr().out


def bad(name: str) -> str:
    return str(HERE / name)


@pytest.mark.parametrize("argv", [["stf"], ["sft", "--lerning_rate", "1"], ["sft", "--model", "m"]])
def test_a_mistake_in_a_process_of_its_own(argv):
    found = subprocess.run(
        [sys.executable, "-m", "rlhf", *argv], capture_output=True, text=True, check=False
    )
    assert found.returncode == 2
    assert "Traceback" not in found.stderr
    assert found.stderr.count("\n") == 1


@pytest.mark.exhaustive
def test_a_run_s_own_config_makes_the_run_again(base, tmp_path):
    argv = ["sft", "--model", base, "--dataset", "task:reverse", "--dataset_size", "8"]
    first = [*argv, "--steps", "1", "--batch_size", "4", "--output", str(tmp_path / "first")]
    assert cli.main(first) == 0
    config = str(tmp_path / "first" / "config.yaml")
    assert cli.main(["sft", "--config", config, "--output", str(tmp_path / "again")]) == 0
    rows = [runs.metrics_of(tmp_path / name)[0]["loss"] for name in ("first", "again")]
    assert rows[0] == rows[1]


def test_a_callback_alone_is_refused_at_once(base, tmp_path):
    with pytest.raises(ValueError, match=r"callbacks is a function, but takes a list"):
        sft.main(model=base, dataset="task:reverse", output=str(tmp_path / "run"), callbacks=print)
    assert not (tmp_path / "run").exists()
