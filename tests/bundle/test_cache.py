"""The client's cache: filled over restarts, verified, bounded, and safe with two processes at once."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from offsite_fl.bundle import Bundle, Cache, Limits, cache
from offsite_fl.config import cache_root
from offsite_fl.errors import BundleError, ConfigError

from .conftest import Parts, state_of


def fetch(source: Bundle, store: Cache, node: str | int = 0) -> Bundle:
    incoming = store.receiver(source.digest, node)
    incoming.store("manifest.json", source.read_file("manifest.json"))
    for name in incoming.missing():
        incoming.store(name, source.read_file(name))
    return incoming.commit()


@pytest.fixture
def other(parts: Parts, tmp_path: Path) -> Bundle:
    """A second bundle of about the same size."""
    parts.tensors["shared.model.norm.weight"] = torch.full((32,), 2.0)
    return parts.write(tmp_path / "other", shard_bytes=30_000)


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts as a new process would: nothing known to be verified."""
    monkeypatch.setattr(cache, "_verified", {})


def test_the_root_comes_from_the_argument_the_environment_or_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OFFSITE_FL_CACHE", str(tmp_path / "env"))
    assert cache_root() == tmp_path / "env"
    assert cache_root(tmp_path / "arg") == tmp_path / "arg"
    monkeypatch.delenv("OFFSITE_FL_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "offsite-fl"


def test_the_cap_comes_from_the_argument_the_environment_or_20_gb(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Cache().max_bytes == 20 * 10**9
    monkeypatch.setenv("OFFSITE_FL_CACHE_BYTES", "3GB")
    assert Cache().max_bytes == 3 * 10**9
    assert Cache(max_bytes="1.5 MiB").max_bytes == 3 * 2**19
    monkeypatch.setenv("OFFSITE_FL_CACHE_BYTES", "much")
    with pytest.raises(ConfigError, match="'much'"):
        Cache()


def test_a_bundle_travels_file_by_file(written: Bundle, cache_dir: Path) -> None:
    store = Cache()
    assert store.find(written.digest) is None and store.digests() == []
    incoming = store.receiver(written.digest, node=7)
    assert incoming.missing() == ["manifest.json"]
    incoming.store("manifest.json", written.read_file("manifest.json"))
    names = [name for name, _, _ in written.files()][1:]
    assert incoming.missing() == names
    for name in reversed(names):
        incoming.store(name, written.read_file(name))
    assert incoming.missing() == []
    held = incoming.commit()
    assert held.path == cache_dir / "bundles" / written.digest
    assert state_of(held.path) == state_of(written.path)
    assert not any((cache_dir / "incoming").iterdir())
    assert store.size() == written.total_bytes
    again = Cache().find(written.digest)
    assert again is not None and again.files() == written.files()
    for name, tensor in written.tensors().items():
        assert torch.equal(again.tensors()[name], tensor)


def test_a_transfer_goes_on_after_a_restart(written: Bundle, cache_dir: Path) -> None:
    names = [name for name, _, _ in written.files()]
    for name in names:  # Flower starts a new process for each message
        store = Cache()
        incoming = store.receiver(written.digest, node=1)
        assert name == incoming.missing()[0]
        with pytest.raises(BundleError, match="isn't complete"):
            incoming.commit()
        incoming.store(name, written.read_file(name))
    # A process that died while it wrote leaves a part of a file.
    (store.incoming / os.listdir(store.incoming)[0] / "shards" / ".adapter-00001.safetensors.1234").write_text("half")
    assert Cache().receiver(written.digest, node=1).commit().digest == written.digest


def test_sending_a_file_again_is_fine(written: Bundle, cache_dir: Path) -> None:
    incoming = Cache().receiver(written.digest, 0)
    for _ in range(2):
        for name, _, _ in written.files():
            incoming.store(name, written.read_file(name))
    assert incoming.commit().digest == fetch(written, Cache()).digest == written.digest


def test_nodes_do_not_share_a_staging_folder(written: Bundle, cache_dir: Path) -> None:
    one, two = (Cache().receiver(written.digest, node) for node in ("a/../../b", "b"))
    one.store("manifest.json", written.read_file("manifest.json"))
    assert two.missing() == ["manifest.json"] and one.folder.parent == two.folder.parent == cache_dir / "incoming"


def test_what_does_not_belong_is_not_kept(written: Bundle, cache_dir: Path) -> None:
    incoming = Cache().receiver(written.digest, 0)
    manifest = written.read_file("manifest.json")
    shard = written.files()[1][0]
    for name, data, message in [
        (shard, written.read_file(shard), "must be the first"),
        ("manifest.json", manifest[:-1] + b" ", "has digest"),
    ]:
        with pytest.raises(BundleError, match=message):
            incoming.store(name, data)
    assert not incoming.folder.exists()
    incoming.store("manifest.json", manifest)
    before = state_of(cache_dir)
    good = bytearray(written.read_file(shard))
    for name, data, message in [
        ("../../evil", b"x", "isn't a file of the bundle"),
        ("/etc/passwd", b"x", "isn't a file of the bundle"),
        ("shards/shared-99999.safetensors", b"x", "isn't a file of the bundle"),
        (shard, bytes(good[:-1]), "came with"),
        (shard, bytes(good[:-1] + bytes([good[-1] ^ 1])), "damaged on its way"),
    ]:
        with pytest.raises(BundleError, match=message):
            incoming.store(name, data)
    assert state_of(cache_dir) == before


@pytest.mark.parametrize("digest", ["", "../x", "A" * 64, "a" * 63, "a" * 63 + "/", "a" * 64 + "\n"])
def test_a_digest_from_the_wire_is_no_path(cache_dir: Path, digest: str) -> None:
    for use in (Cache().find, lambda d: Cache().receiver(d, 0)):
        with pytest.raises(BundleError, match="isn't a bundle digest"):
            use(digest)
    assert not cache_dir.exists()


def test_a_manifest_is_judged_before_any_shard_is_asked_for(written: Bundle, cache_dir: Path) -> None:
    data = written.read_file("manifest.json")
    for store, message in [
        (Cache(limits=Limits(max_bytes=1000)), "the whole bundle"),
        (Cache(limits=Limits(max_blocks=2)), "the limit is 2"),
        (Cache(max_bytes=1000), "OFFSITE_FL_CACHE_BYTES"),
    ]:
        with pytest.raises(BundleError, match=message):
            store.receiver(written.digest, 0).store("manifest.json", data)
    assert state_of(cache_dir) == {}


def test_a_full_disk_is_said_early(written: Bundle, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(BundleError, match="free"):
        Cache().receiver(written.digest, 0).store("manifest.json", written.read_file("manifest.json"))


def test_a_cache_that_cannot_be_written(written: Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="can't be used"):
        Cache(tmp_path / "file").receiver(written.digest, 0)


def test_hashes_are_computed_once_a_process(written: Bundle, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from offsite_fl.bundle import verify

    hashed: list[str] = []
    real = verify.sha256_of
    monkeypatch.setattr(verify, "sha256_of", lambda path, where: hashed.append(path.name) or real(path, where))
    fetch(written, Cache())
    files = len(written.files()) - 1
    assert len(hashed) == files  # at commit, and not again for opening
    assert Cache().find(written.digest) is not None and len(hashed) == files
    monkeypatch.setattr(cache, "_verified", {})  # a new process
    assert Cache().find(written.digest) is not None and len(hashed) == 2 * files


def test_a_damaged_copy_is_dropped_and_fetched_again(
    written: Bundle, cache_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held = fetch(written, Cache())
    shard = held.path / held.files()[1][0]
    del held  # a bundle that is open isn't deleted
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)  # seen in this process too: the file's time has changed
    assert Cache().find(written.digest) is None
    assert "has been changed" in caplog.text and Cache().digests() == []
    assert fetch(written, Cache()).digest == written.digest


def test_a_damaged_copy_in_use_is_not_deleted(written: Bundle, cache_dir: Path) -> None:
    held = fetch(written, Cache())
    (held.path / "extra").write_text("x")
    with pytest.raises(BundleError, match="'extra' is in the folder"):
        Cache().find(written.digest)
    assert held.path.exists()


def test_a_disk_that_damages_staged_files(written: Bundle, cache_dir: Path) -> None:
    incoming = Cache().receiver(written.digest, 0)
    for name, _, _ in written.files():
        incoming.store(name, written.read_file(name))
    shard = incoming.folder / written.files()[1][0]
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(BundleError, match="has been changed"):
        incoming.commit()
    assert incoming.missing() == ["manifest.json"]  # all of it comes again
    assert fetch(written, Cache()).digest == written.digest


def age(store: Cache, digest: str, seconds: float) -> None:
    stamp = time.time() - seconds
    os.utime(store.bundles / f"{digest}.lock", (stamp, stamp))


def test_the_least_recently_used_is_evicted(written: Bundle, other: Bundle, parts: Parts, tmp_path: Path) -> None:
    parts.tensors["shared.model.norm.weight"] = torch.full((32,), 3.0)
    third = parts.write(tmp_path / "third", shard_bytes=30_000)
    room = written.total_bytes + other.total_bytes + third.total_bytes // 2
    store = Cache(tmp_path / "cache", room)
    for bundle in (written, other):
        fetch(bundle, store)
    age(store, written.digest, 100)
    age(store, other.digest, 50)
    assert store.digests() == [written.digest, other.digest]
    assert store.find(written.digest) is not None  # a use: now the other one is the older
    assert store.digests() == [other.digest, written.digest]
    fetch(third, store)
    assert sorted(store.digests()) == sorted([written.digest, third.digest])
    assert store.size() <= room and not any(store.trash.iterdir())
    assert sorted(p.name for p in store.bundles.glob("*.lock")) == sorted(f"{d}.lock" for d in store.digests())


def test_what_is_in_use_is_not_evicted(
    written: Bundle, other: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Cache(tmp_path / "cache", written.total_bytes + other.total_bytes // 2)
    tensors = fetch(written, store).tensors()  # holds on even when the Bundle itself is gone
    fetch(other, store)
    assert sorted(store.digests()) == sorted([written.digest, other.digest])
    assert "in use" in caplog.text
    assert tensors["shared.model.norm.weight"].shape == (32,)
    del tensors
    store.make_room(other.total_bytes)
    assert store.digests() == []


def test_transfers_that_were_given_up_are_cleaned(written: Bundle, cache_dir: Path) -> None:
    store = Cache()
    old, new = store.receiver(written.digest, "old"), store.receiver(written.digest, "new")
    for incoming in (old, new):
        incoming.store("manifest.json", written.read_file("manifest.json"))
    stamp = time.time() - 10 * 24 * 3600
    os.utime(old.folder, (stamp, stamp))
    (store.trash / "left").mkdir()
    os.utime(store.trash / "left", (stamp, stamp))
    Cache().receiver(written.digest, "third")
    assert not old.folder.exists() and new.folder.exists() and not (store.trash / "left").exists()


def in_two_processes(*works: Callable[[], object]) -> list[str]:
    """Run each function in a process of its own, at the same moment; what they return (or raise), as text.

    Forked, because importing the libraries again would take longer than all that is tested here.
    """
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(len(works)), context.SimpleQueue()

    def run(number: int) -> None:
        barrier.wait(timeout=60)
        try:
            results.put((number, f"{works[number]()}"))
        except BaseException as error:
            results.put((number, repr(error)))

    processes = [context.Process(target=run, args=(number,)) for number in range(len(works))]
    for process in processes:
        process.start()
    answers = dict(results.get() for _ in works)
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    return [answers[number] for number in range(len(works))]


def test_two_processes_fetch_the_same_bundle_at_once(written: Bundle, tmp_path: Path) -> None:
    want = float(sum(tensor.float().sum() for tensor in written.tensors().values()))
    for turn in range(3):
        root = tmp_path / f"cache{turn}"

        def client(node: int, root: Path = root) -> object:
            held = fetch(written, Cache(root), node)
            return held.path, float(sum(tensor.float().sum() for tensor in held.tensors().values()))

        answers = in_two_processes(*(partial(client, node) for node in (1, 2)))
        assert answers == [str((root / "bundles" / written.digest, want))] * 2
        assert not any((root / "incoming").iterdir())
        assert [p.name for p in (root / "bundles").iterdir() if p.is_dir()] == [written.digest]


def test_one_process_evicts_what_another_fetches(written: Bundle, cache_dir: Path) -> None:
    def client() -> str:
        for _ in range(5):
            held = fetch(written, Cache())
            names = set(held.tensors())
            for tensor in held.tensors().values():  # an open bundle stays whole whatever the other one does
                tensor.sum()
            assert len(names) == len(held.manifest.tensors())
        return "done"

    def greedy() -> str:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            Cache().make_room(Cache().max_bytes)
        return "done"

    assert in_two_processes(client, greedy) == ["done", "done"]
    assert state_of(cache_dir / "incoming") == {}


def test_losing_the_race_is_fine(written: Bundle, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process commits between our look and our rename."""
    store = Cache()
    incoming = store.receiver(written.digest, "slow")
    for name, _, _ in written.files():
        incoming.store(name, written.read_file(name))
    adopt = store.adopt

    def overtaken(folder: Path, digest: str) -> None:
        fetch(written, Cache(), "fast")
        adopt(folder, digest)

    monkeypatch.setattr(store, "adopt", overtaken)
    held = incoming.commit()
    assert held.files() == written.files() and not any((cache_dir / "incoming").iterdir())


def test_an_evicted_bundle_stays_readable_where_it_is_mapped(written: Bundle, cache_dir: Path) -> None:
    store = Cache()
    held = fetch(written, store)
    mapped = held.tensors()["shared.model.embed_tokens.weight"]
    want = mapped.clone()
    del held
    store.make_room(store.max_bytes)
    assert store.digests() == [] and torch.equal(mapped, want)


def test_leases_compare_away(written: Bundle, cache_dir: Path) -> None:
    held = fetch(written, Cache())
    assert held == replace(written, path=held.path)
