"""Every fault that a bundle can have gets its own message, before memory is taken, and nothing is touched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from offsite_fl.bundle import Bundle, Limits, open_bundle, read
from offsite_fl.bundle.manifest import digest_of
from offsite_fl.errors import BundleError

from .conftest import state_of, write_manifest

Forge = Callable[..., Path]


def refused(folder: Path, message: str, **options: Any) -> None:
    """``open_bundle`` must raise with ``message``, leave the folder as it was, and never map a tensor."""
    before = state_of(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "safe_open", lambda *_, **__: pytest.fail("a tensor file was mapped"))
        with pytest.raises(BundleError, match=message):
            open_bundle(folder, **options)
    assert state_of(folder) == before


def shard_of(folder: Path, kind: str = "shared", number: int = 1) -> Path:
    return folder / "shards" / f"{kind}-{number:05d}.safetensors"


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "isn't JSON"),
        (b"{", "isn't JSON"),
        (b"\xff\xfe", "isn't JSON"),
        (b"[1]", "holds a list"),
        (b"[" * 100_000, "isn't JSON"),
        (b'{"a":' * 60 + b"1" + b"}" * 60, "nested deeper"),
        (b'{"format_version":NaN}', "NaN isn't JSON"),
        (b'{"format_version":1' + b"0" * 5000 + b"}", "isn't JSON"),
        (b"{}", "format_version None"),
        (b'{"format_version":"1"}', "format_version '1'"),
        (b'{"format_version":true}', "format_version True"),
        (b'{"format_version":0}', "format_version 0"),
        (b'{"format_version":1}', "key 'files' is missing"),
        (b'{"format_version":2,"library_version":"9.1.0"}', r"written by offsite-fl '9\.1\.0'.*upgrade"),
        (b'{"format_version":2,"library_version":"\\u001b[31m"}', r"'\\x1b\[31m'"),
    ],
)
def test_manifests_that_are_no_manifests(bundle: Bundle, text: bytes, message: str) -> None:
    (bundle.path / "manifest.json").write_bytes(text)
    refused(bundle.path, message)


def test_a_manifest_must_be_canonical(bundle: Bundle) -> None:
    path = bundle.path / "manifest.json"
    good = path.read_bytes()
    doubled = good[:-1] + b',"format_version":1}'
    overflow = good.replace(b'"rms_norm_eps":1e-06', b'"rms_norm_eps":1e999')
    half = good.replace(b'"hidden_act":"silu"', b'"hidden_act":"\\ud800"')
    for text in (good + b"\n", good.replace(b",", b", ", 1), doubled, overflow, half):
        assert text != good
        path.write_bytes(text)
        refused(bundle.path, "canonical")


def set_path(*keys: Any, to: Any) -> Callable[[dict[str, Any], Path], None]:
    def edit(raw: dict[str, Any], _: Path) -> None:
        for key in keys[:-1]:
            raw = raw[key]
        raw[keys[-1]] = to

    return edit


def first_tensor(**change: Any) -> Callable[[dict[str, Any], Path], None]:
    def edit(raw: dict[str, Any], _: Path) -> None:
        tensors = raw["shards"][0]["tensors"]
        tensors[min(tensors)].update(change)

    return edit


def rename_tensor(to: str) -> Callable[[dict[str, Any], Path], None]:
    def edit(raw: dict[str, Any], _: Path) -> None:
        tensors = raw["shards"][0]["tensors"]
        tensors[to] = tensors.pop(min(tensors))

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_path("extra", to=1), "unknown key 'extra' in a manifest entry"),
        (lambda raw, _: raw.pop("plan"), "key 'plan' is missing"),
        (set_path("shards", 0, "mode", to=1), "unknown key 'mode' in a shard"),
        (lambda raw, _: raw["files"][0].pop("sha256"), "'sha256' is missing from a file"),
        (first_tensor(offset=1), "unknown key 'offset' in a tensor"),
        (set_path("shards", to={}), "shards must be a JSON list"),
        (set_path("shards", 0, to=7), "an entry of shards must be a JSON object"),
        (set_path("plan", to=[]), "plan must be a JSON object"),
        (set_path("library_version", to="1" * 300), "library_version must be a short text"),
        (set_path("shards", 0, "sha256", to="A" * 64), "64 hex digits"),
        (set_path("shards", 0, "kind", to="shared"), "by its name it is 'adapter'"),
        (set_path("shards", 0, "bytes", to=-1), "whole number"),
        (set_path("shards", 0, "bytes", to=1.0), "whole number"),
        (set_path("shards", 0, "bytes", to=True), "whole number"),
        (set_path("shards", 0, "bytes", to=2**60), r"declared as 1048576\.0 TiB, the limit"),
        (set_path("shards", 0, "bytes", to=10), "its tensors need"),
        (set_path("shards", 0, "bytes", to=2**34), "its tensors need"),
        (set_path("files", 0, "bytes", to=2**40), "the limit is 256"),
        (first_tensor(dtype="F64"), "dtype 'F64'"),
        (first_tensor(dtype=["F32"]), "dtype"),
        (first_tensor(shape=[2**40]), "absurd shape"),
        (first_tensor(shape=[1] * 9), "absurd shape"),
        (first_tensor(shape=[-1]), "whole numbers"),
        (first_tensor(shape=[1.5]), "whole numbers"),
        (first_tensor(shape=[True]), "whole numbers"),
        (first_tensor(shape="ab"), "whole numbers"),
        (rename_tensor("shared.foo"), "isn't a tensor name"),
        (rename_tensor("adapter.0"), "isn't a tensor name"),
        (rename_tensor("adapter.x.weight"), "isn't a tensor name"),
        (rename_tensor("adapter.0.\x1b[2J"), r"\\x1b"),
        (lambda raw, _: raw["shards"].append(raw["shards"][0]), "declared in two shards"),
        (lambda raw, _: raw["files"].append(raw["files"][0]), "listed twice"),
        (lambda raw, _: raw["files"].pop(), "tokenizer is missing"),
    ],
)
def test_forged_manifests(forge: Forge, edit: Any, message: str) -> None:
    refused(forge(edit, honest=False), message)


BAD_NAMES = [
    "../outside.json",
    "/etc/passwd",
    "tokenizer/../../outside.json",
    "tokenizer/..json",
    "tokenizer\\tokenizer.json",
    "C:\\tokenizer.json",
    "tokenizer/sub/tokenizer.json",
    "tokenizer/code.py",
    "tokenizer/weights.bin",
    "tokenizer/model.pkl",
    "tokenizer/a b.json",
    "tokenizer/a\n.json",
    "tokenizer/tokenizer.json\x00",
    "tokenizer/.hidden.json",
    "tokenizer/" + "a" * 200 + ".json",
    "tokenizer.json",
    "",
    "manifest.json",
    7,
    None,
]


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("part", ["shards", "files"])
def test_names_that_lead_elsewhere(forge: Forge, tmp_path: Path, part: str, name: object) -> None:
    (tmp_path / "outside.json").write_text("secret")
    refused(forge(set_path(part, 0, "file", to=name), honest=False), "isn't allowed")


@pytest.mark.parametrize(
    "name", ["shards/adapter-1.safetensors", "shards/x-00001.safetensors", "shards/adapter-00001.bin"]
)
def test_shard_names_are_a_closed_pattern(forge: Forge, name: str) -> None:
    refused(forge(set_path("shards", 0, "file", to=name), honest=False), "isn't allowed for a shard")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(max_bytes=1000), "the whole bundle is declared as"),
        (Limits(max_file_bytes=1000), "the limit is 1000 bytes"),
        (Limits(max_manifest_bytes=100), "at most 100 are allowed"),
        (Limits(max_tokenizer_bytes=10), "the limit is 10 bytes"),
        (Limits(max_tokenizer_files=1), "2 files are declared"),
        (Limits(max_shards=1), "shards are declared, the limit is 1"),
        (Limits(max_tensors=5), "tensors are declared, the limit is 5"),
        (Limits(max_dims=1), "1 dimensions"),
        (Limits(max_dim=63), "absurd shape"),
        (Limits(max_blocks=5), "6 blocks|num_hidden_layers"),
        (Limits(max_parts=3), "num_attention_heads"),
        (Limits(max_header_bytes=50), "tensors need|header"),
        (Limits(max_depth=3), "nested deeper than 3"),
    ],
)
def test_a_site_can_set_its_own_limits(bundle: Bundle, limits: Limits, message: str) -> None:
    refused(bundle.path, message, limits=limits)


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


def rewrite_header(path: Path, edit: Callable[[dict[str, Any]], Any], *, data: bytes | None = None) -> None:
    """Change the header of a safetensors file and keep (or replace) its data."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    text = edit(header)
    text = text if isinstance(text, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + (raw[8 + length :] if data is None else data))


