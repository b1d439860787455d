"""Hugging Face folders: names, dtypes, shards, ties, meshes; what is written without an original; what is refused."""

import dataclasses
import functools
import json
import re
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_goldens import HOME as CHECKPOINTS
from safetensors.numpy import load_file, save_file

from rlhf.models import LayerKind, Rope, TransformerConfig, huggingface, scalar_head, transformer
from rlhf.models.families import FAMILIES
from rlhf.models.rotary import Dynamic, Yarn
from rlhf.sharding import make_mesh

WRITTEN = [
    "gpt2",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
]  # families that need no original
IDS = SimpleNamespace(
    bos_token_id=1, eos_token_id=2, pad_token_id=0, save_pretrained=lambda folder: None
)
TINY = TransformerConfig(vocab_size=8, hidden_size=4, num_layers=2, num_heads=1, mlp_size=8)


@functools.cache
def load(name):
    return huggingface.load(CHECKPOINTS / name)


def random_params(config):
    """Parameters without the time that `init` takes to compile."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(x.dtype),
        jax.eval_shape(transformer(config).init, jax.random.key(0)),
    )


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


def test_gemma3_layers_alternate_as_its_config_says(tmp_path):
    folder = edited(
        tmp_path, "gemma3_text", None, rope_parameters=None, layer_types=None, num_hidden_layers=8
    )
    sliding, full = LayerKind(5, Rope(10_000.0)), LayerKind(None, Rope(1_000_000.0))
    assert huggingface.read_config(folder).kinds == (*[sliding] * 5, full)


@pytest.mark.parametrize("name", WRITTEN)
def test_saving_without_an_original_gives_back_the_files(name, tmp_path):
    """The config too, key by key, though nothing but ours was there to write it from."""
    lm, params, _ = load(name)
    kept = {} if name == "gpt2" else {"max_position_embeddings": 128}
    huggingface.save(tmp_path / "a", lm, params, tokenizer=IDS, family=name, **kept)
    for file in ("config.json", "generation_config.json"):
        saved, original = (
            json.loads((folder / file).read_text())
            for folder in (tmp_path / "a", CHECKPOINTS / name)
        )
        assert {**saved, "transformers_version": 0} == {**original, "transformers_version": 0}


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.write])
def test_a_config_is_saved_as_its_family(family, tmp_path):
    """Every family, with what its config may vary; no other family takes it first."""
    gemma = dict(norm_offset=1.0, embed_scale=2.0, activation="gelu", tied=True)
    two = (LayerKind(3, Rope(50.0)), LayerKind(None, Rope(50.0)))
    fields = {
        "llama": dict(qkv_bias=True, out_bias=True, mlp_bias=True, head_dim=6, num_layers=1),
        "mistral": dict(kinds=(LayerKind(3),)),
        "qwen2": dict(qkv_bias=True, kinds=two[::-1], num_heads=2, num_kv_heads=1, head_dim=4),
        "qwen3": dict(qk_norm="head", kinds=two, norm_eps=1e-3),
        "gemma": gemma,
        "gemma2": dict(
            gemma,
            norm_place="both",
            kinds=two,
            attention_softcap=2.0,
            final_softcap=3.0,
            attention_scale=1 / 3,
        ),
        "gemma3_text": dict(
            gemma,
            norm_place="both",
            qk_norm="head",
            kinds=(LayerKind(3, Rope(50.0)), LayerKind(None, Rope(60.0))),
        ),
        "gpt2": dict(
            norm="layer",
            gated=False,
            activation="gelu",
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            max_positions=9,
            kinds=(LayerKind(rope=None),),
        ),
    }[family]
    config = TransformerConfig(**{**vars(TINY), **fields})
    params = random_params(config)
    huggingface.save(tmp_path / "a", transformer(config), params)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["model_type"] == family
    lm, same, _ = huggingface.load(tmp_path / "a")
    assert lm == transformer(config)
    jax.tree.map(np.testing.assert_array_equal, same, params)


@pytest.mark.parametrize(
    ("fields", "family", "message"),
    [
        (dict(norm="layer"), "llama", "a llama model cannot have norm = 'layer' (but 'rms')"),
        (
            dict(qk_norm="head", out_bias=True),
            "llama",
            "qk_norm = 'head' (but None), out_bias = True (but False)",
        ),
        (dict(activation="tanh"), "qwen2", "qkv_bias = False (but True)"),
        (dict(kinds=(LayerKind(3), LayerKind(4))), "qwen3", "qwen3 model cannot have"),
        (dict(attention_scale=0.3), "gemma2", "attention_scale = 0.3"),
        (
            dict(norm="layer"),
            None,
            "no family can express this config; the nearest, llama, cannot have norm = 'layer'",
        ),
        ({}, "t6", "model_type 't6' is not known; known: llama, mistral, "),
        ({}, "bloom", "a bloom model is saved beside its original; give like="),
    ],
)
def test_saving_refuses_what_the_family_cannot_express(fields, family, message, tmp_path):
    config = TransformerConfig(**{**vars(TINY), **fields})
    with pytest.raises(ValueError, match=re.escape(message)):
        huggingface.save(tmp_path / "a", transformer(config), random_params(config), family=family)
    assert not (tmp_path / "a").exists()


def test_saving_refuses_a_full_folder_and_other_params(tmp_path):
    params = random_params(TINY)
    huggingface.save(tmp_path, transformer(TINY), params)
    with pytest.raises(FileExistsError, match=r"holds a model already \(config\.json\)"):
        huggingface.save(tmp_path, transformer(TINY), params)
    other = {**params, "final_norm": jnp.ones(5), "extra": jnp.ones(1)}
    message = (
        r"extra \[1\] but the config has no such leaf; final_norm \[5\] but the config has \[4\]"
    )
    with pytest.raises(ValueError, match=message):
        huggingface.save(tmp_path / "b", transformer(TINY), other)


def test_saving_refuses_an_original_of_another_form(tmp_path):
    lm, params, _ = load("llama")
    with pytest.raises(ValueError, match=r"has another config: .*vocab_size = 126 \(but 149\)"):
        huggingface.save(tmp_path / "a", lm, params, like=CHECKPOINTS / "qwen2")


def test_dtypes_of_the_file_and_of_the_params(tmp_path):
    params = random_params(TINY)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    huggingface.save(tmp_path / "a", transformer(TINY), half)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "bfloat16"
    load = lambda **dtypes: huggingface.load(tmp_path / "a", **dtypes)
    lm, same, _ = load(dtype=jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, same, half)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(same))
    master, wide, _ = load(dtype=jnp.bfloat16, param_dtype=jnp.float32)
    jax.tree.map(
        np.testing.assert_array_equal, wide, jax.tree.map(lambda x: x.astype(jnp.float32), half)
    )
    config = TransformerConfig(**{**vars(TINY), "dtype": jnp.bfloat16})
    assert master == transformer(config)
    assert lm == transformer(TransformerConfig(**{**vars(config), "param_dtype": jnp.bfloat16}))


def test_float16_files(tmp_path):
    tensors = {
        name: x.astype(np.float16)
        for name, x in load_file(CHECKPOINTS / "llama" / "model.safetensors").items()
    }
    _, params, _ = huggingface.load(edited(tmp_path, "llama", tensors))
    np.testing.assert_array_equal(
        params["final_norm"], tensors["model.norm.weight"].astype(np.float32)
    )


def test_parameters_are_born_on_a_mesh():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    _, params, _ = huggingface.load(CHECKPOINTS / "llama", mesh=mesh)
    assert tuple(params["layers"]["up"].sharding.spec) == (None, "fsdp", "tensor")
    assert params["layers"]["up"].addressable_shards[0].data.size * 4 == params["layers"]["up"].size
    jax.tree.map(np.testing.assert_array_equal, params, load("llama")[1])


def test_heads_that_a_mesh_does_not_divide_are_told_of():
    message = "tensor = 8 does not divide them"
    with pytest.raises(ValueError, match=rf"attention \[4 heads\]: {message}; take one of 1, 2, 4"):
        huggingface.load(CHECKPOINTS / "llama", mesh=make_mesh(tensor=8))
    told = []
    huggingface.load(CHECKPOINTS / "llama", mesh=make_mesh(tensor=8), say=told.append)
    assert sum(f"{message}: every device computes all" in text for text in told) == 1


def test_many_files_are_written_and_read_back(tmp_path):
    lm, params, _ = load("llama")
    huggingface.save(tmp_path / "a", lm, params, shard_bytes=40_000)
    files = sorted((tmp_path / "a").glob("*.safetensors"))
    assert len(files) > 2
    assert max(file.stat().st_size for file in files) < 44_000
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert (
        index["weight_map"].keys() == load_file(CHECKPOINTS / "llama" / "model.safetensors").keys()
    )
    assert_same(huggingface.load(tmp_path / "a"), load("llama"))


def test_a_new_reward_model_is_written_as_a_classifier(tmp_path):
    """A base model with our own head, as reward modelling makes it."""
    lm, params, _ = load("llama")
    head = {"weight": jnp.arange(32.0), "bias": jnp.zeros(())}
    huggingface.save(tmp_path / "a", lm, params, head=head, like=CHECKPOINTS / "llama")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    again, their_head, same, _ = huggingface.load_classifier(tmp_path / "a")
    assert again == transformer(
        dataclasses.replace(huggingface.read_config(CHECKPOINTS / "llama"), unembeds=False)
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        same["lm"],
        {k: x for k, x in params.items() if k != "unembedding"},
    )
    hidden = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
    scores = scalar_head(32).apply(head, hidden)
    np.testing.assert_allclose(their_head.apply(same["head"], hidden), scores, rtol=1e-6)
    with pytest.raises(
        ValueError, match=r"reward heads have no bias, but this one is 1\.0; subtract it"
    ):
        huggingface.save(
            tmp_path / "b",
            lm,
            params,
            head={**head, "bias": jnp.ones(())},
            like=CHECKPOINTS / "llama",
        )


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
    with pytest.raises(
        FileNotFoundError, match=r"names files that are not there: model-1\.safetensors"
    ):
        huggingface.load(folder)


def test_names_without_prefix_and_buffers(tmp_path):
    """As the published gpt2 files are."""
    tensors = load_file(CHECKPOINTS / "gpt2" / "model.safetensors")
    bare = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    buffers = {
        "h.0.attn.bias": np.ones((1, 1, 64, 64), np.uint8),
        "h.0.attn.masked_bias": np.full((), -1e4, np.float32),
    }
    assert_same(huggingface.load(edited(tmp_path, "gpt2", {**bare, **buffers})), load("gpt2"))


def test_a_tied_matrix_stored_twice(tmp_path):
    tensors = load_file(CHECKPOINTS / "qwen2" / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    twice = {**tensors, **old, "lm_head.weight": embedding}
    assert_same(huggingface.load(edited(tmp_path, "qwen2", twice)), load("qwen2"))
    (tmp_path / "b").mkdir()
    lm, params, _ = huggingface.load(
        edited(tmp_path / "b", "qwen2", {**twice, "lm_head.weight": embedding + 1})
    )
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
        (
            "llama",
            dict(model_type="mamba"),
            "model_type 'mamba' is not known; known: llama, mistral, ",
        ),
        ("llama", dict(hidden_act="mish"), "config.json: hidden_act must be one of silu, "),
        (
            "llama",
            dict(rope_parameters={"rope_type": "proportional", "rope_theta": 1e4}),
            "rotary scaling 'proportional'",
        ),
        ("llama", dict(quantization_config={"quant_method": "fp8"}), "quantised weights (fp8)"),
        (
            "qwen2",
            dict(layer_types=["full_attention", "chunked_attention"]),
            "config.json: layer_types must be a list of which each is one of full_attention",
        ),
        (
            "gpt2",
            dict(scale_attn_by_inverse_layer_idx=True),
            "scale_attn_by_inverse_layer_idx = True is not supported",
        ),
        (
            "gemma",
            dict(use_bidirectional_attention=True),
            "use_bidirectional_attention = True is not supported",
        ),
    ],
)
def test_configs_that_we_do_not_compute_are_refused(name, fields, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        huggingface.load(edited(tmp_path, name, **fields))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_value_head_beside_the_language_model(name, tmp_path):
    """As TRL's value-head models are stored; a model without one gets a new one."""
    lm, head, params, _ = huggingface.load_with_value(CHECKPOINTS / name)
    assert not any(np.asarray(x).any() for x in params["head"].values())
    trained = {"weight": jnp.arange(32.0), "bias": jnp.float32(0.5)}
    huggingface.save(tmp_path / "a", lm, params["lm"], value_head=trained, like=CHECKPOINTS / name)
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    assert tensors["v_head.summary.weight"].shape == (1, 32)
    assert tensors["v_head.summary.bias"].tolist() == [0.5]
    again = huggingface.load_with_value(tmp_path / "a")
    assert again[:2] == (lm, head)
    jax.tree.map(np.testing.assert_array_equal, again[2], {"lm": params["lm"], "head": trained})
    with pytest.raises(
        ValueError, match=r"left over: v_head\.summary\.bias, .*; load_with_value reads"
    ):
        huggingface.load(tmp_path / "a")


