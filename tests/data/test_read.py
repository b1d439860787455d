"""Files, folders, the Hub's loader and mixtures."""

import itertools
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from rlhf import data
from rlhf.data import read

SUMS = Path(__file__).parent / "sums.jsonl"
ROWS = [
    {"prompt": [{"role": "user", "content": 'a, "b"\nc'}], "label": True},
    {"prompt": [{"role": "user", "content": "Ünïcode\u2028"}], "label": False},
]
TEXT = [{"prompt": 'a, "b"\nc', "label": True}, {"prompt": "7", "label": False}]


def write(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text(
            "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
        )
    else:
        cells = lambda row: ",".join(
            '"' + str(value).replace('"', '""') + '"' for value in row.values()
        )
        path.write_text("\n".join([",".join(rows[0]), *map(cells, rows)]), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_formats_give_the_rows_that_were_written(suffix, tmp_path):
    rows = TEXT if suffix == ".csv" else ROWS
    file = write(tmp_path / f"some{suffix}", rows)
    assert data.read_rows(file) == data.read_rows(str(file)) == rows
    assert next(data.stream_rows(file)) == rows[0]


def test_json_may_hold_lines_and_byte_order_marks_are_no_text(tmp_path):
    file = tmp_path / "x.json"
    for content in (
        '{"a": 1}\n\n{"a": 2}\n',
        '[{"a": 1}, {"a": 2}]',
        '\ufeff[{"a": 1}, {"a": 2}]',
        '\ufeff{"a": 1}\r\n{"a": 2}',
    ):
        file.write_text(content, encoding="utf-8", newline="")
        assert data.read_rows(file) == [{"a": 1}, {"a": 2}], content
    (csv := tmp_path / "x.csv").write_text("\ufeffa\n1\n", encoding="utf-8")
    assert data.read_rows(csv) == [{"a": "1"}]


def test_labels_of_csv_are_bools(tmp_path):
    (file := tmp_path / "x.csv").write_text("label\n1\n0\nTrue\nFALSE\n")
    assert [row["label"] for row in data.read_rows(file)] == [True, False, True, False]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.jsonl",
            '{"a": 1}\n{"a": \n',
            "x.jsonl, line 2, column .*: not JSON .*; a file holds one object a line",
        ),
        (
            "x.jsonl",
            '{"a": 1}\n\n[1]',
            r"x.jsonl, line 3: a row must be an object of columns, but is \[1\]",
        ),
        ("x.jsonl", b'{"a": 1}\n{"a": "\xff"}', "x.jsonl, line 2: not UTF-8"),
        ("x.jsonl", "\n \n", "x.jsonl: the file has no rows; remove it, or fill it"),
        ("x.json", '[{"a": 1},\n {"a": 2]', "x.json, line 2, column 9: not JSON"),
        ("x.json", b'[{"a": 1},\n {"a": "\xff"}]', "x.json, line 2: not UTF-8"),
        ("x.json", "[]", "x.json: the file has no rows"),
        ("x.json", '[{"a": 1}, 2]', "x.json, entry 1 of its list: a row must be"),
        ("x.csv", "a,b\n1,2\n1,2,3\n", "x.csv, line 3: 3 cells but 2 columns; quote"),
        ("x.csv", "a,b\n1\n", "x.csv, line 2: 1 cells but 2 columns"),
        ("x.csv", 'a,b\n1,"2"x\n', "x.csv, line 2: not CSV"),
        ("x.csv", 'a,b\n1,"2', "x.csv, line 2: not CSV"),
        ("x.csv", "a,a\n1,2\n", "x.csv, line 1: two columns have one name among a, a"),
        (
            "x.csv",
            "a,label\n1,maybe\n",
            "x.csv, line 2: label must be true, false, 1 or 0, but is 'maybe'",
        ),
        ("x.csv", b"a\n\xff\n", "x.csv, line . or after: not UTF-8"),
        ("x.csv", "a,b\n", "x.csv: the file has no rows"),
        ("x.csv", "", "x.csv: the file has no rows"),
        ("x.parquet", "PAR1 and no more", "x.parquet: not a whole Parquet file"),
        (
            "x.xml",
            "<a/>",
            "x.xml: a format that is not read; convert it to one of .jsonl, .json, .csv, .parquet",
        ),
    ],
)
def test_what_is_malformed_or_empty_is_named_with_its_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        data.read_rows(tmp_path / name)


def test_a_stream_reads_no_further_than_asked(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"a": 1}\nbroken')
    stream = data.stream_rows(file)
    assert next(stream) == {"a": 1}
    with pytest.raises(ValueError, match="line 2"):
        next(stream)
    with pytest.raises(ValueError, match="no such file or folder"):
        data.stream_rows(tmp_path / "missing.jsonl")  # before the first row is asked for


