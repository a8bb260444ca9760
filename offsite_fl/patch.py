"""What puts a bundle's emulator right after it was handed out: LoRA factors on its linears, under their own digest.

FedBiOT (arXiv 2406.17706) aligns the emulator again in every round. The bundle stays what it was, so that nodes keep
it; what changed travels as a patch.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from offsite_fl.config import LoraOptions, from_mapping, to_mapping
from offsite_fl.errors import ConfigError, UpdateError

FORMAT = "patch-1"


@dataclass(frozen=True)
class Patch:
    """LoRA factors for the emulator of the bundle named ``bundle``.

    ``tensors`` carry slot names, ``emulator.{k}.{path of the linear}.lora_A.weight`` [rank, in] and ``.lora_B.weight``
    [out, rank], fp32 on the CPU; ``alpha / rank * B @ A`` is added to what the linear computes.
    """

    tensors: Mapping[str, torch.Tensor]
    bundle: str
    options: LoraOptions

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 in hex over the bundle's digest, the options, and name, shape and bytes of every factor."""
        return digest_of(self.tensors, self.bundle, self.options)

    def to_bytes(self) -> bytes:
        """One safetensors file; :meth:`from_bytes` reads it."""
        meta = {"format": FORMAT, "bundle": self.bundle, "options": json.dumps(to_mapping(self.options))}
        return save({name: t.contiguous() for name, t in self.tensors.items()}, meta)

    @classmethod
    def from_bytes(cls, data: bytes) -> Patch:
        """Read what :meth:`to_bytes` made; ``UpdateError`` says what is wrong with it."""
        try:
            length = int.from_bytes(data[:8], "little")
            meta = json.loads(data[8 : 8 + length])["__metadata__"]
            if meta["format"] != FORMAT:
                raise KeyError(meta["format"])
            options = from_mapping(LoraOptions, json.loads(meta["options"]))
            return cls(load(data), str(meta["bundle"]), options)
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
            raise UpdateError(f"a patch can't be read: {type(error).__name__} {error}") from error


def digest_of(tensors: Mapping[str, torch.Tensor], bundle: str, options: LoraOptions) -> str:
    """The digest of a patch that holds ``tensors``; their order doesn't matter."""
    digest = hashlib.sha256(json.dumps([FORMAT, bundle, sorted(to_mapping(options).items())]).encode())
    for name in sorted(tensors):
        values = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(json.dumps([name, list(values.shape)]).encode())
        digest.update(values.numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()
