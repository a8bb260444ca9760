"""The emulators that are set side by side where the owner names none: every method, in its natural forms.

A candidate is a spec, or a template of one in which ``{keep}`` stands for the budget (``keep=0.4`` or ``bytes=...``).
"""

from __future__ import annotations

from collections.abc import Iterable

from offsite_fl.choosing.budget import Budget
from offsite_fl.emulators import parse_emulator
from offsite_fl.errors import ConfigError

KEEP = "{keep}"

# The quickstart's own spec, as a reference of known behaviour; it has a size of its own.
QUICKSTART = "low-rank:keep=0.975,targets=q_proj/k_proj/v_proj/o_proj+quantize:bits=4,group=0"

DEFAULTS: tuple[str, ...] = (
    "layer-drop:{keep}",
    "layer-drop:{keep}+distill",
    "layer-drop:{keep}+align:where=all",
    "first:{keep}",
    "last:{keep}",
    "random:{keep}",
    "similarity:{keep}",
    "crash:{keep},sharing=none",
    "crash:{keep},sharing=all",
    "low-rank:{keep}",
    "low-rank:{keep},mode=activation",
    "low-rank:{keep},mode=plain",
    "low-rank:{keep}+loss-margin",
    "prune:{keep},mode=structured",
    "prune:{keep},mode=structured+align:where=all",
    "prune:{keep},mode=magnitude",
    "quantize:{keep}",
    "quantize:bits=4,group=0",
    "quantize:bits=4,group=64",
    "quantize:mode=legacy-fake",
    "gradot:{keep}",
    "gradot:{keep},allocation=global",
    "gradient-match:{keep}",
    "smooth:{keep},mode=prox",
    "smooth:{keep},mode=train",
    "scaleot:{keep}",
    QUICKSTART,
)

# The same for a classifier, without what names parts of a language model or needs its loss.
CLASSIFIERS: tuple[str, ...] = tuple(
    candidate for candidate in DEFAULTS if candidate != QUICKSTART and "loss-margin" not in candidate
)


def fill(candidate: str, budget: Budget) -> str:
    """The spec of a candidate, with the budget in its place.

    >>> fill("low-rank:{keep},mode=plain", Budget(share=0.4))
    'low-rank:keep=0.4,mode=plain'
    """
    return candidate.replace(KEEP, budget.option)


def is_template(candidate: str) -> bool:
    """Whether the candidate takes its size from the budget."""
    return KEEP in candidate


def distinct(candidates: Iterable[str], budget: Budget) -> tuple[str, ...]:
    """``candidates`` in order, without those whose spec came before."""
    found: dict[str, str] = {}
    for candidate in candidates:
        found.setdefault(fill(candidate, budget), candidate)
    return tuple(found.values())


def check_candidates(candidates: Iterable[str], budget: Budget) -> None:
    """Refuse specs that can't be read, all at once: an hour later would be too late for a slip of the pen.

    Raises
    ------
    ConfigError
        If one or more can't be read.
    """
    wrong = []
    for spec in (fill(candidate, budget) for candidate in candidates):
        try:
            parse_emulator(spec)
        except ConfigError as error:
            wrong.append(f"candidate {spec!r}: {error}")
    if wrong:
        raise ConfigError("; ".join(wrong))
