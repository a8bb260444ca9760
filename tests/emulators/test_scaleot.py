"""ScaleOT: what is replaced and what is cut, by options and by budgets, in every family and in chains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerFast

from offsite_fl.data_owner import DataOwner
from offsite_fl.emulators import layer_replace, scaleot
from offsite_fl.emulators.base import Context, Emulator, EmulatorBlock, start
from offsite_fl.emulators.budget import TOLERANCE, emulator_bytes
from offsite_fl.emulators.layer_replace import Replacements
from offsite_fl.emulators.report import emulated_network, emulator_report
from offsite_fl.emulators.scaleot import ScaleOT
from offsite_fl.emulators.spec import parse_emulator
from offsite_fl.emulators.watching import Watcher
from offsite_fl.errors import ConfigError, EmulatorError
from offsite_fl.models.harmonizer import Harmonizer
from offsite_fl.models.linears import LowRankLinear, named_linears
from offsite_fl.models.split import Split
from offsite_fl.owner import ModelOwner

MakeContext = Callable[..., Context]
QUICK: dict[str, Any] = {"steps": 2, "rank": 4}


def replaced(emulator: Emulator) -> list[int]:
    return [p for p in emulator.positions if isinstance(emulator.at(p), Harmonizer)]


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Scores that a first stage without any training returns, and harmonizers that hand their input on."""
    scores = {1: 0.2, 2: -0.1, 3: 0.3, 4: -0.2}

    def found(*_: Any) -> Replacements:
        return Replacements(dict(scores), {p: Harmonizer(32, 4) for p in scores})

    monkeypatch.setattr(scaleot, "replace_layers", found)
    return scores


def test_every_family(family: str, pico: Callable[..., nn.Module], context_of: MakeContext) -> None:
    context = context_of(pico(family))
    before = {name: tensor.clone() for name, tensor in context.model.state_dict().items()}
    method = ScaleOT(alpha=0.5, rank_keep=0.2, **QUICK)
    assert parse_emulator(str(method)) == method
    built = method.compress(start(context), context)
    assert len(replaced(built)) == 2 and built.positions == (1, 2, 3, 4)
    attention = set(Watcher(context).watch(context.block(2), 2).attention)
    for block in built.blocks:
        if isinstance(block.module, Harmonizer):
            continue
        own = dict(context.block(block.origin).named_modules())
        cut = {path for path, module in block.module.named_modules() if isinstance(module, LowRankLinear)}
        assert cut == attention
        for path, linear in named_linears(block.module):
            assert path.rpartition(".")[0] in cut or linear.weight is own[path].weight  # the MLP leaves as it is
    assert all(torch.equal(tensor, before[name]) for name, tensor in context.model.state_dict().items())
    assert context.model.state_dict().keys() == before.keys()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in context.model.modules())
    logits = emulated_network(built, context)(**context.calibration[0]).logits
    assert logits.shape == (4, 16, 64) and bool(torch.isfinite(logits).all())
    report = emulator_report(built, context)
    assert report.bytes == emulator_bytes(built) < report.middle_bytes / 2
    assert 0 < report.flops_share < 1 and report.hidden_error is not None and report.hidden_error < 2


