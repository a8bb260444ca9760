"""The proximal term of FedProx and FedBiOT: how far the trained tensors have moved from the received ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from offsite_fl.errors import UpdateError

_A, _B = ".lora_A.weight", ".lora_B.weight"


class Proximal:
    """``||W - W_received||^2`` summed over all trained tensors, with gradient.

    LoRA factors come in pairs ``{path}.lora_A.weight`` [r, in] and ``{path}.lora_B.weight`` [out, r]; for them the
    distance is that of the products, ``||s B A - s B0 A0||^2`` with ``s = scale``, as if they were merged. It is
    computed from r x r matrices: with ``dA = A - A0`` and ``dB = B - B0`` the difference is ``[dB, B0] [A; dA]``, which
    unlike the expanded squares loses no digits near the start.

    Parameters
    ----------
    trainable
        The live parameters by slot name.
    received
        Their values at the start of the round, by the same names; copied.
    scale
        alpha / rank of the LoRA factors; without meaning for other tensors.
    """

    def __init__(self, trainable: Mapping[str, Tensor], received: Mapping[str, Tensor], scale: float = 1.0) -> None:
        wrong = sorted(trainable.keys() ^ received.keys())
        if wrong:
            raise UpdateError(f"the received tensors must be those that are trained; {wrong[0]!r} is on one side only")
        for name, tensor in trainable.items():
            if tensor.shape != received[name].shape:
                shapes = f"{tuple(received[name].shape)}, the trained one {tuple(tensor.shape)}"
                raise UpdateError(f"received tensor {name!r} has shape {shapes}")
        self.scale = scale
        self.pairs = [(n, n.removesuffix(_A) + _B) for n in trainable if n.endswith(_A)]
        paired = {name for pair in self.pairs for name in pair}
        self.dense = [name for name in trainable if name not in paired]
        self.now = trainable
        self.start = {
            name: received[name].detach().to(tensor.device, torch.float32, copy=True)
            for name, tensor in trainable.items()
        }

    def __call__(self) -> Tensor:
        """The squared distance now, a scalar fp32 tensor."""
        total = torch.zeros((), device=next(iter(self.start.values())).device)
        for name in self.dense:
            total = total + (self.now[name].float() - self.start[name]).square().sum()
        for name_a, name_b in self.pairs:
            a, b = self.now[name_a].float(), self.now[name_b].float()
            left = torch.cat([b - self.start[name_b], self.start[name_b]], dim=1)
            right = torch.cat([a, a - self.start[name_a]], dim=0)
            total = total + self.scale**2 * ((left.T @ left) * (right @ right.T)).sum()
        return total
