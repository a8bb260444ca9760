"""What the linears of a block do is found by watching: checked for the families by name, for odd blocks by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from offsite_fl.emulators.base import Context
from offsite_fl.emulators.groups import BlockPlan, dense_linears, plan_block, run_tapped
from offsite_fl.emulators.streams import read_batches
from offsite_fl.models.harmonizer import Harmonizer
from offsite_fl.models.linears import LowRankLinear, QuantizedLinear
from offsite_fl.models.walk import BlockCall

MakeContext = Callable[..., Context]

SEPARATE = ["self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn.o_proj"]
GATED = [*SEPARATE, "mlp.gate_proj mlp.up_proj", "mlp.down_proj"]
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
EXPECTED: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "gpt2": (["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"], ("attn.c_proj", "mlp.c_proj")),
    "opt": ([SEPARATE[0], "self_attn.out_proj", "fc1", "fc2"], ("self_attn.out_proj", "fc2")),
    "bloom": (
        ["self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
        ("self_attention.dense", "mlp.dense_4h_to_h"),
    ),
    "gpt_neox": (
        ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
        ("attention.dense", "mlp.dense_4h_to_h"),
    ),
    # attention and MLP read the same normed state
    "phi": ([SEPARATE[0] + " mlp.fc1", "self_attn.dense", "mlp.fc2"], ("self_attn.dense", "mlp.fc2")),
    # norms behind attention and MLP: the block isn't a sum of its linears
    "gemma2": (GATED, ()),
} | dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma"), (GATED, WRITERS))


def test_families(family: str, pico: Callable[..., nn.Module], context_of: MakeContext) -> None:
    context = context_of(pico(family))
    batch = read_batches(context, context.calibration)[0]
    plan = plan_block(context.block(1), batch.entry, batch.calls[1], batch.rows)
    groups, writers = EXPECTED[family]
    assert [" ".join(group) for group in plan.groups] == groups
    assert plan.writers == writers
    assert plan.others == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_hides_no_writer(
    dtype: torch.dtype, pico: Callable[..., nn.Module], context_of: MakeContext
) -> None:
    for family in ("llama", "gemma2"):
        context = context_of(pico(family).to(dtype))
        batch = read_batches(context, context.calibration)[0]
        plan = plan_block(context.block(1), batch.entry, batch.calls[1], batch.rows)
        assert plan.writers == EXPECTED[family][1]


class Odd(nn.Module):
    """``a`` runs twice, ``never`` not at all, ``write`` is half of what is added, ``scaled`` the other half."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("a", "never", "write", "scaled"):
            setattr(self, name, nn.Linear(4, 4))

    def forward(self, hidden: Tensor) -> tuple[Tensor]:
        x = self.a(self.a(hidden)).tanh()
        return (hidden + self.write(x) + 0.5 * self.scaled(x),)


def everything(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def test_linears_that_run_never_or_twice_are_set_apart() -> None:
    torch.manual_seed(0)
    plan = plan_block(Odd(), torch.randn(2, 3, 4), BlockCall(), everything)
    assert plan.others == ("a", "never")
    assert plan.groups == (("write", "scaled"),)
    assert plan.writers == ()


def test_a_part_that_writes_beside_one_that_does_not() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.ModuleDict({"linear": nn.Linear(4, 4)})
            self.out = nn.ModuleDict({"linear": nn.Linear(4, 4)})

        def forward(self, hidden: Tensor) -> Tensor:
            gate: Tensor = self.gate["linear"](hidden)
            added: Tensor = self.out["linear"](gate.sigmoid() * hidden)
            return hidden + added

    torch.manual_seed(0)
    plan = plan_block(Gated(), torch.randn(2, 3, 4), BlockCall(), everything)
    assert plan.writers == ("out.linear",)


def test_partial_runs_stop_behind_what_was_asked_for(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    batch = read_batches(context, context.calibration)[0]
    block, ran = context.block(2), []
    watched = block.get_submodule("mlp.down_proj").register_forward_hook(lambda *_: ran.append("down"))
    names = {"inputs": ["self_attn.o_proj"], "outputs": ["self_attn.o_proj"]}
    whole = run_tapped(block, batch.entry, batch.calls[2], **names)
    assert ran == ["down"] and whole.state is not None
    part = run_tapped(block, batch.entry, batch.calls[2], partial=True, **names)
    assert ran == ["down"] and part.state is None
    assert torch.equal(part.inputs["self_attn.o_proj"], whole.inputs["self_attn.o_proj"])
    assert torch.equal(part.outputs["self_attn.o_proj"], whole.outputs["self_attn.o_proj"])
    watched.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())


def test_hooks_go_when_the_block_fails() -> None:
    block = Odd()
    with pytest.raises(RuntimeError):
        run_tapped(block, torch.randn(2, 3, 5), BlockCall(), inputs=["write"])
    with pytest.raises(RuntimeError):
        plan_block(block, torch.randn(2, 3, 5), BlockCall(), everything)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())


def test_parts_of_replaced_linears_are_no_linears_of_the_block() -> None:
    block = Odd()
    block.a = LowRankLinear(4, 4, 1, bias=True)
    block.never = QuantizedLinear(4, 4, 8, 4, bias=False)
    assert [path for path, _ in dense_linears(block)] == ["write", "scaled"]


def test_a_harmonizer_has_nothing_to_cut() -> None:
    block, hidden = Harmonizer(32, 4), torch.randn(2, 5, 32)
    assert list(dense_linears(block)) == []
    assert plan_block(block, hidden, BlockCall(), lambda x: x.flatten(0, -2)) == BlockPlan((), (), ())
