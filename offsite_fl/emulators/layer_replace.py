"""Dynamic LayerReplace, the first stage of ScaleOT (arXiv 2412.09812): which layers matter, and stand-ins for them.

Every place of the middle has a score ``s`` and a harmonizer, ``x + Up(ReLU(Down x))``. Networks are sampled in which
about half of the places run their harmonizer; the harmonizers learn from the loss of such networks, and the scores from
how well networks that kept a layer do. The model itself is frozen. Nothing here depends on how much will be replaced
in the end, so one run serves emulators of any size.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from offsite_fl.emulators.base import Batch, Context, Emulator
from offsite_fl.emulators.report import planned_network
from offsite_fl.emulators.student import REDUCED
from offsite_fl.emulators.training import shuffled, training_bar
from offsite_fl.emulators.training_state import Checkpoints, RunState, fingerprint
from offsite_fl.errors import EmulatorError
from offsite_fl.evaluation.objective import objective_of
from offsite_fl.models.blocks import BlockList
from offsite_fl.models.harmonizer import Harmonizer
from offsite_fl.models.network import place_blocks

log = logging.getLogger(__name__)

SAVE_EVERY = 20
# Gradients are clipped to this norm: a fresh Up is moved by inputs of any size.
CLIP = 1.0


@dataclass(frozen=True)
class ReplaceOptions:
    """How harmonizers and scores are trained.

    ``steps`` pairs of a training and a scoring step, ``lr`` of AdamW, ``rank`` of a harmonizer, ``group`` neighbouring
    places of which half are replaced, ``samples`` networks that a scoring step compares, ``eta`` its rate.
    """

    steps: int
    lr: float
    rank: int
    group: int
    samples: int
    eta: float


@dataclass
class Replacements:
    """What Dynamic LayerReplace found, by position: ``scores`` (low: easily replaced) and trained ``harmonizers``.

    Harmonizers lie where the full model lies, in its dtype.
    """

    scores: dict[int, float]
    harmonizers: dict[int, Harmonizer]


def draw_kept(scores: Tensor, group: int, generator: torch.Generator) -> Tensor:
    """Which places a sampled network keeps: with ``p ~ U(0, sigmoid(s))``, those above the median of their group.

    Groups are ``group`` neighbours; the last one may be smaller. Where a group is odd its median goes either way.

    Args:
        scores: [places].
        group: size of a group, at least 2.
        generator: of the CPU.

    Returns:
        bool [places].
    """
    chances = torch.rand(len(scores), generator=generator) * scores.detach().cpu().sigmoid()
    kept = torch.zeros(len(scores), dtype=torch.bool)
    for start in range(0, len(scores), group):
        part = chances[start : start + group]
        coin = int(torch.randint(2, (), generator=generator))
        count = (len(part) + coin) // 2
        kept[start + part.argsort(descending=True)[:count]] = True
    return kept


def rewarded(scores: Tensor, kept: Sequence[Tensor], losses: Sequence[float], eta: float) -> Tensor:
    """The scores after a scoring step.

    Network j keeps the places ``kept[j]`` and has the mean loss ``losses[j]`` in nats. Its reward is
    ``r_j = exp(-L_j)`` minus the mean over all networks, and every place that it keeps gets
    ``s += eta * r_j * sigmoid(s) (1 - sigmoid(s))``, with the slope of before the step.

    >>> kept = [torch.tensor([True, False]), torch.tensor([False, True])]
    >>> rewarded(torch.zeros(2), kept, [math.log(2), math.log(4)], eta=8.0)
    tensor([ 0.2500, -0.2500])
    """
    goods = torch.tensor([math.exp(-loss) for loss in losses], dtype=scores.dtype)
    slope = scores.sigmoid() * (1 - scores.sigmoid())
    gain = torch.stack([mask.to(scores.dtype) for mask in kept]).T @ (goods - goods.mean())
    return scores + eta * gain * slope


class ReplaceableNetwork:
    """The client's network of an emulator, any of whose middle places can run a harmonizer instead of its block.

    Nothing is copied: a sampled network is the same network with other modules in its list. ``positions`` are those of
    the places that can be replaced, ``harmonizers`` theirs, in fp32. Blocks that are harmonizers already stay.
    """

    def __init__(self, emulator: Emulator, context: Context, rank: int, features: int, returns: int) -> None:
        self.device = torch.device(context.device)
        self.network, plan = planned_network(emulator, context)
        self.network.to(self.device)
        self._stack = self.network.get_submodule(plan.blocks_path)
        order = sorted([*context.adapter, *emulator.layout])
        self.positions = tuple(p for p in emulator.positions if not isinstance(emulator.at(p), Harmonizer))
        self._places = {position: order.index(position) for position in self.positions}
        blocks = place_blocks(self.network, plan)
        self._blocks = {position: blocks[place] for position, place in self._places.items()}
        self.harmonizers = {
            position: _fresh(block, features, rank, returns, context.seed * 4099 + position).to(self.device)
            for position, block in self._blocks.items()
        }
        self._reduced = next(context.model.parameters()).dtype in REDUCED

    def use(self, kept: Tensor) -> None:
        """Run the blocks of ``kept`` (bool, in the order of ``positions``) and the harmonizers of the others."""
        assert isinstance(self._stack, BlockList)
        for position, keep in zip(self.positions, kept.tolist(), strict=True):
            own, other = self._blocks[position], self.harmonizers[position]
            self._stack[self._places[position]] = own if keep else other

    def loss(self, batch: Batch) -> Tensor:
        """Mean next-token loss in nats of the network as it is now."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._reduced):
            moved = {name: value.to(self.device) for name, value in batch.items()}
            nats, tokens = objective_of(self.network).nll(self.network, moved)
        return nats / max(1, tokens)


