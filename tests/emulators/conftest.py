"""Fixtures for emulators: public text as batches, contexts of pico models, and what methods promise of both models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from offsite_fl.emulators.base import Batch, Context, Emulator, EmulatorMethod, start
from offsite_fl.emulators.budget import emulator_bytes
from offsite_fl.emulators.layer_drop import LayerDrop
from offsite_fl.emulators.report import emulated_network
from offsite_fl.emulators.student import Teacher
from offsite_fl.evaluation.loss import causal_nll
from offsite_fl.evaluation.objective import Objective
from offsite_fl.models.blocks import find_blocks


def random_batches(count: int = 3, rows: int = 4, length: int = 16, seed: int = 0) -> tuple[Batch, ...]:
    """Random tokens; the second row of each batch is padded from position 11 on."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(4, 64, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 11:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return tuple(batches)


@pytest.fixture
def batches() -> tuple[Batch, ...]:
    return random_batches()


@pytest.fixture
def context_of(batches: tuple[Batch, ...]) -> Callable[..., Context]:
    """``context_of(model, adapter=(0, 5), **changes)``: a context with calibration text."""

    def make(model: nn.Module, adapter: tuple[int, ...] = (0, 5), **changes: Any) -> Context:
        return make_context(model, adapter, **({"calibration": batches} | changes))

    return make


def make_context(model: nn.Module, adapter: tuple[int, ...] = (0, 5), **changes: Any) -> Context:
    """A context without calibration text."""
    blocks = find_blocks(model)
    middle = tuple(index for index in range(blocks.depth) if index not in adapter)
    return Context(model, blocks, adapter, middle, **changes)


def context_of_nothing() -> Context:
    """For methods that look at the emulator alone."""
    return Context(nn.Identity(), None, (), ())  # type: ignore[arg-type]


@pytest.fixture
def pico_phi3() -> nn.Module:
    """Phi-3 of 6 blocks, hidden 32, 48 channels: gate and up are one linear, and so are queries, keys and values."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("phi3", vocab_size=64, num_hidden_layers=6, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config).eval()
    return model


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """What runs inside leaves no trace in ``model``: modules, modes, values to the bit, flags, gradients, hooks."""

    def form() -> tuple[object, ...]:
        modes = [(module, module.training) for module in model.modules()]
        return modes, [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()]

    before, values = form(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield
    assert form() == before
    after = model.state_dict()
    assert after.keys() == values.keys() and all(torch.equal(tensor, values[name]) for name, tensor in after.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def compressed(method: EmulatorMethod, context: Context) -> Emulator:
    """What ``method`` makes of the whole middle."""
    return method.compress(start(context), context)


def dropped(context: Context, keep: int = 2) -> Emulator:
    """An emulator of ``keep`` of the middle's blocks."""
    return compressed(LayerDrop(keep), context)


def share(built: Emulator, context: Context) -> float:
    """Bytes of an emulator over those of the middle."""
    return emulator_bytes(built) / emulator_bytes(start(context))


@torch.no_grad()
def logits(emulator: Emulator, context: Context) -> Tensor:
    """Of a client's network on the first batch."""
    found: Tensor = emulated_network(emulator, context)(**context.calibration[0]).logits
    return found


def weights(emulator: Emulator) -> list[Tensor]:
    """Copies of all parameters."""
    return [p.detach().clone() for block in emulator.blocks for p in block.module.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two lists of tensors are equal to the bit."""
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the teacher ran and how often the next-token loss was computed for training."""
    counts = {"teacher": 0, "loss": 0}
    teach, nll = Teacher.forward, causal_nll

    def forward(self: Teacher, batch: Batch, hidden: Tensor) -> Tensor:
        counts["teacher"] += 1
        return teach(self, batch, hidden)

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        counts["loss"] += 1
        return nll(model, batch)

    monkeypatch.setattr(Teacher, "forward", forward)
    monkeypatch.setattr("offsite_fl.emulators.student.objective_of", lambda model: Objective(loss, len))
    return counts
