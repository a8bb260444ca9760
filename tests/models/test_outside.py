"""What lies outside the blocks: each tensor once, under its first name."""

from __future__ import annotations

from torch import nn

from offsite_fl.models.outside import outside_blocks


def test_tied_once_and_blocks_never() -> None:
    net = nn.Module()
    net.embed, net.head = nn.Embedding(4, 2), nn.Linear(2, 4, bias=False)
    net.head.weight = net.embed.weight
    net.norm = nn.BatchNorm1d(2)
    net.blocks = nn.ModuleList([nn.Linear(2, 2)])
    net.register_buffer("table", net.norm.weight.detach().clone(), persistent=False)
    found = outside_blocks(net, "blocks")
    buffers = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert set(found) == {"embed.weight", "norm.weight", "norm.bias"} | buffers
    assert found["embed.weight"] is net.head.weight
