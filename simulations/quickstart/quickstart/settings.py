"""The run config as dataclasses: unknown keys and wrong types are refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offsite_fl.config import TuneConfig, cache_root, from_mapping
from offsite_fl.errors import DataError, ModelError

GROUPS = ("tune.", "data.", "test.", "baseline.", "repair.", "run.")


def model_path(model: str) -> str:
    """What to open for the run config's ``model``: ``pico`` stands for a folder in the cache."""
    if model != "pico":
        return model
    folder = cache_root() / "pico"
    if not folder.is_dir():
        raise ModelError(f"the model 'pico' isn't in {folder}: make it once by `make pico`")
    return str(folder)


@dataclass(frozen=True)
class Main:
    """The keys without a dot."""

    model: str
    split: str
    emulator: str
    bundle_dtype: str
    bundle_shard_size: str
    calibration_tokens: int
    strategy: str
    num_server_rounds: int
    min_results: int
    max_update_norm: float
    clip_update_norm: float
    max_norm_ratio: float
    min_cosine: float | None
    streaming: bool
    round_deadline: float
    quorum: int
    codec: str
    delivery_timeout: float
    seed: int
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
    """How much held-out text, and every how many rounds."""

    tokens: int
    every: int


@dataclass(frozen=True)
class BaselinePart:
    """The fifth row."""

    run: bool
    lr: float


@dataclass(frozen=True)
class RepairPart:
    """What tuning did only to put the emulator right, taken out of the plug-in (docs/emulators.md)."""

    run: bool
    share: float
    scale: float


@dataclass(frozen=True)
class RunPart:
    """Where results go."""

    folder: str
    resume: bool
    keep_checkpoints: int
    save_model: bool


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
        main = {key: value for key, value in run_config.items() if not key.startswith(GROUPS)}
        tune = {key: value for key, value in run_config.items() if key.startswith("tune.")} | {
            "tune.seed": main["seed"]
        }
        return cls(
            from_mapping(Main, main),
            from_mapping(TuneConfig, tune, "tune."),
            DataPart.of(run_config),
            from_mapping(TestPart, run_config, "test."),
            from_mapping(BaselinePart, run_config, "baseline."),
            from_mapping(RepairPart, run_config, "repair."),
            from_mapping(RunPart, run_config, "run."),
        )
