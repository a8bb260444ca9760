"""Families beyond the first matrix: what ``docs/models.md`` says of each, tried on a tiny model."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from offsite_fl.emulators import parse_emulator, start
from offsite_fl.emulators.applies import why_not
from offsite_fl.errors import EmulatorError, ModelError, OffsiteError
from offsite_fl.models.overrides import NO_UNITS
from offsite_fl.models.split import Split
from offsite_fl.owner import ModelOwner

from .checks import check_row
from .families import batch_of, built, output_of, processor_of
from .other_families import ANY, OTHERS

ENDS = Split(first=1, last=1)


def rows(*, work: bool) -> list[object]:
    """The names of the rows that can be split, or of those that can't."""
    return [
        pytest.param(name, marks=pytest.mark.slow if row.slow else ())
        for name, row in OTHERS.items()
        if (ANY not in row.cant) is work
    ]


@pytest.mark.parametrize("name", rows(work=True))
def test_it_works_as_far_as_its_row_says(name: str, tmp_path: Path) -> None:
    check_row(OTHERS[name], tmp_path)


@pytest.mark.parametrize("name", rows(work=False))
def test_what_cannot_work_says_so_first(name: str) -> None:
    row = OTHERS[name]
    model = built(row)
    with pytest.raises(OffsiteError, match=row.cant[ANY]):
        ModelOwner(model, processor_of(row), ENDS)


@pytest.mark.parametrize("name", [name for name in NO_UNITS if name in OTHERS])
def test_families_without_units_are_told_before_prune_finds_none(name: str) -> None:
    owner = ModelOwner(built(OTHERS[name]), processor_of(OTHERS[name]), ENDS)
    context = owner.context()
    said = "an MLP channel or an attention head that can be taken out"
    assert said in (why_not("prune", owner.model, owner.blocks) or "")
    with pytest.raises(EmulatorError, match=f"no block has {said}"):
        parse_emulator("prune:keep=0.5").compress(start(context), context)
    parse_emulator("prune:keep=0.5,mode=magnitude").compress(start(context), context)


def test_big_bird_is_refused_once_a_short_text_has_switched_it() -> None:
    # It turns itself from sparse to full attention, which its config doesn't say; the row has full attention at once
    row = replace(OTHERS["big_bird"], config=OTHERS["big_bird"].config | {"attention_type": "block_sparse"})
    model = built(row)
    ModelOwner(model, processor_of(row), ENDS)
    output_of(model, batch_of(row))
    with pytest.raises(ModelError, match="attention_type = 'original_full' here and 'block_sparse' there"):
        ModelOwner(model, processor_of(row), ENDS)


def test_the_documentation_names_every_row_where_it_belongs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    section = page.partition("## Other families\n")[2].partition("### Vision transformers of timm")[0]
    _, works, rest = re.split(r"\*\*Work in all:\*\*|\*\*Work in part:\*\*", section)
    partly, refused = rest.split("**Refused before any work:**")
    said = {"works": column(works, 1), "partly": column(partly, 0), "refused": column(refused, 0)}
    rows = {
        "works": {name for name, row in OTHERS.items() if not row.cant},
        "partly": {name for name, row in OTHERS.items() if row.cant and ANY not in row.cant},
        "refused": {name for name, row in OTHERS.items() if ANY in row.cant},
    }
    assert said == rows


def column(text: str, index: int) -> set[str]:
    """The names in backticks in one column of the table in ``text``."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return {name for line in lines for name in re.findall(r"`([^`]+)`", line.split("|")[index + 1])}
