"""Attacks by name, in the grammar that emulators have: ``scale:factor=10``, chained ``sign-flip+scale:factor=10``."""

from __future__ import annotations

from offsite_fl.config import from_mapping
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
    name, colon, rest = part.partition(":")
    if not name.strip():
        raise ConfigError(f"attack spec {spec!r} has an empty part; write name:key=value, chained with '+'")
    attack, prefix = ATTACKS[name.strip()], name.strip() + ":"
    values: dict[str, str] = {}
    for option in rest.split(",") if colon else []:
        key, equals, value = (text.strip() for text in option.partition("="))
        if not equals or not key:
            raise ConfigError(f"{option.strip()!r} in attack spec {spec!r} isn't an option; write key=value")
        if prefix + key in values:
            raise ConfigError(f"{key!r} is given twice in {part!r}")
        values[prefix + key] = value
    return from_mapping(attack, values, prefix)
