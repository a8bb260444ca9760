"""What a strategy's name needs beside itself to run: options of the spec, and settings of the sites."""

from __future__ import annotations

from typing import Any

OPTIONS = {
    "qfedavg": "client-learning-rate=0.01",
    "fedot": "placement=any,distilled=false",
    "fedbiot": "placement=any,first-steps=2,align-steps=1,align-rank=2,align-batch=2",
    "fedprox": "proximal-mu=0.1",
    "fedavgm": "server-momentum=0.5",
}
OF_SITES: dict[str, dict[str, Any]] = {
    "scaffold": {"optimizer": "sgd"},
    **{name: {"lora_rank": 2} for name in ("fedbiot", "flora", "flexlora", "ffa-lora", "rolora")},
}


def spec(name: str) -> str:
    """The name with its options."""
    return f"{name}:{OPTIONS[name]}" if name in OPTIONS else name
