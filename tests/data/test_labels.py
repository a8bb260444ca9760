"""What a file may call a class, and what is said where it calls it something else."""

from __future__ import annotations

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from transformers import BertConfig

from offsite_fl.data.labels import Classes, named_labels
from offsite_fl.data.sources import Table, read_table
from offsite_fl.errors import DataError, ModelError

PETS = Classes(("cat", "dog", "3"))


@pytest.mark.parametrize(("value", "index"), [("cat", 0), ("dog", 1), (2, 2), ("1", 1), ("3", 2), (0, 0)])
def test_names_and_numbers(value, index):
    assert PETS.index(value, "here") == index


@pytest.mark.parametrize("value", ["Dog", "", 3, -1, None, True, 1.0, "9"])
def test_what_is_no_class_is_refused_with_its_place(value):
    with pytest.raises(DataError, match=r"pets\.csv, line 4.*3 classes"):
        PETS.index(value, "pets.csv, line 4")


def test_the_nearest_name_is_told_and_the_line():
    table = Table("pets.csv", {"label": ["cat", "dgo"]}, [2, 3])
    with pytest.raises(DataError, match=r"pets\.csv, line 3, column 'label': 'dgo'.*'dog'"):
        PETS.of_table(table, "label")
    with pytest.raises(DataError, match="'label'"):
        PETS.of_table(Table("pets.csv", {"labl": []}), "label")


def test_classes_of_a_config():
    config = BertConfig(id2label={1: "b", 0: "a"}, label2id={"a": 0, "b": 1})
    assert Classes.of_config(config).names == ("a", "b")
    for wrong in ({0: "a", 2: "b"}, {0: "a"}, {0: "a", 1: "a"}):
        config.id2label = wrong
        with pytest.raises(ModelError, match=r"classes|names"):
            Classes.of_config(config)
    config = BertConfig(num_labels=3, problem_type="regression")
    with pytest.raises(ModelError, match="regression"):
        Classes.of_config(config)


def test_a_datasets_class_labels_go_by_name_where_they_have_one(tmp_path):
    features = Features({"label": ClassLabel(names=["dog", "cat"]), "digit": ClassLabel(names=["7", "8"])})
    rows = Dataset.from_dict({"label": [0, 1, -1], "digit": [1, 0, 1]}, features)
    rows.to_parquet(tmp_path / "pets.parquet")
    for source in (rows, tmp_path / "pets.parquet"):
        table = read_table(source)
        assert list(named_labels(table, "label")) == ["dog", "cat", None]
        assert list(named_labels(table, "digit")) == [1, 0, 1]
    plain = Dataset.from_dict({"label": [2]}, Features({"label": Value("int64")}))
    assert list(named_labels(read_table(plain), "label")) == [2]


def test_a_column_whose_numbers_were_replaced_by_names_is_read_as_it_is():
    table = Table("pets.parquet", {"label": ["cat", "cow", None]}, classes={"label": ["dog", "cat"]})
    assert list(named_labels(table, "label")) == ["cat", "cow", None]
    with pytest.raises(DataError, match="'cow' is none of the model's"):
        PETS.of_table(table, "label")
