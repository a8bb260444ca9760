"""A tiny model, two data owners' files, a grid of them, and which of the processes that a test started still run."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from offsite_fl.config import CACHE_VARIABLE
from simulations.local_flower import BIN
from tests.conftest import make_pico, make_tokenizer

APP = Path(__file__).parents[2] / "simulations" / "quickstart"
OWNERS = ("north", "south")
PATIENCE = 240.0  # seconds; far above what a run takes, so that a hang is a failure and not a stuck job

# Of the model's six blocks one at each end is tuned, and two of the four between stay in the emulator.
SETTINGS: dict[str, object] = {
    "split": "1-1",
    "emulator": "layer-drop:keep=2",
    "calibration-tokens": 64,
    "num-server-rounds": 2,
    "tune.max-steps": 2,
    "tune.batch-size": 2,
    "tune.block-size": 16,
    "tune.schedule-steps": 4,
    "tune.lr": 0.01,
    "data.owners": ",".join(OWNERS),
    "test.tokens": 64,
}

# A grid for ``offsite-fl compare``, in the folder of write_model's "model" and write_data's "data".
GRID = """
[model]
path = "model"
split = "{split}"
calibration-tokens = 64
[data]
folder = "data"
owners = ["north", "south"]
[grid]
strategies = {strategies}
emulators = ["layer-drop:keep=2"]
partitions = ["natural"]
clients = [2]
rounds = {rounds}
[tune]
max-steps = 1
batch-size = 2
block-size = 16
lr = 0.01
[test]
tokens = 64
"""


def write_grid(folder: Path, strategies: Sequence[str], split: str, rounds: int, more: str = "") -> None:
    """``grid.toml`` of these strategies; ``more`` are further tables."""
    text = GRID.format(split=split, strategies=json.dumps(strategies), rounds=rounds)
    (folder / "grid.toml").write_text(text + more)


def compare(ground: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """``offsite-fl compare`` of the grid in ``ground``, with the result as JSON on stdout."""
    environment = {**os.environ, CACHE_VARIABLE: str(ground / "cache")}
    command = [str(BIN / "offsite-fl"), "compare", "grid.toml", "--out", "out", "--json", *more]
    return subprocess.run(command, cwd=ground, env=environment, capture_output=True, text=True, timeout=PATIENCE)


def write_model(folder: Path) -> None:
    """The full model: LLaMA of 6 blocks, the same to the bit each time."""
    make_pico("llama").save_pretrained(folder)  # type: ignore[operator]
    make_tokenizer().save_pretrained(folder)


def write_data(folder: Path) -> None:
    """One file for each owner, ``test.jsonl`` and ``public.txt``."""
    folder.mkdir(parents=True)
    for stem, what in zip((*OWNERS, "test"), ("snow", "sand", "rain"), strict=True):
        texts = [f"{what} fell on the {where} and the {where} was still. " * 4 for where in ("hill", "house", "road")]
        (folder / f"{stem}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "public.txt").write_text("the cat sat on the mat and the dog lay by the door. " * 20)


def running(mark: Path) -> list[str]:
    """Command lines of all processes whose environment mentions ``mark``, wherever they have moved since."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.fsencode(mark) in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:  # it ended meanwhile, or belongs to somebody else
            continue
    return found


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[Path]:
    """An empty folder for everything that a test starts; afterwards nothing that knows of it may run."""
    if not Path("/proc/self/environ").exists():
        pytest.skip("what still runs is read from /proc")
    yield tmp_path
    deadline = time.monotonic() + 30
    while left := running(tmp_path):  # Flower's executors look every second whether their parent is still there
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
