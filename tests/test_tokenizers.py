"""Tokenizers of every make: what a token adds to a text, tokens that stand once, and letters that no token has."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from rlhf import data, rollouts
from rlhf.rollouts import stopping, text
from rlhf.tasks import reverse, reviews

CHECKPOINTS = Path(__file__).parent / "checkpoints"
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
MARKED = [f"<0x{byte:02X}>" for byte in range(256)]
SPACED = ["▁", "▁the", "a", "b", "the", "▁a", ".", "▁▁", "é", "你"]
LLAMA = [
    decoders.Replace("▁", " "),
    decoders.ByteFallback(),
    decoders.Fuse(),
    decoders.Strip(" ", 1, 0),
]


def fast(model, decoder=None, pre=None, **names) -> PreTrainedTokenizerFast:
    inner = Tokenizer(model)
    if decoder is not None:
        inner.decoder = decoder
    if pre is not None:
        inner.pre_tokenizer = pre
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, clean_up_tokenization_spaces=False, **names
    )


def numbered(*pieces) -> dict[str, int]:
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}


def bytewise(letters=LETTERS, merges=(), **names):
    vocabulary = numbered(*letters, *("".join(merge) for merge in merges))
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return fast(models.BPE(vocabulary, list(merges)), decoders.ByteLevel(), pre, **names)


def with_added(tokenizer):
    """Tokens of every kind beside those of the model."""
    tokenizer.add_tokens(["<think>", " lead", "éx", "<0x41>", "Ġ"])
    tokenizer.add_tokens(
        [
            AddedToken("<l>", lstrip=True),
            AddedToken("<r>", rstrip=True),
            AddedToken("<|im_end|>", special=True),
        ]
    )
    return tokenizer


def with_gaps():
    return fast(
        models.WordLevel({"<unk>": 0, "a": 3, "b": 7}, unk_token="<unk>"),
        decoders.Fuse(),
        unk_token="<unk>",
    )


def spaced(decoder):
    model = models.BPE(
        numbered("<unk>", "<s>", "</s>", *MARKED, *SPACED),
        [],
        unk_token="<unk>",
        byte_fallback=True,
    )
    return with_added(fast(model, decoder, bos_token="<s>", eos_token="</s>", unk_token="<unk>"))


def of_words(**knobs):
    pieces = numbered("[UNK]", "the", "##ing", "go", "don", "##t", "é")
    return fast(
        models.WordPiece(pieces, unk_token="[UNK]"), decoders.WordPiece(**knobs), unk_token="[UNK]"
    )


SAVED = {file.parent.name: str(file) for file in CHECKPOINTS.glob("*/tokenizer.json")}
UNIGRAM = models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("a", -2.0), ("▁a", -2.0)], 0, False)
TOKENIZERS = {
    **{name: partial(PreTrainedTokenizerFast, tokenizer_file=file) for name, file in SAVED.items()},
    "reverse": lambda: reverse.task().tokenizer(),
    "reviews": reviews.tokenizer,
    "bytewise": lambda: with_added(bytewise(merges=[("Ġ", "t"), ("Ã", "©"), ("a", "b")], eos_token="</s>")),
    "llama": lambda: spaced(decoders.Sequence(LLAMA)),
    "gemma": lambda: spaced(decoders.Sequence(LLAMA[:3])),
    "metaspace": lambda: spaced(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])),
    "unigram": lambda: fast(UNIGRAM, decoders.Metaspace()),
    "wordpiece": lambda: of_words(cleanup=False),
    "gaps": with_gaps,
    "plain": lambda: fast(models.WordLevel(numbered("<unk>", "a", "b"), unk_token="<unk>"), unk_token="<unk>"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_bytes_of_tokens_are_those_that_decoding_adds(name):
    """Every token after another, and tokens in a row; invalid UTF-8 aside, of which decoders make what they like."""
    tokenizer = TOKENIZERS[name]()
    texts, special = stopping.token_bytes(tokenizer), stopping.special_tokens(tokenizer)
    assert len(texts) == 1 + max(tokenizer.get_vocab().values())
    ids = [token for token in tokenizer.get_vocab().values() if token not in special]
    anchor = next(token for token in ids if tokenizer.decode([token]).strip().isalnum())
    rows = [[token] for token in ids] + np.random.default_rng(0).choice(ids, (300, 6)).tolist()
    checked = 0
    for row in rows:
        both = tokenizer.decode(
            [anchor, *row], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        read = b"".join(texts[token] for token in row).decode(errors="replace")
        checked += "\ufffd" not in both
        assert both == tokenizer.decode([anchor]) + read or "\ufffd" in both, (
            tokenizer.convert_ids_to_tokens(row)
        )
    assert checked > 40 or checked == len(rows)
    assert all(texts[token] == b"" for token in special)


@pytest.mark.parametrize("name", ["bytewise", "llama", "gemma", "metaspace"])
def test_a_stop_string_that_is_a_special_token_is_seen(name):
    tokenizer = TOKENIZERS[name]()
    end, start, a = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<think>", "a"])
    for string, tokens in (
        ("<|im_end|>", [end]),
        ("a<|im_end|>", [a, end]),
        ("<think>", [start]),
        ("a", [a]),
    ):
        table = np.asarray(rollouts.stop_strings(tokenizer, [string]))
        state = 0
        for token in tokens:
            assert state < table.shape[1] - 1
            state = table[token, state]
        assert state == table.shape[1] - 1, string
    table = np.asarray(rollouts.stop_strings(tokenizer, ["aa"]))
    assert table[a, table[end, table[a, 0]]] == 2, (
        "texts leave it out, and so does what no string has"
    )


def test_tokenizers_whose_tokens_change_beside_others_have_no_stop_strings():
    suffixed = models.BPE(numbered("l", "o", "w</w>", "low</w>"), [], end_of_word_suffix="</w>")
    with pytest.raises(
        ValueError,
        match="stop strings need a tokenizer whose tokens say what they always say, but this",
    ):
        rollouts.stop_strings(fast(suffixed, decoders.BPEDecoder()), ["low"])


def framing(tokenizer, single: str):
    special = [
        (name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>") if name in single
    ]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=special
    )
    return tokenizer


@pytest.mark.parametrize("single", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
def test_tokens_that_begin_and_end_texts_stand_there_once(single):
    tokenizer = framing(bytewise(bos_token="<s>", eos_token="</s>"), single)
    show = lambda tokens: tokenizer.decode(tokens)
    start = "<s>" if "<s>" in single else ""
    for given, plain in (
        ("ab", "ab"),
        ("<s>ab", "<s>ab"),
        ("ab</s>", "ab"),
        ("<s>ab</s>", "<s>ab"),
        ("", ""),
    ):
        body = plain.removeprefix(start)
        for prompt, completion in (
            (given, None),
            (given.removesuffix("</s>"), "c"),
            (given.removesuffix("</s>"), "c</s>"),
        ):
            if completion is None:
                if given:
                    rows = data.tokenize_texts(tokenizer, [{"text": given}])
                    assert show(rows[0].tokens) == f"{start}{body}</s>"
                    assert (
                        show(rollouts.text.encode(tokenizer, [given]).tokens[0]).removesuffix(
                            "</s>"
                        )
                        == start + body
                    )
                    whole = [show(text.framed(tokenizer)(given))]
                    assert whole == [
                        start + body + ("</s>" if "</s>" in single or "</s>" in given else "")
                    ]
                continue
            (row,) = data.tokenize_completions(
                tokenizer, [{"prompt": prompt, "completion": completion}]
            )
            assert show(row.tokens) == f"{start}{body}c</s>"
            (ids,) = data.tokenize_prompts(tokenizer, [{"prompt": prompt}])
            assert show(ids) == start + body
            (steps,) = data.tokenize_steps(
                tokenizer, [{"prompt": prompt, "completions": ["c"], "labels": [True]}]
            )
            assert show(steps.tokens) == f"{start}{body}c\n"
            encoded = data.encode_rows(tokenizer, [prompt], [completion], 12)
            assert show(encoded.tokens[0][encoded.segment_ids[0] != 0]) == f"{start}{body}c</s>"


def without(*letters) -> list[str]:
    gone = {
        stopping_letter
        for letter in letters
        for byte in letter.encode()
        for stopping_letter, b in stopping.BYTES.items()
        if b == byte
    }
    return [letter for letter in LETTERS if letter not in gone]


LACKING = {  # each lacks é and has a, b and the blank
    "characters": lambda: fast(models.BPE(numbered("a", "b", " "), [])),
    "normalised": lambda: normalised(fast(models.BPE(numbered("a", "b", "▁"), []))),
    "bytes": lambda: bytewise(without("é")),
    "words": lambda: fast(
        models.WordLevel(numbered("a", "b", " ")), pre=pre_tokenizers.Split("", "isolated")
    ),
    "wordpieces": lambda: fast(
        models.WordPiece(numbered("a", "b", " ", "##a", "##b", "## "), unk_token="[UNK]")
    ),
    "unigram": lambda: fast(models.Unigram([("a", -1.0), ("b", -1.0), (" ", -1.0)])),
}


def normalised(tokenizer):
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(" ", "▁"), normalizers.Replace("\x00", "")]
    )
    return tokenizer


@pytest.mark.parametrize("name", LACKING)
def test_a_letter_that_no_token_has_is_refused_with_row_text_and_letter(name):
    tokenizer = LACKING[name]()
    tokenizer.add_special_tokens({"eos_token": "</s>", "additional_special_tokens": ["<é>"]})
    known = {"text": "ab</s>" if name in ("wordpieces",) else "ab ba<é>b"}
    assert tokenizer.decode(data.tokenize_texts(tokenizer, [known])[0].tokens).count("b") >= 1
    rows = [
        {name: "ab" for name in ("text", "prompt", "completion")},
        {"text": "aéb", "prompt": "aéb", "completion": "ab"},
    ]
    message = r"(row|prompt) 1: the tokenizer has no token for 'é' \(U\+00E9\), in 'aéb.*', nor one for the unknown"
    for tokenize in (data.tokenize_texts, data.tokenize_completions, data.tokenize_prompts):
        with pytest.raises(ValueError, match=message):
            tokenize(tokenizer, rows)
    with pytest.raises(ValueError, match=message):
        rollouts.text.encode(tokenizer, ["ab", "aéb"])
    with pytest.raises(ValueError, match=message):
        data.encode_rows(tokenizer, ["ab", "aéb"], ["a", "a"], 9)


def test_what_the_tokenizer_drops_on_purpose_is_no_lost_letter():
    tokenizer = LACKING["normalised"]()
    assert text.encoder(tokenizer)("a\x00b") == text.encoder(tokenizer)("ab")
    assert text.encoder(bytewise())("é\x00😀\n") == bytewise()("é\x00😀\n")["input_ids"]


def test_texts_of_absurd_length_and_half_letters_are_refused(monkeypatch):
    tokenizer = bytewise(eos_token="</s>")
    with pytest.raises(
        ValueError, match="prompt 1: a text has half a letter, '.ud83d' at character 1"
    ):
        rollouts.text.encode(tokenizer, ["a", "a\ud83d"])
    monkeypatch.setattr(text, "CHARACTERS", 5)
    with pytest.raises(
        ValueError, match="row 1: a text has 6 characters, but 5 are the most; cut it"
    ):
        data.tokenize_texts(tokenizer, [{"text": "a"}, {"text": "a" * 6}])
