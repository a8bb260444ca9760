"""Output alignment: what blocks of the emulator write to the stream, re-fitted so that the full model's comes out.

A block that is a plain sum of its input and of the outputs of a few linears (attention output, MLP output) can be
given any affine map of what these linears read. :class:`Align` takes the map that brings the stream behind the block
nearest to the full model's and stores it in the linears that are there, so nothing is added to the network but biases.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from offsite_fl.config import check, check_choices
from offsite_fl.emulators.base import Context, Emulator, EmulatorBlock, EmulatorMethod, register
from offsite_fl.emulators.streams import Stream, read_batches, running_order, sent_home, working_copy
from offsite_fl.emulators.weights import refuse_quantized
from offsite_fl.emulators.writer_fit import WriterFit, refit_writer, states_behind, stream_writers

Where = Literal["last", "first", "ends", "all"]

NO_SUM = "what it adds to the stream isn't a plain sum of the outputs of its linears"
NO_NEARER = "re-fitted, it brings the stream on the calibration text no nearer to the full model's"


@register("align")
@dataclass(frozen=True)
class Align(EmulatorMethod):
    """Re-fit what the emulator's last block writes, so that the full model's hidden state comes out; before `quantize`.

    Ours. Runs behind any method (``layer-drop:keep=0.5+align``). A linear ``W x + b`` that writes to the residual
    stream becomes the one that minimises, over the tokens of the calibration text without padding,
    ``sum ||t - (s + W' x + b')||^2 + ridge * v * ||W' - W||^2``: ``s`` is the emulator's stream without this linear's
    output, ``t`` the full model's, and ``v`` the mean over the inputs ``x_i`` of ``sum (x_i - mean x_i)^2``. It is
    solved in closed form, in fp64, and matches mean, scale and direction. Where the linear has no bias it gets one,
    which is all that the emulator grows by.

    ``t`` behind a block is the full model's stream in front of the next block that the emulated network runs, so
    dropped blocks are made up for. A block with a writer behind attention and one behind its MLP is tried with the
    second re-fitted alone, and with the first re-fitted before it, towards the full model's stream behind its own
    attention at that place. The one that comes nearer to ``t`` is taken, and if none does the block stays as it was. So
    behind a re-fitted block the squared error on the calibration text is less than without that re-fit, and, if it runs
    once, the mean is the full model's but for rounding.

    ``where``: ``last``, the block in front of the adapter's next one (with a spread adapter there are several);
    ``first``, the one behind it; ``ends``, both; ``all``, every block from front to back, each on what the re-fitted
    ones before it hand on. A block that runs at ``k`` places is fitted at the last of them, on what it reads there,
    and gets ``1 / k`` of the change in weight and bias; it stays as it was unless the stream behind that place comes
    nearer with the new one at all ``k``. (The whole change at each place goes too far, and was worse in trials.)

    ``rank`` bounds the rank of ``W' - W`` (reduced-rank regression, the best of that rank for the sum above); empty is
    the full map. ``W'`` is stored merged. Of a low-rank linear only the second factor changes, with ``x`` what the
    first one gives, so its bytes stay. ``ridge`` ties to the present weight; more of it for less calibration text.

    A block that isn't such a sum (norms behind attention or MLP as in Gemma 2, scaled residuals, experts) stays as it
    was, with a note. Packed weights are refused.
    """

    where: Where = "last"
    rank: int | None = None
    ridge: float = 0.1

    def __post_init__(self) -> None:
        check_choices(self)
        possible = self.rank is None or self.rank >= 1
        check(possible, f"align rank = {self.rank!r} must be 1 or more, or empty for a full map")
        check(self.ridge > 0, f"align ridge = {self.ridge!r} must be above 0")

    def compress(self, emulator: Emulator, context: Context) -> Emulator:
        """Return new blocks where something was re-fitted, and the blocks of ``emulator`` elsewhere."""
        refuse_quantized(emulator, self.name, "put align before quantize")
        context.need_calibration("align")
        return _Alignment(self, emulator, context).run()


def fitting_places(where: Where, order: Sequence[tuple[int, int]], layout: Mapping[int, int]) -> dict[int, int]:
    """By index of the emulator's blocks that ``where`` names, the last place at which each runs, where it is fitted.

    ``order`` is that of :func:`~offsite_fl.emulators.streams.running_order`.

    >>> fitting_places("ends", [(0, 1), (1, 3), (3, 4), (4, 5)], {1: 0, 3: 1, 4: 2})
    {0: 1, 2: 4}
    """
    entered = {behind for place, behind in order if place in layout}
    named = {
        "first": [place for place, _ in order if place not in entered],
        "last": [place for place, behind in order if behind not in layout],
        "all": list(layout),
    }
    named["ends"] = named["first"] + named["last"]
    slots = {layout[place] for place in named[where] if place in layout}
    return {slot: place for place, slot in sorted(layout.items()) if slot in slots}


@dataclass(frozen=True)
class _Place:
    """One place of a block: the streams in front of it of the full model and of the emulator, and the one wanted."""

    position: int
    full: Stream
    cut: Stream
    goal: Stream


class _Alignment:
    """The walk along the blocks, with the full model's stream beside the emulator's.

    ``modules`` are the emulator's blocks with what has been re-fitted so far, ``fronts`` the first place of each block
    that is still to be fitted and the emulator's stream in front of it.
    """

    def __init__(self, method: Align, emulator: Emulator, context: Context) -> None:
        self.method, self.emulator, self.context = method, emulator, context
        order = running_order(context.adapter, emulator.positions, context.blocks.depth)
        self.places = fitting_places(method.where, order, emulator.layout)
        self.order = [pair for pair in order if pair[0] <= max(self.places.values())]
        self.modules = [block.module for block in emulator.blocks]
        self.fronts: dict[int | None, tuple[int, Stream]] = {}
        self.notes: list[str] = []

    def run(self) -> Emulator:
        cut = Stream.entering(read_batches(self.context, self.context.calibration))
        full = self._onward(cut, 0, self.order[0][0])
        for position, behind in self.context.track(self.order, "align", total=len(self.order)):
            goal = self._onward(full, position, behind)
            slot = self.emulator.layout.get(position)
            if slot in self.places:
                self.fronts.setdefault(slot, (position, cut))
            if slot is not None and self.places.get(slot) == position:
                cut = self._align(slot, _Place(position, full, cut, goal))
            else:
                together = slot is None and cut is full and behind == position + 1
                cut = goal if together else self._past(position, cut)
            full = goal
        pairs = zip(self.modules, self.emulator.blocks, strict=True)
        blocks = [EmulatorBlock(module, block.origin) for module, block in pairs]
        return Emulator(blocks, dict(self.emulator.layout), tuple(self.notes))

    def _align(self, slot: int, place: _Place) -> Stream:
        """Re-fit the block ``slot``, keep what brings the stream behind it nearest, and return that stream."""
        first, front = self.fronts.pop(slot)
        given = self.modules[slot]
        behind = self._between(first, place.position, front)
        least = squared_distance(behind, place.goal)
        if least == 0:
            return behind
        block = working_copy(given, self.context.device)
        writers = stream_writers(block, place.cut, self.emulator.blocks[slot].origin)
        best = given
        for chosen in self._choices(writers, place):
            self.modules[slot] = self._refitted(slot, given, writers, chosen, place)
            stream = self._between(first, place.position, front)
            distance = squared_distance(stream, place.goal)
            if distance < least:
                best, behind, least = self.modules[slot], stream, distance
        self.modules[slot] = best
        if best is given:
            why = NO_NEARER if writers else NO_SUM
            self.notes.append(f"align left the block at place {place.position} as it was: {why}")
        return behind

    def _choices(self, writers: tuple[str, ...], place: _Place) -> Iterator[tuple[str, ...]]:
        """Which writers to re-fit: the last one, and all, if the full model's block at the place has the same."""
        if writers:
            yield writers[-1:]
        own = working_copy(self.context.block(place.position), self.context.device)
        if len(writers) > 1 and stream_writers(own, place.full, place.position) == writers:
            yield writers

    def _refitted(
        self, slot: int, given: nn.Module, writers: tuple[str, ...], chosen: tuple[str, ...], place: _Place
    ) -> nn.Module:
        """A copy of the block ``given`` with the ``chosen`` ones of its ``writers`` re-fitted one after the other."""
        block, origin = working_copy(given, self.context.device), self.emulator.blocks[slot].origin
        # A block that runs several times makes its change as often.
        share = 1 / list(self.emulator.layout.values()).count(slot)
        how = WriterFit(self.method.ridge, self.method.rank, share)
        for count, writer in enumerate(writers, start=1):
            if writer not in chosen:
                continue
            wanted = place.goal.hidden
            if count < len(writers):
                own = working_copy(self.context.block(place.position), self.context.device)
                wanted = states_behind(own, place.full, place.position, writers[:count])
            refit_writer(block, place.cut, origin, writers[:count], wanted, how)
        return sent_home(block, self.context)

    def _between(self, first: int, last: int, stream: Stream) -> Stream:
        """The emulator's ``stream`` in front of the place ``first``, behind the place ``last``."""
        for position, _ in self.order:
            if first <= position <= last:
                stream = self._past(position, stream)
        return stream

    def _past(self, position: int, stream: Stream) -> Stream:
        """The emulator's stream behind what it runs at ``position``."""
        slot = self.emulator.layout.get(position)
        if slot is None:
            return stream.through(working_copy(self.context.block(position), self.context.device), position)
        # Called as its origin is: by origins go the windows and rotary tables of the network that clients build.
        origin = self.emulator.blocks[slot].origin
        return stream.through(working_copy(self.modules[slot], self.context.device), origin)

    def _onward(self, stream: Stream, start: int, stop: int) -> Stream:
        """The full model's ``stream`` from in front of block ``start`` to in front of block ``stop``."""
        for position in range(start, stop):
            stream = stream.through(working_copy(self.context.block(position), self.context.device), position)
        return stream


def squared_distance(stream: Stream, goal: Stream) -> float:
    """``sum ||s - t||^2`` over the real tokens of two streams of the same batches."""
    pairs = zip(stream.batches, stream.hidden, goal.hidden, strict=True)
    return sum(float(batch.rows(s.double() - t.double()).square().sum()) for batch, s, t in pairs)
