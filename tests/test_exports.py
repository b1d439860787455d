"""What a run writes, used as its users use it: with transformers and PEFT, in batches, and as the start of the next run."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import exhaustive
from safetensors.numpy import load_file

import rlhf
from rlhf import cli, data, rollouts
from rlhf.models import TransformerConfig, classifier_head, huggingface, transformer

TEXTS = ["abc", "hgfedcba", "ea"]
ROWS = {"text": {"text": "abcdef"}, "pairs": {"prompt": "ab", "chosen": "ba", "rejected": "abab"}}


@pytest.fixture(scope="module")
def half(base, tmp_path_factory):
    """The tiny model in bfloat16, with more than one end token."""
    folder = tmp_path_factory.mktemp("half") / "model"
    lm, params, tokenizer = huggingface.load(base)
    huggingface.save(folder, lm, params, like=base, tokenizer=tokenizer, dtype=jnp.bfloat16)
    return folder


def run(command, model, folder, kind, *more):
    rows = folder.parent / f"{folder.name}.jsonl"
    rows.write_text((json.dumps(ROWS[kind]) + "\n") * 4)
    argv = [
        command,
        "--model",
        str(model),
        "--dataset",
        str(rows),
        "--output",
        str(folder),
        "--batch_size",
        "2",
    ]
    assert cli.main([*argv, "--steps", "2", "--learning_rate", "0.01", *more]) == 0
    return folder / "model"


def auto(folder, kind="CausalLM", **how):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder, **how).eval()


def ours(tokenizer, texts):
    rows = data.batch(
        [
            data.Tokenized(tokenizer(text)["input_ids"], [True] * len(tokenizer(text)["input_ids"]))
            for text in texts
        ]
    )
    return dict(
        tokens=jnp.asarray(rows.tokens),
        positions=jnp.asarray(rows.positions),
        segment_ids=jnp.asarray(rows.segment_ids),
    )


def batch_of(folder, texts=TEXTS):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")


def test_a_reward_model_scores_a_padded_batch_as_we_do(base, tmp_path):
    folder = (
        tmp_path / "base"
    )  # as most are published, its config does not name the tokenizer's padding
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "pad_token_id"})
    )
    model = run("reward", folder, tmp_path / "run", "pairs")
    theirs = auto(model, "SequenceClassification")
    lm, head, params, tokenizer = rlhf.load_classifier(model)
    batch = batch_of(model)
    assert not batch["attention_mask"].bool().all()
    with pytest.importorskip("torch").no_grad():
        scores = (
            theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            .logits[:, 0]
            .numpy()
        )
    np.testing.assert_allclose(
        scores, rollouts.classify(lm, head, params, **ours(tokenizer, TEXTS)), atol=1e-5
    )
    assert np.abs(scores).max() > 1e-3


def test_padding_of_a_tokenizer_without_any_is_its_end_token(base, tmp_path):
    lm, params, tokenizer = huggingface.load(base)
    tokenizer.pad_token = None
    head = {"weight": jax.random.normal(jax.random.key(0), (16, 3))}
    huggingface.save(tmp_path / "a", lm, params, head=head, like=base, tokenizer=tokenizer)
    assert (
        json.loads((tmp_path / "a" / "config.json").read_text())["pad_token_id"]
        == tokenizer.eos_token_id
    )
    theirs, batch = auto(tmp_path / "a", "SequenceClassification"), batch_of(tmp_path / "a")
    with pytest.importorskip("torch").no_grad():
        scores = theirs(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits.numpy()
    lm, head, params, tokenizer = rlhf.load_classifier(tmp_path / "a")
    np.testing.assert_allclose(
        scores, rollouts.classify(lm, head, params, **ours(tokenizer, TEXTS)), atol=1e-5
    )


def test_a_classifier_of_tokens(base, tmp_path):
    lm, params, tokenizer = huggingface.load(base)
    head = classifier_head(16, 2, bias=True, reads="every")
    weights = head.init(jax.random.key(0))
    huggingface.save(tmp_path / "a", lm, params, head=weights, like=base, tokenizer=tokenizer)
    theirs, batch = auto(tmp_path / "a", "TokenClassification"), batch_of(tmp_path / "a", TEXTS[:1])
    scores = theirs(input_ids=batch["input_ids"]).logits.detach().numpy()
    want = rollouts.classify(
        lm, head, {"lm": params, "head": weights}, **ours(tokenizer, TEXTS[:1])
    )
    np.testing.assert_allclose(scores, want, atol=1e-5)


def test_generate_stops_at_every_end_token(base, tmp_path):
    """At the tokenizer's own too, where generation_config.json of the original names another alone."""
    folder = tmp_path / "original"
    shutil.copytree(base, folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 7, "pad_token_id": 0})
    )
    lm, params, tokenizer = huggingface.load(folder)
    huggingface.save(tmp_path / "a", lm, params, like=folder, tokenizer=tokenizer)
    ends = json.loads((tmp_path / "a" / "generation_config.json").read_text())["eos_token_id"]
    assert (
        sorted(ends)
        == sorted([7, tokenizer.eos_token_id])
        == sorted(huggingface.end_ids(tmp_path / "a", tokenizer))
    )
    theirs, batch = auto(tmp_path / "a"), batch_of(tmp_path / "a", ["abc"])
    torch = pytest.importorskip("torch")
    for end in ends:  # a model that says one token alone
        with torch.no_grad():
            theirs.lm_head.weight = torch.nn.Parameter(torch.zeros(theirs.lm_head.weight.shape))
            theirs.lm_head.weight[end] = theirs.model(
                input_ids=batch["input_ids"]
            ).last_hidden_state[0, -1]
        said = theirs.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=9,
            do_sample=False,
        )
        assert said[0, batch["input_ids"].shape[1] :].tolist() == [end]


