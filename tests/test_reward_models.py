"""Encoders, classifiers and reward models themselves as what `rlhf reward` starts from, and as rewards of another tokenizer."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import exhaustive
from safetensors.numpy import load_file, save_file
from tokenizers.processors import TemplateProcessing

from rlhf import cli, data, rollouts
from rlhf.models import huggingface
from rlhf.tasks import characters
from rlhf.training import meshes, reward_models

CHECKPOINTS = Path(__file__).parent / "checkpoints"
ENCODERS = ("bert_classifier_1", "roberta_classifier", "distilbert_classifier")
HEADS = {  # what of the head a pre-trained model's files have not, and what they have beside the trunk
    "bert_classifier_1": (("classifier.",), "cls.predictions.bias"),
    "roberta_classifier": (("classifier.",), "lm_head.dense.weight"),
    "distilbert_classifier": (("classifier.", "pre_classifier."), "vocab_transform.weight"),
}
BASES = {
    "bert_classifier_1": "BertForMaskedLM",
    "roberta_classifier": "RobertaForMaskedLM",
    "distilbert_classifier": "DistilBertForMaskedLM",
}
ROWS = [
    {"prompt": "1+1=", "chosen": "2", "rejected": "31"},
    {"prompt": "a", "chosen": "bcd", "rejected": "b"},
    {"prompt": "long" * 12, "chosen": "good", "rejected": "bad"},
    {"prompt": "x", "chosen": "y", "rejected": "zz"},
]
SHORT = ["--steps", "2", "--batch_size", "4", "--learning_rate", "1e-2"]
CHATS = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")},
    }
    for row in ROWS
]


def framed_tokenizer():
    """A tokenizer that puts a token before and one behind a text, as BERT's do; it has no chat template and no end token."""
    tokenizer = huggingface.load_tokenizer(CHECKPOINTS / "tokenizer")
    first, last = tokenizer.bos_token, tokenizer.eos_token
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (first, last)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=special
    )
    tokenizer.chat_template = None
    tokenizer.eos_token = None
    return tokenizer


