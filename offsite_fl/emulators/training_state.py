"""What a training run needs to go on after an interruption, in one safetensors file with a JSON header."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from offsite_fl.emulators.base import Batch, Context, Emulator
from offsite_fl.errors import CheckpointError

FORMAT = 1


@dataclass
class RunState:
    """How far a run has come: steps done, and the best candidate with its score (lower is better) and step.

    ``best`` holds its values by slot name, on the CPU, in the dtypes of the emulator. The position in the shuffled
    batches follows from ``step``.
    """

    step: int = 0
    best_step: int = 0
    best_score: float = float("inf")
    best: dict[str, Tensor] = field(default_factory=dict)


class Checkpoints:
    """The checkpoint of one run, below ``workdir`` in a folder named after the run's fingerprint.

    Another run (other options, weights, text or seed) has another fingerprint and never meets this file. ``name`` is
    the method's.
    """

    def __init__(self, workdir: Path, key: str, name: str = "distill") -> None:
        self.key = key
        self.path = Path(workdir) / f"{name}-{key[:16]}" / "state.safetensors"

    def save(self, state: RunState, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Replace the file by the state of now, atomically: a crash leaves the old one."""
        tensors = {f"best.{name}": value for name, value in state.best.items()}
        for name, parameter in parameters.items():
            tensors[f"weight.{name}"] = parameter.detach()
            tensors |= {f"{key}.{name}": value for key, value in optimizer.state[parameter].items()}
        header = {
            "format": FORMAT,
            "fingerprint": self.key,
            "step": state.step,
            "best_step": state.best_step,
            "best_score": state.best_score,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, new, {"distill": json.dumps(header)})
        with new.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(new, self.path)

    def load(
        self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, device: torch.device
    ) -> RunState | None:
        """Put weights and moments back and return the state, or None if there is no checkpoint.

        ``CheckpointError`` if the file is damaged; nothing has been changed then.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["distill"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            if header["format"] != FORMAT or header["fingerprint"] != self.key:
                raise KeyError("fingerprint")
            state = RunState(int(header["step"]), int(header["best_step"]), float(header["best_score"]))
            state.best = {name: tensors[f"best.{name}"] for name in parameters}
            weights = {name: tensors[f"weight.{name}"] for name in parameters}
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{self.path} can't be read as the checkpoint of this run ({error}); delete it to start anew"
            ) from error
        for name, parameter in parameters.items():
            parameter.data.copy_(weights[name])
            for key in ("exp_avg", "exp_avg_sq", "step"):
                if (value := tensors.get(f"{key}.{name}")) is not None:
                    optimizer.state[parameter][key] = value if key == "step" else value.to(device)
        return state


def fingerprint(
    spec: str, emulator: Emulator, context: Context, train: Sequence[Batch], validation: Sequence[Batch]
) -> str:
    """SHA-256 over everything that a run's result follows from: options, seed, layout, weights and text."""
    digest = hashlib.sha256()
    layout = [sorted(emulator.layout.items()), [block.origin for block in emulator.blocks]]
    plain = [spec, context.seed, layout, list(context.adapter), list(context.middle), len(train), len(validation)]
    digest.update(json.dumps(plain).encode())
    for module in (context.model, *(block.module for block in emulator.blocks)):
        _add(digest, module.state_dict())
    for batch in (*train, *validation):
        _add(digest, batch)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
