"""Each task reads its own files: packed text as before, labelled text, labelled images."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset

from offsite_fl.data.by_task import classes_of, examples_for, has_labels
from offsite_fl.data.examples import to_examples
from offsite_fl.data.labels import Classes
from offsite_fl.data.loader import make_loader
from offsite_fl.errors import DataError, ModelError
from tests.pico_classifiers import NAMES, image_folder, labelled_rows, make_classifier, make_image_processor

CLASSES = Classes(NAMES)
TEXT, IMAGES = "sequence-classification", "image-classification"


def test_next_token_text_is_read_as_before(pico_tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 4)
    ours = examples_for("causal-lm", tmp_path / "a.txt", pico_tokenizer, block_size=8)
    assert ours.to_dict() == to_examples(tmp_path / "a.txt", pico_tokenizer, block_size=8).to_dict()


def test_labelled_text(pico_tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ab", "label": "dog"}\n\n{"text": "abcdefgh", "label": 2}\n')
    found = examples_for(TEXT, path, pico_tokenizer, CLASSES, block_size=4)
    # one token a letter from a = 4 on; a text is cut at block_size tokens
    assert found.to_dict() == {"input_ids": [[4, 5], [4, 5, 6, 7]], "labels": [1, 2]}
    (batch,) = make_loader(found, 2, pad_id=0)
    assert {name: t.tolist() for name, t in batch.items()} == {
        "input_ids": [[4, 5, 0, 0], [4, 5, 6, 7]],
        "attention_mask": [[1, 1, 0, 0], [1, 1, 1, 1]],
        "labels": [1, 2],
    }
    again = examples_for(TEXT, found, pico_tokenizer, CLASSES, block_size=4)
    assert again is found
    bare = examples_for(TEXT, path, pico_tokenizer, CLASSES, block_size=4, labelled=False)
    assert bare.column_names == ["input_ids"]


def test_what_is_wrong_with_labelled_text_is_named(pico_tokenizer, tmp_path):
    path = tmp_path / "a.csv"
    for content, said in (
        ("text,label\nab,dgo\n", r"a\.csv, line 2, column 'label'.*'dog'"),
        ("txt,label\nab,dog\n", "column 'text'"),
        ("text,lable\nab,dog\n", "column 'label'"),
        ("text,label\n ,dog\n", "line 2, column 'text'"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=said):
            examples_for(TEXT, path, pico_tokenizer, CLASSES, block_size=8)


def test_each_task_has_its_own_processor(pico_tokenizer, tmp_path):
    folder = image_folder(tmp_path / "pets", each=1)
    with pytest.raises(ModelError, match="image processor"):
        examples_for(IMAGES, folder, pico_tokenizer, CLASSES, block_size=8)
    with pytest.raises(ModelError, match="tokenizer"):
        examples_for(TEXT, folder, make_image_processor(), CLASSES, block_size=8)
    with pytest.raises(ModelError, match="prepares images"):
        examples_for("causal-lm", folder, make_image_processor(), block_size=8)
    with pytest.raises(ModelError, match="classes"):
        examples_for(TEXT, folder, pico_tokenizer, block_size=8)
    assert len(examples_for(IMAGES, folder, make_image_processor(), CLASSES, block_size=8)) == 3


def test_whether_a_source_is_labelled(tmp_path):
    folder = image_folder(tmp_path / "pets", each=1)
    assert has_labels(folder) and not has_labels(folder / "cat")
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in labelled_rows(1)))
    assert has_labels(path) and has_labels(Dataset.from_dict({"label": [1]}))
    assert not has_labels(Dataset.from_dict({"text": ["a"]}))


def test_classes_come_with_the_two_tasks_only():
    assert classes_of(TEXT, make_classifier("bert").config) == CLASSES
    assert classes_of("causal-lm", make_classifier("bert").config) is None


def test_padding_of_one_class_each_is_that_of_the_tokens(pico_tokenizer):
    rows = Dataset.from_list(labelled_rows(2))
    found = examples_for(TEXT, rows, pico_tokenizer, CLASSES, block_size=16)
    (batch,) = make_loader(found, 6, pad_id=0)
    assert batch["labels"].tolist() == [0, 1, 2, 0, 1, 2]
    assert torch.equal(batch["attention_mask"], (batch["input_ids"] != 0).long())
