"""Opening models: folders, hub ids that can't be reached, and what a user gets wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from offsite_fl.errors import ModelError
from offsite_fl.models.load import load_model, stored_dtype


@pytest.fixture
def folder(tmp_path: Path, pico_llama: nn.Module, pico_tokenizer: PreTrainedTokenizerBase) -> Path:
    target = tmp_path / "model"
    pico_llama.save_pretrained(target)  # type: ignore[operator]
    pico_tokenizer.save_pretrained(target)
    return target


def test_a_folder(folder: Path, pico_llama: nn.Module, pico_batch: dict[str, torch.Tensor]) -> None:
    for path in (folder, str(folder)):
        model, tokenizer = load_model(path)
        assert torch.equal(model(**pico_batch).logits, pico_llama(**pico_batch).logits)
        assert not model.training
        assert tokenizer.decode(tokenizer("hello, world!\n")["input_ids"]) == "hello, world!\n"


def test_dtype(folder: Path) -> None:
    model, _ = load_model(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_dtype(tmp_path: Path, pico_llama: nn.Module, dtype: torch.dtype) -> None:
    pico_llama.to(dtype).save_pretrained(tmp_path / "model")  # type: ignore[operator]
    assert stored_dtype(tmp_path / "model") == dtype
    config = tmp_path / "model" / "config.json"
    told = json.loads(config.read_text())
    assert told.pop("dtype")
    config.write_text(json.dumps(told))
    assert stored_dtype(tmp_path / "model") == torch.float32


@pytest.mark.parametrize("name", ["./missing", "/no/such/folder", "a/b/c", "../up", "trailing/"])
def test_a_missing_folder(name: str) -> None:
    with pytest.raises(ModelError, match=f"model folder {re.escape(name)} doesn't exist; give a folder, a hub id"):
        load_model(name)


def test_a_missing_path_object_is_never_a_hub_id() -> None:
    with pytest.raises(ModelError, match="model folder missing doesn't exist"):
        load_model(Path("missing"))


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(ModelError, match="is not a folder"):
        load_model(folder / "config.json")


def test_a_hub_id_that_cannot_be_reached() -> None:
    with pytest.raises(ModelError, match=r"can't open model nobody/nothing.*neither a folder here nor"):
        load_model("nobody/nothing")


def test_unknown_task(folder: Path) -> None:
    with pytest.raises(ModelError, match="unknown task 'causal'; did you mean 'causal-lm'"):
        load_model(folder, task="causal")


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "holds no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "can't open model .*: .*JSON"),
        (lambda f: edit_config(f, model_type="nonesuch"), "can't open model .*nonesuch"),
        (lambda f: edit_config(f, model_type="vit"), "can't open model .*ViTConfig"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 100), "can't open model .*: .*header"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "can't open model .*safetensors"),
        (
            lambda f: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")],
            "can't open the tokenizer of",
        ),
    ],
)
def test_a_broken_folder(spoil: Callable[[Path], object], message: str, folder: Path) -> None:
    spoil(folder)
    with pytest.raises(ModelError, match=message):
        load_model(folder)


def test_code_in_the_folder_never_runs(folder: Path) -> None:
    (folder / "trap.py").write_text("raise SystemExit('ran')")
    edit_config(folder, model_type="own", auto_map={"AutoConfig": "trap.C", "AutoModelForCausalLM": "trap.M"})
    with pytest.raises(ModelError, match="can't open model"):
        load_model(folder)