@pytest.mark.exhaustive
def test_generate_says_what_ours_says(base, tmp_path):
    model = run("sft", base, tmp_path / "run", "text")
    theirs, batch = auto(model), batch_of(model, ["abc"])
    lm, params, tokenizer = huggingface.load(model)
    prompts = rollouts.Prompts(
        batch["input_ids"].numpy().astype(np.int32), np.ones(batch["input_ids"].shape, bool)
    )
    ends = huggingface.end_ids(model, tokenizer)
    said = rollouts.generate(
        lm,
        params,
        prompts,
        jax.random.key(0),
        max_new_tokens=6,
        sampler=rollouts.greedy(),
        eos_ids=ends,
    )
    wanted = theirs.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=6,
        do_sample=False,
    )
    length = wanted.shape[1]
    assert said.tokens[0, :length].tolist() == wanted[0].tolist()


def dtypes(folder):
    return {str(x.dtype) for x in load_file(folder / "model.safetensors").values()}


@pytest.mark.parametrize(
    "more",
    exhaustive([[], ["--dtype", "bfloat16"], ["--lora_rank", "2"]], quick=[[]]),
    ids=["whole", "bfloat16", "adapters"],
)
def test_a_model_comes_out_in_the_dtype_it_had(half, more, tmp_path):
    model = run("sft", half, tmp_path / "run", "text", *more)
    assert dtypes(half) == dtypes(model) == {"bfloat16"}
    assert json.loads((model / "config.json").read_text())["dtype"] == "bfloat16"
    assert huggingface.stored_dtype(model) == jnp.bfloat16
    before, after = (load_file(folder / "model.safetensors") for folder in (half, model))
    assert any((before[name] != after[name]).any() for name in before)
    if not more:
        pytest.importorskip("torch")
        assert str(auto(model).dtype) == "torch.bfloat16"


@pytest.mark.exhaustive
def test_float32_stays(base, tmp_path):
    model = run("sft", base, tmp_path / "run", "text", "--dtype", "bfloat16")
    assert dtypes(model) == {"float32"}
    run("sft", model, tmp_path / "next", "text")  # and training goes on from there


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_an_adapter_on_its_base_with_peft(base, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    model = run("sft", base, tmp_path / "run", "text", "--lora_rank", "2")
    adapted = peft.PeftModel.from_pretrained(auto(base), tmp_path / "run" / "adapter").eval()
    by_name = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "adapter").eval()
    batch = batch_of(model)
    ask = lambda m: m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[
        batch["attention_mask"] == 1
    ]
    with torch.no_grad():
        whole, plain, on_base, named = ask(auto(model)), ask(auto(base)), ask(adapted), ask(by_name)
    assert (whole - plain).abs().max() > 1e-3
    torch.testing.assert_close(on_base, whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(named, whole, atol=1e-5, rtol=0)


def test_training_goes_on_in_torch(base, tmp_path):
    model = run("sft", base, tmp_path / "run", "text")
    theirs, batch = auto(model), batch_of(model)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    theirs(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
    ).loss.backward()
    assert all(np.isfinite(p.grad.numpy()).all() for p in theirs.parameters())


def test_a_tokenizer_with_its_chat_template(base, tmp_path):
    AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer
    lm, params, tokenizer = huggingface.load(base)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    huggingface.save(tmp_path / "a", lm, params, like=base, tokenizer=tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert again.chat_template == tokenizer.chat_template
    assert again("abc")["input_ids"] == tokenizer("abc")["input_ids"]
    messages = [{"role": "user", "content": "abc"}]
    assert again.apply_chat_template(messages, tokenize=False) == "abc"


def test_shards_are_cut_by_the_size_of_what_is_written(tmp_path):
    lm = transformer(
        TransformerConfig(vocab_size=64, hidden_size=16, num_layers=1, num_heads=1, mlp_size=32)
    )
    params = lm.init(jax.random.key(0))
    total = sum(x.size for x in jax.tree.leaves(params)) * 2
    huggingface.save(tmp_path / "a", lm, params, dtype=jnp.bfloat16, shard_bytes=total)
    assert (tmp_path / "a" / "model.safetensors").exists()
