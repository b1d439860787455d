"""Folders that cannot be: every field, every file, one line that names them, at once and before any array is made."""

import functools
import json
import math
import os
import random
import shutil
import time

import numpy as np
import pytest
from checkpoint_goldens import HOME as CHECKPOINTS
from safetensors.numpy import load_file, save_file

from rlhf.models import huggingface, mapping, tokenizer_files
from rlhf.models import huggingface_config as configs
from rlhf.models.families import FAMILIES, schema
from rlhf.models.families.llama import COMMON

VALUES: list = [None, "text", -1, 0, 1e300, math.nan, [], {}, True, 10**12, 10**6]
SECONDS = (
    20.0  # of the processor, for any one of them; a machine may be slow, what hangs never ends
)
LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "high_freq_factor": 1.0}
REFUSED = (ValueError, FileNotFoundError)
BASE = CHECKPOINTS / "llama"


@pytest.fixture(scope="module", autouse=True)
def imported():
    """What the first call imports is not of its time."""
    huggingface.read_config(BASE)
    huggingface.load_tokenizer(CHECKPOINTS / "tokenizer")


def family_folders():
    """The first checkpoint of each family."""
    folders = sorted(CHECKPOINTS.glob("*/config.json"))
    by_family = {
        json.loads(file.read_text())["model_type"]: file.parent for file in reversed(folders)
    }
    return [
        pytest.param(folder, id=name)
        for name, folder in sorted(by_family.items())
        if name in FAMILIES
    ]


def copied(folder, to=None):
    to.mkdir()
    for file in folder.iterdir():
        if file.suffix in (".json", ".safetensors", ".jinja") and file.name not in (
            "golden.json",
            "meta.json",
        ):
            shutil.copy(file, to)
    return to


def whole_folder(to):
    """A model with everything beside it."""
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(CHECKPOINTS / "tokenizer" / file, copied(BASE, to) if not to.exists() else to)
    return to


def changes(raw):
    """Every field, and every entry of an object in it, with every value."""
    for field, own in raw.items():
        for value in VALUES:
            yield field, own, value, {**raw, field: value}
        for inner, below in own.items() if isinstance(own, dict) else ():
            for value in VALUES:
                yield f"{field}.{inner}", below, value, {**raw, field: {**own, inner: value}}