def test_client_logits_equal_the_owners(
    family: str, pico: Callable[..., nn.Module], pico_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    owner = ModelOwner(pico(family), pico_tokenizer, Split(first=1, last=1))
    text = Dataset.from_dict({"text": ["the cat sat on the mat and the dog lay by the door. " * 40]})
    spec = "scaleot:alpha=0.5,rank-keep=0.2,steps=2,rank=4+quantize:bits=8,group=16"
    bundle = owner.make_bundle(spec, tmp_path / "bundle", calibration=text, block_size=32)
    assert any("" in table for table in bundle.plan.linears) and not all("" in table for table in bundle.plan.linears)
    inputs = {"input_ids": torch.arange(4, 20)[None]}
    with torch.no_grad():
        theirs = DataOwner.open(tmp_path / "bundle").model(**inputs).logits
        ours = owner.emulated(bundle)(**inputs).logits
    assert torch.equal(theirs, ours)


# Which and how many


def test_the_lowest_scores_are_replaced(
    pico_llama: nn.Module, context_of: MakeContext, scored: dict[int, float]
) -> None:
    context = context_of(pico_llama)
    for alpha, expected in ((0.25, [4]), (0.5, [2, 4]), (0.75, [1, 2, 4]), (1.0, [1, 2, 3, 4])):
        built = ScaleOT(alpha=alpha, rank_keep=1, **QUICK).compress(start(context), context)
        assert replaced(built) == expected
        assert [block.origin for block in built.blocks] == [1, 2, 3, 4]
        for position in set(built.positions) - set(expected):
            ours, theirs = built.at(position).state_dict(), context.block(position).state_dict()
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and ours.keys() == theirs.keys()


def test_nothing_replaced_and_nothing_cut_needs_no_text(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama, calibration=())
    for method in (ScaleOT(alpha=0, rank_keep=1), ScaleOT(keep=1)):
        built = method.compress(start(context), context)
        assert built.notes == () and emulator_bytes(built) == emulator_bytes(start(context))
        assert built.at(2) is not context.block(2)
        assert built.at(2).mlp.up_proj.weight is context.block(2).mlp.up_proj.weight  # type: ignore[union-attr]


def test_a_small_cut_costs_attention_alone(pico_llama: nn.Module, context_of: MakeContext) -> None:
    """A third of a pico block is attention, of which rank 0.2 leaves 0.34: down to 0.78 no layer need go."""
    context = context_of(pico_llama, calibration=())
    whole = emulator_bytes(start(context))
    for keep in (0.95, 0.9, 0.8):
        built = ScaleOT(keep=keep).compress(start(context), context)
        assert replaced(built) == [] and built.notes == ()
        assert 0 <= keep * whole - emulator_bytes(built) <= TOLERANCE * keep * whole
    with pytest.raises(EmulatorError, match="needs calibration text"):
        ScaleOT(keep=0.7, **QUICK).compress(start(context), context)


@pytest.mark.parametrize("keep", [0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
def test_budgets_are_met_or_a_note_says_why(
    keep: float, pico_llama: nn.Module, context_of: MakeContext, scored: dict[int, float]
) -> None:
    """With as few layers replaced as possible: with one less the budget can't be met at the floor of the rank."""
    context = context_of(pico_llama)
    whole = emulator_bytes(start(context))
    built = ScaleOT(keep=keep, **QUICK).compress(start(context), context)
    missed = abs(keep * whole - emulator_bytes(built))
    assert (missed <= TOLERANCE * keep * whole) == (built.notes == ())
    assert missed <= 0.06 * whole
    count = len(replaced(built))
    if count:
        fewer = ScaleOT(alpha=(count - 1) / 4, rank_keep=0.2, **QUICK).compress(start(context), context)
        assert emulator_bytes(fewer) > keep * whole
    assert emulator_bytes(built) <= keep * whole


def test_alpha_alone_lets_the_rank_fill_the_budget(
    pico_llama: nn.Module, context_of: MakeContext, scored: dict[int, float]
) -> None:
    context = context_of(pico_llama)
    whole = emulator_bytes(start(context))
    built = ScaleOT(keep=0.7, alpha=0.25, **QUICK).compress(start(context), context)
    assert replaced(built) == [4] and built.notes == ()
    assert 0 <= 0.7 * whole - emulator_bytes(built) <= TOLERANCE * 0.7 * whole


def test_rank_alone_replaces_as_few_as_possible(
    pico_llama: nn.Module, context_of: MakeContext, scored: dict[int, float]
) -> None:
    context = context_of(pico_llama)
    whole = emulator_bytes(start(context))
    built = ScaleOT(rank_keep=1, bytes=str(round(0.6 * whole)), **QUICK).compress(start(context), context)
    assert replaced(built) == [2, 4]  # three blocks whole are 0.75 of the bytes, two are a half
    assert emulator_bytes(built) == whole // 2 + 2 * 4 * (2 * 32 * 4 + 32 + 4)
    assert "layers are replaced whole" in built.notes[0]


# What comes in, and what comes behind


def test_shared_and_dropped_places(pico_llama: nn.Module, context_of: MakeContext, scored: dict[int, float]) -> None:
    """Block 2 runs at 1, 2 and 3; place 2 is replaced, the others go on sharing. Place 4 was dropped."""
    context = context_of(pico_llama)
    scored.pop(4)
    given = Emulator([EmulatorBlock(context.block(2), 2)], {1: 0, 2: 0, 3: 0})
    built = ScaleOT(alpha=0.34, rank_keep=0.2, **QUICK).compress(given, context)
    assert built.layout == {1: 0, 2: 1, 3: 0} and [block.origin for block in built.blocks] == [2, 2]
    assert bool(torch.isfinite(emulated_network(built, context)(**context.calibration[0]).logits).all())


@pytest.mark.parametrize(
    "spec",
    [
        "layer-drop:keep=3+{}",
        "low-rank:keep=0.5,mode=plain+{}",
        "quantize:bits=8+{}",
        "{}+quantize:bits=4,group=4",
        "{}+low-rank:keep=0.6",
        "{}+low-rank:keep=0.6,mode=activation",
        "{}+low-rank:keep=0.6,mode=plain",
        "{}+distill:steps=2,eval-every=1",
        "{}+loss-margin:steps=2,eval-every=1",
    ],
)
def test_chains(spec: str, pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    built = parse_emulator(spec.format("scaleot:alpha=0.5,rank-keep=0.3,steps=2,rank=4")).compress(
        start(context), context
    )
    assert len(replaced(built)) == 2
    assert bool(torch.isfinite(emulated_network(built, context)(**context.calibration[0]).logits).all())


def test_low_rank_and_scaleot_leave_harmonizers_as_they_are(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    once = ScaleOT(alpha=0.5, rank_keep=0.3, **QUICK).compress(start(context), context)
    for spec in ("low-rank:keep=0.6", "scaleot:alpha=0.25,rank-keep=0.3,steps=2,rank=4"):
        twice = parse_emulator(spec).compress(once, context)
        for position in replaced(once):
            ours, theirs = twice.at(position).state_dict(), once.at(position).state_dict()
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and ours.keys() == theirs.keys()
    assert len(replaced(twice)) == 3


def test_all_harmonizers_already(pico_llama: nn.Module, context_of: MakeContext, scored: dict[int, float]) -> None:
    context = context_of(pico_llama)
    once = ScaleOT(alpha=1, rank_keep=1, **QUICK).compress(start(context), context)
    with pytest.raises(EmulatorError, match="harmonizer already"):
        ScaleOT(keep=0.5, **QUICK).compress(once, context)


def test_a_harmonizer_as_large_as_a_block_is_refused(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama)
    with pytest.raises(EmulatorError, match="choose a smaller rank"):
        ScaleOT(rank=200).compress(start(context), context)


def test_one_training_serves_every_budget(
    pico_llama: nn.Module, context_of: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = context_of(pico_llama, workdir=tmp_path)
    one = ScaleOT(keep=0.5, **QUICK).compress(start(context), context)
    monkeypatch.setattr(layer_replace._Run, "step", lambda *_: pytest.fail("it trained again"))
    other = ScaleOT(keep=0.3, **QUICK).compress(start(context), context)
    assert set(replaced(one)) < set(replaced(other))
    for position in replaced(one):
        ours, theirs = one.at(position).state_dict(), other.at(position).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_half_precision(pico_llama: nn.Module, context_of: MakeContext) -> None:
    context = context_of(pico_llama.to(torch.bfloat16))
    built = ScaleOT(**QUICK).compress(start(context), context)
    assert replaced(built) and all("was asked for 50.0% of the bytes" in note for note in built.notes)
    assert {p.dtype for block in built.blocks for p in block.module.parameters()} == {torch.bfloat16}
    assert 0.45 <= emulator_bytes(built) / emulator_bytes(start(context)) <= 0.5


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"keep": 0}, "keep"),
        ({"alpha": 1.5}, "alpha = 1.5"),
        ({"rank_keep": 0.0}, "rank-keep = 0.0"),
        ({"alpha": 0.5, "rank_keep": 0.2, "bytes": "1MB"}, "leave bytes out"),
        ({"steps": 0}, "steps = 0 must be at least 1"),
        ({"rank": 0}, "rank"),
        ({"group": 1}, "group = 1 must be at least 2"),
        ({"samples": 1}, "samples = 1 must be at least 2"),
        ({"lr": 0.0}, "lr"),
        ({"eta": -0.1}, "eta"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        ScaleOT(**options)
