"""``--split spread=12/4``: the adapter where CRaSh puts it, found on the calibration text before a bundle is made."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import typer

from offsite_fl.cli.settings import split_of
from offsite_fl.errors import ConfigError, SplitError

if TYPE_CHECKING:
    from offsite_fl.emulators import EmulatorMethod
    from offsite_fl.emulators.placement import Pooling
    from offsite_fl.models.split import Split
    from offsite_fl.owner import ModelOwner


class SpreadSplit(NamedTuple):
    """An adapter of ``adapter`` blocks, evenly spread over the ``keep`` blocks that are kept in all."""

    keep: int
    adapter: int

    @classmethod
    def parse(cls, text: str) -> SpreadSplit | None:
        """Read ``spread=KEEP/ADAPTER``; None for a split of another kind.

        >>> SpreadSplit.parse("spread=12/4"), SpreadSplit.parse("2-2")
        (SpreadSplit(keep=12, adapter=4), None)
        """
        compact = text.replace(" ", "")
        if not compact.startswith("spread"):
            return None
        if match := re.fullmatch(r"spread=(\d+)/(\d+)", compact):
            return cls(int(match[1]), int(match[2]))
        raise SplitError(f"split {text!r} can't be read; write spread=KEEP/ADAPTER, for example spread=12/4")

    def __str__(self) -> str:
        """The spread as :meth:`parse` reads it."""
        return f"spread={self.keep}/{self.adapter}"

    def check(self, calibration: Path | None) -> None:
        """``ConfigError`` where there is no text to find it on, or the numbers can't fit; before the long work."""
        from offsite_fl.emulators.placement import spread_ranks

        if calibration is None:
            raise ConfigError(f"--split {self} is found by comparing blocks on public text: give it by --calibration")
        spread_ranks(self.keep, self.adapter)


def cut_of(first: int | None, last: int | None, at: str | None, split: str | None) -> Split | SpreadSplit:
    """What ``--split`` asks for; without it what the other three options do."""
    from offsite_fl.models.split import Split

    if split is None:
        return split_of(first, last, at)
    if (first, last, at) != (None, None, None):
        raise typer.BadParameter("--split says it all; give it without --first, --last and --at", param_hint="--split")
    return SpreadSplit.parse(split) or Split.parse(split)


def split_owner(
    owner: ModelOwner,
    spread: SpreadSplit,
    method: EmulatorMethod,
    calibration: Path | None,
    tokens: int,
    block_size: int,
    seed: int,
) -> ModelOwner:
    """The owner of the same model, split where ``spread`` puts the adapter on the text that ``method`` will see."""
    from offsite_fl.emulators.placement import spread_split
    from offsite_fl.owner import ModelOwner

    context = owner.context(calibration, tokens, block_size, seed, progress=True)
    found = spread_split(context, spread.keep, spread.adapter, _pooling(method))
    return ModelOwner(owner.model, owner.processor, found, task=owner.task, head=owner.head or "none")


def provisional_split() -> Split:
    """A split that every model takes, for as long as the right one isn't known."""
    from offsite_fl.models.split import Split

    return Split(first=0, last=1)


def _pooling(method: EmulatorMethod) -> Pooling:
    """That of the ``crash`` in ``method``, whose clusters are to be the same; else its default."""
    from offsite_fl.emulators import Chain
    from offsite_fl.emulators.crash import Crash

    parts = method.methods if isinstance(method, Chain) else (method,)
    return next((part.pooling for part in parts if isinstance(part, Crash)), Crash.pooling)
