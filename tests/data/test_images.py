"""Images from folders, datasets and files; what they become, against PIL and arithmetic alone."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value, concatenate_datasets
from datasets import Image as ImageFeature
from PIL import Image

from offsite_fl.data.examples import split_examples
from offsite_fl.data.fingerprints import fingerprints, overlap
from offsite_fl.data.images import image_examples, transform_of
from offsite_fl.data.labels import Classes
from offsite_fl.data.loader import make_loader
from offsite_fl.errors import ConfigError, DataError
from tests.pico_classifiers import NAMES, SIDE, image_folder, make_image_processor, picture

CLASSES, PROCESSOR = Classes(NAMES), make_image_processor()


def read(source, **options):
    return image_examples(source, PROCESSOR, CLASSES, **options)


def by_hand(image):
    """Bilinear to 8 x 8, then [0, 255] to [-1, 1], channels first."""
    small = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=np.float64)
    return torch.tensor(small / 127.5 - 1).permute(2, 0, 1).float()


def test_a_folder_for_each_class(tmp_path):
    examples = read(image_folder(tmp_path / "pets", each=2))
    assert examples.with_format(None)["labels"] == [0, 0, 1, 1, 2, 2]
    row = examples[3]
    assert row["pixel_values"].shape == (3, SIDE, SIDE) and row["pixel_values"].dtype == torch.float32
    torch.testing.assert_close(row["pixel_values"], by_hand(Image.open(tmp_path / "pets/dog/1.png")))


def test_sources_of_the_same_images_give_the_same_batches(tmp_path):
    folder = image_folder(tmp_path / "pets", each=2)
    files = sorted(folder.rglob("*.png"))
    rows = [{"image": str(f.relative_to(tmp_path)), "label": f.parent.name} for f in files]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (tmp_path / "list.csv").open("w", newline="") as out:
        table = csv.DictWriter(out, ("image", "label"))
        table.writeheader()
        table.writerows(rows)
    features = Features({"img": ImageFeature(), "label": ClassLabel(names=["owl", "cat", "dog"])})
    pictures = [{"path": None, "bytes": f.read_bytes()} for f in files]
    dataset = Dataset.from_dict(
        {"img": pictures, "label": [("owl", "cat", "dog").index(f.parent.name) for f in files]}, features
    )
    dataset.rename_column("img", "image").to_parquet(tmp_path / "list.parquet")
    (want,) = make_loader(read(folder), 6, pad_id=0)
    for source in (tmp_path / "list.jsonl", tmp_path / "list.csv", tmp_path / "list.parquet", dataset):
        (batch,) = make_loader(read(source), 6, pad_id=0)
        assert torch.equal(batch["pixel_values"], want["pixel_values"])
        assert torch.equal(batch["labels"], want["labels"]) and batch["labels"].dtype == torch.int64
    unnamed = dataset.rename_column("img", "image").cast_column("label", ClassLabel(names=["0", "1", "2"]))
    assert read(unnamed).with_format(None)["labels"] == [1, 1, 2, 2, 0, 0]


def test_what_is_wrong_with_a_source_is_named(tmp_path):
    folder = image_folder(tmp_path / "pets", each=1)
    (tmp_path / "list.jsonl").write_text(
        '{"image": "pets/cat/0.png", "label": "cat"}\n{"image": "no.png", "label": 0}\n'
    )
    with pytest.raises(DataError, match=r"list\.jsonl, line 2.*no file"):
        read(tmp_path / "list.jsonl")
    (tmp_path / "other.jsonl").write_text('{"picture": "pets/cat/0.png"}\n')
    with pytest.raises(DataError, match="'image'"):
        read(tmp_path / "other.jsonl")
    (folder / "fox").mkdir()
    picture(0, np.random.default_rng(0)).save(folder / "fox" / "a.png")
    with pytest.raises(DataError, match="'fox'"):
        read(folder)
    (folder / "fox" / "a.png").rename(folder / "a.png")
    with pytest.raises(DataError, match=r"one folder for each class.*'a\.png'"):
        read(folder)
    (folder / "a.png").unlink()
    (folder / "fox" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"notes\.txt is no image"):
        read(folder)
    (tmp_path / "none").mkdir()
    for labelled in (True, False):
        with pytest.raises(DataError, match="none"):
            read(tmp_path / "none", labelled=labelled)
    with pytest.raises(DataError, match="column of images"):
        read(Dataset.from_dict({"label": [0]}))


def test_a_file_that_is_no_image_is_told_when_it_is_opened(tmp_path):
    folder = image_folder(tmp_path / "pets", each=1)
    (folder / "cat" / "0.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"0\.png isn't an image"):
        read(folder)[0]


def test_grey_values_that_would_be_cut_are_refused(tmp_path):
    """Of 16 bits Pillow keeps black and white, and nothing in between."""
    folder = image_folder(tmp_path / "pets", each=1)
    Image.fromarray(np.arange(0, 64000, 1000, dtype=np.uint16).reshape(8, 8)).save(folder / "cat" / "0.png")
    with pytest.raises(DataError, match=r"0\.png has grey values of more than 8 bits"):
        read(folder)[0]


def test_calibration_needs_no_labels(tmp_path):
    flat = image_folder(tmp_path / "pets", each=2) / "cat"
    examples = read(flat, labelled=False)
    assert examples.column_names == ["image"] and len(examples) == 2
    with pytest.raises(DataError, match="labels"):
        make_loader(examples, 2, pad_id=0)
    (batch,) = make_loader(examples, 2, pad_id=0, labelled=False)
    assert set(batch) == {"pixel_values"}


def test_grey_and_transparent_and_turned_images_are_upright_rgb(tmp_path):
    draw = np.random.default_rng(1)
    plain = picture(2, draw)
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
    plain.convert("L").save(tmp_path / "pets/cat/grey.png")
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    plain.rotate(180).save(tmp_path / "pets/dog/turned.png", exif=exif)
    grey, turned = (read(tmp_path / "pets")[i]["pixel_values"] for i in range(2))
    torch.testing.assert_close(grey, by_hand(plain.convert("L")))
    torch.testing.assert_close(turned, by_hand(plain))


def test_copies_of_an_image_stay_on_one_side_and_are_recognised(tmp_path):
    folder = image_folder(tmp_path / "pets", each=3)
    for number in range(3, 9):  # six copies of one picture
        (folder / "cat" / f"{number}.png").write_bytes((folder / "cat" / "0.png").read_bytes())
    examples = read(folder)
    for seed in range(4):
        train, held = split_examples(examples, 0.3, seed)
        assert transform_of(train) is not None and len(train) + len(held) == 15
        assert not set(fingerprints(train)) & set(fingerprints(held))
    assert len(fingerprints(examples)) == 9
    assert overlap(read(folder / "cat", labelled=False), fingerprints(examples)) == 3


def test_datasets_of_one_processor_can_be_put_together(tmp_path):
    parts = [read(image_folder(tmp_path / str(i), each=1, seed=i)) for i in range(2)]
    whole = concatenate_datasets(parts)
    assert transform_of(whole) is not None and len(whole) == 6
    assert torch.equal(whole[4]["pixel_values"], parts[1][1]["pixel_values"])


def epochs(examples, augment, seed=3, start=0, size=2, count=2):
    loader = make_loader(examples, size, pad_id=0, shuffle=True, seed=seed, augment=augment)
    loader.sampler.epoch = start
    return [torch.cat([batch["pixel_values"] for batch in loader]) for _ in range(count)]


@pytest.mark.parametrize("augment", ["none", "flip", "crop-flip"])
def test_augmentation_depends_on_seed_epoch_and_row_alone(tmp_path, augment):
    examples = read(image_folder(tmp_path / "pets", each=2))
    first = epochs(examples, augment)
    torch.rand(3)
    assert all(torch.equal(a, b) for a, b in zip(first, epochs(examples, augment), strict=True))
    # resumed in epoch 1, and in other batches
    assert torch.equal(first[1], epochs(examples, augment, start=1, size=3, count=1)[0])
    assert not torch.equal(first[0], epochs(examples, augment, seed=4)[0])


def test_flips_mirror_about_half_and_change_nothing_else(tmp_path):
    examples = read(image_folder(tmp_path / "pets", each=1))
    want = [row["pixel_values"] for row in examples]
    flipped = 0
    for start in range(20):
        loader = make_loader(examples, 3, pad_id=0, seed=0, augment="flip")
        loader.sampler.epoch = start
        (batch,) = loader
        for found, plain in zip(batch["pixel_values"], want, strict=True):
            mirrored = torch.allclose(found, plain.flip(-1), atol=2e-2)
            assert mirrored or torch.equal(found, plain)
            flipped += mirrored
    assert 18 <= flipped <= 42


def test_text_has_no_augmentation():
    rows = Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]]})
    with pytest.raises(ConfigError, match="augment = 'flip' is for images"):
        make_loader(rows, 1, pad_id=0, augment="flip")


def test_bytes_in_memory_are_read_too():
    out = io.BytesIO()
    picture(1, np.random.default_rng(0)).save(out, "PNG")
    rows = Dataset.from_dict(
        {"image": [{"path": None, "bytes": out.getvalue()}], "label": ["dog"]},
        Features({"image": ImageFeature(), "label": Value("string")}),
    )
    assert read(rows).with_format(None)["labels"] == [1]
