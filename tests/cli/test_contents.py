"""What ``inspect`` says of the blocks of an emulator."""

from __future__ import annotations

import io

from rich.console import Console

from offsite_fl.cli.contents import emulator_blocks, print_contents
from offsite_fl.models.network import NetworkPlan, Place

HARMONIZER = {"kind": "harmonizer", "in": 32, "rank": 4, "returns": 0}
PACKED = {"kind": "quantized", "in": 32, "out": 4, "bits": 8, "group": 16, "bias": True}


def test_harmonizers_are_named() -> None:
    layout = (Place("adapter", 0), Place("emulator", 0), Place("emulator", 1), Place("emulator", 0))
    plan = NetworkPlan("causal-lm", {}, "model.layers", layout, ({"": HARMONIZER, "down": PACKED}, {}))
    blocks = emulator_blocks(plan)
    assert blocks[0]["places"] == [1, 3] and blocks[1]["linears"] == {}
    assert blocks[0]["linears"] == {
        "harmonizer in place of the block, rank": {"count": 1, "from": 4, "to": 4},
        "int8, groups of": {"count": 1, "from": 16, "to": 16},
    }
    out = io.StringIO()
    found = {"bundle": "b", "digest": "d", "kinds": {}, "bytes": 0, "share_of_full_model": None, "model_type": "llama"}
    found |= {"task": "causal-lm", "head": [], "processor": "tokenizer"}
    places = [[place.role, place.slot] for place in layout]
    print_contents(found | {"places": places, "emulator": blocks, "owner": None}, Console(file=out, width=160))
    assert "1 harmonizer in place of the block, rank 4; 1 int8, groups of 16" in out.getvalue()