def may_be(own, value):
    """Whether another value of a field can be read at all: of its kind, finite, and not negative."""
    if value is None or value == {} or value == []:
        return True  # as if it were not there, where that has a meaning
    if isinstance(own, bool):
        return isinstance(value, bool)
    if own is None or isinstance(own, int | float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and math.isfinite(value) and 0 <= value < 1e300
    return False


def told(call, *names):
    """What a call says that must refuse, or None where it does not; one line with the names, in time."""
    start = time.process_time()
    try:
        call()
    except REFUSED as error:
        message = " ".join(str(error).split())
        assert all(name in message for name in names), message
        assert len(message) < 2500, message
        return message
    finally:
        assert time.process_time() - start < SECONDS
    return None


tested: set[str] = set()  # fields that nobody reads need one family


@pytest.mark.parametrize("folder", family_folders())
def test_every_field_with_every_value_is_read_or_refused(folder, tmp_path):
    """What has a kind and range by its name; what nobody reads changes nothing."""
    raw = json.loads((folder / "config.json").read_text())
    own_config = huggingface.read_config(folder)
    hints = {**schema.ROPE, **schema.FIELDS, **schema.OF_FAMILY.get(raw["model_type"], {})}
    done = tested - hints.keys()
    for field, own, value, changed in changes(raw):
        last = field.split(".")[-1]
        if last in done:
            continue
        tested.add(last)
        (tmp_path / "config.json").write_text(json.dumps(changed))
        wrong = last in hints and schema._problem(hints[last], value)
        refused = told(
            functools.partial(huggingface.read_config, tmp_path),
            "config.json",
            *([last] if wrong else []),
        )
        assert refused or not wrong, f"{field} = {value!r}"
        if refused is None and not may_be(own, value):
            assert huggingface.read_config(tmp_path) == own_config, f"{field} = {value!r}"


def test_sizes_that_the_files_do_not_have_are_refused_before_any_array(tmp_path, monkeypatch):
    """A thousand layers, a million of anything: by the tensors' shapes, and with the first names alone."""
    monkeypatch.setattr(mapping, "read", lambda *_: pytest.fail("a tensor was read"))
    folder = copied(BASE, tmp_path / "a")
    raw = json.loads((folder / "config.json").read_text())
    huggingface.read_config(folder)
    for changed in (
        dict(num_hidden_layers=1000),
        dict(num_hidden_layers=24),
        dict(num_hidden_layers=1),
        dict(vocab_size=10**7),
        dict(hidden_size=10**6, intermediate_size=10**7),
        dict(num_attention_heads=4096, head_dim=10**6, num_key_value_heads=1),
    ):
        (folder / "config.json").write_text(json.dumps({**raw, **changed}))
        assert told(lambda: huggingface.load(folder), str(folder))
    folder = copied(CHECKPOINTS / "mixtral", tmp_path / "b")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**raw, "num_local_experts": 4096, "num_hidden_layers": 1000})
    )
    assert told(
        lambda: huggingface.load(folder),
        "1000 layers",
        "4096 experts",
        "at least 4,096,000 tensors",
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            dict(num_hidden_layers=10**6),
            "num_hidden_layers must be a whole number at least 1 and at most 1,000",
        ),
        (
            dict(num_key_value_heads=3),
            "num_key_value_heads 3 does not divide num_attention_heads 4",
        ),
        (
            dict(num_attention_heads=3, head_dim=None),
            "hidden size (32) is not a multiple of the number of attention heads (3)",
        ),
        (dict(head_dim=7), "head_dim"),
        (
            dict(rope_parameters={"rope_type": "linear", "rope_theta": 1e4}),
            "rope_type 'linear' lacks factor",
        ),
        (
            dict(rope_parameters={"rope_type": "yarn", "factor": -4}),
            "rope_parameters.factor must be a number at least 1",
        ),
        (
            dict(
                rope_parameters={
                    "rope_type": "llama3",
                    "factor": 2.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 1.0,
                }
            ),
            "high_freq",
        ),
        (dict(rope_parameters="linear"), "rope_parameters must be an object or null"),
        (dict(rope_scaling=[2]), "rope_scaling must be an object or null"),
        (dict(eos_token_id=126), "eos_token_id is 126, but the model has 126 tokens (vocab_size)"),
        (dict(eos_token_id=[2, 999]), "eos_token_id is 999"),
        (dict(pad_token_id=-2), "pad_token_id must be a whole number at least -1"),
        (dict(dtype="float7"), "dtype must be one of float32, bfloat16"),
        (dict(torch_dtype=16), "torch_dtype must be one of"),
        (dict(quantization_config=5), "quantised weights (5)"),
        (dict(architectures="Llama"), "architectures must be a list"),
        (dict(id2label={}), "id2label must have an entry"),
        (dict(id2label={"a": "b"}), "id2label must have an entry"),
        (dict(num_labels=10**12), "num_labels must be"),
        (dict(save_pretrained=1), "'save_pretrained' is no field"),
        (dict(per_layer_config={}), "'per_layer_config' is no field"),
        (dict(model_type=None), "model_type None is not known; known: llama"),
        (dict(model_type=["llama"]), "model_type ['llama'] is not known"),
        (dict(use_cache={"a": {"b": [math.inf]}}), "use_cache.a.b.0 must be finite, but is inf"),
    ],
)
def test_what_must_fit_is_told_with_both_sides(fields, message, tmp_path):
    folder = copied(BASE, tmp_path / "a")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **fields}))
    assert told(lambda: huggingface.read_config(folder), str(folder), message)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (
            "qwen2_sliding",
            dict(layer_types=["full_attention"]),
            "layer_types has 1 entries, but there are 3 layers",
        ),
        (
            "qwen2_sliding",
            dict(sliding_window=None),
            "layer_types has 'sliding_attention', but sliding_window is null",
        ),
        ("gpt_neo", dict(attention_types=[[["global"], 10**12]]), "attention_types must be a list"),
        (
            "gpt_neo",
            dict(attention_types=[[["global"], 3]]),
            "attention_types gives 3 layers, but num_layers is 4",
        ),
        ("gpt_neo", dict(attention_layers=["local"]), "attention_layers has 1 entries"),
        ("gptj", dict(rotary_dim=7), "7 entries of a head of 16 turn (rotary_dim"),
        ("gptj", dict(rotary_dim=64), "64 entries of a head of 16 turn (rotary_dim"),
        ("t5", dict(relative_attention_num_buckets=2), "relative_attention_num_buckets must be"),
        (
            "t5",
            dict(relative_attention_max_distance=4),
            "relative_attention_max_distance 4 must be above half",
        ),
        ("t5", dict(feed_forward_proj="gated-mish"), "feed_forward_proj must be one of"),
        ("roberta_classifier", dict(pad_token_id=None), "pad_token_id must be a whole number"),
        (
            "roberta_classifier",
            dict(pad_token_id=50),
            "max_position_embeddings 40 leaves no position",
        ),
        ("qwen3_moe", dict(num_experts_per_tok=7), "num_experts_per_tok 7 of 6 experts"),
        ("qwen3_moe", dict(decoder_sparse_step=0), "decoder_sparse_step must be"),
        (
            "smollm3",
            dict(no_rope_layers=[1]),
            "no_rope_layers has 1 entries, but there are 4 layers",
        ),
        (
            "phi3_longrope",
            dict(original_max_position_embeddings=1),
            "original_max_position_embeddings must be",
        ),
        (
            "bart",
            dict(encoder_attention_heads=5),
            "encoder_attention_heads 5 does not divide d_model 32",
        ),
        ("gpt2", dict(n_head=5), "n_head 5 does not divide n_embd 32"),
    ],
)
def test_what_a_family_has_of_its_own(name, fields, message, tmp_path):
    folder = copied(CHECKPOINTS / name, tmp_path / "a")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **fields}))
    assert told(lambda: huggingface.read_config(folder), "config.json", message)


