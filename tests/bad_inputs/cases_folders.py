"""Models' folders with one thing broken."""

import json
import os
from pathlib import Path

COMMANDS = [  # each case with another
    ["sft", "--dataset", "task:reverse", "--output", "OUT"],
    ["dpo", "--dataset", "task:reverse", "--output", "OUT"],
    ["grpo", "--dataset", "task:reverse", "--output", "OUT"],
    ["eval", "--dataset", "task:reverse"],
]
FIELDS: dict = {  # of config.json: name -> fields, what the line says
    "vocab_zero": ({"vocab_size": 0}, "vocab_size must be a whole number at least 1"),
    "vocab_huge": ({"vocab_size": 10**12}, "vocab_size must be"),
    "vocab_of_no_file": ({"vocab_size": 10**6}, "of another shape: "),
    "hidden_huge": ({"hidden_size": 10**12}, "hidden_size must be"),
    "hidden_text": ({"hidden_size": "16"}, "hidden_size must be a whole number"),
    "hidden_null": ({"hidden_size": None}, "hidden_size must be a whole number"),
    "layers_million": (
        {"num_hidden_layers": 10**6},
        "num_hidden_layers must be a whole number at least 1 and at most 1,000",
    ),
    "layers_thousand": ({"num_hidden_layers": 1000}, "describes 1000 layers (num_hidden_layers)"),
    "layers_negative": ({"num_hidden_layers": -1}, "num_hidden_layers must be"),
    "layers_true": ({"num_hidden_layers": True}, "num_hidden_layers must be"),
    "heads_zero": ({"num_attention_heads": 0}, "num_attention_heads must be"),
    "kv_heads": (
        {"num_key_value_heads": 3},
        "num_key_value_heads 3 does not divide num_attention_heads 2",
    ),
    "head_dim_odd": ({"head_dim": 3}, "they turn in pairs"),
    "theta_negative": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": -1}},
        "rope_theta must be a number above 1",
    ),
    "theta_nan": (
        {"rope_parameters": {"rope_theta": float("nan")}},
        "rope_parameters.rope_theta must be finite, but is nan",
    ),
    "rope_text": ({"rope_parameters": "linear"}, "rope_parameters must be an object or null"),
    "rope_lacks": (
        {"rope_parameters": {"rope_type": "llama3"}},
        "lacks factor, low_freq_factor, high_freq_factor",
    ),
    "rope_unknown": (
        {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
        "'spiral' (rope_type) is not supported",
    ),
    "eps_negative": ({"rms_norm_eps": -1e-6}, "rms_norm_eps must be a number above 0"),
    "tied_text": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
    "activation": ({"hidden_act": "mish"}, "hidden_act must be one of silu"),
    "positions": ({"max_position_embeddings": -5}, "max_position_embeddings must be"),
    "end_beyond": ({"eos_token_id": 10**6}, "eos_token_id is 1000000, but the model has"),
    "dtype": ({"dtype": "float7"}, "dtype must be one of float32"),
    "family_missing": ({"model_type": None}, "model_type None is not known"),
    "family_list": ({"model_type": [1]}, "model_type [1] is not known"),
    "quantised": ({"quantization_config": [1]}, "quantised weights"),
    "gpt_neo": (
        {"model_type": "gpt_neo", "attention_types": [[["global"], 10**12]]},
        "attention_types must be a list",
    ),
    "method": ({"to_dict": 5}, "'to_dict' is no field of a config"),
    "labels": ({"num_labels": 10**12}, "num_labels must be"),
}
FILES = {  # name -> file, its bytes, what the line says
    "config_empty": ("config.json", b"", "config.json is not JSON"),
    "config_list": ("config.json", b"[]", "config.json must be an object"),
    "config_deep": ("config.json", b"[" * 10**6, "config.json is nested too deep"),
    "config_binary": ("config.json", b"\x80\xff", "config.json is not text in UTF-8"),
    "config_digits": ("config.json", b'{"a": ' + b"9" * 6000 + b"}", "config.json is not JSON"),
    "config_twice": ("config.json", b'{"a": 1, "a": 1}', "'a' is there twice"),
    "generation_text": ("generation_config.json", b"hello", "generation_config.json is not JSON"),
    "generation_end": (
        "generation_config.json",
        b'{"eos_token_id": [1, 99999]}',
        "eos_token_id is 99999, but the model has",
    ),
    "generation_kind": (
        "generation_config.json",
        b'{"eos_token_id": "</s>"}',
        "eos_token_id must be a whole number",
    ),
    "weights_empty": ("model.safetensors", b"", "is not a safetensors file, or is cut off"),
    "weights_length": (
        "model.safetensors",
        (2**60).to_bytes(8, "little") + b"{}",
        "is not a safetensors file, or is cut off",
    ),
    "weights_lfs": (
        "model.safetensors",
        b"version https://git-lfs.github.com/spec/v1\n",
        "is a pointer of Git LFS",
    ),
    "weights_pickle": ("model.safetensors", b"PK\3\4" + b"0" * 100, "is a pickle that torch wrote"),
    "tokenizer_empty": ("tokenizer.json", b"", "tokenizer.json is not JSON"),
    "tokenizer_object": ("tokenizer.json", b"{}", "no tokenizer can be made of tokenizer.json"),
    "tokenizer_version": (
        "tokenizer.json",
        b'{"version": "9.0"}',
        "no tokenizer can be made of tokenizer.json",
    ),
    "tokenizer_lfs": (
        "tokenizer.json",
        b"version https://git-lfs.github.com/spec/v1\n",
        "is a pointer of Git LFS",
    ),
    "tokenizer_config": ("tokenizer_config.json", b"{", "tokenizer_config.json is not JSON"),
    "tokenizer_token": (
        "tokenizer_config.json",
        b'{"eos_token": 5}',
        "eos_token must be text or an object",
    ),
    "tokenizer_map": ("special_tokens_map.json", b"{", "special_tokens_map.json is not JSON"),
    "template_binary": (
        "chat_template.jinja",
        b"\x80\xff",
        "chat_template.jinja is not text in UTF-8",
    ),
}
LACKING = {  # name -> the file that is missing, the one in its place, what the line says
    "no_config": ("config.json", ("adapter_config.json", "{}"), "it holds an adapter alone"),
    "no_weights": (
        "model.safetensors",
        ("notes.txt", ""),
        "has no model.safetensors and no model.safetensors.index.json",
    ),
    "pickle": (
        "model.safetensors",
        ("pytorch_model.bin", ""),
        "pickled weights (pytorch_model.bin)",
    ),
    "index_elsewhere": (
        "model.safetensors",
        ("model.safetensors.index.json", '{"weight_map": {"a": "../../etc/passwd"}}'),
        "'../../etc/passwd', which is not a file of this folder",
    ),
    "index_missing": (
        "model.safetensors",
        ("model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}'),
        "names files that are not there: b.safetensors",
    ),
    "index_list": (
        "model.safetensors",
        ("model.safetensors.index.json", "[]"),
        "must be an object",
    ),
    "vocabulary": (
        "tokenizer.json",
        ("vocab.json", '{"a": 0}'),
        "no tokenizer can be made of vocab.json",
    ),
}
PATHS = [
    ("a_file", "TMP/a_file", "is a file, but a model is a folder"),
    ("a_loop", "TMP/a_loop", "is a link to nothing"),
    ("nothing", "TMP/nothing", "has no config.json"),
    ("long", "x" * 5000, "is no folder, and no name"),
]
TOLD = {name: case[-1] for cases in (FIELDS, FILES, LACKING) for name, case in cases.items()}
CASES = [
    *(
        (name, [*COMMANDS[i % len(COMMANDS)], "--model", f"TMP/{name}"], TOLD[name])
        for i, name in enumerate(TOLD)
    ),
    *((name, [*COMMANDS[0], "--model", path], message) for name, path, message in PATHS),
]


def prepare(tmp: Path, base: str) -> None:
    """A folder for each case: links to the files of `base`, but for the broken one."""
    config = json.loads((Path(base) / "config.json").read_text())
    for name, (fields, _) in FIELDS.items():
        linked(tmp / name, base, "config.json", json.dumps({**config, **fields}).encode())
    for name, (file, content, _) in FILES.items():
        linked(tmp / name, base, file, content)
    for name, (file, (other, text), _) in LACKING.items():
        linked(tmp / name, base, file, None)
        (tmp / name / other).write_text(text)
    (tmp / "a_file").write_text("")
    (tmp / "a_loop").symlink_to(tmp / "a_loop")
    (tmp / "nothing").mkdir()


def linked(folder: Path, base: str, file: str, content: bytes | None) -> None:
    folder.mkdir()
    for other in Path(base).iterdir():
        if other.name != file:
            os.link(other, folder / other.name)
    if content is not None:
        (folder / file).write_bytes(content)
