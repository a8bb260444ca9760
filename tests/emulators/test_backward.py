"""The block-by-block backward pass against plain autograd on the whole model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from offsite_fl.emulators.backward import BackwardPass, Watched, block_backward, frozen
from offsite_fl.emulators.base import Context
from offsite_fl.emulators.groups import dense_linears
from offsite_fl.emulators.streams import TextBatch
from offsite_fl.evaluation.loss import evaluate_loss
from offsite_fl.models.linears import linear_weight
from offsite_fl.models.walk import BlockCall

MakeContext = Callable[..., Context]


def whole_model_gradients(context: Context) -> dict[str, Tensor]:
    """Gradients of the summed loss for all parameters, the ordinary way."""
    model = context.model
    for batch in context.calibration:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )
        loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def test_weight_gradients_follow_from_inputs_and_output_gradients(
    family: str, pico: Callable[..., nn.Module], context_of: MakeContext
) -> None:
    """``dL/dW = sum over tokens of gy x'``, padded rows included in the batches."""
    context = context_of(pico(family))
    expected = whole_model_gradients(context)
    passing = BackwardPass(context, context.calibration, "test")
    for position in reversed(range(context.blocks.depth)):
        paths = [path for path, _ in dense_linears(context.block(position))]
        found = {path: torch.zeros_like(linear_weight(context.block(position).get_submodule(path))) for path in paths}

        def add(batch: TextBatch, watched: dict[str, Watched], found: dict[str, Tensor] = found) -> None:
            for path, seen in watched.items():
                found[path] += batch.rows(seen.gradient).T @ batch.rows(seen.inputs)

        passing.back(position, paths, add)
        for path in paths:
            linear = context.block(position).get_submodule(path)
            theirs = expected[f"{context.blocks.path}.{position}.{path}.weight"]
            oriented = theirs if isinstance(linear, nn.Linear) else theirs.T
            assert_close(found[path], oriented, rtol=1e-3, atol=1e-4)


def test_loss_and_tokens_are_the_models(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    passing = BackwardPass(context, context.calibration, "test")
    measured = evaluate_loss(pico_llama, context.calibration)
    assert passing.tokens == measured.tokens
    assert abs(passing.loss - measured.loss) < 1e-5


def test_the_model_is_left_as_it_was(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    passing = BackwardPass(context, context.calibration, "test")
    for position in reversed(range(context.blocks.depth)):
        passing.back(position)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in pico_llama.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in pico_llama.modules())


def test_a_linear_that_nothing_depends_on_has_gradient_zero() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, hidden: Tensor) -> Tensor:
            self.idle(hidden)
            out: Tensor = self.used(hidden)
            return out

    block, hidden, behind = Idle(), torch.randn(1, 4, 3), torch.randn(1, 4, 3)
    before, watched = block_backward(block, hidden, BlockCall(), behind, ["used", "idle"])
    assert_close(before, behind @ block.used.weight)
    assert_close(watched["used"].gradient, behind)
    assert torch.equal(watched["idle"].gradient, torch.zeros(1, 4, 3))


def test_frozen_gives_every_switch_back() -> None:
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    with frozen(module):
        assert not module.weight.requires_grad
    assert module.weight.requires_grad and not module.bias.requires_grad
