"""KFAC's moments from the block-by-block backward pass against autograd on the whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from offsite_fl.emulators.backward import BackwardPass, Watched
from offsite_fl.emulators.base import Context, start
from offsite_fl.emulators.kfac import MomentSums
from offsite_fl.emulators.parts import find_parts
from offsite_fl.emulators.streams import TextBatch
from offsite_fl.errors import EmulatorError

MakeContext = Callable[..., Context]


def tokens_of(context: Context, position: int, path: str) -> tuple[Tensor, Tensor]:
    """What one linear reads and the summed loss's gradient at what it writes, [real tokens, ...], the ordinary way."""
    linear = context.block(position).get_submodule(path)
    xs, gys = [], []
    for batch in context.calibration:
        seen: dict[str, Tensor] = {}

        def note(_: nn.Module, args: tuple[Any, ...], output: Tensor, seen: dict[str, Tensor] = seen) -> None:
            output.retain_grad()
            seen["x"], seen["y"] = args[0], output

        handle = linear.register_forward_hook(note)
        logits = context.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
        ).backward()
        handle.remove()
        gradient = seen["y"].grad
        assert gradient is not None
        for row in range(batch["input_ids"].shape[0]):
            for token in range(batch["input_ids"].shape[1]):
                if batch["attention_mask"][row, token]:
                    shape = (*batch["input_ids"].shape, -1)
                    xs.append(seen["x"].detach().reshape(shape)[row, token])
                    gys.append(gradient.reshape(shape)[row, token])
    context.model.zero_grad(set_to_none=True)
    return torch.stack(xs).double(), torch.stack(gys).double()


def test_against_autograd_on_the_whole_model(
    family: str, pico: Callable[..., nn.Module], context_of: MakeContext
) -> None:
    """A = E[x x'], G = E[gy gy'] and g = E[gy x'] over real tokens; the batches have padded rows."""
    context = context_of(pico(family))
    assert any(bool((batch["attention_mask"] == 0).any()) for batch in context.calibration)
    (parts,) = (b for b in find_parts(start(context), context).values() if b.position == 3)
    sums = MomentSums(parts.groups, {})
    passing = BackwardPass(context, context.calibration, "test")
    for position in (5, 4):
        passing.back(position)
    passing.back(3, sums.paths, sums.add)
    means = sums.means("block 3")
    assert means.keys() == set(sums.paths)
    for path, (moments,) in means.items():
        x, gy = tokens_of(context, 3, path)
        assert sums.tokens == len(x)
        for ours, theirs in (
            (moments.inputs, x.T @ x / len(x)),
            (moments.outputs, gy.T @ gy / len(x)),
            (moments.gradient, gy.T @ x / len(x)),
        ):
            assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_by_hand_with_padding_and_two_runs() -> None:
    """Two real tokens of three; the outputs 0-1 and 2-3 count as two matrices."""
    batch = TextBatch([], torch.tensor([True, False, True]))
    x = torch.tensor([[1.0, 2.0], [9.0, 9.0], [0.0, 1.0]])
    gy = torch.tensor([[1.0, 0.0, 2.0, 1.0], [7.0, 7.0, 7.0, 7.0], [1.0, 1.0, 0.0, 4.0]])
    sums = MomentSums([("fused",)], {"fused": 2})
    sums.add(batch, {"fused": Watched(x.view(1, 3, 2), gy.view(1, 3, 4))})
    first, second = sums.means("here")["fused"]
    assert_close(first.inputs, torch.tensor([[1.0, 2.0], [2.0, 5.0]]) / 2)
    assert_close(second.inputs, first.inputs)
    assert_close(first.outputs, torch.tensor([[2.0, 1.0], [1.0, 1.0]]) / 2)
    assert_close(second.outputs, torch.tensor([[4.0, 2.0], [2.0, 17.0]]) / 2)
    assert_close(first.gradient, torch.tensor([[1.0, 3.0], [0.0, 1.0]]) / 2)
    assert_close(second.gradient, torch.tensor([[2.0, 4.0], [1.0, 6.0]]) / 2)


def test_wide_inputs_are_symmetric_and_add_up() -> None:
    """Wider than one panel of the product, over two batches."""
    generator = torch.Generator().manual_seed(0)
    sums, rows = MomentSums([("a", "b")], {}), []
    for _ in range(2):
        x = torch.randn(1, 5, 900, generator=generator)
        rows.append(x[0])
        gradient = torch.randn(1, 5, 3, generator=generator)
        sums.add(TextBatch([], None), {"a": Watched(x, gradient), "b": Watched(x, 2 * gradient)})
    means = sums.means("here")
    x = torch.cat(rows).double()
    assert_close(means["a"][0].inputs.double(), x.T @ x / 10, rtol=1e-5, atol=1e-5)
    assert means["a"][0].inputs is means["b"][0].inputs
    assert_close(means["b"][0].outputs, 4 * means["a"][0].outputs)


def test_what_is_not_finite_is_named() -> None:
    sums = MomentSums([("q",)], {})
    sums.add(TextBatch([], None), {"q": Watched(torch.tensor([[[torch.inf]]]), torch.ones(1, 1, 1))})
    with pytest.raises(EmulatorError, match="of q in block 7 aren't finite"):
        sums.means("block 7")
