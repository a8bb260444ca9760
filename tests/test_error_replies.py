"""What a site tells the server of an error: the reason, and nothing of where things lie on its disk."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp.strategy import FedAvg

from offsite_fl.bundle import Cache, cache, incoming
from offsite_fl.client_app import make_client_app
from offsite_fl.config import TuneConfig
from offsite_fl.errors import BundleError
from offsite_fl.local import site_state
from offsite_fl.local.answering import HIDDEN
from offsite_fl.local.open_network import networks
from offsite_fl.owner import ModelOwner
from offsite_fl.strategies import FedPer, OffsiteTuning
from tests.flower_fakes import FakeGrid, all_nodes
from tests.pico_clients import one_owner, own_process, two_sites  # noqa: F401  (fixtures)

TUNE = TuneConfig(max_steps=1, lr=1e-2, batch_size=2, block_size=12, progress=False, device="cpu", validation_share=0.3)
Break = Callable[[pytest.MonkeyPatch, dict[str, Any], Path], Any]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A site's folder, with a blank in its name."""
    (tmp_path / "J Doe").mkdir()
    return tmp_path / "J Doe"


@pytest.fixture
def site(place: Path) -> dict[str, Any]:
    return {**two_sites(place)[500], "cache-dir": str(place / "cache")}


def told(owner: ModelOwner, site: dict[str, Any], app: Any = None, base: Any = None, **options: Any) -> list[str]:
    """The reasons of all error replies in two rounds."""
    found: list[str] = []

    def tamper(reply: Message) -> Message:
        if reply.has_error():
            found.append(str(reply.error.reason))
        return reply

    chosen = base or FedAvg(**all_nodes(1))
    strategy = OffsiteTuning(chosen, owner, tune=TUNE)
    strategy.start(FakeGrid(app or make_client_app(), {500: site}, tamper), num_rounds=2, **options)
    return found


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*args: object, **options: object) -> Any:
        raise error

    return fail


def no_folder(patch: pytest.MonkeyPatch, site: dict[str, Any], place: Path) -> None:
    (place / "file").write_text("x")
    site["cache-dir"] = str(place / "file" / "cache")


def too_small(patch: pytest.MonkeyPatch, site: dict[str, Any], place: Path) -> None:
    site["cache-bytes"] = 10


def full_disk(patch: pytest.MonkeyPatch, site: dict[str, Any], place: Path) -> None:
    patch.setattr(incoming, "write_synced", raising(OSError(28, "No space left on device", str(place / "cache"))))


def no_rename(patch: pytest.MonkeyPatch, site: dict[str, Any], place: Path) -> None:
    patch.setattr(Cache, "adopt", raising(OSError(18, "Invalid cross-device link", str(place), None, str(place))))


def bad_copy(patch: pytest.MonkeyPatch, site: dict[str, Any], place: Path) -> None:
    patch.setattr(cache, "open_bundle", raising(BundleError(f"bundle {place}/cache/incoming/1: a shard is short")))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (no_folder, "BundleError: the cache can't be used: Not a directory"),
        (too_small, "the cache holds at most"),
        (full_disk, "can't be kept: No space left on device"),
        (no_rename, "can't be moved into the cache: Invalid cross-device link"),
        (bad_copy, "(a path of the site): a shard is short"),
    ],
)
def test_a_bundle_that_can_t_be_kept(
    owner: ModelOwner, site: dict[str, Any], place: Path, monkeypatch: pytest.MonkeyPatch, spoil: Break, reason: str
) -> None:
    spoil(monkeypatch, site, place)
    found = told(owner, site)
    assert found and all(reason in each for each in found)
    assert not any("Doe" in each or str(place.parent) in each for each in found)


def test_a_bundle_that_is_gone(owner: ModelOwner, site: dict[str, Any]) -> None:
    def evaluate(server_round: int, arrays: Any) -> None:
        if server_round == 1:
            networks.clear()
            shutil.rmtree(site["cache-dir"])

    (reason, *_) = told(owner, site, evaluate_fn=evaluate)
    assert "isn't in this site's cache" in reason and str(site["cache-dir"]) not in reason


def full(patch: pytest.MonkeyPatch, site: dict[str, Any], place: Path) -> None:
    patch.setattr(site_state, "write_synced", raising(OSError(28, "No space left on device", str(place))))


@pytest.mark.parametrize("damaged", [False, True])
def test_a_state_that_can_t_be_kept_or_read(
    owner: ModelOwner, site: dict[str, Any], place: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    def evaluate(server_round: int, arrays: Any) -> None:
        for path in (place / "cache").glob("sites/*/*/round-*"):
            path.write_bytes(b"1234")

    if not damaged:
        full(monkeypatch, site, place)
    found = told(owner, site, base=FedPer(**all_nodes(1)), evaluate_fn=evaluate if damaged else None)
    assert found and all("StateError: this site's state" in each for each in found)
    assert not any("Doe" in each or os.sep in each for each in found)


@pytest.mark.parametrize("where", ["load_data", "name", "train_mods", "mods"])
def test_of_foreign_exceptions_only_the_type_is_told(
    owner: ModelOwner, site: dict[str, Any], place: Path, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    def fail(*_: object) -> Any:
        raise FileNotFoundError(2, "No such file or directory", str(place / "patients.csv"))

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        return fail() if message.metadata.message_type == "train" else call_next(message, context)  # type: ignore[no-any-return]

    options: Any = {where: [mod] if where.endswith("mods") else fail}
    logging.getLogger("flwr").addHandler(caplog.handler)
    try:
        found = told(owner, site, make_client_app(**options))
    finally:
        logging.getLogger("flwr").removeHandler(caplog.handler)
    assert found and set(found) == {f"FileNotFoundError: {HIDDEN}"}
    assert str(place / "patients.csv") in caplog.text
