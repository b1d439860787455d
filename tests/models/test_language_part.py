"""Models that read images too, of which the language model alone is loaded."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from checkpoint_goldens import CHECKPOINTS, golden, names, outputs
from marks import exhaustive

from rlhf.models import huggingface
from rlhf.models.families import FAMILIES

NAMES = names("vlm")
IMAGELESS = slice(2, 3)  # the row of a golden batch that holds no image


def folder_of(name, config, tmp_path):
    folder = shutil.copytree(CHECKPOINTS / name, tmp_path / name)
    shutil.copy(CHECKPOINTS / name / config, folder / "config.json")
    return folder


@pytest.mark.parametrize("config", ["config.json", "config_v4.json"])
@pytest.mark.parametrize("name", exhaustive(NAMES, quick=NAMES[:2]))
def test_text_is_read_as_the_model_reads_it(name, config, tmp_path):
    lm, params, _ = huggingface.load(folder_of(name, config, tmp_path), text_only=True)
    g = golden(name)
    mask = g.attention_mask[IMAGELESS]
    positions = np.maximum(np.cumsum(mask, 1, dtype=np.int32) - 1, 0)
    hidden, logits, _ = outputs(lm, params, g.input_ids[IMAGELESS], positions, mask)
    real = mask == 1
    bound = dict(rtol=0, atol=g.tolerance)
    np.testing.assert_allclose(
        np.asarray(hidden)[real], g.last_hidden_state[IMAGELESS][real], **bound
    )
    np.testing.assert_allclose(np.asarray(logits)[real], g.logits[IMAGELESS][real], **bound)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_left_out_is_asked_for(name):
    with pytest.raises(ValueError, match=r"\(vision\).*text_only=True.*--text_only"):
        huggingface.load(CHECKPOINTS / name)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_saved_as_a_language_model(name, tmp_path):
    lm, params, _ = huggingface.load(CHECKPOINTS / name, text_only=True)
    huggingface.save(tmp_path / "a", lm, params, like=CHECKPOINTS / name)
    again, same, _ = huggingface.load(tmp_path / "a")
    assert again == lm
    jax.tree.map(np.testing.assert_array_equal, same, params)
    written = json.loads((tmp_path / "a" / "config.json").read_text())
    assert written["architectures"] == [FAMILIES[written["model_type"]].architecture]


def test_a_tensor_of_the_language_model_is_missed(tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = folder_of("qwen3_5_vl", "config.json", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.language_model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=re.escape("model.norm.weight")):
        huggingface.load(folder, text_only=True)


@pytest.mark.parametrize("value", [5, "text", [1], None, {}, {"model_type": "no_such"}])
def test_a_text_config_that_cannot_be_is_refused(value, tmp_path):
    folder = folder_of("qwen3_5_vl", "config.json", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "text_config": value}))
    with pytest.raises(ValueError, match=r"config\.json: model_type .* is not known"):
        huggingface.load(folder, text_only=True)
