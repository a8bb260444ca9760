"""Attacks by name, in the grammar that emulators have: ``scale:factor=10``, chained ``sign-flip+scale:factor=10``."""

from __future__ import annotations

from offsite_fl.config import from_mapping, read_spec
from offsite_fl.errors import ConfigError
from simulations.attacks.attacks import ATTACKS, Attack, Chain


def parse_attack(spec: str) -> Attack:
    """Build the attack that ``spec`` names; ``ConfigError`` names the part that is wrong, and what is near to it.

    >>> parse_attack("sign-flip+scale:factor=3")
    Chain(parts=(SignFlip(), Scale(factor=3.0)))
    """
    parts = tuple(_parse_one(part.strip(), spec) for part in spec.split("+"))
    return parts[0] if len(parts) == 1 else Chain(parts)


def _parse_one(part: str, spec: str) -> Attack:
    name, values = read_spec(part, "attack", spec)
    if not name:
        raise ConfigError(f"attack spec {spec!r} has an empty part; write name:key=value, chained with '+'")
    return from_mapping(ATTACKS[name], {f"{name}:{key}": value for key, value in values.items()}, f"{name}:")
