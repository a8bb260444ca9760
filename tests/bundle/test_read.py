"""Opening a bundle: tensors are mapped, and files that are missing, changed or not listed are noticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from offsite_fl.bundle import Bundle, open_bundle
from offsite_fl.bundle.manifest import digest_of
from offsite_fl.errors import BundleError

from .conftest import Forge, refused, shard_of, state_of, write_manifest


def test_a_good_bundle_opens(bundle: Bundle) -> None:
    opened = open_bundle(bundle.path, digest=bundle.digest)
    assert opened == bundle
    assert opened.files()[0] == ("manifest.json", (bundle.path / "manifest.json").stat().st_size, bundle.digest)
    assert {name for name, _, _ in opened.files()} == set(state_of(bundle.path))


def test_tensors_are_mapped_not_read(bundle: Bundle) -> None:
    tensors = open_bundle(bundle.path).tensors()
    before = state_of(bundle.path)
    tensor = tensors["shared.model.embed_tokens.weight"]
    assert not tensors._open.keys() - {s.file for s in bundle.manifest.shards if s.kind == "shared"}
    tensor += 1  # a private copy of the pages: the file stays as it is
    assert state_of(bundle.path) == before
    with pytest.raises(KeyError):
        tensors["adapter.99.nothing"]


def test_read_file_is_bounded_to_what_is_listed(bundle: Bundle) -> None:
    for name, size, _ in bundle.files():
        assert bundle.read_file(name) == (bundle.path / name).read_bytes()
        assert len(bundle.read_file(name)) == size
    for name in ("../secret", "/etc/passwd", "shards", "shards/shared-99999.safetensors"):
        with pytest.raises(BundleError, match="has no file"):
            bundle.read_file(name)
    path = shard_of(bundle.path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="has changed"):
        bundle.read_file("shards/shared-00001.safetensors")
    path.write_bytes(bytes(data) + b"more")
    with pytest.raises(BundleError, match="at most"):
        bundle.read_file("shards/shared-00001.safetensors")


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="doesn't exist"):
        open_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"manifest\.json is missing"):
        open_bundle(tmp_path)


def test_another_bundle_than_asked_for(bundle: Bundle) -> None:
    refused(bundle.path, "isn't the bundle asked for", digest="0" * 64)


@pytest.mark.parametrize("kind", ["adapter", "emulator", "shared"])
def test_truncated_and_lengthened(bundle: Bundle, kind: str) -> None:
    path = shard_of(bundle.path, kind)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    refused(bundle.path, rf"{kind}-00001\.safetensors is truncated: it has {len(data) - 1} bytes")
    path.write_bytes(data + b"\0")
    refused(bundle.path, "too long")
    path.unlink()
    refused(bundle.path, rf"{kind}-00001\.safetensors is missing")


def test_tampered_tensor_and_tokenizer(bundle: Bundle) -> None:
    for path in (shard_of(bundle.path), bundle.path / "tokenizer" / "tokenizer.json"):
        data = bytearray(path.read_bytes())
        data[-3] ^= 4
        path.write_bytes(data)
        refused(bundle.path, rf"{path.name} has been changed: its SHA-256")
        data[-3] ^= 4
        path.write_bytes(data)
    open_bundle(bundle.path)


@pytest.mark.parametrize("name", ["extra.txt", "shards/extra.safetensors", "tokenizer/run.py", "code/x.py"])
def test_files_that_are_not_listed(bundle: Bundle, name: str) -> None:
    (bundle.path / name).parent.mkdir(exist_ok=True)
    (bundle.path / name).write_text("print('boo')")
    refused(bundle.path, "is in the folder but not in the manifest")


@pytest.mark.parametrize(
    "name", ["manifest.json", "shards", "shards/shared-00001.safetensors", "tokenizer/tokenizer.json"]
)
def test_links_are_not_followed(bundle: Bundle, tmp_path: Path, name: str) -> None:
    moved = tmp_path / "elsewhere"
    (bundle.path / name).rename(moved)
    (bundle.path / name).symlink_to(moved)
    refused(bundle.path, "link")


def test_a_folder_in_place_of_a_file(bundle: Bundle) -> None:
    shard_of(bundle.path).unlink()
    shard_of(bundle.path).mkdir()
    refused(bundle.path, "ordinary file")


def test_without_verify_only_the_hashes_are_skipped(bundle: Bundle) -> None:
    path = shard_of(bundle.path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert open_bundle(bundle.path, verify=False).digest == bundle.digest
    path.write_bytes(data[:-1])
    refused(bundle.path, "truncated", verify=False)


def test_a_lost_file_after_opening(bundle: Bundle) -> None:
    tensors = bundle.tensors()
    shutil.rmtree(bundle.path / "shards")
    with pytest.raises(BundleError, match="can't be read any more"):
        tensors["shared.lm_head.weight"]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_of_any_file_is_noticed(bundle: Bundle, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([name for name, _, _ in bundle.files()]))
    path = bundle.path / name
    good = path.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bad)
    try:
        with pytest.raises(BundleError):
            open_bundle(bundle.path, digest=bundle.digest)
        if name == "manifest.json":
            # Without the digest told by another way, what opens is another bundle under another name.
            assert digest_of(bytes(bad)) != bundle.digest
    finally:
        path.write_bytes(good)


def test_mapped_dtype_and_shape_are_the_manifests(bundle: Bundle) -> None:
    widths = {"F32": torch.float32, "F16": torch.float16, "U8": torch.uint8}
    for shard in bundle.manifest.shards:
        with safe_open(bundle.path / shard.file, framework="pt") as file:
            for name, entry in shard.tensors.items():
                tensor = file.get_tensor(name)
                assert (tensor.dtype, tuple(tensor.shape)) == (widths[entry.dtype], entry.shape)
                assert entry.bytes == tensor.numel() * tensor.element_size()


def test_forging_helper_makes_openable_bundles(forge: Forge) -> None:
    open_bundle(forge(lambda *_: None))
    folder = forge(lambda *_: None)
    write_manifest(folder, json.loads((folder / "manifest.json").read_bytes()))
    open_bundle(folder)
