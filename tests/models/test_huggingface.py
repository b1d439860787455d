"""Hugging Face folders against what transformers computed from the same files (tests/checkpoints), and back to disk."""

import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf import rollouts
from rlhf.models import DecoderConfig, LayerKind, decoder, huggingface
from rlhf.models.families import FAMILIES

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
GENERATING = ["gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"]
MODELS = [*GENERATING, "qwen2_sliding"]
NEW = 8
IDS = SimpleNamespace(bos_token_id=1, eos_token_id=2, pad_token_id=0, save_pretrained=lambda folder: None)
TINY = DecoderConfig(vocab_size=8, hidden_size=4, num_layers=2, num_heads=1, mlp_size=8)


def meta(name):
    return json.loads((CHECKPOINTS / name / "meta.json").read_text())


@functools.cache
def load(name):
    return huggingface.load(CHECKPOINTS / name)


@functools.cache
def golden(name):
    arrays = SimpleNamespace(**np.load(CHECKPOINTS / name / "golden.npz"))
    arrays.tolerance = meta(name)["facts"]["suggested_absolute_tolerance"]
    arrays.real = arrays.attention_mask == 1
    return arrays


def random_params(config):
    """Parameters without the time that `init` takes to compile."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(x.dtype), jax.eval_shape(decoder(config).init, jax.random.key(0))
    )


def generate(name, eos_ids=()):
    lm, params, _ = load(name)
    prompts = rollouts.Prompts(jnp.asarray(golden(name).gen_input_ids), jnp.asarray(golden(name).gen_attention_mask == 1))
    return rollouts.generate(
        lm, params, prompts, jax.random.key(0), max_new_tokens=NEW, sampler=rollouts.greedy(), eos_ids=eos_ids
    )


@functools.cache
def rollout(name):
    return generate(name)


@functools.partial(jax.jit, static_argnums=0)
def outputs(lm, params, tokens, positions, segment_ids):
    where = dict(positions=positions, segment_ids=segment_ids)
    hidden, _, _ = lm.hidden(params, tokens, **where)
    return hidden, lm.unembed(params, hidden), rollouts.token_logprobs(lm, params, tokens, **where)


@functools.cache
def forward(name):
    """Hidden states, logits and log-probs of the golden rows, the packed row, and the rows that were generated: one program."""
    g, (lm, params, _) = golden(name), load(name)
    blocks = {"rows": (g.input_ids, g.position_ids, g.attention_mask)}
    if hasattr(g, "packed_input_ids"):
        blocks["packed"] = (g.packed_input_ids, g.packed_position_ids, np.cumsum(g.packed_position_ids == 0, axis=1))
    if name in GENERATING:
        blocks["generated"] = (rollout(name).tokens, rollout(name).positions, rollout(name).segment_ids)
    length = max(tokens.shape[1] for tokens, _, _ in blocks.values())
    widen = lambda x: np.pad(x, ((0, 0), (0, length - x.shape[1]))).astype(np.int32)
    whole = outputs(lm, params, *(np.concatenate([widen(x) for x in column]) for column in zip(*blocks.values(), strict=True)))
    results, start = {}, 0
    for block, (tokens, _, _) in blocks.items():
        rows = slice(start, start + tokens.shape[0])
        hidden, logits, logprobs = (np.asarray(x)[rows, : tokens.shape[1]] for x in whole)
        results[block] = SimpleNamespace(hidden=hidden, logits=logits, logprobs=logprobs)
        start = rows.stop
    return results


# --- against transformers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_transformers(name):
    ours, g = forward(name)["rows"], golden(name)
    np.testing.assert_allclose(ours.hidden[g.real], g.last_hidden_state[g.real], rtol=0, atol=g.tolerance)
    np.testing.assert_allclose(ours.logits[g.real], g.logits[g.real], rtol=0, atol=g.tolerance)
    np.testing.assert_allclose(ours.logprobs[:, 1:], g.token_logprobs, rtol=0, atol=g.tolerance)
    assert not ours.logprobs[:, 0].any()


@pytest.mark.parametrize("name", [name for name in MODELS if "packed_logits" in meta(name)["arrays"]])
def test_packed_sequences_are_those_of_transformers_one_by_one(name):
    g = golden(name)
    np.testing.assert_allclose(forward(name)["packed"].logits, g.packed_logits, rtol=0, atol=g.tolerance)


@pytest.mark.parametrize("name", GENERATING)
def test_greedy_tokens_are_those_of_transformers(name):
    g = golden(name)
    np.testing.assert_array_equal(rollout(name).tokens[:, -NEW:], g.gen_new_tokens)
    np.testing.assert_allclose(rollout(name).logprobs[:, -NEW:], g.gen_logprobs, rtol=0, atol=g.tolerance)
    assert not rollout(name).finished.any()


@pytest.mark.parametrize("name", ["gpt2", "llama"])  # learned positions and rotary; the rest is the same code
def test_an_end_token_ends_a_row(name):
    g = golden(name)
    ended = generate(name, eos_ids=(int(g.gen_eos_token_id),))
    np.testing.assert_array_equal(ended.tokens[:, -NEW:], g.gen_eos_new_tokens)
    np.testing.assert_array_equal(ended.finished, (g.gen_eos_new_tokens == g.gen_eos_token_id).any(-1))


@pytest.mark.parametrize("name", GENERATING)
def test_scored_logprobs_are_the_generated_ones(name):
    r = rollout(name)
    scored = np.where(r.mask, forward(name)["generated"].logprobs, 0.0)
    np.testing.assert_allclose(scored, r.logprobs, rtol=0, atol=1e-5)


def test_gemma3_sliding_layers_are_those_of_transformers(tmp_path):
    """The golden model scales its one full layer, which we refuse: the five sliding layers below it are compared."""
    name, layers = "gemma3_text", 5
    with pytest.raises(ValueError, match=r"rotary scaling is not supported: .*'linear'"):
        huggingface.load(CHECKPOINTS / name)
    below = lambda tensor: f"model.layers.{layers}." not in tensor
    tensors = {k: v for k, v in load_file(CHECKPOINTS / name / "model.safetensors").items() if below(k)}
    plain = {
        kind: {"rope_type": "default", "rope_theta": theta}
        for kind, theta in (("full_attention", 1e6), ("sliding_attention", 1e4))
    }
    lm, params, _ = huggingface.load(
        edited(tmp_path, name, tensors, num_hidden_layers=layers, layer_types=None, rope_parameters=plain)
    )
    g = golden(name)
    hidden = outputs(lm, params, g.input_ids, g.position_ids, g.attention_mask)[0]
    x = g.layer_inputs[:, layers]
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * (1 + tensors["model.norm.weight"])
    np.testing.assert_allclose(np.asarray(hidden)[g.real], expected[g.real], rtol=0, atol=g.tolerance)


def test_gemma3_layers_alternate_as_its_config_says(tmp_path):
    folder = edited(tmp_path, "gemma3_text", None, rope_parameters=None, layer_types=None, num_hidden_layers=8)
    sliding, full = LayerKind(5, 10_000.0), LayerKind(None, 1_000_000.0)
    assert huggingface.read_config(folder).kinds == (*[sliding] * 5, full)


# --- files -------------------------------------------------------------------------------------------------------------


def edited(folder, name, tensors=None, file="config.json", **fields):
    """A copy of a checkpoint with other tensors, and other fields in its config."""
    folder = folder / name
    folder.mkdir()
    config = json.loads((CHECKPOINTS / name / file).read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    if tensors is None:
        shutil.copy(CHECKPOINTS / name / "model.safetensors", folder)
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


def assert_same(a, b):
    assert a[0] == b[0]
    assert hash(a[0]) == hash(b[0])
    assert jax.tree.structure(a[1]) == jax.tree.structure(b[1])
    jax.tree.map(np.testing.assert_array_equal, a[1], b[1])


@pytest.mark.parametrize("name", MODELS)
def test_older_config_keys_give_the_same(name, tmp_path):
    assert_same(huggingface.load(edited(tmp_path, name, file="config_v4.json")), load(name))


def test_gemma3_older_config_keys_give_the_same(tmp_path):
    older = dict(file="config_v4.json", rope_scaling=None)
    old = huggingface.read_config(edited(tmp_path, "gemma3_text", **older))
    assert old.kinds == (*[LayerKind(5, 10_000.0)] * 5, LayerKind(None, 1_000_000.0))


@pytest.mark.parametrize("name", MODELS)
def test_saving_gives_back_the_files(name, tmp_path):
    config = huggingface.read_config(CHECKPOINTS / name)
    family = None if name in FAMILIES else "qwen2"
    kept = {} if name == "gpt2" else {"max_position_embeddings": 128}
    huggingface.save(tmp_path / "a", config, load(name)[1], tokenizer=IDS, family=family, **kept)
    for file in ("config.json", "generation_config.json"):
        saved, original = (json.loads((folder / file).read_text()) for folder in (tmp_path / "a", CHECKPOINTS / name))
        assert saved.keys() == original.keys()
        assert {**saved, "transformers_version": 0} == {**original, "transformers_version": 0}
    saved, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "a", CHECKPOINTS / name))
    assert saved.keys() == original.keys()
    assert all(saved[k].dtype == original[k].dtype and saved[k].tobytes() == original[k].tobytes() for k in original)
    assert_same(huggingface.load(tmp_path / "a"), load(name))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_is_saved_as_its_family(family, tmp_path):
    """Every family, with what its config may vary; no other family takes it first."""
    gemma = dict(norm_offset=1.0, embed_scale=2.0, activation="gelu", tied=True)
    two = (LayerKind(3, 50.0), LayerKind(None, 50.0))
    fields = {
        "llama": dict(qkv_bias=True, out_bias=True, mlp_bias=True, head_dim=6, num_layers=1),
        "mistral": dict(kinds=(LayerKind(3),)),
        "qwen2": dict(qkv_bias=True, kinds=two[::-1], num_heads=2, num_kv_heads=1, head_dim=4),
        "qwen3": dict(qk_norm=True, kinds=two, norm_eps=1e-3),
        "gemma": gemma,
        "gemma2": dict(gemma, norm_place="both", kinds=two, attention_softcap=2.0, final_softcap=3.0, attention_scale=1 / 3),
        "gemma3_text": dict(gemma, norm_place="both", qk_norm=True, kinds=(LayerKind(3, 50.0), LayerKind(None, 60.0))),
        "gpt2": dict(
            norm="layer", gated=False, activation="gelu", qkv_bias=True, out_bias=True, mlp_bias=True, max_positions=9
        ),
    }[family]
    config = DecoderConfig(**{**vars(TINY), **fields})
    params = random_params(config)
    huggingface.save(tmp_path / "a", config, params)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["model_type"] == family
    lm, same, _ = huggingface.load(tmp_path / "a")
    assert lm == decoder(config)
    jax.tree.map(np.testing.assert_array_equal, same, params)


@pytest.mark.parametrize(
    ("fields", "family", "message"),
    [
        (dict(norm="layer"), "llama", "a llama model cannot have norm = 'layer' (but 'rms')"),
        (dict(qk_norm=True, out_bias=True), "llama", "qk_norm = True (but False), out_bias = True (but False)"),
        (dict(activation="elu"), "llama", "activation = 'elu' (but 'silu')"),
        (dict(kinds=(LayerKind(3), LayerKind(4))), "qwen3", "qwen3 model cannot have"),
        (dict(attention_scale=0.3), "gemma2", "attention_scale = 0.3"),
        (dict(norm="layer"), None, "no family can express this config; the nearest, llama, cannot have norm = 'layer'"),
        ({}, "t5", "model_type 't5' is not known; known: llama, mistral, "),
    ],
)
def test_saving_refuses_what_the_family_cannot_express(fields, family, message, tmp_path):
    config = DecoderConfig(**{**vars(TINY), **fields})
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below
        huggingface.save(tmp_path / "a", config, random_params(config), family=family)
    assert message in str(error.value)
    assert not (tmp_path / "a").exists()


def test_saving_refuses_a_full_folder_and_other_params(tmp_path):
    params = random_params(TINY)
    huggingface.save(tmp_path, TINY, params)
    with pytest.raises(FileExistsError, match=r"holds a model already \(config\.json\)"):
        huggingface.save(tmp_path, TINY, params)
    other = {**params, "final_norm": jnp.ones(5), "extra": jnp.ones(1)}
    message = r"extra \[1\] but the config has no such leaf; final_norm \[5\] but the config has \[4\]"
    with pytest.raises(ValueError, match=message):
        huggingface.save(tmp_path / "b", TINY, other)


def test_dtypes_of_the_file_and_of_the_params(tmp_path):
    params = random_params(TINY)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    huggingface.save(tmp_path / "a", TINY, half)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "bfloat16"
    lm, wide, _ = huggingface.load(tmp_path / "a", dtype=jnp.bfloat16)
    assert lm == decoder(DecoderConfig(**{**vars(TINY), "dtype": jnp.bfloat16}))
    jax.tree.map(np.testing.assert_array_equal, wide, jax.tree.map(lambda x: x.astype(jnp.float32), half))
    _, same, _ = huggingface.load(tmp_path / "a", param_dtype=jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, same, half)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(same))


def test_several_files(tmp_path):
    folder = edited(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert_same(huggingface.load(folder), load("llama"))
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names files that are not there: model-1\.safetensors"):
        huggingface.load(folder)


def test_names_without_prefix_and_buffers(tmp_path):
    """As the published gpt2 files are."""
    tensors = load_file(CHECKPOINTS / "gpt2" / "model.safetensors")
    bare = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    buffers = {"h.0.attn.bias": np.ones((1, 1, 64, 64), np.uint8), "h.0.attn.masked_bias": np.full((), -1e4, np.float32)}
    assert_same(huggingface.load(edited(tmp_path, "gpt2", {**bare, **buffers})), load("gpt2"))


def test_a_tied_matrix_stored_twice(tmp_path):
    tensors = load_file(CHECKPOINTS / "qwen2" / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    twice = {**tensors, **old, "lm_head.weight": embedding}
    assert_same(huggingface.load(edited(tmp_path, "qwen2", twice)), load("qwen2"))
    (tmp_path / "b").mkdir()
    lm, params, _ = huggingface.load(edited(tmp_path / "b", "qwen2", {**twice, "lm_head.weight": embedding + 1}))
    assert lm != load("qwen2")[0]
    np.testing.assert_array_equal(params["unembedding"], embedding.T + 1)


def test_all_wrong_tensors_are_named_at_once(tmp_path):
    tensors = load_file(CHECKPOINTS / "llama" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["lm_head.weight"]
    tensors["score.weight"] = np.ones((1, 32), np.float32)
    tensors["model.norm.weight"] = np.ones(31, np.float32)
    tensors["model.layers.2.input_layernorm.weight"] = np.ones(32, np.int8)
    with pytest.raises(ValueError, match=r"do not fit its config: ") as error:
        huggingface.load(edited(tmp_path, "llama", tensors))
    for part in (
        "missing: lm_head.weight, model.layers.1.mlp.up_proj.weight;",
        "left over: score.weight;",
        "of another shape: model.norm.weight [31] but the config says [32];",
        "not of floats: model.layers.2.input_layernorm.weight I8",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("llama", dict(model_type="mamba"), "model_type 'mamba' is not known; known: llama, mistral, qwen2, "),
        ("llama", dict(hidden_act="gelu"), "activation 'gelu' is not supported; known: silu, "),
        ("llama", dict(rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}), "'yarn'"),
        ("llama", dict(quantization_config={"quant_method": "fp8"}), "quantised weights (fp8)"),
        ("qwen2", dict(layer_types=["full_attention", "chunked_attention"]), "layer type 'chunked_attention'"),
        ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx = True is not supported"),
        ("gemma", dict(use_bidirectional_attention=True), "use_bidirectional_attention = True is not supported"),
    ],
)
def test_configs_that_we_do_not_compute_are_refused(name, fields, message, tmp_path):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below
        huggingface.load(edited(tmp_path, name, **fields))
    assert message in str(error.value)


def test_a_name_of_the_hub_is_told_apart_from_a_folder():
    with pytest.raises(FileNotFoundError, match=r"has no config\.json; .* hf download"):
        huggingface.load("some/model")


def test_pickles_are_refused_with_the_cure(tmp_path):
    folder = edited(tmp_path, "llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        huggingface.load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"AutoModelForCausalLM\.from_pretrained\(.*\)\.save_pretrained\(new_folder\)"):
        huggingface.load(folder)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_the_tokenizer_is_that_of_its_file(name, tmp_path):
    folder = edited(tmp_path, name)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(CHECKPOINTS / "tokenizer" / file, folder)
    expected = json.loads((CHECKPOINTS / "tokenizer" / "golden.json").read_text())
    _, params, tokenizer = huggingface.load(folder)
    huggingface.save(tmp_path / "a", huggingface.read_config(folder), params, tokenizer=tokenizer)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert [config[f"{token}_token_id"] for token in ("bos", "eos", "pad")] == [1, 2, 0]
    for each in (tokenizer, huggingface.load(tmp_path / "a")[2]):
        assert [each(text["text"])["input_ids"] for text in expected["texts"]] == [text["ids"] for text in expected["texts"]]
        assert each.chat_template == (CHECKPOINTS / "tokenizer" / "chat_template.jinja").read_text()
