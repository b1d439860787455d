"""The same rows from every container, and one line for every file that holds none."""

import csv
import datetime
import decimal
import json
import random
import time
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf import data

datasets.disable_progress_bars()
CHEAP = settings(
    deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

# Text as people write it and as it breaks readers; none that is JSON by itself, which `datasets` decodes where types are mixed.
TEXT = st.text(st.sampled_from("aZ 7,;\"'\\/\n\r\t{}[]:é中\u2028\u0085\ufeff🎈"), max_size=8).map(
    lambda text: f"x{text}"
)
NUMBER = st.integers(-(2**53), 2**53) | st.integers(-999, 999).map(lambda n: n / 8)
NAME = st.sampled_from("a b city days properties type".split())
KIND = st.sampled_from("string integer".split())
SCHEMA = st.recursive(
    st.fixed_dictionaries(
        {"type": KIND}, optional={"description": TEXT, "enum": st.lists(TEXT, max_size=2)}
    ),
    lambda inner: st.fixed_dictionaries(
        {
            "type": st.just("object"),
            "properties": st.dictionaries(NAME, inner, min_size=1, max_size=3),
        },
        optional={"required": st.lists(NAME, max_size=2)},
    ),
    max_leaves=4,
)
TOOL = st.builds(
    lambda name, schema: {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": schema}},
    },
    TEXT,
    st.dictionaries(NAME, SCHEMA, min_size=1, max_size=3),
)
ARGUMENTS = st.fixed_dictionaries(
    {}, optional={"city": TEXT, "days": NUMBER, "again": st.booleans()}
).filter(bool)
CALL = st.builds(
    lambda name, arguments: {"function": {"name": name, "arguments": arguments}}, TEXT, ARGUMENTS
)
MESSAGE = st.builds(lambda text: {"role": "user", "content": text}, TEXT) | st.builds(
    lambda calls: {"role": "assistant", "tool_calls": calls}, st.lists(CALL, max_size=2)
)
ROW = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE, min_size=1, max_size=3), "answer": TEXT},
    optional={"tools": st.lists(TOOL, min_size=1, max_size=2), "label": st.booleans()},
)


