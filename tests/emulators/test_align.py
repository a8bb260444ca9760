"""Output alignment against numpy on hand-collected activations, on blocks whose answer is known, and its promises."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from offsite_fl.emulators.align import NO_SUM, Align, Where, fitting_places
from offsite_fl.emulators.base import Batch, Context, Emulator, EmulatorBlock, start
from offsite_fl.emulators.budget import emulator_bytes
from offsite_fl.emulators.groups import dense_linears
from offsite_fl.emulators.report import emulated_network, hidden_error
from offsite_fl.emulators.spec import parse_emulator
from offsite_fl.emulators.streams import running_order
from offsite_fl.errors import ConfigError, EmulatorError
from offsite_fl.models.blocks import block_list, find_blocks
from offsite_fl.models.harmonizer import Harmonizer
from offsite_fl.models.linears import LowRankLinear, linear_bias, linear_weight

MakeContext = Callable[..., Context]
Pico = Callable[..., nn.Module]

WRITERS = {"llama": ("self_attn.o_proj", "mlp.down_proj"), "gpt2": ("attn.c_proj", "mlp.c_proj")}
LAST = 4


def compressed(spec: str, context: Context) -> Emulator:
    return replace(parse_emulator(spec).compress(start(context), context), notes=())


def rows(tensors: Sequence[Tensor], batches: Sequence[Batch]) -> Tensor:
    """Real tokens of [B, T, features] tensors, fp64."""
    pairs = zip(tensors, batches, strict=True)
    return torch.cat([tensor[batch["attention_mask"].bool()] for tensor, batch in pairs]).double()


@torch.no_grad()
def states(model: nn.Module, index: int, batches: Sequence[Batch]) -> Tensor:
    """What enters the block ``index`` of a network, as the network itself reports it."""
    seen = [model(**batch, output_hidden_states=True).hidden_states[index] for batch in batches]
    return rows(seen, batches)


def behind_middle(emulator: Emulator, context: Context) -> tuple[Tensor, Tensor]:
    """The stream that enters the last adapter block: the client network's, and the full model's."""
    network = emulated_network(emulator, context)
    index = find_blocks(network).depth - 1
    return states(network, index, context.calibration), states(context.model, 5, context.calibration)


@torch.no_grad()
def watched(network: nn.Module, index: int, path: str, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of a linear in the block ``index`` of a client network."""
    module = block_list(network, find_blocks(network))[index].get_submodule(path)
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    hook = module.register_forward_hook(lambda _, args, output: (inputs.append(args[0]), outputs.append(output))[0])
    for batch in batches:
        network(**batch)
    hook.remove()
    return rows(inputs, batches), rows(outputs, batches)


def assert_least_squares(given: Emulator, context: Context, path: str) -> None:
    """The last writer and its bias, from what it reads in the client's network and from the full model's states."""
    built = Align(ridge=1e-12).compress(given, context)
    assert built.notes == ()
    block = built.at(max(built.positions))
    path = path + ".up" if isinstance(block.get_submodule(path), LowRankLinear) else path
    network = emulated_network(built, context)
    x, written = watched(network, find_blocks(network).depth - 2, path, context.calibration)
    ours, theirs = behind_middle(built, context)
    design = np.hstack([x.numpy(), np.ones((len(x), 1))])
    solution = np.linalg.lstsq(design, (theirs - (ours - written)).numpy(), rcond=None)[0]
    expected = torch.from_numpy(design @ solution)
    assert float((written - expected).norm() / expected.norm()) < 1e-4
    linear = block.get_submodule(path)
    bias = linear_bias(linear)
    assert bias is not None
    found = torch.cat([linear_weight(linear), bias.unsqueeze(1)], dim=1).detach().double()
    assert float((found - torch.from_numpy(solution.T)).norm() / found.norm()) < 1e-2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("spec", ["layer-drop:keep=2", "low-rank:keep=0.5,mode=plain"])
def test_without_ridge_it_is_numpys_least_squares(family: str, spec: str, pico: Pico, context_of: MakeContext) -> None:
    context = context_of(pico(family))
    assert_least_squares(compressed(spec, context), context, WRITERS[family][1])


