"""Tensors that a site keeps between the rounds of a run: on its own disk, as safetensors, under its own name.

Layout in the cache folder::

    sites/<run key>/<hash of the site's name>/round-00007.safetensors
    sites/<run key>/<hash of the site's name>/used      there once the server has counted on one of them

A file is written whole or not at all. Two are kept: that of the round just done, and the one it went on from, so that
a server which never used the round's reply, or which lost the round and resumes, finds the state that it counts on.
As long as the server says that it never used a reply of this site, nothing that it might still count on is deleted but
what is more than :data:`MAX_UNUSED` such rounds back. A server that counted on a state and then says that there never
was one takes this site for another of its name, or another for this site: that is an error and no new beginning.
States of other runs are deleted when nobody used them for 30 days, or when they aren't among the last ten.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from offsite_fl.bundle.files import discard, write_synced
from offsite_fl.errors import StateError, WireError

log = logging.getLogger("offsite_fl.sites")

FOLDER = "sites"
USED = "used"
FORMAT = "1"
MAX_RUNS = 10
MAX_UNUSED = 8
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

    def load(self, server_round: int, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
        """State as it was after ``server_round``, with the names and shapes of ``like``; None after 0, the beginning.

        ``StateError`` if it isn't here, or if the server counted on one before and now on none: a site that lost its
        state says so and doesn't begin anew in silence.
        """
        if server_round == 0:
            self._must_be_new()
            return None
        path = self._path(server_round)
        if not path.is_file():
            have = ", ".join(map(str, self.rounds())) or "none"
            raise StateError(
                f"the server counts on this site's state after round {server_round}, but rounds kept here: {have}. "
                "Its cache was emptied, or an old checkpoint resumed; under another name the site begins anew"
            )
        tensors = self._read(path)
        where = f"the state of round {server_round} isn't that of this adapter"
        if tensors.keys() != like.keys():
            odd = sorted(tensors.keys() ^ like.keys())[0]
            raise StateError(f"{where}: {odd!r} doesn't belong")
        for name, tensor in tensors.items():
            if tensor.shape != like[name].shape:
                raise StateError(f"{where}: {name!r} is {list(tensor.shape)}, must be {list(like[name].shape)}")
        self._note_used()
        return tensors

    def _must_be_new(self) -> None:
        if (self.folder / USED).exists():
            have = ", ".join(map(str, self.rounds())) or "none"
            raise StateError(
                "the server says that it never used a reply of this site, but it counted on its state before (rounds "
                f"kept here: {have}). Does another site use the same name? Each site needs a name of its own"
            )

    def _note_used(self) -> None:
        try:
            (self.folder / USED).touch(mode=0o600)
        except OSError as error:
            raise self._not_kept(error) from error

    def _not_kept(self, error: OSError) -> StateError:
        # Where it is is for the site's own log; the error goes to the server.
        log.error("the state of a site can't be kept in %s: %s", self.folder, error)
        return StateError(f"this site's state can't be kept: {error.strerror}; the folder is in the site's own log")

    def _read(self, path: Path) -> dict[str, torch.Tensor]:
        try:
            with safe_open(path, framework="pt") as file:
                noted = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            log.error("%s can't be read: %s", path, error)
            raise StateError(f"this site's state of {path.stem} is damaged; the reason is in its own log") from error
        if (noted.get("format"), noted.get("algorithm")) != (FORMAT, self.algorithm):
            raise StateError(
                f"this site's state of {path.stem} is of {noted.get('algorithm')!r}, not {self.algorithm!r}"
            )
        return tensors

    def save(self, server_round: int, tensors: Mapping[str, torch.Tensor], went_on_from: int) -> Path:
        """Keep ``tensors`` as the state after ``server_round``, beside the one that this round ``went_on_from``.

        ``StateError`` if they can't be kept, or aren't finite: then the state before stays.
        """
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise StateError(f"what this site would keep of round {server_round} isn't finite: {name!r}; lower lr")
        try:
            for folder in (self.runs, self.run, self.folder):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            plain = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
            path = self._path(server_round)
            write_synced(path, save(plain, {"format": FORMAT, "algorithm": self.algorithm}), 0o600)
            os.utime(self.run)
        except OSError as error:
            raise self._not_kept(error) from error
        for old in self._superseded(server_round, went_on_from):
            self._path(old).unlink(missing_ok=True)
        self._clean()
        return path

    def _superseded(self, server_round: int, went_on_from: int) -> list[int]:
        """The rounds whose state nobody can count on any more."""
        others = [old for old in self.rounds() if old not in (server_round, went_on_from)]
        return others if went_on_from else others[: 1 - MAX_UNUSED]

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
