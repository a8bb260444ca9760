"""The classifying app's own parts: its run config, who has which rows, and what a page shows of a row."""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pil

from offsite_fl.errors import ConfigError, DataError
from simulations.running import settings_of

APP = Path(__file__).parents[2] / "simulations" / "vision"
CONFIG = {
    key.removeprefix("tool.flwr.app.config."): value
    for key, value in settings_of(APP / "pyproject.toml").items()
    if key.startswith("tool.flwr.app.config.")
}


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The app's module, imported as Flower does: with the app's own folder on the path."""
    monkeypatch.syspath_prepend(str(APP))
    import classify.settings as module

    yield module
    for name in [name for name in sys.modules if name.split(".")[0] == "classify"]:
        del sys.modules[name]


def pictures(count: int) -> Dataset:
    features = Features({"image": Image(), "label": Value("string")})
    images = [np.full((3, 3), number, dtype=np.uint8) for number in range(count)]
    return Dataset.from_dict({"image": images, "label": [str(n % 2) for n in range(count)]}, features)


@pytest.mark.parametrize("file", ["", "encoder.toml"])
def test_the_apps_own_run_configs_are_right(settings: ModuleType, file: str) -> None:
    given = CONFIG | (settings_of(APP / file) if file else {})
    found = settings.Settings.of(given)
    steps = found.main.num_server_rounds * found.tune.max_steps
    assert found.tune.schedule_steps == steps and found.main.num_server_rounds % found.test.every == 0
    with pytest.raises(ConfigError, match="image-sise"):
        settings.Settings.of({**given, "image-sise": 3})


def test_every_row_is_with_one_owner_and_a_seed_says_with_whom(settings: ModuleType, tmp_path: Path) -> None:
    pictures(60).to_parquet(tmp_path / "train.parquet")
    part = settings.DataPart(str(tmp_path), "", "dirichlet:alpha=0.3")
    shares = [part.shares(3, seed) for seed in (1, 1, 2)]
    values = [[[int(np.asarray(image)[0, 0]) for image in share["image"]] for share in shared] for shared in shares]
    assert sorted(value for share in values[0] for value in share) == list(range(60))
    assert values[0] == values[1] != values[2]
    assert [settings.owner_name(number) for number in range(3)] == ["owner-1", "owner-2", "owner-3"]


def test_text_files_are_taken_too_and_a_missing_side_is_named(settings: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"text": "a", "label": "law"}\n')
    part = settings.DataPart(str(tmp_path), "", "iid")
    assert part.rows("test")[0] == {"text": "a", "label": "law"}
    with pytest.raises(DataError, match=r"holds no public\.parquet and no public\.jsonl: run `make vision-data`"):
        part.rows("public")


@pytest.mark.usefixtures("settings")
def test_a_row_is_shown_as_its_own_picture_or_text(tmp_path: Path) -> None:
    from classify.scoring import _shown

    pictures(2).to_parquet(tmp_path / "test.parquet")
    shown = _shown(Dataset(pq.read_table(tmp_path / "test.parquet"))[1])
    picture = Pil.open(io.BytesIO(base64.b64decode(shown["image"])))
    assert picture.format == "PNG" and np.asarray(picture).tolist() == [[1, 1, 1]] * 3
    assert _shown({"text": "In the beginning", "label": "law"}) == {"text": "In the beginning"}


@pytest.mark.usefixtures("settings")
def test_examples_are_counted_by_class() -> None:
    from classify.server_app import counted

    assert counted(["b", "a", "b"]) == {"examples": 3, "a": 1, "b": 2}
