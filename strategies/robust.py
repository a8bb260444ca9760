"""Replies held against each other: norms against the round's median, directions against the median update.

Screening alone looks at one reply at a time, so an update that is well-formed passes whatever it says. These bounds
need the replies of a whole round. They hold as long as most replies are honest.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ArrayRecord, Message

from offsite_fl.config import check
from offsite_fl.wire.records import numpy_array, only_arrays

from .journal import log
from .screening import Screened

Tensors = Mapping[str, torch.Tensor]

# Of two replies nobody can say which one is the odd one.
LEAST_NORMS = 3
# One is held against the median of the others, and of two others one bad one decides.
LEAST_DIRECTIONS = 4
# Values of a tensor that are in work at once, of all replies in fp64.
CHUNK = 2**18


@dataclass(frozen=True)
class Bounds:
    """What an update may be, None where there is no bound.

    ``max_update_norm``: replies farther from the sent adapter are dropped. ``clip_update_norm``: their update is scaled
    down to this norm instead. ``max_norm_ratio``: replies whose norm is more than this times the median norm of the
    round are dropped. ``min_cosine``: replies whose update points elsewhere than the median of the others' are
    dropped, and those that changed nothing.
    """

    max_update_norm: float | None = None
    clip_update_norm: float | None = None
    max_norm_ratio: float | None = None
    min_cosine: float | None = None

    def __post_init__(self) -> None:
        most, clip, ratio, cosine = self.max_update_norm, self.clip_update_norm, self.max_norm_ratio, self.min_cosine
        check(most is None or most > 0, "max-update-norm must be above 0")
        check(clip is None or (clip > 0 and math.isfinite(clip)), f"clip-update-norm must be above 0, got {clip}")
        check(ratio is None or ratio > 1, f"max-norm-ratio must be above 1, the median's own ratio, got {ratio}")
        check(cosine is None or -1 <= cosine <= 1, f"min-cosine must lie from -1 to 1, got {cosine}")

    def clips(self, norm: float) -> bool:
        """Whether an update of this norm is scaled down."""
        return self.clip_update_norm is not None and norm > self.clip_update_norm

    @property
    def by_comparison(self) -> tuple[str, ...]:
        """The bounds in use that need all replies of a round at once."""
        return tuple(name for name in ("max_norm_ratio", "min_cosine") if getattr(self, name) is not None)


def compare(screened: Screened, sent: Tensors, bounds: Bounds) -> Screened:
    """Leave out the good replies that are too far from the others, in norm first and then in direction.

    The norm is that of the update before it was clipped. With too few replies nothing is left out.
    """
    if bounds.max_norm_ratio is not None:
        screened = _by_norm(screened, bounds.max_norm_ratio)
    if bounds.min_cosine is not None:
        screened = _by_direction(_that_moved(screened), sent, bounds.min_cosine)
    return screened


def _by_norm(screened: Screened, ratio: float) -> Screened:
    norms = {node: screened.norms[node] for node, _ in screened.good}
    if len(norms) < LEAST_NORMS:
        log.info("max-norm-ratio isn't applied: %d good replies, %d are needed", len(norms), LEAST_NORMS)
        return screened
    median = statistics.median(norms.values())
    if median == 0:
        log.info("max-norm-ratio isn't applied: the median norm is 0, most replies changed nothing")
        return screened
    bound = ratio * median
    bad = {
        node: f"the update's norm is {norm:.4g}, the bound is {ratio:g} times the round's median {median:.4g}"
        for node, norm in norms.items()
        if norm > bound
    }
    return screened.without(bad)


def _that_moved(screened: Screened) -> Screened:
    bad = {
        node: "the reply is what was sent: an update of zero has no direction (a free rider, or a learning rate of 0)"
        for node, _ in screened.good
        if screened.norms[node] == 0
    }
    return screened.without(bad)


def _by_direction(screened: Screened, sent: Tensors, least: float) -> Screened:
    if len(screened.good) < LEAST_DIRECTIONS:
        log.info("min-cosine isn't applied: %d good replies, %d are needed", len(screened.good), LEAST_DIRECTIONS)
        return screened
    cosines = cosines_to_median([message for _, message in screened.good], sent)
    bad = {
        node: f"the update's cosine with the median of the others' is {cosine:.4g}, the bound is {least:g}"
        for (node, _), cosine in zip(screened.good, cosines, strict=True)
        if cosine < least
    }
    return screened.without(bad)


def cosines_to_median(replies: Sequence[Message], sent: Tensors) -> list[float]:
    """Cosine of each reply's update ``u = reply - sent`` with the coordinate-wise median ``m`` of the others' updates.

    ``<u, m> / (|u| |m|)`` over all tensors together, in fp64; 0 where one of the two is zero. At least two replies. An
    update has a part in the median of all: with few replies in many dimensions that alone makes a cosine of 0.4, also
    of a flipped one. Against the median of the others 0 is what updates without anything in common have.

    Works through one piece of one tensor at a time: beside the replies it holds a few times
    ``len(replies) * CHUNK`` values.
    """
    records = [only_arrays(message.content)[1] for message in replies]
    products, squares, median_squares = (np.zeros(len(records)) for _ in range(3))
    for name, value in sent.items():
        flat = [_flat(record, name, tuple(value.shape)) for record in records]
        start = value.detach().reshape(-1).numpy()
        for low in range(0, start.size, CHUNK):
            part = slice(low, low + CHUNK)
            updates = np.stack([values[part] for values in flat]).astype(np.float64) - start[part].astype(np.float64)
            medians = medians_of_others(updates)
            products += np.einsum("nd,nd->n", updates, medians)
            squares += np.einsum("nd,nd->n", updates, updates)
            median_squares += np.einsum("nd,nd->n", medians, medians)
    lengths = np.sqrt(squares) * np.sqrt(median_squares)
    return [float(cosine) for cosine in np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)]


def medians_of_others(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """For each row of ``values`` [n, d], n at least 2, the coordinate-wise median of all other rows [n, d].

    Which values are in the middle once a row is gone depends only on which side of the middle its own value lies.
    """
    half = len(values) // 2
    found: npt.NDArray[np.float64]
    if len(values) % 2 == 0:
        below, above = np.partition(values, (half - 1, half), axis=0)[half - 1 : half + 1]
        found = np.where(values <= below, above, below)
        return found
    below, middle, above = np.partition(values, (half - 1, half, half + 1), axis=0)[half - 1 : half + 2]
    low, high = np.where(values > middle, below, middle), np.where(values < middle, above, middle)
    own = values == middle
    found = (np.where(own, below, low) + np.where(own, above, high)) / 2
    return found


def _flat(record: ArrayRecord, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """One tensor of a screened reply as a row of values that shares the message's memory."""
    return numpy_array(record[name], name, "float32", shape).reshape(-1)
