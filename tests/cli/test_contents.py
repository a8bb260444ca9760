"""What ``inspect`` says of the blocks of an emulator."""

from __future__ import annotations

import io

import pytest
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


@pytest.mark.parametrize(("share", "said"), [(0.5, "50.0% of the middle's"), (None, "")])
def test_forward_flops_that_could_not_be_counted_have_no_row(share: float | None, said: str) -> None:
    report = {"bytes": 8, "middle_bytes": 16, "flops_share": share, "verbatim_share": 0.25, "notes": ()}
    report |= {"hidden_error": None, "perplexity": None}
    owner = {"emulator": "layer-drop:keep=1", "adapter": [0, 3], "split": "1-1", "report": report}
    found = {"bundle": "b", "digest": "d", "kinds": {}, "bytes": 0, "share_of_full_model": None, "model_type": "llama"}
    found |= {
        "task": "causal-lm",
        "head": [],
        "processor": "tokenizer",
        "places": [["adapter", 0]],
        "emulator": [],
        "owner": owner,
    }
    out = io.StringIO()
    print_contents(found, Console(file=out, width=160))
    assert "25.0% of the full model's parameters" in out.getvalue()
    assert ("forward FLOPs" in out.getvalue()) == (share is not None) and said in out.getvalue()