def first(header: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = header[min(header)]
    return entry


def swap_spans(header: dict[str, Any]) -> None:
    same = [n for n in sorted(header) if header[n]["shape"] == first(header)["shape"]]
    header[same[1]]["data_offsets"] = header[same[0]]["data_offsets"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda h: b"{", "header of .* is damaged"),
        (lambda h: b"[]", "isn't a JSON object"),
        (lambda h: b'{"a":1,"a":1}', "repeated"),
        (lambda h: b'{"a":' * 5000, "damaged"),
        (lambda h: h.update(__metadata__={"source": "secret"}), "same tensors, e.g. '__metadata__'"),
        (lambda h: h.pop(min(h)), "same tensors"),
        (lambda h: first(h).update(dtype="F16"), "'F16' .* in the file but F32"),
        (lambda h: first(h).update(shape=[1]), "in the manifest"),
        (lambda h: first(h).update(extra=1), "must hold dtype, shape and data_offsets"),
        (lambda h: first(h).update(data_offsets=[0, 1]), "where it takes"),
        (lambda h: first(h).update(data_offsets=[2**40, 2**40 + 128]), "overlap or leave a gap"),
        (lambda h: first(h).update(data_offsets=[-128, 0]), "data_offsets"),
        (lambda h: first(h).update(data_offsets="ab"), "data_offsets"),
        (swap_spans, "overlap or leave a gap"),
    ],
)
def test_shards_that_disagree_with_the_manifest(forge: Forge, edit: Any, message: str) -> None:
    refused(forge(lambda _, folder: rewrite_header(shard_of(folder, "adapter"), edit)), message)


