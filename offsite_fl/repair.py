"""What an adapter learns only to put the emulator right, so that the model owner can take it out at plug-in.

An adapter that is tuned on a lossy emulator learns two things: the task, and to make up for what the emulator gets
wrong. The second is of no use in the full model, and harms it. The model owner can measure it without any data owner's
data, by playing a data owner on public text: tune the adapter on the emulator (change ``D_E``) and, with the same
batches, on the full model (change ``D_M``). Both learn the public text, only the first repairs, so the difference

    R = D_E - D_M

is the repair. A data owner's change D is then plugged in as ``scale * (D - share * R)``. Ours; task vectors that are
added and subtracted are from Ilharco et al., "Editing Models with Task Arithmetic" (arXiv 2212.04089).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from offsite_fl.errors import ConfigError, UpdateError
from offsite_fl.update import Update

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Repair:
    """The repair that tuning on the emulator of bundle ``digest`` brings with it.

    ``tensors`` are differences of adapter values by slot name, fp32 on the CPU; ``steps`` is how many optimiser steps
    they were measured over, which should be those of the data owners. ``share`` of them is taken out of a change, and
    ``scale`` of what is left is plugged in.
    """

    tensors: Tensors
    digest: str
    steps: int
    share: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("share", "scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"repair {name} must be a number from 0, got {value}")

    def taken_out(self, values: Tensors, start: Tensors) -> dict[str, torch.Tensor]:
        """Adapter values ``start + scale * (values - start - share * repair)``.

        ``values`` are tuned adapter values and ``start`` those that were handed out, all by slot name.

        >>> repair = Repair({"w": torch.tensor([1.0])}, "", 1, share=0.5)
        >>> repair.taken_out({"w": torch.tensor([5.0])}, {"w": torch.tensor([2.0])})["w"]
        tensor([4.5000])
        """
        if values.keys() != self.tensors.keys():
            odd = sorted(values.keys() ^ self.tensors.keys())
            raise UpdateError(f"the repair doesn't fit the adapter: {odd[:3]} are missing or unknown")
        return {
            name: start[name] + self.scale * (values[name] - start[name] - self.share * self.tensors[name])
            for name in values
        }

    @property
    def note(self) -> str:
        """What a reader of a plug-in's numbers must know."""
        scaled = "" if self.scale == 1 else f", and {self.scale:g} of the rest was plugged in"
        return (
            f"From the plug-in {self.share:g} of the repair was taken out, measured by the model owner on public text "
            f"over {self.steps} steps{scaled}."
        )

    @property
    def norm(self) -> float:
        """Euclidean norm over all tensors."""
        return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in self.tensors.values()))

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, of the form of an update; whole or not at all."""
        metrics = {"repair": 1.0, "steps": float(self.steps), "share": self.share, "scale": self.scale}
        return Update(self.tensors, self.digest, 0, metrics=metrics).save(path)

    @classmethod
    def load(cls, path: str | Path) -> Repair:
        """Read what :meth:`save` wrote; ``UpdateError`` names the file and what is wrong with it."""
        read = Update.load(path)
        if "repair" not in read.metrics:
            raise UpdateError(f"{path} is an update, not a repair; `offsite-fl repair` makes one")
        numbers = read.metrics
        return cls(read.tensors, read.digest, int(numbers["steps"]), numbers["share"], numbers["scale"])
