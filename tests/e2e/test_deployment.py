"""Two sites, real SuperNodes, tune a model that is on no disk while they work (fault 24); then one is restarted.

The strategy is FedBiOT, whose client in the public code can't run so (fault 14).
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from offsite_fl.bundle.owner_map import OwnerMap
from offsite_fl.errors import ModelError
from offsite_fl.evaluation.record import RunReport
from offsite_fl.evaluation.rows import ROW_KEYS
from offsite_fl.models.load import load_model
from simulations.local_flower import BIN, PATHS, QUIET, LocalFlower, background, config_text, free_port, superlink
from tests.by_name import spec
from tests.conftest import make_pico
from tests.e2e.conftest import APP, OWNERS, PATIENCE, SETTINGS, running, write_data, write_model


@contextmanager
def started(
    flower: LocalFlower, server: Path, run: str, more: Mapping[str, object]
) -> Iterator[subprocess.Popen[bytes]]:
    """``flwr run`` of the quickstart, as far as the bundle; by then the full model's files are deleted.

    So it is shown that sites do without the full model. Watching from inside Python what they open would miss the
    libraries that open files by themselves, as safetensors does; hiding a folder by mounts or permissions takes rights
    that not every machine gives. But the server reads the files only once, before anything else, and round 1 waits for
    two SuperNodes: files that are deleted before the second SuperNode starts, nobody can open.
    """
    model, folder, log = server / "model", server / run, server / f"{run}.log"
    write_model(model)
    settings = SETTINGS | {"model": model, "data.folder": server / "data", "run.folder": folder}
    settings |= {"strategy": spec("fedbiot"), **more}
    with background(flower.command(APP, settings), flower.environment, log) as process:
        wait_for(folder / "bundle.owner.json", process, log)  # written after the bundle
        shutil.rmtree(model)
        with pytest.raises(ModelError, match="doesn't exist"):
            load_model(model)
        yield process


@contextmanager
def site(folder: Path, address: str, more: Mapping[str, object] | None = None) -> Iterator[None]:
    """The SuperNode of the site that lives in ``folder`` and has nothing else of ours.

    Its environment is made from nothing: home, caches of Hugging Face and of bundles, and the folder it works in are
    its own, so that neither a path nor a cache of this process leads it to anybody's files.
    """
    home = folder / "home"
    home.mkdir(exist_ok=True)
    environment = {
        **QUIET,
        "PATH": PATHS,
        "HOME": str(home),
        "FLWR_HOME": str(home / "flwr"),
        "HF_HOME": str(home / "hf"),
        "OFFSITE_FL_CACHE": str(home / "unused"),
        "OMP_NUM_THREADS": "1",
    }
    config = {"name": folder.name, "data": folder / "data.jsonl", "cache-dir": folder / "cache"} | dict(more or {})
    command = [str(BIN / "flower-supernode"), "--insecure", "--superlink", address, "--port", str(free_port())]
    command += ["--node-config", config_text(config)]
    with background(command, environment, folder / "supernode.log", cwd=home):
        yield


def wait_for(file: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until ``process`` has made ``file``."""
    deadline = time.monotonic() + PATIENCE
    while not file.is_file():
        assert process.poll() is None, f"the process ended before it made {file}:\n{log.read_text()}"
        assert time.monotonic() < deadline, f"{file} isn't there after {PATIENCE:.0f} s:\n{log.read_text()}"
        time.sleep(0.1)


def finished(process: subprocess.Popen[bytes], server: Path, run: str) -> RunReport:
    """The report of a run that ended well, with both sites in every round."""
    assert process.wait(PATIENCE) == 0, (server / f"{run}.log").read_text()
    report = RunReport.read(server / run)
    for entry in report.rounds[1:]:
        assert set(entry.clients) == set(OWNERS)
        assert not entry.dropped and not entry.skipped
    return report


def prepare(ground: Path) -> Path:
    """Each site's file in its own folder; the server's folder beside them."""
    server = ground / "server"
    write_data(server / "data")
    for name in OWNERS:
        (ground / name).mkdir()
        shutil.copy(server / "data" / f"{name}.jsonl", ground / name / "data.jsonl")
    return server


def content(folder: Path) -> bytes:
    """Everything that is in the files of a folder."""
    return b"\0".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def check_delivered_once(report: RunReport, bundle: Path) -> None:
    """Each site got all the bundle's files, once, in round 1; on the wire a file has a header and its name besides."""
    size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    for name in OWNERS:
        assert size <= report.ledger.total(kind="bundle", round=1, node=name) < 1.01 * size
    assert report.ledger.total(kind="bundle") == report.ledger.total(kind="bundle", round=1) < 1.01 * size * len(OWNERS)


def check_patched(report: RunReport) -> None:
    """The server's patch came to each site in each round; no reply was dropped, so each site's emulator had it."""
    for entry in report.rounds[1:]:
        sent = {report.ledger.total(kind="patch", direction="down", round=entry.round, node=name) for name in OWNERS}
        assert len(sent) == 1 and min(sent) > 0


def check_what_a_site_holds(folder: Path, note: OwnerMap) -> None:
    """What the bundle lists is on the site's disk, bit for bit; of the blocks that were dropped there is no tensor."""
    full = {name: tensor.numpy().tobytes() for name, tensor in make_pico("llama").state_dict().items()}
    kept = set(note.slots.values())
    dropped = {name for name in full if name.startswith(note.blocks_path)} - kept
    assert len(kept) == 2 * len(dropped) > 0  # 4 blocks of 6
    found = content(folder)
    assert [name for name in kept if full[name] not in found] == []
    assert [name for name in dropped if full[name] in found] == []


def test_sites_tune_what_they_never_hold_and_keep_the_bundle_over_a_restart(ground: Path) -> None:
    server, north, south = prepare(ground), ground / "north", ground / "south"
    with superlink(server) as flower, ExitStack() as until_the_end:
        with started(flower, server, "first", {}) as run, site(north, flower.address):
            until_the_end.enter_context(site(south, flower.address))
            first = finished(run, server, "first")
            assert any("flower-supernode" in line for line in running(ground))  # they can be found while they run
        # Only a comparison needs the owners' data on the server. From here on it hasn't got them, as in real life.
        for name in OWNERS:
            (server / "data" / f"{name}.jsonl").unlink()
        settings = {"baseline.run": False, "num-server-rounds": 1}
        own = {"validation-data": north / "data.jsonl"}
        # South lives on, north is a new process over its old cache.
        with started(flower, server, "second", settings) as run, site(north, flower.address, own):
            second = finished(run, server, "second")

    notes = [OwnerMap.load(server / run / "bundle") for run in ("first", "second")]
    assert notes[0].digest == notes[1].digest
    assert [key for key, _ in first.rows] == list(ROW_KEYS)
    assert len(first.rounds) == 1 + 2
    check_delivered_once(first, server / "first" / "bundle")
    check_patched(first)
    check_patched(second)
    for folder in (north, south):
        check_what_a_site_holds(folder, notes[0])

    assert [key for key, _ in second.rows] == list(ROW_KEYS[:4])
    assert len(second.rounds) == 1 + 1
    assert second.ledger.total(kind="bundle") == 0
    assert [name for name, told in second.rounds[1].clients.items() if "evaluate_loss" in told] == ["north"]
    # The same seed on the same data through a bundle from the cache: the same model to the last bit.
    assert second.rounds[1].plug_in == first.rounds[1].plug_in
