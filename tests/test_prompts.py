"""Prompts that are far wider than the others, and the token that ends an answer, through recipes' own options."""

import json
import warnings

import pytest

from rlhf import cli
from rlhf.models import huggingface
from rlhf.recipes import online, setup
from rlhf.tasks import reverse

ROWS = [{"prompt": "1+1=", "solution": number} for number in range(200)]
WIDE = {"prompt": "1+" * 300, "solution": 7}


def questions(rows, **knobs):
    said: list[str] = []
    found = online.Questions.of(reverse.task().tokenizer(), rows, say=said.append, **knobs)
    assert len(found.rows) == len(found.prompts.tokens)
    return found, said


def test_prompts_beyond_the_limit_are_left_out_whole_and_told():
    found, said = questions([*ROWS[:3], WIDE, *ROWS[3:5]], most=10)
    assert [row["solution"] for row in found.rows] == [0, 1, 2, 3, 4]
    assert found.prompts.tokens.shape == (5, 5)
    assert said == ["1 of 6 rows were left out: their prompts have more than max_prompt_length 10 tokens"]
    assert questions(ROWS, most=5)[1] == [], "exactly as many are not more"
    with pytest.raises(ValueError, match="all 1 prompts have more than max_prompt_length 10 tokens, the shortest 601; raise"):
        questions([WIDE], most=10)


@pytest.mark.parametrize("number", [2, 9, 200])
def test_one_prompt_that_widens_all_is_told(number):
    found, said = questions([*ROWS[: number - 1], WIDE])
    assert found.prompts.tokens.shape == (number, 601)
    assert said == [
        f"the longest prompt, row {number - 1}, has 601 tokens, 99 of 100 have at most 5, and all are padded to the longest; "
        "--max_prompt_length 5 leaves such rows out"
    ]
    assert questions(ROWS)[1] == questions([WIDE] * 5)[1] == []


def test_the_end_token_can_be_named_and_goes_with_the_model(base, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": "1+1=", "completion": "2-"}) + "\n" for _ in range(4)))
    run = ["sft", "--model", base, "--dataset", str(file), "--steps", "1", "--batch_size", "2"]
    assert cli.main([*run, "--output", str(tmp_path / "run"), "--eos_token", "-"]) == 0
    model = tmp_path / "run" / "model"
    tokenizer = huggingface.load_tokenizer(model)
    assert tokenizer.eos_token == "-"
    own, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<eos>", "-"))
    assert json.loads((model / "generation_config.json").read_text())["eos_token_id"] == [own, end]
    assert huggingface.end_ids(model, tokenizer) == (own, end)
    with pytest.raises(ValueError, match=r"eos_token '<end>' is no token of .*, whose added tokens are <pad>, <bos>, <eos>"):
        setup.Model(base, eos_token="<end>").tokenizer()
    assert setup.Model(base).tokenizer().eos_token == "<eos>"


def test_reward_models_are_not_told_of_end_tokens(base, tmp_path):
    from rlhf.recipes.pairs import lay_out

    tokenizer = setup.Model(base).tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}"
    say = lambda role, content: [{"role": role, "content": content}]
    row = {"prompt": say("user", "a"), "chosen": say("assistant", "b"), "rejected": say("assistant", "c")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lay_out(tokenizer, [row], "none", 99, print, imitated=False).tokens.shape[:2] == (1, 2)
    with pytest.warns(RuntimeWarning, match="no row trains the end token <eos>"):
        lay_out(tokenizer, [row], "none", 99, print)
