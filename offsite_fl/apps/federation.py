"""The bundle and the strategy that a run config asks for."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offsite_fl.apps.settings import FederationKeys, RunPart
from offsite_fl.config import TuneConfig
from offsite_fl.data.sources import Source
from offsite_fl.owner import ModelOwner
from offsite_fl.strategies import OffsiteTuning
from offsite_fl.strategies.checkpoint import check_unused
from offsite_fl.strategies.named import make_strategy


def seed_everything(seed: int) -> None:
    """What this process draws at random: Flower samples nodes with ``random``, its privacy wrappers use numpy."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def open_bundle(owner: ModelOwner, keys: FederationKeys, run: RunPart, **options: Any) -> None:
    """Make the bundle in the run's folder, or take up the one that a run to be resumed has made there.

    ``options`` go to :meth:`~offsite_fl.owner.ModelOwner.make_bundle`.
    """
    folder = Path(run.folder).absolute()
    if run.resume and (folder / "bundle").is_dir():
        owner.use_bundle(folder / "bundle")
        return
    check_unused(folder)  # before the bundle of the run that is there is replaced
    owner.make_bundle(
        keys.emulator,
        folder / "bundle",
        dtype=getattr(torch, keys.bundle_dtype) if keys.bundle_dtype else None,
        shard_bytes=keys.bundle_shard_size,
        seed=keys.seed,
        workdir=folder / "work",
        progress=True,
        **options,
    )


def make_strategy_for(
    owner: ModelOwner, keys: FederationKeys, tune: TuneConfig, run: RunPart, public: Source | None
) -> OffsiteTuning:
    """The strategy that ``keys`` name around the owner's bundle; limits that are 0 in a run config are off."""
    return OffsiteTuning(
        make_strategy(keys.strategy),
        owner,
        codec=keys.codec,
        tune=tune,
        min_results=keys.min_results,
        max_update_norm=keys.max_update_norm or None,
        clip_update_norm=keys.clip_update_norm or None,
        max_norm_ratio=keys.max_norm_ratio or None,
        min_cosine=keys.min_cosine,
        streaming=keys.streaming,
        round_deadline=keys.round_deadline or None,
        quorum=keys.quorum or None,
        public=public,
        run_dir=Path(run.folder).absolute(),
        resume=run.resume,
        keep_checkpoints=run.keep_checkpoints,
        delivery_timeout=keys.delivery_timeout,
    )