def test_absurd_headers(forge: Forge) -> None:
    def long_header(_: object, folder: Path) -> None:
        path = shard_of(folder)
        path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])

    def more_data(_: object, folder: Path) -> None:
        path = shard_of(folder)
        path.write_bytes(path.read_bytes() + b"hidden")

    refused(forge(long_header), "declares a header of 4611686018427387904 bytes")
    refused(forge(more_data), "take .* bytes, the file holds")


def harmonizer(**change: Any) -> dict[str, Any]:
    return {"kind": "harmonizer", "in": 32, "rank": 4, "returns": 0} | change


def config(**change: Any) -> Callable[[dict[str, Any], Path], None]:
    return lambda raw, _: raw["plan"]["config"].update(change)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (config(model_type="alien"), "can't be built here.*alien"),
        (config(model_type="gpt2"), "can't be built here"),
        (config(auto_map={"AutoModel": "x.y"}), "may not carry 'auto_map'"),
        (config(num_hidden_layers=5), "5 blocks, the layout has 6"),
        (config(num_hidden_layers=10**6), "'num_hidden_layers' = 1000000, the limit is 1024"),
        (config(vocab_size=10**12), "'vocab_size' = 1000000000000, the limit"),
        (config(hidden_size=64), "sizes 32x64, not the block's"),
        (config(vocab_size=65), r"has shape \[64, 32\], its network needs \[65, 32\]"),
        (config(num_attention_heads=7), "can't be built|has shape"),
        (config(hidden_act="alien"), "can't be built"),
        (config(rope_parameters=3), "can't be built"),
        (set_path("plan", "task", to="alien"), "unknown task 'alien'"),
        (set_path("plan", "blocks_path", to="model.nothing"), "can't be built"),
        (set_path("plan", "layout", to=[["adapter", 0]] * 2000), "2000 blocks are declared"),
        (set_path("plan", "layout", 0, to=["alien", 0]), "isn't a place"),
        (set_path("plan", "linears", 0, to={"mlp.up_proj": 3}), "can't be built"),
        (set_path("plan", "linears", 0, to={"mlp.up_proj": {"kind": "code"}}), "unknown kind 'code'"),
        (set_path("plan", "linears", 0, to={}), "lacks 1 tensor|has unknown|lacks"),
        (set_path("plan", "linears", 0, to={"": harmonizer()}), r"lacks 4 tensor\(s\).*emulator\.0\.down\.bias"),
        (set_path("plan", "linears", 0, to={"": harmonizer(rank=2**25)}), "'rank' = 33554432, the limit is 16777216"),
        (set_path("plan", "linears", 0, to={"": harmonizer(rank=2**24)}), "lacks 4 tensor"),
        (set_path("plan", "linears", 0, to={"": harmonizer(returns=99)}), "returns = 99 is out of range"),
        (set_path("plan", "linears", 0, to={"": harmonizer(code="x")}), "a harmonizer entry has fields"),
        (set_path("plan", "linears", 0, to={"": harmonizer() | {"in": 64}}), "64 features, the blocks have 32"),
        (set_path("plan", "linears", 0, to={"mlp": harmonizer()}), "replaces a whole block"),
    ],
)
def test_networks_that_do_not_fit(forge: Forge, edit: Any, message: str) -> None:
    refused(forge(edit), message)


