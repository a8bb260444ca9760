from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from offsite_fl.config import LoraOptions
from offsite_fl.errors import UpdateError
from offsite_fl.update import Update

NAME = "adapter.0.self_attn.q_proj.weight"


def metadata(**changes: str | None) -> dict[str, str]:
    fields: dict[str, str | None] = {"format": "1", "digest": "d", "num_examples": "1", "lora": "null", "metrics": "{}"}
    fields |= changes
    return {key: value for key, value in fields.items() if value is not None}


@pytest.mark.parametrize("lora", [None, LoraOptions(rank=2, targets=("q_proj", "v_proj"))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_saved_is_loaded(tmp_path: Path, lora: LoraOptions | None, dtype: torch.dtype) -> None:
    weight = torch.randn(3, 4).to(dtype)
    update = Update({NAME: weight}, digest="ab" * 32, num_examples=17, lora=lora, metrics={"train-loss": 2.5})
    back = Update.load(update.save(tmp_path / "deep" / "update.safetensors"))
    assert torch.equal(back.tensors[NAME], weight) and back.tensors[NAME].dtype == dtype
    assert (back.digest, back.num_examples, back.lora, back.metrics) == ("ab" * 32, 17, lora, {"train-loss": 2.5})


def test_shared_transposed_and_trained_tensors_can_be_saved(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    tensors = {"adapter.0.a": weight, "adapter.1.a": weight, "adapter.1.b": weight.T}
    back = Update.load(Update(tensors, "d", 1).save(tmp_path / "u.safetensors"))
    assert {name: t.tolist() for name, t in back.tensors.items()} == {n: t.tolist() for n, t in tensors.items()}


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Update({NAME: torch.ones(1)}, "old", 1).save(tmp_path / "u.safetensors")

    def half_written(tensors: object, target: Path, metadata: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("offsite_fl.update.save_file", half_written)
    with pytest.raises(OSError, match="no space left"):
        Update({NAME: torch.zeros(1)}, "new", 1).save(path)
    assert Update.load(path).digest == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["u.safetensors"]


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(UpdateError, match="-1 examples"):
        Update({}, "d", -1)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UpdateError, match=r"nowhere\.safetensors doesn't exist"):
        Update.load(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\x80\x04pickle", (2**40).to_bytes(8, "little") + b"{}"])
def test_an_unreadable_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "u.safetensors"
    path.write_bytes(content)
    with pytest.raises(UpdateError, match=r"u\.safetensors isn't a readable safetensors file"):
        Update.load(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = Update({NAME: torch.ones(100)}, "d", 1).save(tmp_path / "u.safetensors")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UpdateError, match="isn't a readable safetensors file"):
        Update.load(path)


@pytest.mark.parametrize("found", [None, "2"])
def test_another_format_is_refused(tmp_path: Path, found: str | None) -> None:
    path = tmp_path / "u.safetensors"
    save_file({NAME: torch.ones(1)}, path, metadata=metadata(format=found))
    with pytest.raises(UpdateError, match=f"has format {found!r}, this version reads '1'"):
        Update.load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"digest": None},
        {"num_examples": None},
        {"num_examples": "many"},
        {"lora": "{"},
        {"lora": '{"rank": -1}'},
        {"lora": '{"rnk": 1}'},
        {"lora": "[1]"},
        {"metrics": "[]"},
        {"metrics": '{"loss": "low"}'},
    ],
)
def test_damaged_metadata_is_refused(tmp_path: Path, changes: dict[str, str | None]) -> None:
    path = tmp_path / "u.safetensors"
    save_file({NAME: torch.ones(1)}, path, metadata=metadata(**changes))
    with pytest.raises(UpdateError, match=r"u\.safetensors has damaged metadata"):
        Update.load(path)


def test_a_negative_count_in_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "u.safetensors"
    save_file({NAME: torch.ones(1)}, path, metadata=metadata(num_examples="-5"))
    with pytest.raises(UpdateError, match="-5 examples"):
        Update.load(path)
