"""The alignment on pico models: its loss, what it leaves alone, how much it computes, and that it can go on later."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn

from offsite_fl.alignment import Aligner, AlignmentOptions, Diverged
from offsite_fl.config import LoraOptions
from offsite_fl.data_owner import DataOwner
from offsite_fl.errors import ConfigError, OffsiteError, UpdateError
from offsite_fl.models.split import Split
from offsite_fl.owner import ModelOwner
from tests.conftest import make_pico, make_tokenizer

PUBLIC = Dataset.from_dict({"text": ["the quick brown fox jumps over the lazy dog. " * 6, "a stitch in time. " * 8]})
OPTIONS: dict[str, Any] = {"block_size": 12, "batch_size": 2, "rank": 2, "lr": 1e-2}
SPLITS = [Split(first=0, last=2), Split(first=2, last=1), Split(at=(0, 2, 5)), Split(first=2, last=0)]


def owner_of(
    folder: Path, split: Split = SPLITS[0], emulator: str = "layer-drop:keep=2", family: str = "llama"
) -> ModelOwner:
    owner = ModelOwner(make_pico(family), make_tokenizer(), split)
    text = Dataset.from_dict({"text": ["rain falls on the hills and on the sea. " * 8]})
    owner.make_bundle(emulator, folder / "bundle", calibration=text, calibration_tokens=240, block_size=12)
    return owner


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> ModelOwner:
    return owner_of(tmp_path_factory.mktemp("owner"))


def aligner(owner: ModelOwner, **options: Any) -> Aligner:
    return Aligner(owner, PUBLIC, AlignmentOptions(**{**OPTIONS, **options}))


def loss_now(found: Aligner, owner: ModelOwner, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with owner.plugged_in(owner.adapter()) as full:
        return found.loss(full, batch)


def hidden_before(
    model: nn.Module, block: nn.Module, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden state that enters ``block``, and the logits, without any code of the room under test."""
    seen = []
    hook = block.register_forward_pre_hook(
        lambda m, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    hook.remove()
    return seen[0], logits


def test_the_loss_done_slowly(owner: ModelOwner, pico_batch: dict[str, torch.Tensor]) -> None:
    """NMSE where the adapter begins plus lambda KL of what both predict, token by token."""
    found = aligner(owner, lambda_kl=0.5)
    network = DataOwner.open(owner.bundle, "float32").model  # type: ignore[arg-type]
    goal, p = hidden_before(owner.model, owner.model.model.layers[4], pico_batch)  # type: ignore[union-attr, index]
    got, q = hidden_before(network, network.model.layers[2], pico_batch)  # type: ignore[union-attr, index]
    rows = [(b, t) for b in range(2) for t in range(12) if pico_batch["attention_mask"][b, t]]
    error = sum(float((goal[b, t] - got[b, t]).square().sum()) for b, t in rows)
    size = sum(float(goal[b, t].square().sum()) for b, t in rows)
    divergence = 0.0
    for b, t in rows:
        log_p, log_q = p[b, t].log_softmax(-1), q[b, t].log_softmax(-1)
        divergence += float((log_p.exp() * (log_p - log_q)).sum())
    assert loss_now(found, owner, pico_batch).item() == pytest.approx(
        error / size + 0.5 * divergence / len(rows), rel=1e-4
    )


HIDDEN = ("normalised", "cosine", "layerwise")


def test_the_other_hidden_errors_done_slowly(owner: ModelOwner, pico_batch: dict[str, torch.Tensor]) -> None:
    """Of layers 0 to 3, layer drop keeps 0 and 3: layerwise holds those against the emulator's two, one by one."""
    network = DataOwner.open(owner.bundle, "float32").model  # type: ignore[arg-type]
    full = owner.model.model.layers  # type: ignore[union-attr]
    small = network.model.layers  # type: ignore[union-attr]
    rows = [(b, t) for b in range(2) for t in range(12) if pico_batch["attention_mask"][b, t]]

    def states(layer: int, place: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        goal = hidden_before(owner.model, full[layer + 1], pico_batch)[0]  # type: ignore[index]
        got = hidden_before(network, small[place + 1], pico_batch)[0]  # type: ignore[index]
        return [(goal[row], got[row]) for row in rows]

    expected = 0.0
    for layer, place in ((0, 0), (3, 1)):
        pairs = states(layer, place)
        size = sum(float(t.square().sum()) for t, _ in pairs)
        expected += sum(float((t - s).square().sum()) for t, s in pairs) / size
    found = aligner(owner, lambda_kl=0.0, hidden="layerwise")
    assert loss_now(found, owner, pico_batch).item() == pytest.approx(expected, rel=1e-4)

    cosines = [float(t @ s) / math.sqrt(float(t @ t) * float(s @ s)) for t, s in states(3, 1)]
    found = aligner(owner, lambda_kl=0.0, hidden="cosine")
    assert loss_now(found, owner, pico_batch).item() == pytest.approx(1 - sum(cosines) / len(cosines), rel=1e-4)


@pytest.mark.parametrize(
    ("split", "emulator", "expected"),
    [
        (SPLITS[0], "layer-drop:keep=2", [(0, 0), (3, 1)]),
        (SPLITS[1], "layer-drop:keep=2", [(2, 2), (4, 3)]),
        (SPLITS[2], "layer-drop:keep=2", [(1, 1), (4, 3)]),  # the adapter block between isn't the emulator's
        (SPLITS[0], "low-rank:keep=0.4", [(0, 0), (1, 1), (2, 2), (3, 3)]),
        # One block runs in all four places of the middle: each is held against the layer that it runs for.
        (SPLITS[0], "crash:keep=1,sharing=frozen-only", [(0, 0), (1, 1), (2, 2), (3, 3)]),
    ],
)
def test_which_layers_are_held_against_each_other(
    split: Split, emulator: str, expected: list[tuple[int, int]], tmp_path: Path
) -> None:
    found = aligner(owner := owner_of(tmp_path, split, emulator), hidden="layerwise")
    full, small = list(owner.model.model.layers), list(found.network.model.layers)  # type: ignore[union-attr, arg-type]
    assert [(full.index(teacher), small.index(student)) for teacher, student in found._pairs] == expected


@pytest.mark.parametrize("hidden", ["cosine", "layerwise"])
def test_other_hidden_errors_are_lowered(hidden: str, owner: ModelOwner) -> None:
    found = aligner(owner, hidden=hidden, kl_temperature=2.0)
    stepped = found.align(owner.adapter(), 30)
    with owner.plugged_in(owner.adapter()) as full:
        assert found.loss(full, found._batch(0)).item() < 0.9 * stepped.first


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_zero_where_the_emulator_is_the_middle(
    split: Split, tmp_path: Path, pico_batch: dict[str, torch.Tensor]
) -> None:
    """Fault 17: zero for identical models, positive otherwise."""
    same = owner_of(tmp_path / "same", split, f"layer-drop:keep={6 - len(split.resolve(6))}")
    other = owner_of(tmp_path / "other", split, "layer-drop:keep=2")
    for hidden in HIDDEN:
        options = {"hidden": hidden, "kl_temperature": 2.0 if hidden == "cosine" else 1.0}
        assert abs(loss_now(aligner(same, **options), same, pico_batch).item()) < 1e-5
        assert loss_now(aligner(other, **options), other, pico_batch).item() > 0.01


@pytest.mark.parametrize(("lambda_kl", "hidden"), [(0.0, "normalised"), *((0.9, hidden) for hidden in HIDDEN)])
def test_padding_changes_nothing(
    lambda_kl: float, hidden: str, owner: ModelOwner, pico_batch: dict[str, torch.Tensor]
) -> None:
    """Fault 17: other ids in the padding, and more of it, leave loss and gradient where they are."""
    found = aligner(owner, lambda_kl=lambda_kl, hidden=hidden, kl_temperature=1.0 if lambda_kl == 0 else 3.0)
    longer = {name: nn.functional.pad(t, (0, 5)) for name, t in pico_batch.items()}
    other = {**longer, "input_ids": longer["input_ids"].masked_fill(longer["attention_mask"] == 0, 9)}
    losses, gradients = [], []
    for batch in (pico_batch, longer, other):
        loss = loss_now(found, owner, batch)
        found.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in found.factors.parameters.values() if p.grad is not None]))
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "emulator"),
    [("llama", "layer-drop:keep=2"), ("gpt2", "layer-drop:keep=2"), ("llama", "low-rank:keep=0.4+quantize:bits=8")],
)
def test_it_lowers_its_loss_and_changes_factors_only(
    family: str, emulator: str, tmp_path: Path, pico_batch: dict[str, torch.Tensor]
) -> None:
    owner = owner_of(tmp_path, emulator=emulator, family=family)
    found = aligner(owner)
    full = {name: t.clone() for name, t in owner.model.state_dict().items()}
    base = {name: t.clone() for name, t in found.network.state_dict().items()}
    moved = {name: value + 0.01 for name, value in owner.adapter().items()}
    whole = found._batch(0)
    with owner.plugged_in(moved) as model:
        found._emulated.load_adapter(moved)
        before = found.loss(model, whole).item()
    stepped = found.align(moved, 40)
    with owner.plugged_in(moved) as model:
        after = found.loss(model, whole).item()
    assert stepped.steps == 40 and after < 0.8 * before
    assert all(torch.equal(t, full[name]) for name, t in owner.model.state_dict().items())
    for name, tensor in found.network.state_dict().items():
        if not any(torch.equal(tensor, m) for m in moved.values() if m.shape == tensor.shape):
            assert torch.equal(tensor, base[name]), name
    handed_out = owner.bundle.tensors()  # type: ignore[union-attr]
    assert all(torch.equal(handed_out[n], t) for n, t in DataOwner.open(owner.bundle.path).bundle.tensors().items())  # type: ignore[union-attr]


