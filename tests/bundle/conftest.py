"""A small bundle with every kind of tensor, and a way to forge one whose hashes are right and whose content isn't."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from offsite_fl.bundle import Bundle, open_bundle, read, write_bundle
from offsite_fl.errors import BundleError
from offsite_fl.models.blocks import block_list, find_blocks
from offsite_fl.models.linears import LowRankLinear, QuantizedLinear, replace_module
from offsite_fl.models.network import NetworkPlan, plan_network, shared_tensors
from offsite_fl.models.plug import adapter_tensors

from ..conftest import make_pico, make_tokenizer

Forge = Callable[..., Path]
FULL_DEPTH = 13  # a number that nothing else in a pico llama has


@dataclass
class Parts:
    """What ``write_bundle`` takes, and the full model that it was made from."""

    model: nn.Module
    plan: NetworkPlan
    tensors: dict[str, torch.Tensor]
    tokenizer: PreTrainedTokenizerFast

    def write(self, out: Path, **options: Any) -> Bundle:
        return write_bundle(out, self.plan, self.tensors, self.tokenizer, **options)


def make_parts(model: nn.Module, tokenizer: PreTrainedTokenizerFast, depth: int = FULL_DEPTH) -> Parts:
    """Adapter: the two first and the two last blocks. Emulator: a low-rank and a quantised copy of blocks 7 and 9."""
    blocks = find_blocks(model)
    stack = block_list(model, blocks)
    adapter = (0, 1, depth - 2, depth - 1)
    emulator = [copy.deepcopy(stack[depth // 2 + 1]), copy.deepcopy(stack[depth // 2 + 3])]
    generator = torch.Generator().manual_seed(3)
    up, down = torch.randn(64, 4, generator=generator), torch.randn(4, 32, generator=generator)
    replace_module(emulator[0], "mlp.up_proj", LowRankLinear.from_factors(up, down, None))
    old = emulator[1].get_submodule("mlp.down_proj")
    replace_module(emulator[1], "mlp.down_proj", QuantizedLinear.from_linear(old, 4, 16))
    origins = [depth // 2 + 1, depth // 2 + 3]
    plan = plan_network(model, blocks, adapter, {origins[0]: 0, origins[1]: 1}, emulator, origins)
    tensors: dict[str, torch.Tensor] = {**adapter_tensors(model, blocks, adapter), **shared_tensors(model, blocks)}
    for number, block in enumerate(emulator):
        tensors |= {f"emulator.{number}.{name}": tensor for name, tensor in block.state_dict().items()}
    return Parts(model, plan, tensors, tokenizer)


@pytest.fixture
def parts(pico: Callable[..., nn.Module], pico_tokenizer: PreTrainedTokenizerFast) -> Parts:
    return make_parts(pico("llama", num_hidden_layers=FULL_DEPTH), pico_tokenizer)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Written once for all tests: several shards a kind, packed tensors among them. Not to be changed."""
    parts = make_parts(make_pico("llama", num_hidden_layers=FULL_DEPTH), make_tokenizer())
    return parts.write(tmp_path_factory.mktemp("written") / "bundle", shard_bytes=30_000)


@pytest.fixture
def bundle(written: Bundle, tmp_path: Path) -> Bundle:
    """A copy of the bundle for one test."""
    return replace(written, path=shutil.copytree(written.path, tmp_path / "bundle"))


@pytest.fixture
def forge(bundle: Bundle, tmp_path: Path) -> Forge:
    """``forge(edit)`` copies the bundle and lets ``edit(manifest as plain data, folder)`` change it.

    Sizes and hashes of the files are set right again unless ``honest=False``; the manifest stays canonical.
    """

    def make(edit: Callable[[dict[str, Any], Path], object], *, honest: bool = True) -> Path:
        folder = tmp_path / "forged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(bundle.path, folder)
        raw = json.loads((folder / "manifest.json").read_bytes())
        edit(raw, folder)
        for entry in [*raw.get("shards", []), *raw.get("files", [])] if honest else []:
            data = (folder / entry["file"]).read_bytes()
            entry["bytes"], entry["sha256"] = len(data), hashlib.sha256(data).hexdigest()
        write_manifest(folder, raw)
        return folder

    return make


def write_manifest(folder: Path, raw: Mapping[str, Any]) -> None:
    text = json.dumps(raw, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    (folder / "manifest.json").write_bytes(text.encode())


def state_of(folder: Path) -> dict[str, bytes | str]:
    """Everything in a folder, to show that nothing was touched."""
    return {
        path.relative_to(folder).as_posix(): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def refused(folder: Path, message: str, **options: Any) -> None:
    """``open_bundle`` must raise with ``message``, leave the folder as it was, and never map a tensor."""
    before = state_of(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "safe_open", lambda *_, **__: pytest.fail("a tensor file was mapped"))
        with pytest.raises(BundleError, match=message):
            open_bundle(folder, **options)
    assert state_of(folder) == before


def shard_of(folder: Path, kind: str = "shared", number: int = 1) -> Path:
    return folder / "shards" / f"{kind}-{number:05d}.safetensors"


def set_path(*keys: Any, to: Any) -> Callable[[dict[str, Any], Path], None]:
    """An edit for ``forge`` that sets one value of the manifest."""

    def edit(raw: dict[str, Any], _: Path) -> None:
        for key in keys[:-1]:
            raw = raw[key]
        raw[keys[-1]] = to

    return edit