NO_JSON = {
    "empty": b"",
    "cut": b'{"model_type": "llama", "hidden',
    "list": b"[]",
    "null": b"null",
    "binary": b"\x80\x03\xff\xfe",
    "utf16": '{"a": 1}'.encode("utf-16"),
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "deep and whole": b'{"a":' + b"[" * 500 + b"]" * 500 + b"}",
    "digits": b'{"vocab_size": ' + b"9" * 5000 + b"}",
    "twice": b'{"a": 1, "a": 2}',
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
}


@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
)
@pytest.mark.parametrize("kind", NO_JSON)
def test_what_is_no_json_is_told_with_its_file(kind, file, tmp_path):
    folder = whole_folder(tmp_path / "a")
    (folder / file).write_bytes(NO_JSON[kind])
    assert told(lambda: (huggingface.load_tokenizer(folder), huggingface._found(folder, {})), file)


@pytest.mark.parametrize(
    "field", ["eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id"]
)
def test_generation_config_names_ids_of_the_vocabulary(field, tmp_path):
    folder = whole_folder(tmp_path / "a")
    tokenizer = huggingface.load_tokenizer(folder)
    for value in ("</s>", 1.5, [None], {"a": 1}, True, -7, 126, 10**12, [2, 126]):
        (folder / "generation_config.json").write_text(json.dumps({field: value}))
        assert told(lambda: huggingface.end_ids(folder, tokenizer), "generation_config.json", field)
        assert told(lambda: huggingface.load(folder), "generation_config.json", field)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 125]}))
    assert huggingface.end_ids(folder, tokenizer) == (2, 5, 125)


