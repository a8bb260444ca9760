"""What of a block can change places without a trace outside: channels of MLPs, and values inside attention heads."""

from __future__ import annotations

from collections.abc import Mapping

from offsite_fl.emulators.base import Context, Emulator
from offsite_fl.emulators.channels import ChannelChain
from offsite_fl.emulators.heads import find_heads
from offsite_fl.emulators.streams import working_copy
from offsite_fl.emulators.value_dims import ValueDims, find_values
from offsite_fl.emulators.watching import Watcher

Free = ChannelChain | ValueDims
FreeBySlot = Mapping[int, tuple[Free, ...]]


def find_free(emulator: Emulator, context: Context, values: bool = True) -> FreeBySlot:
    """What is free in each block of ``emulator``, by its index; without ``values`` only channels of MLPs.

    Blocks are watched on noise, so no text is needed. What isn't dense any more is never free.
    """
    watcher = Watcher(context)
    first = {slot: position for position, slot in sorted(emulator.layout.items(), reverse=True)}
    found: dict[int, tuple[Free, ...]] = {}
    for slot, position in sorted(first.items()):
        block = working_copy(emulator.blocks[slot].module, context.device)
        seen, call = watcher.watch(block, position), watcher.call(position)
        heads = find_heads(block, watcher.noise, call, seen.plan, seen.chains) if values else ()
        found[slot] = (*seen.chains, *find_values(block, watcher.noise, call, heads))
    return found
