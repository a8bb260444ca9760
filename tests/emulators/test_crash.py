"""CRaSh: what stays, what runs where, what it costs; expected places by hand from given similarities."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from offsite_fl.bundle import OwnerMap
from offsite_fl.config import TuneConfig
from offsite_fl.data_owner import DataOwner
from offsite_fl.emulators import cka
from offsite_fl.emulators.base import Context, Emulator, start
from offsite_fl.emulators.budget import emulator_bytes, stored_bytes
from offsite_fl.emulators.crash import Crash
from offsite_fl.emulators.placement import spread_split
from offsite_fl.emulators.report import emulated_network, emulator_report, hidden_error
from offsite_fl.emulators.spec import parse_emulator
from offsite_fl.emulators.student import Student, Teacher
from offsite_fl.errors import ConfigError, EmulatorError
from offsite_fl.models.split import Split
from offsite_fl.owner import ModelOwner

from .conftest import logits, untouched

MakeContext = Callable[..., Context]
Pico = Callable[..., nn.Module]
MakeAlike = Callable[..., None]

TEXT = Dataset.from_dict({"text": ["the cat sat on the mat and the dog lay by the door. " * 20]})


@pytest.fixture
def alike(monkeypatch: pytest.MonkeyPatch) -> MakeAlike:
    """``alike(0.1, 0.9, ...)``: how alike blocks 0 and 1, 1 and 2, ... are. Only neighbours may be asked about."""

    def set_to(*similarities: float) -> None:
        def states(context: Context, pooling: str) -> list[torch.Tensor]:
            return [torch.full((3, 1), float(i)) for i in range(len(similarities) + 1)]

        def similarity(x: torch.Tensor, y: torch.Tensor) -> float:
            assert y[0, 0] == x[0, 0] + 1, "these aren't neighbours"
            return similarities[int(x[0, 0])]

        monkeypatch.setattr(cka, "pooled_states", states)
        monkeypatch.setattr(cka, "linear_cka", similarity)

    return set_to


def runs(emulator: Emulator) -> dict[int, int]:
    """The block of the full model that runs at each place."""
    return {place: emulator.blocks[slot].origin for place, slot in sorted(emulator.layout.items())}


def block_bytes(context: Context, *indices: int) -> int:
    return stored_bytes(context.block(index) for index in indices)


def ten(pico: Pico, **changes: Any) -> nn.Module:
    return pico("llama", num_hidden_layers=10, **changes)


# What stays


def test_the_centres_stay(pico: Pico, context_of: MakeContext, alike: MakeAlike) -> None:
    """Middle 1 to 8 in four clusters 1 2 3 | 4 | 5 6 | 7 8: the middle of three, the second of two."""
    alike(9.0, 0.8, 0.7, 0.2, 0.1, 0.9, 0.3, 0.6, 9.0)
    context = context_of(ten(pico), adapter=(0, 9))
    built = Crash(keep=4, sharing="none").compress(start(context), context)
    assert runs(built) == {2: 2, 4: 4, 6: 6, 8: 8}
    assert all(built.at(place) is context.block(place) for place in (2, 4, 6, 8))
    assert built.notes == ()


def test_nothing_is_compared_across_an_adapter_block(pico: Pico, context_of: MakeContext, alike: MakeAlike) -> None:
    """Middle 1 2 3 | 5 6 | 8: the fixture refuses to compare 3 and 5."""
    alike(*[0.5] * 9)
    context = context_of(ten(pico), adapter=(0, 4, 7, 9))
    assert runs(Crash(keep=3, sharing="none").compress(start(context), context)) == {2: 2, 6: 6, 8: 8}
    with pytest.raises(EmulatorError, match=r"can't keep 2 of 6 middle blocks: .* between 3 \(one for each"):
        Crash(keep=2).compress(start(context), context)


def test_shares_and_bytes(pico: Pico, context_of: MakeContext, alike: MakeAlike) -> None:
    alike(9.0, 0.8, 0.7, 0.2, 0.1, 0.9, 0.3, 0.6, 9.0)
    context = context_of(ten(pico), adapter=(0, 9))
    whole = start(context)
    assert len(Crash(keep=0.5, sharing="none").compress(whole, context).blocks) == 4
    size = block_bytes(context, 1)
    assert len(Crash(bytes=str(3 * size + size // 4), sharing="none").compress(whole, context).blocks) == 3
    missed = Crash(keep=0.3, sharing="none").compress(whole, context)
    assert len(missed.blocks) == 2
    (note,) = missed.notes
    assert note.startswith("crash was asked for 30.0% of the bytes and holds 25.0%: blocks are kept whole")


@pytest.mark.parametrize("keep", [7, 12])
def test_more_than_there_are(keep: int, pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    with pytest.raises(EmulatorError, match=f"can't keep {keep} of 4 middle blocks: keep must lie between 1 and 4"):
        Crash(keep=keep).compress(start(context), context)


@pytest.mark.parametrize("sharing", ["none", "all", "frozen-only"])
def test_keeping_all_without_text_is_the_full_model(
    sharing: Any, family: str, pico: Pico, context_of: MakeContext, batches: tuple[dict[str, torch.Tensor], ...]
) -> None:
    context = context_of(pico(family), adapter=(0, 3, 5), calibration=())
    built = Crash(keep=3, sharing=sharing).compress(start(context), context)
    assert runs(built) == {1: 1, 2: 2, 4: 4}
    with torch.no_grad():
        assert torch.equal(emulated_network(built, context)(**batches[0]).logits, context.model(**batches[0]).logits)


# What runs in removed places


def test_removed_places_run_the_nearest(pico: Pico, context_of: MakeContext, alike: MakeAlike) -> None:
    """Clusters 1 2 3 4 | 5 6 7 8 keep 3 and 7. 1 is nearest to 0; 5, two from both, goes right; 8 as well, to 9."""
    alike(9.0, 0.8, 0.7, 0.6, 0.1, 0.9, 0.5, 0.6, 9.0)
    context = context_of(ten(pico), adapter=(0, 9))
    whole = start(context)
    built = Crash(keep=2, sharing="all").compress(whole, context)
    assert runs(built) == {1: 0, 2: 3, 3: 3, 4: 3, 5: 7, 6: 7, 7: 7, 8: 9}
    assert built.at(2) is built.at(3) is built.at(4) is context.block(3)
    frozen = Crash(keep=2, sharing="frozen-only").compress(whole, context)
    assert runs(frozen) == {1: 3, 2: 3, 3: 3, 4: 3, 5: 7, 6: 7, 7: 7, 8: 7}
    assert [block.origin for block in frozen.blocks] == [3, 7]
    assert frozen.notes == ()


def test_copies_of_adapter_blocks_are_their_own_and_are_counted(
    pico: Pico, context_of: MakeContext, alike: MakeAlike
) -> None:
    alike(9.0, 0.8, 0.7, 0.6, 0.1, 0.9, 0.5, 0.6, 9.0)
    context = context_of(ten(pico), adapter=(0, 9))
    built = Crash(keep=2).compress(start(context), context)
    assert [block.origin for block in built.blocks] == [3, 7, 0, 9]
    assert emulator_bytes(built) == block_bytes(context, 0, 3, 7, 9)
    (note,) = built.notes
    assert "adapter block(s) 0, 9" in note and "2 block(s)" in note
    initial = copy.deepcopy(context.block(0).state_dict())
    with torch.no_grad():
        for parameter in context.block(0).parameters():
            parameter.add_(1.0)  # as plugging an update in would
    assert_close(built.at(1).state_dict(), initial)
    assert not any(p.requires_grad for p in built.at(1).parameters())


def test_a_byte_budget_includes_the_copies(pico: Pico, context_of: MakeContext, alike: MakeAlike) -> None:
    """Half of eight blocks is four: two kept and the copies of 0 and 9, where four kept would need copies as well.

    Three: 1 2 3 4 | 5 | 6 7 8, centres 3 5 7, place 1 goes to 0 and 8 to 9: five blocks. Four: the centres of
    1 2 3 | 4 | 5 | 6 7 8 are 2 4 5 7, and place 1, as near to 0 as to 2, goes right: five with that of 9.
    """
    alike(9.0, 0.8, 0.7, 0.6, 0.1, 0.5, 0.9, 0.8, 9.0)
    context = context_of(ten(pico), adapter=(0, 9))
    whole = start(context)
    half = Crash(keep=0.5).compress(whole, context)
    assert sorted(block.origin for block in half.blocks) == [0, 3, 7, 9]
    assert emulator_bytes(half) == block_bytes(context, 0, 3, 7, 9)
    assert half.notes == ()
    assert len(Crash(keep=3).compress(whole, context).blocks) == 5
    assert len(Crash(keep=4).compress(whole, context).blocks) == 5


def test_the_middle_of_an_emulator_that_came_in(pico: Pico, context_of: MakeContext) -> None:
    """Places that a method before dropped stay empty; the kept block of two places is still one block."""
    context = context_of(ten(pico), adapter=(0, 9))
    whole = start(context)
    shared = Emulator([whole.blocks[i] for i in (0, 2, 6)], {1: 0, 3: 1, 4: 1, 7: 2, 8: 2})
    built = Crash(keep=2, sharing="frozen-only").compress(shared, context)
    assert set(built.layout) == {1, 3, 4, 7, 8}
    assert {block.origin for block in built.blocks} <= {1, 3, 7}
    kept = Crash(keep=5, sharing="none").compress(shared, context)
    assert kept.layout == shared.layout


def test_nothing_left_to_keep(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    with pytest.raises(EmulatorError, match="of 0 middle blocks"):
        Crash().compress(Emulator([], {}), context)


# The adapter spread over all blocks


def test_spread_by_hand(pico: Pico, context_of: MakeContext, alike: MakeAlike) -> None:
    """Ten blocks in five clusters 0 | 1 2 3 | 4 | 5 6 | 7 8 9: centres 0 2 4 6 8, adapter at ranks 0, 2, 4.

    Removed 1 is as near to 0 as to 2 and goes right, and so on; 9 has 8, an adapter block, as its only neighbour.
    """
    alike(0.1, 0.8, 0.7, 0.2, 0.3, 0.9, 0.4, 0.6, 0.5)
    context = context_of(ten(pico), adapter=(0, 4, 8))
    assert spread_split(context, keep=5, adapter=3) == Split(at=(0, 4, 8))
    built = Crash(keep=2, placement="spread").compress(start(context), context)
    assert runs(built) == {1: 2, 2: 2, 3: 4, 5: 6, 6: 6, 7: 8, 9: 8}
    frozen = Crash(keep=2, placement="spread", sharing="frozen-only").compress(start(context), context)
    assert runs(frozen) == {1: 2, 2: 2, 3: 2, 5: 6, 6: 6, 7: 6, 9: 8}
    none = Crash(keep=2, placement="spread", sharing="none").compress(start(context), context)
    assert runs(none) == {2: 2, 6: 6}


def test_spread_names_the_split_to_use(pico: Pico, context_of: MakeContext, alike: MakeAlike) -> None:
    alike(0.1, 0.8, 0.7, 0.2, 0.3, 0.9, 0.4, 0.6, 0.5)
    context = context_of(ten(pico), adapter=(0, 1, 9))
    method = Crash(keep=2, placement="spread")
    with pytest.raises(EmulatorError, match=r"keeps 5 blocks, .* must be at=0,4,8, but the split is at=0,1,9: "):
        method.compress(start(context), context)
    with pytest.raises(EmulatorError, match="at=0,4,8"):
        Crash(bytes=str(2 * block_bytes(context, 1)), placement="spread", sharing="none").compress(
            start(context), context
        )
    with pytest.raises(ConfigError, match="adapter of 1 can't be spread"):
        method.compress(start(context_of(context.model, adapter=(0,))), context_of(context.model, adapter=(0,)))


def test_found_split_and_method_agree(family: str, pico: Pico, context_of: MakeContext) -> None:
    model = pico(family)
    split = spread_split(context_of(model), keep=5, adapter=3, pooling="last")
    assert split.at is not None
    context = context_of(model, adapter=split.at)
    built = Crash(keep=2, placement="spread", pooling="last").compress(start(context), context)
    assert set(built.layout) == set(context.middle)


# In every family, in chains and in bundles


@pytest.mark.parametrize("sharing", ["none", "all", "frozen-only"])
def test_all_families(sharing: Any, family: str, pico: Pico, context_of: MakeContext) -> None:
    context = context_of(pico(family))
    method = Crash(keep=2, sharing=sharing)
    with untouched(context.model):
        built = method.compress(start(context), context)
    assert len(built.layout) == (2 if sharing == "none" else 4)
    found = logits(built, context)
    assert found.shape == (4, 16, 64) and bool(torch.isfinite(found).all())
    assert parse_emulator(str(method)) == method


def test_the_report_sees_what_the_network_computes(pico: Pico, context_of: MakeContext) -> None:
    """Where windows differ from block to block, a shared block keeps its own window wherever it runs."""
    context = context_of(pico("gemma2"))
    whole = start(context)
    shared = Emulator([whole.blocks[0]], dict.fromkeys((1, 2, 3, 4), 0))
    student, teacher = Student(shared, context), Teacher(context)
    wrong = size = 0.0
    for batch in context.calibration:
        entering, state, _, _ = student.forward(batch, with_loss=False)
        goal, state, kept = teacher.forward(batch, entering), state.detach(), batch["attention_mask"].bool()
        wrong += float((goal - state)[kept].square().sum())
        size += float(goal[kept].square().sum())
    assert hidden_error(shared, context, context.calibration) == pytest.approx(wrong / size, rel=1e-4)


@pytest.mark.parametrize(
    "spec",
    [
        "crash:keep=2+quantize:bits=8",
        "crash:keep=2+low-rank:keep=0.5",
        "low-rank:keep=0.5+crash:keep=2",
        "quantize:bits=8+crash:keep=2,sharing=frozen-only",
        "layer-drop:keep=3+crash:keep=2",
        "crash:keep=0.5,sharing=none+distill:steps=2,eval-every=2",
    ],
)
def test_chains(spec: str, pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    built = parse_emulator(spec).compress(start(context), context)
    assert bool(torch.isfinite(logits(built, context)).all())


def test_shared_blocks_are_stored_once_in_a_bundle(
    pico: Pico, pico_tokenizer: PreTrainedTokenizerFast, alike: MakeAlike, tmp_path: Path
) -> None:
    """Eight places and two blocks (2 and 6 of 1 2 3 | 4 to 8): the files hold the bytes of two."""
    alike(9.0, 0.8, 0.7, 0.1, 0.2, 0.3, 0.4, 0.5, 9.0)
    owner = ModelOwner(ten(pico), pico_tokenizer, Split(first=1, last=1))
    spec = "crash:keep=2,sharing=frozen-only"
    bundle = owner.make_bundle(spec, tmp_path / "bundle", calibration=TEXT, calibration_tokens=256, block_size=32)
    assert [place.role for place in bundle.plan.layout] == ["adapter", *["emulator"] * 8, "adapter"]
    held = sum(e.bytes for name, e in bundle.manifest.tensors().items() if name.startswith("emulator."))
    assert held == block_bytes(owner.context(), 2, 6)
    sources = {path.split(".")[2] for name, path in OwnerMap.load(bundle.path).slots.items() if "emulator" in name}
    assert sources == {"2", "6"}
    assert owner.report is not None and owner.report.flops_share == pytest.approx(1.0)
    inputs = {"input_ids": torch.arange(4, 20)[None], "attention_mask": torch.ones(1, 16, dtype=torch.long)}
    expected = inputs["input_ids"]
    with torch.no_grad():
        got = DataOwner.open(bundle).model(**inputs).logits
        hidden = owner.model.model.embed_tokens(expected)  # type: ignore[union-attr, operator]
        rotary = owner.model.model.rotary_emb(hidden, torch.arange(16)[None])  # type: ignore[union-attr, operator]
        for block in (0, 2, 2, 2, 6, 6, 6, 6, 6, 9):
            layer = owner.model.model.layers[block]  # type: ignore[union-attr, index]
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
        want = owner.model.lm_head(owner.model.model.norm(hidden))  # type: ignore[union-attr, operator]
    assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_tuning_leaves_the_copies_of_the_adapter_as_they_were(
    pico: Pico, pico_tokenizer: PreTrainedTokenizerFast, alike: MakeAlike, tmp_path: Path
) -> None:
    """Middle 1 to 4 keeps 3; 1 runs block 0 and 4 block 5, whose adapter slots change and whose copies don't."""
    alike(9.0, 0.9, 0.8, 0.7, 9.0)
    owner = ModelOwner(pico("llama"), pico_tokenizer, Split(first=1, last=1))
    bundle = owner.make_bundle(
        "crash:keep=1", tmp_path / "bundle", calibration=TEXT, calibration_tokens=256, block_size=32
    )
    assert owner.report is not None and "adapter block(s) 0, 5" in owner.report.notes[0]
    names = bundle.tensors()
    suffix = "mlp.up_proj.weight"
    assert torch.equal(names[f"adapter.0.{suffix}"], names[f"emulator.1.{suffix}"])
    data_owner = DataOwner.open(bundle)
    tuning = TuneConfig(max_steps=2, lr=1e-2, batch_size=2, block_size=16, progress=False)
    update = data_owner.tune(TEXT, tuning)
    assert not torch.equal(update.tensors[f"adapter.0.{suffix}"], names[f"adapter.0.{suffix}"])
    layers = data_owner.model.model.layers  # type: ignore[union-attr]
    assert torch.equal(layers[1].mlp.up_proj.weight, names[f"emulator.1.{suffix}"])  # type: ignore[index, union-attr]
    before = {name: tensor.clone() for name, tensor in owner.model.state_dict().items()}
    owner.plug_in(update)
    changed = {name for name, tensor in owner.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.startswith(("model.layers.0.", "model.layers.5."))}


