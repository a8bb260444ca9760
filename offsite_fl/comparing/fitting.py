"""Whether what a grid names can run in it, said before the first cell and not after the hours of the others."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from offsite_fl.comparing.client_app import make_threat
from offsite_fl.comparing.settings import GridSettings
from offsite_fl.emulators import parse_emulator
from offsite_fl.errors import ConfigError
from offsite_fl.models.split import Split
from offsite_fl.strategies.named import make_strategy
from offsite_fl.strategies.preset import Setup, check_fit


def check_strategies(settings: GridSettings, depth: int) -> None:
    """``ConfigError`` names the first strategy that can't run on a model of ``depth`` blocks, and what it wants."""
    split = Split.parse(settings.model.split)
    for spec in settings.grid.strategies:
        tune = settings.tune_of(spec, 0)
        for emulator in settings.grid.emulators:
            try:
                check_fit(make_strategy(spec), Setup(split, depth, str(parse_emulator(emulator)), tune, public=True))
            except ConfigError as error:
                raise ConfigError(
                    f"{spec!r} can't run in this grid: {error}. The split stands under [model]; settings of one "
                    f'strategy\'s clients go under [tune-for."{spec}"]'
                ) from error


def check_attacks(settings: GridSettings, folder: Path) -> None:
    """``ConfigError`` names the first attack that the grid's package doesn't know; it is looked for in ``folder`` too.

    Clients look there as well (:func:`~.local_flower.module_path`). Each of them would refuse every round of such a
    cell.
    """
    axes = settings.grid
    with _modules_of(folder):
        for attack in filter(None, axes.attacks):
            make_threat(axes.attack_package, attack, axes.attackers_text)


@contextlib.contextmanager
def _modules_of(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
