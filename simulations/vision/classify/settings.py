"""The run config as dataclasses: unknown keys and wrong types are refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset

from offsite_fl.apps import BaselinePart, FederationKeys, RunPart, parts_of
from offsite_fl.config import TuneConfig, cache_root, from_mapping
from offsite_fl.data.sources import load_source
from offsite_fl.errors import DataError

LABEL = "label"


@dataclass(frozen=True)
class Main(FederationKeys):
    """The keys without a dot."""

    task: str
    head: tuple[str, ...]
    image_size: int


@dataclass(frozen=True)
class DataPart:
    """Which files, and how what is to be tuned on is divided among simulated owners."""

    folder: str
    corpus: str
    partition: str

    @classmethod
    def of(cls, run_config: Mapping[str, Any]) -> DataPart:
        """From a run config."""
        return from_mapping(cls, run_config, "data.")

    def file(self, side: str) -> Path:
        """``public``, ``test`` or ``train``, as ``.parquet`` or ``.jsonl``; ``DataError`` if there is neither."""
        folder = Path(self.folder) if self.folder else cache_root() / self.corpus
        for suffix in (".parquet", ".jsonl"):
            if (path := folder / f"{side}{suffix}").is_file():
                return path
        raise DataError(
            f"{folder} holds no {side}.parquet and no {side}.jsonl: run `make vision-data`, or set data.folder to a "
            "folder with your own files"
        )

    def rows(self, side: str) -> Dataset:
        """The rows of one side; images are opened when they are looked at."""
        path = self.file(side)
        return Dataset(pq.read_table(path)) if path.suffix == ".parquet" else load_source(path)

    def shares(self, owners: int, seed: int) -> list[Dataset]:
        """What each simulated owner has of the rows to be tuned on: every row is with one of them."""
        from offsite_fl.comparing.partitions import OWNER, parse_partition  # flwr-datasets is for simulations only

        rows = self.rows("train")
        domains = Dataset.from_dict({OWNER: rows[LABEL]})
        return [rows.select(share) for share in parse_partition(self.partition).divide(domains, owners, seed)]


@dataclass(frozen=True)
class TestPart:
    """How many test rows, every how many rounds, and how many of them are shown with the networks' answers."""

    examples: int
    every: int
    shown: int


@dataclass(frozen=True)
class Settings:
    """All of it."""

    main: Main
    tune: TuneConfig
    data: DataPart
    test: TestPart
    baseline: BaselinePart
    run: RunPart

    @classmethod
    def of(cls, run_config: Mapping[str, Any]) -> Settings:
        """From a run config; ``ConfigError`` names the key that is wrong."""
        main, tune, parts = parts_of(run_config, Main, data=DataPart, test=TestPart, baseline=BaselinePart, run=RunPart)
        return cls(main, tune, **parts)


def owner_name(partition: int) -> str:
    """What reports call a simulated owner."""
    return f"owner-{partition + 1}"
