"""One block whose ranks and channels are scored, by curvature or by a control, and cut."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from offsite_fl.emulators.channel_choice import channel_candidates
from offsite_fl.emulators.channels import ChannelChain, channel_norms, keep_channels
from offsite_fl.emulators.gcs import Candidates, Terms
from offsite_fl.emulators.kfac import Moments
from offsite_fl.emulators.parts import Part
from offsite_fl.emulators.rank_choice import Directions, directions_of, keep_ranks, rank_candidates

Score = Literal["gcs", "magnitude", "random"]
Seen = Mapping[str, tuple[Moments, ...]]


class ScoredBlock:
    """One block while its parts are scored and cut; ``seen`` are the full model's moments at its place."""

    def __init__(self, block: nn.Module, seen: Seen) -> None:
        self.block, self.seen = block, seen
        self._directions: dict[str, Directions] = {}

    def candidates(self, part: Part) -> Candidates:
        """What can be taken out of ``part``, with what it does to the gradient."""
        if isinstance(part.target, ChannelChain):
            return channel_candidates(self.block, part.target, self.seen)
        (moments,) = self.seen[part.target]
        return rank_candidates(self._split(part.target), moments)

    def terms(self, part: Part, score: Score, seed: int) -> Terms:
        """The terms of each candidate's score; for the controls a shift of their own and no slope."""
        if score == "gcs":
            return self.candidates(part).terms()
        if score == "random":
            # torch reads 32 bits of a seed, so all that should matter is hashed into them.
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {part.slot} {part.target}".encode()))
            shifts = torch.rand(part.candidates, generator=generator)
        elif isinstance(part.target, ChannelChain):
            shifts = channel_norms(self.block, part.target)
        else:
            shifts = self._split(part.target).s
        return Terms(shifts, torch.zeros_like(shifts))

    def keep(self, part: Part, kept: Tensor) -> None:
        """Leave only the candidates ``kept`` of ``part`` in the block."""
        if isinstance(part.target, ChannelChain):
            keep_channels(self.block, part.target, kept)
        else:
            keep_ranks(self.block, part.target, self._split(part.target), kept)

    def _split(self, path: str) -> Directions:
        if path not in self._directions:
            self._directions[path] = directions_of(self.block.get_submodule(path))
        return self._directions[path]