def header_of(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(change):
    def damage(data):
        header, values = header_of(data)
        text = json.dumps(change(header)).encode()
        return len(text).to_bytes(8, "little") + text + values

    return damage


FIRST = "lm_head.weight"
DAMAGES = {
    "absurd length": lambda data: (2**60).to_bytes(8, "little") + data[8:],
    "no header": lambda data: (0).to_bytes(8, "little") + data[8:],
    "seven bytes": lambda data: data[:7],
    "pickle": lambda data: b"PK\3\4" + data,
    "lfs": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4\n",
    "overlap": with_header(
        lambda h: {**h, "model.norm.weight": {**h["model.norm.weight"], "data_offsets": [0, 128]}}
    ),
    "negative": with_header(lambda h: {**h, FIRST: {**h[FIRST], "data_offsets": [-4, 16124]}}),
    "backwards": with_header(lambda h: {**h, FIRST: {**h[FIRST], "data_offsets": [16128, 0]}}),
    "huge shape": with_header(lambda h: {**h, FIRST: {**h[FIRST], "shape": [2**62, 2**62]}}),
    "many axes": with_header(lambda h: {**h, FIRST: {**h[FIRST], "shape": [2**59] * 1000}}),
    "text shape": with_header(lambda h: {**h, FIRST: {**h[FIRST], "shape": "[126, 32]"}}),
    "boolean shape": with_header(lambda h: {**h, FIRST: {**h[FIRST], "shape": [True, 32]}}),
    "no dtype": with_header(lambda h: {**h, FIRST: {"shape": [1], "data_offsets": [0, 4]}}),
    "unknown dtype": with_header(lambda h: {**h, FIRST: {**h[FIRST], "dtype": "F8_E4M3"}}),
    "not an object": with_header(lambda h: {**h, FIRST: [1, 2]}),
    "a list": with_header(lambda h: [h]),
    "deep": with_header(lambda h: {**h, FIRST: json.loads("[" * 200 + "]" * 200)}),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_weights_that_cannot_be(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(mapping, "read", lambda *_: pytest.fail("a tensor was read"))
    folder = copied(BASE, tmp_path / "a")
    file = folder / "model.safetensors"
    file.write_bytes(DAMAGES[kind](file.read_bytes()))
    assert told(lambda: huggingface.load(folder), str(folder))


@pytest.mark.parametrize("kind", ["unknown dtype", "huge shape"])
def test_weights_that_cannot_be_of_a_tied_model(kind, tmp_path):
    """Whose two matrices are compared before the rest is checked."""
    folder = copied(CHECKPOINTS / "qwen2", tmp_path / "a")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {**tensors, FIRST: tensors["model.embed_tokens.weight"]}, folder / "model.safetensors"
    )
    file = folder / "model.safetensors"
    file.write_bytes(DAMAGES[kind](file.read_bytes()))
    assert told(lambda: huggingface.load(folder), str(folder))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            {"weight_map": {"a": "../../etc/passwd"}},
            "weight_map names '../../etc/passwd', which is not a file of this folder",
        ),
        ({"weight_map": {"a": "/etc/passwd"}}, "'/etc/passwd', which is not a file of this folder"),
        ({"weight_map": {"a": ".."}}, "'..', which is not a file"),
        ({"weight_map": {"a": "a\0b"}}, "which is not a file"),
        (
            {"weight_map": {"a": "model-1.safetensors"}},
            "names files that are not there: model-1.safetensors",
        ),
        ({"weight_map": {"a": 5}}, "weight_map must be an object"),
        ({"weight_map": []}, "weight_map must be an object"),
        ({}, "weight_map must be an object"),
        ([], "must be an object"),
    ],
)
def test_an_index_names_files_of_its_folder(index, message, tmp_path):
    folder = copied(BASE, tmp_path / "a")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert told(lambda: huggingface.load(folder), str(folder), message)


