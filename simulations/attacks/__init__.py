"""Clients that misbehave, to measure robust strategies with: Flower mods and poisoned data, in simulation only.

    threat = Threat("sign-flip+scale:factor=10", attackers=(0,))
    app = make_client_app(load_data, train_mods=[threat.mod])

``docs/strategies.md`` has the table of what each attack costs under each strategy.
"""

from simulations.attacks.attacks import ATTACKS, Attack
from simulations.attacks.labels import flip, with_flipped_labels
from simulations.attacks.spec import parse_attack
from simulations.attacks.threat import Threat

__all__ = ["ATTACKS", "Attack", "Threat", "flip", "parse_attack", "with_flipped_labels"]