def pretrained(name, folder, *, old_names=False):
    """A checkpoint as a masked language model has it: without the labels, and with an output of its own."""
    shutil.copytree(CHECKPOINTS / name, folder)
    lacking, beside = HEADS[name]
    tensors = {
        k: v
        for k, v in load_file(folder / "model.safetensors").items()
        if not k.startswith(lacking)
    }
    if old_names:
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        tensors = {
            next((k.replace(a, b) for a, b in old.items() if k.endswith(a)), k): v
            for k, v in tensors.items()
        }
    save_file(
        {**tensors, beside: np.zeros((3, 3), np.float32)},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [BASES[name]]}))
    framed_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("rewards")
    for name, rows in (("rows", ROWS), ("chats", CHATS)):
        (tmp / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ENCODERS:
        pretrained(name, tmp / name, old_names=name == ENCODERS[0])
    for name in ("llama", "llama_reward", "qwen2_prm", "t5"):
        shutil.copytree(CHECKPOINTS / name, tmp / name)
        characters.tokenizer().save_pretrained(tmp / name)
    return tmp


@pytest.fixture(scope="module")
def trained(tmp):
    """A run of `rlhf reward` on BERT; the others with labels at random, written as a run writes them, which is faster."""
    argv = [
        "reward",
        "--model",
        str(tmp / ENCODERS[0]),
        "--dataset",
        str(tmp / "rows.jsonl"),
        *SHORT,
    ]
    with pytest.MonkeyPatch.context() as patch:  # before the fixture `one_device` of each test
        patch.setattr(meshes, "local_devices", lambda: jax.devices()[:1])
        assert cli.main([*argv, "--output", str(tmp / f"run_{ENCODERS[0]}")]) == 0
    for name in ENCODERS[1:]:
        lm, _, params, tokenizer = huggingface.load_for_classification(tmp / name, 1)
        head = params["head"] | {
            "weight": jax.random.normal(jax.random.key(0), params["head"]["weight"].shape)
        }
        folder = tmp / f"run_{name}" / "model"
        huggingface.save(folder, lm, params["lm"], head=head, like=tmp / name, tokenizer=tokenizer)
    return tmp


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_keeps_its_trunk_and_pooler_and_gets_new_labels(tmp, name):
    _, _, params, _ = huggingface.load_for_classification(tmp / name, 1)
    _, _, whole, _ = huggingface.load_classifier(CHECKPOINTS / name)
    jax.tree.map(np.testing.assert_array_equal, params["lm"], whole["lm"])
    assert not np.asarray(params["head"]["weight"]).any()
    same = bool((params["head"]["inner"] == whole["head"]["inner"]).all())
    assert same == (
        name == "bert_classifier_1"
    )  # the pooler is pre-trained; the others' inner layers are of the labels
    assert np.asarray(params["head"]["inner"]).any()


def test_a_classifier_goes_on_from_its_own_head():
    for name, labels, of_tokens in (
        ("bert_classifier_1", 1, False),
        ("llama_reward", 1, False),
        ("qwen2_prm", 2, True),
    ):
        _, head, params, _ = huggingface.load_for_classification(
            CHECKPOINTS / name, labels, of_tokens=of_tokens
        )
        _, same, whole, _ = huggingface.load_classifier(CHECKPOINTS / name)
        assert head == same
        jax.tree.map(np.testing.assert_array_equal, params, whole)
    _, head, params, _ = huggingface.load_for_classification(CHECKPOINTS / "llama", 1)
    assert set(params["head"]) == {"weight"}
    assert "unembedding" not in params["lm"]


@pytest.mark.parametrize("name", exhaustive(ENCODERS, quick=ENCODERS[:1]))
def test_what_reward_writes_is_read_again_and_by_transformers(trained, name):
    folder = trained / f"run_{name}" / "model"
    lm, head, params, tokenizer = huggingface.load_classifier(folder)
    assert head.reads == "first"
    assert np.asarray(params["head"]["weight"]).any()
    texts = [row["prompt"] + row["chosen"] for row in ROWS if len(row["prompt"]) < 9]
    read = data.tokenize_joined(tokenizer, [{"text": text} for text in texts], column="text")
    assert [row.tokens for row in read] == tokenizer(texts)["input_ids"]
    ours = rollouts.reward_functions.score_rows(lm, head, params, [row.tokens for row in read])
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert model.config.num_labels == 1
    width = max(len(row.tokens) for row in read)
    tokens = torch.tensor([row.tokens + [0] * (width - len(row.tokens)) for row in read])
    mask = torch.tensor([[1] * len(row.tokens) + [0] * (width - len(row.tokens)) for row in read])
    positions = {}
    if name == "roberta_classifier":  # which counts tokens other than its padding token
        pad = model.config.pad_token_id
        tokens = torch.where(mask == 1, tokens, pad)
        positions = {"position_ids": torch.where(mask == 1, mask.cumsum(1) + pad, pad)}
    with torch.no_grad():
        theirs = model(input_ids=tokens, attention_mask=mask, **positions).logits[:, 0].numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_reward_goes_on_from_its_own_output_and_reads_conversations(trained):
    run = trained / f"run_{ENCODERS[0]}"
    argv = ["reward", "--model", str(run), "--dataset", str(trained / "chats.jsonl"), *SHORT]
    argv += ["--packing", "bfd", "--batch_size", "2"]
    assert cli.main([*argv, "--output", str(trained / "again")]) == 0
    before, after = (
        huggingface.load_classifier(folder / "model")[2]["head"]
        for folder in (run, trained / "again")
    )
    assert (
        np.abs(np.asarray(before["weight"]) - np.asarray(after["weight"])).max() < 0.1
    )  # two steps from where it was
    assert huggingface.read_config(trained / "again" / "model") == huggingface.read_config(
        run / "model"
    )


@pytest.mark.parametrize("name", ENCODERS)
def test_a_classifier_of_tokens_is_made_of_an_encoder_and_goes_on(tmp, name):
    lm, head, params, tokenizer = huggingface.load_for_classification(tmp / name, 2, of_tokens=True)
    fresh = {"weight": jax.random.normal(jax.random.key(0), (32, 2)), "bias": jnp.ones(2)}
    assert {key: leaf.shape for key, leaf in params["head"].items()} == {
        key: leaf.shape for key, leaf in fresh.items()
    }
    model = tmp / f"tokens_{name}"
    huggingface.save(model, lm, params["lm"], head=fresh, like=tmp / name, tokenizer=tokenizer)
    lm, head, params, _ = huggingface.load_classifier(model)
    _, _, again, _ = huggingface.load_for_classification(model, 2, of_tokens=True)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    np.testing.assert_array_equal(params["head"]["weight"], fresh["weight"])
    assert head.reads == "every"
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(model).eval()
    tokens = np.array([[40, 41, 42, 43]], np.int32)
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    where = dict(positions=np.arange(4, dtype=np.int32)[None], segment_ids=np.ones_like(tokens))
    np.testing.assert_allclose(
        rollouts.classify(lm, head, params, tokens, **where), expected, atol=1e-5
    )


def rollout_of(tokenizer, prompts, completions):
    """A rollout of these texts, prompts padded on the left."""
    starts = [tokenizer(text)["input_ids"] for text in prompts]
    ends = [
        [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for text in completions
    ]
    rows = data.aligned(
        [
            data.Tokenized(a + b, [False] * len(a) + [True] * len(b))
            for a, b in zip(starts, ends, strict=True)
        ]
    )
    nothing = np.zeros(rows.tokens.shape, np.float32)
    return rollouts.Rollout(
        rows.tokens,
        rows.mask,
        rows.positions,
        rows.segment_ids,
        nothing,
        nothing,
        np.ones(len(prompts), bool),
        jnp.float32(1),
    )


@pytest.mark.parametrize("kind", ["text", "conversation", "decoded"])
def test_a_reward_model_with_another_tokenizer_reads_the_text(trained, kind):
    """It says what it says of the text itself, wherever the policy's tokens come from; of a long one it reads both ends."""
    policy, name = characters.tokenizer(), f"run_{ENCODERS[0]}"
    prompts, completions = ["1+1=", "12" * 30], ["2", "34", "5", "6"]
    rollout = rollout_of(policy, [p for p in prompts for _ in range(2)], completions)
    columns = {"text": {"prompt": prompts}, "decoded": {}}.get(
        kind, {"prompt": [[{"role": "user", "content": text}] for text in prompts]}
    )
    found = reward_models.find(str(trained / name), policy)
    scores, metrics = reward_models.load(found)(rollout, columns, 2)
    lm, head, params, tokenizer = huggingface.load_classifier(trained / name / "model")
    joint = "\n" if kind == "conversation" else ""
    texts = [
        p + joint + a
        for p, a in zip([p for p in prompts for _ in range(2)], completions, strict=True)
    ]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    ids = [row if len(row) <= 40 else [row[0], *row[-39:]] for row in ids]
    expected = [
        float(rollouts.reward_functions.score_rows(lm, head, params, [row])[0]) for row in ids
    ]
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    np.testing.assert_allclose(
        metrics[f"rewards/{trained / name}/mean"], np.mean(expected), atol=1e-5
    )


def test_a_decoder_reads_the_policys_tokens_where_they_are_its_own(tmp):
    tokenizer = characters.tokenizer()
    rollout = rollout_of(tokenizer, ["1+1="] * 2, ["2", "34"])
    found = reward_models.find(str(tmp / "llama_reward"), tokenizer)
    scores, _ = reward_models.load(found)(rollout, {}, 1)
    lm, head, params, _ = huggingface.load_classifier(tmp / "llama_reward")
    np.testing.assert_array_equal(
        scores, rollouts.reward_functions.model_reward(lm, head, params)(rollout)
    )
    other = found._replace(
        policy_tokenizer=framed_tokenizer()
    )  # as if the policy's tokens were others: the same texts
    texts = reward_models.texts_of(tokenizer, rollout, {"prompt": ["1+1="] * 2}, 1)
    own = rollouts.reward_functions.score_rows(
        lm, head, params, reward_models.tokens_of(other, texts)
    )
    np.testing.assert_allclose(own, scores, atol=1e-5)


@pytest.mark.exhaustive
def test_a_policy_is_trained_by_a_reward_model_of_another_tokenizer(trained):
    argv = [
        "grpo",
        "--model",
        str(trained / "llama"),
        "--dataset",
        "task:reverse",
        "--dataset_size",
        "4",
        *SHORT,
    ]
    argv += [
        "--num_samples",
        "2",
        "--max_new_tokens",
        "3",
        "--reward",
        str(trained / f"run_{ENCODERS[0]}"),
    ]
    assert cli.main([*argv, "--output", str(trained / "grpo")]) == 0


REFUSED = {
    "sft of an encoder": (
        ["sft", "--model", "TMP/roberta_classifier", "--dataset", "TMP/rows.jsonl"],
        "is an encoder (roberta)",
    ),
    "grpo of an encoder": (
        [
            "grpo",
            "--model",
            "TMP/bert_classifier_1",
            "--dataset",
            "TMP/rows.jsonl",
            "--reward",
            "length",
        ],
        "is an encoder (bert)",
    ),
    "reward of an encoder-decoder": (
        ["reward", "--model", "TMP/t5", "--dataset", "TMP/rows.jsonl"],
        "is an encoder-decoder, which cannot be a reward model",
    ),
    "prm of an encoder-decoder": (
        ["prm", "--model", "TMP/t5", "--dataset", "TMP/steps.jsonl"],
        "is an encoder-decoder, which cannot be a reward model",
    ),
    "reward of a classifier of tokens": (
        ["reward", "--model", "TMP/qwen2_prm", "--dataset", "TMP/rows.jsonl"],
        "is a classifier of tokens (score.weight), but one of whole texts is wanted",
    ),
    "prm of a reward model": (
        ["prm", "--model", "TMP/llama_reward", "--dataset", "task:sums"],
        "is a classifier of whole texts (score.weight), but one of tokens is wanted",
    ),
    "a reward that scores tokens": (
        ["grpo", "--model", "TMP/llama", "--dataset", "task:reverse", "--reward", "TMP/qwen2_prm"],
        "scores every token, but a reward is one number a text",
    ),
    "a reward that is no reward model": (
        ["grpo", "--model", "TMP/llama", "--dataset", "task:reverse", "--reward", "TMP/llama"],
        "is it a reward model, as `rlhf reward` writes them?",
    ),
    "a reward that is an encoder-decoder": (
        ["grpo", "--model", "TMP/llama", "--dataset", "task:reverse", "--reward", "TMP/t5"],
        "is an encoder-decoder, which cannot be a reward model",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(trained, capsys, case):
    argv, message = REFUSED[case]
    argv = [word.replace("TMP", str(trained)) for word in argv]
    assert cli.main([*argv, *SHORT, "--output", str(trained / "refused")]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "Traceback" not in said


def test_classifiers_with_other_labels_are_refused(tmp):
    with pytest.raises(ValueError, match=r"with 1 labels? \(score.weight\), but 3 are wanted"):
        huggingface.load_for_classification(tmp / "llama_reward", 3)
