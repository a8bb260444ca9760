"""Pruning: really fewer bytes and the network with what is gone set to zero; the paper's zeros letter by letter."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from offsite_fl.emulators.base import Context, Emulator, start
from offsite_fl.emulators.budget import emulator_bytes
from offsite_fl.emulators.prune import Mode, Prune, zero_smallest
from offsite_fl.emulators.report import emulated_network, planned_network
from offsite_fl.emulators.spec import parse_emulator
from offsite_fl.errors import ConfigError, EmulatorError
from offsite_fl.models.linears import is_linear, linear_weight

MakeContext = Callable[..., Context]
MODES: tuple[Mode, ...] = ("structured", "magnitude")
WITHOUT_HEADS = ("gpt2", "bloom", "gpt_neox", "opt")


def pruned(context: Context, *options: Any, **named: Any) -> Emulator:
    return Prune(*options, **named).compress(start(context), context)


def shapes(block: nn.Module, part: str) -> dict[str, tuple[int, ...]]:
    return {path: tuple(linear_weight(m).shape) for path, m in block.named_modules() if is_linear(m) and part in path}


@pytest.mark.parametrize("mode", MODES)
def test_every_family(family: str, mode: Mode, pico: Callable[..., nn.Module], context_of: MakeContext) -> None:
    method = Prune(0.75, mode=mode)
    assert parse_emulator(str(method)) == method
    context = context_of(pico(family), calibration=())  # needs no text
    before = {name: tensor.clone() for name, tensor in context.model.state_dict().items()}
    built = method.compress(start(context), context)
    share = emulator_bytes(built) / emulator_bytes(start(context))
    if mode == "structured":
        assert abs(share - 0.75) <= 0.02 * 0.75 and built.notes == ()
    else:
        assert share == 1 and len(built.notes) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in context.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in context.model.modules())
    ids = torch.randint(4, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    assert bool(torch.isfinite(emulated_network(built, context)(input_ids=ids).logits).all())


@pytest.mark.parametrize("keep", [0.9, 0.6, 0.4, 0.25])
def test_bytes_fall_to_the_budget(keep: float, pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    whole = emulator_bytes(start(context))
    built = pruned(context, keep)
    assert abs(emulator_bytes(built) - keep * whole) <= 0.02 * keep * whole and built.notes == ()
    built = pruned(context, bytes=str(int(keep * whole)))
    assert abs(emulator_bytes(built) - keep * whole) <= 0.02 * keep * whole and built.notes == ()


def slow_survivors(block: nn.Module, channels: int, groups: int) -> tuple[list[int], list[int]]:
    """The MLP channels and head groups of largest norm in a LLaMA block (a group: 16 query rows, 8 of k and of v)."""
    w = {name: linear_weight(block.get_submodule(name)).detach() for name in shapes(block, "")}
    channel = [
        float(torch.cat([w["mlp.gate_proj"][c], w["mlp.up_proj"][c], w["mlp.down_proj"][:, c]]).norm())
        for c in range(64)
    ]
    head = []
    for g in range(2):
        wide, narrow = slice(16 * g, 16 * g + 16), slice(8 * g, 8 * g + 8)
        parts = [w["self_attn.q_proj"][wide], w["self_attn.k_proj"][narrow], w["self_attn.v_proj"][narrow]]
        head.append(float(torch.cat([*parts, w["self_attn.o_proj"][:, wide].T]).norm()))
    return sorted(range(64), key=channel.__getitem__)[-channels:], sorted(range(2), key=head.__getitem__)[-groups:]


def test_the_network_is_the_one_with_the_smallest_units_at_zero(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    built = pruned(context, 0.5)
    reference = copy.deepcopy(pico_llama)
    for position in context.middle:
        block, new = reference.model.layers[position], built.at(position)  # type: ignore[union-attr, index]
        kept = linear_weight(new.get_submodule("mlp.down_proj")).shape[1]
        groups = linear_weight(new.get_submodule("self_attn.v_proj")).shape[0] // 8
        assert 1 <= kept < 64 and groups == 1
        channels, heads = slow_survivors(block, kept, groups)
        with torch.no_grad():
            block.mlp.down_proj.weight[:, [c for c in range(64) if c not in channels]] = 0
            for g in {0, 1} - set(heads):
                block.self_attn.o_proj.weight[:, 16 * g : 16 * g + 16] = 0
    inputs = {name: context.calibration[0][name] for name in ("input_ids", "attention_mask")}
    assert_close(emulated_network(built, context)(**inputs).logits, reference(**inputs).logits)


def test_every_block_loses_the_same_share(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """Whole head groups, so half of them; channels up to one more in the blocks in front."""
    built = pruned(context_of(pico_llama), 0.5)
    widths = [linear_weight(b.module.get_submodule("mlp.down_proj")).shape[1] for b in built.blocks]
    assert max(widths) - min(widths) <= 1 and widths == sorted(widths, reverse=True)
    assert all(shapes(b.module, "q_proj") == {"self_attn.q_proj": (16, 32)} for b in built.blocks)


@pytest.mark.parametrize("family", [*WITHOUT_HEADS, "llama"])
def test_where_heads_can_not_go_the_channels_make_up_for_it(
    family: str, pico: Callable[..., nn.Module], context_of: MakeContext
) -> None:
    """Fused projections and counts from the config; and LLaMA when its user says so."""
    context = context_of(pico(family))
    built = pruned(context, 0.7, heads=family != "llama")
    for block in built.blocks:
        own = context.block(block.origin)
        changed = {p for p, shape in shapes(own, "").items() if shapes(block.module, "")[p] != shape}
        assert changed and all("mlp" in path or path in ("fc1", "fc2") for path in changed)
        for path in shapes(own, ""):
            if path not in changed:
                assert block.module.get_submodule(path).weight is own.get_submodule(path).weight
    whole = emulator_bytes(start(context))
    assert abs(emulator_bytes(built) - 0.7 * whole) <= 0.02 * whole


def test_one_unit_of_each_stays_and_a_note_says_so(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    built = pruned(context, 0.01)
    for block in built.blocks:
        assert shapes(block.module, "mlp.down") == {"mlp.down_proj": (32, 1)}
        assert shapes(block.module, "k_proj") == {"self_attn.k_proj": (8, 32)}
    assert len(built.notes) == 1
    assert "prune was asked for 1.0% of the bytes" in built.notes[0] and "whole unit" in built.notes[0]


def test_keep_one_changes_nothing(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    for mode in MODES:
        built = pruned(context, 1.0, mode=mode)
        assert built.notes == ()
        for block in built.blocks:
            ours, theirs = block.module.state_dict(), context.block(block.origin).state_dict()
            assert block.module is not context.block(block.origin)
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("mode", MODES)
def test_dtype_stays_and_the_mode_too(mode: Mode, pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama.bfloat16().train())
    built = pruned(context, 0.6, mode=mode)
    assert all(m.training for m in context.model.modules())
    assert {t.dtype for t in built.at(2).state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("mode", MODES)
def test_holes_and_shared_blocks(mode: Mode, pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    whole = start(context)
    shared = Emulator([whole.blocks[0], whole.blocks[3]], {1: 0, 2: 0, 4: 1})
    built = Prune(0.6, mode=mode).compress(shared, context)
    assert built.layout == shared.layout and [block.origin for block in built.blocks] == [1, 4]
    logits = emulated_network(built, context)(**context.calibration[0]).logits
    assert bool(torch.isfinite(logits).all())


LLAMA_CHAINS = [
    "layer-drop:keep=3+prune:keep=0.6",
    "prune:keep=0.7+quantize:bits=8",
    "prune:keep=0.7+low-rank:keep=0.6",
    "prune:keep=0.7+low-rank:keep=0.6,mode=plain+quantize:bits=4",
    "prune:keep=0.8+prune:keep=0.8",
    "prune:keep=0.5,mode=magnitude+quantize",
    "low-rank:keep=0.5,mode=plain+prune:keep=0.5,mode=magnitude",
]
OTHER_CHAINS = ["prune:keep=0.7+quantize:bits=4", "prune:keep=0.7+low-rank:keep=0.6,mode=plain+quantize"]


@pytest.mark.parametrize(
    ("family", "spec"),
    [*(("llama", spec) for spec in LLAMA_CHAINS), *((f, spec) for f in ("gpt2", "phi") for spec in OTHER_CHAINS)],
)
def test_chains(spec: str, family: str, pico: Callable[..., nn.Module], context_of: MakeContext) -> None:
    """The client's network computes what the blocks compute in the place of the owner's."""
    context = context_of(pico(family))
    built = parse_emulator(spec).compress(start(context), context)
    network, plan = planned_network(built, context)
    assert type(plan).from_json(json.loads(json.dumps(plan.to_json()))) == plan
    reference: Any = copy.deepcopy(context.model)
    stack = reference.get_submodule(context.blocks.path)
    blocks = [built.at(i) if i in built.positions else stack[i] for i in sorted({0, 5, *built.positions})]
    del stack[:]
    stack.extend(blocks)
    reference.config.num_hidden_layers = len(blocks)
    inputs = {name: context.calibration[0][name] for name in ("input_ids", "attention_mask")}
    assert_close(network(**inputs).logits, reference(**inputs, use_cache=False).logits)


def test_pruning_twice_is_pruning_to_the_product(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    twice = parse_emulator("prune:keep=0.8,heads=false+prune:keep=0.75,heads=false").compress(start(context), context)
    once = parse_emulator("prune:keep=0.6,heads=false").compress(start(context), context)
    whole = emulator_bytes(start(context))
    assert twice.notes == () and abs(emulator_bytes(twice) - emulator_bytes(once)) <= 0.02 * whole


@pytest.mark.parametrize("first", ["low-rank:mode=plain", "quantize"])
def test_what_has_no_units_any_more(first: str, pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    with pytest.raises(EmulatorError, match=r"no block has an MLP channel .* put prune first"):
        parse_emulator(f"{first}+prune").compress(start(context), context)


def test_zeros_do_not_go_into_packed_weights(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    with pytest.raises(EmulatorError, match=r"self_attn\.q_proj of emulator block 0 has 8-bit weights already"):
        parse_emulator("quantize+prune:mode=magnitude").compress(start(context), context)


def paper(weight: Tensor, ratio: float) -> Tensor:
    """``k = int(numel * ratio)``; entries at or below the k-th smallest ``|w|`` become 0."""
    k = int(weight.numel() * ratio)
    if k == 0:
        return weight
    threshold = sorted(abs(v) for v in weight.flatten().tolist())[k - 1]
    return torch.tensor([[0.0 if abs(v) <= threshold else v for v in row] for row in weight.tolist()])


@pytest.mark.parametrize("ratio", [0.5, 0.25, 0.125, 0.75, 0.0625])
def test_magnitude_is_the_papers(ratio: float, pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    built = pruned(context, 1 - ratio, mode="magnitude")
    for position in (1, 3):
        own = dict(context.block(position).named_parameters())
        for name, tensor in built.at(position).named_parameters():
            if tensor.ndim > 1:
                assert torch.equal(tensor, paper(own[name].detach(), ratio)), name
                assert int((tensor == 0).sum()) == int(tensor.numel() * ratio)
            else:
                assert tensor is own[name]


def test_magnitude_of_every_tensor_with_more_than_one_dimension(
    pico: Callable[..., nn.Module], context_of: MakeContext
) -> None:
    """GPT-2's Conv1D too; biases and norms are vectors."""
    built = pruned(context_of(pico("gpt2")), 0.5, mode="magnitude")
    zeros = {name: float((t == 0).float().mean()) for name, t in built.at(2).named_parameters()}
    assert {name for name, share in zeros.items() if share == 0.5} == {
        f"{part}.weight" for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert all(share in (0, 0.5) for share in zeros.values())


def test_magnitude_by_hand() -> None:
    weight = torch.tensor([[0.5, -0.1, 0.3], [-2.0, 0.3, 1.0]])
    assert zero_smallest(weight, 0.5).tolist() == torch.tensor([[0.5, 0, 0], [-2, 0, 1]]).tolist()
    # the second smallest is 0.3, and so is the third: both go
    assert zero_smallest(weight, 0.6).tolist() == torch.tensor([[0.5, 0, 0], [-2, 0, 1]]).tolist()
    assert zero_smallest(weight, 0.7).tolist() == torch.tensor([[0.5, 0, 0.3], [-2, 0.3, 1]]).tolist()
    assert torch.equal(zero_smallest(weight, 0.9), weight)  # int(0.6) is nothing
    assert not zero_smallest(torch.full((3, 3), -1.0), 0.8).any()


def test_a_tenth_is_a_tenth() -> None:
    """In floats 1 - 0.9 is 0.0999..., and a hundred of it 9."""
    weight = torch.arange(1.0, 101.0).view(10, 10)
    assert int((zero_smallest(weight, 0.9) == 0).sum()) == 10


def test_zeros_save_no_bytes_and_a_note_says_why(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    built = pruned(context, 0.4, mode="magnitude")
    assert built.notes == ("prune was asked for 40.0% of the bytes and holds 100.0%: zeros are stored",)
    half = emulator_bytes(start(context)) // 2
    built = pruned(context, bytes=str(half), mode="magnitude")
    assert "asked for 50.0%" in built.notes[0] and "zeros are stored" in built.notes[0]
    weight = built.at(1).get_submodule("mlp.up_proj").weight
    assert int((weight == 0).sum()) == weight.numel() // 2


def test_options() -> None:
    assert str(Prune()) == "prune"
    method = parse_emulator("prune:keep=0.3,mode=magnitude,heads=false,bytes=3MB")
    assert method == Prune(0.3, mode="magnitude", heads=False, bytes="3MB")
    with pytest.raises(ConfigError, match="did you mean 'structured'"):
        parse_emulator("prune:mode=structurd")
    with pytest.raises(ConfigError, match="mode = 'x' isn't possible"):
        Prune(mode="x")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="must be a share above 0"):
        Prune(0.0)
