"""The sequential correction against section 11 of the method notes written out for LLaMA, and its promises."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from offsite_fl.emulators.base import Batch, Context, Emulator, EmulatorBlock, start
from offsite_fl.emulators.factor import project, rank_for
from offsite_fl.emulators.groups import run_tapped
from offsite_fl.emulators.layer_drop import LayerDrop
from offsite_fl.emulators.low_rank import LowRank
from offsite_fl.emulators.report import hidden_error
from offsite_fl.emulators.streams import Stream, read_batches, working_copy
from offsite_fl.errors import EmulatorError
from offsite_fl.models.linears import LowRankLinear, linear_bias, linear_weight, replace_module
from offsite_fl.models.walk import call_block, capture_calls

MakeContext = Callable[..., Context]
Pico = Callable[..., nn.Module]

KEEP, RIDGE = 0.5, 0.01


def product(linear: nn.Module) -> Tensor:
    """The weight that two factors stand for."""
    assert isinstance(linear, LowRankLinear)
    return linear_weight(linear.up) @ linear_weight(linear.down)


class Reference:
    """Section 11 by its letters, for LLaMA: activations stored, modules by name, no hooks, fp64.

    ``given`` are the emulator's blocks by position, whose weights needn't be the model's any more.
    """

    def __init__(self, context: Context, model: nn.Module, given: Mapping[int, nn.Module]) -> None:
        self.given = {position: copy.deepcopy(module).double() for position, module in given.items()}
        self.model = model.double()
        self.masks = [batch["attention_mask"].bool() for batch in context.calibration]
        self.calls = [capture_calls(self.model, context.blocks, batch) for batch in context.calibration]
        self.h = [calls[0].hidden for calls in self.calls]
        self.blocks = list(self.model.get_submodule(context.blocks.path))

    def rows(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensor[mask] for tensor, mask in zip(tensors, self.masks, strict=True)])

    def advance(self, block: nn.Module, states: Sequence[Tensor], position: int) -> list[Tensor]:
        return [call_block(block, state, calls[position]) for state, calls in zip(states, self.calls, strict=True)]

    def attention(self, block: nn.Module, states: Sequence[Tensor], position: int) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs of attention and inputs of its output matrix."""
        inputs: list[Tensor] = []
        hook = block.self_attn.o_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        outputs = [
            block.self_attn(hidden_states=block.input_layernorm(s), **calls[position].kwargs)[0]
            for s, calls in zip(states, self.calls, strict=True)
        ]
        hook.remove()
        return outputs, inputs

    def fit(self, linear: nn.Linear, x: Tensor, y: Tensor) -> None:
        w = linear.weight.detach()
        g = x.T @ x
        g = g + RIDGE * g.diagonal().mean() * torch.eye(len(g), dtype=g.dtype)
        b = w + ((y - x @ w.T).T @ x) @ torch.linalg.inv(g)
        image = x @ b.T
        m, n = w.shape
        r = max(1, int(KEEP * m * n / (m + n)))
        v = torch.linalg.eigh(image.T @ image).eigenvectors[:, -r:]
        linear.weight = nn.Parameter(v @ (v.T @ b))

    @torch.no_grad()
    def block(self, position: int, s: list[Tensor], h_next: list[Tensor]) -> tuple[nn.Module, list[Tensor]]:
        full, h = self.blocks[position], self.h
        cut = self.given[position]
        x = self.rows([cut.input_layernorm(t) for t in s])
        full_x = self.rows([full.input_layernorm(t) for t in h])
        for name in ("q_proj", "k_proj", "v_proj"):
            self.fit(getattr(cut.self_attn, name), x, full_x @ getattr(full.self_attn, name).weight.T)
        full_attention, _ = self.attention(full, h, position)
        _, inputs = self.attention(cut, s, position)
        target = [a + b - c for a, b, c in zip(h, full_attention, s, strict=True)]
        self.fit(cut.self_attn.o_proj, self.rows(inputs), self.rows(target))
        attention, _ = self.attention(cut, s, position)
        middle = [a + b for a, b in zip(s, attention, strict=True)]
        normed = [cut.post_attention_layernorm(t) for t in middle]
        x = self.rows(normed)
        full_middle = [a + b for a, b in zip(h, full_attention, strict=True)]
        full_x = self.rows([full.post_attention_layernorm(t) for t in full_middle])
        for name in ("gate_proj", "up_proj"):
            self.fit(getattr(cut.mlp, name), x, full_x @ getattr(full.mlp, name).weight.T)
        x = self.rows([cut.mlp.act_fn(cut.mlp.gate_proj(t)) * cut.mlp.up_proj(t) for t in normed])
        self.fit(cut.mlp.down_proj, x, self.rows([a - b for a, b in zip(h_next, middle, strict=True)]))
        return cut, self.advance(cut, s, position)

    @torch.no_grad()
    def run(self, adapter: Sequence[int], places: Sequence[int]) -> dict[int, nn.Module]:
        s, done = list(self.h), {}
        for position in range(max(places) + 1):
            if position in places:
                ahead, at = self.advance(self.blocks[position], self.h, position), position + 1
                while at < len(self.blocks) and at not in places and at not in adapter:
                    ahead, at = self.advance(self.blocks[at], ahead, at), at + 1
                done[position], s = self.block(position, s, ahead)
            elif position in adapter:
                s = self.advance(self.blocks[position], s, position)
            self.h = self.advance(self.blocks[position], self.h, position)
        return done


