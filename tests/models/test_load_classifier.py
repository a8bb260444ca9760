"""A classifier of new labels around a model that was pre-trained for something else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitImageProcessorPil

from offsite_fl.errors import ModelError
from offsite_fl.models.load import load_classifier
from tests.conftest import make_tokenizer
from tests.models.families import build

LABELS = ("cat", "dog", "elephant", "newt")


def test_a_backbone_gets_a_zero_head_and_keeps_its_values(tmp_path: Path) -> None:
    backbone = build("dinov2").dinov2
    backbone.save_pretrained(tmp_path)
    BitImageProcessorPil(size={"shortest_edge": 10}).save_pretrained(tmp_path)
    model, processor = load_classifier(tmp_path, "image-classification", LABELS)
    assert isinstance(processor, BitImageProcessorPil) and processor.size["shortest_edge"] == 10
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "elephant", 3: "newt"} and model.config.num_labels == 4
    assert model.config.label2id["newt"] == 3 and not model.training
    for name, value in backbone.state_dict().items():
        assert torch.equal(model.dinov2.state_dict()[name], value), name
    assert len(model.classifier.weight) == 4
    assert not model.classifier.weight.any() and not model.classifier.bias.any()


def test_a_head_is_kept_for_its_own_labels_only(tmp_path: Path) -> None:
    trained = build("bert")
    trained.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    own = list(trained.config.id2label.values())
    assert len(own) != 4
    same, _ = load_classifier(tmp_path, "sequence-classification", own)
    assert torch.equal(same.classifier.weight, trained.classifier.weight)
    for others in (LABELS, LABELS[: len(own)]):
        other, _ = load_classifier(tmp_path, "sequence-classification", others)
        assert len(other.classifier.weight) == len(others) and not other.classifier.weight.any()


def test_the_hidden_layer_of_a_head_is_not_zero(tmp_path: Path) -> None:
    """A gradient would never get through two layers of zeros."""
    build("roberta").roberta.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model, _ = load_classifier(tmp_path, "sequence-classification", LABELS)
    assert model.classifier.dense.weight.any() and not model.classifier.out_proj.weight.any()


def test_files_that_lack_a_part_of_the_backbone_are_refused(tmp_path: Path) -> None:
    build("bert").bert.save_pretrained(tmp_path)
    kept = {name: value for name, value in load_file(tmp_path / "model.safetensors").items() if "pooler" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack bert\.pooler\.dense\.bias, bert\.pooler\.dense\.weight of 2 tensors"):
        load_classifier(tmp_path, "sequence-classification", LABELS)
