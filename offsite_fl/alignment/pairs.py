"""Which block of the emulated network is held against which of the full model's."""

from __future__ import annotations

from torch import nn

from offsite_fl.alignment.options import Hidden
from offsite_fl.bundle import Bundle, OwnerMap
from offsite_fl.errors import UpdateError
from offsite_fl.models.blocks import block_list
from offsite_fl.models.network import NetworkPlan, place_blocks
from offsite_fl.owner import ModelOwner

Pairs = list[tuple[nn.Module, nn.Module]]


def paired(owner: ModelOwner, bundle: Bundle, network: nn.Module, hidden: Hidden) -> Pairs:
    """Pairs of a full model's block and one of ``network``, the emulated one, in forward order.

    The last block of the full middle and what stands in its place; with "layerwise" every block of the emulator, and
    the full model's that it stands for. Where the emulator has the full model's depth, that is the one at the same
    place, else the one that it was made from, which the owner's map tells.
    """
    plan, stack = bundle.plan, block_list(owner.model, owner.blocks)
    places, middle = place_blocks(network, plan), owner.split.middle(owner.blocks.depth)
    if hidden == "layerwise":
        return [(stack[index], places[place]) for place, index in _stands_for(owner, bundle, plan)]
    behind = sum(index > middle[-1] for index in owner.adapter_indices)
    return [(stack[middle[-1]], places[len(places) - behind - 1])]


def _stands_for(owner: ModelOwner, bundle: Bundle, plan: NetworkPlan) -> list[tuple[int, int]]:
    """The emulator's places in the network, each with the full model's index of the block that it stands for."""
    kept = [(number, place) for number, place in enumerate(plan.layout) if place.role == "emulator"]
    if not kept:
        raise UpdateError("the emulator has no block left: there is nothing to align layer by layer")
    if len(plan.layout) == owner.blocks.depth:
        return [(number, number) for number, _ in kept]
    note = OwnerMap.load(bundle.path)
    before = len(note.blocks_path) + 1
    made_of = {slot.split(".")[1]: path for slot, path in note.slots.items() if slot.startswith("emulator.")}
    return [(number, int(made_of[str(place.slot)][before:].partition(".")[0])) for number, place in kept]
