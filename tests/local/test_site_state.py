"""What a site keeps on its disk: whole or not at all, two rounds of one run, and not for ever."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from offsite_fl.errors import StateError, WireError
from offsite_fl.local import site_state
from offsite_fl.local.site_state import MAX_AGE_SECONDS, MAX_RUNS, MAX_UNUSED, SiteState

KEY = "0123456789abcdef" * 2
VALUES = {"adapter.0.w": torch.tensor([[1.0, 2.0]]), "adapter.0.b": torch.tensor(0.5)}


def state(root: Path, key: str = KEY, site: str = "a", algorithm: str = "ditto") -> SiteState:
    return SiteState(root, key, site, algorithm)


def times(factor: float) -> dict[str, torch.Tensor]:
    return {name: factor * value for name, value in VALUES.items()}


def test_what_was_kept_comes_back_bit_for_bit(tmp_path: Path) -> None:
    kept = state(tmp_path)
    assert kept.load(0, VALUES) is None
    path = kept.save(3, VALUES, went_on_from=0)
    found = state(tmp_path).load(3, VALUES)
    assert found is not None and all(torch.equal(found[name], VALUES[name]) for name in VALUES)
    assert path.relative_to(tmp_path).parts[:2] == ("sites", KEY) and path.stat().st_mode & 0o077 == 0
    assert all(folder.stat().st_mode & 0o077 == 0 for folder in (path.parent, path.parent.parent, tmp_path / "sites"))


def test_the_last_round_and_the_one_it_went_on_from_are_kept(tmp_path: Path) -> None:
    kept = state(tmp_path)
    for number, before in ((1, 0), (2, 1), (5, 2), (6, 2), (7, 6)):
        kept.save(number, times(number), before)
        assert kept.rounds() == sorted({before, number} - {0})
    # A server that lost round 7 begins it once more from 6; what the first attempt left is written over.
    again = kept.load(6, VALUES)
    assert again is not None and torch.equal(again["adapter.0.b"], torch.tensor(3.0))
    kept.save(7, times(70), 6)
    second = kept.load(7, VALUES)
    assert second is not None and float(second["adapter.0.b"]) == 35.0 and kept.rounds() == [6, 7]


def test_a_state_that_is_not_here_is_an_error_that_says_what_is(tmp_path: Path) -> None:
    kept = state(tmp_path)
    with pytest.raises(StateError, match="state after round 4, but rounds kept here: none"):
        kept.load(4, VALUES)
    kept.save(7, VALUES, 6)
    with pytest.raises(StateError, match="state after round 4, but rounds kept here: 7"):
        kept.load(4, VALUES)


def test_runs_and_sites_do_not_see_each_other(tmp_path: Path) -> None:
    state(tmp_path).save(1, VALUES, 0)
    for other in (state(tmp_path, key="f" * 32), state(tmp_path, site="b")):
        with pytest.raises(StateError):
            other.load(1, VALUES)


def test_damage_another_algorithm_and_another_adapter(tmp_path: Path) -> None:
    kept = state(tmp_path)
    path = kept.save(1, VALUES, 0)
    with pytest.raises(StateError, match="is of 'ditto', not 'scaffold'"):
        state(tmp_path, algorithm="scaffold").load(1, VALUES)
    with pytest.raises(StateError, match=r"'adapter\.0\.b' doesn't belong"):
        kept.load(1, {"adapter.0.w": VALUES["adapter.0.w"]})
    with pytest.raises(StateError, match=r"'adapter\.0\.b' is \[\], must be \[2\]"):
        kept.load(1, {**VALUES, "adapter.0.b": torch.zeros(2)})
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(StateError, match="is damaged"):
        kept.load(1, VALUES)


def test_no_new_beginning_once_the_server_counted_on_a_state(tmp_path: Path) -> None:
    kept = state(tmp_path)
    kept.save(1, VALUES, 0)
    assert kept.load(0, VALUES) is None  # nobody has used it yet: its reply may have been dropped
    assert kept.load(1, VALUES) is not None
    with pytest.raises(StateError, match=r"it counted on its state before .*1.*Does another site use the same name"):
        state(tmp_path).load(0, VALUES)
    assert kept.rounds() == [1]
    assert state(tmp_path, site="b").load(0, VALUES) is None


def test_a_new_beginning_deletes_nothing_that_may_still_count(tmp_path: Path) -> None:
    kept = state(tmp_path)
    for number in range(1, MAX_UNUSED + 1):
        kept.save(number, times(number), 0)
        assert kept.rounds() == list(range(1, number + 1))
    kept.save(MAX_UNUSED + 1, VALUES, 0)
    assert kept.rounds() == list(range(2, MAX_UNUSED + 2))
    kept.save(20, VALUES, 5)
    assert kept.rounds() == [5, 20]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_kept(tmp_path: Path, value: float) -> None:
    kept = state(tmp_path)
    kept.save(1, VALUES, 0)
    with pytest.raises(StateError, match=r"of round 2 isn't finite: 'adapter\.0\.b'"):
        kept.save(2, {**VALUES, "adapter.0.b": torch.tensor(value)}, 1)
    assert kept.rounds() == [1]


@pytest.mark.parametrize("key", ["", "../../etc", "A" * 32, "0" * 31, "0" * 33, "0" * 32 + "\n"])
def test_a_forged_key_reaches_no_path(tmp_path: Path, key: str) -> None:
    with pytest.raises(WireError, match="must be 32 hex digits"):
        state(tmp_path, key=key)


def test_a_write_that_breaks_off_leaves_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = state(tmp_path)
    kept.save(1, VALUES, 0)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(site_state, "write_synced", full)
    with pytest.raises(StateError, match="No space left"):
        kept.save(2, times(2), 1)
    assert kept.rounds() == [1]


def test_old_runs_are_deleted_by_age_and_by_number(tmp_path: Path) -> None:
    keys = [f"{i:032x}" for i in range(MAX_RUNS + 3)]
    for key in keys:
        state(tmp_path, key=key).save(1, VALUES, 0)
    now = time.time()
    for age, key in enumerate(keys):  # the first is the youngest
        if (tmp_path / "sites" / key).exists():
            os.utime(tmp_path / "sites" / key, (now - 100 * age, now - 100 * age))
    state(tmp_path).save(1, VALUES, 0)
    left = {path.name for path in (tmp_path / "sites").iterdir()}
    assert len(left) == MAX_RUNS and KEY in left
    old = tmp_path / "sites" / min(left - {KEY})
    os.utime(old, (now - MAX_AGE_SECONDS - 60, now - MAX_AGE_SECONDS - 60))
    state(tmp_path).save(2, VALUES, 1)
    assert {path.name for path in (tmp_path / "sites").iterdir()} == left - {old.name}
