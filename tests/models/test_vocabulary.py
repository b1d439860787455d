"""Embeddings that grow with a tokenizer: as transformers grows them, through training and back into a folder."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_goldens import HOME as CHECKPOINTS
from marks import exhaustive
from safetensors.numpy import load_file

from rlhf import cli
from rlhf.models import huggingface
from rlhf.models.vocabulary import resized

MORE = 3


@pytest.mark.parametrize(
    "name", exhaustive(["gpt2", "llama", "phi", "gptj", "bart", "t5"], quick=["llama", "t5"])
)
def test_grown_as_transformers_grows_it_and_saved(name, tmp_path):
    lm, params, _ = huggingface.load(CHECKPOINTS / name)
    number = params["embedding"].shape[0]
    new_lm, new = resized(lm, params, number + MORE)
    for leaf, axis in (("embedding", 0), ("unembedding", 1), ("unembedding_bias", 0)):
        if leaf in params:
            old, grown = np.moveaxis(params[leaf], axis, 0), np.moveaxis(new[leaf], axis, 0)
            np.testing.assert_array_equal(grown[:number], old)
            np.testing.assert_allclose(
                grown[number:], np.broadcast_to(old.mean(0), grown[number:].shape), atol=1e-7
            )
    assert resized(lm, params, number - 1) == (lm, params)
    huggingface.save(tmp_path / "a", new_lm, new, like=CHECKPOINTS / name)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["vocab_size"] == number + MORE
    again, same, _ = huggingface.load(tmp_path / "a")
    assert again == new_lm
    jax.tree.map(np.testing.assert_array_equal, same, new)
    _assert_as_transformers(name, number, tmp_path / "a")


def _assert_as_transformers(name, number, folder):
    """Up to the noise that it adds."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    auto = (
        transformers.AutoModelForSeq2SeqLM
        if name in ("bart", "t5")
        else transformers.AutoModelForCausalLM
    )
    theirs = auto.from_pretrained(CHECKPOINTS / name)
    theirs.resize_token_embeddings(number + MORE)
    ours = auto.from_pretrained(folder)
    for key, x in theirs.state_dict().items():
        if key == "final_logits_bias":  # transformers appends zeros to BART's
            continue
        torch.testing.assert_close(ours.state_dict()[key], x, atol=1e-3, rtol=0, msg=key)


@pytest.fixture(scope="module")
def added(base, tmp_path_factory):
    """A model whose tokenizer knows a token more than it."""
    folder = tmp_path_factory.mktemp("added") / "model"
    shutil.copytree(base, folder)
    tokenizer = huggingface.load_tokenizer(folder)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(folder)
    return folder, len(tokenizer)


@pytest.mark.parametrize("more", [[], ["--lora_rank", "2"]], ids=["whole", "adapters"])
@pytest.mark.exhaustive
def test_a_run_that_grows_its_model(added, more, tmp_path):
    folder, size = added
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "ab<tool>cd"}\n' * 4)
    argv = [
        "sft",
        "--model",
        str(folder),
        "--dataset",
        str(rows),
        "--output",
        str(tmp_path / "run"),
        "--batch_size",
        "2",
    ]
    assert cli.main([*argv, "--resize_embeddings", "true", "--steps", "2", *more]) == 0
    model = tmp_path / "run" / "model"
    config, tensors = (
        json.loads((model / "config.json").read_text()),
        load_file(model / "model.safetensors"),
    )
    assert config["vocab_size"] == size == len(huggingface.load_tokenizer(model))
    assert size in {n for x in tensors.values() for n in x.shape}
    assert (
        cli.main(
            [
                "sft",
                *argv[1:2],
                str(model),
                *argv[3:5],
                "--output",
                str(tmp_path / "next"),
                "--batch_size",
                "2",
            ]
        )
        == 0
    )


def test_padding_by_an_added_token_trains(added, tmp_path):
    """A pad token that was added and never embedded, as tutorials have it, is seen by nobody."""
    folder, _ = added
    lm, params, _ = huggingface.load(folder)
    tokens = jnp.array([[5, 6, 44], [5, 6, 7]])
    segments = jnp.array([[1, 1, 0], [1, 1, 1]])
    hidden = lm.hidden(
        params, tokens, positions=jnp.tile(jnp.arange(3), (2, 1)), segment_ids=segments
    )[0]
    assert np.isfinite(hidden).all()
