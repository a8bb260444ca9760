"""What can be wrong with a data owner's file, and whether the message finds the place."""

import json

import pytest
from datasets import Dataset, DatasetDict

from offsite_fl.data.sources import load_source, read_table
from offsite_fl.errors import DataError

ROWS = [{"prompt": "two, three", "answer": 'say "five"'}, {"prompt": "line\nbreak", "answer": "ü"}]


def write(tmp_path, name, content):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content, encoding="utf-8")
    return path


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    dataset = Dataset.from_list(ROWS)
    paths = [tmp_path / f"data.{kind}" for kind in ("jsonl", "csv", "parquet", "json")]
    dataset.to_json(paths[0], force_ascii=False)
    dataset.to_csv(paths[1])
    dataset.to_parquet(paths[2])
    paths[3].write_text(json.dumps(ROWS))
    paths.append(write(tmp_path, "columns.json", json.dumps({k: [r[k] for r in ROWS] for k in ROWS[0]})))
    for path in [*paths, str(paths[0]), dataset]:
        assert load_source(path).to_list() == ROWS


def test_txt_is_one_document_and_a_byte_order_mark_is_dropped(tmp_path):
    path = write(tmp_path, "play.txt", b"\xef\xbb\xbfACT I\n\nEnter a king.\n")
    assert load_source(path).to_list() == [{"text": "ACT I\n\nEnter a king.\n"}]


def test_lines_are_those_of_the_file(tmp_path):
    path = write(tmp_path, "a.csv", 'text,n\n"one\ntwo",1\n\nthree,2\n')
    assert read_table(path).lines == [2, 5]
    path = write(tmp_path, "a.jsonl", '{"text": "a\u2028b"}\n\n{"text": "c"}')
    assert read_table(path).lines == [1, 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.txt", "  \n", "is empty"),
        ("a.csv", "text\n", "holds no rows"),
        ("a.json", "[]", "holds no rows"),
        ("a.txt", b"abc\nd\xe9f", "line 2, column 2: byte 0xe9 isn't UTF-8; save it as UTF-8"),
        ("a.jsonl", '{"text": "a"}\n{"text": }\n', "line 2, column 10: not JSON"),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', r"line 2: each line must be an object"),
        ("a.json", '[{"text": "a"},\n {"text" "b"}]', "line 2, column 10: not JSON"),
        ("a.json", '[{"text": "a"}, 3]', "row 1: each entry must be an object"),
        ("a.json", '{"text": ["a"], "n": []}', "equal length"),
        ("a.json", '"text"', "list of objects"),
        ("a.csv", "text,n\na,1\nb,2,3\n", "line 3: 3 fields, the header has 2"),
        ("a.csv", 'text\n"a" b\n', "line 2: not CSV"),
        ("a.csv", 'text\nok\n"never closed\nmore\n', "line 3: not CSV"),
        ("a.csv", "text,text\na,b\n", "column 'text' appears twice"),
        ("a.csv", "\ufeff\n", "is empty"),
        ("a.jsonl", '{"text": ' + "[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", '{"text": ' + "1" * 5000 + "}", "line 1: not JSON that can be read"),
        ("a.parquet", b"PAR1 nonsense", "isn't a readable parquet file"),
        ("a.jsnl", "{}", "unknown kind '.jsnl'; did you mean '.jsonl'"),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(DataError, match=message) as caught:
        load_source(path)
    assert name in str(caught.value)


def test_not_a_file(tmp_path):
    with pytest.raises(DataError, match="doesn't exist"):
        load_source(tmp_path / "none.txt")
    with pytest.raises(DataError, match="is a folder"):
        load_source(tmp_path)
    with pytest.raises(DataError, match="pass one of them: train, test"):
        load_source(DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS)}))
    with pytest.raises(DataError, match="without streaming"):
        load_source(Dataset.from_list(ROWS).to_iterable_dataset())
    with pytest.raises(DataError, match="got int"):
        load_source(3)


def test_values_that_are_not_text_are_named_by_line_and_column(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"text": "a"}\n\n{"text": 17}\n{"other": 1}\n')
    with pytest.raises(DataError, match=r"a.jsonl, line 3, column 'text': a value of type int, must be text"):
        read_table(path).text("text")
    with pytest.raises(DataError, match="mixes values"):
        load_source(path)
    table = read_table(Dataset.from_dict({"text": ["a", None]}))
    with pytest.raises(DataError, match="dataset, row 1, column 'text': missing"):
        table.text("text")


def test_long_csv_cells_and_the_limit_is_put_back(tmp_path):
    import csv

    limit = csv.field_size_limit()
    path = write(tmp_path, "a.csv", "text\n" + "x" * 200_000 + "\n")
    assert len(load_source(path)[0]["text"]) == 200_000
    assert csv.field_size_limit() == limit
