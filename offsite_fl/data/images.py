"""Labelled images: a folder for each class, a dataset, or a file that names them; opened and processed when needed."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Image, Value  # type: ignore[import-untyped,unused-ignore]
from PIL import Image as Pil
from PIL import ImageOps
from transformers.image_processing_utils import BaseImageProcessor

from offsite_fl.data.labels import Classes
from offsite_fl.data.sources import Source, Table, class_names, read_table
from offsite_fl.errors import DataError
from offsite_fl.registry import near

IMAGE, LABELS = "image", "labels"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True, eq=False)
class ImageTransform:
    """What a dataset of images gives for its rows: pixels as the model's own image processor makes them."""

    processor: BaseImageProcessor

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """``image`` entries (path or bytes) of some rows to ``pixel_values`` [C, H, W] fp32 each."""
        made: dict[str, Any] = {"pixel_values": [self.pixels(opened(entry)) for entry in rows[IMAGE]]}
        return made | {name: values for name, values in rows.items() if name != IMAGE}

    def pixels(self, image: Pil.Image, **options: Any) -> torch.Tensor:
        """One RGB image as [C, H, W] fp32; ``options`` go to the processor."""
        values: torch.Tensor = self.processor(image, return_tensors="pt", **options)["pixel_values"][0]
        return values.float()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ImageTransform) and self.processor is other.processor

    def __hash__(self) -> int:
        return id(self.processor)


def opened(entry: Mapping[str, Any]) -> Pil.Image:
    """The image behind a path or bytes, upright and in RGB; ``DataError`` names a file that is none."""
    name = entry.get("path") or "an image of the dataset"
    try:
        with Pil.open(io.BytesIO(entry["bytes"]) if entry.get("bytes") is not None else entry["path"]) as image:
            # Of 16 or 32 bits Pillow would turn every value above 255 into white.
            if image.mode[0] in "IF":
                raise DataError(f"{name} has grey values of more than 8 bits: bring them to 0...255 and save it again")
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, TypeError, Pil.DecompressionBombError) as error:
        raise DataError(f"{name} isn't an image that can be read: {type(error).__name__}") from error


def transform_of(examples: Dataset) -> ImageTransform | None:
    """The transform of a dataset that :func:`image_examples` made; None for every other dataset."""
    kind = examples.format
    found = (kind.get("format_kwargs") or {}).get("transform") if kind.get("type") == "custom" else None
    return found if isinstance(found, ImageTransform) else None


def image_examples(
    source: Source, processor: BaseImageProcessor, classes: Classes, *, labelled: bool = True, label: str = "label"
) -> Dataset:
    """Images and their classes as a dataset whose rows hold ``pixel_values`` [C, H, W] and ``labels``.

    Parameters
    ----------
    source
        A folder with one folder of images for each class; a ``datasets.Dataset`` or ``.parquet`` file with a column of
        images (``image``, else the only one) and one of labels; or a ``.jsonl``, ``.json`` or ``.csv`` file whose
        column ``image`` holds paths, relative to the file.
    processor
        The model's own; images are opened and processed when a row is asked for.
    classes
        What the labels are numbers or names of.
    labelled
        False reads images alone, from a flat folder too: for calibration.

    Raises
    ------
    DataError
        Names the folder or file, the row, and what would be right.
    """
    if isinstance(source, Dataset) and transform_of(source) is not None:
        return source
    if isinstance(source, Dataset):
        entries, labels, table = _of_dataset(source, label)
    elif isinstance(source, (str, Path)) and Path(source).is_dir():
        entries, labels, table = _of_folder(Path(source), labelled)
    else:
        entries, labels, table = _of_file(source, label)
    columns: dict[str, Any] = {IMAGE: entries}
    features: dict[str, Any] = {IMAGE: Image(decode=False)}
    if labelled:
        given = {label: labels} if labels else {}
        columns[LABELS] = classes.of_table(Table(table.name, given, table.lines, table.classes), label)
        features[LABELS] = Value("int64")
    return Dataset.from_dict(columns, Features(features)).with_transform(ImageTransform(processor))


def _of_folder(folder: Path, labelled: bool) -> tuple[list[Any], Sequence[Any], Table]:
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    classes = [path for path in inside if path.is_dir()]
    if labelled and (not classes or len(classes) < len(inside)):
        odd = next((path.name for path in inside if not path.is_dir()), None)
        what = f"{odd!r} is a file" if odd else "it is empty"
        raise DataError(f"image folder {folder}: must hold one folder for each class, with its images; {what}")
    files: list[tuple[Path, str]] = []
    for place in classes or [folder]:
        files += [(path, place.name) for path in sorted(place.iterdir()) if not path.name.startswith(".")]
    if not files:
        raise DataError(f"image folder {folder}: there are no images in it")
    for path, _ in files:
        if path.suffix.lower() not in SUFFIXES or not path.is_file():
            raise DataError(f"image folder {folder}: {path.relative_to(folder)} is no image; {', '.join(SUFFIXES)} are")
    return [str(path) for path, _ in files], [name for _, name in files], Table(str(folder), {IMAGE: files})


def _of_dataset(source: Dataset, label: str) -> tuple[list[Any], Sequence[Any], Table]:
    found = [name for name, feature in source.features.items() if isinstance(feature, Image)]
    column = IMAGE if IMAGE in found or len(found) != 1 else found[0]
    if column not in found:
        raise DataError(f"dataset: needs one column of images, or one called {IMAGE!r}; it has {source.column_names}")
    if len(source) == 0:
        raise DataError("dataset is empty: it holds no rows")
    plain = source.with_format(None).cast_column(column, Image(decode=False))
    labels = list(plain[label]) if label in plain.column_names else []
    return list(plain[column]), labels, Table("dataset", {IMAGE: range(len(source))}, classes=class_names(source))


def _of_file(source: Source, label: str) -> tuple[list[Any], Sequence[Any], Table]:
    table = read_table(source)
    if IMAGE not in table.columns:
        raise DataError(
            f"{table.name}: needs a column {IMAGE!r} of images or their paths; {near(IMAGE, table.columns)}"
        )
    base = Path(table.name).parent
    entries = [_entry(value, base, table.where(row)) for row, value in enumerate(table.columns[IMAGE])]
    return entries, table.columns.get(label, []), table


def _entry(value: Any, base: Path, where: str) -> Any:
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        return {"bytes": value["bytes"], "path": None}
    if not isinstance(value, str):
        raise DataError(f"{where}, column {IMAGE!r}: must be the path of an image, got {type(value).__name__}")
    path = base / value
    if not path.is_file():
        raise DataError(f"{where}, column {IMAGE!r}: there is no file at that path, which counts from {base}")
    return str(path)
