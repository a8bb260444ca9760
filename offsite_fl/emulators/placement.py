"""Where CRaSh (arXiv 2310.15477) puts the adapter: spread evenly over the centres of clusters of like blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

from offsite_fl.config import check, kebab
from offsite_fl.emulators import cka
from offsite_fl.emulators.base import Context
from offsite_fl.emulators.clustering import NEVER, centre, clusters
from offsite_fl.errors import EmulatorError
from offsite_fl.models.split import Split

Pooling = Literal["mean", "max", "max-nonpad", "last", "mean-all", "mean-weighted"]

_POOLINGS: dict[str, cka.Pooling] = {kebab(name): name for name in cka.POOLINGS}
# Centred, two examples differ along one line only, and any two blocks look entirely alike on them.
LEAST_EXAMPLES = 3


class Neighbours:
    """Blocks of the full model in forward order, and how alike each is to the next on calibration text.

    ``positions`` are those of the blocks. Two with one of ``between`` between them never share a cluster.
    """

    def __init__(
        self, context: Context, positions: Sequence[int], pooling: Pooling, between: Sequence[int] = ()
    ) -> None:
        self.context, self.positions, self.pooling = context, tuple(positions), pooling
        pairs = zip(self.positions, self.positions[1:], strict=False)
        self.apart = [any(left < other < right for other in between) for left, right in pairs]

    @property
    def stretches(self) -> int:
        """Number of parts that clusters can't cross."""
        return 1 + sum(self.apart)

    @cached_property
    def similarities(self) -> tuple[float, ...]:
        """Linear CKA of the pooled states behind each block and the next; worked out when first asked for."""
        states = cka.pooled_states(self.context, _POOLINGS[self.pooling])
        if len(states[0]) < LEAST_EXAMPLES:
            raise EmulatorError(
                f"blocks are compared by how examples differ, which takes {LEAST_EXAMPLES} or more: give more "
                f"calibration text than {len(states[0])} example(s), or a smaller block size"
            )
        pairs = zip(self.positions, self.positions[1:], self.apart, strict=False)
        return tuple(NEVER if apart else cka.linear_cka(states[left], states[right]) for left, right, apart in pairs)

    def centres(self, count: int) -> tuple[int, ...]:
        """The positions at the centre of ``count`` clusters, in order."""
        if count == len(self.positions):
            return self.positions  # nothing to compare, so no text is needed
        return tuple(self.positions[centre(cluster)] for cluster in clusters(self.similarities, count))


def spread_ranks(kept: int, adapter: int) -> tuple[int, ...]:
    """Which of ``kept`` blocks are the ``adapter`` ones: ranks ``ceil(i * (kept - 1) / (adapter - 1))`` from 0.

    ``ConfigError`` unless ``2 <= adapter < kept``: one block has no ends to lie at, and one must be left to freeze.

    >>> spread_ranks(12, 4), spread_ranks(22, 4)
    ((0, 4, 8, 11), (0, 7, 14, 21))
    """
    check(
        2 <= adapter < kept,
        f"an adapter of {adapter} can't be spread over {kept} kept blocks: it takes 2 or more, and fewer than are kept",
    )
    return tuple(-(-i * (kept - 1) // (adapter - 1)) for i in range(adapter))


def spread_split(context: Context, keep: int, adapter: int = 4, pooling: Pooling = "mean-weighted") -> Split:
    """The split of CRaSh: all blocks in ``keep`` clusters, of whose centres the adapter is evenly spread ones.

    A bundle with this split and ``crash:keep=<keep - adapter>,placement=spread`` is CRaSh as published, if the
    calibration text is the same.

    Args:
        context: of a model owner with any split at all; its ``calibration`` is read.
        keep: blocks that are kept in all, the adapter's included; at most as many as the model has.
        adapter: how many of them are adapter, 2 or more.
        pooling: as the option of ``crash``.

    Returns:
        A ``Split(at=...)``. ``ConfigError`` if the numbers don't fit, ``EmulatorError`` without calibration text.
    """
    depth = context.blocks.depth
    check(keep <= depth, f"{keep} blocks can't be kept: the model has {depth}")
    check(pooling in _POOLINGS, f"unknown pooling {pooling!r}; there are {', '.join(_POOLINGS)}")
    ranks = spread_ranks(keep, adapter)
    centres = Neighbours(context, range(depth), pooling).centres(keep)
    return Split(at=tuple(centres[rank] for rank in ranks))
