"""The whole way by commands alone: bundle, inspect, tune, plug, evaluate, report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from offsite_fl.bundle import OwnerMap, open_bundle
from offsite_fl.evaluation.rows import ROW_KEYS
from offsite_fl.repair import Repair
from offsite_fl.update import Update
from tests.cli.conftest import TUNING, World, error_of, run_cli, run_json
from tests.conftest import make_pico, make_tokenizer


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed(before: Path, after: Path) -> set[str]:
    old, new = weights(before), weights(after)
    assert old.keys() == new.keys()
    assert {t.dtype for t in old.values()} == {t.dtype for t in new.values()}
    return {name for name in old if not torch.equal(old[name], new[name])}


def adapter_names(folder: Path) -> set[str]:
    return {name for name in weights(folder) if name.startswith(("model.layers.0.", "model.layers.5."))}


def test_bundle_and_inspect_tell_the_same(world: World) -> None:
    told = {key: value for key, value in world.made.items() if key != "seconds"}
    assert run_json("inspect", world.bundle) == told
    bundle, note = open_bundle(world.bundle), OwnerMap.load(world.bundle)
    assert told["digest"] == bundle.digest
    assert told["bytes"] == sum(path.stat().st_size for path in world.bundle.rglob("*") if path.is_file())
    assert {kind: entry["bytes"] for kind, entry in told["kinds"].items()} == bundle.bytes_by_kind()
    assert told["kinds"]["adapter"]["tensors"] == 18  # 7 linears and 2 norms in each of 2 blocks
    assert told["places"] == [["adapter", 0], ["emulator", 0], ["emulator", 1], ["adapter", 1]]
    assert told["emulator"][1]["places"] == [2]
    assert told["emulator"][1]["linears"] == {"int8, groups of": {"count": 7, "from": 16, "to": 16}}
    assert told["owner"]["adapter"] == [0, 5]
    assert told["owner"]["report"] == note.report
    full = sum(tensor.numel() * 4 for tensor in weights(world.model).values())
    assert told["share_of_full_model"] == pytest.approx(told["bytes"] / full)


def test_inspect_without_the_owners_map(world: World, tmp_path: Path) -> None:
    """What a data owner sees: the bundle alone, with nothing about the full model."""
    (tmp_path / "bundle").symlink_to(world.bundle)
    told = run_json("inspect", tmp_path / "bundle")
    assert told["owner"] is None and told["share_of_full_model"] is None
    said = run_cli("inspect", tmp_path / "bundle", "--digest", told["digest"]).stdout
    assert "verified" in said and "7 int8, groups of 16" in said
    assert "full model" not in said and "verbatim" not in said


def test_inspect_prints_what_leaves(world: World) -> None:
    said = run_cli("inspect", world.bundle).stdout
    assert world.made["digest"] in said
    for words in ("What leaves", "of the full model", "leaves verbatim", "layer-drop:keep=2+quantize", "split 1-1"):
        assert words in said


def test_tune_writes_the_update_and_tells_about_it(world: World) -> None:
    update = Update.load(world.update)
    assert world.tuned["digest"] == update.digest == world.made["digest"]
    assert world.tuned["metrics"] == dict(update.metrics)
    assert update.metrics["steps"] == 4
    assert world.tuned["bytes"] == world.update.stat().st_size
    assert world.tuned["num_examples"] == update.num_examples


def test_plug_changes_exactly_the_adapter(world: World, tmp_path: Path) -> None:
    out = tmp_path / "new" / "adapted"
    told = run_json("plug", world.model, world.update, "--bundle", world.bundle, "--out", out)
    assert told["changed_tensors"] == 18 and told["dtype"] == "float32"
    assert changed(world.model, out) == adapter_names(world.model)
    assert list(out.parent.iterdir()) == [out]
    model = AutoModelForCausalLM.from_pretrained(out)
    update, live = Update.load(world.update), model.state_dict()
    for slot, index in ((0, 0), (1, 5)):
        name = "mlp.up_proj.weight"
        assert torch.equal(live[f"model.layers.{index}.{name}"], update.tensors[f"adapter.{slot}.{name}"])
    assert AutoTokenizer.from_pretrained(out)("the cat")["input_ids"]


def test_a_repair_is_taken_out_of_the_update(world: World, tmp_path: Path) -> None:
    file, plain, less = (tmp_path / name for name in ("repair.safetensors", "plain", "less"))
    public = ("--bundle", world.bundle, "--public", world.text, *TUNING)
    told = run_json("repair", world.model, *public, "--share", 0.5, "--out", file)
    repair = Repair.load(file)
    assert told["steps"] == repair.steps == 4 and told["norm"] == pytest.approx(repair.norm) and repair.norm > 0
    run_cli("plug", world.model, world.update, "--bundle", world.bundle, "--out", plain)
    run_cli("plug", world.model, world.update, "--bundle", world.bundle, "--out", less, "--repair", file)
    assert changed(world.model, less) == adapter_names(world.model)
    with_it, without = weights(less), weights(plain)
    name = "mlp.up_proj.weight"
    taken = without[f"model.layers.5.{name}"] - with_it[f"model.layers.5.{name}"]
    torch.testing.assert_close(taken, 0.5 * repair.tensors[f"adapter.1.{name}"], rtol=1e-3, atol=1e-6)
    tested = ("--bundle", world.bundle, "--data", world.text, "--block-size", 16, "--update", world.update)
    rows = [run_json("evaluate", world.model, *tested, *more)["rows"] for more in ((), ("--repair", file))]
    assert rows[0]["plug_in"] != rows[1]["plug_in"] and rows[0]["emulator_tuned"] == rows[1]["emulator_tuned"]


def test_what_is_no_repair_is_refused(world: World, tmp_path: Path) -> None:
    given = ("--bundle", world.bundle, "--out", tmp_path / "new")
    assert "not a repair" in error_of("plug", world.model, world.update, *given, "--repair", world.update)
    assert not (tmp_path / "new").exists()


def test_lora_on_a_bf16_model_keeps_its_dtype(world: World, tmp_path: Path) -> None:
    """A model on disk in bf16 comes back in bf16, every other tensor bit for bit."""
    model, bundle, update, out = (tmp_path / name for name in ("model", "bundle", "update.safetensors", "adapted"))
    make_pico("llama").to(torch.bfloat16).save_pretrained(model)  # type: ignore[operator]
    make_tokenizer().save_pretrained(model)
    small = ("--emulator", "layer-drop:keep=2", "--at", "5,0", "--dtype", "bfloat16")
    assert run_json("bundle", model, *small, "--out", bundle)["kinds"]["emulator"]["dtypes"] == ["BF16"]
    run_cli("tune", bundle, "--data", world.text, "--out", update, *TUNING, "--lora-rank", 2, "--set", "lora_alpha=32")
    lora = Update.load(update).lora
    assert lora is not None and (lora.rank, lora.alpha) == (2, 32.0)
    out.mkdir()
    run_cli("plug", model, update, "--bundle", bundle, "--out", out)
    linear = {name for name in adapter_names(model) if "norm" not in name}
    assert changed(model, out) == linear
    run_cli("plug", model, update, "--bundle", bundle, "--out", tmp_path / "wide", "--dtype", "float32")
    assert {tensor.dtype for tensor in weights(tmp_path / "wide").values()} == {torch.float32}


def test_evaluate_and_report(world: World, tmp_path: Path) -> None:
    measured = ("evaluate", world.model, "--bundle", world.bundle, "--data", world.text, "--block-size", 16)
    out = tmp_path / "run"
    tuned = ("--update", world.update, "--fine-tune", world.text, "--fine-tune", world.text, "--lr", 1e-3)
    told = run_json(*measured, *tuned, "--out", out, "--max-tokens", 160)
    record = json.loads((out / "report.json").read_text())
    assert told["rows"] == record["rows"] and list(told["rows"]) == list(ROW_KEYS)
    assert told["tokens"] == 160
    assert told["rows"]["plug_in"]["loss"] < told["rows"]["full_zero_shot"]["loss"]
    assert record["config"]["tune.max-steps"] == 4  # as many as the update took
    assert record["seeds"] == {"full fine-tuning": 0}
    assert record["emulator"]["spec"] == world.made["owner"]["emulator"]

    (out / "report.html").unlink()
    said = run_cli("report", out).stdout
    assert "plug-in" in said and "full fine-tuning" in said
    assert "<html" in (out / "report.html").read_text()
    assert run_json("report", out / "report.json")["rows"] == told["rows"]
    assert json.loads((out / "report.json").read_text()) == record


def test_evaluate_without_an_update(world: World) -> None:
    """Nothing was tuned: the tuned rows are the untuned ones, the fifth wasn't run, and the reader is told."""
    measured = ("evaluate", world.model, "--bundle", world.bundle, "--data", world.text, "--block-size", 16)
    rows = run_json(*measured, "--max-tokens", 64)["rows"]
    assert rows["plug_in"] == rows["full_zero_shot"] and rows["emulator_tuned"] == rows["emulator_zero_shot"]
    assert rows["full_fine_tuning"] is None
    assert "No update was given" in run_cli(*measured, "--max-tokens", 64).stdout
