"""What a malicious client makes of its reply. Updates are ``trained - received``, over all tensors of the reply.

A new attack is a frozen dataclass with :func:`register`; its fields are the options of its spec.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from offsite_fl.config import check
from offsite_fl.registry import Registry
from offsite_fl.strategies.norms import scaled, update_norm

Tensors = Mapping[str, torch.Tensor]


class Attack:
    """Base of all: an honest reply."""

    spoils_reply = True
    flips_labels = False

    def reply(self, received: Tensors, trained: Tensors, draw: torch.Generator) -> dict[str, torch.Tensor]:
        """fp32 tensors to send instead of ``trained``; both have the same names and shapes. ``draw``: for chance."""
        return dict(trained)


ATTACKS: Registry[type[Attack]] = Registry("attack")


def register(name: str) -> Callable[[type[Attack]], type[Attack]]:
    """Class decorator that files an attack under ``name``."""
    return ATTACKS.register(name)


@register("sign-flip")
@dataclass(frozen=True)
class SignFlip(Attack):
    """The update the other way: ``received - (trained - received)``; Li et al. 2019 (arXiv 1811.03761, section 5)."""

    def reply(self, received: Tensors, trained: Tensors, draw: torch.Generator) -> dict[str, torch.Tensor]:
        """See :class:`Attack`."""
        return scaled(trained, received, -1.0)


@register("scale")
@dataclass(frozen=True)
class Scale(Attack):
    """The update ``factor`` times: ``received + factor * (trained - received)``, as in model replacement.

    Bagdasaryan et al. 2018, "How To Backdoor Federated Learning" (arXiv 1807.00459), equation 3.
    """

    factor: float = 10.0

    def __post_init__(self) -> None:
        check(math.isfinite(self.factor), f"scale: factor must be a finite number, got {self.factor}")

    def reply(self, received: Tensors, trained: Tensors, draw: torch.Generator) -> dict[str, torch.Tensor]:
        """See :class:`Attack`."""
        return scaled(trained, received, self.factor)


@register("noise")
@dataclass(frozen=True)
class Noise(Attack):
    """Gaussian noise on every value, of a standard deviation ``std`` times the root mean square of the update's values.

    With ``std=1`` the noise is as long as the update, up to chance.
    """

    std: float = 1.0

    def __post_init__(self) -> None:
        check(0 < self.std < math.inf, f"noise: std must be a number above 0, got {self.std}")

    def reply(self, received: Tensors, trained: Tensors, draw: torch.Generator) -> dict[str, torch.Tensor]:
        """See :class:`Attack`."""
        count = max(1, sum(value.numel() for value in trained.values()))
        size = self.std * update_norm(trained, received) / math.sqrt(count)
        return {name: value + size * torch.randn(value.shape, generator=draw) for name, value in trained.items()}


@register("nan")
@dataclass(frozen=True)
class NotANumber(Attack):
    """NaN in every value."""

    def reply(self, received: Tensors, trained: Tensors, draw: torch.Generator) -> dict[str, torch.Tensor]:
        """See :class:`Attack`."""
        return {name: torch.full_like(value, math.nan) for name, value in trained.items()}


@register("wrong-shape")
@dataclass(frozen=True)
class WrongShape(Attack):
    """Every tensor with one row of zeros too many (a tensor without rows becomes two values)."""

    def reply(self, received: Tensors, trained: Tensors, draw: torch.Generator) -> dict[str, torch.Tensor]:
        """See :class:`Attack`."""
        rows = {name: value.reshape(value.shape or (1,)) for name, value in trained.items()}
        return {name: torch.cat([value, value.new_zeros(1, *value.shape[1:])]) for name, value in rows.items()}


@register("free-rider")
@dataclass(frozen=True)
class FreeRider(Attack):
    """What it got, unchanged, with the count and metrics of honest training; Lin et al. 2019, arXiv 1911.12560."""

    def reply(self, received: Tensors, trained: Tensors, draw: torch.Generator) -> dict[str, torch.Tensor]:
        """See :class:`Attack`."""
        return {name: received[name] for name in trained}


@register("label-flip")
@dataclass(frozen=True)
class LabelFlip(Attack):
    """Honest training on flipped labels: token t of V is to be predicted as V - 1 - t (``labels.py``)."""

    spoils_reply = False
    flips_labels = True


@dataclass(frozen=True)
class Chain(Attack):
    """Several attacks, each on the reply of the one before."""

    parts: tuple[Attack, ...]

    def __post_init__(self) -> None:
        early = any(isinstance(part, WrongShape) for part in self.parts[:-1])
        check(not early, "wrong-shape must be the last attack of a chain: the others work on tensors that fit")

    @property
    def spoils_reply(self) -> bool:  # type: ignore[override]
        """Whether any part does."""
        return any(part.spoils_reply for part in self.parts)

    @property
    def flips_labels(self) -> bool:  # type: ignore[override]
        """Whether any part does."""
        return any(part.flips_labels for part in self.parts)

    def reply(self, received: Tensors, trained: Tensors, draw: torch.Generator) -> dict[str, torch.Tensor]:
        """See :class:`Attack`."""
        for part in self.parts:
            trained = part.reply(received, trained, draw)
        return dict(trained)