def test_paths_that_are_no_folder(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "file").write_text("")
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for path, message in {
        tmp_path / "file": "is a file, but a model is a folder",
        tmp_path / "loop": "is a link to nothing",
        tmp_path / "empty": "has no config.json",
        tmp_path / "adapter": "it holds an adapter alone",
        "x" * 5000: "is no folder, and no name",
        "a\0b": "is no folder, and no name",
        "name-not-there": "hf download NAME --local-dir FOLDER",
        "a/b/c/d": "is no folder, and no name",
    }.items():
        assert told(lambda path=path: huggingface.load(path), message)
    for file in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        folder = whole_folder(tmp_path / f"a-{file}")
        (folder / file).unlink()
        (folder / file).mkdir()
        assert told(
            lambda folder=folder: (huggingface._tokenizer(folder), huggingface.load(folder)), file
        )


@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
)
def test_flipped_and_cut_files_are_read_or_refused(file, tmp_path, monkeypatch):
    """Whatever a bad disk or download leaves: no other exception, and no hang."""
    monkeypatch.setattr(mapping, "read", lambda *_: {})
    folder = whole_folder(tmp_path / "a")
    data, rng = (folder / file).read_bytes(), random.Random(file)
    until = 4000 if file == "model.safetensors" else len(data)  # of its header
    refused = 0
    for number in range(60):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 1, 4])):
            damaged[rng.randrange(until)] = (
                rng.randrange(256) if number % 2 else rng.randrange(32, 127)
            )
        (folder / file).write_bytes(damaged if number % 5 else data[: rng.randrange(len(data))])
        call = (
            huggingface.load_tokenizer
            if file == "tokenizer.json"
            else functools.partial(huggingface._found, fields={})
        )
        refused += told(lambda call=call: call(folder), str(folder)) is not None
    assert refused > 10


# --- tokenizers --------------------------------------------------------------------------------------------------------


def letters():
    """GPT-2's names of the bytes."""
    kept = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    return [chr(byte) for byte in kept] + [chr(256 + i) for i in range(256 - len(kept))]


def older_files(folder, kind):
    """The files that tokenizers had before tokenizer.json."""
    special = ["<s>", "</s>", "<pad>", "<unk>", "<mask>", "<|endoftext|>"]
    if kind == "vocab.txt":
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "wor", "##ld", "!"]
        (folder / "vocab.txt").write_text("\n".join(words) + "\n")
        return
    entries = [*special, *letters(), "he", "ll", "hell", "hello", "Ġw"]
    (folder / "vocab.json").write_text(json.dumps({entry: i for i, entry in enumerate(entries)}))
    (folder / "merges.txt").write_text("#version: 0.2\nh e\nl l\nhe ll\nhell o\nĠ w\n")


