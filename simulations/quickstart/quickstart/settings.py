"""The run config as dataclasses: unknown keys and wrong types are refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from offsite_fl.apps import BaselinePart, FederationKeys, RunPart, parts_of
from offsite_fl.config import TuneConfig, cache_root, from_mapping
from offsite_fl.errors import DataError, ModelError


def model_path(model: str) -> str:
    """What to open for the run config's ``model``: ``pico`` stands for a folder in the cache."""
    if model != "pico":
        return model
    folder = cache_root() / "pico"
    if not folder.is_dir():
        raise ModelError(f"the model 'pico' isn't in {folder}: make it once by `make pico`")
    return str(folder)


@dataclass(frozen=True)
class Main(FederationKeys):
    """The keys without a dot."""

    calibration_tokens: int
    attack: str
    attackers: tuple[int, ...]

    def model_path(self) -> str:
        """What to open: ``model``, or the folder in the cache that ``pico`` stands for."""
        return model_path(self.model)


@dataclass(frozen=True)
class DataPart:
    """Whose files, and where."""

    folder: str
    corpus: str
    owners: tuple[str, ...]

    @classmethod
    def of(cls, run_config: Mapping[str, Any]) -> DataPart:
        """From a run config."""
        return from_mapping(cls, run_config, "data.")

    def file(self, stem: str, suffix: str = ".jsonl") -> Path:
        """Path of one file; ``DataError`` if it isn't there."""
        folder = Path(self.folder) if self.folder else cache_root() / self.corpus
        path = folder / f"{stem}{suffix}"
        if not path.is_file():
            raise DataError(f"{path} is missing: run `make texts`, or set data.folder to a folder with your own files")
        return path


@dataclass(frozen=True)
class TestPart:
    """How much held-out text, every how many rounds, and what is measured on it.

    ``measure`` is "loss" on text, or "accuracy" where the test file holds multiple choice.
    """

    tokens: int
    every: int
    measure: Literal["loss", "accuracy"]

    def examples(self, block_size: int) -> int:
        """How many examples of that size the tokens are, as :class:`offsite_fl.measure.Measure` counts them."""
        return max(1, self.tokens // block_size)


@dataclass(frozen=True)
class RepairPart:
    """What tuning did only to put the emulator right, taken out of the plug-in (docs/emulators.md)."""

    run: bool
    share: float
    scale: float


@dataclass(frozen=True)
class Settings:
    """All of it."""

    main: Main
    tune: TuneConfig
    data: DataPart
    test: TestPart
    baseline: BaselinePart
    repair: RepairPart
    run: RunPart

    @classmethod
    def of(cls, run_config: Mapping[str, Any]) -> Settings:
        """From a run config; ``ConfigError`` names the key that is wrong."""
        main, tune, parts = parts_of(
            run_config,
            Main,
            data=DataPart,
            test=TestPart,
            baseline=BaselinePart,
            repair=RepairPart,
            run=RunPart,
        )
        return cls(main, tune, **parts)