def test_what_a_client_gets_computes_what_the_server_s_does(
    owner: ModelOwner, pico_batch: dict[str, torch.Tensor]
) -> None:
    found = aligner(owner)
    found.align(owner.adapter(), 5)
    client = DataOwner.open(owner.bundle, "float32")  # type: ignore[arg-type]
    client.patch(found.patch)
    inputs = {name: pico_batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(client.model(**inputs).logits, found.network(**inputs).logits)
    assert client.patch_digest == found.patch.digest


class Counter:
    """Counts the forward passes of modules."""

    def __init__(self, *modules: nn.Module) -> None:
        self.counts = dict.fromkeys(map(id, modules), 0)
        self.hooks = [m.register_forward_pre_hook(lambda module, args: self.add(module)) for m in modules]

    def add(self, module: nn.Module) -> None:
        self.counts[id(module)] += 1


@pytest.mark.parametrize(("lambda_kl", "heads"), [(0.9, 6), (0.0, 0)])
def test_one_forward_pass_of_each_network_a_step(
    lambda_kl: float, heads: int, owner: ModelOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 16: three full passes a step. The adapter is put in once, and no logits are made that nobody asked for."""
    found = aligner(owner, lambda_kl=lambda_kl)
    loads = []
    monkeypatch.setattr(found._emulated, "load_adapter", lambda values: loads.append(1))
    models = (owner.model, found.network)
    counter = Counter(
        *(m.get_input_embeddings() for m in models),
        *(m.get_output_embeddings() for m in models),  # type: ignore[operator]
    )
    found.align(owner.adapter(), 6)
    for hook in counter.hooks:
        hook.remove()
    assert list(counter.counts.values()) == [6, 6, heads, heads] and loads == [1]


def test_its_own_learning_rate_and_optimiser_take_effect(owner: ModelOwner) -> None:
    """Fault 15: the overrides of the public code did nothing. One step of SGD by hand, clipping off."""
    found = aligner(owner, optimizer="sgd", lr=0.25, clip_norm=0.0)
    before = found.factors.tensors()
    loss = loss_now(found, owner, found._batch(0))
    gradients = torch.autograd.grad(loss, list(found.factors.parameters.values()))
    found.align(owner.adapter(), 1)
    for (name, value), gradient in zip(found.factors.tensors().items(), gradients, strict=True):
        torch.testing.assert_close(value, before[name] - 0.25 * gradient)
    adam = aligner(owner, optimizer="adamw", lr=0.25)
    adam.align(owner.adapter(), 1)
    b = "emulator.0.mlp.up_proj.lora_B.weight"  # the first step of Adam is the sign of the gradient
    assert adam.factors.tensors()[b].abs().max().item() == pytest.approx(0.25, rel=1e-3)


def test_batches_go_on_from_call_to_call_and_cover_the_text(owner: ModelOwner) -> None:
    found = aligner(owner)
    count = len(found.examples)
    per_epoch = math.ceil(count / 2)
    epochs = [
        [tuple(row) for step in range(start, start + per_epoch) for row in found._batch(step)["input_ids"].tolist()]
        for start in (0, per_epoch)
    ]
    every = sorted(map(tuple, found.examples["input_ids"]))
    assert sorted(epochs[0]) == sorted(epochs[1]) == every and epochs[0] != epochs[1]
    one, two = aligner(owner), aligner(owner)
    one.align(owner.adapter(), 5)
    two.align(owner.adapter(), 2)
    two.align(owner.adapter(), 3)
    assert one.patch.digest == two.patch.digest


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_it_goes_on_from_its_state_bit_for_bit(optimizer: str, owner: ModelOwner) -> None:
    whole, first, second = (aligner(owner, optimizer=optimizer) for _ in range(3))
    whole.align(owner.adapter(), 6)
    first.align(owner.adapter(), 4)
    second.load_state_dict(first.state_dict())
    assert second.patch.digest == first.patch.digest
    second.align(owner.adapter(), 2)
    assert second.patch.digest == whole.patch.digest != first.patch.digest


def test_a_loss_that_is_no_number_is_an_error_that_names_the_step(owner: ModelOwner) -> None:
    """Fault 19: batches with NaN were skipped in silence."""
    found = aligner(owner)
    found.align(owner.adapter(), 1)
    with torch.no_grad():
        found.factors.parameters["emulator.1.mlp.down_proj.lora_B.weight"].fill_(float("nan"))
    with pytest.raises(OffsiteError, match="loss is nan in step 2 of the alignment; lower its lr"):
        found.align(owner.adapter(), 1)
    assert found.step == 1


def test_what_diverges_leaves_the_alignment_as_it_was(owner: ModelOwner) -> None:
    """Steps before the one that fails are taken back too: factors, optimiser, and the place in the text."""
    found, twin = aligner(owner), aligner(owner)
    for each in (found, twin):
        each.align(owner.adapter(), 2)
    rates = found.optimizer.param_groups
    rates[0]["lr"] = 1e30  # finite factors after the first of these steps, no finite loss in the second
    with pytest.raises(Diverged, match=r"in step [34] of the alignment"):
        found.align(owner.adapter(), 5)
    rates = found.optimizer.param_groups
    rates[0]["lr"] = 1e-2
    assert found.step == 2 and found.patch.digest == twin.patch.digest
    for each in (found, twin):
        each.align(owner.adapter(), 3)
    assert found.patch.digest == twin.patch.digest


def test_factors_that_are_not_finite_are_never_handed_out(owner: ModelOwner) -> None:
    """The loss is looked at before the last step, the factors after it."""
    found = aligner(owner, optimizer="sgd")
    found.align(owner.adapter(), 1)
    before = found.patch.digest
    found.optimizer.param_groups[0]["lr"] = math.inf
    with pytest.raises(Diverged, match="not finite in step 2 of the alignment"):
        found.align(owner.adapter(), 1)
    assert found.patch.digest == before


@pytest.mark.parametrize("lambda_kl", [0.0, 0.9])
def test_an_adapter_without_a_finite_loss_is_found_before_it_is_used(lambda_kl: float, owner: ModelOwner) -> None:
    """The hidden state of the alignment lies before this adapter, so at lambda 0 its loss alone would tell nothing."""
    found = aligner(owner, lambda_kl=lambda_kl)
    before = found.patch.digest
    found.check(owner.adapter())
    found.check({name: value + 1.0 for name, value in owner.adapter().items()})
    with pytest.raises(Diverged, match="the emulator's loss on public text is nan"):
        found.check({name: value * 1e25 for name, value in owner.adapter().items()})
    assert found.step == 0 and found.patch.digest == before
    assert all(torch.equal(owner.adapter()[n], t) for n, t in aligner(owner)._emulated.adapter().items())


def test_one_network_beside_the_full_model(owner: ModelOwner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 20: no second copy of the full model or of the emulator; the frozen tensors are those of the bundle."""
    used = [id(module) for module in owner.model.modules()]

    def refused(module: nn.Module, memo: object) -> None:
        raise AssertionError(f"a {type(module).__name__} was copied")

    monkeypatch.setattr(nn.Module, "__deepcopy__", refused, raising=False)
    found = aligner(owner)
    with owner.plugged_in(owner.adapter()) as full:
        assert [id(module) for module in full.modules()] == used
    found.align(owner.adapter(), 1)
    found.check(owner.adapter())
    trained = {id(p) for p in found.factors.parameters.values()}
    assert not any(p.requires_grad for p in found.network.parameters() if id(p) not in trained)
    held = {id(t) for group in found.optimizer.param_groups for t in group["params"]}
    assert held == trained


def test_wrong_options_are_named(owner: ModelOwner, tmp_path: Path) -> None:
    for options, message in (
        ({"lambda_kl": -1.0}, "lambda_kl must be a number from 0"),
        ({"kl_temperature": 0.0}, "kl_temperature must be a number above 0"),
        ({"hidden": "l2"}, "hidden = 'l2'"),
        ({"rank": 0}, "lora rank must be at least 1"),
        ({"lr": 0.0}, "lr must be a number above 0"),
        ({"optimizer": "lion"}, "optimizer = 'lion'"),
        ({"targets": ("nothing",)}, "'nothing' isn't in the emulator"),
    ):
        with pytest.raises(ConfigError, match=message):
            aligner(owner, **options)
    with pytest.raises(UpdateError, match="there is no emulator to align"):
        Aligner(ModelOwner(make_pico("llama"), make_tokenizer(), SPLITS[0]), PUBLIC)
    assert AlignmentOptions().lora == LoraOptions(8, 16.0)
