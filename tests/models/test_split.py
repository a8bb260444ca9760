"""Which blocks a split takes, and what it says when it doesn't fit."""

from __future__ import annotations

from typing import Any

import pytest

from offsite_fl.errors import SplitError
from offsite_fl.models.split import Split


@pytest.mark.parametrize(
    ("split", "depth", "adapter", "middle"),
    [
        (Split(), 6, (0, 1, 4, 5), (2, 3)),
        (Split(first=2, last=2), 5, (0, 1, 3, 4), (2,)),
        # FS-OT clamps both ends to at least one block (peers.md, fault 3)
        (Split(first=0, last=2), 4, (2, 3), (0, 1)),
        (Split(first=1, last=0), 2, (0,), (1,)),
        (Split(at=(0, 5, 18, 23)), 24, (0, 5, 18, 23), tuple(i for i in range(24) if i not in (0, 5, 18, 23))),
        (Split(at=(3, 0)), 4, (0, 3), (1, 2)),
    ],
)
def test_resolve(split: Split, depth: int, adapter: tuple[int, ...], middle: tuple[int, ...]) -> None:
    assert split.resolve(depth) == adapter
    assert split.middle(depth) == middle
    assert sorted(adapter + middle) == list(range(depth))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first": 0, "last": 0}, "at least one block must be adapter"),
        ({"first": -1}, "first=-1 should be a whole number"),
        ({"last": 1.5}, "last=1.5 should be a whole number"),
        ({"first": True}, "first=True should be a whole number"),
        ({"at": ()}, "one or more block indices"),
        ({"at": (1, -2)}, "one or more block indices"),
        ({"at": (1, 1)}, "names a block twice"),
    ],
)
def test_impossible_splits(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SplitError, match=message):
        Split(**options)


@pytest.mark.parametrize(
    ("split", "depth", "message"),
    [
        # FedBiOT clamps a plan that is out of range in silence (peers.md, fault 32)
        (Split(first=2, last=2), 4, "2-2 takes 4 blocks as adapter, but the model has 4.*may be at most 3"),
        (Split(first=0, last=30), 12, "may be at most 11"),
        (Split(at=(0, 6, 9)), 6, r"block\(s\) 6, 9 of at=0,6,9 don't exist: the model has 6 blocks, 0 to 5"),
        (Split(at=(0, 1, 2)), 3, "takes all 3 blocks; name at most 2"),
        (Split(first=1, last=0), 1, r"a model of 1 block\(s\) can't be split"),
    ],
)
def test_splits_that_do_not_fit(split: Split, depth: int, message: str) -> None:
    with pytest.raises(SplitError, match=message):
        split.resolve(depth)
    with pytest.raises(SplitError, match=message):
        split.middle(depth)


@pytest.mark.parametrize("text", ["2-2", "0-2", "12-0", "at=0,5,18,23", "at=7"])
def test_text_round_trip(text: str) -> None:
    assert str(Split.parse(text)) == text
    assert Split.parse(str(Split.parse(text))) == Split.parse(text)


def test_parse_is_kind_to_spaces_and_order() -> None:
    assert Split.parse(" 2 - 1 ") == Split(first=2, last=1)
    assert Split.parse("at = 5, 0") == Split(at=(0, 5)) == Split(first=9, last=9, at=(5, 0))


@pytest.mark.parametrize("text", ["", "2", "2-", "-2-2", "2-2-2", "at=", "at=1,", "at=a", "first-last"])
def test_unreadable_text(text: str) -> None:
    with pytest.raises(SplitError, match="write first-last as '2-2'"):
        Split.parse(text)


def test_an_adapter_of_nothing_is_refused_from_text_too() -> None:
    with pytest.raises(SplitError, match="at least one block"):
        Split.parse("0-0")
