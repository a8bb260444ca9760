"""What goes wrong ends as one line on stderr with the right exit code, and leaves nothing half done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from offsite_fl.data_owner import DataOwner
from offsite_fl.owner import ModelOwner
from offsite_fl.update import Update
from tests.cli.conftest import World, error_of, run_cli, run_json
from tests.conftest import make_pico, make_tokenizer


def below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bundle", "{model}", "--emulator", "layerdrop:keep=2"], "did you mean 'layer-drop'"),
        (["bundle", "{model}", "--emulator", "layer-drop:kep=2"], "did you mean 'keep'"),
        (["bundle", "{model}", "--emulator", "layer-drop:keep=2", "--dtype", "bf16"], "did you mean 'bfloat16'"),
        (["bundle", "{model}", "--emulator", "layer-drop:keep=2", "--at", "0,9"], "model has 6 blocks"),
        (["bundle", "{model}", "--emulator", "layer-drop:keep=2", "--at", "0;9"], "split 'at=0;9' can't be read"),
        (["bundle", "{model}", "--emulator", "layer-drop:keep=2", "--first", "5"], "may be at most 5"),
        (["bundle", "{home}/none", "--emulator", "layer-drop:keep=2"], "none doesn't exist"),
        (["bundle", "{model}", "--emulator", "low-rank:keep=0.5"], "needs calibration text"),
        (["tune", "{bundle}", "--data", "{home}/none.txt"], "none.txt doesn't exist"),
        (["tune", "{home}", "--data", "{text}"], "manifest.json is missing"),
        (["tune", "{bundle}", "--data", "{text}", "--set", "lrr=1"], "unknown setting 'lrr'; did you mean 'lr'"),
        (["tune", "{bundle}", "--data", "{text}", "--loss-on", "answers"], "did you mean 'answer'"),
        (["tune", "{bundle}", "--data", "{text}", "--lr", "-1"], "lr must be a number above 0"),
        (["tune", "{bundle}", "--data", "{text}", "--set", "seed=-1"], "seed must be 0 or above"),
        (["tune", "{bundle}", "--data", "{text}", "--digest", "0" * 64], "expected 000"),
        (["plug", "{model}", "{text}", "--bundle", "{bundle}"], "isn't a readable safetensors file"),
        (["plug", "{bundle}", "{update}", "--bundle", "{bundle}"], "holds no config.json"),
    ],
)
def test_user_errors(world: World, tmp_path: Path, arguments: list[str], message: str) -> None:
    paths = {name: getattr(world, name) for name in ("home", "model", "text", "bundle", "update")}
    said = error_of(*(a.format(**paths) for a in arguments), "--out", tmp_path / "out")
    assert message in said
    assert not below(tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["bogus"],
        ["inspect"],
        ["tune", "b", "--data", "d", "--out", "o", "--epochs", "many"],
        ["tune", "b", "--data", "d", "--out", "o", "--set", "epochs"],
        ["tune", "b", "--data", "d", "--out", "o", "--set", "lr=1", "--lr", "2"],
        ["bundle", "m", "--emulator", "e", "--out", "o", "--at", "1", "--first", "1"],
    ],
)
def test_usage_errors(arguments: list[str]) -> None:
    assert not run_cli(*arguments, code=2).stdout


def test_nothing_is_overwritten(world: World) -> None:
    before = {path: path.read_bytes() for path in below(world.home) if path.is_file()}
    plug = ("plug", world.model, world.update, "--bundle", world.bundle, "--out")
    assert "isn't empty" in error_of(*plug, world.model)
    assert "isn't a folder" in error_of(*plug, world.text)
    assert "isn't an update" in error_of("tune", world.bundle, "--data", world.text, "--out", world.text)
    bundle = ("bundle", world.model, "--emulator", "layer-drop:keep=2", "--out")
    assert "isn't a bundle" in error_of(*bundle, world.model)
    assert "can't be written" in error_of(*bundle, world.text / "bundle")
    assert {path: path.read_bytes() for path in below(world.home) if path.is_file()} == before


def test_an_update_for_another_bundle(world: World, tmp_path: Path) -> None:
    other = Update(Update.load(world.update).tensors, "0" * 64, 1).save(tmp_path / "other.safetensors")
    for command in (
        ("plug", world.model, other, "--bundle", world.bundle, "--out", tmp_path / "out"),
        ("evaluate", world.model, "--bundle", world.bundle, "--update", other, "--data", world.text),
    ):
        assert "was made for bundle 000000000000" in error_of(*command)
    assert not (tmp_path / "out").exists()


def test_another_full_model_is_called_that(world: World, tmp_path: Path) -> None:
    make_pico("llama", num_hidden_layers=3).save_pretrained(tmp_path / "model")  # type: ignore[operator]
    make_tokenizer().save_pretrained(tmp_path / "model")
    plug = ("plug", tmp_path / "model", world.update, "--bundle", world.bundle, "--out", tmp_path / "out")
    assert "made for another full model" in error_of(*plug)


def test_a_bundle_without_its_map(world: World, tmp_path: Path) -> None:
    (tmp_path / "bundle").symlink_to(world.bundle)
    plug = ("plug", world.model, world.update, "--bundle", tmp_path / "bundle", "--out", tmp_path / "out")
    assert "only the model owner has it" in error_of(*plug)


def test_a_folder_without_a_report(tmp_path: Path) -> None:
    assert "there is no report" in error_of("report", tmp_path)


def test_control_characters_of_a_name_stay_out_of_the_terminal(tmp_path: Path) -> None:
    said = error_of("inspect", tmp_path / "a\x1b[2Jb\nc")
    assert "\x1b" not in said and "\\x1b[2Jb c" in said


def test_training_data_is_looked_at_before_the_rows_are_measured(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offsite_fl.measure.Measure.full_zero_shot", lambda self: pytest.fail("measured first"))
    measured = ("evaluate", world.model, "--bundle", world.bundle, "--data", world.text, "--block-size", 16)
    assert "none.txt doesn't exist" in error_of(*measured, "--fine-tune", world.home / "none.txt")


def test_interrupted_tuning_leaves_no_update(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: DataOwner, *arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DataOwner, "tune", stop)
    out = tmp_path / "update.safetensors"
    assert error_of("tune", world.bundle, "--data", world.text, "--out", out, code=130) == "error: interrupted"
    assert not below(tmp_path)


@pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left", "x"), 1)])
def test_a_model_half_written_vanishes(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int
) -> None:
    def half(self: ModelOwner, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        raise raised

    monkeypatch.setattr(ModelOwner, "save", half)
    error_of("plug", world.model, world.update, "--bundle", world.bundle, "--out", tmp_path / "out", code=code)
    assert not below(tmp_path)


def test_a_bundle_is_replaced_only_by_force(world: World, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    first = run_json("bundle", world.model, "--emulator", "layer-drop:keep=2", "--out", out)
    again = ("bundle", world.model, "--emulator", "quantize:bits=8,group=16", "--out", out)
    assert "holds a bundle" in error_of(*again)
    assert run_json("inspect", out)["digest"] == first["digest"]
    assert run_json(*again, "--force")["digest"] != first["digest"]
