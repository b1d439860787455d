"""Prompts that are far wider than the others, and the token that ends a completion, through recipes' own options."""

import json
import warnings

import pytest

from rlhf import cli
from rlhf.models import huggingface
from rlhf.tasks import reverse
from rlhf.training import model_info, pairs, prompts
from rlhf.training.options import ModelOptions
from rlhf.training.runs import metrics_of

ROWS = [{"prompt": "1+1=", "solution": number} for number in range(200)]
WIDE = {"prompt": "1+" * 300, "solution": 7}


def tokenized(rows, **knobs):
    said: list[str] = []
    found = prompts.tokenize(reverse.task().tokenizer(), rows, say=said.append, **knobs)
    assert len(found.rows) == len(found.prompts.tokens)
    return found, said


def test_prompts_beyond_the_limit_are_left_out_whole_and_said():
    found, said = tokenized([*ROWS[:3], WIDE, *ROWS[3:5]], max_prompt_length=10)
    assert [row["solution"] for row in found.rows] == [0, 1, 2, 3, 4]
    assert found.prompts.tokens.shape == (5, 5)
    assert said == [
        "1 of 6 rows were left out: their prompts have more than max_prompt_length 10 tokens"
    ]
    assert tokenized(ROWS, max_prompt_length=5)[1] == [], "exactly as many are not more"
    with pytest.raises(
        ValueError,
        match="all 1 prompts have more than max_prompt_length 10 tokens, the shortest 601; raise",
    ):
        tokenized([WIDE], max_prompt_length=10)


@pytest.mark.parametrize("number", [2, 9, 200])
def test_one_prompt_that_widens_all_is_said(number):
    found, said = tokenized([*ROWS[: number - 1], WIDE])
    assert found.prompts.tokens.shape == (number, 601)
    assert said == [
        f"the longest prompt, row {number - 1}, has 601 tokens, 99 of 100 have at most 5, and steps with it are that wide; "
        "--max_prompt_length 5 leaves such rows out"
    ]
    assert tokenized(ROWS)[1] == tokenized([WIDE] * 5)[1] == []


def test_steps_are_as_wide_as_their_prompts_need_in_few_widths():
    lengths = [300, 100, 90, 40, 30, 3, 5, 7]
    found, _ = tokenized([{"prompt": "1" * length} for length in lengths])
    width = found.prompts.tokens.shape[1]
    assert width == 301, "with the first token"
    for chosen, wanted in (
        ([0, 5], 301),
        ([1, 6], 150),
        ([2, 3], 150),
        ([3, 4], 75),
        ([4, 5], 37),
        ([5, 6], 37),
    ):
        batch = found.select(chosen, None).prompts
        assert batch.tokens.shape == batch.mask.shape == (2, wanted)
        whole = found.select(chosen, None, narrow=False).prompts
        assert whole.tokens.shape == (2, width)
        # Nothing but padding is cut.
        assert batch.mask.sum() == whole.mask.sum()
        assert (batch.tokens[batch.mask] == whole.tokens[whole.mask]).all()


@pytest.mark.exhaustive
def test_a_run_samples_the_same_in_any_width(base, tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    lengths = [90, 60, 20, 10]
    rows = [{"prompt": "1" * length, "solution": "1"} for length in lengths]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["grpo", "--model", base, "--dataset", str(file), "--steps", "4", "--batch_size", "1"]
    argv += ["--num_samples", "4", "--max_new_tokens", "3", "--reward", "length"]
    widths = []
    original = prompts.PromptSet.select

    def watched(self, *args, **options):
        batch = original(self, *args, **options)
        widths.append(batch.prompts.tokens.shape[1])
        return batch

    monkeypatch.setattr(prompts.PromptSet, "select", watched)
    assert cli.main([*argv, "--output", str(tmp_path / "narrow")]) == 0
    assert sorted(widths) == [45, 45, 91, 91]
    monkeypatch.setattr(prompts, "_narrowed", lambda prompts: prompts)
    assert cli.main([*argv, "--output", str(tmp_path / "wide")]) == 0
    assert widths[4:] == [91] * 4
    for narrow, wide in zip(
        metrics_of(tmp_path / "narrow"), metrics_of(tmp_path / "wide"), strict=True
    ):
        for name in ("reward", "completions/mean_length", "loss", "grad_norm", "entropy"):
            assert narrow[name] == pytest.approx(wide[name], rel=1e-4, abs=1e-6), name


def test_the_end_token_can_be_named_and_goes_with_the_model(base, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": "1+1=", "completion": "2-"}) + "\n" for _ in range(4))
    )
    run = ["sft", "--model", base, "--dataset", str(file), "--steps", "1", "--batch_size", "2"]
    assert cli.main([*run, "--output", str(tmp_path / "run"), "--eos_token", "-"]) == 0
    model = tmp_path / "run" / "model"
    tokenizer = huggingface.load_tokenizer(model)
    assert tokenizer.eos_token == "-"
    own, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<eos>", "-"))
    assert json.loads((model / "generation_config.json").read_text())["eos_token_id"] == [own, end]
    assert huggingface.end_ids(model, tokenizer) == (own, end)
    with pytest.raises(
        ValueError,
        match=r"eos_token '<end>' is no token of .*, whose added tokens are <pad>, <bos>, <eos>",
    ):
        model_info.load_tokenizer(ModelOptions(base, eos_token="<end>"))
    assert model_info.load_tokenizer(ModelOptions(base)).eos_token == "<eos>"


def test_reward_models_hear_nothing_of_end_tokens(base, tmp_path):
    tokenizer = model_info.load_tokenizer(ModelOptions(base))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}"
    say = lambda role, content: [{"role": role, "content": content}]
    row = {
        "prompt": say("user", "a"),
        "chosen": say("assistant", "b"),
        "rejected": say("assistant", "c"),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pairs.lay_out(tokenizer, [row], "none", 99, print, imitated=False).tokens.shape[
            :2
        ] == (1, 2)
    with pytest.warns(RuntimeWarning, match="no row trains the end token <eos>"):
        pairs.lay_out(tokenizer, [row], "none", 99, print)
