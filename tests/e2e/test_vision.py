"""The classifying app on simulated nodes, for images and for text: five rows in accuracy and the strip of samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import BertConfig, BertModel, BitImageProcessorPil, Dinov2Config, Dinov2Model

from offsite_fl.config import CACHE_VARIABLE
from offsite_fl.evaluation.record import RunReport
from offsite_fl.evaluation.rows import ROW_KEYS
from offsite_fl.update import Update
from simulations.local_flower import local_flower
from tests.conftest import VOCAB, make_tokenizer
from tests.e2e.conftest import PATIENCE

APP = Path(__file__).parents[2] / "simulations" / "vision"
SIZES = {"public": 8, "test": 12, "train": 40}
SETTINGS: dict[str, object] = {
    "split": "1-1",
    "emulator": "layer-drop:keep=2",
    "num-server-rounds": 2,
    "tune.max-steps": 2,
    "tune.batch-size": 4,
    "tune.warmup-steps": 0,
    "tune.schedule-steps": 4,
    "tune.lr": 1e-3,
    "tune.block-size": 16,
    "data.partition": "iid",
    "test.examples": 10,
    "test.every": 1,
    "test.shown": 3,
}
SMALL = {"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2}


def write_images(folder: Path) -> None:
    """Dark and bright pictures, some of which are called by the wrong name, and a model that has seen neither."""
    torch.manual_seed(0)
    config = Dinov2Config(**SMALL, mlp_ratio=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder / "model")
    BitImageProcessorPil(size={"shortest_edge": 28}, do_center_crop=False).save_pretrained(folder / "model")
    draw = np.random.default_rng(0)
    for side, count in SIZES.items():
        labels = ["dark" if number % 2 else "bright" for number in range(count)]
        light = [160 * ((label == "bright") != (number % 5 == 4)) for number, label in enumerate(labels)]
        images = [draw.integers(0, 90, (28, 28)) + more for more in light]
        features = Features({"image": Image(), "label": Value("string")})
        table = {"image": [image.astype(np.uint8) for image in images], "label": labels}
        Dataset.from_dict(table, features).to_parquet(folder / f"{side}.parquet")


def write_texts(folder: Path) -> None:
    """Sentences about snow and about sand, and an encoder that has read neither."""
    torch.manual_seed(0)
    config = BertConfig(**SMALL, vocab_size=VOCAB, intermediate_size=32, max_position_embeddings=32)
    BertModel(config).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    for side, count in SIZES.items():
        rows = [
            {"text": f"the {word} lay {number}", "label": word} for number in range(count) for word in ("snow", "sand")
        ]
        (folder / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


TASKS = {"image-classification": write_images, "sequence-classification": write_texts}


@pytest.mark.parametrize(
    "task", ["image-classification", pytest.param("sequence-classification", marks=pytest.mark.slow)]
)
def test_five_rows_in_accuracy(task: str, ground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(ground / "cache"))
    TASKS[task](ground)
    more = {"task": task, "model": ground / "model", "data.folder": ground, "run.folder": ground / "run"}
    more["run.tracker"] = "tensorboard"
    size = {"image-size": 28 if task == "image-classification" else 0}
    with local_flower(ground / "flower", supernodes=2) as flower:
        assert flower.run(APP, SETTINGS | more | size, timeout=PATIENCE) == 0
    report = RunReport.read(ground / "run")
    assert [key for key, _ in report.rows] == list(ROW_KEYS) and report.rows.measure == "accuracy"
    for entry in report.rounds[1:]:
        assert set(entry.clients) == {"owner-1", "owner-2"} and not entry.dropped
    # What was counted is there: all rows to tune on are with the two owners, in halves.
    rows = 40 if task == "image-classification" else 80
    assert [report.data[f"owner-{n}"]["examples"] for n in (1, 2)] == [rows / 2, rows / 2]
    assert report.data["held-out test"]["examples"] == 10
    # The sentences of the test come again in what is tuned on, the pictures don't.
    assert any("10 of 10 different test examples" in note for note in report.notes) == (
        task == "sequence-classification"
    )

    assert len(report.samples) == 3 and all(set(sample.answers) == set(ROW_KEYS) for sample in report.samples)
    assert all(bool(sample.image) == (task == "image-classification") for sample in report.samples)
    page = (ground / "run" / "report.html").read_text()
    assert "Sample by sample" in page

    tracked = EventAccumulator(str(ground / "run" / "tracking" / "run"))
    tracked.Reload()
    assert [event.step for event in tracked.Scalars("bytes/up")] == [1, 2]
    assert tracked.Scalars("rows/plug_in/accuracy")[0].value == pytest.approx(report.rows.plug_in.accuracy)

    # The head has travelled and was tuned.
    update = Update.load(ground / "run" / "update.safetensors")
    assert {name for name in update.tensors if ".head." in name} == {
        "adapter.head.classifier.weight",
        "adapter.head.classifier.bias",
    }