def written(folder: Path, rows: list[dict], kind: str) -> Path:
    """Rows in a container; as CSV, Arrow and `datasets` have one set of columns, the union's."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    whole = [{name: row.get(name) for name in names} for row in rows]
    path = folder / f"rows.{kind.split()[0]}"
    match kind:
        case "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), newline="")
        case "jsonl unicode":
            path.write_text(
                "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
                encoding="utf-8-sig",
                newline="",
            )
        case "json":
            path.write_text(
                json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8", newline=""
            )
        case "csv":
            with path.open("w", encoding="utf-8", newline="") as file:
                table = csv.writer(file, quoting=csv.QUOTE_ALL)
                cell = lambda value: (
                    value if isinstance(value, str) else "" if value is None else json.dumps(value)
                )
                table.writerows(
                    [names, *([cell(value) for value in row.values()] for row in whole)]
                )
        case "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(whole), path, row_group_size=2)
        case "arrow":
            table = pyarrow.Table.from_pylist(whole)
            with pyarrow.ipc.new_file(str(path), table.schema) as file:
                file.write_table(table)
        case "parquet of datasets":
            datasets.Dataset.from_list(whole, on_mixed_types="use_json").to_parquet(path)
        case "folder of datasets":
            of = lambda rows: datasets.Dataset.from_list(rows, on_mixed_types="use_json")
            datasets.DatasetDict({"train": of(whole), "test": of(whole[:1])}).save_to_disk(path)
    return path


def expected(rows: list[dict]) -> list[dict]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]


def plainly(value: Any, *, nulls: bool) -> Any:
    """Keys in order, and integers that Arrow has made 3.0 beside 0.5 as such; without `nulls`, without fields that are null."""
    if isinstance(value, dict):
        return {
            key: plainly(item, nulls=nulls)
            for key, item in sorted(value.items())
            if nulls or item is not None
        }
    if isinstance(value, list):
        return [plainly(item, nulls=nulls) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def exactly(rows: list[dict]) -> str:
    """Rows as text, in which 1 and True differ."""
    return json.dumps(plainly(rows, nulls=True))


EVERY = ["jsonl", "jsonl unicode", "json", "csv", "parquet", "arrow", "parquet of datasets"]


@settings(CHEAP, max_examples=25)
@given(rows=st.lists(ROW, min_size=1, max_size=4))
def test_rows_are_the_same_from_every_container(rows, tmp_path_factory):
    for kind in EVERY:
        if (
            kind == "csv"
            and any("label" not in row for row in rows)
            and any("label" in row for row in rows)
        ):
            continue  # an empty label is refused
        path = written(tmp_path_factory.mktemp("rows"), rows, kind)
        assert exactly(data.read_rows(path)) == exactly(expected(rows)), kind
        names = set()
        for row, whole in zip(data.stream_rows(path), expected(rows), strict=True):
            names |= row.keys()
            assert row.keys() == names
            assert exactly([{name: row.get(name) for name in whole}]) == exactly([whole]), kind


@settings(CHEAP, max_examples=8)
@given(rows=st.lists(ROW, min_size=1, max_size=3))
def test_rows_are_the_same_from_folders_that_datasets_saves(rows, tmp_path_factory):
    path = written(tmp_path_factory.mktemp("rows"), rows, "folder of datasets")
    assert exactly(data.read_rows(path)) == exactly(expected(rows))
    assert len(data.read_rows(path, split="test")) == len(data.read_rows(path / "test")) == 1
    with pytest.raises(
        ValueError,
        match="no file of split 'validation'; its files are test/data-00000-of-00001.arrow, train/",
    ):
        data.read_rows(path, split="validation")
    in_memory = datasets.load_from_disk(path)["train"]
    given_in_memory = [
        {name: row.get(name) for name in expected(rows)[0]}
        for row in data.checked(in_memory, data.LANGUAGE_MODELLING)
    ]
    assert exactly(given_in_memory) == exactly(expected(rows))


WILD = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**200), 2**200) | st.floats(-1e300, 1e300) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(CHEAP, max_examples=60)
@given(
    rows=st.lists(
        st.dictionaries(st.text(max_size=3), WILD, min_size=1, max_size=3), min_size=1, max_size=3
    )
)
def test_lines_and_lists_of_json_hold_anything(rows, tmp_path_factory):
    right = [
        {name: plainly(value, nulls=False) for name, value in row.items()} for row in expected(rows)
    ]
    folder = tmp_path_factory.mktemp("rows")
    for kind in ("jsonl", "jsonl unicode", "json"):
        assert exactly(data.read_rows(written(folder, rows, kind))) == exactly(right), kind


def test_a_long_list_is_read_piece_by_piece(tmp_path):
    rows = [
        {"text": chr(97 + i % 26) * (i * 37 % 5000) + '"\\]},{[' * (i % 7), "n": [i, {}]}
        for i in range(400)
    ]
    for kind in ("json", "jsonl"):
        assert data.read_rows(written(tmp_path, rows, kind)) == rows
    (tmp_path / "compact.json").write_text(json.dumps(rows, separators=(",", ":")))
    assert data.read_rows(tmp_path / "compact.json") == rows
    with (tmp_path / "rows.json").open("rb+") as file:
        file.truncate(500_000)
    stream = data.stream_rows(tmp_path / "rows.json")
    assert [next(stream) for _ in range(100)] == rows[:100]


def test_what_arrow_has_beyond_json_becomes_what_json_would_hold(tmp_path):
    day = datetime.datetime(2024, 5, 6, 7, 8, 9)
    table = pyarrow.table(
        {
            "words": pyarrow.array(["a", "b", "a"]).dictionary_encode(),
            "large": pyarrow.array(["a", None, "c"], pyarrow.large_string()),
            "view": pyarrow.array(["a", "b", "c"], pyarrow.string_view()),
            "items": pyarrow.array([[{"x": 1}], [], [{"y": 2}, {"x": 3}]]),
            "time": pyarrow.array([day] * 3),
            "date": pyarrow.array([day.date()] * 3),
            "nanoseconds": pyarrow.array([1, 2, 3], pyarrow.timestamp("ns")),
            "whole": pyarrow.array([decimal.Decimal("3.00")] * 3),
            "part": pyarrow.array([decimal.Decimal("3.25")] * 3),
            "bytes": pyarrow.array([b"a", b"\xff", "é".encode()]),
            "map": pyarrow.array([[("a", 1)], [], [("b", None)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
            "json": pyarrow.array(['{"a": [1, null]}', None, '"text"'], pyarrow.json_()),
            "deep": pyarrow.StructArray.from_arrays(
                [pyarrow.ListArray.from_arrays([0, 1, 1, 3], pyarrow.array(["1", "[2]", None], pyarrow.json_()))], names=["j"]
            ),
        }
    )  # fmt: skip
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    rows = data.read_rows(tmp_path / "x.parquet")
    assert rows[0] == {
        "words": "a", "large": "a", "view": "a", "items": [{"x": 1}], "time": "2024-05-06T07:08:09", "date": "2024-05-06",
        "nanoseconds": rows[0]["nanoseconds"], "whole": 3, "part": 3.25, "bytes": "a", "map": {"a": 1},
        "json": {"a": [1, None]}, "deep": {"j": [1]},
    }  # fmt: skip
    assert rows[0]["nanoseconds"].startswith("1970-01-01T00:00:00")
    assert [row["items"] for row in rows[1:]] == [[], [{"y": 2}, {"x": 3}]]
    assert [row["map"] for row in rows[1:]] == [{}, {}]
    assert [row["json"] for row in rows[1:]] == [None, "text"]
    assert [row["deep"] for row in rows[1:]] == [{"j": []}, {"j": [[2], None]}]
    assert [row["bytes"] for row in rows[1:]] == [b"\xff", "é"]


def test_columns_that_the_first_rows_lack_are_there_in_all(tmp_path):
    path = written(tmp_path, [{"prompt": "a"}, {"prompt": "b", "solution": "2"}], "jsonl")
    assert data.read_rows(path) == [
        {"prompt": "a", "solution": None},
        {"prompt": "b", "solution": "2"},
    ]
    assert list(data.stream_rows(path)) == [{"prompt": "a"}, {"prompt": "b", "solution": "2"}]
    rows = [
        {"text": "a", "messages": None},
        {"text": None, "messages": [{"role": "user", "content": "b"}]},
    ]
    assert [list(row) for row in data.checked(rows, data.LANGUAGE_MODELLING)] == [
        ["text"],
        ["messages"],
    ]
    with pytest.raises(
        ValueError,
        match="need the columns prompt, completion, but row 1 has prompt: completion missing",
    ):
        list(
            data.checked(
                [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}],
                data.PROMPT_COMPLETION,
            )
        )


def test_folders_of_the_hub_and_of_datasets(tmp_path):
    hub = tmp_path / "hub"
    (hub / "data").mkdir(parents=True)
    written(hub / "data", [{"a": "1"}], "parquet")
    (hub / "data" / "rows.parquet").rename(hub / "data" / "train_sft-00000-of-00001.parquet")
    written(hub / "data", [{"a": "2"}], "parquet")
    (hub / "data" / "rows.parquet").rename(hub / "data" / "train_prefs-00000-of-00001.parquet")
    for name in ("dataset_infos.json", "dataset_info.json", "state.json", "metadata.json"):
        (hub / name).write_text('{"about": {"splits": ["train"]}}')
    assert data.read_rows(hub, split="train_sft") == [{"a": "1"}]
    with pytest.raises(
        ValueError, match="no file of split 'train'; its files are data/train_prefs-00000"
    ):
        data.read_rows(hub)  # not both together
    other = tmp_path / "other"
    other.mkdir()
    written(other, [{"a": "1"}], "jsonl")
    (other / "tags.json").write_text('{"license": "mit"}')
    with pytest.raises(
        ValueError,
        match="tags.json: its columns license are none of those of the files before, a; if",
    ):
        data.read_rows(other)
    saved = tmp_path / "saved"
    datasets.Dataset.from_list([{"a": "1"}]).save_to_disk(saved)
    (saved / "cache-1.arrow").write_bytes((saved / "data-00000-of-00001.arrow").read_bytes())
    assert (
        data.read_rows(saved) == data.read_rows(saved / "data-00000-of-00001.arrow") == [{"a": "1"}]
    )
    (saved / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(ValueError, match="data-00000-of-00001.arrow: cannot be read"):
        data.read_rows(saved)


def test_lines_of_text_end_with_line_feeds_alone(tmp_path):
    (path := tmp_path / "x.txt").write_bytes("\ufeffa\u2028b\u0085c\x0cd\r\n e \n".encode())
    assert data.read_lines(path) == ["a\u2028b\u0085c\x0cd", "e"]


MANY = 2**24 + 1
MALFORMED = [
    ("x.jsonl", '{"a": ' + "[" * 200 + "]" * 200 + "}", "x.jsonl, line 1: lists and objects inside each other more than"),
    ("x.jsonl", '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "x.jsonl, line 1: lists and objects .* more than 100 deep"),
    ("x.json", '[{"a": 1},\n{"a": ' + '{"b": ' * 2000 + "1" + "}" * 2001 + "]", "x.json, line 2: lists and objects .* more"),
    ("x.jsonl", '{"a": 1}\n{"a": ' + "1" * 5000 + "}", "x.jsonl, line 2: an integer of 5000 digits; write it as text"),
    ("x.jsonl", "[" * 900 + "]" * 900, "x.jsonl, line 1: lists and objects inside each other more"),
    ("x.csv", ",".join(["a"] * 100_000), "x.csv, line 1: two columns have one name among a, a"),
    ("x.jsonl", '{"a": 1e999}', "x.jsonl, line 1: 1e999 is beyond what a number holds; write it as text"),
    ("x.jsonl", '{"a": 1}\n{"a": NaN}', "x.jsonl, line 2: NaN is no number of JSON; write null"),
    ("x.json", '[{"a": -Infinity}]', "x.json, line 1: -Infinity is no number of JSON"),
    ("x.jsonl", '{"a": 1, "b": {"c": 1, "c": 2}}', "x.jsonl, line 1: 'c' is there twice in one object; leave one out"),
    ("x.jsonl", '{"a": 1}\n{"a": "\\ud800 x"}', "x.jsonl, line 2: '.ud800' is half of a surrogate pair and no text by itself"),
    ("x.json", '[{"a": 1}, {"a": {"\\udc00": 1}}]', "x.json, line 1: '.udc00' is half of a surrogate pair"),
    ("x.jsonl", '{"a": "' + "b" * MANY + '"}', "x.jsonl, line 1: a row of more than 16 MB; no model reads as much"),
    ("x.json", '[{"a": "' + "b" * MANY + '"}]', "x.json, line 1: a row of more than 16 MB"),
    ("x.json", '[{"a": ' + "1," * (MANY // 2) + "1}]", "x.json, line 1: a row of more than 16 MB"),
    ("x.csv", 'a,b\n1,"' + "b\n" * (MANY // 2) + '"\n', "x.csv, line 2: a row of more than 16 MB; .*is a quote left open"),
    ("x.json", '[{"a": 1},\n{"a": 2}', "x.json: the list has no end; write or download"),
    ("x.json", '[{"a": 1},]', "x.json, line 1, column 11: not JSON"),
    ("x.json", '[{"a": 1}]\n\n{"a": 2}', "x.json, line 1: not JSON .text after the list's end"),
    ("x.json", '[{"a": 1} {"a": 2}]', "x.json, line 1, column 11: not JSON .Extra data"),
    ("x.json", "[", "x.json, line 1, column 2: not JSON"),
    ("x.csv", "a,b\n1,2\0\n", "x.csv, line 2: a NUL byte, which no text has"),
    ("x.csv", "a,messages\n1,hello\n", "x.csv, line 2: messages must be JSON, but 'hello' is not: not JSON .Expecting value"),
    ("x.csv", "prompt\n\"[{'role': 'user', 'content': 'a'}]\"\n", "x.csv, line 2: prompt must be JSON, but .* json.dumps"),
    ("x.csv", 'tools\n"[NaN]"\n', "x.csv, line 2: tools must be JSON, but '.NaN.' is not: NaN is no number"),
    ("x.jsonl", b"\x1f\x8b\x08\x00", "x.jsonl: is compressed; unpack it with gunzip"),
    ("x.parquet", b"\x1f\x8b\x08\x00", "x.parquet: is compressed; unpack it with gunzip"),
    ("x.csv", "a,b\n1,2\n".encode("utf-16"), "x.csv: is UTF-16; convert it"),
    ("x.jsonl", b"PAR1....", "x.jsonl: is Parquet; call it .parquet"),
    ("x.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:0", "x.parquet: is a pointer of Git LFS, not"),
    ("x.jsonl.gz", b"\x1f\x8b\x08\x00", "x.jsonl.gz: a format that is not read; unpack it to one of .jsonl"),
    ("x.txt", "text", "x.txt: a format that is not read; convert it to one of"),
    ("x.arrow", "nothing of the kind", "x.arrow: not a whole Arrow file"),
    ("x.arrow", "", "x.arrow: not a whole Arrow file|x.arrow: the file has no rows|x.arrow: cannot be read"),
    ("x.parquet", "", "x.parquet: not a whole Parquet file"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "message"), MALFORMED, ids=[f"{m[0]} {m[2][:50]}" for m in MALFORMED]
)
def test_what_cannot_be_rows_is_named_in_one_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    began = time.monotonic()
    with pytest.raises(ValueError, match=message) as caught:
        data.read_rows(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))
    assert time.monotonic() - began < 30


def test_what_cannot_be_rows_of_arrow(tmp_path):
    path = tmp_path / "x.parquet"
    twice = pyarrow.Table.from_arrays(
        [pyarrow.array(["1"]), pyarrow.array(["2"])], names=["a", "a"]
    )
    pyarrow.parquet.write_table(twice, path)
    with pytest.raises(
        ValueError, match="x.parquet: two columns have one name among a, a; rename one"
    ):
        data.read_rows(path)
    for text in ("{", '{"a": NaN}'):
        pyarrow.parquet.write_table(
            pyarrow.table({"a": pyarrow.array(["1", text], pyarrow.json_())}), path
        )
        with pytest.raises(ValueError, match="x.parquet, row 1: a is marked as JSON, but is not"):
            data.read_rows(path)
    pyarrow.parquet.write_table(pyarrow.table({"a": ["b", "b" * MANY]}), path)
    with pytest.raises(ValueError, match="x.parquet, row 1: a row of more than 16 MB"):
        data.read_rows(path)
    pyarrow.parquet.write_table(
        pyarrow.table({"a": pyarrow.nulls(30_000_000, pyarrow.int8())}), path
    )
    with pytest.raises(
        ValueError, match="x.parquet: its .* bytes unpack to 3,000,000,000 or more; split it"
    ):
        data.read_rows(path)


def test_a_damaged_file_gives_rows_or_one_line(tmp_path):
    rows = [
        {"prompt": f"{i} + {i} =", "messages": [{"role": "user", "content": "é" * i}]}
        for i in range(3)
    ]
    dice = random.Random(0)
    folder = tmp_path / "damaged"
    folder.mkdir()
    for kind in (
        "jsonl",
        "jsonl unicode",
        "json",
        "csv",
        "parquet",
        "arrow",
        "parquet of datasets",
    ):
        path = written(tmp_path, rows, kind)
        whole = path.read_bytes()
        damaged = folder / path.name
        for i in range(80):
            content = bytearray(whole)
            if i % 2:
                del content[dice.randrange(len(whole)) :]
            for _ in range(1 + i % 3):
                content[dice.randrange(len(content)) if content else slice(0)] = (
                    dice.randrange(256) if content else b""
                )
            damaged.write_bytes(content)
            try:
                assert all(isinstance(row, dict) for row in data.read_rows(damaged))
                message = str(damaged)
            except ValueError as error:
                message = str(error)
            assert message.startswith(str(damaged)), (kind, i, message)
            assert "\n" not in message, (kind, i, message)
