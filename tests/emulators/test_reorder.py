"""The order of channels: short in itself, and invisible from outside the block."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from offsite_fl.emulators.base import Context, copy_structure, start
from offsite_fl.emulators.channels import ChannelChain, find_chains
from offsite_fl.emulators.free_order import find_free
from offsite_fl.emulators.groups import plan_block
from offsite_fl.emulators.penalties import Dim
from offsite_fl.emulators.reorder import reorder, smooth_order
from offsite_fl.emulators.streams import read_batches
from offsite_fl.emulators.value_dims import ValueDims
from offsite_fl.emulators.watching import Watcher
from offsite_fl.models.linears import linear_weight
from offsite_fl.models.walk import call_block
from tests.conftest import make_pico
from tests.pico_classifiers import make_classifier

MakeContext = Callable[..., Context]


def length(rows: Tensor, order: Sequence[int]) -> float:
    return sum(float((rows[a] - rows[b]).square().sum()) for a, b in itertools.pairwise(order))


def test_a_shuffled_line_is_put_right() -> None:
    line = torch.arange(20.0)[:, None] * torch.tensor([[1.0, -2.0]])
    shuffled = line[torch.randperm(20, generator=torch.Generator().manual_seed(0))]
    found = shuffled[smooth_order(shuffled)]
    assert torch.equal(found, line) or torch.equal(found, line.flip(0))


def test_greedy_by_hand() -> None:
    """From 10, the farthest from the mean 4.2: to 6, to 4, then to 1, then to 0."""
    assert smooth_order(torch.tensor([[4.0], [0.0], [10.0], [1.0], [6.0]])).tolist() == [2, 4, 0, 3, 1]


@pytest.mark.parametrize("seed", range(8))
def test_between_the_best_order_and_the_given_one(seed: int) -> None:
    rows = torch.randn(6, 3, generator=torch.Generator().manual_seed(seed))
    found = smooth_order(rows).tolist()
    assert sorted(found) == list(range(6))
    lengths = [length(rows, order) for order in itertools.permutations(range(6))]
    assert min(lengths) - 1e-5 <= length(rows, found) <= length(rows, range(6)) + 1e-5
    assert length(rows, found) < sum(lengths) / len(lengths)


def test_an_order_that_greed_would_spoil_stays() -> None:
    """Greed goes from (4, 2) to (2, 4), (0, 4), (0, 3) and back to (4, 5): 8 + 4 + 1 + 20. As given: 9 + 5 + 4 + 1."""
    rows = torch.tensor([[4.0, 2.0], [4.0, 5.0], [2.0, 4.0], [0.0, 4.0], [0.0, 3.0]])
    assert smooth_order(rows).tolist() == [0, 1, 2, 3, 4]
    equal = torch.zeros(4, 2)
    assert smooth_order(equal).tolist() == [0, 1, 2, 3]


def watched(context: Context, index: int) -> tuple[nn.Module, tuple[ChannelChain, ...], Tensor, object]:
    (batch,) = read_batches(context, context.calibration[:1])
    block, call = context.block(index), batch.calls[index]
    hidden = torch.randn(batch.entry.shape, generator=torch.Generator().manual_seed(1))
    return block, find_chains(block, hidden, call, plan_block(block, hidden, call, batch.rows)), hidden, call


@pytest.mark.parametrize("dims", [("out",), ("in",), ("out", "in")])
def test_the_block_computes_what_it_did(
    family: str, dims: tuple[Dim, ...], pico: Callable[..., nn.Module], context_of: MakeContext
) -> None:
    context = context_of(pico(family))
    block, chains, hidden, call = watched(context, 2)
    assert len(chains) == 1
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    copied = copy_structure(block)
    with torch.no_grad():
        reorder(copied, chains[0], dims)
        assert_close(call_block(copied, hidden, call), call_block(block, hidden, call), rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())
    old, new = (linear_weight(b.get_submodule(chains[0].writer)) for b in (block, copied))
    assert not torch.equal(old, new) and torch.equal(old.sort(1).values, new.sort(1).values)


@pytest.mark.parametrize("dim", ["out", "in"])
def test_it_is_smoother_along_what_was_asked_for(dim: Dim, pico_llama: nn.Module, context_of: MakeContext) -> None:
    block, (chain,), _, _ = watched(context_of(pico_llama), 2)
    copied = copy_structure(block)
    reorder(copied, chain, (dim,))

    def rough(module: nn.Module) -> float:
        if dim == "in":
            rows = linear_weight(module.get_submodule("mlp.down_proj")).T
        else:
            rows = torch.cat([linear_weight(module.get_submodule(f"mlp.{n}_proj")) for n in ("gate", "up")], dim=1)
        return length(rows.detach(), range(len(rows)))

    assert rough(copied) < 0.9 * rough(block)


@pytest.mark.parametrize("dims", [("out",), ("in",), ("out", "in")])
def test_the_differences_of_a_real_block_never_grow(
    family: str, dims: tuple[Dim, ...], pico: Callable[..., nn.Module], context_of: MakeContext
) -> None:
    """R_1 over all linears of the chain along ``dims``; also from an order that greed would spoil."""
    block, (chain,), _, _ = watched(context_of(pico(family)), 2)

    def rows_of(module: nn.Module) -> Tensor:
        parts = [p for path in chain.readers for p in linear_weight(module.get_submodule(path)).chunk(chain.parts)]
        sides = {"out": parts, "in": [linear_weight(module.get_submodule(chain.writer)).T]}
        return torch.cat([rows for dim in dims for rows in sides[dim]], dim=1).detach().double()

    def lengths(module: nn.Module) -> tuple[float, float]:
        before = rows_of(module)
        reorder(module, chain, dims)
        after = rows_of(module)
        assert_close(after.sort(0).values, before.sort(0).values)  # the channels are the same ones
        return length(before, range(len(before))), length(after, range(len(after)))

    before, after = lengths(copy_structure(block))
    assert after < before
    before, after = lengths(copied_with_a_given_order(block, chain))
    assert after <= before * (1 + 1e-6)


def copied_with_a_given_order(block: nn.Module, chain: ChannelChain) -> nn.Module:
    """A copy with the five points of the test above as its first channels; the others go on in tiny steps."""
    points = torch.tensor([[4.0, 2.0], [4.0, 5.0], [2.0, 4.0], [0.0, 4.0], [0.0, 3.0]])
    copied = copy.deepcopy(block)
    far = torch.arange(chain.width)[:, None]
    line = points[far[:, 0].clamp(max=4)] + torch.tensor([0.0, -1e-3]) * (far - 4).clamp(min=0)
    with torch.no_grad():
        for path in chain.readers:
            weight = linear_weight(copied.get_submodule(path))
            weight.zero_()
            weight[:, :2] = line.repeat(chain.parts, 1)
        weight = linear_weight(copied.get_submodule(chain.writer))
        weight.zero_()
        weight[:2] = line.T
    return copied


# Values inside heads


def model_of(kind: str) -> nn.Module:
    """Models whose values are found: with groups and without, with biases and without, of text and of images."""
    if kind == "vit":
        return make_classifier("vit")
    family, _, changes = kind.partition(" ")
    return make_pico(family, **{"ungrouped": {"num_key_value_heads": 4}, "": {}}[changes])


KINDS = ("llama", "llama ungrouped", "qwen2", "qwen2 ungrouped", "phi", "vit")


def values_in(kind: str, context_of: MakeContext) -> tuple[Context, nn.Module, ValueDims]:
    model = model_of(kind)
    context = context_of(model, (0, 4) if kind == "vit" else (0, 5), calibration=())
    (values,) = (part for part in find_free(start(context), context)[1] if isinstance(part, ValueDims))
    return context, context.block(2), values


@pytest.mark.parametrize("dims", [("out",), ("in",), ("out", "in")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_with_other_orders_inside_its_heads_computes_what_it_did(
    kind: str, dims: tuple[Dim, ...], context_of: MakeContext
) -> None:
    context, block, values = values_in(kind, context_of)
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    watcher, copied = Watcher(context), copy_structure(block)
    reorder(copied, values, dims)
    with torch.no_grad():
        old, new = (call_block(b, watcher.noise, watcher.call(2)) for b in (block, copied))
    assert_close(new, old, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())
    bias = f"{values.value}.bias"
    assert (bias in before) == (kind.split()[0] != "llama")
    changed = {name for name, tensor in copied.state_dict().items() if not torch.equal(tensor, before[name])}
    expected = {f"{values.value}.weight", f"{values.writer}.weight"} | ({bias} & before.keys())
    assert changed == expected


@pytest.mark.parametrize("dims", [("out",), ("in",), ("out", "in")])
@pytest.mark.parametrize("kind", KINDS)
def test_the_differences_inside_heads_never_grow(kind: str, dims: tuple[Dim, ...], context_of: MakeContext) -> None:
    """R_1 of each head along ``dims``: over the rows of its values, and over the columns of all that read them."""
    _, block, values = values_in(kind, context_of)

    def lengths(module: nn.Module) -> list[float]:
        wrote = linear_weight(module.get_submodule(values.value)).detach().double()
        read = linear_weight(module.get_submodule(values.writer)).detach().double()
        size, found = values.size, []
        for head in range(values.heads):
            total = length(wrote[head * size : (head + 1) * size], range(size)) if "out" in dims else 0.0
            for copy_of in range(values.copies if "in" in dims else 0):
                first = (head * values.copies + copy_of) * size
                total += length(read[:, first : first + size].T, range(size))
            found.append(total)
        return found

    copied = copy_structure(block)
    reorder(copied, values, dims)
    before, after = lengths(block), lengths(copied)
    assert all(b <= a for a, b in zip(before, after, strict=True)) and sum(after) < 0.97 * sum(before)
    again = copy_structure(copied)
    reorder(again, values, dims)
    assert all(b <= a * (1 + 1e-6) for a, b in zip(after, lengths(again), strict=True))


def test_values_in_one_fused_linear_stay(context_of: MakeContext) -> None:
    """GPT-2's heads aren't found, so only the channels of its MLP are free."""
    context = context_of(make_pico("gpt2"), calibration=())
    assert [[type(part) for part in parts] for parts in find_free(start(context), context).values()] == [
        [ChannelChain]
    ] * 4
