"""What a data owner hands back: new adapter values (or LoRA factors) under slot names, counts and metrics."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from offsite_fl.config import LoraOptions, from_mapping, to_mapping
from offsite_fl.errors import ConfigError, UpdateError

FORMAT = "1"


@dataclass(frozen=True)
class Update:
    """New values for the adapter of the bundle named ``digest``.

    ``tensors`` carry slot names: ``adapter.0.self_attn.q_proj.weight`` for a full adapter,
    ``adapter.0.self_attn.q_proj.lora_A.weight`` (and ``lora_B``) when ``lora`` is set; a head's are
    ``adapter.head.{path}`` either way. fp32, on the CPU.
    """

    tensors: Mapping[str, torch.Tensor]
    digest: str
    num_examples: int
    lora: LoraOptions | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_examples < 0:
            raise UpdateError(f"an update can't come from {self.num_examples} examples; the count is 0 or above")

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file whose metadata holds everything but the tensors; whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        meta = {
            "format": FORMAT,
            "digest": self.digest,
            "num_examples": str(self.num_examples),
            "lora": json.dumps(to_mapping(self.lora) if self.lora else None),
            "metrics": json.dumps({name: float(value) for name, value in self.metrics.items()}),
        }
        # Copies, because safetensors refuses tensors that share memory, as a slot that is used twice does.
        tensors = {
            name: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, t in self.tensors.items()
        }
        scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            save_file(tensors, scratch, metadata=meta)
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Update:
        """Read what :meth:`save` wrote; ``UpdateError`` names the file and what is wrong with it."""
        path = Path(path)
        if not path.is_file():
            raise UpdateError(f"update file {path} doesn't exist")
        try:
            with safe_open(path, framework="pt") as file:
                meta: dict[str, Any] = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UpdateError(f"update file {path} isn't a readable safetensors file: {error}") from error
        if meta.get("format") != FORMAT:
            raise UpdateError(f"update file {path} has format {meta.get('format')!r}, this version reads {FORMAT!r}")
        try:
            lora = json.loads(meta["lora"])
            return cls(
                tensors=tensors,
                digest=meta["digest"],
                num_examples=int(meta["num_examples"]),
                lora=from_mapping(LoraOptions, lora) if lora else None,
                metrics={str(name): float(value) for name, value in json.loads(meta["metrics"]).items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
            raise UpdateError(f"update file {path} has damaged metadata: {type(error).__name__} {error}") from error
