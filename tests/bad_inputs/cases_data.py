"""Data that cannot be: malformed, hostile, of another kind than its name says, or beside the data."""

import json
import os
import pathlib
from functools import cache

import pyarrow
import pyarrow.parquet

USER = {"role": "user", "content": "1 + 1?"}
SAY = lambda text: {"role": "assistant", "content": text}
LINES = lambda *rows: "\n".join(json.dumps(row) for row in rows)
FILES: dict[str, str | bytes] = {  # under TMP -> content
    "deep.jsonl": '{"text": "a"}\n{"text": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "deeper.jsonl": LINES({"text": "a", "extra": json.loads("[" * 150 + "]" * 150)}),
    "deep.json": '[{"text": "a"},\n {"text": ' + '{"a": ' * 50_000 + "1" + "}" * 50_001 + "]",
    "digits.jsonl": '{"text": "a", "n": ' + "7" * 5000 + "}",
    "nan.jsonl": '{"text": "a", "n": NaN}',
    "infinity.json": '[{"text": "a", "n": -Infinity}]',
    "huge_number.jsonl": '{"text": "a", "n": 1e400}',
    "surrogate.jsonl": '{"text": "a"}\n{"text": "\\ud83d alone"}',
    "surrogate_name.jsonl": '{"text": "a", "\\udfff": 1}',
    "twice.jsonl": '{"text": "a", "text": "b"}',
    "twice_inside.json": '[{"messages": [{"role": "user", "role": "assistant"}]}]',
    "array.jsonl": '["text"]',
    "string.json": '"text"',
    "cut.json": '[{"text": "a"}, {"text": "b"}',
    "cut_inside.json": '[{"text": "a"}, {"text": "b',
    "comma.json": '[{"text": "a"},]',
    "more.json": '[{"text": "a"}] [{"text": "b"}]',
    "empty_list.json": "[]",
    "pretty.json": '{\n "text": "a"\n}',
    "empty.csv": "",
    "header.csv": "text\n",
    "nul.csv": "text\na\0b\n",
    "open_quote.csv": 'text\n"a\nb\n',
    "wide.csv": "text\na,b\n",
    "twice.csv": "text,text\na,b\n",
    "label.csv": "prompt,completion,label\na,b,perhaps\n",
    "messages.csv": "messages\nhello\n",
    "repr.csv": "prompt,completion\n\"[{'role': 'user', 'content': 'a'}]\",b\n",
    "tools.csv": "prompt,completion,tools\na,b,[{]\n",
    "gzip.jsonl": b"\x1f\x8b\x08\x00\x00",
    "zip.csv": b"PK\x03\x04\x00",
    "utf16.csv": "text\na\n".encode("utf-16"),
    "latin.csv": "text\né\n".encode("latin-1"),
    "lfs.parquet": "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
    "parquet.jsonl": b"PAR1\x15\x04PAR1",
    "head.parquet": b"PAR1\x15\x04\x15\x00PAR1",
    "noise.parquet": bytes(range(256)) * 4,
    "empty.parquet": b"",
    "noise.arrow": bytes(range(256)) * 4,
    "some.txt": "text",
    "some.jsonl.gz": b"\x1f\x8b\x08\x00",
    "label.jsonl": LINES(
        {"prompt": "a", "completion": "b", "label": 1},
        {"prompt": "a", "completion": "b", "label": 2},
    ),
    "null.jsonl": LINES({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}),
    "equal.jsonl": LINES(
        {"chosen": "a b", "rejected": "a c"}, {"chosen": "a b", "rejected": "a b"}
    ),
    "numbers.jsonl": LINES({"chosen": 1, "rejected": 2}),
    "unrepeated.jsonl": LINES(
        {"prompt": "1 + 1?", "chosen": [USER, SAY("2")], "rejected": [USER, SAY("3")]},
        {"prompt": "2 + 2?", "chosen": [USER, SAY("2")], "rejected": [USER, SAY("3")]},
    ),
    "two_prompts.jsonl": LINES({"question": "a"}, {"question": "a", "prompt": "b"}),
    "about/rows.jsonl": LINES({"text": "a"}),
    "about/tags.json": '{"license": "mit", "text_of": "tags"}',
    "only_about/dataset_info.json": '{"features": {}}',
    "only_about/README.md": "none",
    "saved/state.json": '{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}',
    "saved/dataset_info.json": "{}",
    "odd/state.json": '{"_data_files": 7}',
    "splits/dataset_dict.json": '{"splits": ["test"]}',
    "splits/test/rows.jsonl": LINES({"text": "a"}),
    "two/train.jsonl": LINES({"text": "a"}),
}


