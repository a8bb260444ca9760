"""What a data owner's device must hold: frozen tensors, the adapter with its optimiser, and what backward keeps.

    python -m simulations.benchmarks.memory runs/demo/bundle --batch-size 4 --block-size 128

Weights are counted in the network of the bundle. What autograd keeps for backward is counted while a real forward pass
runs, by hooks on every tensor that is saved (tensors that are parameters or buffers aren't counted again), for frozen
tensors in fp32 and in bf16. It is the part that grows with the batch, so it is given per token.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from offsite_fl.config import FrozenDtype, TuneConfig
from offsite_fl.data_owner import DataOwner
from offsite_fl.errors import OffsiteError
from offsite_fl.evaluation.loss import causal_nll
from offsite_fl.models.network import adapter_parameters
from offsite_fl.tuning.session import training_mode

# Weights, gradients and AdamW's two moments, all fp32.
ADAMW_BYTES = 16
DTYPES: tuple[FrozenDtype, ...] = ("float32", "bfloat16")


@dataclass(frozen=True)
class Memory:
    """Bytes of one data owner at one dtype of the frozen tensors; ``kept`` is per token of the batch."""

    frozen: int
    adapter: int
    kept: float

    def total(self, tokens: int) -> float:
        """Bytes while a batch of ``tokens`` tokens is in work."""
        return self.frozen + self.adapter + self.kept * tokens


def memory_of(data_owner: DataOwner, batch_size: int, block_size: int, checkpointing: bool) -> Memory:
    """Count weights, and run one forward pass to count what it keeps."""
    network, trained = data_owner.model, adapter_parameters(data_owner.model, data_owner.plan)
    adapter = sum(p.numel() for p in trained.values())
    own = {id(p) for p in trained.values()}
    tensors = {id(t): t for t in [*network.parameters(), *network.buffers()] if id(t) not in own}
    frozen = sum(t.numel() * t.element_size() for t in tensors.values())
    vocabulary = network.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids = torch.randint(0, vocabulary, (batch_size, block_size), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with training_mode(network, trained, TuneConfig(gradient_checkpointing=checkpointing)):
        kept = kept_bytes(network, batch)
    return Memory(frozen, adapter * ADAMW_BYTES, kept / ids.numel())


def kept_bytes(network: nn.Module, batch: dict[str, Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward, each storage once, the network's own tensors left out."""
    own = {t.untyped_storage().data_ptr() for t in [*network.parameters(), *network.buffers()]}
    seen: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())  # so that no later storage gets the same address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = causal_nll(network, batch)[0]
    del loss
    return sum(seen.values())


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m simulations.benchmarks.memory", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--block-size", type=int, default=128)
    given = parser.parse_args(arguments)
    console = Console()
    tokens = given.batch_size * given.block_size
    table = Table(title=f"Megabytes of one data owner, {given.batch_size} x {given.block_size} tokens a batch")
    for name in ("frozen in", "checkpointing", "frozen", "adapter x 16", "kept a token", "all"):
        table.add_column(name, justify="right", no_wrap=True)
    try:
        for dtype in DTYPES:
            for checkpointing in (False, True):
                data_owner = DataOwner.open(given.bundle, dtype)
                found = memory_of(data_owner, given.batch_size, given.block_size, checkpointing)
                numbers = (found.frozen, found.adapter, found.kept, found.total(tokens))
                table.add_row(dtype, "yes" if checkpointing else "no", *(f"{number / 1e6:,.3g}" for number in numbers))
    except OffsiteError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
