"""Every family against what transformers computed from the same files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_goldens import (
    CHECKPOINTS,
    GENERATING,
    HOME,
    NEW,
    forward,
    generate,
    golden,
    load,
    meta,
    names,
    rollout,
    source,
)
from marks import exhaustive
from safetensors.numpy import load_file

from rlhf import losses, rollouts
from rlhf.models import delta, huggingface, mxfp4
from rlhf.models.families import FAMILIES

LMS = names("causal", "seq2seq")
# Positions, norms, experts and encoders of every kind; the rest differ from these by names and sizes.
FEW = ["gemma3_text", "gemma4_moe", "llama", "qwen3_5_moe", "t5"]
CAUSAL = names("causal")
SEQ2SEQ = names("seq2seq")
CLASSIFIERS = names("seqcls", "tokcls", "encoder_seqcls")
ENCODERS = names("encoder")
ALL = [*LMS, *CLASSIFIERS, *ENCODERS]
SAMPLING = [name for name in LMS if name in GENERATING]
ENDING = (
    LMS if CHECKPOINTS != HOME else ["gpt2", "llama", "t5"]
)  # learned, rotary, an encoder's; the rest is the same code


def assert_close(a, b, atol):
    np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=atol)


def test_every_family_has_a_checkpoint():
    """Of every model type that we read."""
    assert {golden(name).config["model_type"] for name in ALL} == set(FAMILIES)


@pytest.mark.parametrize("name", exhaustive(LMS, quick=FEW))
def test_outputs_are_those_of_transformers(name):
    ours, g = forward(name)["rows"], golden(name)
    real = (g.decoder_attention_mask if name in SEQ2SEQ else g.attention_mask) == 1
    assert_close(ours.hidden[real], g.last_hidden_state[real], g.tolerance)
    assert_close(ours.logits[real], g.logits[real], g.tolerance)
    assert not ours.logprobs[:, 0].any()
    labelled = g.labels[:, 1:] != -100
    if name in SEQ2SEQ:  # labels are the decoder's tokens, one to the left
        logprobs = np.asarray(
            losses.logits.token_logprob(jnp.asarray(ours.logits), jnp.maximum(g.labels, 0))
        )
        labelled = g.labels != -100
    else:
        logprobs = ours.logprobs[:, 1:]
    assert_close(
        np.where(labelled, logprobs, 0) if name in SEQ2SEQ else logprobs,
        g.token_logprobs,
        g.tolerance,
    )
    assert_close(-logprobs[labelled].mean(), g.loss, g.tolerance)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_encoders_of_decoders_are_those_of_transformers(name):
    lm, _, params, _ = load(name)
    g = golden(name)
    encoded = jax.jit(lm.encode)(params, source(g.input_ids, g.attention_mask))
    real = g.attention_mask == 1
    assert_close(encoded["hidden"][real], g.encoder_last_hidden_state[real], g.tolerance)


PACKED = [name for name in CAUSAL if "packed_logits" in meta(name)["arrays"]]
LONG = [name for name in CAUSAL if "long_input_ids" in meta(name)["arrays"]]


@pytest.mark.parametrize(
    "name", exhaustive(PACKED, quick=[name for name in (*FEW, "gpt_oss", "lfm2") if name in PACKED])
)
def test_packed_sequences_are_those_of_transformers_one_by_one(name):
    assert_close(forward(name)["packed"].logits, golden(name).packed_logits, golden(name).tolerance)


@pytest.mark.parametrize("name", exhaustive(LONG, quick=[name for name in FEW if name in LONG]))
def test_rows_of_more_than_a_chunk(name):
    """Of the delta rule; one of them padded on the left."""
    g = golden(name)
    assert g.long_input_ids.shape[1] > delta.CHUNK
    assert_close(forward(name)["long"].logprobs[:, 1:], g.long_token_logprobs, g.tolerance)


def same_rows(name):
    """Rows whose greedy tokens must be those of transformers: with long-rope factors, those that are long themselves.

    transformers takes the factors of the batch's longest row; a row must not depend on its neighbours.
    """
    original = (
        golden(name).config.get("rope_parameters", {}).get("original_max_position_embeddings")
    )
    if golden(name).config.get("rope_parameters", {}).get("rope_type") != "longrope":
        return slice(None)
    return golden(name).gen_attention_mask.sum(1) > original


@pytest.mark.parametrize("name", exhaustive(SAMPLING, quick=FEW))
def test_greedy_tokens_are_those_of_transformers(name):
    g, rows = golden(name), same_rows(name)
    np.testing.assert_array_equal(rollout(name).tokens[rows, -NEW:], g.gen_new_tokens[rows])
    assert_close(rollout(name).logprobs[rows, -NEW:], g.gen_logprobs[rows], g.tolerance)
    assert not rollout(name).finished.any()


@pytest.mark.parametrize("name", ENDING)
def test_an_end_token_ends_a_row(name):
    g, rows = golden(name), same_rows(name)
    ended = generate(name, eos_ids=(int(g.gen_eos_token_id),))
    np.testing.assert_array_equal(ended.tokens[rows, -NEW:], g.gen_eos_new_tokens[rows])
    np.testing.assert_array_equal(
        ended.finished[rows], (g.gen_eos_new_tokens == g.gen_eos_token_id).any(-1)[rows]
    )


@pytest.mark.parametrize("name", exhaustive(SAMPLING, quick=FEW))
def test_scored_logprobs_are_the_generated_ones(name):
    """But for a row that grows past the length at which its long-rope factors change: it is scored as the row it became.

    Within 1e-5; where float32 rounds transformers' own two ways further apart, half as much again as those.
    """
    theirs = meta(name)["facts"].get("max_abs_difference_cached_decode_vs_full_forward", 0.0)
    r, rows = rollout(name), same_rows(name)
    scored = np.where(r.mask, forward(name)["generated"].logprobs, 0.0)
    np.testing.assert_allclose(
        scored[rows], r.logprobs[rows], rtol=0, atol=max(1e-5, 1.5 * theirs if theirs > 1e-5 else 0)
    )


# --- classifiers and encoders ------------------------------------------------------------------------------------------


def positions(name, tokens, mask, given=True):
    """As transformers counts them where it is given none; `given` for those that take position ids."""
    if golden(name).config["model_type"] == "roberta":
        real = tokens != golden(name).config["pad_token_id"]
        return np.where(real, np.cumsum(real, axis=1) - 1, -1)
    if "position_ids" in meta(name)["arrays"] and given:
        return np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    return np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)


def classify(name, tokens, mask, given=True):
    lm, head, params, _ = load(name)
    g = golden(name)
    inputs = {"token_types": g.token_type_ids} if hasattr(g, "token_type_ids") else None
    where = dict(
        positions=positions(name, tokens, mask, given).astype(np.int32),
        segment_ids=mask,
        inputs=inputs,
    )
    return np.asarray(run_classifier(lm, head, params, tokens, **where))


run_classifier = jax.jit(rollouts.classify, static_argnums=(0, 1))


def flat(x):
    return x[..., 0] if x.shape[-1] == 1 else x


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_are_those_of_transformers(name):
    g = golden(name)
    ours, real = classify(name, g.input_ids, g.attention_mask), g.attention_mask == 1
    if meta(name)["kind"] == "tokcls":
        assert_close(ours[real], g.logits[real], g.tolerance)
        labelled = g.labels != -100
        logprobs = losses.logits.token_logprob(jnp.asarray(ours), jnp.maximum(g.labels, 0))
        assert_close(-np.asarray(logprobs)[labelled].mean(), g.loss, g.tolerance)
    elif hasattr(g, "logits_with_position_ids"):
        assert_close(ours, flat(g.logits_with_position_ids), g.tolerance)
        assert_close(
            classify(name, g.input_ids, g.attention_mask, given=False), flat(g.logits), g.tolerance
        )
    else:
        assert_close(ours, flat(g.logits), g.tolerance)


@pytest.mark.parametrize(
    "name", [name for name in CLASSIFIERS if "left_logits" in meta(name)["arrays"]]
)
def test_rewards_with_padding_on_either_side(name):
    """With pad = eos, transformers reads the token before the end; so does a row whose end token is left out of its segment."""
    g = golden(name)
    for side in ("left", "right", "pad_is_eos"):
        tokens, expected = getattr(g, f"{side}_input_ids"), getattr(g, f"{side}_logits")
        assert_close(
            classify(
                name, tokens, (tokens != g.config["pad_token_id"]).astype(np.int32), given=False
            ),
            flat(expected),
            g.tolerance,
        )


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_are_those_of_transformers(name):
    g, (lm, _, params, _) = golden(name), load(name)
    inputs = {"token_types": g.token_type_ids} if hasattr(g, "token_type_ids") else None
    where = dict(
        positions=positions(name, g.input_ids, g.attention_mask).astype(np.int32),
        segment_ids=g.attention_mask,
        inputs=inputs,
    )
    hidden = np.asarray(lm.hidden(params, g.input_ids, **where)[0])
    real = g.attention_mask == 1
    assert_close(hidden[real], g.last_hidden_state[real], g.tolerance)


# --- files -------------------------------------------------------------------------------------------------------------


def assert_same(a, b):
    assert a[0] == b[0]
    assert a[1] == b[1]
    assert jax.tree.structure(a[2]) == jax.tree.structure(b[2])
    jax.tree.map(np.testing.assert_array_equal, a[2], b[2])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.exhaustive
def test_older_config_keys_give_the_same(name, tmp_path):
    new, old = (
        huggingface.read_config(copied(tmp_path, name, file))
        for file in ("config.json", "config_v4.json")
    )
    assert new == old


def copied(folder, name, file):
    folder = folder / file
    folder.mkdir()
    (folder / "config.json").write_text((CHECKPOINTS / name / file).read_text())
    return folder


@pytest.mark.parametrize("name", [*LMS, *CLASSIFIERS])
def test_saving_gives_back_every_tensor(name, tmp_path):
    """Bit for bit, under the same names, beside the same config; and what was saved loads as the same."""
    lm, head, params, _ = load(name)
    original = tensors(CHECKPOINTS / name)
    if any(key.endswith(mxfp4.BLOCKS) for key in original):
        # What was packed is written plain.
        found = mxfp4.unpacked(huggingface.find(CHECKPOINTS / name))
        original = {key: stored.read() for key, stored in found.items()}
    if head is None:
        huggingface.save(tmp_path / "a", lm, params, like=CHECKPOINTS / name)
        again = huggingface.load(tmp_path / "a")
        assert_same((again[0], None, again[1]), load(name))
    else:
        huggingface.save(
            tmp_path / "a", lm, params["lm"], like=CHECKPOINTS / name, head=params["head"]
        )
        assert_same(huggingface.load_classifier(tmp_path / "a"), load(name))
    saved, prefix = tensors(tmp_path / "a"), FAMILIES[golden(name).config["model_type"]].prefix
    original = {
        key if key in saved or prefix + key not in saved else prefix + key: x
        for key, x in original.items()
    }
    kept = {key for key in original if key in saved}
    dropped = {key for key in original if key not in saved}
    assert saved.keys() == kept
    assert all(
        key.endswith(("inv_freq", "attn.bias", "masked_bias", "position_ids"))
        or key == "lm_head.weight"
        for key in dropped
    )
    for key in kept:
        wide = original[key].astype(
            saved[key].dtype
        )  # what was stored in half precision was loaded into float32
        assert saved[key].shape == original[key].shape
        assert saved[key].tobytes() == wide.tobytes(), key
    ours, theirs = (
        json.loads((folder / "config.json").read_text())
        for folder in (tmp_path / "a", CHECKPOINTS / name)
    )
    for config in (ours, theirs):
        for field in ("transformers_version", "dtype", "quantization_config"):
            config.pop(field, None)
    assert ours == theirs


def tensors(folder):
    return {
        key: x
        for file in sorted(folder.glob("*.safetensors"))
        for key, x in load_file(file).items()
    }
