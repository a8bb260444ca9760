"""``python -m simulations.benchmarks.digits_model FOLDER``: the image classifier of ``make vision`` as a folder.

DINOv2-small with ten classes and the image size of ``simulations/vision``, for commands that take a model's folder. Its
head answers nothing yet.
"""

from __future__ import annotations

import sys
from pathlib import Path

from offsite_fl.models.load import load_classifier
from offsite_fl.owner import ModelOwner
from simulations import digits
from simulations.classify import APP
from simulations.running import settings_of


def save(folder: Path) -> Path:
    """Write the classifier to ``folder``."""
    config = "tool.flwr.app.config."
    settings = {key.removeprefix(config): value for key, value in settings_of(APP / "pyproject.toml").items()}
    model, processor = load_classifier(str(settings["model"]), str(settings["task"]), digits.CLASSES)
    side = settings["image-size"]
    processor.size, processor.crop_size = {"shortest_edge": side}, {"height": side, "width": side}
    return ModelOwner(model, processor).save(folder)


if __name__ == "__main__":
    save(Path(sys.argv[1]))
