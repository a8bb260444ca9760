"""What is written, what leaves and what doesn't, and that a target is replaced whole or left alone."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerFast

from offsite_fl.bundle import open_bundle, write_bundle
from offsite_fl.errors import BundleError
from offsite_fl.models.blocks import find_blocks
from offsite_fl.models.network import build_network, fill_network, shared_tensors

from .conftest import FULL_DEPTH, Parts, make_parts, state_of


def test_tensors_come_back_bit_for_bit(parts: Parts, tmp_path: Path) -> None:
    bundle = parts.write(tmp_path / "out", shard_bytes=30_000)
    back = bundle.tensors()
    assert set(back) == set(parts.tensors) and len(back) == len(parts.tensors)
    for name, tensor in parts.tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name


def test_layout_on_disk(parts: Parts, tmp_path: Path) -> None:
    bundle = parts.write(tmp_path / "out", shard_bytes=30_000)
    manifest = json.loads((bundle.path / "manifest.json").read_bytes())
    assert bundle.digest == hashlib.sha256((bundle.path / "manifest.json").read_bytes()).hexdigest()
    listed = {"manifest.json", *(entry["file"] for entry in manifest["shards"] + manifest["files"])}
    assert set(state_of(bundle.path)) == listed
    for entry in manifest["shards"]:
        assert re.fullmatch(r"shards/(adapter|emulator|shared)-\d{5}\.safetensors", entry["file"])
        held = load_file(bundle.path / entry["file"])
        assert set(held) == set(entry["tensors"])
        assert {name.split(".")[0] for name in held} == {entry["kind"]}
        if len(held) > 1:
            assert sum(t.numel() * t.element_size() for t in held.values()) <= 30_000
    numbers = [entry["file"][-17:-12] for entry in manifest["shards"] if entry["kind"] == "adapter"]
    assert len(numbers) > 1 and numbers == [f"{i:05d}" for i in range(1, len(numbers) + 1)]


def test_a_tensor_above_the_bound_gets_its_own_shard(parts: Parts, tmp_path: Path) -> None:
    bundle = parts.write(tmp_path / "out", shard_bytes=5_000)  # the embedding has 64 * 32 * 4 = 8192 bytes
    alone = [shard for shard in bundle.manifest.shards if "shared.model.embed_tokens.weight" in shard.tensors]
    assert len(alone) == 1 and len(alone[0].tensors) == 1


def test_bytes_by_kind_are_the_bytes_on_disk(parts: Parts, tmp_path: Path) -> None:
    bundle = parts.write(tmp_path / "out", shard_bytes="16KB")
    sizes = {"adapter": 0, "emulator": 0, "shared": 0, "other": 0}
    for path in bundle.path.rglob("*"):
        if path.is_file():
            kind = path.name.split("-")[0] if path.suffix == ".safetensors" else "other"
            sizes[kind] += path.stat().st_size
    assert bundle.bytes_by_kind() == sizes
    assert bundle.total_bytes == sum(size for _, size, _ in bundle.files()) == sum(sizes.values())


def test_the_same_input_gives_the_same_digest(parts: Parts, tmp_path: Path) -> None:
    shuffled = dict(reversed(parts.tensors.items()))
    first = parts.write(tmp_path / "a")
    second = write_bundle(tmp_path / "b", parts.plan, shuffled, first.tokenizer())
    assert first.digest == second.digest and first.files() == second.files()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_spares_packed_weights_and_scales(parts: Parts, tmp_path: Path, dtype: torch.dtype) -> None:
    back = parts.write(tmp_path / "out", dtype=dtype).tensors()
    packed = {name: t for name, t in parts.tensors.items() if name.endswith((".packed", ".scales"))}
    assert {t.dtype for t in packed.values()} == {torch.uint8, torch.float16}
    for name, tensor in parts.tensors.items():
        assert torch.equal(back[name], tensor if name in packed else tensor.to(dtype))
        assert back[name].dtype == (tensor.dtype if name in packed else dtype)


def test_quantised_bytes_are_really_fewer(parts: Parts, tmp_path: Path) -> None:
    # 32 x 64 weights at 4 bits: 1024 bytes packed, and 32 x 4 groups of 16 columns in fp16: 256 bytes; dense: 8192.
    entries = parts.write(tmp_path / "out").manifest.tensors()
    packed, scales = (entries[f"emulator.1.mlp.down_proj.{part}"] for part in ("packed", "scales"))
    assert (packed.bytes, scales.bytes) == (1024, 256)


def test_client_logits_equal_the_owners(parts: Parts, tmp_path: Path, pico_batch: dict[str, torch.Tensor]) -> None:
    bundle = parts.write(tmp_path / "out")
    logits = []
    for tensors in (parts.tensors, bundle.tensors()):
        network = build_network(bundle.plan)
        fill_network(network, bundle.plan, {name: tensors[name].detach() for name in tensors})
        with torch.no_grad():
            logits.append(network(**{k: v for k, v in pico_batch.items() if k != "labels"}).logits)
    assert torch.equal(logits[0], logits[1])


def test_a_tied_head_is_written_once(
    pico: Callable[..., nn.Module], pico_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = pico("llama", num_hidden_layers=FULL_DEPTH, tie_word_embeddings=True)
    parts = make_parts(model, pico_tokenizer)
    names = set(shared_tensors(model, find_blocks(model)))
    assert "shared.lm_head.weight" not in names
    parts.tensors["shared.lm_head.weight"] = model.get_submodule("lm_head").weight  # type: ignore[assignment]
    assert "shared.lm_head.weight" not in parts.write(tmp_path / "out").tensors()
    parts.tensors["shared.lm_head.weight"] = torch.zeros(64, 32)  # not the same storage: not a tie
    with pytest.raises(BundleError, match=r"unknown .*shared\.lm_head\.weight"):
        parts.write(tmp_path / "out")


def test_views_of_one_storage_are_written_by_value(parts: Parts, tmp_path: Path) -> None:
    both = torch.randn(2, 32)
    names = ["shared.model.norm.weight", "adapter.0.input_layernorm.weight"]
    parts.tensors |= {names[0]: both[0], names[1]: both[1]}
    parts.tensors["adapter.0.self_attn.q_proj.weight"] = torch.randn(32, 32).T  # not contiguous
    back = parts.write(tmp_path / "out").tensors()
    for name in (*names, "adapter.0.self_attn.q_proj.weight"):
        assert torch.equal(back[name], parts.tensors[name])


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from numbers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def test_nothing_of_the_full_model_leaves_but_the_tensors(parts: Parts, tmp_path: Path) -> None:
    secret = "/home/owner/models/secret-7b"
    parts.model.config._name_or_path = secret  # type: ignore[union-attr]
    parts.model.name_or_path = secret  # type: ignore[assignment]
    saved = tmp_path / "secret-7b"
    parts.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    parts.tokenizer.save_pretrained(saved)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(saved, local_files_only=True)
    assert "secret-7b" in tokenizer.name_or_path
    made = make_parts(parts.model, tokenizer)
    bundle = made.write(tmp_path / "out")
    for name, data in state_of(bundle.path).items():
        assert isinstance(data, bytes)
        for word in (b"secret", b"owner", b"name_or_path", b"layer-drop", bytes(tmp_path)):
            assert word not in data, (name, word)
        # Slots are numbered from 0 on: no index of the full model's later blocks appears in a tensor's name.
        assert not re.search(rb"\.(4|5|6|7|8|9|1\d)\.", data) or name.endswith(".safetensors"), name
    manifest = json.loads((bundle.path / "manifest.json").read_bytes())
    slots = {int(m[1]) for name in bundle.tensors() if (m := re.match(r"(?:adapter|emulator)\.(\d+)\.", name))}
    assert slots == {0, 1, 2, 3}
    # Neither the depth (13) nor the indices of the adapter (11, 12) and the emulator's origins (7, 9).
    assert not {FULL_DEPTH, 11, 12, 7, 9} & set(numbers(manifest["plan"]))
    assert bundle.tokenizer().chat_template == parts.tokenizer.chat_template


@pytest.mark.parametrize("key", ["auto_map", "vocab_file", "fast_tokenizer_files", "is_local", "_commit_hash"])
def test_tokenizer_settings_that_point_outside_are_dropped(parts: Parts, tmp_path: Path, key: str) -> None:
    parts.tokenizer.init_kwargs[key] = "/home/owner/x"
    bundle = parts.write(tmp_path / "out")
    assert key not in json.loads((bundle.path / "tokenizer" / "tokenizer_config.json").read_text())


def test_tokenizer_works_offline_and_without_code(parts: Parts, tmp_path: Path) -> None:
    tokenizer = parts.write(tmp_path / "out").tokenizer()
    text = "the quick brown fox, 42."
    assert tokenizer(text)["input_ids"] == parts.tokenizer(text)["input_ids"]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 3)


def test_an_old_bundle_is_replaced(parts: Parts, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    first = parts.write(out, shard_bytes=5_000)
    kept = first.tensors()
    mapped = kept["shared.model.norm.weight"]
    before = mapped.clone()
    parts.tensors["shared.model.norm.weight"] = torch.zeros(32)
    second = parts.write(out)
    assert second.digest == open_bundle(out).digest != first.digest
    assert torch.equal(mapped, before)  # who had it open still reads the old values
    assert [p.name for p in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["folder", "file", "link", "near-bundle"])
def test_what_is_not_a_bundle_is_not_overwritten(parts: Parts, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "link":
        parts.write(tmp_path / "real")
        out.symlink_to(tmp_path / "real")
    else:
        out.mkdir()
        (out / "notes.txt").write_text("mine")
        if kind == "near-bundle":
            (out / "manifest.json").write_text('{"format_version": 1, "shards": []}')
    before = state_of(tmp_path)
    with pytest.raises(BundleError, match="give another"):
        parts.write(out)
    assert state_of(tmp_path) == before


def test_an_empty_folder_is_filled(parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert parts.write(tmp_path / "out").path == tmp_path / "out"


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["shared.lm_head.weight"]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["adapter.9.foo.weight"] = torch.zeros(3)


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["shared.model.norm.weight"] = torch.zeros(31)


def double(tensors: dict[str, torch.Tensor]) -> None:
    tensors["shared.model.norm.weight"] = torch.zeros(32, dtype=torch.float64)


def whole(tensors: dict[str, torch.Tensor]) -> None:
    tensors["shared.model.norm.weight"] = torch.zeros(32, dtype=torch.int8)


def meta(tensors: dict[str, torch.Tensor]) -> None:
    tensors["shared.model.norm.weight"] = torch.zeros(32, device="meta")


def dense(tensors: dict[str, torch.Tensor]) -> None:
    tensors["emulator.1.mlp.down_proj.packed"] = torch.zeros(32, 32)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop, r"lacks 1 .*shared\.lm_head\.weight"),
        (add, r"unknown .*adapter\.9\.foo\.weight"),
        (reshape, r"norm\.weight has shape \[31\], its network needs \[32\]"),
        (double, "float64"),
        (whole, "dtype I8, its network needs F32 or F16 or BF16"),
        (meta, "no values"),
        (dense, "dtype F32, its network needs U8"),
    ],
)
def test_tensors_that_do_not_fit_write_nothing(parts: Parts, tmp_path: Path, edit: Any, message: str) -> None:
    edit(parts.tensors)
    with pytest.raises(BundleError, match=message):
        parts.write(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_failure_half_way_leaves_the_old_bundle(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = parts.write(tmp_path / "out")
    before = state_of(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parts.tokenizer, "save_pretrained", full)
    with pytest.raises(BundleError, match="No space left"):
        parts.write(tmp_path / "out", shard_bytes=5_000)
    assert state_of(tmp_path) == before and open_bundle(tmp_path / "out").digest == first.digest


def test_a_tokenizer_with_foreign_files_is_refused(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = parts.tokenizer.save_pretrained

    def with_code(folder: str, **options: Any) -> None:
        save(folder, **options)
        (Path(folder) / "tokenization_mine.py").write_text("print('boo')")

    monkeypatch.setattr(parts.tokenizer, "save_pretrained", with_code)
    with pytest.raises(BundleError, match=r"tokenization_mine\.py.*can't"):
        parts.write(tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("options", "message"), [({"shard_bytes": 0}, "at least 1"), ({"dtype": torch.int8}, "int8")])
def test_bad_options(parts: Parts, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        parts.write(tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_at_most_one_shard_is_copied_at_a_time(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from offsite_fl.bundle import write

    save, sizes = write.save_file, []

    def measured(tensors: dict[str, torch.Tensor], path: Path) -> None:
        sizes.append(sum(t.numel() * t.element_size() for t in tensors.values()))
        save(tensors, path)

    monkeypatch.setattr(write, "save_file", measured)
    parts.write(tmp_path / "out", shard_bytes=10_000)
    assert len(sizes) > 10 and max(sizes) <= 10_000