def moved_off(emulator: Emulator) -> Emulator:
    """With weights of its own, as a distillation leaves them: a tenth of their size away from the model's."""
    torch.manual_seed(0)
    blocks = [EmulatorBlock(copy.deepcopy(block.module), block.origin) for block in emulator.blocks]
    with torch.no_grad():
        for parameter in (p for block in blocks for p in block.module.parameters()):
            parameter.add_(torch.randn_like(parameter), alpha=0.1 * float(parameter.square().mean().sqrt()))
    return Emulator(blocks, dict(emulator.layout))


@pytest.mark.parametrize(
    ("adapter", "keep_blocks", "trained"),
    [((0, 5), None, False), ((0, 5), 2, False), ((0, 2, 5), None, False), ((0, 5), 2, True)],
    ids=["plain", "dropped", "between", "trained"],
)
def test_the_method_notes_written_out(
    pico_llama: nn.Module, context_of: MakeContext, adapter: tuple[int, ...], keep_blocks: int | None, trained: bool
) -> None:
    """Behind a distillation too, as in ``distill+low-rank``: what comes in is fitted to what the full model does."""
    context = context_of(pico_llama, adapter)
    emulator = start(context)
    if keep_blocks:
        emulator = LayerDrop(keep=keep_blocks).compress(emulator, context)
    if trained:
        emulator = moved_off(emulator)
    built = LowRank(KEEP, ridge=RIDGE).compress(emulator, context)
    given = {position: emulator.at(position) for position in emulator.positions}
    reference = Reference(context, copy.deepcopy(pico_llama), given).run(adapter, built.positions)
    for position in built.positions:
        for path, linear in reference[position].named_modules():
            if isinstance(linear, nn.Linear):
                ours = product(built.at(position).get_submodule(path)).double()
                assert float((ours - linear.weight.detach()).norm() / linear.weight.detach().norm()) < 2e-3, (
                    position,
                    path,
                )


