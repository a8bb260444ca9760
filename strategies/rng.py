"""The random state that a server uses: sampling of nodes (python), noise of privacy wrappers (numpy), torch."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from offsite_fl.errors import CheckpointError


def rng_state() -> dict[str, Any]:
    """State of the three global generators as plain data."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": bytes(torch.get_rng_state().numpy()).hex(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Go on from what :func:`rng_state` gave."""
    try:
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))
        name, keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
        torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["torch"]), dtype=torch.uint8))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the checkpoint's random state can't be used: {error}") from error
