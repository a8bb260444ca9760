"""A few items of a public test set, each with what the networks of the five rows answer."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, field
from typing import Any

from offsite_fl.errors import DataError
from offsite_fl.evaluation import checks
from offsite_fl.evaluation.rows import ROW_KEYS

_PNG = b"\x89PNG\r\n\x1a\n"
_MOST = 2**20  # characters of one picture in a report; pages hold a strip of small ones


@dataclass(frozen=True)
class Sample:
    """One item, shown as a picture or as text, with the right answer and the networks' ones.

    Parameters
    ----------
    truth
        Name of the right class.
    answers
        Row key (:data:`~offsite_fl.evaluation.rows.ROW_KEYS`) to the name of the class that this network answers.
    image
        A PNG file in base64, or empty.
    text
        What is shown where there is no picture.

    Raises
    ------
    DataError
        If a row is unknown, or the picture is no PNG or too large for a page.
    """

    truth: str
    answers: dict[str, str] = field(default_factory=dict)
    image: str = ""
    text: str = ""

    def __post_init__(self) -> None:
        for key in self.answers:
            if key not in ROW_KEYS:
                raise DataError(f"a sample has an answer of {key!r}; the rows are {', '.join(ROW_KEYS)}")
        if self.image:
            _check_picture(self.image)

    def to_dict(self) -> dict[str, Any]:
        """What report.json holds of it."""
        found: dict[str, Any] = {"truth": self.truth, "answers": dict(self.answers)}
        return found | {key: value for key, value in (("image", self.image), ("text", self.text)) if value}

    @classmethod
    def from_dict(cls, value: object, where: str = "sample") -> Sample:
        """Read what :meth:`to_dict` wrote; ``DataError`` says where it is wrong."""
        found = checks.entries(value, where, ("truth", "answers"), ("image", "text"))
        named = {key: checks.text(found.get(key, ""), f"{where}.{key}") for key in ("truth", "image", "text")}
        given = checks.entries(found["answers"], f"{where}.answers")
        answers = {key: checks.text(answer, f"{where}.answers.{key}") for key, answer in given.items()}
        try:
            return cls(answers=answers, **named)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error


def _check_picture(image: str) -> None:
    """Only PNG goes into a page: an SVG could hold links, and other text could leave its attribute."""
    if len(image) > _MOST:
        raise DataError(f"the picture of a sample has {len(image)} characters, more than {_MOST}: make it smaller")
    try:
        known = base64.b64decode(image, validate=True).startswith(_PNG)
    except binascii.Error:
        known = False
    if not known:
        raise DataError("the picture of a sample must be a PNG file in base64")