def writer_errors(context: Context, emulator: Emulator, writers: tuple[str, str]) -> list[tuple[float, float]]:
    """At each writer, the error of the sequential factors and of activation-weighted SVD, on the same inputs."""
    full = cut = Stream.entering(read_batches(context, context.calibration))
    [batch] = full.batches
    errors = []
    for position in range(context.middle[-1] + 1):
        own, call = working_copy(context.block(position), "cpu"), batch.calls[position]
        if position in context.adapter:
            full, cut = full.through(own, position), cut.through(own, position)
            continue
        theirs = run_tapped(own, full.hidden[0], call, outputs=writers)
        ours = run_tapped(emulator.at(position), cut.hidden[0], call, inputs=writers, outputs=writers)
        missing = full.hidden[0] - cut.hidden[0]
        for path in writers:
            missing = missing + theirs.outputs[path].reshape(missing.shape)
            linear, x = own.get_submodule(path), batch.rows(ours.inputs[path]).double()
            weight, bias = linear_weight(linear).detach().double(), linear_bias(linear)
            up, down = project(weight, x.T @ x, rank_for(KEEP, *weight.shape) or 0)
            weighted = x @ (up @ down).T + (0 if bias is None else bias.detach())
            target, fitted = batch.rows(missing), batch.rows(ours.outputs[path])
            errors.append((float((target - fitted).square().sum()), float((target - weighted).square().sum())))
            missing = missing - ours.outputs[path].reshape(missing.shape)
        full, cut = full.through(own, position), cut.through(emulator.at(position), position)
    return errors


WRITERS = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "phi": ("self_attn.dense", "mlp.fc2"),
}


@pytest.mark.parametrize("family", sorted(WRITERS))
def test_no_writer_is_worse_than_activation_weighted_svd(family: str, pico: Pico, context_of: MakeContext) -> None:
    context = context_of(pico(family))
    built = LowRank(KEEP, ridge=RIDGE).compress(start(context), context)
    errors = writer_errors(context, built, WRITERS[family])
    assert len(errors) == 8
    assert all(ours <= theirs for ours, theirs in errors)
    assert sum(ours for ours, _ in errors) < 0.9 * sum(theirs for _, theirs in errors)


def test_modes_rank_as_they_should(family: str, pico: Pico, context_of: MakeContext) -> None:
    """Hidden error behind the middle, on the calibration text: sequential < activation < plain."""
    context = context_of(pico(family))
    error = {
        mode: hidden_error(LowRank(KEEP, mode).compress(start(context), context), context, context.calibration)
        for mode in ("plain", "activation", "sequential")
    }
    assert error["sequential"] < error["activation"] < error["plain"]


