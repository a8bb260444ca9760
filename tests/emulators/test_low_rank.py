"""What the low-rank method promises in every mode and for every family; the re-fit is in test_sequential.py."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from offsite_fl.emulators.base import Context, start
from offsite_fl.emulators.budget import emulator_bytes
from offsite_fl.emulators.factor import rank_for
from offsite_fl.emulators.groups import dense_linears
from offsite_fl.emulators.low_rank import LowRank, Mode, share_within
from offsite_fl.emulators.report import emulated_network
from offsite_fl.emulators.spec import parse_emulator
from offsite_fl.errors import EmulatorError
from offsite_fl.models.linears import LowRankLinear, linear_bias, linear_weight

MakeContext = Callable[..., Context]
MODES: tuple[Mode, ...] = ("plain", "activation", "sequential")


@pytest.mark.parametrize("mode", MODES)
def test_every_linear_of_every_family(
    family: str, mode: Mode, pico: Callable[..., nn.Module], context_of: MakeContext
) -> None:
    context = context_of(pico(family))
    before = {name: tensor.clone() for name, tensor in context.model.state_dict().items()}
    built = LowRank(0.5, mode).compress(start(context), context)
    share = share_within(start(context), lambda _: True, emulator_bytes(start(context)) // 2)
    for block in built.blocks:
        originals = dict(dense_linears(context.block(block.origin)))
        assert originals
        for path, linear in originals.items():
            new = block.module.get_submodule(path)
            assert isinstance(new, LowRankLinear)
            assert new.rank == rank_for(share, *linear_weight(linear).shape)
            bias = linear_bias(linear)
            assert bias is None or torch.equal(new.up.bias, bias)
    # the owner's model is as it was, bit for bit and without hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in context.model.state_dict().items())
    assert context.model.state_dict().keys() == before.keys()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in context.model.modules())
    logits = emulated_network(built, context)(**context.calibration[0]).logits
    assert logits.shape == (4, 16, 64) and bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("mode", MODES)
def test_keep_one_gives_the_full_block_back(mode: Mode, pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    built = LowRank(1, mode).compress(start(context), context)
    for block in built.blocks:
        original = context.block(block.origin)
        assert block.module is not original
        ours, theirs = block.module.state_dict(), original.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_plain_is_the_truncated_svd(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama, calibration=())
    built = LowRank(0.5, "plain").compress(start(context), context)
    for path, linear in dense_linears(context.block(2)):
        u, s, vt = torch.linalg.svd(linear_weight(linear).detach().double(), full_matrices=False)
        new = built.at(2).get_submodule(path)
        rank = new.rank
        product = linear_weight(new.up).double() @ linear_weight(new.down).double()
        assert_close(product, u[:, :rank] * s[:rank] @ vt[:rank], rtol=1e-4, atol=1e-5)


def test_what_is_no_linear_is_shared_with_the_owner(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    built = LowRank().compress(start(context), context)
    assert built.at(2).input_layernorm.weight is context.block(2).input_layernorm.weight


def test_a_model_in_training_mode_is_read_in_eval_mode(pico: Callable[..., nn.Module], context_of: MakeContext) -> None:
    """Dropout would make the fit random; afterwards the model is in the mode it was in."""
    model = pico("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    trained = copy.deepcopy(model).train()
    built = [LowRank().compress(start(context), context) for context in map(context_of, (model, trained))]
    assert all(module.training for module in trained.modules())
    assert_close(built[0].at(4).state_dict(), built[1].at(4).state_dict())


def test_equal_contexts_give_equal_emulators(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    a, b = (LowRank().compress(start(context), context).at(4).state_dict() for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("spec", ["low-rank:keep=0.5", "low-rank:keep=0.5,mode=plain"])
def test_a_second_time_finds_nothing_left_to_cut(spec: str, pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    once = parse_emulator(spec).compress(start(context), context)
    twice = parse_emulator(spec).compress(once, context)
    assert_close(twice.at(3).state_dict(), once.at(3).state_dict())


@pytest.mark.parametrize("second", ["quantize:bits=8", "low-rank:keep=0.5"])
def test_chains(second: str, pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    built = parse_emulator(f"layer-drop:keep=3+{second}").compress(start(context), context)
    assert built.positions == (1, 3, 4)
    assert bool(torch.isfinite(emulated_network(built, context)(**context.calibration[0]).logits).all())


def test_low_rank_behind_quantize_leaves_packed_linears(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    packed = parse_emulator("quantize:bits=8").compress(start(context), context)
    again = LowRank().compress(packed, context)
    assert all(torch.equal(a, b) for a, b in zip(packed.at(2).buffers(), again.at(2).buffers(), strict=True))


def test_progress_bars_run(pico_llama: nn.Module, context_of: MakeContext, capsys: pytest.CaptureFixture[str]) -> None:
    for mode in MODES:
        context = context_of(pico_llama, progress=True)
        LowRank(mode=mode).compress(start(context), context)
        assert f"low-rank {mode}" in capsys.readouterr().out


@pytest.mark.parametrize("mode", MODES)
def test_targets_only(mode: Mode, pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    built = LowRank(0.5, mode, targets=("self_attn.q_proj", "down_proj")).compress(start(context), context)
    for block in built.blocks:
        cut = {path for path, module in block.module.named_modules() if isinstance(module, LowRankLinear)}
        assert cut == {"self_attn.q_proj", "mlp.down_proj"}
        for path, linear in dense_linears(block.module):
            assert linear.weight is context.block(block.origin).get_submodule(path).weight


@pytest.mark.parametrize("mode", MODES)
def test_naming_every_linear_is_naming_none(mode: Mode, pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    names = tuple(path for path, _ in dense_linears(context.block(1)))
    one, other = (LowRank(0.5, mode, targets=t).compress(start(context), context) for t in ((), names))
    for a, b in zip(one.blocks, other.blocks, strict=True):
        ours, theirs = a.module.state_dict(), b.module.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_target_that_is_no_linear(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    method = parse_emulator("low-rank:keep=0.5,targets=q_proj/k_porj")
    with pytest.raises(EmulatorError, match=r"target 'k_porj' is no linear.*k_proj"):
        method.compress(start(context), context)
    assert str(method) == "low-rank:targets=q_proj/k_porj"


def test_the_share_of_a_matrix_follows_from_what_is_left(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """With attention only, all the bytes that must go are taken from attention; found by trying every rank."""
    context = context_of(pico_llama)
    whole = emulator_bytes(start(context))
    built = LowRank(0.9, "plain", targets=("q_proj", "k_proj", "v_proj", "o_proj")).compress(start(context), context)
    assert built.notes == () and 0.88 * whole < emulator_bytes(built) <= 0.9 * whole
    assert built.at(2).mlp.up_proj.weight is context.block(2).mlp.up_proj.weight


def test_bytes_as_a_budget(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    whole = emulator_bytes(start(context))
    built = parse_emulator(f"low-rank:bytes={whole // 3},mode=plain").compress(start(context), context)
    assert 0 <= whole // 3 - emulator_bytes(built) <= 0.02 * whole


def test_less_than_rank_one_says_so(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    built = LowRank(0.01, "plain").compress(start(context), context)
    assert len(built.notes) == 1 and "asked for 1.0% of the bytes" in built.notes[0] and "ranks" in built.notes[0]