def test_folders_have_splits(tmp_path):
    write(tmp_path / "data" / "train-00001-of-00002.jsonl", [{"a": 2}])
    write(tmp_path / "data" / "train-00000-of-00002.parquet", [{"a": 1}])
    write(tmp_path / "test" / "1.csv", [{"a": 3}])
    (tmp_path / "README.md").write_text("no rows")
    write(tmp_path / ".cache" / "train.csv", [{"a": 4}])
    assert data.read_rows(tmp_path) == [{"a": 1}, {"a": 2}]
    assert data.read_rows(tmp_path, split="test") == [{"a": "3"}]
    with pytest.raises(
        ValueError,
        match="no file of split 'validation'; its files are data/train-00000-of-00002.parquet, data",
    ):
        data.read_rows(tmp_path, split="validation")
    with pytest.raises(ValueError, match="no file of split 'train'; its files are test/1.csv"):
        data.read_rows(write(tmp_path / "part" / "test" / "1.csv", [{"a": 3}]).parent.parent)
    write(tmp_path / "other" / "1.csv", [{"a": 3}])
    assert data.read_rows(tmp_path / "other") == [{"a": "3"}], (
        "no name has a split's word: all are train"
    )
    with pytest.raises(ValueError, match="a file has no split 'test', only 'train'"):
        data.read_rows(tmp_path / "other" / "1.csv", split="test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="its files are none with .jsonl"):
        data.read_rows(tmp_path / "empty")


@pytest.mark.parametrize("streaming", [False, True])
def test_the_hubs_loader_reads_splits(streaming, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "set" / "train.jsonl", ROWS)
    write(tmp_path / "set" / "test.jsonl", ROWS[1:])
    name = str(tmp_path / "set")
    assert list(read._hub_rows(name, "train", None, streaming)) == ROWS
    assert list(read._hub_rows(name, "test", None, streaming)) == ROWS[1:]
    with pytest.raises(
        ValueError, match="split 'other': neither a file here, nor read from the Hub: .*other"
    ):
        list(read._hub_rows(name, "other", None, streaming))


def test_names_go_to_the_hub_with_their_config_and_its_errors_come_back(monkeypatch):
    asked = []

    def load(*args, **options):
        asked.append((args, options))
        return iter(ROWS[: 2 * (len(asked) < 3)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert data.read_rows("owner/some.set", split="test", config="main") == ROWS
    assert list(data.stream_rows("owner/some.set")) == ROWS
    assert asked[0] == (("owner/some.set", "main"), {"split": "test", "streaming": False})
    assert asked[1] == (("owner/some.set", None), {"split": "train", "streaming": True})
    with pytest.raises(ValueError, match="owner/some.set: split 'train' has no rows"):
        data.read_rows("owner/some.set")

    def fail(*args, **options):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/x' doesn't exist")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        ValueError, match="owner/x, split 'train': neither a file here, nor read .*doesn't exist"
    ):
        data.read_rows("owner/x")
    for path in ("owner/x.jsonl", "./owner/x", "a/b/c"):  # no names of the Hub
        with pytest.raises(ValueError, match=f"{path}: no such file or folder; check the path"):
            data.read_rows(path)


def test_questions_with_worked_answers():
    rows = [
        data.renamed(row, question="prompt", answer="completion") for row in data.read_rows(SUMS)
    ]
    assert len(list(data.checked(rows, data.PROMPT_COMPLETION))) == 2
    assert [row["completion"].split("#### ")[1] for row in rows] == ["31", "22"]


def numbered(*sizes):
    number = itertools.count()
    return [[{"id": next(number)} for _ in range(size)] for size in sizes]


@pytest.mark.parametrize(
    ("sizes", "fractions", "taken"),
    [
        ((100, 10), (0.5, 0.5), [10, 10]),
        ((100, 10), (0.9, 0.1), [90, 10]),
        ((7, 7, 7), (0.5, 0.25, 0.25), [7, 4, 4]),
    ],
)
def test_mixtures_take_the_largest_number_at_their_fractions_and_no_row_twice(
    sizes, fractions, taken
):
    sources = numbered(*sizes)
    mixture = data.mix(sources, fractions, seed=1)
    assert mixture.taken == taken
    assert mixture.left_out == [size - n for size, n in zip(sizes, taken, strict=True)]
    ids = [row["id"] for row in mixture.rows]
    assert len(set(ids)) == len(ids) == sum(taken)
    assert [sum(row in source for row in mixture.rows) for source in sources] == taken
    assert mixture == data.mix(sources, fractions, seed=1)
    assert data.mix(sources, fractions) == data.mix(sources, fractions, seed=0)
    assert mixture.rows != data.mix(sources, fractions, seed=2).rows
    assert max(row["id"] for row in mixture.rows[: taken[0]]) >= taken[0] or taken[0] == sizes[0], (
        "drawn, not the first ones"
    )


def test_mixtures_refuse_what_cannot_be_mixed():
    for fractions, message in (
        ([0.5], "2 sources but 1 fractions"),
        ([0.5, 0.6], r"above 0 and sum to 1, but are \[0.5, 0.6\]"),
        ([1.0, 0.0], "above 0 and sum to 1"),
        ([0.99, 0.01], r"take \[5, 0\]; one would give none"),
    ):
        with pytest.raises(ValueError, match=message):
            data.mix(numbered(5, 5), fractions)


def test_hold_out_parts_the_rows():
    (rows,) = numbered(20)
    train, test = data.hold_out(rows, 6)
    assert (len(train), len(test)) == (14, 6)
    assert sorted([*train, *test], key=lambda row: row["id"]) == rows
    assert test not in (rows[:6], rows[-6:]), "drawn"
    assert data.hold_out(rows, 6, seed=1) != (train, test) == data.hold_out(rows, 6, seed=0)
    for size in (0, 20):
        with pytest.raises(ValueError, match=f"{size} rows cannot be held out of 20"):
            data.hold_out(rows, size)
