"""One folder a round: arrays as safetensors, everything else as JSON. Written whole or not at all.

``<run>/checkpoints/round-007/state.safetensors`` and ``state.json``. The JSON carries the SHA-256 of the arrays and
is written last; a folder without it isn't a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from offsite_fl.errors import CheckpointError

FORMAT = 1
FOLDER, ARRAYS, TABLE = "checkpoints", "state.safetensors", "state.json"
_ROUND = re.compile(r"round-(\d{3,})")


@dataclass
class Checkpoint:
    """Everything that a run needs to go on after a round.

    ``phase`` is "trained" after aggregation and "done" when the round's evaluation is in too. ``arrays`` holds the
    adapter under ``adapter/`` and the wrapped strategy's arrays under the names that ``strategy`` refers to.
    ``settings`` are compared on resume.
    """

    round: int
    phase: Literal["trained", "done"]
    settings: dict[str, Any]
    strategy: dict[str, Any]
    rng: dict[str, Any]
    ledger: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)

    def save(self, run_dir: Path, *, keep: int | None = None) -> Path:
        """Write to ``run_dir`` and delete all but the latest ``keep`` checkpoints (None: delete none).

        Where this round's arrays are already there (phase "trained" before "done"), only the table is rewritten.
        """
        folder = _folder(run_dir, self.round)
        if folder.is_dir() and self.phase == "done":
            digest = json.loads((folder / TABLE).read_text())["arrays_sha256"]
            self._write_table(folder, digest)
            return folder
        stage = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
        stage.mkdir(parents=True)
        try:
            # ascontiguousarray makes 1-d of 0-d, reshape undoes it
            plain = {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in self.arrays.items()}
            save_file(plain, stage / ARRAYS)
            with (stage / ARRAYS).open("rb") as file:
                os.fsync(file.fileno())
            self._write_table(stage, _sha256(stage / ARRAYS))
            if folder.exists():  # the same round once more, after a resume from an earlier one
                shutil.rmtree(folder)
            os.replace(stage, folder)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise
        for old in existing(run_dir)[:-keep] if keep is not None else ():
            shutil.rmtree(_folder(run_dir, old))
        return folder

    def _write_table(self, folder: Path, digest: str) -> None:
        table = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "arrays"}
        table |= {"format": FORMAT, "arrays_sha256": digest}
        stage = folder / f".{TABLE}"
        with stage.open("w", encoding="utf-8") as file:
            json.dump(table, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(stage, folder / TABLE)

    @classmethod
    def load(cls, folder: Path) -> Checkpoint:
        """Read a checkpoint; ``CheckpointError`` says what is damaged or of another version."""
        try:
            table = json.loads((folder / TABLE).read_text(encoding="utf-8"))
            if table.pop("format") != FORMAT:
                raise CheckpointError(f"checkpoint {folder} is of another format, this version reads {FORMAT}")
            if table.pop("arrays_sha256") != _sha256(folder / ARRAYS):
                raise CheckpointError(f"checkpoint {folder} is damaged: {ARRAYS} isn't what was written")
            return cls(**table, arrays=load_file(folder / ARRAYS))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise CheckpointError(f"checkpoint {folder} can't be read: {error}") from error


def existing(run_dir: Path) -> list[int]:
    """Rounds that have a checkpoint in ``run_dir``, in order."""
    folder = run_dir / FOLDER
    if not folder.is_dir():
        return []
    found = ((_ROUND.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted(int(match[1]) for match, path in found if match and (path / TABLE).is_file())


def check_unused(run_dir: Path) -> None:
    """``CheckpointError`` if ``run_dir`` holds a run, which a new one would write over."""
    if rounds := existing(run_dir):
        raise CheckpointError(f"{run_dir} holds a run of {rounds[-1]} rounds; resume it or take another folder")


def latest(run_dir: Path) -> Checkpoint | None:
    """The checkpoint of the last round in ``run_dir``, None if there is none."""
    rounds = existing(run_dir)
    return Checkpoint.load(_folder(run_dir, rounds[-1])) if rounds else None


def check_settings(found: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings than those of the checkpoint; ``CheckpointError`` lists what differs."""
    found = json.loads(json.dumps(found))
    now = json.loads(json.dumps(now))
    differing = [
        f"{key} was {found.get(key, 'absent')!r} and is {now.get(key, 'absent')!r}"
        for key in sorted(found.keys() | now.keys())
        if found.get(key) != now.get(key)
    ]
    if differing:
        raise CheckpointError(
            f"the checkpoint was made with other settings: {'; '.join(differing)}. "
            "Resume with the same ones, or start a new run in another folder"
        )


def _folder(run_dir: Path, server_round: int) -> Path:
    return run_dir / FOLDER / f"round-{server_round:03d}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
