"""Tensors that a site keeps between the rounds of a run: on its own disk, as safetensors, under its own name.

Layout in the cache folder::

    sites/<run key>/<hash of the site's name>/round-00007.safetensors

A file is written whole or not at all. At most two are kept: that of the round just done, and the one it went on from,
so that a server which never used the round's reply, or which lost the round and resumes, finds the state that it
counts on. States of other runs are deleted when nobody used them for 30 days, or when they aren't among the last ten.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from offsite_fl.bundle.files import discard, write_synced
from offsite_fl.errors import StateError, WireError

FOLDER = "sites"
FORMAT = "1"
MAX_RUNS = 10
MAX_AGE_SECONDS = 30 * 24 * 3600.0
_FILE = re.compile(r"round-(\d{5,})\.safetensors")
_KEY = re.compile(r"[0-9a-f]{32}")


class SiteState:
    """What the site called ``site`` keeps in the run ``run_key`` (32 hex digits); ``root`` is the cache's folder."""

    def __init__(self, root: Path, run_key: str, site: str, algorithm: str) -> None:
        if not _KEY.fullmatch(run_key):  # it comes over the network and becomes a path
            raise WireError(f"the key of a run must be 32 hex digits, got {ascii(run_key)[:60]}")
        self.runs = root / FOLDER
        self.run = self.runs / run_key
        self.folder = self.run / hashlib.sha256(site.encode()).hexdigest()[:16]
        self.algorithm = algorithm

    def rounds(self) -> list[int]:
        """The rounds whose state is here, in order."""
        found = (_FILE.fullmatch(path.name) for path in (self.folder.iterdir() if self.folder.is_dir() else ()))
        return sorted(int(match[1]) for match in found if match)

    def load(self, server_round: int, like: Iterable[str]) -> dict[str, torch.Tensor] | None:
        """State as it was after ``server_round``, which has the names ``like``; None after round 0, the beginning.

        ``StateError`` if it isn't here: a site that lost its state says so and doesn't begin anew in silence.
        """
        if server_round == 0:
            return None
        path = self._path(server_round)
        if not path.is_file():
            have = ", ".join(map(str, self.rounds())) or "none"
            raise StateError(
                f"the server counts on this site's state after round {server_round}, but rounds kept here: {have}. "
                "Its cache was emptied, or an old checkpoint resumed; under another name the site begins anew"
            )
        tensors = self._read(path)
        if tensors.keys() != set(like):
            odd = sorted(tensors.keys() ^ set(like))[0]
            raise StateError(f"the state of round {server_round} isn't that of this adapter: {odd!r} doesn't belong")
        return tensors

    def _read(self, path: Path) -> dict[str, torch.Tensor]:
        try:
            with safe_open(path, framework="pt") as file:
                noted = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise StateError(f"this site's state of {path.stem} is damaged: {error}") from error
        if (noted.get("format"), noted.get("algorithm")) != (FORMAT, self.algorithm):
            raise StateError(
                f"this site's state of {path.stem} is of {noted.get('algorithm')!r}, not {self.algorithm!r}"
            )
        return tensors

    def save(self, server_round: int, tensors: Mapping[str, torch.Tensor], went_on_from: int) -> Path:
        """Keep ``tensors`` as the state after ``server_round``, beside the one that this round ``went_on_from``."""
        try:
            for folder in (self.runs, self.run, self.folder):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            plain = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
            path = self._path(server_round)
            write_synced(path, save(plain, {"format": FORMAT, "algorithm": self.algorithm}), 0o600)
            os.utime(self.run)
        except OSError as error:
            raise StateError(f"this site's state can't be kept in {self.folder}: {error.strerror}") from error
        for old in self.rounds():
            if old not in (server_round, went_on_from):
                self._path(old).unlink(missing_ok=True)
        self._clean()
        return path

    def _path(self, server_round: int) -> Path:
        return self.folder / f"round-{server_round:05d}.safetensors"

    def _clean(self) -> None:
        """Delete what other runs left behind."""
        ages: list[tuple[float, Path]] = []
        for run in self.runs.iterdir():
            with suppress(FileNotFoundError):  # another process deletes it at the same time
                if run != self.run:
                    ages.append((time.time() - run.stat().st_mtime, run))
        for place, (age, run) in enumerate(sorted(ages), start=1):
            if age > MAX_AGE_SECONDS or place >= MAX_RUNS:
                discard(run)