def test_a_moved_block_keeps_its_own_attention_window(pico: Pico, context_of: MakeContext) -> None:
    """Blocks of this model see everything up to 2 and four tokens from 3 on; a client's block goes by its origin."""
    context = context_of(pico("qwen2"))
    assert_least_squares(Emulator([EmulatorBlock(context.block(4), 4)], {1: 0}), context, WRITERS["llama"][1])


def noisy(block: nn.Module, paths: Sequence[str], seed: int = 0) -> nn.Module:
    """A copy with a known affine change in the linears at ``paths``."""
    generator, changed = torch.Generator().manual_seed(seed), copy.deepcopy(block)
    with torch.no_grad():
        for path in paths:
            linear = changed.get_submodule(path)
            linear_weight(linear).add_(torch.randn(linear_weight(linear).shape, generator=generator) * 0.1)
            bias = linear_bias(linear)
            if bias is not None:
                bias.add_(torch.randn(bias.shape, generator=generator))
    return changed


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("where", "places", "number"),
    [("last", (4,), slice(1, 2)), ("last", (4,), slice(0, 2)), ("first", (1,), slice(0, 2)), ("all", (1, 3), slice(2))],
)
def test_a_known_change_is_taken_back(
    family: str, where: Where, places: tuple[int, ...], number: slice, pico: Pico, context_of: MakeContext
) -> None:
    context = context_of(pico(family))
    given = start(context)
    paths = WRITERS[family][number]
    for place in places:
        given.blocks[given.layout[place]] = EmulatorBlock(noisy(context.block(place), paths, place), place)
    assert hidden_error(given, context, context.calibration) > 0.01
    built = Align(where, ridge=1e-10).compress(given, context)
    assert built.notes == () and hidden_error(built, context, context.calibration) < 1e-6
    for place in places:
        for path in paths:
            ours, theirs = built.at(place).get_submodule(path), context.block(place).get_submodule(path)
            assert_close(ours.weight, theirs.weight, rtol=1e-2, atol=1e-2)
            bias = linear_bias(theirs)
            assert_close(ours.bias, torch.zeros(32) if bias is None else bias, rtol=1e-2, atol=1e-2)
    batch = context.calibration[0]
    logits, expected = emulated_network(built, context)(**batch).logits, context.model(**batch).logits
    real = batch["attention_mask"].bool()
    assert_close(logits[real], expected[real], rtol=1e-2, atol=1e-2)