def replace_layers(
    emulator: Emulator, context: Context, options: ReplaceOptions, features: int, returns: int
) -> Replacements:
    """Train harmonizers and scores for every place of ``emulator``.

    Where the context has a ``workdir`` a checkpoint is written there, and the same call goes on from it.

    Args:
        emulator: what the harmonizers are to fit in with; it isn't changed.
        context: its calibration text, at least two batches, is trained on.
        options: see :class:`ReplaceOptions`.
        features: size of the hidden state.
        returns: what the model's blocks return, see :class:`~offsite_fl.models.harmonizer.Harmonizer`.
    """
    batches = context.need_calibration("training harmonizers")
    if len(batches) < 2:
        raise EmulatorError("harmonizers are trained on one batch and scored on another: give text for at least two")
    network = ReplaceableNetwork(emulator, context, options.rank, features, returns)
    run = _Run(options, context, network, batches)
    key = None
    if context.workdir is not None:
        key = fingerprint(f"layer-replace {options}", emulator, context, batches, ())
    run.run(key)
    own = next(context.block(context.middle[0]).parameters())
    made = {p: h.requires_grad_(False).to(own.device, own.dtype) for p, h in network.harmonizers.items()}
    return Replacements(dict(zip(network.positions, run.scores.tolist(), strict=True)), made)


@dataclass
class _Run:
    """One run of the first stage; scores are kept as a parameter so that checkpoints hold them too."""

    options: ReplaceOptions
    context: Context
    network: ReplaceableNetwork
    batches: Sequence[Batch]
    scores: nn.Parameter = field(init=False)
    parameters: dict[str, nn.Parameter] = field(init=False)
    optimizer: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        self.scores = nn.Parameter(torch.zeros(len(self.network.positions)), requires_grad=False)
        self.parameters = {
            f"{position}.{name}": parameter
            for position, harmonizer in self.network.harmonizers.items()
            for name, parameter in harmonizer.named_parameters()
        }
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=self.options.lr, weight_decay=0.0)

    def run(self, key: str | None) -> None:
        named = {**self.parameters, "scores": self.scores}
        checkpoints = Checkpoints(self.context.workdir, key, "scaleot") if self.context.workdir and key else None
        found = checkpoints.load(named, self.optimizer, self.network.device) if checkpoints else None
        start = found.step if found else 0
        with training_bar("scaleot", self.context, self.options.steps, start) as tell:
            for step in range(start, self.options.steps):
                loss = self.step(step)
                done = step + 1
                if checkpoints and (done % SAVE_EVERY == 0 or done == self.options.steps):
                    # There is no best to choose: the values of now are those that the run stands for.
                    values = {name: p.detach().cpu().clone() for name, p in named.items()}
                    checkpoints.save(RunState(done, done, loss, values), named, self.optimizer)
                tell(done, f"loss {loss:.3f}")
        log.info("scaleot: scores %s", dict(zip(self.network.positions, self.scores.tolist(), strict=True)))

    def step(self, step: int) -> float:
        """One training and one scoring step; everything random in them follows from the number of the step."""
        generator = torch.Generator().manual_seed((self.context.seed * 1_000_003 + step) % 2**63)
        loss = self._train(self._batch(2 * step), self._draw(generator), step)
        self._score(self._batch(2 * step + 1), [self._draw(generator) for _ in range(self.options.samples)], step)
        return loss

    def _batch(self, number: int) -> Batch:
        count = len(self.batches)
        return self.batches[shuffled(count, self.context.seed, number // count)[number % count]]

    def _draw(self, generator: torch.Generator) -> Tensor:
        return draw_kept(self.scores, self.options.group, generator)

    def _train(self, batch: Batch, kept: Tensor, step: int) -> float:
        # With a single place the draw may keep it, which leaves nothing to train.
        self.network.use(kept if not bool(kept.all()) else torch.zeros_like(kept))
        loss = self._loss(batch, step)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters.values(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def _loss(self, batch: Batch, step: int) -> Tensor:
        loss = self.network.loss(batch)
        if not torch.isfinite(loss):
            raise EmulatorError(
                f"scaleot: the loss isn't finite at step {step + 1}; try a smaller lr than {self.options.lr}"
            )
        return loss

    @torch.no_grad()
    def _score(self, batch: Batch, kept: Sequence[Tensor], step: int) -> None:
        losses = []
        for mask in kept:
            self.network.use(mask)
            losses.append(self._loss(batch, step).item())
        self.scores.copy_(rewarded(self.scores, kept, losses, self.options.eta))


def _fresh(block: nn.Module, features: int, rank: int, returns: int, seed: int) -> Harmonizer:
    """An identity with random directions to read from, of about the size that its input has."""
    new = Harmonizer.replacing(block, features, rank, returns)
    generator = torch.Generator().manual_seed(seed % 2**63)
    with torch.no_grad():
        for name, parameter in new.down.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator) / math.sqrt(features)
            parameter.copy_(drawn if name == "weight" else torch.zeros_like(parameter))
    return new.requires_grad_(True)