def prepare(tmp: pathlib.Path, base: str) -> None:
    for name, content in FILES.items():
        path = tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for name, start in (
        ("large.jsonl", b'{"text": "'),
        ("large.json", b'[{"text": "'),
        ("large.csv", b'text\n"a'),
    ):
        (tmp / name).write_bytes(start)
        os.truncate(tmp / name, 200 * 2**20)  # a hole, which takes no room
    for name, content in _of_parquet().items():
        (tmp / name).write_bytes(content)


@cache
def _of_parquet() -> dict[str, bytes]:
    tables = {
        "twice.parquet": pyarrow.Table.from_arrays(
            [pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"]
        ),
        "marked.parquet": pyarrow.table(
            {"text": ["a", "b"], "n": pyarrow.array(["1", "{"], pyarrow.json_())}
        ),
        "bomb.parquet": pyarrow.table({"text": pyarrow.nulls(25_000_000, pyarrow.int8())}),
    }
    files = {}
    for name, table in tables.items():
        pyarrow.parquet.write_table(table, sink := pyarrow.BufferOutputStream())
        files[name] = sink.getvalue().to_pybytes()
    return files | {"cut.parquet": files["marked.parquet"][:200]}


def _sft(file: str) -> list[str]:
    return ["sft", "--model", "BASE", "--output", "OUT", "--dataset", f"TMP/{file}"]


def _of(command: str, file: str, *more: str) -> list[str]:
    return [command, "--model", "BASE", "--output", "OUT", "--dataset", f"TMP/{file}", *more]


CASES: list[tuple[str, list[str], str]] = [
    (
        "deep",
        _sft("deep.jsonl"),
        "deep.jsonl, line 2: lists and objects inside each other more than 100 deep",
    ),
    (
        "deeper",
        _sft("deeper.jsonl"),
        "deeper.jsonl, line 1: lists and objects inside each other more than 100 deep",
    ),
    (
        "deep list",
        _sft("deep.json"),
        "deep.json, line 2: lists and objects inside each other more than 100 deep",
    ),
    (
        "digits",
        _sft("digits.jsonl"),
        "digits.jsonl, line 1: an integer of 5000 digits; write it as text",
    ),
    ("nan", _sft("nan.jsonl"), "nan.jsonl, line 1: NaN is no number of JSON; write null"),
    ("infinity", _sft("infinity.json"), "infinity.json, line 1: -Infinity is no number of JSON"),
    (
        "huge number",
        _sft("huge_number.jsonl"),
        "huge_number.jsonl, line 1: 1e400 is beyond what a number holds",
    ),
    (
        "surrogate",
        _sft("surrogate.jsonl"),
        "surrogate.jsonl, line 2: '\\ud83d' is half of a surrogate pair",
    ),
    (
        "surrogate name",
        _sft("surrogate_name.jsonl"),
        "surrogate_name.jsonl, line 1: '\\udfff' is half of a surrogate pair",
    ),
    ("twice", _sft("twice.jsonl"), "twice.jsonl, line 1: 'text' is there twice in one object"),
    (
        "twice inside",
        _sft("twice_inside.json"),
        "twice_inside.json, line 1: 'role' is there twice in one object",
    ),
    ("array", _sft("array.jsonl"), "array.jsonl, line 1: a row must be an object of columns"),
    ("string", _sft("string.json"), "string.json, line 1: a row must be an object of columns"),
    ("cut list", _sft("cut.json"), "cut.json: the list has no end"),
    (
        "cut inside",
        _sft("cut_inside.json"),
        "cut_inside.json, line 1, column 26: not JSON (Unterminated string",
    ),
    ("comma", _sft("comma.json"), "comma.json, line 1, column 16: not JSON"),
    ("two lists", _sft("more.json"), "more.json, line 1: not JSON (text after the list's end)"),
    ("empty list", _sft("empty_list.json"), "empty_list.json: the file has no rows"),
    ("object over lines", _sft("pretty.json"), "pretty.json, line 1, column 2: not JSON"),
    ("empty csv", _sft("empty.csv"), "empty.csv: the file has no rows"),
    ("header alone", _sft("header.csv"), "header.csv: the file has no rows"),
    ("nul", _sft("nul.csv"), "nul.csv, line 2: a NUL byte, which no text has"),
    ("open quote", _sft("open_quote.csv"), "open_quote.csv, line 3: not CSV"),
    ("wide", _sft("wide.csv"), "wide.csv, line 2: 2 cells but 1 columns"),
    (
        "columns twice",
        _sft("twice.csv"),
        "twice.csv, line 1: two columns have one name among text, text",
    ),
    (
        "label of csv",
        _of("kto", "label.csv"),
        "label.csv, line 2: label must be true, false, 1 or 0, but is 'perhaps'",
    ),
    (
        "messages of csv",
        _sft("messages.csv"),
        "messages.csv, line 2: messages must be JSON, but 'hello' is not",
    ),
    ("repr of csv", _sft("repr.csv"), "repr.csv, line 2: prompt must be JSON"),
    ("tools of csv", _sft("tools.csv"), "tools.csv, line 2: tools must be JSON"),
    ("gzip", _sft("gzip.jsonl"), "gzip.jsonl: is compressed; unpack it with gunzip"),
    ("zip", _sft("zip.csv"), "zip.csv: is compressed; unpack it with unzip"),
    ("utf-16", _sft("utf16.csv"), "utf16.csv: is UTF-16"),
    ("latin", _sft("latin.csv"), "latin.csv, line 1 or after: not UTF-8"),
    ("lfs", _sft("lfs.parquet"), "lfs.parquet: is a pointer of Git LFS, not the data"),
    (
        "parquet by another name",
        _sft("parquet.jsonl"),
        "parquet.jsonl: is Parquet; call it .parquet",
    ),
    ("head of parquet", _sft("head.parquet"), "head.parquet: not a whole Parquet file"),
    ("noise as parquet", _sft("noise.parquet"), "noise.parquet: not a whole Parquet file"),
    ("empty parquet", _sft("empty.parquet"), "empty.parquet: not a whole Parquet file"),
    ("cut parquet", _sft("cut.parquet"), "cut.parquet: not a whole Parquet file"),
    ("noise as arrow", _sft("noise.arrow"), "noise.arrow: not a whole Arrow file"),
    (
        "columns twice in parquet",
        _sft("twice.parquet"),
        "twice.parquet: two columns have one name among text, text",
    ),
    (
        "json that is none",
        _sft("marked.parquet"),
        "marked.parquet, row 1: n is marked as JSON, but is not",
    ),
    ("bomb", _sft("bomb.parquet"), "unpack to 2,500,000,000 or more"),
    ("large line", _sft("large.jsonl"), "large.jsonl, line 1: a row of more than 16 MB"),
    ("large entry", _sft("large.json"), "large.json, line 1: a row of more than 16 MB"),
    ("large cell", _sft("large.csv"), "large.csv, line 2: a row of more than 16 MB"),
    ("text", _sft("some.txt"), "some.txt: a format that is not read; convert it to one of .jsonl"),
    (
        "jsonl.gz",
        _sft("some.jsonl.gz"),
        "some.jsonl.gz: a format that is not read; unpack it to one of .jsonl",
    ),
    ("missing", _sft("missing.jsonl"), "missing.jsonl: no such file or folder; check the path"),
    ("long name", _sft("a" * 300 + ".jsonl"), ".jsonl: cannot be read (File name too long)"),
    (
        "label 2",
        _of("kto", "label.jsonl"),
        "row 1: label must be True or False, or 1 or 0, but is 2",
    ),
    ("null completion", _sft("null.jsonl"), "but row 1 has prompt: completion missing"),
    (
        "null column",
        _of("grpo", "null.jsonl", "--columns", "{question: prompt}"),
        "columns renames question",
    ),
    ("equal sides", _of("dpo", "equal.jsonl"), "row 1: chosen and rejected must share a beginning"),
    (
        "equal sides for kto",
        _of("kto", "equal.jsonl"),
        "row 1: chosen and rejected must share a beginning",
    ),
    (
        "numbers for sides",
        _of("kto", "numbers.jsonl"),
        "row 0: chosen must be a string or messages",
    ),
    (
        "prompt not repeated",
        _of("dpo", "unrepeated.jsonl"),
        "row 1: the prompt '2 + 2?' is in none of the messages",
    ),
    (
        "prompt not repeated (2)",
        _of("reward", "unrepeated.jsonl"),
        "row 1: the prompt '2 + 2?' is in none of the messages",
    ),
    (
        "two prompts",
        _of("sft", "two_prompts.jsonl", "--columns", "{question: prompt}"),
        "row 1: question cannot become prompt: a row has a prompt already",
    ),
    (
        "about the data",
        _sft("about"),
        "tags.json: its columns license, text_of are none of those of the files before, text",
    ),
    (
        "nothing but about",
        _sft("only_about"),
        "only_about: no file of split 'train'; its files are none with .jsonl",
    ),
    (
        "saved without its files",
        _sft("saved"),
        "data-00000-of-00001.arrow: cannot be read (No such file or directory)",
    ),
    ("saved oddly", _sft("odd"), "state.json: not what datasets.save_to_disk writes"),
    (
        "saved without the split",
        _sft("splits"),
        "splits: no file of split 'train'; its files are test/rows.jsonl",
    ),
    (
        "no such split",
        [*_sft("two"), "--split", "test"],
        "two: no file of split 'test'; its files are train.jsonl",
    ),
    (
        "split of a file",
        [*_sft("label.jsonl"), "--split", "test"],
        "label.jsonl: a file has no split 'test'",
    ),
]