def test_a_harmonizer_is_fitted(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    given = start(context)
    block = Harmonizer.replacing(context.block(LAST), 32, 8)
    nn.init.normal_(block.down.weight)  # type: ignore[arg-type]
    given.blocks[given.layout[LAST]] = EmulatorBlock(block, LAST)
    before = emulator_bytes(given)
    built = Align().compress(given, context)
    assert emulator_bytes(built) == before and built.notes == ()
    assert hidden_error(built, context, context.calibration) < hidden_error(given, context, context.calibration)
    assert torch.equal(built.at(LAST).down.weight, block.down.weight)


def assert_nearer(given: Emulator, context: Context) -> None:
    """By the client's network the error is less than it was, and the mean is the full model's."""
    built = Align().compress(given, context)
    assert built.notes == ()
    (before, _), (ours, theirs) = behind_middle(given, context), behind_middle(built, context)
    assert float((ours - theirs).square().sum()) < 0.99 * float((before - theirs).square().sum())
    mean, size = (ours - theirs).mean(0), theirs.square().mean().sqrt()
    assert float(mean.abs().max() / size) < 1e-5 < 1e-3 < float((before - theirs).mean(0).abs().max() / size)


@pytest.mark.parametrize("spec", ["layer-drop:keep=2", "low-rank:keep=0.4,mode=plain"])
def test_nearer_in_every_family(family: str, spec: str, pico: Pico, context_of: MakeContext) -> None:
    context = context_of(pico(family))
    given = compressed(spec, context)
    if family == "gemma2":
        built = Align().compress(given, context)
        assert built.blocks == given.blocks and NO_SUM in built.notes[0]
    else:
        assert_nearer(given, context)


@pytest.mark.parametrize("spec", ["prune:keep=0.5", "gradot:keep=0.5", "crash:keep=2,sharing=none", "last:keep=2"])
def test_nearer_behind_other_methods(spec: str, pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    assert_nearer(compressed(spec, context), context)


def test_nearer_with_sharing(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """One block runs four times; what it reads moves with it, so the mean needn't match."""
    context = context_of(pico_llama)
    given = Emulator([EmulatorBlock(context.block(2), 2)], {1: 0, 2: 0, 3: 0, 4: 0})
    built = Align().compress(given, context)
    assert built.notes == () and built.layout == given.layout
    assert hidden_error(built, context, context.calibration) < 0.9 * hidden_error(given, context, context.calibration)


def test_every_family_says_yes_or_why_not(family: str, pico: Pico, context_of: MakeContext) -> None:
    context = context_of(pico(family))
    before = {name: tensor.clone() for name, tensor in context.model.state_dict().items()}
    method = parse_emulator("layer-drop:keep=3+align:where=all,rank=8,ridge=0.02")
    assert parse_emulator(str(method)) == method
    built = method.compress(start(context), context)
    assert bool(built.notes) == (family == "gemma2")
    assert all(torch.equal(tensor, before[name]) for name, tensor in context.model.state_dict().items())
    assert context.model.state_dict().keys() == before.keys()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in context.model.modules())
    logits = emulated_network(built, context)(**context.calibration[0]).logits
    assert logits.shape == (4, 16, 64) and bool(torch.isfinite(logits).all())


@pytest.mark.parametrize(
    ("where", "changed"), [("last", {4}), ("first", {1}), ("ends", {1, 4}), ("all", {1, 3, 4}), (None, set())]
)
def test_where(where: Where | None, changed: set[int], pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    given = compressed("layer-drop:keep=3", context)
    built = given if where is None else Align(where).compress(given, context)
    assert {place for place in built.positions if built.at(place) is not given.at(place)} == changed
    for place in changed:
        for path, linear in dense_linears(given.at(place)):
            kept = built.at(place).get_submodule(path).weight is linear.weight
            if path != "self_attn.o_proj":  # re-fitted where that helps
                assert kept == (path != "mlp.down_proj")


@pytest.mark.parametrize(
    ("where", "adapter", "layout", "places"),
    [
        ("last", (0, 5), {1: 0, 3: 1, 4: 2}, {2: 4}),
        ("first", (0, 5), {2: 0, 3: 1, 4: 2}, {0: 2}),
        ("ends", (0, 5), {1: 0, 3: 1, 4: 2}, {0: 1, 2: 4}),
        ("all", (0, 5), {1: 0, 3: 1, 4: 2}, {0: 1, 1: 3, 2: 4}),
        ("last", (0, 3, 5), {1: 0, 2: 1, 4: 2}, {1: 2, 2: 4}),
        ("first", (0, 3, 5), {1: 0, 2: 1, 4: 2}, {0: 1, 2: 4}),
        ("last", (0, 2, 5), {1: 0, 4: 0}, {0: 4}),
        ("first", (4, 5), {0: 0, 1: 0, 2: 1, 3: 1}, {0: 1}),
        ("last", (0, 1), {2: 0, 5: 1}, {1: 5}),
    ],
)
def test_places(where: Where, adapter: tuple[int, ...], layout: dict[int, int], places: dict[int, int]) -> None:
    order = running_order(adapter, tuple(layout), 6)
    assert fitting_places(where, order, layout) == places


def test_nothing_wrong_nothing_changed(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    built = Align("all").compress(start(context), context)
    assert built.notes == () and all(built.at(p) is context.block(p) for p in context.middle)


def test_low_rank_keeps_its_bytes_and_its_first_factor(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """Four blocks with two writers each, which get a bias of 32 fp32 numbers at most."""
    context = context_of(pico_llama)
    given = compressed("low-rank:keep=0.4,mode=plain", context)
    built = Align("all").compress(given, context)
    biases = sum(built.at(p).get_submodule(w).up.bias is not None for p in context.middle for w in WRITERS["llama"])
    assert 4 <= biases <= 8
    assert emulator_bytes(built) - emulator_bytes(given) == biases * 32 * 4
    for place in context.middle:
        for path, module in given.at(place).named_modules():
            if isinstance(module, LowRankLinear):
                new = built.at(place).get_submodule(path)
                assert isinstance(new, LowRankLinear) and new.rank == module.rank
                assert torch.equal(new.down.weight, module.down.weight)
                assert torch.equal(new.up.weight, module.up.weight) or path in WRITERS["llama"]


@pytest.mark.parametrize("spec", ["layer-drop:keep=2", "low-rank:keep=0.4,mode=plain"])
def test_rank_bounds_the_change(spec: str, pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    given, path = compressed(spec, context), WRITERS["llama"][1]
    path = path + ".up" if spec.startswith("low-rank") else path
    errors = [hidden_error(given, context, context.calibration)]
    for rank in (1, 3, None):
        built = Align(rank=rank).compress(given, context)
        assert emulator_bytes(built) - emulator_bytes(given) in (128, 256)
        change = built.at(LAST).get_submodule(path).weight - given.at(LAST).get_submodule(path).weight
        singular = torch.linalg.svdvals(change.double())
        count = int((singular > 1e-5 * singular[0]).sum())
        assert count == rank if rank else count > 3
        errors.append(hidden_error(built, context, context.calibration))
    assert errors == sorted(errors, reverse=True)


def test_padding_has_no_say(pico_llama: nn.Module, context_of: MakeContext, batches: tuple[Batch, ...]) -> None:
    context = context_of(pico_llama)
    filled = tuple({**b, "input_ids": b["input_ids"].masked_fill(b["attention_mask"] == 0, 7)} for b in batches)
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, filled, strict=True))
    given = compressed("layer-drop:keep=2", context)
    one, other = (Align("all").compress(given, replace(context, calibration=text)) for text in (batches, filled))
    for a, b in zip(one.blocks, other.blocks, strict=True):
        assert_close(a.module.state_dict(), b.module.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays(dtype: torch.dtype, pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama.to(dtype))
    given = compressed("layer-drop:keep=2", context)
    built = Align().compress(given, context)
    assert {p.dtype for b in built.blocks for p in b.module.parameters()} == {dtype}
    error = hidden_error(built, context, context.calibration)
    assert error < 0.5 * hidden_error(given, context, context.calibration)


def test_packed_weights_are_refused(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    with pytest.raises(EmulatorError, match="4-bit weights already; put align before quantize"):
        parse_emulator("quantize:bits=4+align").compress(start(context), context)
    built = parse_emulator("layer-drop:keep=2+align+quantize:bits=8").compress(start(context), context)
    assert bool(torch.isfinite(emulated_network(built, context)(**context.calibration[0]).logits).all())


def test_text_is_needed(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama, calibration=())
    with pytest.raises(EmulatorError, match="align needs calibration text"):
        Align().compress(start(context), context)


def test_states_that_are_not_finite_are_named(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    with torch.no_grad():
        context.block(4).mlp.down_proj.weight[0, 0] = float("inf")
    given = Emulator([EmulatorBlock(context.block(1), 1)], {1: 0})
    with pytest.raises(EmulatorError, match=r"hidden states behind mlp\.down_proj in block 1 aren't finite"):
        Align().compress(given, context)


def test_progress(pico_llama: nn.Module, context_of: MakeContext, capsys: pytest.CaptureFixture[str]) -> None:
    context = context_of(pico_llama, progress=True)
    parse_emulator("layer-drop:keep=2+align").compress(start(context), context)
    assert re.search(r"\balign\b", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("align:where=end", "did you mean 'ends'"),
        ("align:rank=0", "rank = 0 must be 1 or more"),
        ("align:ridge=0", "ridge = 0.0 must be above 0"),
    ],
)
def test_impossible_options(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_emulator(spec)


def test_options_and_back() -> None:
    assert str(Align()) == "align" and parse_emulator("align:rank=") == Align()
    assert str(Align("all", 4, 0.5)) == "align:where=all,rank=4,ridge=0.5"
