"""Every fault of a manifest gets its own message, before memory is taken, and nothing is touched."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offsite_fl.bundle import Bundle, Limits, open_bundle
from offsite_fl.errors import BundleError

from .conftest import Forge, refused, set_path


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
        (b'{"format_version":3,"library_version":"9.1.0"}', r"written by offsite-fl '9\.1\.0'.*upgrade"),
        (b'{"format_version":3,"library_version":"\\u001b[31m"}', r"'\\x1b\[31m'"),
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
        (set_path("shards", 0, "bytes", to=2**60), r"declared as 1\.15 EB, the limit"),
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
        (Limits(max_file_bytes=1000), "the limit is 1.00 kB"),
        (Limits(max_manifest_bytes=100), "at most 100 are allowed"),
        (Limits(max_tokenizer_bytes=10), "the limit is 10 B"),
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


@pytest.mark.parametrize("key", ["depths", "layers"])
def test_the_blocks_of_every_stage_are_counted_before_any_is_made(forge: Forge, key: str) -> None:
    folder = forge(set_path("plan", "config", "model_args", to={key: [2, 2**20]}))
    refused(folder, f"network plan has '{key}' = 1048576, the limit is 1024")


def test_the_size_of_an_expert_is_no_count(forge: Forge) -> None:
    # Qwen2-57B-A14B's; 64 experts are what is counted there
    folder = forge(set_path("plan", "config", "shared_expert_intermediate_size", to=20480))
    assert open_bundle(folder).plan.config["shared_expert_intermediate_size"] == 20480


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