@pytest.mark.parametrize(
    ("name", "kind", "config"),
    [
        ("gpt2", "vocab.json", None),
        ("qwen2", "vocab.json", None),
        ("roberta_classifier", "vocab.json", None),
        (
            "opt",
            "vocab.json",
            {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>", "add_bos_token": True},
        ),
        (
            "llama",
            "vocab.json",
            {
                "tokenizer_class": "GPT2Tokenizer",
                "chat_template": [{"name": "default", "template": "x"}],
            },
        ),
        ("bert_classifier_1", "vocab.txt", None),
        ("distilbert_classifier", "vocab.txt", {"do_lower_case": False}),
    ],
)
def test_a_tokenizer_of_older_files_is_transformers_own(name, kind, config, tmp_path):
    from transformers import AutoTokenizer

    shutil.copy(CHECKPOINTS / name / "config.json", tmp_path)
    older_files(tmp_path, kind)
    if config:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = huggingface.load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(ours) is type(theirs)
    for text in ("hello world!", "Hello  wörld\n", "<s>hello</s><mask>", "[CLS] hello", ""):
        assert ours(text).input_ids == theirs(text).input_ids
    assert len(ours("hello world!").input_ids) > 2
    assert (ours.eos_token_id, ours.chat_template) == (theirs.eos_token_id, theirs.chat_template)


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("gpt2", {"vocab.json": "{}"}, "no tokenizer can be made of vocab.json"),
        ("gpt2", {"merges.txt": "a b"}, "no tokenizer can be made of merges.txt"),
        (
            "gpt2",
            {"vocab.txt": "a\nb\n"},
            "reads other files; tokenizer_class in tokenizer_config.json names the class",
        ),
        ("bert_classifier_1", {"vocab.json": '{"a": 0}', "merges.txt": ""}, "reads other files"),
        (
            "llama",
            {"vocab.json": '{"a": 0}', "merges.txt": ""},
            "no tokenizer can be made of vocab.json, merges.txt",
        ),
        ("gpt2", {"vocab.json": "{", "merges.txt": ""}, "vocab.json is not JSON"),
        ("llama", {"tokenizer.model": "xyz"}, "pip install sentencepiece tiktoken protobuf"),
        ("llama", {"tokenizer.json": "{}"}, "no tokenizer can be made of tokenizer.json"),
        (
            "llama",
            {"tokenizer.json": '{"version": "9.0"}'},
            "no tokenizer can be made of tokenizer.json",
        ),
    ],
)
def test_tokenizers_that_cannot_be_made(name, files, message, tmp_path):
    shutil.copy(CHECKPOINTS / name / "config.json", tmp_path)
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        huggingface.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("eos_token", 5),
        ("eos_token", {"a": 1}),
        ("padding_side", "up"),
        ("model_max_length", "x"),
        ("model_max_length", -1),
        ("chat_template", 5),
        ("chat_template", [1]),
        ("chat_template", [{"name": "a", "template": 5}]),
        ("added_tokens_decoder", []),
        ("added_tokens_decoder", {"x": {"content": "y"}}),
        ("added_tokens_decoder", {"1": 5}),
        ("extra_special_tokens", 5),
        ("tokenizer_class", 5),
        ("add_bos_token", "yes"),
    ],
)
def test_fields_of_a_tokenizer_s_config(field, value, tmp_path):
    folder = whole_folder(tmp_path / "a")
    raw = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**raw, field: value}))
    assert told(lambda: huggingface.load_tokenizer(folder), "tokenizer_config.json", field)


def test_files_beside_the_vocabulary_are_small(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_files, "SMALL", 100)
    folder = whole_folder(tmp_path / "a")
    assert told(
        lambda: huggingface.load_tokenizer(folder), "has 405 bytes, but such a file has at most 100"
    )


def test_the_schema_knows_every_field_that_families_read():
    """What a family's `read` looks up has a kind and range, or what it may be is listed in `only`."""
    from transformers import AutoConfig

    for name, family in FAMILIES.items():
        # DeepSeek V2's class says no number by itself.
        needed = {"num_experts_per_tok": 6} if name == "deepseek_v2" else {}
        hf, seen = AutoConfig.for_model(name, **needed), set()
        if name in configs.OF_LAYERS:
            setattr(hf, configs.OF_MODEL, True)

        class Watched:
            def __getattr__(self, field, hf=hf, seen=seen):
                value = getattr(hf, field)
                seen.add(hf.attribute_map.get(field, field))
                return value

            @property
            def __dict__(self, hf=hf, seen=seen):
                seen.update(vars(hf).keys() & COMMON.values())
                return vars(hf)

        family.read(Watched())
        assert seen <= schema.FIELDS.keys() | family.only.keys(), name


def test_listed_names_of_problems_are_few(tmp_path):
    folder = copied(BASE, tmp_path / "a")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {**tensors, **{f"extra.{i}": np.ones(1, np.float32) for i in range(500)}},
        folder / "model.safetensors",
    )
    assert told(lambda: huggingface.load(folder), "left over: extra.0, extra.1, ", "… and 480 more")