@pytest.mark.parametrize(
    ("parameters", "scaling"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, Dynamic(2.0, 128)),
        (
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
            },
            Yarn(4.0, 32, attention_factor=(0.1 * np.log(4.0) + 1) / (0.05 * np.log(4.0) + 1)),
        ),
    ],
)
def test_rotary_scalings_that_no_checkpoint_has(parameters, scaling, tmp_path):
    folder = edited(tmp_path, "llama", rope_parameters={"rope_theta": 1e4, **parameters})
    assert huggingface.read_config(folder).kinds == (LayerKind(rope=Rope(1e4, scaling=scaling)),)


def test_a_name_of_the_hub_is_read_from_its_cache(tmp_path, monkeypatch):
    """As a download leaves it; a name that is not there says how to get it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cache = tmp_path / "models--some--model"
    shutil.copytree(CHECKPOINTS / "llama", cache / "snapshots" / "abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    assert_same(huggingface.load("some/model"), load("llama"))
    with pytest.raises(
        FileNotFoundError, match=r"other/model is no folder, and no name .* hf download"
    ):
        huggingface.load("other/model")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        huggingface.load(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda data: data[:-10],
            r"is corrupt: its header describes \d+ bytes, but it has \d+; download it again",
        ),
        (lambda data: data[:100], r"is not a safetensors file, or is cut off"),
        (lambda data: b"", r"is not a safetensors file, or is cut off"),
        (
            lambda data: data[:8] + b"x" + data[9:],
            r"is not a safetensors file: its header is not JSON",
        ),
        (
            lambda data: data.replace(b'"shape":[32]', b'"shape":[31]', 1),
            r"is corrupt: .* F32 \[31\] in 128 bytes",
        ),
    ],
)
def test_damaged_files_are_refused_before_anything_is_read(damage, message, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "_read", None)
    folder = edited(tmp_path, "llama")
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=message):
        huggingface.load(folder)


def test_a_config_that_ties_nothing_needs_an_output_matrix(tmp_path):
    shutil.copytree(CHECKPOINTS / "gemma", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    untied = {**config, "tie_word_embeddings": False}
    (tmp_path / "a" / "config.json").write_text(json.dumps(untied))
    with pytest.raises(ValueError, match="lm_head.weight; tie_word_embeddings is false, but"):
        huggingface.load(tmp_path / "a")


def test_a_classifier_is_told_from_a_language_model():
    with pytest.raises(
        ValueError, match=r"left over: score\.weight; load_classifier reads models with a head"
    ):
        huggingface.load(CHECKPOINTS / "llama_reward")
    with pytest.raises(ValueError, match=r"missing: score\.weight; left over: lm_head\.weight"):
        huggingface.load_classifier(CHECKPOINTS / "llama")


def test_pickles_are_refused_with_the_cure(tmp_path):
    folder = edited(tmp_path, "llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        huggingface.load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        ValueError,
        match=r"AutoModelForCausalLM\.from_pretrained\(.*\)\.save_pretrained\(new_folder\)",
    ):
        huggingface.load(folder)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_the_tokenizer_is_that_of_its_file(name, tmp_path):
    folder = edited(tmp_path, name)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(CHECKPOINTS / "tokenizer" / file, folder)
    expected = json.loads((CHECKPOINTS / "tokenizer" / "golden.json").read_text())
    lm, params, tokenizer = huggingface.load(folder)
    huggingface.save(tmp_path / "a", lm, params, tokenizer=tokenizer)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert [config[f"{token}_token_id"] for token in ("bos", "eos", "pad")] == [1, 2, 0]
    for each in (tokenizer, huggingface.load(tmp_path / "a")[2]):
        assert [each(text["text"])["input_ids"] for text in expected["texts"]] == [
            text["ids"] for text in expected["texts"]
        ]
        assert each.chat_template == (CHECKPOINTS / "tokenizer" / "chat_template.jinja").read_text()
