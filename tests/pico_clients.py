"""Two pico sites with a text each, behind the real client app: what the tests of whole federations begin with."""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from offsite_fl.local.open_network import networks
from offsite_fl.models.split import Split
from offsite_fl.owner import ModelOwner
from offsite_fl.strategies import OffsiteTuning
from simulations.in_process import task_identity
from tests.conftest import make_pico, make_tokenizer

WORDS = ("rain falls on the hills. ", "we sold 40 bolts of cloth. ")


@contextlib.contextmanager
def fresh_process() -> Iterator[None]:
    """As in a process that was just started for a Flower run: no bundle is open, and messages can be made."""
    networks.clear()
    with task_identity():
        yield
    networks.clear()


def owner_with_bundle(
    folder: Path, emulator: str = "layer-drop:keep=2", family: str = "llama", first: int = 1
) -> ModelOwner:
    """The owner of a pico model who tunes its ``first`` blocks and the last one, its bundle in ``folder``."""
    found = ModelOwner(make_pico(family), make_tokenizer(), Split(first=first, last=1))
    found.make_bundle(emulator, folder / "bundle")
    gc.collect()
    return found


@pytest.fixture(name="owner", scope="module")
def one_owner(tmp_path_factory: pytest.TempPathFactory) -> ModelOwner:
    """``owner`` for the test modules that import this: a pico llama, two of its four middle blocks in the emulator."""
    return owner_with_bundle(tmp_path_factory.mktemp("owner"))


@pytest.fixture(name="process", autouse=True)
def own_process() -> Iterator[None]:
    """For every test of the modules that import this."""
    with fresh_process():
        yield


def two_sites(
    folder: Path, rows: Sequence[int] = (2, 3), caches: Sequence[str] = ("cache-0", "cache-1")
) -> dict[int, dict[str, Any]]:
    """Node configs of the sites a and b, each with a file of so many rows, and a cache under ``folder``."""
    nodes = {}
    for i, words in enumerate(WORDS):
        data = folder / f"data-{i}.jsonl"
        data.write_text("\n".join(json.dumps({"text": words * 8}) for _ in range(rows[i])))
        nodes[500 + i] = {"name": "ab"[i], "data": str(data), "cache-dir": str(folder / caches[i])}
    return nodes


def reasons(strategy: OffsiteTuning) -> list[str]:
    """Why replies were dropped, in all rounds."""
    return [dropped.reason for record in strategy.history for dropped in record.dropped]
