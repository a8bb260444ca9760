"""Files that their manifest vouches for: headers, networks and tokenizers that don't fit are refused all the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offsite_fl.bundle import open_bundle
from offsite_fl.errors import BundleError

from .conftest import Forge, refused, set_path, shard_of


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