def test_tensors_of_another_network(forge: Forge) -> None:
    def without_head(raw: dict[str, Any], folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        for entry in raw["shards"]:
            if "shared.lm_head.weight" in entry["tensors"]:
                del entry["tensors"]["shared.lm_head.weight"]
                tensors = load_file(folder / entry["file"])
                tensors.pop("shared.lm_head.weight")
                save_file(tensors, folder / entry["file"])

    # FATE-LLM's package lacked the head, and its client trained against a random one.
    refused(forge(without_head), r"lacks 1 tensor\(s\) of its network, for example 'shared\.lm_head\.weight'")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "isn't JSON"),
        ("[]", "must hold a JSON object"),
        ('{"auto_map": {"AutoTokenizer": ["code.Tok", null]}}', "carries 'auto_map'"),
        ('{"vocab_file": "/etc/passwd"}', "carries 'vocab_file'"),
    ],
)
def test_tokenizer_configuration(forge: Forge, text: str, message: str) -> None:
    def edit(_: object, folder: Path) -> None:
        (folder / "tokenizer" / "tokenizer_config.json").write_text(text)

    refused(forge(edit), message)


def test_a_tokenizer_that_cannot_be_read(forge: Forge) -> None:
    folder = forge(lambda _, folder: (folder / "tokenizer" / "tokenizer.json").write_text("{}"))
    with pytest.raises(BundleError, match="can't read the tokenizer"):
        open_bundle(folder).tokenizer()


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


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        yield (*path, key)
        yield from nodes(child, (*path, key))


STRANGE = [None, True, -1, 0, 3, 1.5, 2**70, "x", "", [], [[]], {}, {"kind": "x"}, [1, "a", None]]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_strange_values_anywhere_in_a_manifest_raise_nothing_but_bundle_errors(
    bundle: Bundle, data: st.DataObject
) -> None:
    raw = json.loads(bundle.manifest.to_bytes())
    # Half of them in the plan: that is what reaches transformers.
    in_plan = data.draw(st.booleans())
    path = data.draw(st.sampled_from([path for path in nodes(raw) if (path[0] == "plan") == in_plan]))
    set_path(*path, to=data.draw(st.sampled_from(STRANGE)))(raw, bundle.path)
    text = json.dumps(raw, sort_keys=True, separators=(",", ":")).encode()
    (bundle.path / "manifest.json").write_bytes(text)
    try:
        open_bundle(bundle.path)  # some changes are harmless, a dropout for one
    except BundleError as error:
        assert len(str(error)) < 3000


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