def test_copies_of_adapter_blocks_are_bytes_but_no_news(pico: Pico, context_of: MakeContext, alike: MakeAlike) -> None:
    alike(9.0, 0.9, 0.8, 0.7, 9.0)
    context = context_of(pico("llama"))
    report = emulator_report(Crash(keep=1).compress(start(context), context), context)
    sizes = [sum(p.numel() for p in context.block(index).parameters()) for index in range(6)]
    total = sum(p.numel() for p in context.model.parameters())
    assert report.verbatim_share == pytest.approx(1 - (sizes[1] + sizes[2] + sizes[4]) / total)
    assert report.bytes == block_bytes(context, 0, 3, 5)


# The spec


def test_the_spec() -> None:
    spec = "crash:keep=8,pooling=max-nonpad,sharing=frozen-only,placement=spread"
    assert str(parse_emulator(spec)) == spec
    assert parse_emulator("crash:keep=8") == Crash(keep=8)
    with pytest.raises(ConfigError, match="sharing"):
        parse_emulator("crash:sharing=some")
    with pytest.raises(ConfigError, match="pooling"):
        Crash(pooling="mean_weighted")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="number of blocks"):
        Crash(keep=2.5)


def test_without_text_it_says_so(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama, calibration=())
    with pytest.raises(EmulatorError, match="needs calibration text"):
        Crash(keep=2).compress(start(context), context)
