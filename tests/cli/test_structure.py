"""``inspect`` of a model's folder: what its config alone tells."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from offsite_fl.models import load
from tests.cli.conftest import World, error_of, run_cli, run_json
from tests.models.families import build
from tests.models.other_families import OTHERS


def test_a_language_model(world: World) -> None:
    told = run_json("inspect", world.model)
    assert (told["class"], told["model_type"], told["task"]) == ("LlamaForCausalLM", "llama", "causal-lm")
    # By hand: q and o 32x32, k and v 16x32, three of 64x32 and two norms of 32, times 4 bytes
    block = 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32 + 2 * 32)
    expected = {"path": "model.layers", "class": "LlamaDecoderLayer", "depth": 6, "bytes": [block] * 6}
    assert told["blocks"] == expected
    shared = {entry["name"]: entry["bytes"] for entry in told["shared"]}
    assert shared == {"model.embed_tokens.weight": 8192, "model.norm.weight": 128, "lm_head.weight": 8192}
    assert told["bytes"] == 6 * block + told["shared_bytes"] == 6 * block + 16512
    assert all(split["reason"] is None and split["reason_dropping"] is None for split in told["splits"])
    assert all(entry["reason"] is None for entry in told["emulators"])


def test_no_weight_is_read(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(world.model / "config.json", tmp_path / "config.json")
    assert run_json("inspect", tmp_path)["blocks"]["depth"] == 6
    real, seen = load.build_model, []
    monkeypatch.setattr(load, "build_model", lambda *a: seen.append(real(*a)) or seen[-1])  # type: ignore[func-returns-value]
    run_json("inspect", tmp_path)
    assert all(parameter.is_meta for parameter in seen[0].parameters())


def test_what_cannot_be_done_has_its_reason(tmp_path: Path) -> None:
    model: Any = build("t5")
    model.save_pretrained(tmp_path)
    told = run_json("inspect", tmp_path)
    assert told["blocks"]["path"] == "decoder.block" and told["task"] == "seq2seq-lm"
    reasons = {split["split"]: split["reason_dropping"] for split in told["splits"]}
    assert reasons["2-2"] is None and "relative_attention_bias" in reasons["0-2"]
    assert all(split["reason"] is None for split in told["splits"])
    emulators = {entry["name"]: entry["reason"] for entry in told["emulators"]}
    assert emulators["quantize"] is None and "next-token loss" in emulators["distill"]
    said = run_cli("inspect", tmp_path).stdout
    assert "T5ForConditionalGeneration (t5), for seq2seq-lm" in said and "6 x T5Block at decoder.block" in said


def test_what_cannot_be_split_has_no_emulator(tmp_path: Path) -> None:
    build("gpt2", scale_attn_by_inverse_layer_idx=True).save_pretrained(tmp_path)  # type: ignore[operator]
    told = run_json("inspect", tmp_path)
    assert all("depends on its absolute index" in split["reason"] for split in told["splits"])
    assert {entry["reason"] for entry in told["emulators"]} == {"none of these splits can be made"}


def test_a_state_space_model_loses_no_units(tmp_path: Path) -> None:
    build("mamba").save_pretrained(tmp_path)  # type: ignore[operator]
    reasons = {entry["name"]: entry["reason"] for entry in run_json("inspect", tmp_path)["emulators"]}
    assert reasons.pop("prune").startswith("no MambaBlock has an MLP channel or an attention head")
    assert set(reasons.values()) == {None}


def test_a_pyramid_is_refused_with_what_was_seen(tmp_path: Path) -> None:
    row = OTHERS["swin"]
    AutoConfig.for_model(row.kind, **row.config).save_pretrained(tmp_path)
    assert "no list of repeated blocks in Swin" in error_of("inspect", tmp_path)


def test_a_shallow_model(tmp_path: Path) -> None:
    build("llama2", num_hidden_layers=3).save_pretrained(tmp_path)  # type: ignore[operator]
    told = run_json("inspect", tmp_path)
    reasons = {split["split"]: split["reason"] for split in told["splits"]}
    assert "may be at most 2" in reasons["2-2"] and reasons["1-1"] is None


def test_bundles_are_still_told_apart(world: World, tmp_path: Path) -> None:
    assert run_json("inspect", world.bundle)["digest"]
    assert "manifest.json is missing" in error_of("inspect", tmp_path)
    # whoever gives a digest means a bundle
    assert "manifest.json is missing" in error_of("inspect", world.model, "--digest", "0" * 64)


def test_a_config_that_builds_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    assert "can't open the config" in error_of("inspect", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_attention_heads": 0}')
    assert "error: " in error_of("inspect", tmp_path)
    assert torch.get_default_device() == torch.device("cpu")
