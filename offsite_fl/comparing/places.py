"""Where things lie in the folder of a comparison, and the names of what they depend on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offsite_fl.comparing.cells import Cell
from offsite_fl.comparing.partitions import parse_partition
from offsite_fl.comparing.settings import GridSettings
from offsite_fl.config import TuneConfig, to_mapping
from offsite_fl.emulators import parse_emulator
from offsite_fl.models.split import Split

# Raised when a cell's numbers come to mean something else, so that old ones are measured anew.
FORMAT = 1
WHOLE = "whole"  # in place of an emulator: the middle as it is
_NOT_IN_KEY = ("device", "progress")


@dataclass(frozen=True)
class Inputs:
    """Digests of what a comparison begins with, and the depth of its model."""

    model: str
    depth: int
    rows: str
    test: str
    public: str

    @classmethod
    def of(cls, settings: GridSettings, model: str, depth: int) -> Inputs:
        """From the files that ``settings`` names and the model's fingerprint."""
        rows = hashlib.sha256()
        for owner, path in zip(settings.data.owners, settings.data.owner_files(), strict=True):
            rows.update(f"{owner} {digest_of_file(path)}\n".encode())
        test, public = (digest_of_file(settings.data.file(name)) for name in (settings.data.test, settings.data.public))
        return cls(model, depth, rows.hexdigest(), test, public)


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(value: Any) -> str:
    """SHA-256 of a value in JSON's own types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Places:
    """Paths and keys of one comparison."""

    settings: GridSettings
    inputs: Inputs
    out: Path

    def split(self, cell: Cell) -> Split:
        """Where the cell's model is cut. LoRA on the full model leaves one block out, the middle one, for a bundle
        has at least one block that stands for the middle; that one is frozen and uncompressed."""
        if cell.arm.role != "full-lora":
            return Split.parse(self.settings.model.split)
        left_out = self.inputs.depth // 2
        return Split(at=tuple(index for index in range(self.inputs.depth) if index != left_out))

    def emulator(self, cell: Cell) -> str:
        """What stands for the middle in the cell's bundle."""
        return cell.arm.emulator or WHOLE

    def bundle(self, cell: Cell) -> Path:
        """Folder of the cell's bundle; cells with the same emulator and split share it."""
        emulator, model = self.emulator(cell), self.settings.model
        made_of = [FORMAT, self.inputs.model, self.inputs.public, str(self.split(cell)), model.calibration_tokens]
        spec = emulator if emulator == WHOLE else repr(parse_emulator(emulator))
        name = digest_of([*made_of, model.bundle_dtype, self.settings.tune.block_size, spec])
        return self.out / "bundles" / name[:16]

    def data(self, cell: Cell) -> Path | None:
        """Folder with one file a client; None for a reference that knows no partition."""
        if cell.condition.partition is None or cell.condition.clients is None:
            return None
        return self.data_folder(cell.condition.partition, cell.condition.clients, cell.seed)

    def data_folder(self, partition: str, clients: int, seed: int) -> Path:
        """Folder of one division of the rows."""
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", partition).strip("-")
        return self.out / "data" / f"{slug}-{clients}" / f"seed-{seed}"

    def state(self, key: str) -> Path:
        """Folder of what the clients of the cell with this key remember between its rounds."""
        return self.out / "work" / "sites" / key[:16]

    def tune(self, cell: Cell) -> TuneConfig:
        """How the cell's clients tune in a round."""
        tune, baselines = self.settings.tune_of(cell.arm.strategy, cell.seed), self.settings.baselines
        if cell.arm.role == "full-lora":
            lr = baselines.lora_lr or tune.lr
            return dataclasses.replace(tune, lora_rank=baselines.lora_rank, lora_fresh=False, lr=lr)
        if cell.arm.role == "full-fine-tuning":
            return dataclasses.replace(tune.without_lora(), lr=baselines.full_lr)
        return tune

    def key(self, cell: Cell) -> str:
        """SHA-256 over everything that the cell's numbers depend on."""
        axes, condition = self.settings.grid, dict(vars(cell.condition))
        if cell.condition.partition is not None:
            condition["partition"] = repr(parse_partition(cell.condition.partition))
        tune = {k: v for k, v in to_mapping(self.tune(cell)).items() if k not in _NOT_IN_KEY}
        emulator = cell.arm.emulator and repr(parse_emulator(cell.arm.emulator))
        parts: dict[str, Any] = {
            "format": FORMAT,
            "inputs": vars(self.inputs),
            "split": str(self.split(cell)),
            "arm": [cell.arm.role, cell.arm.strategy, emulator],
            "condition": condition,
            "attackers": [axes.attack_package, axes.attackers] if cell.condition.attack else None,
            "seed": cell.seed,
            "tune": tune if cell.arm.role != "zero-shot" else None,
            "rounds": axes.rounds,
            "codec": axes.codec,
            "test": vars(self.settings.test),
            "bundle": [self.settings.model.calibration_tokens, self.settings.model.bundle_dtype],
        }
        return digest_of(parts)


def whole_run(tune: TuneConfig, rounds: int) -> TuneConfig:
    """The settings of one call that does as many steps as all rounds of one client."""
    if tune.max_steps is not None:
        return dataclasses.replace(tune, max_steps=tune.max_steps * rounds, epochs=1.0)
    return dataclasses.replace(tune, epochs=tune.epochs * rounds)
