"""Blocks watched on noise, without any text: what their linears do, and which of them are MLPs and which attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offsite_fl.emulators.base import Batch, Context
from offsite_fl.emulators.channels import ChannelChain, find_chains
from offsite_fl.emulators.groups import BlockPlan, dense_linears, kind_of, plan_block
from offsite_fl.emulators.streams import read_batches
from offsite_fl.errors import EmulatorError, OffsiteError
from offsite_fl.models.probe import probe_batch
from offsite_fl.models.walk import BlockCall

# Rows and tokens of the noise.
PROBE = (2, 16)


@dataclass(frozen=True)
class Watched:
    """What was seen of a block: the plan of its linears, and the channel chains among them."""

    plan: BlockPlan
    chains: tuple[ChannelChain, ...]

    @property
    def attention(self) -> tuple[str, ...]:
        """Linears that run once and are no part of an MLP's channels, in the order in which they run."""
        inside = {path for chain in self.chains for path in chain.paths}
        return tuple(path for group in self.plan.groups for path in group if path not in inside)


class Watcher:
    """Watches the blocks of a context's model, or others that run at their places.

    ``noise`` [B, T, hidden] is the hidden state that they get: every token is another, since attention over equal
    tokens would look like channels that stand side by side.

    ``EmulatorError`` where the model doesn't run on a batch that is made up from its config.
    """

    def __init__(self, context: Context) -> None:
        rows, length = PROBE
        batch: Batch = probe_batch(context.model, length, rows)
        self._model = type(context.model).__name__
        with _told(self._model):
            (self._probe,) = read_batches(context, [batch])
        like, generator = self._probe.entry, torch.Generator().manual_seed(0)
        self.noise: Tensor = torch.randn(like.shape, generator=generator).to(like.device, like.dtype)
        self._known: dict[tuple[object, ...], Watched] = {}

    def call(self, position: int) -> BlockCall:
        """How the model calls its block at ``position`` on the noise."""
        return self._probe.calls[position]

    @torch.no_grad()
    def returns(self, block: nn.Module, position: int) -> int:
        """Number of items of the tuple that ``block`` returns; 0 for a bare state."""
        call = self.call(position)
        output = block(self.noise, *call.args, **call.kwargs)
        return len(output) if isinstance(output, tuple) else 0

    def watch(self, block: nn.Module, position: int) -> Watched:
        """Look at ``block``, in eval mode on the context's device; of blocks of one kind at one."""
        if not any(dense_linears(block)):
            return Watched(BlockPlan((), (), ()), ())
        kind = kind_of(block)
        if kind not in self._known:
            with _told(self._model):
                plan = plan_block(block, self.noise, self.call(position), self._probe.rows)
                self._known[kind] = Watched(plan, find_chains(block, self.noise, self.call(position), plan))
        return self._known[kind]


@contextmanager
def _told(model: str) -> Iterator[None]:
    """Turn what a forward pass that wants other inputs throws into an ``EmulatorError``."""
    try:
        yield
    except OffsiteError:
        raise
    except Exception as error:  # a forward pass that doesn't take the made-up batch may fail in any way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EmulatorError(
            f"the blocks of {model} can't be watched, so what can be taken out of them isn't known: it doesn't run on "
            f"a batch made up from its config ({reason}). Take an emulator that needn't watch, like low-rank, quantize"
        ) from error