def test_dropped_blocks_are_made_up_for(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """Two of four blocks at half the parameters come nearer to the full middle than the two blocks whole."""
    context = context_of(pico_llama)
    dropped = LayerDrop(keep=2).compress(start(context), context)
    corrected = LowRank(KEEP).compress(dropped, context)
    weighted = LowRank(KEEP, "activation").compress(dropped, context)
    errors = [hidden_error(emulator, context, context.calibration) for emulator in (corrected, dropped, weighted)]
    assert errors[0] < 0.5 * errors[1] < 0.5 * errors[2]


def test_a_shared_block_is_fitted_where_it_runs_first(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    whole = start(context)
    sharing = Emulator([whole.blocks[0], whole.blocks[2]], {1: 0, 2: 0, 3: 1, 4: 1})
    built, alone = LowRank().compress(sharing, context), LowRank().compress(whole, context)
    assert built.at(1) is built.at(2) and built.at(3) is built.at(4)
    assert torch.equal(product(built.at(1).mlp.down_proj), product(alone.at(1).mlp.down_proj))
    assert not torch.equal(product(built.at(3).mlp.down_proj), product(alone.at(3).mlp.down_proj))


def test_padding_has_no_say(pico_llama: nn.Module, context_of: MakeContext, batches: tuple[Batch, ...]) -> None:
    other = [{**b, "input_ids": torch.where(b["attention_mask"] == 1, b["input_ids"], 63)} for b in batches]
    built = [
        LowRank().compress(start(context), context)
        for context in (context_of(pico_llama), context_of(pico_llama, calibration=tuple(other)))
    ]
    for position in built[0].positions:
        assert_close(built[0].at(position).state_dict(), built[1].at(position).state_dict())


def test_how_the_text_is_batched_has_no_say(
    pico_llama: nn.Module, context_of: MakeContext, batches: tuple[Batch, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = context_of(pico_llama)
    together = LowRank().compress(start(context), context)
    monkeypatch.setattr("offsite_fl.emulators.streams.MERGED_TOKENS", 64)
    count = len(batches[0]["input_ids"])
    rows = tuple({name: tensor[i : i + 1] for name, tensor in b.items()} for b in batches for i in range(count))
    context = context_of(pico_llama, calibration=rows)
    apart = LowRank().compress(start(context), context)
    for position in together.positions:
        for path in ("self_attn.q_proj", "mlp.down_proj"):
            a, b = (product(emulator.at(position).get_submodule(path)) for emulator in (together, apart))
            assert float((a - b).norm() / a.norm()) < 1e-3


class ScaledResidual(nn.Module):
    """A block whose parts are halved before they are added: no writer, so every matrix aims at its own output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden_states: Tensor, **_: object) -> Tensor:
        added: Tensor = self.outer(self.inner(hidden_states).tanh())
        return hidden_states + 0.5 * added


def test_without_writers_each_matrix_aims_at_its_own_output(pico_llama: nn.Module, context_of: MakeContext) -> None:
    torch.manual_seed(0)
    for index in range(1, 5):
        replace_module(pico_llama, f"model.layers.{index}", ScaledResidual(32))
    # one class for find_blocks
    for index in (0, 5):
        replace_module(pico_llama, f"model.layers.{index}", ScaledResidual(32))
    context = context_of(pico_llama)
    error = {
        mode: hidden_error(LowRank(0.4, mode).compress(start(context), context), context, context.calibration)
        for mode in ("activation", "sequential")
    }
    assert error["sequential"] < error["activation"]


class TwiceAndNever(nn.Module):
    """``twice`` runs two times, ``never`` not at all: both can only be cut as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.out = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, hidden_states: Tensor, **_: object) -> Tensor:
        added: Tensor = self.out(self.twice(self.twice(hidden_states).tanh()).tanh())
        return hidden_states + added


@pytest.mark.parametrize("mode", ["activation", "sequential"])
def test_linears_that_run_never_or_twice_get_the_truncated_svd(
    pico_llama: nn.Module, context_of: MakeContext, mode: str
) -> None:
    torch.manual_seed(0)
    for index in range(6):
        replace_module(pico_llama, f"model.layers.{index}", TwiceAndNever())
    context = context_of(pico_llama)
    built = LowRank(KEEP, mode).compress(start(context), context)  # type: ignore[arg-type]
    for name in ("twice", "never"):
        u, s, vt = torch.linalg.svd(context.block(2).get_submodule(name).weight.detach().double())
        rank = built.at(2).get_submodule(name).rank
        expected = u[:, :rank] * s[:rank] @ vt[:rank]
        assert rank in (7, 8)  # half of a 32 x 32 matrix is rank 8; norms and biases count too
        assert_close(product(built.at(2).get_submodule(name)).double(), expected, rtol=1e-4, atol=1e-5)
    assert isinstance(built.at(2).get_submodule("out"), LowRankLinear)


def test_half_precision_models_stay_in_it(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama.bfloat16())
    built = LowRank().compress(start(context), context)
    assert {p.dtype for b in built.blocks for p in b.module.parameters()} == {torch.bfloat16}
    assert hidden_error(built, context, context.calibration) < 0.5


def test_another_block_at_a_place_aims_at_what_was_there(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """A block that was moved from elsewhere (sharing) is corrected towards the block whose place it takes."""
    context = context_of(pico_llama)
    moved = Emulator([EmulatorBlock(context.block(4 - i), 4 - i) for i in range(4)], {1 + i: i for i in range(4)})
    before = hidden_error(moved, context, context.calibration)
    after = hidden_error(LowRank(0.9).compress(moved, context), context, context.calibration)
    assert after < 0.5 * before


@pytest.mark.parametrize("mode", ["activation", "sequential"])
def test_text_is_needed(pico_llama: nn.Module, context_of: MakeContext, mode: str) -> None:
    context = context_of(pico_llama, calibration=())
    with pytest.raises(EmulatorError, match=f"low-rank mode={mode} needs calibration text"):
        LowRank(mode=mode).compress(start(context), context)  # type: ignore[arg-type]
